"""Units on the wire are atomic, inside they are ASE's."""

from __future__ import annotations

import numpy as np
import pytest
from ase import units as ase_units

from tumbaga.driver import units

RTOL = 1e-12


def test_the_constants_are_those_of_ase() -> None:
    """Bohr, Hartree and k_B agree with ASE's to 1e-12."""
    assert pytest.approx(ase_units.Bohr, rel=RTOL) == units.BOHR
    assert pytest.approx(ase_units.Hartree, rel=RTOL) == units.HARTREE
    assert pytest.approx(ase_units.kB, rel=RTOL) == units.KB


def test_one_of_each_is_what_ase_says() -> None:
    """One Bohr, Hartree and Hartree/Bohr inside, and one Å, eV, eV/Å and eV of virial on the wire, are ASE's to 1e-12."""
    one = np.ones((1, 3))

    np.testing.assert_allclose(units.length_from_wire(one), ase_units.Bohr, rtol=RTOL)
    np.testing.assert_allclose(units.length_to_wire(one), 1 / ase_units.Bohr, rtol=RTOL)
    np.testing.assert_allclose(units.forces_from_wire(one), ase_units.Hartree / ase_units.Bohr, rtol=RTOL)
    np.testing.assert_allclose(units.forces_to_wire(one), ase_units.Bohr / ase_units.Hartree, rtol=RTOL)
    np.testing.assert_allclose(units.virial_to_wire(np.eye(3)), np.eye(3) / ase_units.Hartree, rtol=RTOL)
    assert units.energy_from_wire(1.0) == pytest.approx(ase_units.Hartree, rel=RTOL)
    assert units.energy_to_wire(1.0) == pytest.approx(1 / ase_units.Hartree, rel=RTOL)


def test_there_and_back_is_the_same() -> None:
    """A conversion and its inverse give the number back to rounding, and leave the original alone."""
    given = np.random.default_rng(0).standard_normal((5, 3))
    before = given.copy()

    np.testing.assert_allclose(units.length_from_wire(units.length_to_wire(given)), given, rtol=1e-15)
    np.testing.assert_allclose(units.forces_from_wire(units.forces_to_wire(given)), given, rtol=1e-15)
    assert units.energy_from_wire(units.energy_to_wire(-53210.5)) == pytest.approx(-53210.5, rel=1e-15)
    np.testing.assert_array_equal(given, before)
