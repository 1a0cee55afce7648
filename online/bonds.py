"""Guard on what hangs together: atoms that leave their last neighbour, and bonds that are pressed far together. Pure numpy.

Both are rare, worth a label when they happen, and may last: only the moment is told, not the state. All thresholds are design values, as
ratios of a distance to the sum of covalent radii, since those of metals are longer than any limit in Å that fits molecules.
"""

from __future__ import annotations

import numpy as np

from tumbaga.online import guards
from tumbaga.online.guards import QUIET, Finding, Verdict
from tumbaga.online.overlap import moved_less
from tumbaga.online.records import Array, Frame

BONDED = 1.25  # pairs nearer than this are bonded
PRESSED = 0.70  # bonded pairs nearer than this are met in no run that goes well
LEFT = 1.8  # an atom without a neighbour nearer than this has left
_BACK = 1.5  # and is back when it has one again
_OFTEN = 0.1  # Å that an atom may move before all pairs are looked at again
_MANY = 400  # atoms beyond which a table of all pairs would cost the engine milliseconds: they are not watched


class BondWatch:
    """One run of frames of the same atoms. Looks at all pairs only when atoms have moved; in between it costs some microseconds."""

    def __init__(self) -> None:
        self._reference: Array = np.zeros((0, 3))
        self._bonded = self._pressed = self._alone = np.zeros(0, dtype=bool)

    def check(self, frame: Frame) -> Finding:
        """Judge a frame against those before it: WARN where an atom has just left or a bond has just been pressed together, else OK."""
        if len(frame) > _MANY:
            return QUIET
        if not len(self._reference):
            return self._begin(frame)
        if moved_less(frame.positions - self._reference, _OFTEN):
            return QUIET
        self._reference = frame.positions
        ratios = _ratios(frame)
        nearest = ratios.min(axis=1)
        left = (nearest > LEFT) & ~self._alone
        pressed = ratios < PRESSED
        new = pressed & ~self._pressed & self._bonded
        self._alone, self._pressed = (self._alone & (nearest > _BACK)) | left, pressed
        if new.any():
            first, second = divmod(int(new.argmax()), len(frame))
            return Finding(
                Verdict.WARN, f"the bond of atoms {first} and {second} is pressed to {ratios[first, second]:.2f} of their covalent radii"
            )
        if left.any():
            atom = int(left.argmax())
            return Finding(
                Verdict.WARN, f"atom {atom} has left: its nearest neighbour is at {nearest[atom]:.1f} times their covalent radii"
            )
        return QUIET

    def _begin(self, frame: Frame) -> Finding:
        self._reference = frame.positions
        ratios = _ratios(frame)
        self._bonded, self._pressed, self._alone = ratios < BONDED, ratios < PRESSED, ratios.min(axis=1) > LEFT
        return QUIET


def _ratios(frame: Frame) -> Array:
    """Distances of all pairs over the sums of their covalent radii, shape (n_atoms, n_atoms); inf on the diagonal."""
    radii = guards.COVALENT_RADII[frame.numbers]
    return guards.pair_distances(frame) / (radii[:, None] + radii)
