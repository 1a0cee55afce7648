"""What toys do on purpose, and what is said about options that do not exist. That they conform stands in tests/contract."""

from __future__ import annotations

import numpy as np
import pytest

from tumbaga.driver.backends import registry
from tumbaga.driver.backends.toy import LennardJones
from tumbaga.driver.errors import PotentialError
from tumbaga.online.records import Frame

PAIR = Frame(np.array([29, 79]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0 ** (1 / 6) * 3.0]]))


def test_the_minimum_is_where_the_formula_has_it() -> None:
    """Two atoms at 2^(1/6) sigma have the energy -epsilon and no force."""
    said = registry.load("toy:lj?epsilon=0.25&sigma=3").predict([PAIR])[0]

    assert said.energy == pytest.approx(-0.25, abs=1e-14)
    assert np.abs(said.forces).max() < 1e-13


def test_atoms_on_top_of_each_other_are_said_to_be_not_finite() -> None:
    """An overlap gives a prediction that is not finite, without a warning or an exception."""
    said = registry.load("toy:lj").predict([Frame(np.array([29, 29]), np.zeros((2, 3)))])[0]

    assert not said.finite


def test_the_broken_toy_breaks_when_it_was_told() -> None:
    """After two good calls every third one is not finite, and the good ones are Lennard-Jones."""
    broken = registry.load("toy:nan?after=2&every=3")
    assert isinstance(broken, LennardJones)
    good = LennardJones(broken.epsilon, broken.sigma).predict([PAIR])[0]
    said = [broken.predict([PAIR])[0] for _ in range(8)]

    assert [one.finite for one in said] == [True, True, True, True, False, True, True, False]
    assert said[0].energy == good.energy


def test_the_broken_toy_breaks_at_once_by_default() -> None:
    """Without options every call is not finite, in energy and forces."""
    said = registry.load("toy:nan").predict([PAIR])[0]

    assert np.isnan(said.energy)
    assert np.isnan(said.forces).any()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("toy:spring", "there is no toy 'spring'; known are zero, lj, hungry, nan"),
        ("toy:lj?epsilom=1", "has no option 'epsilom'; known are epsilon, sigma"),
        ("toy:zero?epsilon=1", "has no option 'epsilon'; known are none"),
        ("toy:lj?sigma=wide", "option sigma is 'wide', not a number"),
        ("toy:nan?after=1.5", "option after is '1.5', not a number"),
    ],
)
def test_a_wrong_option_is_a_sentence(name: str, sentence: str) -> None:
    """The sentence names the potential, what is wrong, and what is known."""
    with pytest.raises(PotentialError) as caught:
        registry.load(name)

    assert str(caught.value) == f"potential {name}: {sentence}"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_option_is_a_finite_number(value: str) -> None:
    """A number that is not finite is no option: what it makes would never be."""
    with pytest.raises(PotentialError, match="not a number"):
        registry.load(f"toy:lj?epsilon={value}")
