"""The guard on what hangs together: loud at the moment when something comes apart or is pressed together, and not for ever after."""

from __future__ import annotations

import numpy as np
import pytest

from tumbaga.online.bonds import BondWatch
from tumbaga.online.guards import COVALENT_RADII, Verdict
from tumbaga.online.records import Array, Frame

NUMBERS = np.array([29, 29, 29, 8, 1, 1])
PLACES = np.array([[0, 0, 0], [2.5, 0, 0], [1.25, 2.2, 0], [1.25, 0.8, 2.0], [0.5, 0.8, 2.6], [2.0, 0.8, 2.6]])
BOX = np.diag([20.0, 21.0, 22.0])


def frame(places: Array, periodic: bool) -> Frame:
    if not periodic:
        return Frame(NUMBERS, places)
    inside = places @ np.linalg.inv(BOX)
    return Frame(NUMBERS, (inside - np.floor(inside)) @ BOX, BOX, True)


def moved(atom: int, by: tuple[float, float, float]) -> Array:
    places = PLACES.copy()
    places[atom] += by
    return places


@pytest.mark.parametrize("periodic", [False, True])
def test_an_atom_that_leaves_is_told_once_each_time(periodic: bool) -> None:
    """A copper atom goes, stays away, comes back, and goes again: two warnings, which name it."""
    watch = BondWatch()
    heights = [0.0, -0.5, -1.0, -2.5, -4.0, -6.0, -6.5, -3.0, 0.0, -2.0, -5.0]
    found = [watch.check(frame(moved(0, (height, height, height)), periodic)) for height in heights]
    told = [place for place, finding in enumerate(found) if finding.verdict is not Verdict.OK]

    assert told == [3, 9]
    assert {found[place].verdict for place in told} == {Verdict.WARN}
    assert found[3].sentence.startswith("atom 0 has left: its nearest neighbour is at ")


def test_an_atom_at_the_edge_is_not_told_again_and_again() -> None:
    """Between back and away, one that has left does not leave again."""
    watch = BondWatch()
    radii = 2 * COVALENT_RADII[29]
    pair = np.array([[0.0, 0, 0], [radii, 0, 0]])
    ratios = [1.0, 1.9, 1.7, 1.9, 1.7, 1.9, 1.4, 1.9]
    found = [watch.check(Frame(np.array([29, 29]), pair * [[ratio, 1, 1]])).verdict for ratio in ratios]

    assert [place for place, verdict in enumerate(found) if verdict is Verdict.WARN] == [1, 7]


def test_a_bond_pressed_together_is_told() -> None:
    """O-H at 0.6 Å; a pair that was not bonded is not."""
    watch = BondWatch()
    watch.check(frame(PLACES, False))
    towards = (PLACES[3] - PLACES[4]) / np.linalg.norm(PLACES[3] - PLACES[4])
    found = watch.check(frame(moved(4, tuple((np.linalg.norm(PLACES[3] - PLACES[4]) - 0.6) * towards)), False))

    assert found.verdict is Verdict.WARN
    assert found.sentence == "the bond of atoms 3 and 4 is pressed to 0.62 of their covalent radii"

    other = BondWatch()
    apart = np.array([[0.0, 0, 0], [4.0, 0, 0]])
    other.check(Frame(np.array([1, 1]), apart))
    assert other.check(Frame(np.array([1, 1]), 0.1 * apart)).verdict is Verdict.OK


def test_what_hardly_moves_is_not_looked_at() -> None:
    """Steps of less than the stated length cost no table of pairs; their sum does not go unseen."""
    watch = BondWatch()
    verdicts = [watch.check(frame(moved(0, (-0.05 * step, 0, 0)), False)).verdict for step in range(100)]

    assert verdicts.count(Verdict.WARN) == 1


def test_a_molecule_that_is_thermal_is_quiet() -> None:
    """Vibrations of ±8 % of the bonds and any motion as a whole say nothing."""
    watch, rng = BondWatch(), np.random.default_rng(0)
    for _ in range(500):
        shift = rng.normal(scale=5.0, size=3)
        assert watch.check(frame(PLACES + shift + rng.normal(scale=0.04, size=PLACES.shape), False)).verdict is Verdict.OK


def test_very_many_atoms_are_left_alone() -> None:
    many = np.full(500, 29)
    watch = BondWatch()
    grid = 2.5 * np.array([[x, y, z] for x in range(10) for y in range(10) for z in range(5)], dtype=float)
    watch.check(Frame(many, grid))
    grid = grid.copy()
    grid[0] -= 20.0

    assert watch.check(Frame(many, grid)).verdict is Verdict.OK
