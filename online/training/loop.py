"""The loop: epochs of batches, the moving average judged after each, a state on disk from which a killed training goes on to the same end.

All that is random is a function of the seed and of how many epochs and steps are done, so the state need not hold it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tumbaga.online.errors import TrainingError, TrainingStoppedError
from tumbaga.online.ports import Tunable, Tuning
from tumbaga.online.records import Array, LabelledFrame
from tumbaga.online.training import checkpoints
from tumbaga.online.training.average import Average, put
from tumbaga.online.training.dataset import Sample, epoch_order, in_batches, samples, targets
from tumbaga.online.training.losses import Sums, consistency, supervised
from tumbaga.online.training.offsets import reference_for
from tumbaga.online.training.settings import Settings

REFERENCE: Final = "reference"  # the group of what is no parameter: reference energies
SAVE_S: Final = 10.0  # between two checkpoints
_LOOK: Final = 4  # batches of frames that are only looked at are so many times larger


@dataclass(frozen=True, eq=False)
class Sets:
    """What a training sees.

    Attributes:
        train: to be learnt.
        valid: to choose the best epoch by, and to stop by; may be empty: the last one then comes out.
        replay: not to be forgotten; their energies get reference energies of their own, so that they may be of another level of theory.
    """

    train: Sequence[LabelledFrame]
    valid: Sequence[LabelledFrame] = ()
    replay: Sequence[LabelledFrame] = ()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came out.

    Attributes:
        potential: with the averaged weights of the best epoch.
        reference: its reference energies, shape (n_elements,), eV.
        epochs: how many were done.
        best: the epoch whose weights these are, counted from 0.
        history: the log, a line an epoch.
    """

    potential: Tunable
    reference: Array
    epochs: int
    best: int
    history: list[dict[str, Any]]


@dataclass
class _Progress:
    """Where a training stands; numbers only.

    Attributes:
        epoch: epochs that are done. batch: batches of the current one that are done. steps: batches in all.
        best, best_epoch: lowest validation loss so far, and when. bad: epochs since then, or since the last halving. halvings: of the rate.
        ended: whether nothing is left to do.
        seconds: time spent.
        sums: errors of the current epoch so far.
    """

    epoch: int = 0
    batch: int = 0
    steps: int = 0
    best: float = math.inf
    best_epoch: int = 0
    bad: int = 0
    halvings: int = 0
    ended: bool = False
    seconds: float = 0.0
    sums: Sums = field(default_factory=Sums)


class Training:
    """One training, new or gone on with.

    Args:
        start: the potential to start from; it is not changed.
        sets: frames of its elements.
        settings: see there.
        folder: for checkpoint and log; what it holds must be of this training.
        scratch: start with new weights of the same shape instead.
        observe: told of each epoch's line of the log.
        stop: asked after every step; True writes a checkpoint and ends with TrainingStoppedError.
        save_s: seconds between checkpoints.
        clock: seconds.

    Raises:
        TrainingError: there is nothing to learn from, a frozen group that there is not, or the folder is of another training.
    """

    def __init__(
        self,
        start: Tunable,
        sets: Sets,
        settings: Settings,
        folder: Path,
        *,
        scratch: bool = False,
        observe: Callable[[dict[str, Any]], None] | None = None,
        stop: Callable[[], bool] | None = None,
        save_s: float = SAVE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not sets.train:
            raise TrainingError("training data", "hold no frame")
        self._settings, self._folder, self._observe, self._stop = settings, folder, observe, stop
        self._save_s, self._clock = save_s, clock
        self._tuning = start.tuning(settings.seed if scratch else None)
        self._module = self._tuning.module
        trained = _freeze(self._tuning, settings.frozen)
        self._like: Tensor = trained[0]
        self._fingerprint = fingerprint(self._tuning, sets, settings)
        elements = start.spec.elements
        fixed = REFERENCE in settings.frozen
        self.reference = np.array(self._tuning.reference) if fixed else reference_for(self._tuning, elements, sets.train)
        self._new = samples(self._tuning, elements, sets.train, self.reference)
        self._valid = samples(self._tuning, elements, sets.valid, self.reference)
        old = reference_for(self._tuning, elements, sets.replay)
        self._replay = samples(self._tuning, elements, sets.replay, old, settings.replay_weight)
        self._virials = settings.virial_weight > 0 and any(one.has_virial for one in (*self._new, *self._valid, *self._replay))
        self._average = Average(self._module, settings.average)
        self._best = dict(self._average.values)
        self._optimiser = torch.optim.AdamW(trained, lr=settings.rate, weight_decay=settings.decay)
        self._at, self._saved = _Progress(), 0.0

    def run(self) -> Outcome:
        """Train to the end, from where the folder says it stands.

        Raises:
            TrainingError: the checkpoint is of another training or damaged, or the loss is no finite number any more.
            TrainingStoppedError: it was told to stop.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._settings.seed)  # for modules that draw numbers of their own
            self._resume()
            while not self._at.ended:
                self._epoch()
        put(self._module, self._best)
        potential = self._tuning.trained(self.reference, {})
        return Outcome(potential, self.reference, self._at.epoch, self._at.best_epoch, checkpoints.lines(self._folder))

    def _epoch(self) -> None:
        settings, at = self._settings, self._at
        batches = in_batches(epoch_order(self._new, self._replay, settings.replay, settings.seed, at.epoch), settings.batch_atoms)
        while at.batch < len(batches):
            rate = settings.rate_at(at.steps, (at.epoch + at.batch / len(batches)) / settings.epochs, at.halvings)
            with self._timed():
                self._step(batches[at.batch], rate)
            at.batch += 1
            at.steps += 1
            self._keep()
        with self._timed():
            rate = self._optimiser.param_groups[0]["lr"]
            line = {"epoch": at.epoch, "steps": at.steps, "rate": rate, **_named("train", at.sums.means()), **self._judged(at.sums)}
        checkpoints.add_line(self._folder, {**line, "best": at.best_epoch, "seconds": round(at.seconds, 3)})
        at.epoch, at.batch, at.sums = at.epoch + 1, 0, Sums()
        at.ended = at.epoch >= settings.epochs or bool(settings.patience and at.epoch - 1 - at.best_epoch >= settings.patience)
        self._keep(now=at.ended)
        if self._observe is not None:
            self._observe({**line, "best": at.best_epoch, "seconds": at.seconds, "ended": at.ended})

    def _step(self, batch: list[Sample], rate: float) -> None:
        settings, wanted = self._settings, targets(batch, self._like)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        said = self._tuning.evaluate([one.prepared for one in batch], virials=self._virials)
        loss = supervised(said, wanted, settings)
        if settings.pitc or settings.pisc:
            loss = loss + consistency(self._tuning, batch, said, settings, (settings.seed, self._at.steps))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError("the loss", f"is no finite number after {self._at.steps} steps; take a lower rate than {settings.rate:g}")
        self._optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), settings.clip)
        self._optimiser.step()
        self._average.update(self._module, self._at.steps)
        self._at.sums.add(value, said, wanted)

    def _judged(self, trained: Sums) -> dict[str, float]:
        """Errors of the average on the validation frames; notes the best."""
        at = self._at
        if not self._valid:
            at.best, at.best_epoch, self._best = trained.means()["loss"], at.epoch, _copied(self._average.values)
            return {}
        with self._average.inside(self._module):
            sums = Sums()
            for batch in in_batches(self._valid, _LOOK * self._settings.batch_atoms):
                wanted = targets(batch, self._like)
                said = self._tuning.evaluate([one.prepared for one in batch], virials=self._virials, create_graph=False)
                sums.add(float(supervised(said, wanted, self._settings).detach()), said, wanted)
        means = sums.means()
        if means["loss"] < at.best:
            at.best, at.best_epoch, at.bad, self._best = means["loss"], at.epoch, 0, _copied(self._average.values)
            return _named("valid", means)
        at.bad += 1
        if self._settings.schedule == "plateau" and at.bad >= max(1, self._settings.patience // 3):
            at.bad, at.halvings = 0, at.halvings + 1
        return _named("valid", means)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        since = self._clock()
        yield
        self._at.seconds += self._clock() - since

    # -- disk --------------------------------------------------------------------------------------------------------------------------

    def _keep(self, now: bool = False) -> None:
        """Write a checkpoint if it is time for one; leave if told to."""
        stop = self._stop is not None and self._stop() and not self._at.ended
        if now or stop or self._clock() - self._saved >= self._save_s:
            checkpoints.save(self._folder, self._state())
            self._saved = self._clock()
        if stop:
            raise TrainingStoppedError(str(self._folder), self._at.epoch)

    def _state(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "progress": asdict(self._at),
            "module": self._module.state_dict(),
            "average": self._average.values,
            "best": self._best,
            "optimiser": self._optimiser.state_dict(),
            "reference": self.reference.tolist(),
            "rng": torch.random.get_rng_state(),
        }

    def _resume(self) -> None:
        self._saved = self._clock()
        state = checkpoints.load(self._folder, self._fingerprint)
        if state is not None:
            self._module.load_state_dict(state["module"])
            self._average.values, self._best = state["average"], state["best"]
            self._optimiser.load_state_dict(state["optimiser"])
            self._at = _Progress(**{**state["progress"], "sums": Sums(**state["progress"]["sums"])})
            self.reference = np.array(state["reference"])
            torch.random.set_rng_state(state["rng"])
        checkpoints.keep_lines(self._folder, self._at.epoch)


def fingerprint(tuning: Tuning, sets: Sets, settings: Settings) -> str:
    """Return a hash of all that decides how a training goes: start, frames and labels in their order, settings."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for name, value in tuning.module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    digest.update(np.array(tuning.reference).tobytes())
    for data in (sets.train, sets.valid, sets.replay):
        digest.update(b"|")
        for one in data:
            virial = b"" if one.label.virial is None else one.label.virial.tobytes()
            digest.update(one.frame.key.encode() + np.float64(one.label.energy).tobytes() + one.label.forces.tobytes() + virial)
    return digest.hexdigest()


def _freeze(tuning: Tuning, frozen: Sequence[str]) -> list[Tensor]:
    """Freeze groups; return the parameters that are left to train."""
    known = (*tuning.groups, REFERENCE)
    for name in frozen:
        if not any(_within(group, name) for group in known):
            raise TrainingError("frozen group", f"{name!r} is none of this potential's; known are {', '.join(known)}")
    still = {one for group, names in tuning.groups.items() if any(_within(group, name) for name in frozen) for one in names}
    trained = []
    for name, value in tuning.module.named_parameters():
        value.requires_grad_(value.requires_grad and name not in still)
        if value.requires_grad:
            trained.append(value)
    if not trained:
        raise TrainingError("frozen groups", "are all there are: nothing is left to train")
    return trained


def _within(group: str, name: str) -> bool:
    return group == name or group.startswith(f"{name}.")


def _named(set_name: str, means: dict[str, float]) -> dict[str, float]:
    return {f"{set_name}_{key}": value for key, value in means.items()}


def _copied(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}
