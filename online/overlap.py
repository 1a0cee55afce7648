"""The overlap guard for frames that follow one another: looks at all pairs only when atoms have moved as far as could matter. Pure numpy."""

from __future__ import annotations

import numpy as np

from tumbaga.online.guards import QUIET, Finding, any_pair_within, check_frame
from tumbaga.online.records import Array, Frame, Ints

_SLACK = 0.3  # Å: pairs that are further from an overlap than this may come nearer by so much unseen


class OverlapWatch:
    """`guards.check_frame` for one run of frames, with the same verdicts.

    When no pair was within `_SLACK` of an overlap, none can overlap before two atoms have moved by that much together: until then only the
    displacements are looked at, which costs a few microseconds where all pairs cost tens to hundreds.
    """

    def __init__(self) -> None:
        self._numbers: Ints | None = None
        self._cell = b""
        self._reference: Array = np.zeros((0, 3))

    def check(self, frame: Frame) -> Finding:
        """Judge the geometry; see `guards.check_frame`."""
        cell = frame.cell.tobytes() if frame.periodic else b""
        if frame.numbers is self._numbers and cell == self._cell and moved_less(frame.positions - self._reference, 0.5 * _SLACK):
            return QUIET
        self._numbers = None
        if not any_pair_within(frame, _SLACK):
            self._numbers, self._cell, self._reference = frame.numbers, cell, frame.positions
            return QUIET
        return check_frame(frame)


def moved_less(displacements: Array, limit: float) -> bool:
    """Whether every atom has moved by less than `limit`.

    Args:
        displacements: shape (n_atoms, 3), Å.
        limit: Å.

    >>> moved_less(np.array([[0.0, 0.0, 0.09], [0.09, 0.0, 0.0]]), 0.1), moved_less(np.array([[0.0, 0.1, 0.01]]), 0.1)
    (True, False)
    """
    square = limit * limit
    # most often all of them together have not
    return bool(np.vdot(displacements, displacements) < square or np.einsum("ij,ij->i", displacements, displacements).max() < square)
