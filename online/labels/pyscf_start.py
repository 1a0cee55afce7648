"""Warm starts: the densities of the last labels, the nearest one to a frame, and when a label that came from one is checked cold.

A density is kept in symmetrically orthogonalised orbitals, Q = S^1/2 P S^1/2, and becomes P' = S'^-1/2 Q S'^-1/2 in the orbitals of another
frame with the same atoms: the number of electrons and the idempotency are kept, and no third matrix is needed.

A warm SCF may stay on a solution that was the lowest in the frame it came from and no longer is. Four signs, each cheap, lead to a second,
cold SCF of which the lower energy is taken (`doubt`): a small gap, either now or then, since solutions change places where it closes; an
energy that does not follow from that of the near frame and both frames' forces; and a number of warm starts in a row.

Source:
    Löwdin, J. Chem. Phys. 18, 365 (1950), for the orbitals.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tumbaga.online.records import Array, Frame

NEAR = 0.3  # Å, rms over atoms: beyond it a warm start saves no cycles
SMALL_GAP = 0.5  # eV
JUMP = 0.1  # eV: the trapezoidal rule of forces is better than this between near frames
LONGEST_CHAIN = 10  # warm starts in a row before a cold SCF is done as well
MAX_BYTES = 64 * 2**20  # of all densities kept


@dataclass(frozen=True, eq=False)
class Known:
    """A labelled frame and what a warm start from it needs.

    Attributes:
        frame: the frame.
        density: in orthogonalised orbitals, shape (n_orbitals, n_orbitals) or, with spin, (2, n_orbitals, n_orbitals), float64.
        energy: eV, of the density functional alone.
        forces: shape (n_atoms, 3), eV/Å, of the density functional alone.
        gap: eV; None if there is none to be told.
        chain: warm starts since the last SCF that began, or was checked, cold.
    """

    frame: Frame
    density: Array
    energy: float
    forces: Array
    gap: float | None
    chain: int


@dataclass
class Densities:
    """The last densities of one level of theory, bounded in number and memory; the oldest go first.

    Attributes:
        most: densities kept; 0 for none.
    """

    most: int
    _known: deque[Known] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, known: Known) -> None:
        """Keep one."""
        self._known.append(known)
        while len(self._known) > self.most or sum(one.density.nbytes for one in self._known) > MAX_BYTES:
            self._known.popleft()

    def nearest(self, frame: Frame) -> tuple[Known, float] | None:
        """The known frame of the same atoms in the same order that is nearest, and its distance in Å; None if none is within `NEAR`.

        The distance is the root mean square over atoms of their displacement, with the centroids put together; the frames are not turned
        onto each other, since a density turned along would be another matrix.
        """
        alike = [one for one in self._known if np.array_equal(one.frame.numbers, frame.numbers)]
        if not alike:
            return None
        distances = [float(np.sqrt((shifts(one.frame, frame) ** 2).sum(axis=1).mean())) for one in alike]
        best = int(np.argmin(distances))
        return (alike[best], distances[best]) if distances[best] <= NEAR else None

    def forget(self, frame: Frame) -> None:
        """Drop all densities of these atoms: a warm start from one of them did not lead to the lowest solution."""
        self._known = deque(one for one in self._known if not np.array_equal(one.frame.numbers, frame.numbers))


def shifts(old: Frame, new: Frame) -> Array:
    """Displacements of the atoms, shape (n_atoms, 3), Å, with the centroids put together."""
    moved = new.positions - old.positions
    return np.asarray(moved - moved.mean(axis=0))


def orthogonalised(density: Array, overlap: Array) -> Array:
    """Q = S^1/2 P S^1/2, of one density or of two spins, float64."""
    root = _power(overlap, 0.5)
    return np.asarray(root @ density @ root)


def transported(orthogonal: Array, overlap: Array) -> Array:
    """P = S^-1/2 Q S^-1/2 in the orbitals with this overlap."""
    root = _power(overlap, -0.5)
    return np.asarray(root @ orthogonal @ root)


def _power(matrix: Array, exponent: float) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.maximum(values, 1e-10) ** exponent) @ vectors.T)


def doubt(known: Known, frame: Frame, energy: float, forces: Array, gap: float | None) -> str | None:
    """Why a label that came from a warm start is to be checked by a cold SCF, or None.

    Args:
        known: where it started from.
        frame: the frame.
        energy: eV, of the warm SCF.
        forces: shape (n_atoms, 3), eV/Å, of the warm SCF.
        gap: eV, of the warm SCF.
    """
    smallest = min((one for one in (known.gap, gap) if one is not None), default=None)
    if smallest is None or smallest < SMALL_GAP:
        return "no gap is known" if smallest is None else f"a gap of {smallest:.2f} eV"
    expected = known.energy - 0.5 * float(((known.forces + forces) * shifts(known.frame, frame)).sum())
    if abs(energy - expected) > JUMP:
        return f"the energy is {energy - expected:+.2f} eV from what the near frame and the forces lead to"
    if known.chain + 1 >= LONGEST_CHAIN:
        return f"{known.chain + 1} warm starts in a row"
    return None
