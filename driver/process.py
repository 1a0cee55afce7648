"""What every child process of a run shares: its working directory, its lifeline to the supervisor, its log and its exit code.

The lifeline is standard input, a pipe that the supervisor holds open and never writes to. When the supervisor goes, by whatever death,
the pipe ends and the child leaves: nothing is ever left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn, Self

import structlog
import zmq

from tumbaga.driver.errors import DriverError
from tumbaga.online.errors import OnlineError, is_full
from tumbaga.socket_protocol import bus

EXIT_USER: Final = 78  # a fault that starting again will not mend (EX_CONFIG of sysexits.h)
LOGS: Final = "log"
LEFT: Final = "left"  # the last event of a process that ends in order
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
NAP_MS: Final = 500  # the longest a loop sleeps without a look at the lifeline


class Reporter:
    """Sends log lines and state to the supervisor, from one thread; drops them rather than wait."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], process: str) -> None:
        self._process, self._context = process, context
        self._endpoint = bus.Endpoint(context, zmq.PUSH, bus.SUPERVISOR, bind=False)
        self.told: dict[str, Any] = {}
        """The state that was sent last."""

    def log(self, level: str, event: str, **detail: Any) -> None:
        """Send one log line."""
        self._endpoint.send(bus.LogLine(self._process, level, event, detail))

    def state(self, **state: Any) -> None:
        """Send the process's state."""
        self.told = state
        self._endpoint.send(bus.Report(self._process, state))

    def close(self, patience_ms: int = 500) -> None:
        """Say that this process leaves, send what is left, for so long at most, and close all sockets of the context."""
        self.log("info", LEFT)
        self._endpoint.socket.linger = patience_ms
        self._endpoint.close()
        # sending is done by a thread of zmq, which the end of the process would cut off: this waits for it
        self._context.destroy()


class Lifeline:
    """Tells when to leave: the supervisor's pipe ended, or a signal came."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        # written to on stop, so that a poller can wait for it like for any other descriptor
        self._read_end, self._write_end = os.pipe()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.cut())
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _watch(self) -> None:
        while os.read(0, 4096):
            pass
        self.cut()

    def cut(self) -> None:
        """Ask this process to leave."""
        if not self._stop.is_set():
            self._stop.set()
            os.write(self._write_end, b"x")

    def wait(self, seconds: float) -> bool:
        """Wait so long for the moment to leave; return whether it has come."""
        return self._stop.wait(seconds)

    @property
    def cut_off(self) -> bool:
        """Whether it is time to leave."""
        return self._stop.is_set()

    def fileno(self) -> int:
        """Readable once it is time to leave."""
        return self._read_end


class Signals:
    """Wakes a poller when a signal comes, that a child has ended among others. Holds until the end of a with-block, in the main thread."""

    def __enter__(self) -> Self:
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)
        # without a handler of Python's the signal would be ignored
        self._handler = signal.signal(signal.SIGCHLD, lambda *_: None)
        self._before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        signal.signal(signal.SIGCHLD, self._handler)
        os.close(self._read_end)
        os.close(self._write_end)

    def fileno(self) -> int:
        """Readable once a signal has come."""
        return self._read_end

    def clear(self) -> None:
        """What came was seen."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read_end, 4096)


def log_to_file(run_dir: Path, process: str) -> structlog.stdlib.BoundLogger:
    """Open the JSON-lines log of a process that may touch the disk."""
    folder = run_dir / LOGS
    folder.mkdir(exist_ok=True)
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        structlog.WriteLogger(_LogFile(folder / f"{process}.jsonl")),  # type: ignore[arg-type]
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
    )
    return logger


class _LogFile:
    """A log, for as long as the process lives. It drops what the disk does not take: a run does not end for want of a line in a log."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._torn = False

    def write(self, text: str) -> None:
        """Write a line at once."""
        data = (b"\n" if self._torn else b"") + text.encode()
        try:
            self._torn = os.write(self._file, data) < len(data)
        except OSError as error:
            if not is_full(error):
                raise

    def flush(self) -> None:
        """Nothing is held back."""


def run(process: str, body: Callable[[Path, Lifeline], None]) -> None:
    """Run the body of a child process and leave with the right exit code.

    A user's mistake goes to standard error as one sentence and gives EXIT_USER; anything else is our bug: a traceback, exit code 1.
    The supervisor keeps standard error in the log folder.
    """
    run_dir = Path(sys.argv[1]).resolve()
    os.chdir(run_dir)
    lifeline = Lifeline()
    leave(process, lambda: body(run_dir, lifeline))


def leave(process: str, body: Callable[[], None]) -> NoReturn:
    """Do the last that this process is to do, and end it with the exit code that `run` has."""
    code = 0
    try:
        body()
    except (DriverError, OnlineError) as error:
        print(f"{process}: {error}", file=sys.stderr)  # noqa: T201 - the supervisor reads it
        code = EXIT_USER
    except Exception:  # noqa: BLE001 - the process boundary
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    # worker threads of foreign libraries must not keep a finished process alive
    os._exit(code)


def settle() -> None:
    """What is there after the start stays for good: leave it out of every later garbage collection.

    With torch loaded one full collection takes tens of milliseconds, in the middle of some force call.
    """
    gc.collect()
    gc.freeze()


def monotonic() -> float:
    """The clock of intervals, seconds."""
    return time.monotonic()


def keep_memory() -> None:
    """Have the allocator keep what it has once got from the system, up to 2 GiB, instead of giving large arrays back each time.

    By default glibc maps every array beyond a threshold (128 KiB at first, 32 MiB at most) for itself and unmaps it afterwards, so that the
    system clears its pages each time anew: a third of the time of a batch of some hundred atoms. Elsewhere this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_memory() -> None:
    """Have the allocator give what it keeps and nobody uses back to the system, whatever `keep_memory` said. Elsewhere than in glibc nothing."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
