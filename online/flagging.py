"""Which frames are picked for labelling: the first one, uncertain ones at a distance from each other, and random ones. Pure, one state a session.

The state is carried by the caller; the uniform random number is handed in. It runs in the force path: a step costs a microsecond or two.
"""

from __future__ import annotations

from dataclasses import dataclass

from tumbaga.online.records import Reason

_NEVER = -(2**62)


@dataclass(frozen=True)
class Settings:
    """When to flag.

    Attributes:
        force_error: the accuracy the user wants to hold, eV/Å; the score is held against it.
        audit_every: mean number of steps between random audits; 0 for none.
        spacing: least number of steps between two uncertain frames, for consecutive frames are nearly copies.
        spacing_critical: the same when the score passes `critical` for the first time since the last flag.
        window: how many of the last scored steps are looked at for an opening; at most 8.
        needed: how many of them must be above `high`.
        quiet: scored steps below `low` that close a burst.
        low_ratio: `low` in units of force_error.
        critical_ratio: `critical` in units of force_error.
    """

    force_error: float
    audit_every: float = 2000.0
    spacing: int = 20
    spacing_critical: int = 5
    window: int = 3
    needed: int = 2
    quiet: int = 20
    low_ratio: float = 0.6
    critical_ratio: float = 2.5

    @property
    def low(self) -> float:
        """Below it a step is quiet, eV/Å."""
        return self.low_ratio * self.force_error

    @property
    def high(self) -> float:
        """Above it bursts open, eV/Å."""
        return self.force_error

    @property
    def critical(self) -> float:
        """Above it a single step opens a burst, eV/Å."""
        return self.critical_ratio * self.force_error


@dataclass(frozen=True)
class Flagger:
    """What flagging remembers of a session.

    Attributes:
        started: whether the session's first frame has been seen.
        burst: whether a stretch of uncertain steps is open.
        highs: bit k is set if the scored step k before the last was above the upper threshold.
        quiet: scored steps below the lower threshold in a row, while a burst is open.
        last: step of the last flag other than an audit.
        last_critical: whether that flag was above the critical threshold.
    """

    started: bool = False
    burst: bool = False
    highs: int = 0
    quiet: int = 0
    last: int = _NEVER
    last_critical: bool = False


def step(state: Flagger, step_index: int, score: float | None, settings: Settings, uniform: float) -> tuple[Flagger, Reason | None]:
    """Take one served frame into account and decide whether to flag it.

    Args:
        state: of the session.
        step_index: number of the frame in its session, increasing.
        score: calibrated largest force std, eV/Å; None where it was not computed (nothing is concluded then); nan counts as critical.
        settings: thresholds.
        uniform: random number in [0, 1), drawn for this step.

    Returns:
        The new state, and the reason to flag this frame or None. A burst opens when `needed` of the last `window` scored steps are above
        `high`, or one is above `critical`; while it is open every step above `low` is flagged that is `spacing` steps from the last flag;
        it closes after `quiet` scored steps below `low`. Audits are drawn among the frames not flagged otherwise.
    """
    if not state.started:
        return Flagger(started=True, last=step_index), Reason.INITIAL
    if score is not None:
        critical = not score <= settings.critical
        state = _scored(state, score, critical, settings)
        if state.burst and not score < settings.low and _spaced(state, step_index, critical, settings):
            return Flagger(True, True, state.highs, state.quiet, step_index, critical), Reason.UNCERTAIN
    if uniform * settings.audit_every < 1.0 and settings.audit_every > 0:
        return state, Reason.AUDIT
    return state, None


def _scored(state: Flagger, score: float, critical: bool, settings: Settings) -> Flagger:
    highs = ((state.highs << 1) | (not score <= settings.high)) & ((1 << settings.window) - 1)
    if state.burst:
        quiet = state.quiet + 1 if score < settings.low else 0
        burst = quiet < settings.quiet
    else:
        quiet = 0
        burst = critical or highs.bit_count() >= settings.needed
    if (burst, highs) == (state.burst, state.highs) and quiet == state.quiet:
        return state  # the usual case of a calm run: nothing to allocate
    return Flagger(True, burst, highs if burst or not state.burst else 0, quiet if burst else 0, state.last, state.last_critical)


def _spaced(state: Flagger, step_index: int, critical: bool, settings: Settings) -> bool:
    # a run that stays critical keeps the usual spacing, or it would fill the queue before the first label is there
    spacing = settings.spacing_critical if critical and not state.last_critical else settings.spacing
    return step_index - state.last >= spacing
