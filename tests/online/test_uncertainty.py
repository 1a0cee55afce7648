"""The per-atom score, the exact force spread and the scale between them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tumbaga.online.uncertainty import AtomScore, ScoreScale, atom_lpr, force_std, species_index


def spd(rng: np.random.Generator, n: int) -> np.ndarray:
    root = rng.standard_normal((n, n))
    return root @ root.T / n


@pytest.mark.parametrize("width", [8, 200])
def test_score_is_the_quadratic_form(rng: np.random.Generator, width: int) -> None:
    """The prepared score, its plain form and a loop over atoms agree, for few features as for many."""
    covariance, features = spd(rng, 3 * width), rng.standard_normal((9, width))
    species = rng.integers(0, 3, 9)

    score = AtomScore(covariance, 3)(features, species)
    places = [slice(width * z, width * (z + 1)) for z in range(3)]
    blocks = np.array([covariance[place, place] for place in places])
    np.testing.assert_allclose(score, atom_lpr(features, species, blocks), rtol=1e-6)
    for atom, (f, z) in enumerate(zip(features, species, strict=True)):
        assert score[atom] == pytest.approx(math.sqrt(f @ blocks[z] @ f))


def test_a_singular_covariance_is_no_obstacle() -> None:
    """Directions without uncertainty score zero; nothing fails to factorise."""
    score = AtomScore(np.diag([1.0, 0.0]), 1)(np.array([[3.0, 0.0], [0.0, 5.0]]), np.array([0, 0]))

    np.testing.assert_allclose(score, [3.0, 0.0])


def test_force_std_is_the_spread_of_sampled_readouts(rng: np.random.Generator) -> None:
    """Forces of readouts drawn from the posterior scatter as predicted (20000 draws: 2 % is four standard errors)."""
    covariance, rows = spd(rng, 6), rng.standard_normal((12, 6))

    draws = rng.multivariate_normal(np.zeros(6), covariance, 20000) @ rows.T
    expected = np.sqrt(draws.var(axis=0).reshape(-1, 3).sum(axis=1))
    np.testing.assert_allclose(force_std(rows, covariance), expected, rtol=0.02)


def test_species_index_follows_the_order_of_the_blocks() -> None:
    """Blocks are in the order of the elements, not of the atomic numbers."""
    np.testing.assert_array_equal(species_index(np.array([8, 1, 79]), (79, 8, 1)), [1, 2, 0])
    with pytest.raises(KeyError):
        species_index(np.array([6]), (1, 8))


def test_scale_is_unknown_then_a_median() -> None:
    """Nothing known asks for the exact number; one outlier does not move the scale; meaningless ratios are not taken in."""
    scale = ScoreScale()

    assert not scale.known
    assert scale.sigma(0.1) == math.inf
    for score, sigma in ((0.1, 0.2), (0.2, 0.4), (0.1, 50.0), (0.3, 0.6)):
        scale = scale.updated(score, sigma)
    assert scale.sigma(0.5) == pytest.approx(1.0)
    assert scale.updated(0.0, 1.0) is scale
    assert scale.updated(1.0, math.nan) is scale


def test_scale_forgets_old_frames() -> None:
    """Only the last frames count."""
    scale = ScoreScale(memory=4)
    for ratio in (1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0):
        scale = scale.updated(1.0, ratio)

    assert scale.ratios == (3.0,) * 4
    assert scale.sigma(1.0) == 3.0
