"""The vacuum box that an engine has around a cluster: i-PI insists on one, ASE may have one, and either may have folded atoms into it."""

from __future__ import annotations

import numpy as np

from tumbaga.online.overlap import moved_less
from tumbaga.online.records import Array

_FLAT = 1e-6  # Å^3: a cell of less is none
_STEP = 1.0  # Å: atoms that moved by less since the last frame have not been folded anew


class VacuumBox:
    """Puts a cluster together again if its atoms were folded into the box. Remembers the last frame, which the next one is close to."""

    def __init__(self) -> None:
        self._cell: Array = np.zeros((3, 3))
        self._inverse: Array = self._cell
        self._flat = True
        self._last: Array = np.zeros((0, 3))
        self._shifts: Array = self._last
        self._key = b""  # of the cell
        self._whole: Array = self._last  # the last positions that were found to be together
        self._slack = 0.0  # by how much each of their atoms may move and be together still, Å

    def made_whole(self, positions: Array, cell: Array) -> Array:
        """Return positions of the cluster, shape (n_atoms, 3), float64, Å; the same ones if it was not folded.

        Each atom is put beside its nearest neighbour that has its place, beginning with the first atom: a spanning tree of shortest
        distances between nearest images. So a cluster that was not folded stays as it is, however tight its box, as long as its atoms are
        nearer to each other than to their images.

        Args:
            positions: shape (n_atoms, 3), float64, Å.
            cell: lattice vectors as rows, shape (3, 3), float64, Å.
        """
        if (key := cell.tobytes()) != self._key:
            self._key, self._cell, self._last, self._whole = key, cell, np.zeros((0, 3)), np.zeros((0, 3))
            self._flat = abs(np.linalg.det(cell)) < _FLAT
            self._inverse = cell if self._flat else np.asarray(np.linalg.inv(cell), np.float64)
        if self._flat:
            return positions  # a cell without a volume, as ASE has it for a slab, folds nothing
        if len(self._whole) == len(positions) and moved_less(positions - self._whole, self._slack):
            return positions
        fractional = positions @ self._inverse
        extent = float((fractional.max(axis=0) - fractional.min(axis=0)).max())
        if extent <= 0.5:
            # a displacement u changes a fractional coordinate by |u| over the width of the cell at most
            self._whole, self._slack = positions, (0.5 - extent) / (2.0 * float(np.linalg.norm(self._inverse, axis=0).max()))
            return positions
        if len(self._last) != len(positions) or np.abs(positions - self._last).max() > _STEP:
            self._shifts = _shifts(fractional, cell)
        self._last = positions
        return positions + self._shifts if self._shifts.any() else positions


def _shifts(fractional: Array, cell: Array) -> Array:
    """Return by what to move each atom so that all are together, shape (n_atoms, 3), Å."""
    count = len(fractional)
    images = np.zeros((count, 3))  # of each atom, relative to where it is
    distance = np.full(count, np.inf)  # to the nearest atom that has its place
    nearest = np.zeros((count, 3))  # the image that this distance is to
    placed = np.zeros(count, dtype=bool)
    new = 0
    for _ in range(count - 1):
        placed[new] = True
        apart = fractional - (fractional[new] + images[new])
        image = -np.round(apart)
        away = (apart + image) @ cell
        squares = np.einsum("ij,ij->i", away, away)
        closer = squares < distance
        distance[closer], nearest[closer] = squares[closer], image[closer]
        new = int(np.where(placed, np.inf, distance).argmin())
        images[new] = nearest[new]
    shifts: Array = images @ cell
    return shifts
