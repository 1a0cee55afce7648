"""Labels that lie: real ones by PBE and GFN1-xTB on top of the embedded potential, which was trained on GFN2-xTB, with bad ones among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest

from tumbaga.driver.backends import registry
from tumbaga.online import last_layer, quality
from tumbaga.online.labelled import Labelled, labelled
from tumbaga.online.last_layer import Fit, LeftOut
from tumbaga.online.ports import Trainable
from tumbaga.online.quality import Bounds, Doubt
from tumbaga.online.records import Array, Frame, Label

FILE = Path(__file__).with_name(
    "cuau-water-labels.extxyz"
)  # two runs of CuAu(H2O)2 at 300 K by PBE; one at 300, 600 and 1000 K by GFN1-xTB
LEVELS = ("pyscf:pbe/def2-svp/grid2/df-jfit", "tblite 0.8 GFN1-xTB")
HARTREE = 27.2114
AWAY = 6  # labels between two frames that have little in common


@pytest.fixture(scope="module")
def potential() -> Trainable:
    made = registry.load("painn:cuau-water", "cpu", "float64")
    assert isinstance(made, Trainable)
    return made


@pytest.fixture(scope="module")
def levels(potential: Trainable) -> dict[str, list[Labelled]]:
    found: dict[str, list[Labelled]] = {level: [] for level in LEVELS}
    for atoms in ase.io.iread(FILE, format="extxyz"):
        frame = Frame(atoms.numbers, atoms.positions)
        label = Label(atoms.get_potential_energy(), atoms.get_forces(), atoms.info["method"], 0.0)
        found[label.method].append(labelled(potential.force_rows(frame), frame, label, potential.readout(), potential.spec.elements))
    return found


@pytest.fixture(scope="module")
def refit(potential: Trainable) -> Callable[..., Fit]:
    return lambda labels: last_layer.fit(labels, potential.readout(), mean_h2=potential.spec.mean_h2)


def _forces(one: Labelled, forces: Array) -> Labelled:
    return dataclasses.replace(one, forces_label=forces)


def _turned(one: Labelled, _: Labelled) -> Labelled:
    return _forces(one, -one.forces_label)


def _in_hartree(one: Labelled, _: Labelled) -> Labelled:
    return _forces(one, one.forces_label / HARTREE)


def _as_if_in_hartree(one: Labelled, _: Labelled) -> Labelled:
    return _forces(one, one.forces_label * HARTREE)


def _of_another(one: Labelled, other: Labelled) -> Labelled:
    return dataclasses.replace(one, forces_label=other.forces_label, energy_label=other.energy_label)


def _permuted(one: Labelled, _: Labelled) -> Labelled:
    return _forces(one, np.roll(one.forces_label, 1, axis=0))


def _far_off(one: Labelled, _: Labelled) -> Labelled:
    return dataclasses.replace(one, energy_label=one.energy_label + 10.0)


POISONS = (_turned, _in_hartree, _as_if_in_hartree, _of_another, _permuted, _far_off)


def run(labels: list[Labelled], refit: Callable[..., Fit]) -> tuple[list[int], list[Doubt]]:
    """Labels as a run gets them, one after the other, every fourth one held out; returns the places of those set aside, with the doubts."""
    train: list[Labelled] = []
    held_out: list[Labelled] = []
    aside, doubts = [], []
    for place, one in enumerate(labels):
        (held_out if place % 4 == 1 else train).append(one)
        while (found := quality.doubtful(train, held_out, fitted := refit(train), refit)) is not None:
            assert fitted.n_labels == len(train)
            for kept in (train, held_out):
                kept[:] = [other for other in kept if other is not found[0]]
            aside.append(next(k for k, other in enumerate(labels) if other is found[0]))
            doubts.append(found[1])
    return aside, doubts


@pytest.mark.parametrize("level", [LEVELS[0], pytest.param(LEVELS[1], marks=pytest.mark.slow)])
def test_no_good_label_is_refused(level: str, levels: dict[str, list[Labelled]], refit: Callable[..., Fit]) -> None:
    """All labels of a run are believed, also while it is heated from 300 to 1000 K and its errors grow tenfold."""
    assert run(levels[level], refit) == ([], [])


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.__name__.strip("_"))
@pytest.mark.parametrize("level", [LEVELS[0], pytest.param(LEVELS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [2, 8])
def test_every_poisoned_label_is_found(
    poison: Callable[..., Labelled],
    level: str,
    first: int,
    levels: dict[str, list[Labelled]],
    refit: Callable[..., Fit],
) -> None:
    """Two bad labels among twenty, of which the first may be one of the first: both are set aside, and no good one is."""
    labels = list(levels[level][:20])
    bad = {first, 13} if level == LEVELS[1] else {first, 11}
    for place in bad:
        labels[place] = poison(labels[place], labels[place - AWAY])
    aside, doubts = run(labels, refit)

    assert set(aside) == bad
    assert len(aside) == len(bad)
    assert {doubt.check for doubt in doubts} == ({"energy"} if poison is _far_off else {"forces"})
    assert all(doubt.numbers["sigmas"] > quality.SIGMAS for doubt in doubts)


@pytest.mark.slow
def test_a_tenth_of_bad_labels_does_not_discredit_the_others(levels: dict[str, list[Labelled]], refit: Callable[..., Fit]) -> None:
    """Six runs of 30 labels, in which every tenth is bad in some way: all bad ones are found, and fewer than 2 % of the good ones are refused."""
    rng = np.random.default_rng(7)
    bad = found = good = refused = 0
    for turn in range(6):
        labels = [levels[LEVELS[1]][place] for place in rng.permutation(len(levels[LEVELS[1]]))[:30]]
        places = [
            place for place in range(turn, 30, 10) if float(np.abs(labels[place].forces_label).max()) > 1.0
        ]  # nothing to spoil elsewhere
        for k, place in enumerate(places):
            labels[place] = POISONS[(turn + k) % len(POISONS)](labels[place], labels[place - AWAY])
        aside, _ = run(labels, refit)
        bad, good = bad + len(places), good + len(labels) - len(places)
        found, refused = found + len(set(aside) & set(places)), refused + len(set(aside) - set(places))

    assert found == bad
    assert refused < 0.02 * good


def test_labels_that_a_network_was_trained_on_discredit_no_other(levels: dict[str, list[Labelled]], refit: Callable[..., Fit]) -> None:
    """Ten labels that are hit to a few meV/Å, as those are that a network was trained on: that ten more are missed by far is no surprise."""

    def missed(one: Labelled, times: float) -> Labelled:
        return _forces(one, one.forces_base + times * (one.forces_label - one.forces_base))

    labels = levels[LEVELS[0]][:20]
    assert run([*(missed(one, 0.01) for one in labels[:10]), *(missed(one, 2.0) for one in labels[10:])], refit) == ([], [])


def test_a_label_is_believed_again_where_the_others_agree(levels: dict[str, list[Labelled]], refit: Callable[..., Fit]) -> None:
    """A good one that was set aside agrees with the others; a poisoned one does not, nor does any among too few to judge."""
    labels = levels[LEVELS[0]][:16]
    train, one = labels[:-1], labels[-1]
    fitted = refit(train)
    assert quality.believed_again(one, train, fitted)
    assert not quality.believed_again(_turned(one, one), train, fitted)
    assert not quality.believed_again(one, train[: quality.LEAST - 1], refit(train[: quality.LEAST - 1]))


def test_not_most_labels_are_doubted() -> None:
    """Two may be set aside at any time, else one in three."""
    assert [quality.room_aside(aside, 8 - aside) for aside in range(4)] == [True, True, False, False]
    assert [quality.room_aside(aside, 30 - aside) for aside in (0, 9, 10)] == [True, True, False]


def test_a_label_that_was_released_is_believed(levels: dict[str, list[Labelled]], refit: Callable[..., Fit]) -> None:
    """What a person has released is not set aside again, whatever all others say."""
    labels = list(levels[LEVELS[0]][:12])
    labels[5] = _turned(labels[5], labels[4])
    fitted = refit(labels)
    found = quality.doubtful(labels, [], fitted, refit)

    assert found is not None
    assert found[0] is labels[5]
    assert quality.doubtful(labels, [], fitted, refit, spared=[labels[5]]) is None


def test_few_labels_judge_nothing(levels: dict[str, list[Labelled]], refit: Callable[..., Fit]) -> None:
    """With fewer than six others there are no statistics, and no label is set aside by them."""
    labels = list(levels[LEVELS[0]][: quality.LEAST])
    labels[3] = _turned(labels[3], labels[2])

    assert quality.doubtful(labels, [], refit(labels), refit) is None


def test_a_new_composition_is_no_wrong_energy(levels: dict[str, list[Labelled]], refit: Callable[..., Fit]) -> None:
    """The first label of another composition has an energy that no other label speaks of: it is not judged by it."""
    labels = list(levels[LEVELS[0]][:12])
    other = dataclasses.replace(labels[4], composition=labels[4].composition + 1.0, energy_label=labels[4].energy_label - 5000.0)

    assert quality.doubtful([*labels, other], [], refit([*labels, other]), refit) is None


def test_a_potential_that_knows_nothing_sets_nothing_aside(
    levels: dict[str, list[Labelled]], refit: Callable[..., Fit], rng: np.random.Generator
) -> None:
    """Where all forces are missed by their whole size none of them stands out."""
    labels = [_forces(one, rng.standard_normal(one.forces_label.shape)) for one in levels[LEVELS[0]][:14]]

    assert quality.doubtful(labels, [], refit(labels), refit) is None


@pytest.mark.parametrize(("force", "wrong"), [(0.1, True), (1.5, False)])
def test_an_energy_is_only_wrong_where_the_forces_are_known(levels: dict[str, list[Labelled]], force: float, wrong: bool) -> None:
    """8 eV beside forces that were foretold is a wrong label; beside forces that nobody could foretell it is a new place, and the label is true."""
    one, *others = levels[LEVELS[0]][:12]
    known = [(other, LeftOut(0.1, 0.1, 0.1 * (-1) ** place)) for place, other in enumerate(others)]
    found = quality._judged(one, LeftOut(force, force, 8.0), known)

    assert [doubt.check for _, _, doubt in found] == ["energy"] * wrong


WATER = Frame(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]))
PULL = np.array([[1.0, 0, 0], [-1.0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("forces", "bounds", "check"),
    [
        (31.0 * PULL, Bounds(), "largest force"),
        (29.9 * PULL, Bounds(), ""),
        (31.0 * PULL, Bounds(force=0.0), ""),
        (29.9 * PULL, Bounds(force=20.0), "largest force"),
        (PULL + np.array([0.0, 0.0, 0.03]), Bounds(), "net force"),
        (PULL + np.array([0.0, 0.0, 0.028]), Bounds(), ""),
        (PULL + np.array([0.0, 0.0, 0.03]), Bounds(net_force=0.0), ""),
    ],
)
def test_a_label_by_itself(forces: Array, bounds: Bounds, check: str) -> None:
    """Forces have a bound, and those of an isolated frame add up to nothing, within 0.05 eV/Å times sqrt(atoms)."""
    doubt = quality.inspect(WATER, Label(-1.0, forces, "x", 0.0), bounds)

    assert (doubt.check if doubt else "") == check


def test_a_cell_may_have_a_net_force() -> None:
    """Forces on a periodic frame need not add up to nothing: many codes leave a net force there."""
    cell = Frame(WATER.numbers, WATER.positions, 10.0 * np.eye(3), True)

    assert quality.inspect(cell, Label(-1.0, PULL + np.array([0.0, 0.0, 0.5]), "x", 0.0), Bounds()) is None
