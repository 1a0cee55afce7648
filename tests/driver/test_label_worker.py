"""A label worker between the learner, the label's own process and the disk; the three are handed in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pebble import ProcessExpired

from tumbaga.driver import config as configs
from tumbaga.driver.label_worker import Worker
from tumbaga.online import spool
from tumbaga.online.errors import LabelFailedError
from tumbaga.online.records import Frame, Label
from tumbaga.socket_protocol import bus

FRAME = Frame(np.array([1, 1]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]]))


class Line:
    """The endpoint to the learner: what came in is what the test puts there, what goes out is written down."""

    def __init__(self) -> None:
        self.inbox: list[tuple[str, bus.AnyMessage, list[bytes]]] = []
        self.sent: list[bus.AnyMessage] = []

    def give(self, task: int) -> None:
        buffers = [array.tobytes() for array in (FRAME.numbers, FRAME.positions, FRAME.cell)]
        self.inbox.append(("", bus.Task(task, 10 * task, FRAME.key, False), buffers))

    def receive(self) -> tuple[str, bus.AnyMessage, list[bytes]] | None:
        return self.inbox.pop(0) if self.inbox else None

    def send(self, message: bus.AnyMessage, buffers: Sequence[Any] = (), to: str = "") -> bool:
        self.sent.append(message)
        return True


class Reporter:
    def __init__(self) -> None:
        self.events: list[str] = []

    def log(self, level: str, event: str, **detail: Any) -> None:
        self.events.append(event)


class Pool:
    """Computes when the test says so."""

    active = True

    def __init__(self) -> None:
        self.futures: list[Future[Label]] = []
        self.frames: list[Frame] = []

    def schedule(self, function: Any, args: tuple[Frame], timeout: float) -> Future[Label]:
        self.frames.append(args[0])
        self.futures.append(Future())
        return self.futures[-1]


class Bench:
    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir, self.line, self.reporter, self.pool = run_dir, Line(), Reporter(), Pool()
        self.worker = Worker(run_dir, "label-0", configs.Label(time_limit=7.0), self.line, self.reporter)  # type: ignore[arg-type]
        monkeypatch.setattr(self.worker, "_ready_pool", lambda: self.pool)

    def turn(self) -> None:
        self.worker.finished()
        self.worker.messages()

    def results(self) -> list[spool.Result | None]:
        return [result for _, result in spool.waiting(self.run_dir)]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(tmp_path, monkeypatch)
    yield made
    os.close(made.worker.done_fd)
    os.close(made.worker._wake)


def label() -> Label:
    return Label(-31.0, np.zeros((2, 3)), "test:lj", 0.5)


def test_a_label_is_on_disk_before_the_worker_is_idle(bench: Bench) -> None:
    """Between the end of a label and the word that it ended stands the file; the word names the task."""
    bench.line.give(4)
    bench.turn()
    assert isinstance(bench.line.sent[-1], bus.WorkerBusy)
    bench.turn()
    assert bench.results() == []
    bench.pool.futures[0].set_result(label())
    bench.turn()
    (result,) = bench.results()

    assert bench.pool.frames[0].key == FRAME.key
    assert result is not None
    assert (result.task, result.frame) == (4, 40)
    assert bench.line.sent[-1] == bus.WorkerIdle("label-0", os.getpid(), 4)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LabelFailedError("the SCF did not converge"), "the SCF did not converge"),
        (TimeoutError(), "took longer than label.time_limit = 7 s and was killed"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failure_is_on_disk_with_its_reason(bench: Bench, error: Exception, reason: str) -> None:
    """Whatever ended a label other than a result is recorded as a sentence, and the next task is taken."""
    bench.line.give(4)
    bench.turn()
    bench.pool.futures[0].set_exception(error)
    bench.turn()
    bench.line.give(5)
    bench.turn()

    assert bench.results() == [spool.Result(4, 40, None, reason)]
    assert len(bench.pool.futures) == 2


def test_a_label_whose_process_was_killed_is_computed_again(bench: Bench) -> None:
    """A killed child is no verdict on the frame: as many are tried as `attempts` says (2), then it is a failure that names the exit code."""
    bench.line.give(4)
    bench.turn()
    bench.pool.futures[0].set_exception(ProcessExpired("died", code=-9))
    bench.turn()
    assert bench.results() == []
    assert len(bench.pool.futures) == 2
    bench.pool.futures[1].set_result(label())
    bench.turn()
    assert [result.label is not None for result in bench.results() if result] == [True]

    bench.line.give(5)
    bench.turn()
    for future in (2, 3):
        bench.pool.futures[future].set_exception(ProcessExpired("died", code=-9))
        bench.turn()
    assert bench.results()[1:] == [spool.Result(5, 50, None, "the labelling process died 2 times on this frame (last exit code -9)")]
    assert [frame.key for frame in bench.pool.frames] == [FRAME.key] * 4


def test_a_full_disk_loses_no_label(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 4: while the disk takes nothing the worker keeps its label, says that it is busy, and saves it when it can."""
    whole = spool.put

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    bench.line.give(4)
    bench.turn()
    bench.pool.futures[0].set_result(label())
    monkeypatch.setattr(spool, "put", full)
    for _ in range(3):
        bench.turn()
        bench.worker.beat()
        assert isinstance(bench.line.sent[-1], bus.WorkerBusy)
    assert "label not saved" in bench.reporter.events
    monkeypatch.setattr(spool, "put", whole)
    bench.turn()

    assert len(bench.results()) == 1
    assert bench.line.sent[-1] == bus.WorkerIdle("label-0", os.getpid(), 4)


def test_a_second_task_is_seen_and_not_taken(bench: Bench) -> None:
    """A task that comes while another is under way is not computed, and the idle worker says that it has seen it: it is not on its way."""
    bench.line.give(4)
    bench.turn()
    bench.line.give(5)
    bench.turn()
    bench.pool.futures[0].set_result(label())
    bench.turn()

    assert len(bench.pool.futures) == 1
    assert bench.line.sent[-1] == bus.WorkerIdle("label-0", os.getpid(), 5)
