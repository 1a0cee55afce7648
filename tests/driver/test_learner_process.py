"""The learner's process on a real bus, in this process: what it does about workers and versions after a restart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import learner_process
from tumbaga.driver.learner_process import LearnerProcess
from tumbaga.online import spool
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Store, StoredVersion
from tumbaga.online.testing import ToyTrainable
from tumbaga.online.versions import LastLayer, write
from tumbaga.socket_protocol import bus

SETTINGS = configs.Config(label=configs.Label(method="test:lj", attempts=3))
WORKER = "label-0"


class Reporter:
    """Takes log lines and states."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def log(self, level: str, event: str, **detail: Any) -> None:
        self.events.append(event)

    def state(self, **state: Any) -> None:
        pass


class Bench:
    """One learner process at a time, and a worker that lives on."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.context, self.reporter = run_dir, zmq.Context(), Reporter()
        bus.make_folder(run_dir)
        self.worker = bus.Endpoint(self.context, zmq.DEALER, bus.LABELS, bind=False, identity=f"{WORKER}-1")
        self.learner: LearnerProcess | None = None

    def start(self, settings: configs.Config = SETTINGS) -> LearnerProcess:
        self.learner = LearnerProcess(self.run_dir, settings, self.context, self.reporter)  # type: ignore[arg-type]
        return self.learner

    def kill(self) -> None:
        """The learner goes as it would by SIGKILL: nothing is released, and what was on its way is gone."""
        if self.learner is not None:
            self.learner._store.close()
            self.learner.gateway.close()
            self.learner.workers.close()
        self.learner = None
        while self.worker.receive() is not None:
            pass

    def idle(self, seen: int) -> bus.Task | None:
        """The worker says that it is idle; returns what it is given."""
        assert self.learner is not None
        for _ in range(20):  # a worker says it again and again: the first time may go to the learner that has just died
            assert self.worker.socket.poll(20_000, zmq.POLLOUT)
            assert self.worker.send(bus.WorkerIdle(WORKER, 1, seen))
            if self.learner.workers.socket.poll(1000):
                break
        self.learner.turn()
        if not self.worker.socket.poll(200):
            return None
        received = self.worker.receive()
        assert received is not None
        assert isinstance(received[1], bus.Task)
        return received[1]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.chdir(tmp_path)
    weights = np.random.default_rng(0).standard_normal(8)
    monkeypatch.setattr(learner_process, "_trainable", lambda _: ToyTrainable((1, 8), weights, n_gaussians=2))
    made = Bench(tmp_path)
    yield made
    made.kill()
    made.worker.close()
    made.context.term()


@pytest.fixture
def queued(bench: Bench) -> Callable[[], None]:
    """Puts a frame into the queue of the run's store."""

    def put() -> None:
        store = Store(bench.run_dir / FILE)
        frame = Frame(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]))
        number = store.add_flag(
            frame, session="s", step=0, reason=Reason.INITIAL, score=0.0, version=0, energy=0.0, forces=np.zeros((3, 3))
        )
        store.enqueue(number, Reason.INITIAL, Role.TRAIN, 1.0)
        store.close()

    return put


def test_a_task_is_given_once(bench: Bench, queued: Callable[[], None]) -> None:
    """A worker that says again that it is idle, before it saw its task, gets no second one; the task is on its way."""
    queued()
    bench.start()
    given = bench.idle(seen=0)

    assert given is not None
    assert bench.idle(seen=0) is None


def test_a_task_that_went_down_with_the_learner_is_given_again(bench: Bench, queued: Callable[[], None]) -> None:
    """Invariant 4: after SIGKILL between the store and the worker the same idle worker gets the frame from the next learner."""
    queued()
    bench.start()
    first = bench.idle(seen=0)
    bench.kill()
    bench.start()
    second = bench.idle(seen=0)

    assert first is not None
    assert second is not None
    assert second.frame == first.frame
    assert second.task > first.task


def test_an_engine_that_waits_is_told_once_and_its_frame_is_stored_once(bench: Bench) -> None:
    """It asks again every few seconds; the label comes next, and a learner that starts in between knows no less."""
    asked = bus.Candidate("unix:/x", 3, "stalled", 0.9, 0.1, 0, periodic=False, energy=0.0, ticket=7)
    places = np.array([[0.0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]])
    buffers = [a.tobytes() for a in (np.array([8, 1, 1]), places, np.zeros((3, 3)), np.zeros((3, 3)))]
    gateway = bus.Endpoint(bench.context, zmq.ROUTER, bus.LEARNER, bind=True)

    def settled() -> list[bus.Settled]:
        found = []
        while gateway.socket.poll(200) and (received := gateway.receive()):
            found += [received[1]] if isinstance(received[1], bus.Settled) else []
        return found

    try:
        for start in range(2):
            learner = bench.start()
            for _ in range(3):
                learner._gateway_message(asked, buffers)
            assert settled() == []
            if not start:
                bench.kill()
        assert learner._store.counts()["flags"] == 1
        assert [queued.reason for queued in learner._store.pending()] == [Reason.STALLED]
        task = bench.idle(seen=0)
        assert task is not None
        label = Label(-1.0, np.zeros((3, 3)), "test:lj/epsilon0.2/offset-1000", 0.1, {})
        spool.put(bench.run_dir, spool.Result(task.task, task.frame, label))
        learner.turn()
        learner.turn()
        assert [(one.session, one.ticket, one.problem) for one in settled()] == [("unix:/x", 7, "")]
    finally:
        gateway.close()


def test_a_version_that_cannot_be_read_is_skipped(bench: Bench) -> None:
    """A learner whose newest version file is broken marks it refused and goes on from the one before."""
    bench.start()
    bench.kill()
    store = Store(bench.run_dir / FILE)
    for number in (1, 2):
        layer = LastLayer(np.full(8, float(number)), np.eye(8))
        file = write(bench.run_dir, number, {"readout": layer.readout}, layer, {})
        store.add_version(StoredVersion(number, file.hash, number - 1, file.path, "served", 1, {}))
    store.close()
    (bench.run_dir / file.path).write_bytes(b"torn")
    learner = bench.start()

    assert learner._lineage.number == 1
    assert learner._learner.readout.tolist() == [1.0] * 8
    assert [version.state for version in learner._store.versions()] == ["served", "served", "refused"]
    assert "version refused" in bench.reporter.events


def test_no_engine_waits_for_a_label_that_is_never_begun(bench: Bench) -> None:
    """When the core-hours are spent while a frame waits in the queue, the engine that waits for its label is told so."""
    settings = msgspec.structs.replace(SETTINGS, label=msgspec.structs.replace(SETTINGS.label, core_hours=1.0))
    asked = bus.Candidate("unix:/x", 3, "stalled", 0.9, 0.1, 0, periodic=False, energy=0.0, ticket=7)
    places = np.array([[0.0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]])
    buffers = [[a.tobytes() for a in (np.array([8, 1, 1]), k * places, np.zeros((3, 3)), np.zeros((3, 3)))] for k in (1.0, 1.05)]
    gateway = bus.Endpoint(bench.context, zmq.ROUTER, bus.LEARNER, bind=True)
    try:
        learner = bench.start(settings)
        for one in buffers:
            learner._gateway_message(asked, one)
        task = bench.idle(seen=0)
        assert task is not None
        label = Label(-1.0, np.zeros((3, 3)), "test:lj/epsilon0.2/offset-1000", 3600.0, {})
        spool.put(bench.run_dir, spool.Result(task.task, task.frame, label))
        learner.turn()
        problems: list[str] = []
        while len(problems) < 2 and gateway.socket.poll(20_000) and (received := gateway.receive()):
            problems += [received[1].problem] if isinstance(received[1], bus.Settled) else []
        assert problems == ["", "no label is begun any more: their core-hours are spent"]
        assert bench.idle(seen=task.task) is None
    finally:
        gateway.close()


def test_a_task_of_a_worker_that_is_not_there_any_more_is_given_again(bench: Bench, queued: Callable[[], None]) -> None:
    """After SIGKILL of everything a start with fewer workers does not wait for those that had tasks."""
    queued()
    bench.start()
    store = Store(bench.run_dir / FILE)
    (waits,) = store.pending()
    store.start_task(waits.frame, "label-7", 1)
    store.close()
    bench.kill()
    bench.start()
    task = bench.idle(seen=0)

    assert task is not None
    assert task.frame == waits.frame
