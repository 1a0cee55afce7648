"""Child processes as the supervisor keeps them: started with a lifeline, watched, started again with a growing pause, stopped in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tumbaga.driver import process

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # s before a child that died is started again
_SETTLED = 60.0  # s after which a child counts as healthy
MAX_DEATHS = 6  # in a row, none of them settled or with work done: then it is given up


class Child:
    """One child process of a run, under one name, over all its restarts.

    Args:
        name: unique in the run; also the name of its log.
        module: what to run with `python -m`.
        run_dir: its working directory and first argument.
        clock: seconds, monotonic.
        arguments: further arguments.
    """

    def __init__(self, name: str, module: str, run_dir: Path, clock: Callable[[], float], arguments: tuple[str, ...] = ()) -> None:
        self.name, self._module, self._run_dir, self._clock, self._arguments = name, module, run_dir, clock, arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._due = 0.0
        self._deaths = self._last_pid = 0
        self._given_up = ""
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def given_up(self) -> bool:
        """Whether it is not started again any more."""
        return bool(self._given_up)

    def start(self) -> None:
        """Start it. Standard input is its lifeline; standard error goes to the log folder."""
        log = self._run_dir / process.LOGS
        log.mkdir(exist_ok=True)
        with open(log / f"{self.name}.err", "ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self._module, str(self._run_dir), *self._arguments],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                cwd=self._run_dir,
                # a Ctrl-C in the terminal is for the supervisor alone, which stops the others in order
                start_new_session=True,
                env=_environment(),
            )
        self._started, self._last_pid = self._clock(), self._process.pid

    def worked(self, pid: int) -> None:
        """The process with this id has done work: it was no failed start, even if it is dead by now."""
        if pid == self._last_pid:
            self._deaths = 0

    def watch(self) -> str:
        """Look after it: restart it if it died. Returns a sentence, from then on, when it cannot go on, else nothing."""
        if self._given_up:
            return self._given_up
        if self._process is None:
            if self._clock() >= self._due:
                self.restarts += 1
                self.start()
            return ""
        code = self._process.poll()
        if code is None:
            return ""
        self._close_lifeline()
        self._process = None
        if code == process.EXIT_USER:
            self._given_up = self.last_words()
            return self._given_up
        lived = self._clock() - self._started
        self._deaths = 1 if lived > _SETTLED else self._deaths + 1
        if self._deaths >= MAX_DEATHS:
            self._given_up = f"{self.name} died {self._deaths} times in a row, last with code {code}; its last words: {self.last_words()}"
            return self._given_up
        self._due = self._clock() + min(_FIRST_PAUSE * 2.0 ** (self._deaths - 1), _LONGEST_PAUSE)
        return ""

    def died_with(self) -> int | None:
        """Exit code if it is dead now and was not seen dead before."""
        return None if self._process is None else self._process.poll()

    def last_words(self) -> str:
        """The last line of its standard error."""
        try:
            lines = (self._run_dir / process.LOGS / f"{self.name}.err").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else "(nothing)"

    def signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self, patience: float) -> None:
        """Ask it to leave, wait so long, then kill it."""
        if self._process is None:
            return
        self.signal(signal.SIGTERM)
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close_lifeline()
        self._process = None

    def _close_lifeline(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


def _environment() -> dict[str, str]:
    """One core a process unless the user says otherwise: threads of several processes on the same cores only wait for each other."""
    return {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}
