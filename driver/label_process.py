"""A labelling process seen from outside: started, asked, watched, killed. It may hang, crash, eat memory or be killed by the system.

Memory is watched from here and not limited by the system: PySCF reserves 3 GiB of addresses for a water molecule that takes 155 MiB, so that
RLIMIT_AS and RLIMIT_DATA stop what is harmless (with 8 threads it reserves 13 GiB). No pickle passes between the two processes.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from tumbaga.driver import process
from tumbaga.driver.label_child import EXIT_IDLE, HEAD, Setup, failed, kept_file, kill_session, send
from tumbaga.online.errors import OnlineError

_LOOK_S: Final = 0.2  # between two looks at the clock, the memory and whether the label is still wanted
_LAST_S: Final = 5.0
_START_S: Final = 300.0  # for imports, from a slow disk maybe
_FALSE_STARTS: Final = 5
_GB: Final = 1e9
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")

Log = Callable[..., None]


class GivenUpError(Exception):
    """The label is not wanted any more."""


class UnusableError(OnlineError):
    """A method cannot be used where labels are computed, whatever the frame: nothing is labelled until the user mends that."""

    def __init__(self, method: str, problem: str) -> None:
        super().__init__(method, problem)
        self.method, self.problem = method, problem

    def __str__(self) -> str:
        return f"label method {self.method!r} {self.problem}"


class _KilledError(Exception):
    """The process was killed by us, for a reason that is the frame's."""


class Terms(msgspec.Struct, frozen=True):
    """How a label is computed.

    Attributes:
        method: of the labels.
        options: of the method.
        time_limit: seconds after which a label is killed.
        memory_gb: 10⁹ bytes of resident memory, over all processes of a label, at which it is killed; 0 for no limit.
        threads: that libraries may use.
        attempts: how many processes may die on a frame before it has failed.
        cores: on which the process may run; empty for all.
        idle_s: seconds without work after which the process leaves; 0 for ever.
        keep: folder in which answers are kept from before they are sent until `LabelProcess.forget`; empty for none.
        repeat_every: frames of which one is labelled twice; 0 for none.
    """

    method: str
    options: dict[str, Any] = {}
    time_limit: float = 1800.0
    memory_gb: float = 0.0
    threads: int = 1
    attempts: int = 2
    cores: tuple[int, ...] = ()
    idle_s: float = 0.0
    keep: str = ""
    repeat_every: int = 0


class LabelProcess:
    """One labelling process, started at its first frame and again whenever it has died.

    Args:
        terms: how it labels.
        prefix: of the name of its folder for temporary files, which is its working directory too.
        log: called as log(level, event, **detail).
    """

    def __init__(self, terms: Terms, prefix: str, log: Log) -> None:
        self._terms, self._prefix, self._log = terms, prefix, log
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch, self._read = "", b""

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def prepare(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Start it, and have it import what it needs.

        Raises:
            GivenUpError: nothing is wanted any more.
            UnusableError: the method cannot be used, whatever the frame.
        """
        self._attempt(None, given_up)

    def compute(self, ask: bytes, given_up: Callable[[], bool] = lambda: False) -> bytes:
        """Have one frame labelled; return the label, or the reason of a failure.

        Args:
            ask: of `label_child.asked`.
            given_up: asked several times a second whether the label is not wanted any more.

        Raises:
            GivenUpError: it is not wanted any more, and its process was killed.
            UnusableError: the method cannot be used, whatever the frame.
        """
        return self._attempt(ask, given_up)

    def forget(self, ask: bytes) -> None:
        """The answer to an ask is safe elsewhere."""
        if self._terms.keep:
            self._kept(ask).unlink(missing_ok=True)

    def _kept(self, ask: bytes) -> Path:
        return kept_file(self._terms.keep, self._terms.method, self._terms.options, ask)

    def _attempt(self, ask: bytes | None, given_up: Callable[[], bool]) -> bytes:
        """Have one frame labelled, or nothing but a process started, by as many processes as it takes and may take."""
        deaths = false_starts = 0
        while True:
            if ask is not None and self._terms.keep:
                with contextlib.suppress(OSError):  # paid for by one that was killed before the answer was safe
                    return self._kept(ask).read_bytes()
            begun = False
            try:
                running = self._ready(given_up)
                if ask is None:
                    return b""
                _send(running, ask)
                self._next(running, self._terms.time_limit, given_up)
                begun = True
                return self._next(running, self._terms.time_limit, given_up)
            except _KilledError as killed:
                if not begun:
                    raise UnusableError(self._terms.method, f"cannot be used: what it imports {killed}") from None
                return failed(str(killed))
            except (EOFError, BrokenPipeError):
                code = self._ended()
            deaths, false_starts = deaths + begun, false_starts + (not begun)
            if deaths >= self._terms.attempts:
                times = "once" if deaths == 1 else f"{deaths} times"
                return failed(f"the labelling process died {times} on this frame (last exit code {code})")
            if false_starts >= _FALSE_STARTS:
                raise UnusableError(self._terms.method, f"has no process that could be started (last exit code {code})")
            if code != EXIT_IDLE:
                self._log("warning", "labelling process died", deaths=deaths, code=code)

    def _next(self, running: subprocess.Popen[bytes], seconds: float, given_up: Callable[[], bool]) -> bytes:
        """Wait for the next message; kill it when it takes too long or too much, or is not wanted any more."""
        assert running.stdout is not None
        poller = select.poll()
        poller.register(running.stdout, select.POLLIN)
        while len(self._read) < HEAD or len(self._read) < (end := HEAD + int.from_bytes(self._read[:HEAD], "little")):
            looked = process.monotonic()
            news = poller.poll(1000 * _LOOK_S)
            # a machine that sleeps, or a job that is suspended, is no label that hangs
            seconds -= min(process.monotonic() - looked, 5.0 * _LOOK_S)
            if news:
                chunk = os.read(running.stdout.fileno(), 1 << 20)
                if not chunk:
                    raise EOFError
                self._read += chunk
                continue
            reason = self._reason_to_kill(running.pid, seconds)
            if reason or given_up():
                self.close()
                raise _KilledError(reason) if reason else GivenUpError
        message, self._read = self._read[HEAD:end], self._read[end:]
        return message

    def _reason_to_kill(self, pid: int, left: float) -> str:
        if left <= 0.0:
            return f"took longer than label.time_limit = {self._terms.time_limit:g} s and was killed"
        if self._terms.memory_gb and resident(pid) > self._terms.memory_gb * _GB:
            # the next attempt would need as much: this is a verdict on the frame
            return f"needed more memory than label.memory_gb = {self._terms.memory_gb:g} and was killed"
        return ""

    def _ready(self, given_up: Callable[[], bool]) -> subprocess.Popen[bytes]:
        """The process, once it has imported what it needs."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._scratch = tempfile.mkdtemp(prefix=self._prefix)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tumbaga.driver.label_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self._scratch,  # calculators that write files write them where they are
            env=_environment(self._scratch, self._terms.threads),
            start_new_session=True,
        )
        setup = Setup(
            self._terms.method, self._terms.options, self._terms.cores, self._terms.idle_s, self._terms.keep, self._terms.repeat_every
        )
        _send(self._process, msgspec.msgpack.encode(setup))
        problem = self._next(self._process, max(_START_S, self._terms.time_limit), given_up)
        if problem:
            self.close()
            raise UnusableError(self._terms.method, problem.decode())
        return self._process

    def _ended(self) -> int:
        """The exit code of the process, which does not talk to us any more."""
        assert self._process is not None
        try:
            return self._process.wait(_LAST_S)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            self.close()

    def close(self) -> None:
        """Kill it and all that it has started, and remove its files. It can be used again."""
        running, self._process, self._read = self._process, None, b""
        if running is not None:
            kill_session(running.pid)  # before it is waited for: until then nobody else has its number
            running.wait()
            for stream in (running.stdin, running.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):
                    stream.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = ""


def _send(running: subprocess.Popen[bytes], message: bytes) -> None:
    assert running.stdin is not None
    send(running.stdin, message)


def resident(pid: int) -> float:
    """Bytes of memory that a process and all that it has started hold; 0 where /proc does not tell."""
    held, waiting = 0, [pid]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        with contextlib.suppress(OSError):
            held += _PAGE * int((folder / "statm").read_bytes().split()[1])
            for thread in (folder / "task").iterdir():
                waiting += map(int, (thread / "children").read_bytes().split())
    return held


def _environment(scratch: str, threads: int) -> dict[str, str]:
    """So many threads, a folder of its own, and no configuration file of PySCF (it would be executed)."""
    libraries = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    files = {"PYSCF_TMPDIR": scratch, "TMPDIR": scratch, "PYSCF_CONFIG_FILE": os.path.join(scratch, "none")}
    return {**os.environ, **dict.fromkeys(libraries, str(threads)), **files}
