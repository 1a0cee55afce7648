"""Durations of force calls: the maximum is exact, quantiles are within 2 %, the memory does not grow."""

from __future__ import annotations

import numpy as np
import pytest

from tumbaga.driver.stats import CallTimes


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99])
def test_quantiles_are_within_two_percent(share: float) -> None:
    """For durations spread over five decades any quantile is within 2 % of the exact one."""
    ms = 10 ** np.random.default_rng(0).uniform(-1, 4, 5001)
    times = CallTimes()
    for value in ms:
        times.add(value / 1000)

    assert times.quantile_ms(share) == pytest.approx(np.quantile(ms, share, method="inverted_cdf"), rel=0.02)


def test_the_longest_call_is_exact() -> None:
    """The maximum and the count are exact, and no quantile is above the maximum."""
    times = CallTimes()
    for seconds in (0.001, 0.0473, 0.002):
        times.add(seconds)

    assert times.summary()["max"] == 47.3
    assert times.count == 3
    assert times.quantile_ms(1.0) <= times.longest_ms


def test_nothing_was_called() -> None:
    """Before the first call everything is zero."""
    assert CallTimes().summary() == {"p50": 0.0, "p99": 0.0, "max": 0.0}


def test_extremes_are_counted() -> None:
    """A call of no time at all and one of a day are both counted, the day exactly."""
    times = CallTimes()
    times.add(0.0)
    times.add(86400.0)

    assert times.count == 2
    assert times.quantile_ms(0.5) <= 0.0102
    assert times.longest_ms == 86_400_000.0


def test_one_slow_call_is_seen_in_the_last_percent_only() -> None:
    """One call of a second among a thousand of a millisecond moves the maximum and not the 99 % quantile."""
    times = CallTimes()
    for seconds in [0.001] * 1000 + [1.0]:
        times.add(seconds)

    assert times.summary()["p99"] == pytest.approx(1.0, rel=0.02)
    assert times.summary()["max"] == 1000.0
