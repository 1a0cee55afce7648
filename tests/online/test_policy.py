"""The policy as a table: every level, rule and outcome of a wait, and what each leads to."""

from __future__ import annotations

import itertools
import math

import pytest

from tumbaga.online.guards import Verdict
from tumbaga.online.policy import Act, Decision, Level, Policy, Rules, Waited, decide, level

ANSWERS = {"continue", "stall", "unsettled", "fallback"}
RULES = [Rules(*both) for both in itertools.product(Policy, repeat=2)]


@pytest.mark.parametrize(
    ("score", "verdict", "found"),
    [
        (None, Verdict.OK, Level.QUIET),
        (0.1, Verdict.OK, Level.QUIET),
        (0.11, Verdict.OK, Level.UNCERTAIN),
        (0.25, Verdict.OK, Level.UNCERTAIN),
        (0.26, Verdict.OK, Level.CRITICAL),
        (math.inf, Verdict.OK, Level.CRITICAL),
        (math.nan, Verdict.OK, Level.CRITICAL),
        (None, Verdict.WARN, Level.UNCERTAIN),
        (0.0, Verdict.CRIT, Level.CRITICAL),
        (0.3, Verdict.WARN, Level.CRITICAL),
    ],
)
def test_the_worse_of_uncertainty_and_guard_is_the_level(score: float | None, verdict: Verdict, found: Level) -> None:
    assert level(score, verdict, 0.1, 0.25) is found


def test_what_is_not_physical_never_leaves() -> None:
    """DESIGN.md §2, invariant 2: for no rule, and after no wait, is such an answer given."""
    for rules, picked, second, waited in itertools.product(RULES, (False, True), (False, True), Waited):
        decision = decide(Level.UNFIT, rules, picked=picked, second=second, waited=waited)
        assert decision.act in (Act.STALL, Act.REJECT)
        assert (decision.act is Act.STALL) == (rules.critical is Policy.STALL and waited is Waited.NOT)


def test_the_last_good_version_comes_before_everything_else() -> None:
    for rules in RULES:
        assert decide(Level.UNFIT, rules, other=True).act is Act.AGAIN
        assert decide(Level.QUIET, rules, other=True, second=True) == Decision(Act.ANSWER, "fallback")


def test_nothing_waits_unless_the_policy_says_so() -> None:
    """DESIGN.md §2, invariant 1."""
    for found, rules, picked, waited in itertools.product(Level, RULES, (False, True), Waited):
        decision = decide(found, rules, picked=picked, waited=waited)
        if decision.act is Act.STALL:
            assert rules.may_stall
            assert waited is Waited.NOT  # nobody waits twice with one frame
            assert Policy.STALL in ({rules.uncertain} if found is Level.UNCERTAIN else {rules.critical})
        assert (decision.mark in ANSWERS) == (decision.act is Act.ANSWER)


def test_frames_near_one_that_has_waited_go_on() -> None:
    """Only what was picked for a label waits; consecutive frames are nearly copies."""
    rules = Rules(critical=Policy.STALL)

    assert decide(Level.CRITICAL, rules).act is Act.STALL
    assert decide(Level.CRITICAL, rules, picked=False) == Decision(Act.ANSWER, "continue")


@pytest.mark.parametrize(
    ("found", "waited", "mark"),
    [
        (Level.QUIET, Waited.LEARNT, "stall"),
        (Level.UNCERTAIN, Waited.LEARNT, "stall"),
        (Level.CRITICAL, Waited.LEARNT, "unsettled"),
        (Level.UNCERTAIN, Waited.IN_VAIN, "unsettled"),
        (Level.CRITICAL, Waited.IN_VAIN, "unsettled"),
    ],
)
def test_an_answer_after_a_wait_says_how_it_went(found: Level, waited: Waited, mark: str) -> None:
    for rules in RULES:
        assert decide(found, rules, waited=waited) == Decision(Act.ANSWER, mark)


def test_each_level_has_its_own_rule() -> None:
    rules = Rules(uncertain=Policy.REJECT, critical=Policy.STALL)

    assert [decide(found, rules).act for found in (Level.QUIET, Level.UNCERTAIN, Level.CRITICAL)] == [Act.ANSWER, Act.REJECT, Act.STALL]
    assert decide(Level.UNCERTAIN, Rules(critical=Policy.REJECT)) == Decision(Act.ANSWER, "continue")
