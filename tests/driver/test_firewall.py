"""Answers judged: which frame of a request is the doubtful one, what is flagged and why, and what is remembered."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver.answers import Certainty
from tumbaga.driver.firewall import Firewall, Judgement, Memory, Served
from tumbaga.driver.pool import Job, Outcome
from tumbaga.online.guards import QUIET, Finding, Verdict
from tumbaga.online.policy import Act, Level, Waited
from tumbaga.online.records import Frame, Prediction, Reason

NUMBERS = np.array([29, 29])
PLACES = np.array([[0.0, 0.0, 0.0], [2.5, 0.0, 0.0]])
TARGET = 0.1


def settings(critical: str = "continue", *, enabled: bool = True) -> configs.Config:
    return configs.Config(
        flag=configs.Flag(force_error=TARGET, audit_every=10**9),
        learn=configs.Learn(enabled=enabled),
        policy=configs.Policy(critical=critical),  # type: ignore[arg-type]
    )


def outcome(force: float = 0.1, energy: float = 0.0, shift: float = 0.0) -> Outcome:
    frame = Frame(NUMBERS, PLACES + shift)
    return Outcome(Job("a", 1, frame, (0, 0, 1.0)), Prediction(energy, np.full((2, 3), force), np.zeros((3, 3))))


def judged(
    firewall: Firewall, memory: Memory, step: int, scores: Sequence[float | None], *, geometry: Finding = QUIET, again: bool = False
) -> Judgement:
    certainties = [Certainty(1.0, 0, score, 0.5) for score in scores]
    return firewall.judge(memory, step, [outcome() for _ in scores], certainties, geometry=geometry, again=again)


def test_the_first_frame_is_labelled_and_the_worst_of_a_batch() -> None:
    firewall, memory = Firewall(settings()), Memory()
    assert judged(firewall, memory, 0, [0.01, 0.02]).reason is Reason.INITIAL
    seen = judged(firewall, memory, 30, [0.01, 0.5, 0.02])
    assert (seen.level, seen.reason) == (Level.CRITICAL, Reason.UNCERTAIN)
    assert seen.worst.sure.score == 0.5


def test_a_guard_flags_what_the_potential_is_sure_of() -> None:
    """For its own reason, since force rows would not admit the frame otherwise; with the spacing of all flags."""
    firewall, memory = Firewall(settings()), Memory()
    judged(firewall, memory, 0, [0.01])
    close = Finding(Verdict.CRIT, "atoms are close")
    seen = [judged(firewall, memory, step, [0.01], geometry=close) for step in range(30, 60)]
    assert [one.level for one in seen] == [Level.CRITICAL] * 30
    flagged = [step for step, one in enumerate(seen) if one.reason is not None]
    assert flagged[0] == 0
    assert all(seen[step].reason is Reason.GUARD for step in flagged)
    assert all(later - earlier >= 20 for earlier, later in itertools.pairwise(flagged))
    assert seen[0].sentence == "atoms are close"


def test_each_place_in_a_batch_is_a_sequence_of_its_own() -> None:
    """Beads are apart from each other: no jump is seen between them, and one that jumps is found."""
    firewall, memory = Firewall(settings()), Memory()
    sure = [Certainty(1.0, 0, 0.01, 0.5)] * 2
    rng = np.random.default_rng(0)
    for step in range(400):
        beads = [outcome(shift=0.01 * rng.normal()), outcome(shift=5.0 + 0.01 * rng.normal())]
        assert firewall.judge(memory, step, beads, sure).level is Level.QUIET
    seen = firewall.judge(memory, 400, [outcome(), outcome(shift=9.0)], sure)
    assert seen.level is Level.CRITICAL
    assert seen.worst.outcome.job.frame.positions[0, 0] == 9.0


def test_what_is_evaluated_again_is_not_flagged_again() -> None:
    firewall, memory = Firewall(settings("stall")), Memory()
    judged(firewall, memory, 0, [0.01])
    first = judged(firewall, memory, 30, [0.9])
    assert firewall.decide(first, second=False, waited=Waited.NOT).act is Act.STALL
    again = judged(firewall, memory, 30, [0.9], again=True)
    assert again.reason is None
    assert firewall.decide(again, second=False, waited=Waited.LEARNT).mark == "unsettled"


def test_without_a_learner_nothing_is_flagged_and_a_policy_still_holds() -> None:
    firewall, memory = Firewall(settings("reject", enabled=False)), Memory()
    seen = judged(firewall, memory, 0, [0.9])
    assert seen.reason is None
    assert firewall.decide(seen, second=False, waited=Waited.NOT).act is Act.REJECT


@pytest.mark.parametrize(
    ("scores", "steps"), [([0.01] * 3, [2]), ([0.01, 0.07, 0.2], [1, 2]), ([0.01] * 99 + [0.2], [99]), ([0.09] * 80, [30, 79])]
)
def test_the_frames_before_the_end_are_kept(scores: list[float], steps: list[int]) -> None:
    """The last one and the first that was not calm, of the last fifty."""
    firewall, memory = Firewall(settings()), Memory()
    for step, score in enumerate(scores):
        firewall.remember(memory, Served(step, outcome(), Certainty(score, 0, score, 0.5)))
    assert [served.step for served in firewall.precursors(memory)] == steps
