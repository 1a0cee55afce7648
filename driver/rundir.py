"""The run directory: what lies where, who holds it, and its status file. Copy it elsewhere and everything is still there."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from tumbaga.driver.errors import RunDirError
from tumbaga.online.versions import write_whole
from tumbaga.socket_protocol import bus

_ATTEMPTS, _PAUSE_S = 5, 0.05
LOCK, STATUS = "lock", "status.json"
_ALIVE = ("starting", "running", "labelling", "finishing labels", "stopping")  # states of a run that somebody holds


class RunDir:
    """A run directory.

    Args:
        path: the folder; made by `hold` when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None

    # -- who holds it ----------------------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Make the folder and hold it for this process until it ends.

        Raises:
            RunDirError: another process holds it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            bus.make_folder(self.path)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise RunDirError(str(self.path), f"cannot be made or written ({error.strerror}); choose another with --run-dir") from error
        for attempt in range(_ATTEMPTS):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if attempt + 1 < _ATTEMPTS:
                    time.sleep(_PAUSE_S)  # somebody who only asks for the holder holds it for an instant
                    continue
                os.close(lock)
                raise self._in_use() from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        os.set_inheritable(lock, False)
        self._lock = lock

    def _in_use(self) -> RunDirError:
        return RunDirError(
            str(self.path), f"is in use by process {self.holder()}; stop that run first (tumbaga stop {self.path}) or choose another folder"
        )

    def release(self) -> None:
        """Let it go."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def holder(self) -> int | None:
        """The process that holds the folder now, None if nobody does."""
        try:
            lock = os.open(self.path / LOCK, os.O_RDWR)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            told = os.pread(lock, 32, 0)
            return int(told) if told.isdigit() else None
        finally:
            os.close(lock)
        return None

    # -- its status ------------------------------------------------------------------------------------------------------------------

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace the status file."""
        write_whole(self.path / STATUS, json.dumps(status, indent=1).encode())

    def read_status(self) -> dict[str, Any]:
        """Read the status file; a run that is gone without saying so is "died".

        Raises:
            RunDirError: there is none.
        """
        held = self.holder() is not None  # asked first: whoever lets go has written its last status before
        try:
            status: dict[str, Any] = dict(json.loads((self.path / STATUS).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise RunDirError(str(self.path), "has no status yet; is it a run directory of tumbaga?") from error
        except (OSError, ValueError, TypeError) as error:
            raise RunDirError(str(self.path), f"has a status that cannot be read ({error})") from error
        if status.get("state") in _ALIVE and not held:
            status["state"] = "died"
            status.setdefault("errors", []).append("the supervisor ended without a word; start the run again to go on")
        return status
