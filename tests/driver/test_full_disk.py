"""While the disk is full: candidates are refused, engines that wait are told, the status says so, and room is noticed."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import finetuning, process, rundir, trainer_process
from tumbaga.driver.finetuning import Order
from tumbaga.driver.full_disk import SENTENCE, FullDisk
from tumbaga.driver.learner_process import make_ends
from tumbaga.driver.rundir import STATUS, RunDir
from tumbaga.online import versions
from tumbaga.online.errors import StoreFullError
from tumbaga.socket_protocol import bus


class Reporter:
    """Takes log lines and states."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.told: dict[str, Any] = {"versions": 4}
        self.states: list[dict[str, Any]] = []

    def log(self, level: str, event: str, **detail: Any) -> None:
        self.events.append(event)

    def state(self, **state: Any) -> None:
        self.states.append(state)


class Bench:
    """What stands in for the learner, between a gateway and a label worker."""

    def __init__(self, run_dir: Path) -> None:
        bus.make_folder(run_dir)
        self.now, self.reporter, self._context = 0.0, Reporter(), zmq.Context()
        self.gateway = bus.Endpoint(self._context, zmq.ROUTER, bus.LEARNER, bind=True)
        self._ends = make_ends(self._context)
        self.worker = bus.Endpoint(self._context, zmq.DEALER, bus.LABELS, bind=False, identity="label-0-1")
        self.full = FullDisk(run_dir, *self._ends, self.reporter, clock=lambda: self.now)  # type: ignore[arg-type]

    def heard(self) -> list[bus.AnyMessage]:
        found = []
        while self.gateway.socket.poll(200) and (received := self.gateway.receive()):
            found.append(received[1])
        return found

    def close(self) -> None:
        for end in (*self._ends, self.gateway, self.worker):
            end.close()
        self._context.term()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / versions.FOLDER).mkdir()
    told = {"version": 3, "path": "versions/000003-abcd.safetensors", "lpr_scale": 0.5, "quantile": 1.5}
    (tmp_path / versions.FOLDER / versions.SERVING).write_text(json.dumps(told))
    made = Bench(tmp_path)
    yield made
    made.close()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets this process write no file beyond so many bytes; not a fixture, for what reports on tests may write to a file too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_serves_goes_on_serving(bench: Bench) -> None:
    """The gateway hears of the version that serves as ever; an engine that waits for a label is told why there is none, others nothing."""
    bench.full.turn()
    assert bench.heard() == [bus.Serve(3, "versions/000003-abcd.safetensors", 0.5, 1.5)]
    buffers = [np.array([1]), np.zeros((1, 3)), np.zeros((3, 3)), np.zeros((1, 3))]
    for ticket in (0, 7):
        candidate = bus.Candidate("unix:/x", 3, "stalled", 0.9, 0.1, 0, periodic=False, energy=0.0, ticket=ticket)
        assert bench.gateway.send(candidate, buffers, to=bus.LEARNER)
    assert bench.worker.socket.poll(5000, zmq.POLLOUT)
    assert bench.worker.send(bus.WorkerIdle("label-0", 1, 0))
    settled = []
    for _ in range(50):
        bench.full.turn()
        settled += [message for message in bench.heard() if isinstance(message, bus.Settled)]
        if settled:
            break

    assert settled == [bus.Settled("unix:/x", 7, 3, SENTENCE)]
    assert not bench.worker.socket.poll(200)  # no task is given


def test_the_status_says_so_once(bench: Bench) -> None:
    """Each state has the sentence beside what was known before, and there is one line in the log, however long it lasts."""
    with largest_file(64_000):
        for _ in range(3):
            bench.now += 100.0
            assert not bench.full.turn(draining=True)

    assert bench.reporter.events == [SENTENCE]
    assert [(state["problems"], state["versions"], state["draining"]) for state in bench.reporter.states] == [([SENTENCE], 4, True)] * 3
    assert bench.reporter.states[0]["labels"]["running"] == 0


def test_room_is_noticed(bench: Bench, tmp_path: Path) -> None:
    """It looks every five seconds, leaves nothing behind, and says so once there is room."""
    bench.now = 5.1
    with largest_file(64_000):
        assert not bench.full.turn()
    assert not bench.full.turn()
    bench.now = 10.3
    assert bench.full.turn()
    assert bench.reporter.events[-1] == "there is room on the disk again"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_room_for_a_little_is_none_for_large_versions(bench: Bench, tmp_path: Path) -> None:
    """Where a version file is larger than what can be written, there is no room yet."""
    with open(tmp_path / versions.FOLDER / "000003-abcd.safetensors", "wb") as file:
        file.truncate(3_000_000)
    bench.now = 5.1
    with largest_file(5_000_000):
        assert not bench.full.turn()
    bench.now = 10.3
    assert bench.full.turn()


class Lifeline:
    """Notes how long somebody waited."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.cut_off = False

    def wait(self, seconds: float) -> bool:
        self.waits.append(seconds)
        return False


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), StoreFullError("store.sqlite")])
def test_a_fine_tune_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """On a full disk the order stays open, no result is made of it, and the trainer waits instead of dying again and again."""
    finetuning.put_order(tmp_path, Order(1, 0, "a", "a", (1,), (), "test:a"))
    reporter, lifeline = Reporter(), Lifeline()

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("tumbaga.driver.trainer.carry_out", full)
    made = trainer_process.Trainer(tmp_path, configs.Config(), reporter, lifeline)  # type: ignore[arg-type]
    made.turn()
    made.turn()

    assert reporter.events == ["fine-tune started", "fine-tune waits: the disk is full"] * 2
    assert lifeline.waits == [10.0, 10.0]
    assert finetuning.open_order(tmp_path) is not None


def test_a_status_that_is_written_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status takes the place of the last one where no new file can be; one that is too long for that leaves it whole."""
    folder = RunDir(tmp_path)
    folder.write_status({"state": "finished", "errors": []})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rundir, "write_whole", full)
    folder.write_status({"state": "finished", "errors": [SENTENCE]})
    assert folder.read_status() == {"state": "finished", "errors": [SENTENCE]}
    with pytest.raises(OSError, match="No space left"):
        folder.write_status({"state": "finished", "errors": ["x" * 10_000]})
    assert folder.read_status() == {"state": "finished", "errors": [SENTENCE]}
    monkeypatch.undo()
    folder.write_status({"state": "finished", "errors": ["x" * 10_000]})
    assert len(folder.read_status()["errors"][0]) == 10_000
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]


def test_a_log_drops_what_the_disk_does_not_take(tmp_path: Path) -> None:
    """A line that is cut off by the end of the disk ends there; the next one that fits stands on a line of its own."""
    logger = process.log_to_file(tmp_path, "gateway")
    logger.info("first")
    with largest_file((tmp_path / "log" / "gateway.jsonl").stat().st_size + 20):
        for number in range(3):
            logger.error("dropped", number=number)
    logger.info("last")
    lines = (tmp_path / "log" / "gateway.jsonl").read_text().splitlines()

    assert json.loads(lines[0])["event"] == "first"
    assert json.loads(lines[-1])["event"] == "last"
    assert len(lines) == 3
