"""Guards on how the frames of one engine follow one another: forces, displacements and energies held against their own past. Pure numpy.

Engines send neither velocities nor a time step, so what is usual is learnt from the run itself. Frames that are no sequence (replica exchange,
line searches, a list of structures) move by much more than their own mean again and again: then displacements and energies say nothing.
All thresholds are design values.
"""

from __future__ import annotations

import math

import numpy as np

from tumbaga.online.bonds import BondWatch
from tumbaga.online.guards import QUIET, Finding, Verdict
from tumbaga.online.records import Array, Frame, Ints, Prediction

LEARNT_FROM = 200  # frames before anything is called unusual
FORCE_RATIO, LARGE_FORCE = 10.0, 15.0  # of the running 99.9 % quantile; eV/Å
STEP_WARN, STEP_CRIT, LONG_STEP = 5.0, 10.0, 0.5  # of an element's running rms; Å
ENERGY_WARN, ENERGY_CRIT = 10.0, 30.0  # of the running standard deviation
_NO_SEQUENCE = 3.0  # median of the largest step over its rms, above which frames do not follow one another
_RATE = 1.0 / LEARNT_FROM  # of running means, once they are learnt
_QUANTILE, _QUANTILE_STEP = 0.999, 0.02
_MEDIAN_STEP = 0.05


class SequenceWatch:
    """One run of frames with equal atoms; a step costs some ten microseconds."""

    def __init__(self) -> None:
        self._numbers: Ints | None = None
        self._restart()

    def _restart(self) -> None:
        self._seen = 0
        self._bonds = BondWatch()
        self._positions: Array = np.zeros((0, 3))
        self._energy = 0.0
        self._elements: Ints = np.zeros(0, np.int64)
        self._counts: Array = np.zeros(0)
        self._squares: Array = np.zeros(0)  # mean squared step of each element, Å^2
        self._ratio = 1.0  # running median of the largest step over its rms
        self._force = 0.0  # running quantile of the largest force, eV/Å
        self._energy_square = 0.0  # running mean of the squared energy step, eV^2

    @property
    def follows(self) -> bool:
        """Whether the frames look like a sequence."""
        return self._ratio <= _NO_SEQUENCE

    def check(self, frame: Frame, prediction: Prediction, swap_work: float = 0.0) -> Finding:
        """Judge a frame that is about to be answered against those before it, and take it into account.

        Args:
            frame: with as many atoms of the same elements as the last ones; with others, all begins anew.
            prediction: a finite one.
            swap_work: eV that a change of versions did at this frame; it is no jump of the energy.

        Returns:
            The worst finding: OK, WARN or CRIT.
        """
        if frame.numbers is not self._numbers and not (self._numbers is not None and np.array_equal(frame.numbers, self._numbers)):
            self._restart()
            _, self._elements, counts = np.unique(frame.numbers, return_inverse=True, return_counts=True)
            self._counts, self._squares = counts.astype(np.float64), np.zeros(len(counts))
        self._numbers = frame.numbers
        found = [self._by_force(frame, prediction), self._bonds.check(frame)]
        if len(self._positions):
            found += [self._by_step(frame), self._by_energy(prediction.energy - self._energy - swap_work)]
        self._positions, self._energy = frame.positions, prediction.energy
        self._seen += 1
        return max(found, key=lambda finding: finding.verdict)

    @property
    def _learnt(self) -> bool:
        return self._seen > LEARNT_FROM

    @property
    def _weight(self) -> float:
        return max(_RATE, 1.0 / max(self._seen, 1))

    def _by_force(self, frame: Frame, prediction: Prediction) -> Finding:
        forces = prediction.forces
        squares = np.einsum("ij,ij->i", forces, forces)
        atom = int(squares.argmax())
        largest, usual = math.sqrt(squares[atom]), self._force
        # stochastic approximation of a quantile, in relative steps: up by much when it is passed, down by little otherwise
        if not self._seen:
            self._force = largest
        else:
            self._force = usual * (1.0 + _QUANTILE_STEP * (_QUANTILE if largest > usual else _QUANTILE - 1.0)) or largest
        if not self._learnt or largest <= FORCE_RATIO * usual:
            return QUIET
        told = f"the force on atom {atom} is {largest:.1f} eV/Å, where at most {usual:.1f} were usual"
        return Finding(Verdict.CRIT if largest > LARGE_FORCE else Verdict.WARN, told)

    def _by_step(self, frame: Frame) -> Finding:
        moved = frame.positions - self._positions
        if frame.periodic and np.abs(moved).max() > LONG_STEP:  # only then can it be an image of a small step
            fractional = moved @ np.linalg.inv(frame.cell)
            moved = (fractional - np.round(fractional)) @ frame.cell
        squares = np.einsum("ij,ij->i", moved, moved)
        usual = self._squares
        means = np.bincount(self._elements, squares, len(usual)) / self._counts
        ratios = squares / np.maximum(usual[self._elements], 1e-12)
        atom = int(ratios.argmax())
        ratio, length = math.sqrt(ratios[atom]), math.sqrt(squares[atom])
        self._squares = usual + self._weight * (means - usual)
        if self._seen > 1:
            self._ratio *= 1.0 + (_MEDIAN_STEP if ratio > self._ratio else -_MEDIAN_STEP)
        if not self._learnt or not self.follows or ratio <= STEP_WARN:
            return QUIET
        told = f"atom {atom} has moved by {length:.2f} Å in one step, {ratio:.0f} times what is usual for its element"
        return Finding(Verdict.CRIT if (ratio > STEP_CRIT and length > 0.1 * LONG_STEP) or length > LONG_STEP else Verdict.WARN, told)

    def _by_energy(self, change: float) -> Finding:
        usual = math.sqrt(self._energy_square)
        self._energy_square += self._weight * (change * change - self._energy_square)
        if not self._learnt or not self.follows or abs(change) <= ENERGY_WARN * usual:
            return QUIET
        told = f"the energy has changed by {change:.3f} eV in one step, where {usual:.3f} were usual"
        return Finding(Verdict.CRIT if abs(change) > ENERGY_CRIT * usual else Verdict.WARN, told)
