"""The run directory: what lies where, who holds it, and its status file. Copy it elsewhere and everything is still there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from tumbaga.driver.errors import RunDirError
from tumbaga.online.errors import is_full
from tumbaga.online.versions import write_whole
from tumbaga.socket_protocol import bus

_ATTEMPTS, _PAUSE_S = 5, 0.05
_BLOCK, _SPARE = 4096, 1024  # bytes: the status file has room for a longer status, for the hour when there is none elsewhere
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
        """Replace the status file; on a full disk, write into the place of the last one.

        Raises:
            OSError: it cannot be written.
        """
        data = json.dumps(status, indent=1).encode()
        try:
            write_whole(self.path / STATUS, data.ljust(_BLOCK * ((len(data) + _SPARE) // _BLOCK + 1)))
        except OSError as error:
            if not is_full(error):
                raise
            _overwrite(self.path / STATUS, data)

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


def _overwrite(path: Path, data: bytes) -> None:
    """Write into a file that is at least as long, which needs no room: all in one call, since nothing better can be had."""
    with open(path, "r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.write(data.ljust(size))
