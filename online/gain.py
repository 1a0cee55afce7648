"""Which waiting frame would tell most about the readout, for what its label costs. Pure numpy, float64; knows neither potentials nor stores.

The gain of a frame with force rows H is the entropy that its forces would take from the posterior N(w, C) of the readout,
g = 1/2 ln det(1 + H C H^T / s^2), s being the noise of a force component. What is under way counts as known: its label will come, and what it
will say about the spread needs no label. So of two frames that are nearly alike the second gains next to nothing once the first is begun.

Source: MacKay, Neural Computation 4, 590 (1992) (information gain of linear models); Kulesza & Taskar, arXiv 1207.6083 (greedy choice as
the most probable set of a determinantal process); Minoux (1978) (gains only fall as more is known, so that old ones bound new ones).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tumbaga.online.records import Array, Ints

STOP = 0.05  # a gain below this part of the first one is not worth a label before the next update
_SCALING = 2.5  # labels take about (number of electrons) ** 2.5: between density fitting and exact integrals
_LEAST_SECONDS = 1e-3  # what a label takes at least, however fast its method


@dataclass(frozen=True, eq=False)
class _Spread:
    """Force rows in units of the noise: at most n_columns `rows`; `spread` is rows @ covariance, `inner` spread @ rows^T, `alone` the gain if
    nothing else is known."""

    rows: Array
    spread: Array
    inner: Array
    alone: float

    @classmethod
    def of(cls, rows: Array, covariance: Array) -> _Spread:
        if len(rows) > rows.shape[1]:
            rows = np.asarray(np.linalg.qr(rows, mode="r"))  # only rows^T rows counts, and this has the same
        spread = rows @ covariance
        inner = spread @ rows.T
        return cls(rows, spread, inner, _half_log_det(inner))


class Gains:
    """Gains of frames under one posterior; what was computed once is kept.

    Args:
        covariance: of the readout, shape (n_columns, n_columns), eV^2.
        sigma_force: noise of a force component, eV/Å.
    """

    def __init__(self, covariance: Array, sigma_force: float) -> None:
        self._covariance = covariance / sigma_force**2
        self._frames: dict[int, _Spread] = {}
        self._known: frozenset[int] = frozenset()
        self._bounds: dict[int, float] = {}  # of frames looked at while no more than `_known` was known

    def __contains__(self, frame: int) -> bool:
        return frame in self._frames

    def add(self, frame: int, rows: Array) -> None:
        """Take in a frame under a number of its own; rows are -dphi/dR, shape (3 * n_atoms, n_columns), float64, per Å, all finite."""
        if frame not in self._frames:
            self._frames[frame] = _Spread.of(rows, self._covariance)

    def keep(self, frames: Iterable[int]) -> None:
        """Forget all other frames."""
        kept = set(frames)
        self._frames = {frame: spread for frame, spread in self._frames.items() if frame in kept}

    def gain(self, frame: int, known: Sequence[int] = ()) -> float:
        """Return the gain of a frame once the labels of others are known, in nats."""
        return self._conditional(frame, self._factor(known))

    def best(
        self, frames: Sequence[int], under_way: Sequence[int] = (), learnt: Sequence[int] = (), costs: Mapping[int, float] | None = None
    ) -> int | None:
        """Return the frame with the largest gain for its cost.

        Args:
            frames: to choose from.
            under_way: frames whose labels are being computed: they count as known.
            learnt: frames whose labels came after this posterior: likewise.
            costs: of each frame's label, in any unit; None if all are alike.

        Returns:
            None if there is nothing to choose from, or if it is better to wait for a label that is under way: no gain is `STOP` times the
            largest that there was before anything was known.
        """
        known = (*under_way, *learnt)
        least = STOP * max((self._frames[frame].alone for frame in (*frames, *known)), default=0.0) if under_way else 0.0
        factor, bounds = self._factor(known), self._bounds_for(known)
        worth = {frame: bounds.get(frame, self._frames[frame].alone) / (costs[frame] if costs else 1.0) for frame in frames}
        exact: set[int] = set()
        while worth:
            frame = max(worth, key=worth.__getitem__)
            if frame in exact:
                return frame
            gain = bounds[frame] = self._conditional(frame, factor)
            exact.add(frame)
            if gain < least:
                del worth[frame]
            else:
                worth[frame] = gain / (costs[frame] if costs else 1.0)
        return None

    def _bounds_for(self, known: Sequence[int]) -> dict[int, float]:
        if not self._known <= frozenset(known):  # something that was under way is not any more
            self._bounds = {}
        self._known = frozenset(known)
        return self._bounds

    def _factor(self, known: Sequence[int]) -> Array | None:
        """L^-1 rows of all known frames, with L L^T = 1 + rows @ covariance @ rows^T: what they will have told about any other row."""
        if not known:
            return None
        rows = np.concatenate([self._frames[frame].rows for frame in known])
        spread = np.concatenate([self._frames[frame].spread for frame in known])
        factor: Array = np.linalg.solve(np.linalg.cholesky(_one_plus(spread @ rows.T)), rows)
        return factor

    def _conditional(self, frame: int, factor: Array | None) -> float:
        one = self._frames[frame]
        if factor is None:
            return one.alone
        explained = factor @ one.spread.T
        return _half_log_det(one.inner - explained.T @ explained)


def _half_log_det(spread: Array) -> float:
    """Return 1/2 ln det(1 + spread) of a symmetric matrix without negative eigenvalues."""
    return float(np.log(np.diag(np.linalg.cholesky(_one_plus(spread)))).sum())


def _one_plus(matrix: Array) -> Array:
    made: Array = matrix.copy()
    made[np.diag_indices_from(made)] += 1.0
    return made


class Costs:
    """What labels cost, learnt from those that came: seconds of a frame's composition, else by the number of electrons."""

    def __init__(self) -> None:
        self._seconds: dict[bytes, tuple[int, float]] = {}  # labels and seconds of each composition
        self._total, self._electrons = 0.0, 0.0

    def add(self, numbers: Ints, seconds: float) -> None:
        """A label of these species, shape (n_atoms,), took so many seconds."""
        composition = _composition(numbers)
        count, total = self._seconds.get(composition, (0, 0.0))
        self._seconds[composition] = (count + 1, total + seconds)
        self._total, self._electrons = self._total + seconds, self._electrons + _scaled(numbers)

    def of(self, numbers: Ints) -> float:
        """Return what a label of these species is expected to take, seconds; in a unit of its own before the first label."""
        count, total = self._seconds.get(_composition(numbers), (0, 0.0))
        rate = self._total / self._electrons if self._electrons else 1.0
        return max(total / count if count else rate * _scaled(numbers), _LEAST_SECONDS)


def _composition(numbers: Ints) -> bytes:
    return np.sort(numbers).tobytes()


def _scaled(numbers: Ints) -> float:
    return math.pow(float(numbers.sum()), _SCALING)
