"""Which version serves, and how the next one comes about: updates, fine-tunes, going back. The files and the store behind it; no messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tumbaga.driver import config as configs
from tumbaga.driver import learner_finetune, process
from tumbaga.driver.backends import registry
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.finetuning import Result
from tumbaga.driver.learner_finetune import Candidate, FineTunes
from tumbaga.driver.rolling_back import Outcome, Request, RollingBack
from tumbaga.driver.rollout import read_serving
from tumbaga.online import quality, selection, versions
from tumbaga.online.errors import VersionError
from tumbaga.online.learner import Learner, Proposal
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Role
from tumbaga.online.store import Store, StoredVersion
from tumbaga.online.versions import LastLayer
from tumbaga.socket_protocol import bus


class Lineage:
    """The versions of a run from the learner's side.

    Args:
        run_dir: the run directory.
        settings: of the run.
        store: of the run.
        potential: what the run began with.
        method: of the labels.
        log: takes a level, an event and its JSON-compatible details.
        tell: called with what should serve, at each change.

    Attributes:
        learner: behind the network of the version that serves.
        potential: that network.
        number, path: of the version that serves; the path is empty for version 0.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: configs.Config,
        store: Store,
        potential: Trainable,
        method: str,
        log: Callable[..., None],
        tell: Callable[[bus.Serve], object],
    ) -> None:
        self._run_dir, self._settings, self._store, self._method, self._log, self._tell = run_dir, settings, store, method, log, tell
        self._limits = selection.Limits(settings.flag.force_error, settings.label.budget, settings.label.core_hours)
        self._first = self.potential = potential
        self._origin = self._network = learner_finetune.network_of(potential)
        self.learner = self._made(potential)
        self._before = learner_finetune.Before(potential, store, method)
        self._fine_tunes = FineTunes(run_dir, settings, store, learner_finetune.can_be_tuned(potential))
        self._rolling = RollingBack(store, run_dir)
        self.number, self.path, self._hurry = 0, "", 0
        self._noted: dict[str, Any] = {}  # of what serves, as it stands on disk

    # -- what serves -------------------------------------------------------------------------------------------------------------------

    def resume(self) -> bool:
        """Serve what served last; return whether there are labels that no version has learnt from."""
        known = self._store.versions()
        if not known:
            self._add_base()
            return self.learner.n_labels > 0  # labels that were imported before the first start
        self.serve_newest()
        self.learner.quantile = replace(self.learner.quantile, q=read_serving(self._run_dir).quantile)
        # labels that were stored when an earlier process died, or released since, and labels that were set aside
        return self._store.label_ids(self._method, Role.TRAIN) != self._store.version_labels(known[-1].number)

    def serve_newest(self) -> None:
        """Serve the newest version that is whole and was not refused, else the base."""
        self.number, self.path = 0, ""
        for version in reversed([v for v in self._store.versions() if v.may_serve and v.number > 0]):
            try:
                layer = versions.read(self._run_dir / version.file)
                self._stand_behind(layer.metadata.get(versions.NETWORK, self._origin), version.number)
            except (VersionError, PotentialError) as error:
                self._store.set_version_state(version.number, "refused")
                self._log("error", "version refused", version=version.number, error=str(error))
                continue
            self.number, self.path = version.number, version.file
            self.learner.serve(layer.readout, layer.covariance, energy_covariance=layer.energy_covariance)
            return
        self._stand_behind(self._origin, 0)
        self.learner.serve_base()

    def _made(self, potential: Trainable) -> Learner:
        """A learner for a network, taught all labels there are."""
        bounds = quality.Bounds(self._settings.label.max_force, self._settings.label.net_force)
        return Learner(potential, self._store, self._limits, self._method, bounds=bounds, tell=self.note)

    def note(self, event: str, **detail: Any) -> None:
        """Keep an event that a person should know of, in the log and in the store."""
        self._log("warning", event, **detail)
        self._store.add_event(event, **detail)

    def _stand_behind(self, network: str, number: int) -> None:
        """Learn behind the network of a version, whichever fine-tune brought it.

        Raises:
            VersionError: the store knows of no such fine-tune.
            PotentialError: its file cannot be loaded.
        """
        if network == self._network:
            return
        potential = self._first
        if network != self._origin:
            brought = learner_finetune.brought_by(self._store, network, number)
            if brought is None:
                raise VersionError(f"version {number}", "was learnt behind a network that no fine-tune of this run has brought")
            wanted = self._settings.potential
            loaded = registry.of_version(wanted.model, self._run_dir / brought.file, "cpu", wanted.dtype)
            assert isinstance(loaded, Trainable)
            potential = loaded
        quantile = self.learner.quantile
        self.potential, self._network, self.learner = potential, network, self._made(potential)
        self.learner.quantile = quantile

    def _add_base(self) -> None:
        """Version 0: what the run started with, whole, so that the run directory can be copied elsewhere."""
        layer = LastLayer(self.learner.readout, self.learner.covariance, {"parent": None, "labels": 0})
        file = versions.write(self._run_dir, 0, self.potential.state(), layer, self.potential.metadata)
        self._store.add_version(StoredVersion(0, file.hash, None, file.path, "served", 0, {}, network=self._origin))

    def _next_number(self) -> int:
        return max(v.number for v in self._store.versions()) + 1

    def _publish(self, number: int, path: str) -> None:
        self.number, self.path, self._hurry = number, path, 0
        self.note_serving()
        self.tell()

    def tell(self) -> None:
        """Say what should serve."""
        self._tell(bus.Serve(self.number, self.path, self._scale(), self.learner.quantile.q, self._hurry))

    def note_serving(self) -> None:
        """On disk for a gateway that starts later, without the learner, and for whoever evaluates the version in another process."""
        told = {"version": self.number, "path": self.path, "lpr_scale": self._scale(), "quantile": self.learner.quantile.q}
        if told != self._noted:
            versions.write_whole(self._run_dir / versions.FOLDER / versions.SERVING, json.dumps(told).encode())
            self._noted = told

    def _scale(self) -> float | None:
        return self.learner.scale.sigma(1.0) if self.learner.scale.known else None

    def served(self, version: int) -> None:
        """Sessions began to move to a version."""
        if version and any(v.may_serve for v in self._store.versions() if v.number == version):
            self._store.set_version_state(version, "served")
            self._store.add_event("swap", version=version)

    def refused(self, version: int, error: str) -> None:
        """No evaluator can serve a version: the one before does."""
        self._store.set_version_state(version, "refused")
        self._log("error", "version refused", version=version, error=error)
        if version == self.number:
            self.serve_newest()
            self.note_serving()
            self.tell()

    def errors(self) -> dict[str, object]:
        """Force RMSE (component, eV/Å) on training and held-out labels, of what serves and of what the run began with."""
        return self.learner.errors(self.learner.readout) | self._before.errors(self.learner.n_labels)

    # -- going on ----------------------------------------------------------------------------------------------------------------------

    @property
    def pinned(self) -> int | None:
        """Number of the version that a person went back to; nothing new is made as long as it is not released."""
        return self._rolling.pinned

    def update(self) -> None:
        """Fit the readout to all labels; serve the result if it is accepted."""
        started = process.monotonic()
        proposal = self.learner.update()
        if not isinstance(proposal, Proposal):
            self._log("warning", "update refused", reason=proposal.reason, **proposal.metrics)
            self._store.add_event("update refused", reason=proposal.reason, **proposal.metrics)
            return
        made_by = self._store.label_ids(self._method, Role.TRAIN)
        if made_by == self._store.version_labels(self.number):
            return  # the label that came was set aside
        number = self._next_number()
        multiplier = self.learner.quantile.after_swap(proposal.ratios).q
        facts = {"parent": self.number, versions.QUANTILE: multiplier, **proposal.metrics}
        layer = LastLayer(proposal.readout, proposal.covariance, facts, energy_covariance=proposal.energy_covariance)
        state = self.potential.state(proposal.readout)
        file = versions.write(self._run_dir, number, state, layer, self.potential.metadata, self._origin)
        labels, metrics = self.learner.n_labels, proposal.metrics
        version = StoredVersion(number, file.hash, self.number, file.path, "accepted", labels, metrics, network=self._network)
        self._store.add_version(version, made_by)
        self.learner.serve(proposal.readout, proposal.covariance, proposal.ratios, proposal.energy_covariance)
        self._publish(number, file.path)
        ms = round(1000 * (process.monotonic() - started), 1)
        self._log("info", "update", version=number, ms=ms, **proposal.metrics)

    def order_fine_tune(self) -> None:
        """Order a fine-tune if one is due."""
        order = self._fine_tunes.order(self.number, self.path, self._method)
        if order is not None:
            self._log("info", "fine-tune ordered", number=order.number, parent=order.parent, labels=len(order.train))

    def look_for_fine_tune(self) -> None:
        """Take what came of the fine-tune under way, if it is done."""
        candidate = self._fine_tunes.came()
        if candidate is not None:
            self._take_fine_tune(candidate)

    def _take_fine_tune(self, candidate: Candidate) -> None:
        """Keep what came of a fine-tune; if the gate passed it, learn and serve from its network on."""
        result, potential = candidate.result, candidate.potential
        if potential is None:
            self._fine_tunes.failed(result)
            self._log("warning", "fine-tune failed", number=result.order.number, reason=result.reason)
            return
        network, learner = learner_finetune.network_of(potential), self._made(potential)
        learner.quantile = self.learner.quantile
        learner.settle()
        result = self._judged_now(result, learner)
        number = self._next_number()
        facts = {"parent": result.order.parent, versions.QUANTILE: learner.quantile.q, **(result.metrics or {})}
        layer = LastLayer(learner.readout, learner.covariance, facts, energy_covariance=learner.energy_covariance)
        file = versions.write(self._run_dir, number, potential.state(), layer, potential.metadata, self._origin)
        state = "accepted" if result.passed else "refused"
        version = StoredVersion(number, file.hash, result.order.parent, file.path, state, learner.n_labels, {}, network=network)
        self._fine_tunes.recorded(version, result)
        level = "info" if result.passed else "warning"
        self._log(level, f"fine-tune {state}", version=number, reason=result.reason, **(result.metrics or {}))
        if result.passed:
            self.potential, self._network, self.learner = potential, network, learner
            self._publish(number, file.path)
            if tuple(self._store.label_ids(self._method, Role.TRAIN)) != result.order.train:
                self.update()  # labels came, or were set aside, while it was trained
        self.order_fine_tune()

    def _judged_now(self, result: Result, learner: Learner) -> Result:
        """The gate held the candidate against the version that it started from; by now another may serve, and more labels are in hand."""
        since = len(self._store.label_ids(self._method, Role.TRAIN)) - len(result.order.train)
        proposal = learner.update() if since else None
        readout = proposal.readout if isinstance(proposal, Proposal) else learner.readout
        pairs = ((self.learner, self.learner.readout), (learner, readout))
        before, after = (one.errors(weights)["holdout_rmse"] for one, weights in pairs)
        check = learner_finetune.no_worse(before, after, since)
        reason = result.reason if check.passed else f"{check.name}: {check.reason}"
        return replace(result, passed=result.passed and check.passed, reason=reason, checks=(*result.checks, check))

    # -- going back --------------------------------------------------------------------------------------------------------------------

    def carry_out(self, request: Request) -> Outcome:
        """Do what a person has asked for."""
        outcome = self._rolling.carry_out(request, self.number)
        if outcome.after != self.number:
            self._go_back(hurry=1)
        self._log("info", "rollback", before=outcome.before, after=outcome.after, problem=outcome.problem, note=outcome.note)
        return outcome

    def withdraw(self, version: int, reason: str, hurry: int) -> None:
        """A version must not serve any longer. The labels that made it are kept; it is not made again before another one has come.

        Args:
            version: its number.
            reason: for people.
            hurry: see `bus.Serve`.
        """
        gone = self._rolling.withdraw(version, reason)
        if self.number in gone:
            self._go_back(hurry)
        if gone:
            self._log("error", "version withdrawn", version=version, reason=reason, withdrawn=gone, serving=self.number)

    def _go_back(self, hurry: int) -> None:
        self.serve_newest()
        self._hurry = hurry
        self.note_serving()
        self.tell()
