"""What stands in for the learner while the disk is full: takes what comes, refuses it, says so, and looks for room now and then.

A learner whose disk is full is given up as if it had been killed: what it had acknowledged is in the store, results wait in the spool, and
the next one starts from there. Serving goes on with what serves; label workers keep what they computed until it can be saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tumbaga.driver import process
from tumbaga.driver.rollout import read_serving
from tumbaga.online import versions
from tumbaga.socket_protocol import bus

SENTENCE: Final = "disk full: nothing new is stored or learnt until there is room"
_UNKNOWN: Final = {"labels": dict.fromkeys(("pending", "running", "converged", "failed", "quarantined"), 0), "begun": 0, "waiting": 1}
_LOOK_S: Final = 5.0  # between two looks for room
_LEAST: Final = 1 << 20  # bytes that must be free, and for a run of large version files as many as two of them have


class FullDisk:
    """Stands in for the learner.

    Args:
        run_dir: the run directory.
        gateway: the learner's end of the line to the gateway.
        workers: the learner's end of the line to the label workers.
        reporter: to the supervisor.
        clock: seconds.
    """

    def __init__(
        self,
        run_dir: Path,
        gateway: bus.Endpoint,
        workers: bus.Endpoint,
        reporter: process.Reporter,
        clock: Callable[[], float] = process.monotonic,
    ) -> None:
        self._run_dir, self._gateway, self._workers, self._reporter, self._clock = run_dir, gateway, workers, reporter, clock
        self._serving = read_serving(run_dir)
        self._look_at = clock() + _LOOK_S
        reporter.log("error", SENTENCE)

    def turn(self, *, draining: bool = False) -> bool:
        """Refuse what waits, tell and report; return whether it is time to try again, because there is room."""
        while self._workers.receive() is not None:
            pass  # none is given a task; what they hold they say again and again
        while (received := self._gateway.receive()) is not None:
            message = received[1]
            if isinstance(message, bus.Candidate) and message.ticket:
                self._gateway.send(bus.Settled(message.session, message.ticket, self._serving.version, SENTENCE))
        self._gateway.send(self._serving)
        if self._clock() < self._look_at or not self._room():
            self._reporter.state(**(_UNKNOWN | self._reporter.told | {"problems": [SENTENCE], "draining": draining}))
            return False
        self._reporter.log("info", "there is room on the disk again")
        return True

    def _room(self) -> bool:
        """Whether a file of the size of what is written next can be: free space as the system tells it knows no quotas."""
        self._look_at = self._clock() + _LOOK_S
        files = (self._run_dir / versions.FOLDER).glob("*.safetensors")
        size = max([_LEAST, *(2 * path.stat().st_size for path in files)])
        trial = self._run_dir / f".room.{os.getpid()}"
        try:
            with open(trial, "wb") as file:
                file.writelines(bytes(_LEAST) for _ in range(size // _LEAST + 1))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return False
        finally:
            trial.unlink(missing_ok=True)
        return True
