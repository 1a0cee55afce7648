"""Flagging as transcripts of scores."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tumbaga.online.flagging import Flagger, Settings, step
from tumbaga.online.records import Reason

SETTINGS = Settings(force_error=0.1, audit_every=0)  # low 0.06, high 0.1, critical 0.25


def flags(scores: Iterable[float | None], settings: Settings = SETTINGS) -> list[int]:
    """Steps flagged as uncertain; the session's first step is 0 and not among them."""
    state, found = step(Flagger(), 0, 0.0, settings, 0.5)[0], []
    for index, score in enumerate(scores, start=1):
        state, reason = step(state, index, score, settings, 0.5)
        if reason is Reason.UNCERTAIN:
            found.append(index)
    return found


def test_the_first_frame_is_always_flagged() -> None:
    """A level-of-theory error is invisible to the uncertainty."""
    state, reason = step(Flagger(), 0, 0.0, SETTINGS, 0.9)

    assert reason is Reason.INITIAL
    assert step(state, 1, 0.0, SETTINGS, 0.9)[1] is None


def test_quiet_steps_are_not_flagged() -> None:
    """Below the upper threshold nothing opens, even above the lower one."""
    assert flags([0.05, 0.09] * 200) == []


def test_two_of_three_open_a_burst() -> None:
    """One step above the threshold is noise, two of three are not."""
    calm = [0.0] * 30

    assert flags([*calm, 0.11, 0.0, 0.0, 0.11, *calm]) == []
    assert flags([*calm, 0.11, 0.0, 0.11]) == [33]
    assert flags([*calm, 0.26]) == [31]  # one critical step is enough


def test_flags_are_spaced() -> None:
    """A long burst gives one frame every 20 steps, counted from the first frame of the session on."""
    assert flags([0.2] * 85) == [20, 40, 60, 80]


def test_within_a_burst_the_lower_threshold_rules() -> None:
    """Once open, steps above 0.6 of the threshold count; below it they do not, but the burst stays open for 20 steps."""
    assert flags([0.0] * 30 + [0.2] * 2 + [0.07] * 40) == [32, 52, 72]
    assert flags([0.0] * 30 + [0.2] * 2 + [0.05] * 19 + [0.07]) == [32, 52]
    assert flags([0.0] * 30 + [0.2] * 2 + [0.05] * 20 + [0.07] * 30) == [32]


def test_critical_steps_break_the_spacing_once() -> None:
    """The first critical step after a milder flag comes soon; a run that stays critical keeps the spacing."""
    assert flags([0.2] * 22 + [0.3] * 40) == [20, 25, 45]
    assert flags([0.3] * 40) == [5, 25]


def test_nan_counts_as_critical_and_none_as_nothing() -> None:
    """A score that could not be computed for a bad reason must flag; one that was not computed must not."""
    assert flags([0.0] * 30 + [math.nan]) == [31]
    assert flags([0.0] * 30 + [0.2, None, None, None, 0.2]) == [35]  # unscored steps do not age the window


def test_audits_come_at_their_mean_rate(rng: np.random.Generator) -> None:
    """One in 2000 steps; 200000 steps give 100 ± 30 (three standard deviations)."""
    settings = Settings(force_error=0.1)
    state, audits = step(Flagger(), 0, 0.0, settings, 0.0)[0], 0
    for index, uniform in enumerate(rng.random(200_000).tolist(), start=1):
        state, reason = step(state, index, 0.0, settings, uniform)
        audits += reason is Reason.AUDIT

    assert audits == pytest.approx(100, abs=30)


def test_an_audit_does_not_disturb_the_spacing() -> None:
    """Random frames and uncertain frames are counted apart, and an uncertain frame is no audit."""
    settings = Settings(force_error=0.1, audit_every=10)
    state = step(Flagger(), 0, 0.0, settings, 0.5)[0]
    reasons = []
    for index in range(1, 41):
        state, reason = step(state, index, 0.2, settings, 0.0 if index in (19, 20) else 0.5)
        reasons.append(reason)

    assert reasons[18] is Reason.AUDIT
    assert reasons[19] is reasons[39] is Reason.UNCERTAIN
    assert sum(reason is not None for reason in reasons) == 3


@given(st.lists(st.floats(min_value=0.0, max_value=1.0), max_size=300))
def test_uncertain_flags_are_never_nearer_than_the_critical_spacing(scores: list[float]) -> None:
    """Whatever the scores, two flags are five steps apart, and every flagged step is above the lower threshold."""
    found = [0, *flags(scores)]

    assert all(later - earlier >= 5 for earlier, later in itertools.pairwise(found))
    assert all(scores[index - 1] >= SETTINGS.low for index in found[1:])


@pytest.mark.slow
def test_a_step_costs_microseconds() -> None:
    """It runs in the force path."""
    state = step(Flagger(), 0, 0.0, SETTINGS, 0.5)[0]
    started = time.perf_counter()
    for index in range(10_000):
        state, _ = step(state, index, 0.2, SETTINGS, 0.5)

    assert (time.perf_counter() - started) / 10_000 < 20e-6  # ten times what it takes on a quiet machine
