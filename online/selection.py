"""Which flagged frames are accepted for a label, what each label is for, and which comes next. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tumbaga.online.records import Reason, Role
from tumbaga.online.store import Queued

HOLDOUT_EVERY = 4  # of the frames not picked at random, the second and every fourth after it are held out


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


def role_of(reason: Reason, accepted: int, held_out: int) -> Role:
    """The role of the next accepted frame, given how many were accepted by now and how many of these are held out.

    Audits are held out. Of the others the second, sixth, tenth … are too, so that an update can be judged from early on and on the kind
    of frame that matters; no frame ever changes sides.
    """
    if reason is Reason.AUDIT or (reason is Reason.UNCERTAIN and held_out < (accepted + HOLDOUT_EVERY - 1) // HOLDOUT_EVERY and accepted):
        return Role.HOLDOUT
    return Role.TRAIN


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
    role = role_of(reason, accepted, by_role[Role.HOLDOUT])
    if len(queued) < limits.queue:
        return Admission(role)
    least = min((q for q in queued if q.reason is Reason.UNCERTAIN), key=lambda q: q.priority, default=None)
    if least is None or (reason is Reason.UNCERTAIN and least.priority >= score):
        return Admission(None, "the queue is full of more uncertain frames")
    return Admission(role, replaces=least.frame)


def next_frame(queued: Sequence[Queued], labelled: Mapping[Role, int]) -> Queued | None:
    """Choose what is labelled next: first frames, then held-out ones while they are fewer than a third of the others, then by uncertainty."""
    if not queued:
        return None
    initial = [q for q in queued if q.reason is Reason.INITIAL]
    if initial:
        return initial[0]
    held_out = [q for q in queued if q.role is Role.HOLDOUT]
    if held_out and 3 * labelled[Role.HOLDOUT] < labelled[Role.TRAIN]:
        return held_out[0]
    others = [q for q in queued if q.role is Role.TRAIN]
    return max(others, key=lambda q: q.priority) if others else held_out[0]


def stale(queued: Sequence[Queued], scores: Mapping[int, float], limits: Limits) -> list[int]:
    """Waiting frames that an update has made certain: they need no label any more. First frames and held-out ones stay."""
    low = limits.low_ratio * limits.force_error
    return [q.frame for q in queued if q.reason is Reason.UNCERTAIN and q.role is Role.TRAIN and scores.get(q.frame, low) < low]
