"""The tracked quantile covers what it says, moves the right way and stays within its bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tumbaga.online.calibration import FEWEST, LEAST, MOST, TrackedQuantile, error_ratio, variance_factor


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_audits_are_covered_nine_times_in_ten(rng: np.random.Generator, scale: float) -> None:
    """Whatever the size of the errors, one in ten audits is a miss in the long run (2000 audits; 2 % is the bound of the method)."""
    quantile, misses = TrackedQuantile(), 0
    for ratio in scale * np.abs(rng.standard_normal(2000)):
        misses += ratio > quantile.q
        quantile = quantile.after(float(ratio), audit=True)

    assert misses / 2000 == pytest.approx(0.1, abs=0.02)


def test_coverage_survives_a_drift(rng: np.random.Generator) -> None:
    """Errors that grow fourfold over the run are still covered: no independence is assumed."""
    quantile, misses = TrackedQuantile(), 0
    for scale in np.linspace(0.7, 2.8, 2000):
        ratio = float(scale * abs(rng.standard_normal()))
        misses += ratio > quantile.q
        quantile = quantile.after(ratio, audit=True)

    assert misses / 2000 == pytest.approx(0.1, abs=0.02)


def test_flagged_labels_only_raise() -> None:
    """A frame picked by its score says nothing by being covered."""
    start = TrackedQuantile()

    assert start.after(1.0, audit=False) is start
    assert start.after(1.0, audit=True).q == pytest.approx(2.0 * 0.99)
    assert start.after(3.0, audit=False).q == start.after(3.0, audit=True).q == pytest.approx(2.0 * 1.09)


def test_a_number_that_is_not_finite_is_a_miss() -> None:
    """nan must not calm the quantile down."""
    assert TrackedQuantile().after(math.nan, audit=True).q > 2.0


@given(st.lists(st.tuples(st.floats(min_value=0.0), st.booleans()), max_size=200))
def test_bounds_hold(series: list[tuple[float, bool]]) -> None:
    """q never leaves [0.5, 8], and a swap of which nothing is known never lowers it."""
    quantile = TrackedQuantile()
    for ratio, audit in series:
        quantile = quantile.after(ratio, audit)
        assert 0.5 <= quantile.q <= 8.0
        assert quantile.after_swap().q >= max(quantile.q, 2.0)


def test_a_swap_brings_q_to_what_held_out_labels_ask_for() -> None:
    """To twice that at most and that at least; never below its start, not by a handful of labels, and not where one is not covered at all."""
    high = TrackedQuantile(q=7.0)
    assert high.after_swap([1.0] * (FEWEST - 1)).q == 7.0
    assert high.after_swap([1.0, 2.0, 1.5, 2.4] * 2).q == pytest.approx(4.8)
    assert high.after_swap([0.1] * FEWEST).q == high.after_swap_least
    assert TrackedQuantile(q=5.0).after_swap([4.0] * 9).q == 5.0
    assert TrackedQuantile(q=2.5).after_swap([4.0] * 9).q == 4.0
    assert TrackedQuantile(q=2.5).after_swap([40.0] * 9).q == TrackedQuantile().high
    assert high.after_swap([1.0, 1.0, 1.0, math.nan] * 2).q == high.after_swap([1.0, 1.0, 1.0, math.inf] * 2).q == 7.0
    # of a hundred, the largest tenth does not count
    assert high.after_swap([*np.linspace(0.0, 3.0, 91), *[6.0] * 9]).q == pytest.approx(6.0)


def test_error_ratio_is_the_worst_atom() -> None:
    """Errors are norms over xyz; no spread with an error is infinite, no spread without one is nothing."""
    label, served = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), np.zeros((3, 3))

    assert error_ratio(label, served, np.array([2.5, 1.0, 0.0])) == pytest.approx(2.0)
    assert error_ratio(label, served, np.array([2.5, 0.0, 0.0])) == math.inf


def test_variances_are_fitted_to_errors_as_far_as_there_are_errors() -> None:
    """Many components give the ratio of the sums, few leave what was predicted, and nobody is corrected beyond the bounds."""
    rng = np.random.default_rng(0)
    variances = rng.uniform(0.01, 0.09, 9000)
    errors = rng.normal(0.0, np.sqrt(0.3 * variances))
    missed, spread = float((errors**2).sum()), float(variances.sum())
    assert variance_factor(missed, spread, 9000) == pytest.approx(0.3, rel=0.05)
    assert variance_factor(0.3, 1.0, 24) == pytest.approx((24 + 24 * 0.3) / 48)
    assert variance_factor(25.0, 1.0, 96) == pytest.approx(20.2)  # four labels of eight atoms, five times off
    assert variance_factor(0.0, 0.0, 0) == 1.0
    assert variance_factor(1e-9, 1.0, 10**6) == LEAST
    assert variance_factor(1e9, 1.0, 10**6) == MOST
