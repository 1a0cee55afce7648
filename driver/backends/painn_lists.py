"""Neighbour lists that outlast a step: pairs within the cutoff and a skin, searched again only when an atom may have come through the skin.

What they return is what ``painn_pairs.pairs`` returns, to the last bit and in the same order: old lists cost time, never a digit. So a
trajectory does not depend on when a list was made, nor on whether the process that made it still lives.

Source:
    L. Verlet, Phys. Rev. 159, 98 (1967).
"""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

import numpy as np

from tumbaga.driver.backends.painn_pairs import MARGIN, Candidates, Pairs, candidates, offsets, pairs, within
from tumbaga.online.records import Array, Frame

SKIN: Final = 0.8  # Å; at 0.3 searches are too frequent to gain much, at 1.0 large periodic frames gain little more
# atoms; up to here all distances of a cluster at once cost less than an old list. Above it an old list took, of the time of a new one,
# 0.6 at 40, 0.4 at 100 and 0.1 at 300 atoms, and 0.1 at 20 to 300 atoms in a cell
PLAIN_LIMIT: Final = 30
ENTRIES: Final = 64  # lists: beads and sessions with equal atoms have one each
CAPACITY: Final = 2_000_000  # candidates in all lists together, 64 bytes each


class _Held(NamedTuple):
    """A list and the frame it was made of."""

    numbers: bytes
    periodic: bool
    positions: Array
    cell: Array
    found: Candidates


class Lists:
    """Pairs of frames that resemble earlier ones. A frame belongs to no session here: any list that is still complete for it will do.

    Args:
        cutoff: Å.
        skin: Å; lists reach so much further than the cutoff.
    """

    def __init__(self, cutoff: float, skin: float = SKIN) -> None:
        self._cutoff, self._reach, self._skin = cutoff, cutoff + skin, skin
        self._held: list[_Held] = []  # the longest unused one first: beads come in turn, so it is the likeliest
        self._lock = threading.Lock()  # threads of a script may share a potential
        self.searches = 0  # so far; for tests and measurements

    def pairs(self, frame: Frame) -> Pairs:
        """The same as ``painn_pairs.pairs``."""
        if not frame.periodic and len(frame) <= PLAIN_LIMIT:
            return pairs(frame, self._cutoff)
        return within(self._candidates(frame), frame.positions, self._cutoff)

    def _candidates(self, frame: Frame) -> Candidates:
        numbers = frame.numbers.tobytes()
        with self._lock:
            found = self._kept(frame, numbers)
        return self._searched(frame, numbers) if found is None else found

    def _kept(self, frame: Frame, numbers: bytes) -> Candidates | None:
        """A list that holds all pairs of the frame; if there is none, the one that the frame has outrun is dropped."""
        nearest, least = -1, self._reach + self._skin  # a list further away than that is another frame's
        for k, held in enumerate(self._held):
            if held.numbers != numbers or held.periodic != frame.periodic:
                continue
            needed = _needed(held, frame, self._cutoff)
            if needed <= self._reach - MARGIN:
                self._held.append(self._held.pop(k))
                return _moved(held, frame)
            if needed < least:
                nearest, least = k, needed
        if nearest >= 0:
            del self._held[nearest]
        return None

    def _searched(self, frame: Frame, numbers: bytes) -> Candidates:
        found = candidates(frame, self._reach + MARGIN)
        # copies: a frame may lie in memory that the next message overwrites
        made = _Held(numbers, frame.periodic, frame.positions.copy(), frame.cell.copy(), found)
        with self._lock:
            self.searches += 1
            self._held.append(made)
            while len(self._held) > ENTRIES or sum(len(held.found.first) for held in self._held) > CAPACITY:
                del self._held[0]
        return found


def _needed(held: _Held, frame: Frame, cutoff: float) -> float:
    """How far the list must reach to hold all pairs of the frame within the cutoff, Å.

    A pair was v and is now v F + d, where F is the strain of the cell and |d| at most twice the largest displacement beside it; the
    smallest singular value s of F bounds how much it shrank: |v| <= (cutoff + |d|) / s.
    """
    before, shrunk = held.positions, 1.0
    if frame.periodic and not np.array_equal(frame.cell, held.cell):
        strain = np.linalg.solve(held.cell, frame.cell)
        before, shrunk = before @ strain, float(np.linalg.svd(strain, compute_uv=False)[-1])
    apart = frame.positions - before
    largest = float(np.sqrt(np.einsum("nc,nc->n", apart, apart).max()))
    return (cutoff + 2.0 * largest) / shrunk if shrunk > 0.0 else np.inf


def _moved(held: _Held, frame: Frame) -> Candidates:
    found = held.found
    if found.images is None or np.array_equal(frame.cell, held.cell):
        return found
    return found._replace(offsets=offsets(found.images, frame.cell))
