"""Waits for labels: how each of them ends."""

from __future__ import annotations

import numpy as np
import pytest

from tumbaga.driver.answers import Certainty
from tumbaga.driver.firewall import Served
from tumbaga.driver.pool import Job, Outcome
from tumbaga.driver.stalls import ASK_AGAIN_S, UNHEARD_S, Stall, Stalls
from tumbaga.online.policy import Waited
from tumbaga.online.records import Frame, Prediction

LIMIT = 100.0


def begun(stalls: Stalls, session: str = "a", ticket: int = 7, now: float = 0.0) -> Stall:
    frame = Frame(np.array([29]), np.zeros((1, 3)))
    outcome = Outcome(Job(session, ticket, frame, (0, 0, 1.0)), Prediction(0.0, np.zeros((1, 3)), np.zeros((3, 3))))
    return stalls.begin(session, ticket, [outcome], Served(3, outcome, Certainty(1.0, 0, 2.0, 0.5)), now, None)


@pytest.fixture
def stalls() -> Stalls:
    return Stalls(LIMIT)


def test_the_learner_is_asked_at_once_and_then_now_and_again(stalls: Stalls) -> None:
    """What was said to a learner that died is said to the next one."""
    stall = begun(stalls)
    asked = [now for now in np.arange(0.0, 12.0, 0.5) if stalls.due(now, now)[1] == [stall]]
    assert asked == [0.0, ASK_AGAIN_S, 2 * ASK_AGAIN_S]


def test_the_limit_ends_it(stalls: Stalls) -> None:
    stall = begun(stalls, now=5.0)
    assert stalls.due(LIMIT + 4.9, LIMIT)[0] == []
    assert stalls.due(LIMIT + 5.0, LIMIT)[0] == [stall]


def test_a_silent_learner_ends_it(stalls: Stalls) -> None:
    stall = begun(stalls)
    assert stalls.due(UNHEARD_S, 0.0)[0] == []
    assert stalls.due(UNHEARD_S + 0.1, 0.0)[0] == [stall]


def test_a_label_is_learnt(stalls: Stalls) -> None:
    """It waits on for the version that knows the label, without another question to the learner."""
    stall = begun(stalls)
    assert stalls.settled("a", 7, 4, "") is stall
    assert (stall.version, stall.waits) == (4, True)
    assert stalls.due(50.0, 50.0) == ([], [])
    stalls.end(stall, Waited.LEARNT)
    assert stalls.waited("a") is Waited.LEARNT
    stalls.forget("a", 20.0)
    assert (len(stalls), stalls.begun, stalls.in_vain, stalls.longest_s) == (0, 1, 0, 20.0)


def test_a_label_that_will_not_come(stalls: Stalls) -> None:
    stall = begun(stalls)
    stalls.settled("a", 7, 0, "the budget is spent")
    assert stall.waited is stalls.waited("a") is Waited.IN_VAIN
    assert stalls.in_vain == 1


@pytest.mark.parametrize(("session", "ticket"), [("a", 6), ("b", 7)])
def test_answers_to_others_are_not_for_this_one(stalls: Stalls, session: str, ticket: int) -> None:
    """An engine that left and came again waits for another frame."""
    stall = begun(stalls)
    assert stalls.settled(session, ticket, 1, "") is None
    assert stall.version is None


def test_what_is_over_is_said_once(stalls: Stalls) -> None:
    stall = begun(stalls)
    stalls.settled("a", 7, 0, "no")
    assert stalls.settled("a", 7, 3, "") is None
    assert stalls.due(LIMIT + 1, LIMIT) == ([], [])
    assert stall.version is None
