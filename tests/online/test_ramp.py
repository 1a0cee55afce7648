"""Ramps: their shape, their order, and the work they account for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tumbaga.online.ramp import Mix, Ramp, RampState, swap_work, weight_step


def run(state: RampState, calls: int) -> tuple[RampState, list[Mix]]:
    mixes = []
    for _ in range(calls):
        state, mix = state.advance()
        mixes.append(mix)
    return state, mixes


def test_a_ramp_is_a_cosine_from_zero_to_one() -> None:
    """Monotone, symmetric, 0 before the first call and exactly 1 at the last."""
    ramp, weights = Ramp(1, 2, n=200), []
    while not ramp.done:
        weights.append(ramp.weight)
        ramp = ramp.advance()
    weights.append(ramp.weight)

    assert len(weights) == 201
    assert weights[0] == 0.0
    assert weights[-1] == 1.0
    assert (np.diff(weights) > 0).all()
    np.testing.assert_allclose(np.array(weights) + weights[::-1], 1.0, atol=1e-12)
    assert weights[100] == pytest.approx(0.5)
    assert ramp.advance() is ramp


def test_without_a_publication_one_version_serves() -> None:
    """Outside ramps the weight is 1 and a call allocates no new state."""
    state, mixes = run(RampState(serving=3), 5)

    assert mixes == [Mix(3, 3, 1.0)] * 5
    assert state.advance()[0] is state


def test_the_first_version_ramps_at_once() -> None:
    """A ramp begins with the next call and ends after n calls with the new version alone."""
    state, mixes = run(RampState(serving=1, n=10).publish(2), 12)

    assert {mix[:2] for mix in mixes[:10]} == {(1, 2)}
    assert mixes[9].weight == 1.0
    assert mixes[10] == mixes[11] == Mix(2, 2, 1.0)
    assert state.serving == 2


def test_later_versions_wait_and_the_newest_replaces_the_waiting_one() -> None:
    """During a ramp and for 500 calls after it nothing new begins; then the newest does."""
    state = run(RampState(serving=1).publish(2), 50)[0].publish(3)
    state, mixes = run(state, 150 + 200)
    assert {mix.new for mix in mixes} == {2}
    state, mixes = run(state.publish(4), 300)
    assert {mix.new for mix in mixes} == {2}
    state, mixes = run(state, 200)

    assert {mix[:2] for mix in mixes} == {(2, 4)}
    assert state.serving == 4


def test_returning_to_what_serves_cancels_the_wait() -> None:
    """A rollback to the version that is already served needs no ramp."""
    state = run(RampState(serving=1).publish(2), 50)[0].publish(3).publish(2)

    assert state.waiting is None
    assert RampState(serving=1).publish(1).advance()[1] == Mix(1, 1, 1.0)


def test_a_ramp_of_one_call_is_a_hard_swap() -> None:
    """n = 1: the next call is the new version's."""
    assert run(RampState(serving=1, n=1).publish(2), 2)[1] == [Mix(1, 2, 1.0), Mix(2, 2, 1.0)]


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_ramps_are_refused(k: int, n: int) -> None:
    """A ramp has at least one call and is somewhere on it."""
    with pytest.raises(ValueError, match="ramp"):
        Ramp(1, 2, k, n)


@given(st.lists(st.one_of(st.none(), st.integers(min_value=0, max_value=9)), max_size=200))
def test_every_ramp_adds_up_and_starts_where_the_last_one_ended(events: list[int | None]) -> None:
    """Any order of calls (None) and publications: steps are never negative, ramps run to the end, each begins at the serving version."""
    state, before, served, total = RampState(serving=0, n=5, rest=7), Mix(0, 0, 1.0), 0, 0.0
    for event in [*events, *[None] * 30]:
        if event is not None:
            state = state.publish(event)
            continue
        state, mix = state.advance()
        grown = weight_step(before, mix)
        assert grown >= 0.0
        assert mix.old == served
        total += grown
        if mix.weight == 1.0 and mix.new != mix.old:
            assert total == pytest.approx(1.0)
            served, total = mix.new, 0.0
        before = mix


def test_swap_work_at_fixed_positions_is_the_difference_of_the_potentials() -> None:
    """Where nothing moves, the work of a whole ramp is V_new - V_old; positive if the potential went up."""
    state, before, work = RampState(serving=1, n=50).publish(2), Mix(1, 1, 1.0), 0.0
    for _ in range(60):
        state, mix = state.advance()
        work += swap_work(weight_step(before, mix), energy_new=-3.0, energy_old=-3.5)
        before = mix

    assert work == pytest.approx(0.5)
