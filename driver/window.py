"""When frames that belong together leave together: the beads of one engine arrive within a fraction of a millisecond of each other.

The frames of a group wait until as many are there as were under way at once in the last round, or until the first of them has waited for
the length of the window. So one that is alone does not wait: where nobody came, nobody is expected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_ROUNDING = 1e-9  # s


@dataclass(eq=False)
class _Group:
    expected: int = 1
    peak: int = 0  # most frames under way at once in this round
    away: int = 0  # under way: waiting or being computed
    here: int = 0  # waiting
    leaving: bool = False  # some have left and did not all fit into one batch
    since: float = 0.0  # when the first of those came


class Window:
    """Says which groups may leave.

    Args:
        seconds: that the first frame of a group waits for the others, at most; 0 for no waiting.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds, self._clock = seconds, clock
        self._groups: dict[str, _Group] = {}

    def arrived(self, group: str) -> None:
        """One frame of a group has come; a group without a name has no siblings."""
        if not group or not self._seconds:
            return
        known = self._groups.setdefault(group, _Group())
        if not known.here:
            known.since = self._clock()
        known.here += 1
        known.away += 1
        known.peak = max(known.peak, known.away)

    def open(self, group: str) -> bool:
        """Whether the frames of a group may leave."""
        known = self._groups.get(group)
        if known is None or known.leaving:
            return True
        return known.here >= known.expected or self._clock() - known.since >= self._seconds - _ROUNDING

    def left(self, group: str) -> None:
        """One frame of a group has left to be computed; those that were here with it need not wait for others any more."""
        known = self._groups.get(group)
        if known is not None:
            known.here -= 1
            known.leaving = known.here > 0

    def returned(self, group: str) -> None:
        """A frame that had left waits again, and for nobody."""
        known = self._groups.get(group)
        if known is not None:
            known.here += 1
            known.leaving = True

    def finished(self, group: str, *, waiting: bool = False) -> None:
        """One frame of a group was answered, or is for nobody any more.

        Args:
            group: its name.
            waiting: whether it had not left.
        """
        known = self._groups.get(group)
        if known is None:
            return
        known.away -= 1
        known.here -= waiting
        known.leaving &= known.here > 0
        if known.away <= 0:  # the round is over
            known.expected, known.peak, known.away, known.here, known.leaving = max(1, known.peak), 0, 0, 0, False

    def remaining(self) -> float | None:
        """Seconds until the first of the groups that wait may leave, or None if none waits for its siblings."""
        now = self._clock()
        held = [known for known in self._groups.values() if 0 < known.here < known.expected and not known.leaving]
        waits = [self._seconds - (now - known.since) for known in held]
        return max(0.0, min(waits)) if waits else None
