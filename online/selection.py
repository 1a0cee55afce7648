"""Which flagged frames are accepted for a label, what each label is for, and which comes next. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tumbaga.online.records import Reason, Role
from tumbaga.online.store import Queued

TRAIN_PER_HOLDOUT = 3  # so the second, sixth, tenth … label is held out


@dataclass(frozen=True)
class Limits:
    """What bounds the queue.

    Attributes:
        force_error: the accuracy to hold, eV/Å; uncertain frames above it are labelled.
        budget: labels at most, over the life of the run directory.
        audit_share: share of all labels that audits may take.
        queue: frames that may wait.
        low_ratio: waiting frames whose score fell below this part of force_error are dropped.
    """

    force_error: float
    budget: int = 200
    audit_share: float = 0.2
    queue: int = 64
    low_ratio: float = 0.6


@dataclass(frozen=True)
class Admission:
    """What becomes of a candidate: a role if it is accepted, else why not; `replaces` is a waiting frame that makes room."""

    role: Role | None
    note: str = ""
    replaces: int | None = None


def admit(reason: Reason, score: float, queued: Sequence[Queued], by_role: Mapping[Role, int], audits: int, limits: Limits) -> Admission:
    """Decide on a candidate.

    Args:
        reason: why it was flagged.
        score: its calibrated force uncertainty from force rows, eV/Å.
        queued: what waits now.
        by_role: accepted frames so far by role (waiting, running, labelled or failed).
        audits: audits among them.
        limits: see there.
    """
    accepted = sum(by_role.values())
    if accepted >= limits.budget:
        return Admission(None, "the label budget is spent")
    if reason is Reason.UNCERTAIN and score <= limits.force_error:
        return Admission(None, f"force uncertainty {score:.3f} eV/Å from force rows is within {limits.force_error:g}")
    if reason is Reason.AUDIT and audits >= max(1.0, limits.audit_share * max(accepted, limits.budget / 10)):
        return Admission(None, "the share of audits is used up for now")
    role = Role.HOLDOUT if reason is Reason.AUDIT else Role.TRAIN
    if len(queued) < limits.queue:
        return Admission(role)
    least = min((q for q in queued if q.reason is Reason.UNCERTAIN), key=lambda q: q.priority, default=None)
    if reason is Reason.STALLED:
        return Admission(role, replaces=None if least is None else least.frame)
    if least is None or (reason is Reason.UNCERTAIN and least.priority >= score):
        return Admission(None, "the queue is full of more uncertain frames")
    return Admission(role, replaces=least.frame)


def next_frame(queued: Sequence[Queued], started: Mapping[Role, int]) -> Queued | None:
    """Choose what is labelled next, and what for: frames that an engine waits for, what was begun before, first frames, then the most
    uncertain; every fourth is held out.

    Held out is an audit if one waits, else the newest uncertain frame: it shows how the potential does where the run is now, and its score
    did not choose it. The role is given here, when the label is started, and never changes.

    Args:
        queued: what waits, oldest first.
        started: labels running or done, by role.
    """
    if not queued:
        return None
    first = [q for q in queued if q.reason is Reason.STALLED] or [q for q in queued if q.tried]
    first = first or [q for q in queued if q.reason is Reason.INITIAL]
    if first:
        return first[0]
    held_out = [q for q in queued if q.role is Role.HOLDOUT]
    others = [q for q in queued if q.role is Role.TRAIN]
    if not others or TRAIN_PER_HOLDOUT * started[Role.HOLDOUT] < started[Role.TRAIN]:
        return held_out[0] if held_out else replace(others[-1], role=Role.HOLDOUT)
    return max(others, key=lambda q: q.priority)


def stale(queued: Sequence[Queued], scores: Mapping[int, float], limits: Limits) -> list[int]:
    """Waiting frames that an update has made certain: they need no label any more. First frames and held-out ones stay."""
    low = limits.low_ratio * limits.force_error
    return [q.frame for q in queued if q.reason is Reason.UNCERTAIN and q.role is Role.TRAIN and scores.get(q.frame, low) < low]
