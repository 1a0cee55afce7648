"""The only file that converts units: atomic units on the wire; eV, Å, fs inside.

The constants are ASE's (CODATA 2014), so that ASE and tumbaga agree to the last digit. i-PI writes 8-digit constants of its own,
which differ by about 1e-8 relative: comparisons across codes need a relative tolerance of 1e-7.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

BOHR: Final = 0.5291772105638411  # Å
HARTREE: Final = 27.211386024367243  # eV
KB: Final = 8.617330337217213e-05  # eV/K
_FORCE: Final = HARTREE / BOHR  # eV/Å per Hartree/Bohr


def length_from_wire(value: Array) -> Array:
    """Bohr to Å; any shape, float64, a copy.

    >>> float(length_from_wire(np.array([1.0]))[0])
    0.5291772105638411
    """
    return value * BOHR


def length_to_wire(value: Array) -> Array:
    """Å to Bohr; any shape, float64, a copy."""
    return value / BOHR


def energy_from_wire(value: float) -> float:
    """Hartree to eV."""
    return value * HARTREE


def energy_to_wire(value: float) -> float:
    """eV to Hartree."""
    return value / HARTREE


def forces_from_wire(value: Array) -> Array:
    """Hartree/Bohr to eV/Å; any shape, float64, a copy."""
    return value * _FORCE


def forces_to_wire(value: Array) -> Array:
    """eV/Å to Hartree/Bohr; any shape, float64, a copy."""
    return value / _FORCE


def virial_from_wire(value: Array) -> Array:
    """Virial -dE/dstrain, Hartree to eV; shape (3, 3), float64, a copy; the sign is the same inside and on the wire."""
    return value * HARTREE


def virial_to_wire(value: Array) -> Array:
    """Virial -dE/dstrain, eV to Hartree; shape (3, 3), float64, a copy; the sign is the same inside and on the wire."""
    return value / HARTREE
