"""What is said of a frame beside its forces: the name of the version and the force uncertainty that follows from the last-layer score.

Shared by everything that answers, so that the same frame under the same version is told the same, over a socket or in a script.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tumbaga.driver.slot import BASE, Slot
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Array, Frame
from tumbaga.online.uncertainty import force_std


def version_name(number: int, path: str) -> str:
    """Return "NUMBER-HASH" of a version, the hash from its file's name.

    >>> version_name(3, "versions/000003-9f3a21c0.safetensors"), version_name(0, "")
    ('3-9f3a21c0', '0-base')
    """
    return f"{number}-{Path(path).stem.rpartition('-')[2] or 'base'}"


def std_per_score(slot: Slot, frame: Frame) -> float | None:
    """Return the largest force std over the largest last-layer score of a frame under the base version, 1/Å; None where it is not known.

    The exact std needs the force rows of the frame, which cost many force calls: this is done once, and every step costs a score only.

    Raises:
        PotentialError: the frame holds an element that the potential does not know.
    """
    sigma = float(exact_stds(slot, frame, BASE).max())
    (answer,) = slot.answer([frame], [(BASE, BASE, 1.0)])
    score = float(answer.lpr.max())
    return sigma / score if np.isfinite(score) and score > 0.0 else None


def exact_stds(slot: Slot, frame: Frame, version: int) -> Array:
    """Return the standard deviation of each atom's force under a version, shape (n_atoms,), float64, eV/Å; NaN without a linear readout.

    Raises:
        PotentialError: the frame holds an element that the potential does not know.
    """
    potential = slot.potential
    if not (isinstance(potential, Trainable) and potential.spec.n_hidden):
        return np.full(len(frame), np.nan)
    return force_std(potential.force_rows(frame).rows, slot.covariance(version))


def largest(lpr: Array, scale: float | None) -> tuple[float, int]:
    """Return the largest force std of a frame, eV/Å, and its atom; NaN where it is not known, and atom -1 where no score is finite.

    Args:
        lpr: last-layer score of each atom, shape (n_atoms,), eV.
        scale: force std per score, 1/Å, or None.
    """
    score = float(lpr.max()) if lpr.size else float("nan")
    if not np.isfinite(score):
        return float("nan"), -1
    return (float("nan") if scale is None else scale * score), int(lpr.argmax())
