"""What the learner process has to do with fine-tunes: it orders them, and takes what came of them. Loads candidates, trains nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tumbaga.driver import config as configs
from tumbaga.driver import finetuning
from tumbaga.driver.backends import registry
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.finetuning import Order, Result
from tumbaga.online import versions
from tumbaga.online.gate_records import Check
from tumbaga.online.ports import Trainable, Tunable
from tumbaga.online.records import Role
from tumbaga.online.store import Store, StoredVersion
from tumbaga.online.store.labels import StoredLabel
from tumbaga.online.store.versions import Gate

FINE_TUNE: Final = "fine-tune"
FAILED: Final = "fine-tune failed"  # event
_NUMBER: Final = "fine_tune"  # of a version's metrics: the order that it came of
_NOW: Final = "serving now"  # name of the last check
_WORSE, _NEGLIGIBLE = 1.05, 0.003  # a candidate may be so much worse, relative and eV/Å: it was not fitted to the newest labels


@dataclass(frozen=True, eq=False)
class Candidate:
    """A result with its potential, loaded; None where the fine-tune came to nothing."""

    result: Result
    potential: Trainable | None


class FineTunes:
    """The fine-tunes of one run.

    Args:
        run_dir: the run directory.
        settings: of the run.
        store: of the run.
        can: whether the potential can be trained.
    """

    def __init__(self, run_dir: Path, settings: configs.Config, store: Store, can: bool) -> None:
        self._run_dir, self._settings, self._store = run_dir, settings, store
        self._every = settings.learn.finetune_every if can else 0
        last = finetuning.newest(run_dir)
        self._last = last
        self._open = last
        if last is not None and self._taken(last):
            self._done(last)  # once more, if an earlier process was killed before it could

    def order(self, parent: int, path: str, method: str) -> Order | None:
        """Order a fine-tune if one is due and none is under way.

        Args:
            parent: number of the version that serves.
            path: its file; empty for version 0.
            method: of the labels.
        """
        if self._open is not None or not self._every:
            return None
        train, last = self._store.label_ids(method, Role.TRAIN), self._last
        if not finetuning.due(len(train), len(last.train) if last else 0, self._every, self._refused()):
            return None
        base = next(version.file for version in self._store.versions() if version.number == 0)
        held_out = self._store.label_ids(method, Role.HOLDOUT)
        number = last.number + 1 if last else 1
        order = Order(number, parent, path or base, base, tuple(train), tuple(held_out), method)
        finetuning.put_order(self._run_dir, order)
        self._last = self._open = order
        return order

    def came(self) -> Candidate | None:
        """What came of the order under way, once; None while it is under way."""
        if self._open is None:
            return None
        result = finetuning.result(self._run_dir, self._open)
        if result is None:
            return None
        file = result.candidate(self._run_dir)
        if file is None:
            return Candidate(result, None)
        wanted = self._settings.potential
        try:
            potential = registry.of_version(wanted.model, file, "cpu", wanted.dtype)
        except PotentialError:
            return Candidate(result, None)
        return Candidate(result, potential if isinstance(potential, Trainable) else None)

    def failed(self, result: Result) -> None:
        """Note that an order came to nothing."""
        self._store.add_event(FAILED, number=result.order.number, reason=result.reason)
        self._done(result.order)

    def recorded(self, version: StoredVersion, result: Result) -> None:
        """Note in the store what came of an order: the version with its labels, and what the gate said of it."""
        metrics = {**version.metrics, **(result.metrics or {}), _NUMBER: result.order.number}
        gates = [Gate(version.number, check.name, check.passed, check.reason, check.numbers) for check in result.checks]
        self._store.add_version(StoredVersion(**{**vars(version), "metrics": metrics, "kind": FINE_TUNE}), result.order.train, gates)
        self._done(result.order)

    def _done(self, order: Order) -> None:
        finetuning.clear(self._run_dir, order)
        self._open = None

    def _taken(self, order: Order) -> bool:
        tuned = (version.metrics.get(_NUMBER) for version in self._store.versions() if version.kind == FINE_TUNE)
        return order.number in (*tuned, *(event["number"] for event in self._store.events(FAILED)))

    def _refused(self) -> int:
        """Orders since the last one that the gate passed."""
        passed = [v.metrics.get(_NUMBER, 0) for v in self._store.versions() if v.kind == FINE_TUNE and v.state != "refused"]
        return (self._last.number if self._last else 0) - max(passed, default=0)


class Before:
    """How good the potential was that the run began with, on the labels of the run; what later versions are told against.

    Args:
        potential: that one.
        store, method: of the labels.
    """

    def __init__(self, potential: Trainable, store: Store, method: str) -> None:
        self._potential, self._store, self._method = potential, store, method
        self._seen = 0
        self._squares: dict[int, tuple[Role, float, int]] = {}  # by label: its role, sum of squared errors and how many components

    def errors(self, labels: int) -> dict[str, object]:
        """Force RMSE (component, eV/Å) on training and held-out labels; None where there is none.

        Args:
            labels: how many there are; they are read only when that has changed.
        """
        if labels != self._seen:
            known, self._seen = self._squares, labels
            self._squares = {one.id: known.get(one.id) or self._judged(one) for one in self._store.labels(self._method)}
        found: dict[str, object] = {}
        for role in Role:
            mine = [(square, count) for of, square, count in self._squares.values() if of is role]
            total = sum(count for _, count in mine)
            found[f"{role.value}_rmse_base"] = math.sqrt(sum(square for square, _ in mine) / total) if total else None
        return found

    def _judged(self, one: StoredLabel) -> tuple[Role, float, int]:
        (said,) = self._potential.predict([one.frame])
        return one.role, float(((said.forces - one.label.forces) ** 2).sum()), said.forces.size


def no_worse(before: object, after: object, since: int) -> Check:
    """Hold a candidate, with the last-layer update that it would get at once, against what serves by now.

    Args:
        before, after: force RMSE on all held-out labels, eV/Å; None where there are none.
        since: training labels that came while it was trained.
    """
    numbers = {"serving_rmse": before, "candidate_rmse": after, "labels_since": since}
    if not (isinstance(before, float) and isinstance(after, float)):
        return Check(_NOW, True, {"labels_since": since}, "there are no held-out labels to hold it against what serves now")
    passed = after <= _WORSE * before + _NEGLIGIBLE
    told = f"force RMSE {after:.4f} eV/Å on the held-out labels, {before:.4f} of what serves now, {since} labels later"
    return Check(_NOW, passed, {key: value for key, value in numbers.items() if isinstance(value, (int, float))}, told)


def brought_by(store: Store, network: str, number: int) -> StoredVersion | None:
    """The version that brought the network behind another one: the last fine-tune up to there with the same fingerprint."""
    found = [v for v in store.versions() if v.kind == FINE_TUNE and v.network == network and v.number <= number]
    return found[-1] if found else None


def network_of(potential: Trainable) -> str:
    """Fingerprint of what lies before the readout."""
    return versions.fingerprint(potential.state(), potential.readout())


def can_be_tuned(potential: Trainable) -> bool:
    """Whether there is a training half."""
    return isinstance(potential, Tunable)
