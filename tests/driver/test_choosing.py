"""A user's words for a subset, and the subset."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tumbaga.driver import choosing
from tumbaga.driver.backends import registry
from tumbaga.driver.choosing import Subset
from tumbaga.driver.errors import ConfigError
from tumbaga.online.records import Frame, LabelledFrame
from tumbaga.online.subsets import Count, Criteria
from tumbaga.online.testing import ToyTrainable, label_from


@pytest.fixture
def toy() -> ToyTrainable:
    return ToyTrainable(weights=np.random.default_rng(0).standard_normal(64))


@pytest.fixture
def data(toy: ToyTrainable) -> list[LabelledFrame]:
    """Twelve clusters: CuAu, CuO and H2O by turns, every fourth the same as the one before it."""
    rng, made = np.random.default_rng(1), []
    for k in range(12):
        numbers = np.array([[29, 79], [29, 8], [8, 1, 1]][k % 3])
        frame = Frame(numbers, 1.6 * np.arange(len(numbers))[:, None] * np.eye(3)[0] + 0.2 * rng.standard_normal((len(numbers), 3)))
        made.append(LabelledFrame(frame, label_from(toy, frame), f"set#{k}"))
    return made


def test_words_become_criteria() -> None:
    """Every form of a user's words means what it says."""
    found = choosing.criteria("Cu, Au", "Cu,Au,O,H", ["Cu>=2", "atoms < 40", "Cu(H2O)2"], "-4.1:", 20.0)

    formula = (Count(0, "=", 7), Count(29, "=", 1), Count(1, "=", 4), Count(8, "=", 2))
    assert found == Criteria((29, 79), (29, 79, 8, 1), (Count(29, ">=", 2), Count(0, "<", 40), *formula), (-4.1, math.inf), 20.0)
    assert choosing.criteria() == Criteria()
    assert choosing.criteria(energy=":-3.5").energy == (-math.inf, -3.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: choosing.criteria(present="Cx"), "--with: there is no element 'Cx'"),
        (lambda: choosing.criteria(only="Cu;Au"), "--only: there is no element 'Cu;Au'"),
        (lambda: choosing.criteria(counts=["Qq>=2"]), "--count: there is no element 'Qq'"),
        (lambda: choosing.criteria(counts=["2 copper"]), "--count: '2 copper' is neither a condition"),
        (lambda: choosing.criteria(energy="low:high"), "--energy: is 'low:high'; write the lowest and the highest"),
        (lambda: choosing.criteria(energy="-3"), "--energy: is '-3'; write the lowest and the highest"),
        (lambda: choosing.criteria(energy="-3:-4"), "--energy: is '-3:-4'; write the lowest and the highest"),
        (lambda: choosing.criteria(max_force=-1.0), "--max-force: is -1; it must be a positive number"),
    ],
)
def test_what_cannot_be_understood_is_a_sentence(make: Callable[[], Criteria], said: str) -> None:
    """The option is named, and how to write it."""
    with pytest.raises(ConfigError) as caught:
        make()

    assert str(caught.value).startswith(said)


def test_conditions_come_before_chance(data: list[LabelledFrame]) -> None:
    """So many of those that meet the conditions, in the order of the data; none that meets them is a sentence."""
    found = choosing.choose(data, Subset(choosing.criteria(present="Cu"), by_chance=3, seed=1))

    assert len(found) == 3
    assert all(29 in one.frame.numbers for one in found)
    places = [data.index(one) for one in found]
    assert places == sorted(places)
    with pytest.raises(ConfigError, match="none of the 12 frames meets the conditions"):
        choosing.choose(data, Subset(choosing.criteria(present="Pt")))


@pytest.mark.parametrize("measure", ["farthest", "log-det"])
def test_different_frames_are_of_all_kinds(data: list[LabelledFrame], toy: ToyTrainable, measure: choosing.Measure) -> None:
    """Three different ones of data that repeat themselves are one of each composition; repeats are not taken."""
    repeated = [one for one in data for _ in range(3)]

    found = choosing.choose(repeated, Subset(different=3, measure=measure), toy)
    assert {tuple(one.frame.numbers) for one in found} == {(29, 79), (29, 8), (8, 1, 1)}
    assert len(choosing.choose(repeated, Subset(different=36), toy)) == 12


def test_different_frames_need_features(data: list[LabelledFrame]) -> None:
    """A potential without a readout cannot tell frames apart, and says so."""
    with pytest.raises(ConfigError, match=r"toy:lj.* has none"):
        choosing.choose(data, Subset(different=3), registry.load("toy:lj"))
    with pytest.raises(ConfigError, match="needs a potential with a linear readout"):
        choosing.choose(data, Subset(different=3))


def test_batches_hold_all_frames_in_order(data: list[LabelledFrame]) -> None:
    """Runs of at most so many atoms; a frame of more stands alone."""
    for atoms in (1, 5, 1000):
        parts = choosing.batches(data, atoms)

        assert [one for part in parts for one in part] == data
        assert all(len(part) == 1 or sum(len(one.frame) for one in part) <= atoms for part in parts)
    assert choosing.batches([]) == []
