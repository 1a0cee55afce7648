"""Clusters in vacuum boxes: what was folded is put together again, and nothing else is touched."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import molecule
from ase.cluster import Icosahedron

from tumbaga.driver.box import VacuumBox

CELLS = {
    "cubic": 40.0 * np.eye(3),
    "triclinic": np.array([[36.0, 0.0, 0.0], [9.0, 38.0, 0.0], [-7.0, 5.0, 41.0]]),
    "left-handed": np.array([[0.0, 37.0, 2.0], [39.0, 0.0, 1.0], [0.0, 3.0, 38.0]]),
}


def cluster() -> np.ndarray:
    """38 Å long: a chain of clusters with water between them."""
    part, water = Icosahedron("Cu", 2).positions, molecule("H2O").positions
    places = np.array([[9.0 * i, 0.0, 0.0] for i in range(3)])
    between = np.array([4.5, 1.0, 0.0])
    return np.concatenate([part + place for place in places] + [water + place + between for place in places])


def folded(positions: np.ndarray, cell: np.ndarray) -> np.ndarray:
    inside = positions @ np.linalg.inv(cell) % 1.0
    return inside @ cell


def distances(positions: np.ndarray) -> np.ndarray:
    return np.linalg.norm(positions[:, None] - positions, axis=-1)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("seed", range(5))
def test_a_folded_cluster_keeps_all_its_distances(cell: np.ndarray, seed: int) -> None:
    whole = cluster() @ np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    there = whole + np.random.default_rng(seed).uniform(-50, 50, 3)
    inside = folded(there, cell)
    assert not np.allclose(inside, there)

    np.testing.assert_allclose(distances(VacuumBox().made_whole(inside, cell)), distances(whole), atol=1e-10)


@pytest.mark.parametrize("vacuum", [2.0, 3.0, 6.0])
def test_a_cluster_in_a_tight_box_that_was_not_folded_stays_where_it_is(vacuum: float) -> None:
    """ASE keeps the cell of `center(vacuum=...)` although nothing is periodic: most of it is cluster."""
    atoms = Icosahedron("Cu", 4)
    atoms.center(vacuum=vacuum)
    assert np.ptp(atoms.get_scaled_positions(wrap=False), axis=0).max() > 0.5

    assert VacuumBox().made_whole(atoms.positions, atoms.cell.array) is atoms.positions


def test_a_walk_through_the_boundary_is_followed() -> None:
    """Small steps, in which one atom after the other is folded, leave the distances what they are."""
    cell, box, generator = CELLS["cubic"], VacuumBox(), np.random.default_rng(0)
    whole = cluster() + 5.0
    for _ in range(300):
        whole += 0.2 + 0.02 * generator.normal(size=whole.shape)
        np.testing.assert_allclose(distances(box.made_whole(folded(whole, cell), cell)), distances(whole), atol=1e-9)


def test_a_cell_without_a_volume_folds_nothing() -> None:
    positions = cluster() * 3.0

    assert VacuumBox().made_whole(positions, np.diag([10.0, 10.0, 0.0])) is positions
