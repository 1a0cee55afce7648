"""The gate's questions to potentials: in batches, within a time, and with what they cost. Knows no thresholds of checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tumbaga.online.gate_records import Evidence, Limits
from tumbaga.online.guards import Verdict, check_frame
from tumbaga.online.ports import Potential
from tumbaga.online.records import Array, Frame, Prediction, Role

_ATOMS: Final = 128  # in one batch: a slow potential still answers often enough for its time to be kept


class Asked:
    """A potential and a watch; implements what of `Potential` the gate needs.

    Args:
        potential: what is asked.
        clock: seconds.
        told: called after each batch.
    """

    def __init__(self, potential: Potential, clock: Callable[[], float], told: Callable[[], None]) -> None:
        self.potential, self.spec = potential, potential.spec
        self._clock, self._told = clock, told
        self._seconds, self._atoms = 0.0, 0

    @property
    def seconds_per_atom(self) -> float:
        """What an atom has cost so far; 0 before the first."""
        return self._seconds / max(self._atoms, 1)

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Evaluate frames as one batch."""
        start = self._clock()
        said = self.potential.predict(frames, readouts)
        self._seconds += self._clock() - start
        self._atoms += sum(len(frame) for frame in frames)
        self._told()
        return said

    def all_of(self, frames: Sequence[Frame], until: float = math.inf) -> list[Prediction]:
        """Evaluate frames in batches, in order; of those that there is no time for until then there are no predictions."""
        found: list[Prediction] = []
        batch: list[Frame] = []
        for k, frame in enumerate(frames):
            if not batch and found and self._clock() >= until:
                break
            batch.append(frame)
            if k + 1 == len(frames) or sum(map(len, batch)) + len(frames[k + 1]) > _ATOMS:
                found += self.predict(batch)
                batch = []
        return found


@dataclass(frozen=True, eq=False)
class Case:
    """What is judged, by what, within which time.

    Attributes:
        candidate, serving, original: the potentials; the last stands for the serving one where it is not known.
        evidence, limits: see there.
        clock: seconds.
    """

    candidate: Asked
    serving: Asked
    original: Asked
    evidence: Evidence
    limits: Limits
    clock: Callable[[], float]

    @property
    def sound(self) -> list[Frame]:
        """Frames of more than one atom in which the guards find nothing, recent ones first."""
        frames = [*self.evidence.recent, *self.evidence.frames]
        return [one for one in frames if len(one) > 1 and check_frame(one).verdict is Verdict.OK]

    def until(self, share: float) -> float:
        """When a share of the gate's time, from now on, is over."""
        return self.clock() + share * self.limits.seconds


@dataclass(frozen=True, eq=False)
class Answer:
    """What was said of a frame; `place` is its number among the evidence's labels, replay or recent frames."""

    place: int
    candidate: Prediction
    serving: Prediction


@dataclass(frozen=True, eq=False)
class Answers:
    """What was said of the evidence, as far as there was time; held-out labels are all there, and come first."""

    labels: list[Answer]
    replay: list[Answer]
    recent: list[Answer]

    @property
    def every(self) -> list[Answer]:
        """All of them."""
        return self.labels + self.replay + self.recent


def collect(case: Case) -> Answers:
    """Ask both versions about the evidence."""
    labels, rng = case.evidence.labels, np.random.default_rng([case.limits.seed, 1])
    held = [k for k, one in enumerate(labels) if one.role is Role.HOLDOUT]
    learnt = [k for k, one in enumerate(labels) if one.role is not Role.HOLDOUT]
    mixed = [int(k) for k in rng.permutation(len(case.evidence.replay))]  # whatever there is time for stands for all
    frames = [one.frame for one in labels], [one.frame for one in case.evidence.replay], case.evidence.recent
    audits = _both(case, frames[0], held, math.inf)
    return Answers(
        audits + _both(case, frames[0], learnt, case.until(0.1)),
        _both(case, frames[1], mixed, case.until(0.15)),
        _both(case, frames[2], range(len(frames[2])), case.until(0.05)),
    )


def _both(case: Case, frames: Sequence[Frame], places: Sequence[int], until: float) -> list[Answer]:
    now = case.clock()
    asked = [frames[k] for k in places]
    # half of the time each; the second one is asked only about what the first one had time for
    candidate = case.candidate.all_of(asked, 0.5 * (now + until))
    serving = case.serving.all_of(asked[: len(candidate)], until)
    return [Answer(*each) for each in zip(places, candidate, serving, strict=False)]
