"""The gain of a frame: against its definition, against sampling from a linear model, and as a guide for choosing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from tumbaga.online.gain import STOP, Costs, Gains
from tumbaga.online.records import Array, Frame
from tumbaga.online.testing import ToyTrainable

SIGMA = 0.05  # eV/Å
COLUMNS = 20


@pytest.fixture
def covariance(rng: np.random.Generator) -> Array:
    root = rng.standard_normal((COLUMNS, COLUMNS))
    made: Array = 0.01 * root @ root.T
    return made


@pytest.fixture
def rows(rng: np.random.Generator) -> Callable[..., Array]:
    """Makes random force rows of a frame."""

    def make(n_atoms: int = 3) -> Array:
        made: Array = rng.standard_normal((3 * n_atoms, COLUMNS))
        return made

    return make


def posterior(covariance: Array, known: Array) -> Array:
    """What is left of a covariance once forces with these rows are known."""
    precision = np.linalg.inv(covariance) + known.T @ known / SIGMA**2
    return np.asarray(np.linalg.inv(precision), dtype=np.float64)


def entropy_lost(covariance: Array, known: Array) -> float:
    """By definition: half the fall of the log determinant of the covariance."""
    before, after = (np.linalg.slogdet(matrix)[1] for matrix in (covariance, posterior(covariance, known)))
    return 0.5 * float(before - after)


@pytest.mark.parametrize("n_atoms", [1, 3, 9])
def test_a_gain_is_the_entropy_that_a_label_takes(n_atoms: int, covariance: Array, rows: Callable[..., Array]) -> None:
    """Alone, and once other labels are known, for frames with fewer and with more force rows than the readout has columns."""
    frames = {number: rows(n_atoms) for number in range(4)}
    gains = Gains(covariance, SIGMA)
    for number, made in frames.items():
        gains.add(number, made)

    assert gains.gain(0) == pytest.approx(entropy_lost(covariance, frames[0]), rel=1e-9)
    left = posterior(covariance, np.concatenate([frames[1], frames[2]]))
    assert gains.gain(0, (1, 2)) == pytest.approx(entropy_lost(left, frames[0]), rel=1e-6)


def test_gains_only_fall_as_more_is_known(covariance: Array, rows: Callable[..., Array]) -> None:
    """Knowing one more label never makes another one tell more: what lets old gains bound new ones."""
    gains = Gains(covariance, SIGMA)
    for number in range(6):
        gains.add(number, rows())
    told = [gains.gain(0, tuple(range(1, known + 1))) for known in range(6)]

    assert all(later < earlier for earlier, later in itertools.pairwise(told))
    assert min(told) > 0


def test_the_best_of_a_queue_is_found_without_asking_for_all(covariance: Array, rows: Callable[..., Array]) -> None:
    """Choosing one frame after the other by bounds gives the greedy order of exact gains."""
    frames = {number: rows(1 + number % 3) for number in range(12)}
    gains = Gains(covariance, SIGMA)
    for number, made in frames.items():
        gains.add(number, made)
    chosen: list[int] = []
    for _ in range(5):
        left = [number for number in frames if number not in chosen]
        exact = max(left, key=lambda number: gains.gain(number, tuple(chosen)))
        assert gains.best(left, tuple(chosen)) == exact
        chosen.append(exact)

    assert gains.best([number for number in frames if number not in chosen[1:]]) == chosen[0]  # what was under way is not any more


def test_a_near_duplicate_is_not_worth_a_label_while_its_twin_is_under_way(
    toy: ToyTrainable, cluster: Callable[..., Frame], rng: np.random.Generator
) -> None:
    """Of a frame and its copy moved by 0.001 Å one is labelled; the other one tells less than the stop rule asks, and a third one all it can."""
    frame, other = cluster(), cluster()
    twin = Frame(frame.numbers, frame.positions + 1e-3 * rng.standard_normal(frame.positions.shape))
    gains = Gains(0.01 * np.eye(toy.spec.n_columns), SIGMA)
    for number, one in enumerate((frame, twin, other)):
        gains.add(number, toy.force_rows(one).rows)

    assert gains.gain(1, (0,)) < 0.3 * gains.gain(1)
    assert gains.best([1, 2], under_way=[0]) == 2


def test_nothing_is_begun_that_tells_too_little(covariance: Array, rows: Callable[..., Array]) -> None:
    """While labels are under way, frames below the twentieth part of the first gain wait; when none is, the best is taken however little it tells."""
    gains = Gains(covariance, SIGMA)
    told = rows(9)
    gains.add(0, told)
    gains.add(1, told)
    gains.add(2, 1e-3 * told)

    assert gains.gain(2, (0,)) < STOP * gains.gain(0)
    assert gains.best([2], under_way=[0]) is None
    assert gains.best([2], under_way=[], learnt=[0]) == 2
    assert gains.best([2]) == 2
    assert gains.best([]) is None


def test_a_cheap_label_wins_over_a_dear_one(covariance: Array, rows: Callable[..., Array]) -> None:
    """Twice the gain is not worth three times the cost; among alike costs the gain alone counts."""
    gains = Gains(covariance, SIGMA)
    gains.add(0, rows(1))
    gains.add(1, rows(2))
    ratio = gains.gain(1) / gains.gain(0)

    assert gains.best([0, 1]) == 1
    assert gains.best([0, 1], costs={0: 1.0, 1: 1.1 * ratio}) == 0
    assert gains.best([0, 1], costs={0: 1.0, 1: 0.9 * ratio}) == 1


def test_what_is_not_kept_is_forgotten(covariance: Array, rows: Callable[..., Array]) -> None:
    """A frame that left the queue takes no memory, and may come again."""
    gains = Gains(covariance, SIGMA)
    gains.add(0, rows())
    gains.add(1, rows())
    gains.keep([1])

    assert 0 not in gains
    assert 1 in gains


def test_costs_are_measured_where_they_can_be() -> None:
    """A composition that was labelled costs what it took on average; another one follows from its electrons; before any label only ratios count."""
    water, copper, dimer = np.array([8, 1, 1]), np.array([29]), np.array([8, 8, 1, 1, 1, 1])
    costs = Costs()
    assert costs.of(dimer) / costs.of(water) == pytest.approx(2**2.5)

    costs.add(water, 2.0)
    costs.add(np.array([1, 8, 1]), 4.0)
    assert costs.of(water) == pytest.approx(3.0)
    assert costs.of(dimer) == pytest.approx(3.0 * 2**2.5)
    assert costs.of(copper) == pytest.approx(3.0 * 2.9**2.5)

    instant = Costs()
    instant.add(water, 0.0)
    assert instant.of(water) > 0
