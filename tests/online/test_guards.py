"""The cheap guards."""

from __future__ import annotations

import ase.data
import numpy as np
import pytest

from tumbaga.online.guards import COVALENT_RADII, Verdict, check_frame, check_numbers, check_prediction, closest_pair
from tumbaga.online.records import Frame, Prediction

CELL = np.array([[8.0, 0, 0], [2.0, 7.0, 0], [-3.0, 1.0, 9.0]])


def dimer(distance: float, cell: np.ndarray | None = None) -> Frame:
    positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance]])
    return Frame(np.array([8, 1]), positions) if cell is None else Frame(np.array([8, 1]), positions, cell, True)


def test_radii_are_the_published_ones() -> None:
    """The table holds what ASE holds, for every element that has a value."""
    np.testing.assert_array_equal(COVALENT_RADII[1:97], ase.data.covalent_radii[1:97])


def test_overlapping_atoms_are_dead() -> None:
    """0.3 of the covalent radii (0.97 Å for OH) is the limit, 0.55 the one to doubt, and the sentence names the pair and the distance."""
    assert check_frame(dimer(0.97 * 0.56)).verdict is Verdict.OK
    assert check_frame(dimer(0.97 * 0.54)).verdict is Verdict.CRIT
    assert check_frame(dimer(0.97 * 0.31)).verdict is Verdict.CRIT
    found = check_frame(dimer(0.97 * 0.29))
    assert found.verdict is Verdict.DEAD
    assert "atoms 0 and 1 are 0.281 Å apart" in found.sentence
    assert check_frame(dimer(0.0)).verdict is Verdict.DEAD
    assert check_frame(Frame(np.array([8]), np.zeros((1, 3)))).verdict is Verdict.OK


def test_overlap_is_seen_through_the_walls_of_a_slanted_cell() -> None:
    """Atoms on top of each other's images count, wrapped or not."""
    through = Frame(np.array([8, 1]), np.array([[0.0, 0.0, 0.1], CELL.sum(axis=0)]), CELL, True)

    assert check_frame(through).verdict is Verdict.DEAD
    assert check_frame(Frame(through.numbers, through.positions)).verdict is Verdict.OK


def test_closest_pair_of_many_atoms(rng: np.random.Generator) -> None:
    """Blocks of rows find the same pair as one table."""
    positions = np.stack(np.meshgrid(*[np.arange(9.0)] * 3), axis=-1).reshape(-1, 3) * 3.0
    positions[600] = positions[601] + [0.2, 0.0, 0.0]
    ratio, first, second = closest_pair(Frame(np.full(729, 29), positions))

    assert {first, second} == {600, 601}
    assert ratio == pytest.approx(0.2 / 2.64)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_input_that_is_not_finite_is_dead(bad: float) -> None:
    """Positions or cell: never answered with numbers."""
    assert check_numbers(np.array([[0.0, bad, 0.0]]), np.eye(3)).verdict is Verdict.DEAD
    assert check_numbers(np.zeros((1, 3)), np.full((3, 3), bad)).verdict is Verdict.DEAD
    assert check_numbers(np.zeros((1, 3)), np.eye(3)).verdict is Verdict.OK


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["energy", "forces", "virial"])
def test_output_that_is_not_finite_is_critical(bad: float, where: str) -> None:
    """One number is enough, wherever it is."""
    energy = bad if where == "energy" else 0.0
    forces, virial = (np.full(shape, bad if where == name else 0.0) for name, shape in (("forces", (2, 3)), ("virial", (3, 3))))

    assert check_prediction(Prediction(energy, forces, virial)).verdict is Verdict.CRIT


def test_absurd_forces_are_dead() -> None:
    """1000 eV/Å, as a norm over xyz."""
    for force, verdict in ((999.0, Verdict.OK), (1001.0, Verdict.DEAD)):
        forces = np.zeros((2, 3))
        forces[1] = force * np.array([0.6, 0.0, 0.8])
        assert check_prediction(Prediction(0.0, forces, np.zeros((3, 3)))).verdict is verdict


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("n_atoms", [2, 30, 129, 400])
def test_the_quick_look_finds_what_a_look_at_every_pair_finds(rng: np.random.Generator, n_atoms: int, periodic: bool) -> None:
    """Random frames, some with one pair pushed together, also across the faces of a skewed cell, against every pair and its images."""
    found = set()
    for _ in range(25):
        side = (60.0 * n_atoms) ** (1 / 3) + 4.0
        cell = side * np.eye(3) + side * 0.2 * rng.normal(size=(3, 3))
        grid = np.stack(np.meshgrid(*[np.arange(np.ceil(n_atoms ** (1 / 3)))] * 3), axis=-1).reshape(-1, 3)[:n_atoms]
        places = (grid + 0.15 * rng.random((n_atoms, 3))) / (grid.max() + 1.0) + rng.normal(size=3)
        positions = places @ cell
        numbers = rng.choice([1, 8, 29, 79], size=n_atoms)
        one, other = rng.choice(n_atoms, 2, replace=False)
        direction = rng.normal(size=3)
        distance = rng.uniform(*((0.25, 0.35) if rng.random() < 0.5 else (0.5, 0.6))) * (
            COVALENT_RADII[numbers[one]] + COVALENT_RADII[numbers[other]]
        )
        positions[other] = positions[one] + distance * direction / np.linalg.norm(direction)
        positions[other] += rng.integers(-2, 3, size=3) @ cell if periodic else 0.0
        frame = Frame(numbers, positions, cell if periodic else np.zeros((3, 3)), periodic)
        verdict = check_frame(frame).verdict
        ratio = closest_pair(frame)[0]
        assert verdict is (Verdict.DEAD if ratio < 0.3 else Verdict.CRIT if ratio < 0.55 else Verdict.OK)
        found.add(verdict)
    assert found == {Verdict.OK, Verdict.CRIT, Verdict.DEAD}
