"""A labelling process seen from outside: started, asked, watched, killed. It may hang, crash, eat memory or be killed by the system.

Memory is watched from here and not limited by the system: PySCF reserves 3 GiB of addresses for a water molecule that takes 155 MiB, so that
RLIMIT_AS and RLIMIT_DATA stop what is harmless (with 8 threads it reserves 13 GiB). No pickle passes between the two processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from tumbaga.driver import process
from tumbaga.driver.label_child import EXIT_IDLE, HEAD, Setup, asked, failed, kept_file, kill_session, label_of, send
from tumbaga.online.records import Frame, Label

PREFIX: Final = "tumbaga-label-"
_LOOK_S: Final = 0.2  # between two looks at the clock, the memory and whether the label is still wanted
_LAST_S: Final = 5.0
_FALSE_STARTS: Final = 5
_GB: Final = 1e9
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")

Log = Callable[..., None]


class GivenUpError(Exception):
    """The label is not wanted any more."""


class _DiedError(Exception):
    """The process ended without an answer; with its exit code, and whether the label had begun."""

    def __init__(self, code: int, begun: bool) -> None:
        super().__init__(code, begun)
        self.code, self.begun = code, begun


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


class Pool(Protocol):
    """Where a label worker has its frames labelled."""

    def schedule(self, frame: Frame) -> Future[Label]:
        """Have a frame labelled. The future fails with an OnlineError that says why there is no label."""

    def saved(self, frame: Frame) -> None:
        """The result of a frame is on disk: nothing else needs to be kept of it."""

    def fileno(self) -> int:
        """For a poller: readable when `turn` has something to do; -1 if that is never so."""

    def turn(self) -> None:
        """Do what is to be done in the worker's own loop, without waiting."""

    def stop(self) -> None:
        """Give up all labels under way."""


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
        self._scratch = ""

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def compute(self, ask: bytes, given_up: Callable[[], bool] = lambda: False) -> bytes:
        """Have one frame labelled; return the label, or the reason of a failure.

        Args:
            ask: of `label_child.asked`.
            given_up: asked several times a second whether the label is not wanted any more.

        Raises:
            GivenUpError: it is not wanted any more, and its process was killed.
        """
        deaths = false_starts = 0
        while True:
            try:
                return self._once(ask, given_up)
            except _DiedError as death:
                self.close()
                deaths, false_starts = deaths + death.begun, false_starts + (not death.begun)
                if deaths >= self._terms.attempts:
                    times = "once" if deaths == 1 else f"{deaths} times"
                    return failed(f"the labelling process died {times} on this frame (last exit code {death.code})")
                if false_starts >= _FALSE_STARTS:
                    return failed(f"no labelling process could be started {false_starts} times in a row (last exit code {death.code})")
                if death.code != EXIT_IDLE:
                    self._log("warning", "labelling process died", deaths=deaths, code=death.code)

    def forget(self, ask: bytes) -> None:
        """The answer to an ask is safe elsewhere."""
        if self._terms.keep:
            self._kept(ask).unlink(missing_ok=True)

    def _kept(self, ask: bytes) -> Path:
        return kept_file(self._terms.keep, self._terms.method, self._terms.options, ask)

    def _once(self, ask: bytes, given_up: Callable[[], bool]) -> bytes:
        if self._terms.keep:
            with contextlib.suppress(OSError):  # paid for by one that was killed before the answer was safe
                return self._kept(ask).read_bytes()
        running = self._ready()
        until = process.monotonic() + self._terms.time_limit
        assert running.stdin is not None
        assert running.stdout is not None
        try:
            send(running.stdin, ask)  # type: ignore[arg-type]
        except OSError:
            raise _DiedError(_end_of(running), False) from None
        poller, answer = select.poll(), b""
        poller.register(running.stdout, select.POLLIN)
        while True:
            if poller.poll(1000 * _LOOK_S):
                chunk = os.read(running.stdout.fileno(), 1 << 20)
                if not chunk:
                    raise _DiedError(_end_of(running), begun=bool(answer))
                answer += chunk
                if len(answer) >= 2 * HEAD and len(answer) == 2 * HEAD + int.from_bytes(answer[HEAD : 2 * HEAD], "little"):
                    return answer[2 * HEAD :]
            reason = self._reason_to_kill(running.pid, until)
            if reason or given_up():
                self.close()
                if reason:
                    return failed(reason)
                raise GivenUpError

    def _reason_to_kill(self, pid: int, until: float) -> str:
        if process.monotonic() > until:
            return f"took longer than label.time_limit = {self._terms.time_limit:g} s and was killed"
        if self._terms.memory_gb and resident(pid) > self._terms.memory_gb * _GB:
            # the next attempt would need as much: this is a verdict on the frame
            return f"needed more memory than label.memory_gb = {self._terms.memory_gb:g} and was killed"
        return ""

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
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
            assert self._process.stdin is not None
            setup = Setup(self._terms.method, self._terms.options, self._terms.cores, self._terms.idle_s, self._terms.keep)
            with contextlib.suppress(OSError):  # dead already: seen at the next step
                send(self._process.stdin, msgspec.msgpack.encode(setup))  # type: ignore[arg-type]
        return self._process

    def close(self) -> None:
        """Kill it and all that it has started, and remove its files. It can be used again."""
        running, self._process = self._process, None
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


class LocalPool:
    """One labelling process on this machine.

    Args:
        terms: how it labels.
        prefix: of the names of its folders; those that an earlier one of this prefix left behind are removed.
        log: of the worker; called from `turn` only.
    """

    def __init__(self, terms: Terms, prefix: str, log: Log) -> None:
        for left_behind in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            shutil.rmtree(left_behind, ignore_errors=True)
        self._notes = Notes(log)
        self._process = LabelProcess(terms, prefix, self._notes.add)
        self._stopping = threading.Event()
        self._threads = ThreadPoolExecutor(1, "label")

    def schedule(self, frame: Frame) -> Future[Label]:
        """Have a frame labelled by the process."""
        return self._threads.submit(self._compute, frame)

    def saved(self, frame: Frame) -> None:
        """The answer need not be kept any more."""
        self._process.forget(asked(frame))

    def _compute(self, frame: Frame) -> Label:
        return label_of(self._process.compute(asked(frame), self._stopping.is_set))

    def fileno(self) -> int:
        """Nothing to wait for."""
        return -1

    def turn(self) -> None:
        """Pass on what is to be logged."""
        self._notes.tell()

    def stop(self) -> None:
        """Kill the process."""
        self._stopping.set()
        self._threads.shutdown()
        self._process.close()


class Notes:
    """What threads want to be logged, kept until the one thread that may log does so."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._kept: queue.SimpleQueue[tuple[str, str, dict[str, Any]]] = queue.SimpleQueue()

    def add(self, level: str, event: str, **detail: Any) -> None:
        """Keep a line."""
        self._kept.put((level, event, detail))

    def tell(self) -> None:
        """Log all that is kept."""
        while not self._kept.empty():
            level, event, detail = self._kept.get()
            self._log(level, event, **detail)


def prefix_of(run_dir: Path, name: str) -> str:
    """Return what the folders for temporary files of a worker begin with."""
    return f"{PREFIX}{hashlib.sha256(os.fsencode(f'{run_dir}/{name}')).hexdigest()[:16]}-"


def _end_of(running: subprocess.Popen[bytes]) -> int:
    """The exit code of a process that does not talk to us any more."""
    try:
        return running.wait(_LAST_S)
    except subprocess.TimeoutExpired:
        kill_session(running.pid)
        return running.wait()


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
