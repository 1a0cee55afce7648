"""A label worker: asks the learner for frames, has each labelled in a child process of its own, and puts the result on disk.

The child does the chemistry and can be killed: by its time limit, by the system, by a bug. This process only waits for it, so it always
answers. The learner may die meanwhile: the label goes on, and its result waits in the spool.

Where the chemistry is done by programs that connect to us (`client_labels`), there is no child: this process waits at their sockets too.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from concurrent.futures import TimeoutError as LabelTimeout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from tumbaga.driver import config as configs
from tumbaga.driver import process, tether
from tumbaga.driver.client_labels import ClientLabeller, ClientPool, make_labeller
from tumbaga.online import spool
from tumbaga.online.errors import OnlineError
from tumbaga.online.records import Frame, Label
from tumbaga.socket_protocol import bus

_BEAT_MS = 500
_LAST_MOMENT_S = 0.5

_labeller: Any = None  # of this child process


def _prepare(method: str, options: dict[str, Any], parent: int) -> None:
    """In the child, once: die with the parent, and make the labeller."""
    global _labeller
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tether.tie(signal.SIGKILL, parent)
    os.nice(10)
    _labeller = make_labeller(method, **options)


def _label(frame: Frame) -> Label:
    """In the child: label one frame."""
    made: Label = _labeller.label(frame)
    return made


class Worker:
    """One worker: at most one label at a time.

    Args:
        run_dir: the run directory.
        name: under which the supervisor started it.
        settings: of the labels.
        endpoint: DEALER to the learner.
        reporter: to the supervisor.
        clients: compute in place of a child process.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        settings: configs.Label,
        endpoint: bus.Endpoint,
        reporter: process.Reporter,
        clients: ClientPool | None = None,
    ) -> None:
        self._run_dir, self._name, self._settings = run_dir, name, settings
        self._endpoint, self._reporter = endpoint, reporter
        self._pool: ProcessPool | ClientPool | None = clients
        self._future: ProcessFuture | None = None
        self._task: bus.Task | None = None
        self._unsaved: spool.Result | None = None  # computed, but the disk did not take it yet
        self._since = 0.0
        self._seen = 0
        self._frame: Frame | None = None  # of the task
        self._deaths = 0  # of children at this task
        # the child's end wakes the poller through this pipe
        self.done_fd, self._wake = os.pipe()

    def _ready_pool(self) -> ProcessPool | ClientPool:
        if self._pool is None or not self._pool.active:
            self._pool = ProcessPool(
                max_workers=1,
                max_tasks=100,  # long-lived children of foreign libraries leak
                initializer=_prepare,
                initargs=(self._settings.method, dict(self._settings.options), os.getpid()),
                context=get_context("spawn"),
            )
        return self._pool

    def beat(self) -> None:
        """Say what this worker is doing."""
        if self._task is None:
            self._endpoint.send(bus.WorkerIdle(self._name, os.getpid(), self._seen))
        else:
            seconds = process.monotonic() - self._since
            self._endpoint.send(bus.WorkerBusy(self._name, os.getpid(), self._task.task, seconds))

    def messages(self) -> None:
        """Take what the learner sent."""
        while (received := self._endpoint.receive()) is not None:
            _, message, buffers = received
            if isinstance(message, bus.Task) and self._task is None:
                self._start(message, buffers)
            elif isinstance(message, bus.Task):
                # of a learner that started anew: seen and not taken, so that it is given out again and not waited for
                self._seen = max(self._seen, message.task)

    def _start(self, task: bus.Task, buffers: list[bytes]) -> None:
        numbers = bus.array(buffers[0], np.int64, (-1,))
        frame = Frame(numbers, bus.array(buffers[1], np.float64, (-1, 3)), bus.array(buffers[2], np.float64, (3, 3)), task.periodic)
        self._task, self._seen, self._since = task, task.task, process.monotonic()
        self._frame, self._deaths = frame, 0
        self._compute(frame)
        self._reporter.log("info", "label started", frame=task.frame, key=task.key, worker=self._name)
        self.beat()

    def _compute(self, frame: Frame) -> None:
        self._future = self._ready_pool().schedule(_label, args=(frame,), timeout=self._settings.time_limit)
        self._future.add_done_callback(lambda _: os.write(self._wake, b"x"))

    def _once_more(self) -> bool:
        """Whether the child was killed at the task under way, and another one has been set to it."""
        if self._future is None or self._frame is None or not isinstance(self._future.exception(), ProcessExpired):
            return False
        self._deaths += 1
        if self._deaths >= self._settings.attempts:
            return False
        self._reporter.log("warning", "labelling process died", deaths=self._deaths, worker=self._name)
        self._compute(self._frame)
        return True

    def finished(self) -> None:
        """Put the result of a finished label on disk, then say so; while the disk does not take it, try again at every turn."""
        if self._future is None or self._task is None or not self._future.done():
            return
        if self._unsaved is None:
            os.read(self.done_fd, 1)
            if self._once_more():
                return
            self._unsaved = self._result(self._task, self._future)
        result = self._unsaved
        try:
            spool.put(self._run_dir, result)
        except OSError as error:  # a full disk; the label was paid for
            self._reporter.log("error", "label not saved", frame=result.frame, error=str(error), worker=self._name)
            return
        seconds = round(process.monotonic() - self._since, 3)
        self._reporter.log("info", "label ended", frame=result.frame, failure=result.failure, seconds=seconds, worker=self._name)
        self._future = self._task = self._unsaved = None
        self.beat()

    def _result(self, task: bus.Task, future: ProcessFuture) -> spool.Result:
        try:
            return spool.Result(task.task, task.frame, future.result())
        except OnlineError as error:
            reason = str(error)
        except LabelTimeout:
            reason = f"took longer than label.time_limit = {self._settings.time_limit:g} s and was killed"
        except ProcessExpired as error:
            reason = f"the labelling process died {self._deaths} times on this frame (last exit code {error.exitcode})"
        except Exception as error:  # noqa: BLE001 - a foreign engine may raise anything: it is the reason, and it is recorded
            reason = f"{type(error).__name__}: {error}"
        return spool.Result(task.task, task.frame, None, reason)

    def last_moment(self) -> None:
        """A label that ends just now was paid for: its result may still be on its way from the child."""
        if isinstance(self._future, ProcessFuture):
            concurrent.futures.wait([self._future], _LAST_MOMENT_S)
        self.finished()

    def close(self) -> None:
        """Kill the child."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join(timeout=5)


def main(run_dir: Path, lifeline: process.Lifeline) -> None:
    """Ask for frames and label them until told to leave."""
    name = sys.argv[2]
    settings = configs.load(run_dir).label
    labeller = make_labeller(settings.method, **settings.options)  # a wrong method is a sentence now, not a failure of every label
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reporter = process.Reporter(context, name)
    endpoint = bus.Endpoint(context, zmq.DEALER, bus.LABELS, bind=False, identity=f"{name}-{os.getpid()}")
    clients = None
    if isinstance(labeller, ClientLabeller):
        index = int(name.rpartition("-")[2])
        clients = ClientPool(labeller.for_worker(index, settings.time_limit), reporter.log, process.monotonic)
    scratch = _own_environment(run_dir, name)
    worker = Worker(run_dir, name, settings, endpoint, reporter, clients)
    poller = zmq.Poller()
    for watched in (endpoint.socket, worker.done_fd, lifeline.fileno(), *([clients.fileno()] if clients else [])):
        poller.register(watched, zmq.POLLIN)
    reporter.log("info", "ready", method=settings.method, pid=os.getpid())
    worker.beat()
    try:
        while not lifeline.cut_off:
            if not poller.poll(_BEAT_MS):
                worker.beat()
            if clients is not None:
                clients.turn()
            worker.finished()
            worker.messages()
        worker.last_moment()
    finally:
        worker.close()
        shutil.rmtree(scratch, ignore_errors=True)
        reporter.close()


def _own_environment(run_dir: Path, name: str) -> str:
    """Before a child is spawned: one core, a scratch folder of its own, and no configuration file of PySCF (it would be executed)."""
    prefix = f"tumbaga-label-{hashlib.sha256(os.fsencode(f'{run_dir}/{name}')).hexdigest()[:16]}-"
    for left_behind in Path(tempfile.gettempdir()).glob(f"{prefix}*"):  # by a worker of this name that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    scratch = tempfile.mkdtemp(prefix=prefix)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYSCF_TMPDIR": scratch,
        "TMPDIR": scratch,
        "PYSCF_CONFIG_FILE": os.path.join(scratch, "none"),
    }
    return scratch


if __name__ == "__main__":
    process.run("label worker", main)
