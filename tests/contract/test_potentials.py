"""Every potential that needs no weights passes the one conformance suite; the independent judge of Lennard-Jones is ASE's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones as AseLennardJones

from tumbaga.driver.backends import registry
from tumbaga.online.conformance import check_potential, check_trainable
from tumbaga.online.ports import Potential
from tumbaga.online.records import Frame
from tumbaga.online.testing import ToyTrainable

SPREAD = 3.6  # Å between neighbours: near the minimum of the default Lennard-Jones pair


def cluster(n: int, seed: int) -> Frame:
    rng = np.random.default_rng(seed)
    places = np.array([[x, y, z] for x in range(3) for y in range(3) for z in range(3)][:n]) * SPREAD
    return Frame(rng.choice([1, 8, 29, 79], n), places + 0.2 * rng.standard_normal((n, 3)))


def boxed(n: int, seed: int) -> Frame:
    """The same in a slanted box so wide that no image is nearer than the atom itself."""
    one = cluster(n, seed)
    return Frame(one.numbers, one.positions, np.array([[40.0, 0.0, 0.0], [3.0, 41.0, 0.0], [-2.0, 1.0, 42.0]]), True)


FRAMES = [cluster(1, 0), cluster(2, 1), cluster(7, 2), boxed(5, 3)]


@pytest.mark.parametrize("name", ["toy:zero", "toy:lj", "toy:lj?epsilon=0.2&sigma=2.9", "toy:nan?after=1000000"])
def test_a_toy_conforms(name: str) -> None:
    """Each toy keeps every promise of the port that it makes, on clusters and in a wide box."""
    load, rest = registry.loader(name)
    check_potential(registry.load(name), FRAMES, load=load, rest=rest)


def test_the_exact_toy_conforms_in_four_elements() -> None:
    """The trainable toy with its default elements keeps every promise of its port."""
    weights = np.random.default_rng(0).standard_normal(64)

    check_trainable(ToyTrainable(weights=weights), FRAMES)


@pytest.mark.parametrize("make", [cluster, boxed])
def test_lennard_jones_is_that_of_ase(make: Callable[[int, int], Frame]) -> None:
    """Energy and forces agree with ASE's independent implementation to 1e-10."""
    one = make(8, 4)
    potential: Potential = registry.load("toy:lj?epsilon=0.05&sigma=3.1")
    said = potential.predict([one])[0]
    atoms = Atoms(numbers=one.numbers, positions=one.positions, cell=one.cell if one.periodic else None, pbc=one.periodic)
    atoms.calc = AseLennardJones(epsilon=0.05, sigma=3.1, rc=19.0, smooth=False)
    distances = atoms.get_all_distances(mic=one.periodic)[np.triu_indices(8, 1)]
    shift = 4 * 0.05 * ((3.1 / 19.0) ** 12 - (3.1 / 19.0) ** 6)  # ASE shifts every pair to zero at its cut-off

    assert distances.max() < 19.0
    assert said.energy == pytest.approx(atoms.get_potential_energy() + len(distances) * shift, abs=1e-10)
    np.testing.assert_allclose(said.forces, atoms.get_forces(), atol=1e-10)


@pytest.mark.parametrize("shift", [np.array([1, 0, 0]), np.array([-2, 3, 1])])
def test_wrapping_an_atom_changes_nothing(shift: np.ndarray) -> None:
    """In a wide box an atom that is moved by whole lattice vectors gives the same energy and forces."""
    one = boxed(5, 3)
    moved = one.positions.copy()
    moved[2] += shift @ one.cell
    potential = registry.load("toy:lj")
    before, after = potential.predict([one, Frame(one.numbers, moved, one.cell, True)])

    assert after.energy == pytest.approx(before.energy, abs=1e-12)
    np.testing.assert_allclose(after.forces, before.forces, atol=1e-12)
