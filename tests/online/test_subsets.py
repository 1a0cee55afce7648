"""Choosing frames: by what they are made of, by chance, and by what they tell that others do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from tumbaga.online import subsets
from tumbaga.online.errors import BadFrameError
from tumbaga.online.records import Array, Frame, Label, LabelledFrame, Prediction
from tumbaga.online.subsets import Count, Criteria
from tumbaga.online.testing import ToyTrainable


def one(symbols: Sequence[int], energy: float = 0.0, force: float = 0.0) -> LabelledFrame:
    positions = 2.0 * np.arange(3 * len(symbols)).reshape(-1, 3)
    forces = np.zeros((len(symbols), 3))
    forces[0] = force / math.sqrt(3)
    return LabelledFrame(Frame(np.array(symbols), positions), Label(energy, forces, "test", 0.0))


COPPER, WATER, BOTH = one([29, 29]), one([8, 1, 1], -6.0, 2.0), one([29, 8, 1, 1], -4.0, 5.0)


@pytest.mark.parametrize(
    ("criteria", "kept"),
    [
        (Criteria(), [COPPER, WATER, BOTH]),
        (Criteria(present=(29,)), [COPPER, BOTH]),
        (Criteria(present=(29, 8)), [BOTH]),
        (Criteria(only=(29,)), [COPPER]),
        (Criteria(only=(1, 8, 79)), [WATER]),
        (Criteria(counts=(Count(29, ">=", 1),)), [COPPER, BOTH]),
        (Criteria(counts=(Count(29, ">", 1),)), [COPPER]),
        (Criteria(counts=(Count(29, "=", 1),)), [BOTH]),
        (Criteria(counts=(Count(0, "<=", 3),)), [COPPER, WATER]),
        (Criteria(counts=(Count(0, "<", 3), Count(29, ">=", 1))), [COPPER]),
        (Criteria(energy=(-2.0, -1.0)), [WATER, BOTH]),
        (Criteria(energy=(-math.inf, -1.5)), [WATER]),
        (Criteria(max_force=2.1), [COPPER, WATER]),
        (Criteria(present=(8,), max_force=2.1), [WATER]),
    ],
)
def test_criteria(criteria: Criteria, kept: list[LabelledFrame]) -> None:
    """Every condition keeps the frames it says, and several hold at once; energies are per atom, forces the norm on an atom."""
    assert [frame for frame in (COPPER, WATER, BOTH) if criteria(frame)] == kept


def test_chance_adds_and_does_not_drop() -> None:
    """A choice of fewer is part of a choice of more with the same seed; another seed chooses others; too many gives all."""
    few, many = subsets.by_chance(100, 10, 3), subsets.by_chance(100, 40, 3)

    assert set(few) < set(many)
    assert (np.diff(many) > 0).all()
    assert len(set(few)) == 10
    assert set(few) != set(subsets.by_chance(100, 10, 4))
    np.testing.assert_array_equal(subsets.by_chance(3, 10, 0), [0, 1, 2])
    assert subsets.by_chance(0, 5, 0).size == 0


def test_frame_features_are_the_energy_row(toy: ToyTrainable, cluster: Callable[..., Frame]) -> None:
    """Features of a frame times the readout are its energy per atom, less the fixed part."""
    frame = cluster(3)
    features = subsets.frame_features(frame, toy.predict([frame])[0], toy.elements)

    model = toy.force_rows(frame)
    np.testing.assert_allclose(features, model.phi / len(frame), atol=1e-12)
    with pytest.raises(BadFrameError, match="are not given"):
        subsets.frame_features(frame, Prediction(0.0, np.zeros((9, 3)), np.zeros((3, 3))), toy.elements)


def test_farthest_points_spread_and_stop() -> None:
    """On a line the middle comes first, then the ends; what repeats a chosen frame is not chosen."""
    line = np.array([[0.0], [0.1], [5.0], [10.0], [10.0], [5.0]])

    np.testing.assert_array_equal(subsets.farthest_points(line, 3), [2, 0, 3])
    assert len(subsets.farthest_points(line, 6)) == 4
    np.testing.assert_array_equal(subsets.farthest_points(line, 1, held=np.array([[0.0]])), [3])
    assert subsets.farthest_points(line, 0).size == 0
    assert subsets.farthest_points(np.zeros((0, 2)), 3).size == 0


def greedy(rows: list[Array], size: int, covariance: Array, noise: float) -> list[int]:
    """The choice without short cuts: at each step the log-determinant of the posterior precision for every frame that is left."""
    precision, chosen = np.linalg.inv(covariance), []
    for _ in range(size):
        left = [k for k in range(len(rows)) if k not in chosen]
        best = max(left, key=lambda k: np.linalg.slogdet(precision + rows[k].T @ rows[k] / noise**2)[1])
        chosen.append(best)
        precision = precision + rows[best].T @ rows[best] / noise**2
    return chosen


def test_log_det_is_the_greedy_choice(rng: np.random.Generator) -> None:
    """Bounds and updates in place of inversions change nothing of the greedy choice."""
    rows = [rng.standard_normal((rng.integers(1, 5), 6)) * rng.uniform(0.2, 2.0) for _ in range(30)]
    root = rng.standard_normal((6, 6))
    covariance = root @ root.T

    assert subsets.log_det(rows, 12, covariance, 0.3).tolist() == greedy(rows, 12, covariance, 0.3)


def test_log_det_takes_a_repeated_frame_last(rng: np.random.Generator) -> None:
    """Frames that are there twice are not both taken while another one is new, and a stop ends where little is to be learnt."""
    rows = [row[None] for row in np.eye(3)]
    twice = [rows[0], rows[0], rows[1], rows[2]]

    chosen = subsets.log_det(twice, 4, np.eye(3), 0.01)
    assert set(chosen[:3]) == {0, 2, 3} or set(chosen[:3]) == {1, 2, 3}
    assert len(subsets.log_det(twice, 4, np.eye(3), 0.01, stop=0.5)) == 3
