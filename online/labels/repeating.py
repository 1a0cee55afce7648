"""Now and then a label is computed twice, the second time of the same frame moved: what the two differ by is the noise of the method.

Moved, because a deterministic code gives the very same numbers for the very same frame. Isolated frames are turned, cells are shifted: grids do
not turn or move with the atoms, a density of another orientation is no start for an SCF, and another solution may be found: all that is in the
difference.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.ports import Labeller
from tumbaga.online.records import Array, Frame, Label

REPEAT: Final = "repeat"  # in the details of a label


class Repeating:
    """A labeller that repeats some of its labels; implements ``Labeller``.

    Args:
        labeller: computes them.
        every: one of so many frames is repeated, whichever process labels it; 0 for none.
    """

    def __init__(self, labeller: Labeller, every: int) -> None:
        self._labeller, self._every = labeller, every

    @property
    def method(self) -> str:
        """Identifies the level of theory."""
        return self._labeller.method

    def prepare(self) -> None:
        """Have the labeller import what it needs, if it can do so beforehand.

        Raises:
            LabelFailedError: it cannot be used.
        """
        prepare = getattr(self._labeller, "prepare", None)
        if prepare is not None:
            prepare()

    def label(self, frame: Frame) -> Label:
        """Label one frame; where it was repeated, `details["repeat"]` has energy (eV) and force_rmse, force_max (eV/Å): second minus first.

        Raises:
            LabelFailedError: the first one failed; a second one that fails is told in the details alone.
        """
        label = self._labeller.label(frame)
        if not self.due(frame):
            return label
        found = self._repeated(frame, label)
        return replace(label, seconds=label.seconds + found.get("seconds", 0.0), details={**label.details, REPEAT: found})

    def due(self, frame: Frame) -> bool:
        """Whether a frame is one of those that are repeated."""
        return bool(self._every) and int(frame.key, 16) % self._every == 0

    def _repeated(self, frame: Frame, first: Label) -> dict[str, Any]:
        random = np.random.default_rng(int(frame.key, 16))
        turn = np.eye(3) if frame.periodic else _rotation(random)
        middle = frame.positions.mean(axis=0)
        shift = random.random(3) @ frame.cell if frame.periodic else 0.0
        try:
            second = self._labeller.label(replace(frame, positions=middle + (frame.positions - middle) @ turn + shift))
        except LabelFailedError as error:
            return {"failure": str(error)}
        off = second.forces @ turn.T - first.forces
        return {
            "energy": second.energy - first.energy,
            "force_rmse": float(np.sqrt(np.mean(off**2))),
            "force_max": float(np.linalg.norm(off, axis=1).max()),
            "seconds": second.seconds,
        }


def _rotation(random: np.random.Generator) -> Array:
    """Return a random rotation, shape (3, 3): the unitary factor of a matrix of normal numbers (Mezzadri, Notices of the AMS 54, 592 (2007))."""
    unitary, upper = np.linalg.qr(random.standard_normal((3, 3)))
    unitary = unitary * np.sign(np.diag(upper))
    rotation: Array = unitary * np.sign(np.linalg.det(unitary))
    return rotation
