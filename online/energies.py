"""How sure a readout is of energies, and how that fits the energies of labels. Pure numpy, float64.

Labels have another zero than the potential, one for each element, so that an energy means something up to these only: their posterior is part
of the energy's. Energies and forces are calibrated apart: the energy of a frame sums what the readout cannot express over its atoms, a force
shows it at one place, and a factor that fits the one need not fit the other.

Source: Bigi, Chong, Ceriotti, Grasselli, arXiv 2403.02251; the offsets beside the readout are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from tumbaga.online.calibration import variance_factor
from tumbaga.online.labelled import Labelled
from tumbaga.online.records import Array

_TRUSTED: Final = 4  # labels: each has one energy


def energy_std(phi: Array, composition: Array, covariance: Array | None) -> float:
    """Return the standard deviation of a frame's total energy up to a constant for each element, eV; nan where nothing is known.

    Args:
        phi: summed features in element blocks, shape (n_columns,).
        composition: atoms of each element, shape (n_species,).
        covariance: of readout and offsets, shape (n_columns + n_species, n_columns + n_species), eV²; None where no label has
            said anything of energies.
    """
    if covariance is None:
        return math.nan
    inputs = np.concatenate([phi, composition])
    # they cancel to a millionth of the offsets' own variance: a negative rest is rounding
    return math.sqrt(max(float(inputs @ covariance @ inputs), 0.0))


def offsets(labels: Sequence[Labelled], change: Array | None = None) -> Array:
    """Return the energy per atom of each element between labels and potential, least squares of minimum norm, shape (n_species,), eV.

    Args:
        labels: at least one.
        change: of the readout since the base that the labels were joined with, shape (n_columns,), eV; None for none.
    """
    compositions = np.array([one.composition for one in labels])
    missed = np.array([one.energy_label - one.energy_base for one in labels])
    if change is not None:
        missed -= np.array([float(one.phi @ change) for one in labels])
    solution: Array = np.linalg.lstsq(compositions, missed, rcond=1e-10)[0]
    return solution


def energy_factor(train: Sequence[Labelled], held_out: Sequence[Labelled], change: Array, covariance: Array | None) -> float:
    """Return what predicted variances of energies must be multiplied with to fit the errors of labels that nothing was fitted to.

    Args:
        train: the labels behind the covariance: where their zero is.
        held_out: others.
        change: of the readout since the base that the labels were joined with, shape (n_columns,), eV.
        covariance: see `energy_std`.
    """
    if not (train and held_out) or covariance is None:
        return 1.0
    zero, missed, spread = offsets(train, change), 0.0, 0.0
    for one in held_out:
        error = one.energy_label - one.energy_base - float(one.phi @ change) - float(one.composition @ zero)
        atoms = float(one.composition.sum())
        missed += (error / atoms) ** 2
        spread += (energy_std(one.phi, one.composition, covariance) / atoms) ** 2
    return variance_factor(missed, spread, len(held_out), _TRUSTED)
