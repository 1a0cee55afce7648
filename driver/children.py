"""Child processes as the supervisor keeps them: started with a lifeline, watched, started again with a growing pause, stopped in order."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Protocol

from tumbaga.driver import devices, process, tether

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # s before a child that died twice in a row is started again
_SETTLED = 60.0  # s after which a child counts as healthy
_FORK_S = 10.0  # a zygote that has loaded everything and does not answer for so long hangs
_LONGEST = 64  # bytes of what a zygote says
MAX_DEATHS = 6  # in a row, none of them settled or with work done: then it is given up


class Process(Protocol):
    """What a child is to the supervisor: a `subprocess.Popen`, or a `Forked`. Its standard input is the lifeline."""

    pid: int
    stdin: IO[bytes] | None

    def poll(self) -> int | None:
        """Exit code, None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; subprocess.TimeoutExpired if it does not come."""

    def send_signal(self, sig: int) -> None:
        """Send a signal, if it runs."""

    def kill(self) -> None:
        """Send SIGKILL, if it runs."""


class Forked:
    """A process that a zygote has made and this process has adopted; see `tumbaga.driver.tether.adopt`.

    Args:
        pid: its process id.
        stdin: the end of its lifeline that stays here.
    """

    def __init__(self, pid: int, stdin: IO[bytes]) -> None:
        self.pid = pid
        self.stdin: IO[bytes] | None = stdin
        self._code: int | None = None

    def poll(self) -> int | None:
        """Exit code, minus the number of the signal that ended it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: it did not come within so many seconds.
        """
        if self.poll() is None:
            with open(os.pidfd_open(self.pid), "rb") as end:
                select.select([end], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def send_signal(self, sig: int) -> None:
        """Send a signal, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        """Send SIGKILL, if it runs."""
        self.send_signal(signal.SIGKILL)


class Child:
    """One child process of a run, under one name, over all its restarts.

    Args:
        name: unique in the run; also the name of its log.
        module: what to run with `python -m`.
        run_dir: its working directory and first argument.
        clock: seconds, monotonic.
        arguments: further arguments.
        zygote: what it is forked from, with its name, as long as that lives.
    """

    def __init__(
        self,
        name: str,
        module: str,
        run_dir: Path,
        clock: Callable[[], float],
        arguments: tuple[str, ...] = (),
        zygote: Zygote | None = None,
    ) -> None:
        self.name, self._module, self._run_dir, self._clock, self._arguments = name, module, run_dir, clock, arguments
        self._zygote = zygote
        self._process: Process | None = None
        self._started = self._due = 0.0
        self._last_pid = 0
        self._in_vain: list[int] = []  # process ids of those that died in a row, as far as is known without having done work
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
        """Start it; while its zygote is still loading `watch` does, as soon as that is ready.

        Standard input is its lifeline; standard error goes to the log folder.
        """
        if self._zygote is not None and self._zygote.loading:
            return
        log = self._run_dir / process.LOGS
        log.mkdir(exist_ok=True)
        with open(log / f"{self.name}.err", "ab") as errors:
            forked = self._zygote.fork(self.name, errors.fileno()) if self._zygote is not None else None
            started = forked or self._launched(errors)
        self.restarts += self._last_pid != 0
        self._process, self._started, self._last_pid = started, self._clock(), started.pid

    def _launched(self, errors: IO[bytes], stdin: int = subprocess.PIPE) -> Process:
        return subprocess.Popen(
            [sys.executable, "-m", self._module, str(self._run_dir), *self._arguments],
            stdin=stdin,
            stdout=errors,
            stderr=errors,
            cwd=self._run_dir,
            # a Ctrl-C in the terminal is for the supervisor alone, which stops the others in order
            start_new_session=True,
            env=_environment(),
        )

    def worked(self, pid: int) -> None:
        """The process with this id has done work: it was no failed start, even if it is dead by now."""
        if pid == self._last_pid:
            self._in_vain.clear()
        elif pid in self._in_vain:
            del self._in_vain[: self._in_vain.index(pid) + 1]

    def watch(self) -> str:
        """Look after it: restart it if it died. Returns a sentence, from then on, when it cannot go on, else nothing."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self._ended(code)
        if self._process is None and not self._given_up and self._clock() >= self._due:
            self.start()
        return self._given_up

    def _ended(self, code: int) -> None:
        """Decide whether and when it is started again: at once after a first death."""
        self._close_lifeline()
        self._process = None
        if code == process.EXIT_USER:
            self._given_up = self.last_words()
            return
        if self._clock() - self._started > _SETTLED:
            self._in_vain.clear()
        self._in_vain.append(self._last_pid)
        deaths = len(self._in_vain)
        if deaths >= MAX_DEATHS:
            self._given_up = f"{self.name} died {deaths} times in a row, last with code {code}; its last words: {self.last_words()}"
        pause = _FIRST_PAUSE * 2.0 ** (deaths - 2) if deaths > 1 else 0.0
        self._due = self._clock() + min(pause, _LONGEST_PAUSE)

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

    def stop(self, patience: float) -> bool:
        """Ask it to leave, wait so long, then kill it; return whether it left in order."""
        if self._process is None:
            return False
        self.signal(signal.SIGTERM)
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        code = self._process.poll()
        self._close_lifeline()
        self._process = None
        return code == 0

    def _close_lifeline(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


class Zygote(Child):
    """The process that evaluators are forked from; see `tumbaga.driver.zygote`. Linux only.

    Its standard input is a socket: the lifeline, over which it is also told what to make.

    Args:
        run_dir: its working directory and first argument.
        clock: seconds, monotonic.
        module: what to run with `python -m`.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float], module: str = "tumbaga.driver.zygote") -> None:
        super().__init__("zygote", module, run_dir, clock)
        self._line: socket.socket | None = None
        self._ready = False

    def _launched(self, errors: IO[bytes], stdin: int = subprocess.PIPE) -> Process:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.settimeout(_FORK_S)
        self._ready = False
        tether.adopt()
        with theirs:
            return super()._launched(errors, theirs.fileno())

    @property
    def loading(self) -> bool:
        """Whether it runs, and is not ready yet."""
        if self.pid is None or self._line is None:
            return False
        if not self._ready and select.select([self._line], [], [], 0.0)[0]:
            self._ready = bool(self._line.recv(_LONGEST))
        return not self._ready

    def fork(self, name: str, errors: int) -> Forked | None:
        """Have an evaluator forked, and wait for that, which takes milliseconds.

        Args:
            name: of the evaluator.
            errors: descriptor for its standard output and error.

        Returns:
            The evaluator, or None if it has to be started as other children are.
        """
        if self.pid is None or self._line is None:
            return None
        read_end, write_end = os.pipe()
        told = b""
        with contextlib.suppress(OSError), open(read_end, "rb"):
            socket.send_fds(self._line, [name.encode()], [read_end, errors])
            told = self._line.recv(_LONGEST)
        if not told:
            self.signal(signal.SIGKILL)
            os.close(write_end)
            return None
        return Forked(int(told), open(write_end, "wb"))

    def _close_lifeline(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None


def reap(known: Collection[int | None]) -> None:
    """Clear away dead processes that this one has adopted without knowing them: children of children that were killed."""
    with contextlib.suppress(ChildProcessError):  # there are none
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None and dead.si_pid not in known:
            os.waitpid(dead.si_pid, 0)


def _environment() -> dict[str, str]:
    """One core a process unless the user says otherwise: threads of several processes on the same cores only wait for each other."""
    return {**dict.fromkeys(devices.THREADS, "1"), **os.environ}
