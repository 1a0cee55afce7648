"""A labelled frame as the learning maths sees it: its linear model, what the base readout says and what the label says. Pure numpy, float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tumbaga.online.errors import BadFrameError, UpdateRefusedError
from tumbaga.online.ports import ForceRows
from tumbaga.online.records import Array, Frame, Label


@dataclass(frozen=True, eq=False)
class Labelled:
    """The linear model of one labelled frame.

    Attributes:
        phi: summed features, shape (n_columns,), float64.
        rows: -dphi/dR, shape (3 * n_atoms, n_columns), float64, per Å.
        composition: atoms of each species, shape (n_species,), float64.
        energy_base: what the base readout says, eV, without any offset.
        forces_base: what the base readout says, shape (n_atoms, 3), float64, eV/Å.
        energy_label: total energy of the reference, eV.
        forces_label: shape (n_atoms, 3), float64, eV/Å.
    """

    phi: Array
    rows: Array
    composition: Array
    energy_base: float
    forces_base: Array
    energy_label: float
    forces_label: Array

    def residual(self, change: Array | None = None) -> Array:
        """Forces of the label minus those of base + change, shape (n_atoms, 3), eV/Å."""
        residual = self.forces_label - self.forces_base
        return residual if change is None else residual - (self.rows @ change).reshape(-1, 3)


@dataclass(frozen=True)
class LeftOut:
    """What a fit that does not know a label makes of it.

    Attributes:
        force: error of its forces, component RMSE, eV/Å.
        spread: the error that the fit expected, component RMS, eV/Å.
        energy: the label minus the fit, offsets of the species included, eV; nan where energies are left out of the fit.
    """

    force: float
    spread: float
    energy: float

    @property
    def ratio(self) -> float:
        """Error over expected error."""
        return self.force / self.spread


def labelled(model: ForceRows, frame: Frame, label: Label, base: Array, elements: Sequence[int]) -> Labelled:
    """Join a frame's linear model, its label and the base readout.

    Args:
        model: linear model of the frame in the features of the base version.
        frame: the frame; only its species are read.
        label: its label.
        base: readout of the base version, shape (n_columns,), eV.
        elements: atomic numbers in the order of the readout's blocks.

    Raises:
        BadFrameError: shapes do not fit, or the frame holds an element that the readout does not know.
    """
    n_atoms = len(frame)
    if model.rows.shape != (3 * n_atoms, base.size) or model.phi.shape != base.shape:
        raise BadFrameError("force rows", f"have shape {model.rows.shape}, expected {(3 * n_atoms, base.size)}")
    if label.forces.shape != (n_atoms, 3):
        raise BadFrameError("label forces", f"have shape {label.forces.shape}, expected {(n_atoms, 3)}")
    composition = np.array([(frame.numbers == z).sum() for z in elements], dtype=np.float64)
    if composition.sum() != n_atoms:
        raise BadFrameError("numbers", "hold an element that the readout does not know")
    energy = float(model.phi @ base) + model.energy_fixed
    forces = (model.rows @ base).reshape(-1, 3) + model.forces_fixed
    return Labelled(model.phi, model.rows, composition, energy, forces, label.energy, label.forces)


def mean_row_norm2(rows: Sequence[Array]) -> float:
    """Return the mean squared norm of force rows over frames, 1/Å²; what `fit` takes as `mean_h2`.

    Raises:
        UpdateRefusedError: there are no rows.
    """
    count = sum(len(block) for block in rows)
    if count == 0:
        raise UpdateRefusedError("there are no force rows to set the scale of the prior by")
    return sum(float(np.einsum("ij,ij->", block, block)) for block in rows) / count


def force_rmse(labels: Sequence[Labelled], readout: Array, base: Array) -> float:
    """Return the force error of a readout, component RMSE, eV/Å; nan without labels. `base` is the readout the labels were joined with."""
    squares = np.concatenate([(one.residual(readout - base) ** 2).ravel() for one in labels]) if labels else np.zeros(0)
    return math.sqrt(float(squares.mean())) if squares.size else math.nan


def largest_residual(labels: Sequence[Labelled]) -> float:
    """Return the largest force error of the base readout on any labelled atom, norm over xyz, eV/Å; 0 without labels."""
    return max((float(np.linalg.norm(one.residual(), axis=1).max()) for one in labels), default=0.0)
