"""Where a label worker has its frames labelled: the port, and the pool that is one labelling process on this machine."""

from __future__ import annotations

import hashlib
import os
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

from tumbaga.driver.label_child import asked, label_of
from tumbaga.driver.label_process import LabelProcess, Log, Terms
from tumbaga.online.records import Frame, Label

PREFIX: Final = "tumbaga-label-"  # of folders for temporary files


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

    def prepare(self, given_up: Callable[[], bool] = lambda: False) -> None:
        """Start the process, so that a user's mistake is told now and not at every frame.

        Raises:
            GivenUpError: nothing is wanted any more.
            UnusableError: the method cannot be used.
        """
        self._process.prepare(given_up)

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
