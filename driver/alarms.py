"""When a version has to go: it gave answers that were not fit to be served, where the version before it did well on the same frames. Pure."""

from __future__ import annotations

from collections import deque
from typing import Final

from tumbaga.socket_protocol import bus

TIMES: Final = 3  # a single frame may be at fault
WITHIN: Final = 200  # frames, of all sessions


class Alarms:
    """Counts the frames at which a version failed and an earlier one did not. Version 0 has nobody to take its place."""

    def __init__(self) -> None:
        self._version = 0
        self._failed: deque[int] = deque(maxlen=TIMES)

    def failed(self, version: int, frame: int, problem: str) -> bus.Alarm | None:
        """A version was unfit for a frame and an earlier one was not; return the alarm if that has been too often.

        Args:
            version: that was to serve.
            frame: how many frames have been answered so far in all sessions.
            problem: what was wrong with its answer.
        """
        if version == 0:
            return None
        if version != self._version:
            self._version = version
            self._failed.clear()
        self._failed.append(frame)
        if len(self._failed) < TIMES or frame - self._failed[0] >= WITHIN:
            return None
        self._failed.clear()
        return bus.Alarm(
            version, f"its answers were not fit to be served at {TIMES} of {WITHIN} frames, where an earlier version's were: {problem}"
        )
