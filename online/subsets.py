"""Which labelled frames of a data set are used: by what they are made of, by chance, or by how much they tell a linear readout. Pure numpy.

Choices return indices in the order of choice or, where there is none, in the order of the data.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tumbaga.online.errors import BadFrameError
from tumbaga.online.records import Array, Frame, Ints, LabelledFrame, Prediction

COMPARISONS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Count:
    """A condition on the number of atoms of one element, e.g. Count(29, ">=", 2): at least two copper atoms.

    Attributes:
        number: atomic number; 0 counts all atoms.
        comparison: one of `COMPARISONS`.
        value: what the number of atoms is compared with.
    """

    number: int
    comparison: str
    value: int

    def __call__(self, frame: Frame) -> bool:
        """Whether the frame meets it."""
        count = len(frame) if self.number == 0 else int((frame.numbers == self.number).sum())
        return COMPARISONS[self.comparison](count, self.value)


@dataclass(frozen=True)
class Criteria:
    """What a labelled frame must be like; all conditions hold at once.

    Attributes:
        present: atomic numbers that must all be there.
        only: atomic numbers of which nothing else may be there; empty allows all.
        counts: conditions on numbers of atoms.
        energy: lowest and highest energy of the label per atom, eV.
        max_force: largest force of the label on any atom (norm), eV/Å.
    """

    present: tuple[int, ...] = ()
    only: tuple[int, ...] = ()
    counts: tuple[Count, ...] = ()
    energy: tuple[float, float] = (-np.inf, np.inf)
    max_force: float = np.inf

    def __call__(self, one: LabelledFrame) -> bool:
        """Whether the labelled frame meets them."""
        species = set(one.frame.numbers.tolist())
        low, high = self.energy
        return (
            species.issuperset(self.present)
            and (not self.only or species.issubset(self.only))
            and all(count(one.frame) for count in self.counts)
            and low <= one.label.energy / len(one.frame) <= high
            and float(np.linalg.norm(one.label.forces, axis=1).max()) <= self.max_force
        )


def by_chance(total: int, size: int, seed: int) -> Ints:
    """Return so many different indices below `total`, in increasing order; all of them if there are no more.

    The choice of fewer is part of the choice of more with the same seed and total, so that learning curves add labels and drop none.
    """
    return np.sort(np.random.default_rng(seed).permutation(total)[:size])


def frame_features(frame: Frame, prediction: Prediction, elements: Sequence[int]) -> Array:
    """Return the last-layer features of a frame, summed in element blocks and divided by its atoms, shape (n_columns,).

    They are the energy row of the frame per atom: frames with equal ones get equal energies per atom from every readout.

    Raises:
        BadFrameError: the potential gives no features, or not finite ones.
    """
    if prediction.features is None:
        raise BadFrameError("features", "are not given by this potential, so that it cannot tell frames apart")
    blocks = [prediction.features[frame.numbers == z].sum(axis=0) for z in elements]
    features: Array = np.concatenate(blocks) / len(frame)
    if not np.isfinite(features).all():
        raise BadFrameError("features", "hold a number that is not finite")
    return features


def farthest_points(features: Array, size: int, held: Array | None = None) -> Ints:
    """Choose frames one by one, each the farthest from all chosen so far (Euclidean); stops where nothing new is left.

    Args:
        features: of each frame, shape (n_frames, n_columns).
        size: how many at most.
        held: features of frames that are there already, shape (n_held, n_columns); without any, the first is the one nearest to the mean.

    Source:
        T. F. Gonzalez, Theor. Comput. Sci. 38, 293 (1985).
    """
    chosen: list[int] = []
    if held is None or not len(held):
        start = int(np.linalg.norm(features - features.mean(axis=0), axis=1).argmin()) if len(features) and size > 0 else -1
        chosen = [start] if start >= 0 else []
        nearest = np.linalg.norm(features - features[start], axis=1) if chosen else np.zeros(len(features))
    else:
        nearest = np.min([np.linalg.norm(features - one, axis=1) for one in held], axis=0)
    while len(chosen) < min(size, len(features)):
        best = int(nearest.argmax())
        if nearest[best] <= 0.0:
            break  # what is left repeats what is chosen
        chosen.append(best)
        nearest = np.minimum(nearest, np.linalg.norm(features - features[best], axis=1))
    return np.array(chosen, dtype=np.int64)


def log_det(rows: Sequence[Array], size: int, covariance: Array, noise: float, stop: float = 0.0) -> Ints:
    """Choose frames one by one, each the one whose label would tell most about a linear readout given those chosen so far.

    The gain of a frame is ½ ln det(1 + H C Hᵀ / noise²), the drop of the readout's entropy; C is the covariance after the frames chosen
    before. Gains only fall as frames are added, so a gain computed earlier is a bound, and most need not be computed again.

    Args:
        rows: of each frame, shape (n_rows, n_columns): force rows, or the energy row (`frame_features`) alone.
        size: how many at most.
        covariance: of the readout before any of them, shape (n_columns, n_columns).
        noise: standard deviation of a label in the units of rows times readout.
        stop: ends where the best gain is below this part of the first.

    Source:
        Krause, Singh, Guestrin, J. Mach. Learn. Res. 9, 235 (2008) (greedy choice); Minoux (1978) (bounds).
    """
    current = np.array(covariance, dtype=np.float64)
    bounds = [(-np.inf, k) for k in range(len(rows))]
    chosen: list[int] = []
    first = np.inf
    fresh: dict[int, int] = {}  # when the gain of a frame was computed
    while bounds and len(chosen) < size:
        bound, k = heapq.heappop(bounds)
        if fresh.get(k) != len(chosen):
            fresh[k] = len(chosen)
            heapq.heappush(bounds, (-_gain(rows[k], current, noise), k))
            continue
        first = -bound if not chosen else first
        if -bound <= stop * first:
            break
        chosen.append(k)
        spread = rows[k] @ current
        inner = spread @ rows[k].T + noise**2 * np.eye(len(rows[k]))
        current -= spread.T @ np.linalg.solve(inner, spread)
        current = 0.5 * (current + current.T)
    return np.array(chosen, dtype=np.int64)


def _gain(rows: Array, covariance: Array, noise: float) -> float:
    return 0.5 * float(np.linalg.slogdet(np.eye(len(rows)) + rows @ covariance @ rows.T / noise**2)[1])
