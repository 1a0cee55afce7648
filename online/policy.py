"""What happens to a frame that a potential is unsure of, or must not answer: decided here and nowhere else. Pure.

Two scales meet in a level: the calibrated force uncertainty, and what the guards saw. The user's policy says what each level leads to.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from tumbaga.online.guards import Verdict


class Level(enum.IntEnum):
    """How doubtful an answer is; the larger, the worse."""

    QUIET = 0
    UNCERTAIN = 1  # above the force error to hold, or a guard warns
    CRITICAL = 2  # far above it, or a guard says that the frame does not follow from those before
    UNFIT = 3  # not a physical answer: it never leaves


class Policy(enum.Enum):
    """What the user wants done about a level."""

    CONTINUE = "continue"  # answer now, label later
    STALL = "stall"  # answer when the label is there and the potential has learnt from it, within a limit
    REJECT = "reject"  # end the session; the frames before this one are labelled


class Waited(enum.Enum):
    """Whether a frame has been waited with."""

    NOT = "not"
    LEARNT = "learnt"  # its label is there, and a potential that knows it has evaluated the frame again
    IN_VAIN = "in vain"  # no label came within the limit, or none will come, or the potential did not change by it


class Act(enum.Enum):
    """What to do with a frame now."""

    ANSWER = "answer"
    AGAIN = "again"  # have the last good version evaluate it
    STALL = "stall"
    REJECT = "reject"


@dataclass(frozen=True)
class Decision:
    """What to do, and what an answer says of itself.

    Attributes:
        act: what to do.
        mark: for the extras of an answer: "continue"; "stall" after a wait that was worth it; "unsettled" after one that was in vain;
            "fallback" where the last good version answers in place of the newest; empty where there is no answer.
    """

    act: Act
    mark: str = ""


_CONTINUE, _FALLBACK = Decision(Act.ANSWER, "continue"), Decision(Act.ANSWER, "fallback")


@dataclass(frozen=True)
class Rules:
    """The user's policies.

    Attributes:
        uncertain: for frames above the force error to hold.
        critical: for frames far above it, and for those that no version can answer: with STALL these wait for their label too.
    """

    uncertain: Policy = Policy.CONTINUE
    critical: Policy = Policy.CONTINUE

    @property
    def may_stall(self) -> bool:
        """Whether any frame ever waits."""
        return Policy.STALL in (self.uncertain, self.critical)


def level(score: float | None, verdict: Verdict, force_error: float, critical: float) -> Level:
    """Return how doubtful an answer that is physical is.

    Args:
        score: calibrated largest force std, eV/Å; None where it is not known: then the guards alone speak. NaN counts as critical.
        verdict: of the guards that look at how frames follow one another.
        force_error: that the user wants to hold, eV/Å.
        critical: above it a frame is critical, eV/Å.
    """
    by_score = Level.QUIET if score is None or score <= force_error else Level.UNCERTAIN if score <= critical else Level.CRITICAL
    by_guard = {Verdict.OK: Level.QUIET, Verdict.WARN: Level.UNCERTAIN}.get(verdict, Level.CRITICAL)
    return max(by_score, by_guard)


def decide(
    found: Level, rules: Rules, *, picked: bool = True, other: bool = False, second: bool = False, waited: Waited = Waited.NOT
) -> Decision:
    """Decide on one frame.

    Args:
        found: how doubtful its answer is.
        rules: of the user.
        picked: whether it was picked for a label. Only such frames wait: those between them are nearly copies of one that did.
        other: whether there is a last good version that has not been tried on it.
        second: whether what answers is the last good version, because a newer one did not.
        waited: whether it has been waited with.
    """
    if found is Level.QUIET and waited is Waited.NOT:
        return _FALLBACK if second else _CONTINUE  # nearly every step of a run
    if found is Level.UNFIT:
        if other:
            return Decision(Act.AGAIN)
        stalls = rules.critical is Policy.STALL and waited is Waited.NOT
        return Decision(Act.STALL if stalls else Act.REJECT)
    if waited is Waited.IN_VAIN or (waited is Waited.LEARNT and found is Level.CRITICAL):
        return Decision(Act.ANSWER, "unsettled")
    if waited is Waited.LEARNT:
        return Decision(Act.ANSWER, "stall")
    policy = {Level.UNCERTAIN: rules.uncertain, Level.CRITICAL: rules.critical}.get(found, Policy.CONTINUE)
    if policy is Policy.REJECT:
        return Decision(Act.REJECT)
    if policy is Policy.STALL and picked:
        return Decision(Act.STALL)
    return _FALLBACK if second else _CONTINUE


def precursors(scores: Sequence[float], low: float) -> list[int]:
    """Return which of the last frames of a session that went wrong are worth a label: the first above `low`, and the last.

    What came after them is unphysical: no label of it would help.

    Args:
        scores: calibrated largest force std of each frame, eV/Å, oldest first.
        low: below it a frame is calm, eV/Å.

    >>> precursors([0.01, 0.2, 0.3, 0.4], 0.1), precursors([0.01, 0.02], 0.1), precursors([], 0.1)
    ([1, 3], [1], [])
    """
    if not scores:
        return []
    last = len(scores) - 1
    first = next((place for place, score in enumerate(scores) if score > low), last)
    return sorted({first, last})
