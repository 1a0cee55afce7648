"""The canary: of several engine runs, the one that moves to a version before the others do. Pure.

What a gate cannot see shows in a run. Where the version is not fit to be served there, it is gone back from before any other run has had it.
The beads of one engine, which come over several connections, are one run: they must never be served by different versions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tumbaga.driver.session import Session
from tumbaga.socket_protocol import bus

PATIENCE_S: Final = 30.0  # an engine that asked for nothing for so long may be paused, or waits for a label


class Canary:
    """The run that tries a version.

    Args:
        target: the version.
        sessions: all of the run, at least one of which has an engine.

    Attributes:
        target: the version.
        group: the name of what tries it.
    """

    def __init__(self, target: bus.Serve, sessions: Iterable[Session]) -> None:
        self.target, self.group = target, ""
        self._tried: set[str] = set()
        self._calls, self._since = -1, 0.0
        self.move(sessions, _liveliest(running(sessions)), 0.0)

    def move(self, sessions: Iterable[Session], group: str, now: float) -> None:
        """Have a run begin to move to the version.

        Args:
            sessions: all of the run.
            group: its name.
            now: s, monotonic.
        """
        self.group, self._calls, self._since = group, -1, now
        self._tried.add(group)
        for session in sessions:
            if session.group == group:
                session.ramp = session.ramp.publish(self.target.version)

    def proven(self, sessions: Iterable[Session], calls: int) -> bool:
        """Whether the version has answered so many calls of a run in a row alone, or no run is left that could go first."""
        groups = running(sessions)
        return len(groups) < 2 or any(one.alone(self.target.version) >= calls for group in groups.values() for one in group)

    def replaced(self, sessions: Iterable[Session], now: float) -> str | None:
        """Return the name of the run that is to try the version from now on, where another one has to because this one does not go on.

        Args:
            sessions: all of the run.
            now: s, monotonic.
        """
        groups = running(sessions)
        if self.group in groups:
            calls = sum(session.forces for session in groups[self.group])
            if calls != self._calls:
                self._calls, self._since = calls, now
                return None
            if now - self._since < PATIENCE_S:
                return None
        others = {name: group for name, group in groups.items() if name not in self._tried}
        return _liveliest(others or groups)


def running(sessions: Iterable[Session]) -> dict[str, list[Session]]:
    """Return the sessions that have an engine, by the run that they are of."""
    found: dict[str, list[Session]] = {}
    for session in sessions:
        if session.stream is not None:
            found.setdefault(session.group, []).append(session)
    return found


def _liveliest(groups: dict[str, list[Session]]) -> str:
    return max(groups, key=lambda name: sum(session.forces for session in groups[name]))
