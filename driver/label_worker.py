"""A label worker: asks the learner for frames, has each labelled elsewhere, and puts the result on disk.

Elsewhere is a process of its own (`label_process`), a Dask cluster (`label_dask`) or programs that connect to us (`client_labels`). This process
only waits, so it always answers. The learner may die meanwhile: the label goes on, and its result waits in the spool.
"""

from __future__ import annotations

import concurrent.futures
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import msgspec
import numpy as np
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import devices, process
from tumbaga.driver.client_labels import ClientLabeller, ClientPool, make_labeller
from tumbaga.driver.label_pool import LocalPool, Pool, prefix_of
from tumbaga.driver.label_process import GivenUpError, Log, Terms, UnusableError
from tumbaga.driver.label_work import told
from tumbaga.online import spool
from tumbaga.online.errors import OnlineError
from tumbaga.online.records import Frame, Label
from tumbaga.socket_protocol import bus

_BEAT_S = 0.5
_LAST_MOMENT_S = 0.5


class Worker:
    """One worker: at most one label at a time.

    Args:
        run_dir: the run directory.
        name: under which the learner knows it.
        pool: has frames labelled; shared with other workers or not.
        endpoint: DEALER to the learner.
        reporter: to the supervisor.
    """

    def __init__(self, run_dir: Path, name: str, pool: Pool, endpoint: bus.Endpoint, reporter: process.Reporter) -> None:
        self._run_dir, self._name, self._pool = run_dir, name, pool
        self._endpoint, self._reporter = endpoint, reporter
        self._future: Future[Label] | None = None
        self._task: bus.Task | None = None
        self._frame: Frame | None = None  # of the task
        self._unsaved: spool.Result | None = None  # computed, but the disk did not take it yet
        self._since = 0.0
        self._seen = 0
        # the end of a label wakes the poller through this pipe
        self.done_fd, self._wake = os.pipe()

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
        self._frame, self._future = frame, self._pool.schedule(frame)
        self._future.add_done_callback(lambda _: os.write(self._wake, b"x"))
        self._reporter.log("info", "label started", frame=task.frame, key=task.key, worker=self._name)
        self.beat()

    def finished(self) -> None:
        """Put the result of a finished label on disk, then say so; while the disk does not take it, try again at every turn."""
        if self._future is None or self._task is None or not self._future.done():
            return
        if self._unsaved is None:
            os.read(self.done_fd, 1)
            self._unsaved = _result(self._task, self._future)
        result = self._unsaved
        try:
            spool.put(self._run_dir, result)
        except OSError as error:  # a full disk; the label was paid for
            self._reporter.log("error", "label not saved", frame=result.frame, error=str(error), worker=self._name)
            return
        seconds = round(process.monotonic() - self._since, 3)
        self._reporter.log("info", "label ended", frame=result.frame, failure=result.failure, seconds=seconds, worker=self._name)
        if self._frame is not None:
            self._pool.saved(self._frame)
        self._future = self._task = self._unsaved = self._frame = None
        self.beat()
        self._reporter.state(answered={self._name: os.getpid()})

    def last_moment(self, seconds: float) -> None:
        """A label that ends just now was paid for: its result may still be on its way."""
        if self._future is not None:
            concurrent.futures.wait([self._future], seconds)
        self.finished()


def _result(task: bus.Task, future: Future[Label]) -> spool.Result:
    try:
        return spool.Result(task.task, task.frame, future.result())
    except UnusableError:
        raise  # no frame's fault: this worker leaves, and labels wait until the user has mended it
    except OnlineError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001 - our own bug, which must not be one for the other labels too
        reason = f"{type(error).__name__}: {error}"
    return spool.Result(task.task, task.frame, None, reason)


def make_pool(run_dir: Path, name: str, settings: configs.Config, log: Log, unwanted: Callable[[], bool]) -> Pool:
    """Return where the worker of this name has its frames labelled, unless that is not wanted any more meanwhile.

    Raises:
        GivenUpError: it is not.
        OnlineError: a wrong method, or one that cannot be used here: a sentence now, not a failure of every label.
        ConfigError: a client's address cannot be listened at.
    """
    chosen = settings.label
    labeller = make_labeller(chosen.method, **chosen.options)
    if isinstance(labeller, ClientLabeller):
        index = int(name.rpartition("-")[2])
        return ClientPool(labeller.for_worker(index, chosen.time_limit), log, process.monotonic)
    terms = Terms(
        chosen.method,
        dict(chosen.options),
        chosen.time_limit,
        chosen.memory_gb,
        chosen.cores,
        chosen.attempts,
        repeat_every=chosen.repeat_every,
    )
    if chosen.cluster:
        from tumbaga.driver.label_dask import DaskPool

        return DaskPool(chosen.cluster, terms, chosen.workers, str(run_dir), log)
    keep = run_dir / spool.FOLDER
    keep.mkdir(exist_ok=True)
    pool = LocalPool(msgspec.structs.replace(terms, cores=devices.for_labels(settings), keep=str(keep)), prefix_of(run_dir, name), log)
    try:
        pool.prepare(unwanted)
    except (GivenUpError, UnusableError):
        pool.stop()
        raise
    return pool


def main(run_dir: Path, lifeline: process.Lifeline) -> None:
    """Ask for frames and label them until told to leave."""
    settings, _ = told(run_dir, sys.argv[3:])
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reporter = process.Reporter(context, sys.argv[2])
    try:
        pool = make_pool(run_dir, sys.argv[2], settings, reporter.log, lambda: lifeline.cut_off)
    except GivenUpError:
        return
    # one process has as many labels under way on a cluster as there would be workers here
    names = [f"label-{index}" for index in range(settings.label.workers)] if settings.label.cluster else [sys.argv[2]]
    workers, poller = [], zmq.Poller()
    for name in names:
        endpoint = bus.Endpoint(context, zmq.DEALER, bus.LABELS, bind=False, identity=f"{name}-{os.getpid()}")
        workers.append(Worker(run_dir, name, pool, endpoint, reporter))
        poller.register(endpoint.socket, zmq.POLLIN)
        poller.register(workers[-1].done_fd, zmq.POLLIN)
    poller.register(lifeline.fileno(), zmq.POLLIN)
    if pool.fileno() >= 0:
        poller.register(pool.fileno(), zmq.POLLIN)
    reporter.log("info", "ready", method=settings.label.method, executor=settings.label.executor, pid=os.getpid())
    due = 0.0
    try:
        while not lifeline.cut_off:
            if process.monotonic() >= due:
                due = process.monotonic() + _BEAT_S
                for worker in workers:
                    worker.beat()
            poller.poll(int(1000 * _BEAT_S))
            pool.turn()
            for worker in workers:
                worker.finished()
                worker.messages()
        until = process.monotonic() + _LAST_MOMENT_S
        for worker in workers:
            worker.last_moment(max(0.0, until - process.monotonic()))
    finally:
        pool.stop()
        reporter.close()


if __name__ == "__main__":
    process.run("label worker", main)
