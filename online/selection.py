"""Which flagged frames are accepted for a label, what each label is for, and which comes next. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tumbaga.online.records import Reason, Role
from tumbaga.online.store import Queued

TRAIN_PER_HOLDOUT = 3  # so the second, sixth, tenth … label is held out
NEARLY_SPENT = 0.8  # part of the budget after which frames must be more uncertain to get a label …
RAISED = 1.25  # … by this factor

Pick = Callable[[Sequence[Queued]], Queued | None]


@dataclass(frozen=True)
class Limits:
    """What bounds the queue.

    Attributes:
        force_error: the accuracy to hold, eV/Å; uncertain frames above it are labelled.
        budget: labels at most, over the life of the run directory.
        core_hours: time that all labels together may take, cores times hours; 0 for no limit.
        audit_share: share of the budget that audits may take, and of the labels so far as long as other frames wait; half of it is kept for
            them.
        queue: frames that may wait.
        low_ratio: waiting frames whose score fell below this part of force_error are dropped.
    """

    force_error: float
    budget: int = 200
    core_hours: float = 0.0
    audit_share: float = 0.2
    queue: int = 64
    low_ratio: float = 0.6

    @property
    def others(self) -> int:
        """Labels at most of frames that were picked by their uncertainty.

        A run that has given all its labels to them, in its first minutes perhaps, would never hear again of what it serves: neither the
        calibration nor a rollback nor convergence could rest on anything.
        """
        return self.budget - int(0.5 * self.audit_share * self.budget)


@dataclass(frozen=True)
class Spending:
    """What labels have cost so far.

    Attributes:
        accepted: frames accepted for a label (waiting, running, labelled, set aside or failed).
        core_hours: of all labels, in vain or not.
        audits: frames among those accepted that were picked at random.
    """

    accepted: int
    core_hours: float = 0.0
    audits: int = 0

    def timed_out(self, limits: Limits) -> bool:
        """Whether labels have taken all the time that they may take: then none is begun, not even of a frame that was accepted."""
        return bool(limits.core_hours) and self.core_hours >= limits.core_hours

    def spent(self, limits: Limits, reason: Reason | None = None) -> str:
        """Return what is spent, as a sentence; empty while there is something left of both budgets, for frames flagged for this reason."""
        if self.timed_out(limits):
            return f"the {limits.core_hours:g} core-hours for labels are spent: none is begun any more"
        if self.accepted >= limits.budget:
            return "the label budget is spent"
        if reason is Reason.UNCERTAIN and self.accepted - self.audits >= limits.others:
            return "what is left of the label budget is kept for audits"
        return ""

    def threshold(self, limits: Limits) -> float:
        """Return the force uncertainty above which frames are labelled, eV/Å: the last labels of a budget are kept for the worst frames."""
        return limits.force_error * (RAISED if self.accepted >= NEARLY_SPENT * limits.budget else 1.0)

    def notes(self, limits: Limits) -> list[str]:
        """Return what a user should know of the budget, as sentences."""
        spent = self.spent(limits, Reason.UNCERTAIN)
        if spent or not limits.budget or self.threshold(limits) == limits.force_error:
            return [spent] if spent else []
        raised = f"frames get one above {self.threshold(limits):.3g} eV/Å from now on, in place of {limits.force_error:g}"
        return [f"{self.accepted} of {limits.budget} labels are given away: {raised}"]


@dataclass(frozen=True)
class Admission:
    """What becomes of a candidate: a role if it is accepted, else why not; `replaces` is a waiting frame that makes room."""

    role: Role | None
    note: str = ""
    replaces: int | None = None


def admit(
    reason: Reason,
    score: float,
    queued: Sequence[Queued],
    by_role: Mapping[Role, int],
    audits: int,
    limits: Limits,
    core_hours: float = 0.0,
) -> Admission:
    """Decide on a candidate.

    Args:
        reason: why it was flagged.
        score: its calibrated force uncertainty from force rows, eV/Å.
        queued: what waits now.
        by_role: accepted frames so far by role (waiting, running, labelled, set aside or failed).
        audits: audits among them.
        limits: see there.
        core_hours: what labels have taken so far.
    """
    accepted = sum(by_role.values())
    spending = Spending(accepted, core_hours, audits)
    if spent := spending.spent(limits, reason):
        return Admission(None, spent)
    if reason is Reason.UNCERTAIN and score <= (threshold := spending.threshold(limits)):
        return Admission(None, f"force uncertainty {score:.3f} eV/Å from force rows is within {threshold:g}")
    # where nothing else wants a label an audit takes it from nobody
    shared = max(accepted, limits.budget / 10) if queued else limits.budget
    if reason is Reason.AUDIT and audits >= max(1.0, limits.audit_share * shared):
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


def next_frame(queued: Sequence[Queued], started: Mapping[Role, int], pick: Pick) -> Queued | None:
    """Choose what is labelled next, and what for: frames that an engine waits for, what was begun before, first frames, then what tells
    most; every fourth is held out.

    Held out is an audit if one waits, else the newest uncertain frame: it shows how the potential does where the run is now, and neither its
    score nor its gain chose it. The role is given here, when the label is started, and never changes.

    Args:
        queued: what waits, oldest first.
        started: labels running or done, by role.
        pick: chooses among uncertain frames; None says that none is worth a label before what is under way has ended.
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
    return pick(others) or next(iter(held_out), None)


def stale(queued: Sequence[Queued], scores: Mapping[int, float], limits: Limits) -> list[int]:
    """Waiting frames that an update has made certain: they need no label any more. First frames and held-out ones stay."""
    low = limits.low_ratio * limits.force_error
    return [q.frame for q in queued if q.reason is Reason.UNCERTAIN and q.role is Role.TRAIN and scores.get(q.frame, low) < low]
