"""The store keeps what it accepted: across processes, through kills, once for each frame and method."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.online.errors import StoreError
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, SCHEMA_VERSION, Queued, Store, StoredVersion

METHOD = "test:a"


def frame(seed: int = 0, *, periodic: bool = False) -> Frame:
    rng = np.random.default_rng(seed)
    return Frame(np.array([8, 1, 1]), rng.standard_normal((3, 3)), 9.0 * np.eye(3) if periodic else np.zeros((3, 3)), periodic)


def label(seed: int = 0, method: str = METHOD) -> Label:
    rng = np.random.default_rng([seed, 1])
    return Label(-53210.1 + rng.standard_normal(), rng.standard_normal((3, 3)), method, 1.5, {"cycles": 12})


def flag(store: Store, seed: int = 0, reason: Reason = Reason.UNCERTAIN) -> int:
    one = frame(seed)
    return store.add_flag(one, session="s", step=7, reason=reason, score=0.3, version=0, energy=-1.0, forces=0.1 * one.positions)


def queue(store: Store, seed: int = 0, priority: float = 0.3) -> int:
    number = flag(store, seed)
    store.enqueue(number, Reason.UNCERTAIN, Role.TRAIN, priority)
    return number


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    made = Store(path, clock=lambda: 1000.0)
    yield made
    made.close()


@pytest.mark.parametrize("periodic", [False, True])
def test_a_frame_comes_back_bit_by_bit(store: Store, periodic: bool) -> None:
    """A frame that is read has the key of the frame that was written, and with it every bit."""
    one = frame(3, periodic=periodic)
    number = store.add_flag(one, session="s", step=0, reason=Reason.INITIAL, score=0.0, version=0, energy=0.0, forces=np.ones((3, 3)))

    assert store.frame(number).key == one.key
    assert store.frame(number).periodic is periodic
    np.testing.assert_array_equal(store.served_forces(number), np.ones((3, 3)))


def test_equal_frames_are_one_frame(store: Store) -> None:
    """A frame that is flagged twice has one id, two flags, and the forces that were served first."""
    first = flag(store)
    one = frame()
    again = store.add_flag(one, session="t", step=9, reason=Reason.AUDIT, score=0.1, version=2, energy=0.0, forces=np.zeros((3, 3)))

    assert again == first
    assert store.counts()["flags"] == 2
    np.testing.assert_array_equal(store.served_forces(first), 0.1 * one.positions)


def test_a_frame_is_queued_once(store: Store) -> None:
    """Whether it waits, runs, is labelled or has failed, a frame that was accepted is not accepted again."""
    number = queue(store)
    assert not store.enqueue(number, Reason.AUDIT, Role.HOLDOUT, 9.0)
    task = store.start_task(number, "label-0", 11)
    assert not store.enqueue(number, Reason.AUDIT, Role.HOLDOUT, 9.0)
    store.add_label(task, label())
    assert not store.enqueue(number, Reason.AUDIT, Role.HOLDOUT, 9.0)
    failed = queue(store, 1)
    store.add_failure(store.start_task(failed, "label-0", 11), "no convergence")

    assert not store.enqueue(failed, Reason.AUDIT, Role.HOLDOUT, 9.0)
    assert (store.role(number), store.reason(number)) == (Role.TRAIN, Reason.UNCERTAIN)


def test_a_dropped_frame_can_come_back(store: Store) -> None:
    """A frame that made room for others is accepted again, for its new reason."""
    number = queue(store)
    store.drop(number, "made room")

    assert store.pending() == []
    assert store.counts()["dropped"] == 1
    assert store.enqueue(number, Reason.AUDIT, Role.HOLDOUT, 0.7)
    assert store.pending() == [Queued(number, Reason.AUDIT, Role.HOLDOUT, 0.7)]


def test_where_the_label_of_a_frame_stands(store: Store) -> None:
    assert store.label_state(frame().key) is None
    flag(store)
    assert store.label_state(frame().key) is None  # flagged, and not taken
    number = queue(store)
    assert store.label_state(frame().key) == (number, "pending")
    task = store.start_task(number, "label-0", 11)
    assert store.label_state(frame().key) == (number, "running")
    store.add_label(task, label())
    assert store.label_state(frame().key) == (number, "labelled")
    store.drop(queue(store, 1), "made room")
    found = store.label_state(frame(1).key)
    assert found is not None
    assert found[1] == "dropped"


def test_a_waiting_frame_can_be_hurried_and_no_other(store: Store) -> None:
    number, running = queue(store), queue(store, 1)
    store.start_task(running, "label-0", 11)
    store.hurry(number)
    store.hurry(running)

    assert [queued.reason for queued in store.pending()] == [Reason.STALLED]
    assert store.reason(running) is Reason.UNCERTAIN


def test_only_waiting_frames_can_be_dropped(store: Store) -> None:
    """A frame whose label is under way stays under way."""
    number = queue(store)
    store.start_task(number, "label-0", 11)
    store.drop(number, "made room")

    assert {state: count for state, count in store.counts().items() if count} == {"running": 1, "flags": 1}


def test_a_label_is_stored_to_the_last_bit(store: Store) -> None:
    """All-electron totals and forces keep every bit, and the label knows its frame, role, method and details."""
    number = queue(store)
    told = label()
    assert store.add_label(store.start_task(number, "label-0", 11), told)
    (stored,) = store.labels()

    assert (stored.frame_id, stored.frame.key, stored.role) == (number, frame().key, Role.TRAIN)
    assert (stored.label.energy, stored.label.method, stored.label.details) == (told.energy, METHOD, {"cycles": 12})
    np.testing.assert_array_equal(stored.label.forces, told.forces)
    assert store.running() == []


def test_one_label_a_frame_and_method_for_ever(store: Store) -> None:
    """The second label of a method is turned away and the first stays, even across an open; another method is another label."""
    number = queue(store)
    assert store.add_label(store.start_task(number, "label-0", 11), label(0))
    again = Store(store._path)
    try:
        assert not again.add_label(again.start_task(number, "label-1", 12), label(1))
        assert again.add_label(again.start_task(number, "label-1", 12), label(2, "test:b"))
    finally:
        again.close()

    assert [stored.label.energy for stored in store.labels(METHOD)] == [label(0).energy]
    assert [stored.label.method for stored in store.labels()] == [METHOD, "test:b"]


def test_a_result_of_an_unknown_task_changes_nothing(store: Store) -> None:
    """A label or a failure whose task the store never gave out is not taken."""
    assert not store.add_label(99, label())
    store.add_failure(99, "no convergence")

    assert store.labels() == []
    assert store.failures() == []


def test_a_failure_keeps_its_reason(store: Store) -> None:
    """A frame that could not be labelled is failed, with the sentence, and there is nothing to learn from."""
    number = queue(store)
    store.add_failure(store.start_task(number, "label-0", 11), "the SCF did not converge in 100 cycles")

    assert store.failures() == [(number, "the SCF did not converge in 100 cycles")]
    assert store.counts()["failed"] == 1
    assert store.labels() == []


def test_a_late_failure_does_not_take_a_label_away(store: Store) -> None:
    """A frame that has its label stays labelled when a second task of it fails."""
    number = queue(store)
    first, second = store.start_task(number, "label-0", 11), store.start_task(number, "label-1", 12)
    store.add_label(first, label())
    store.add_failure(second, "no convergence")

    assert store.counts()["converged"] == 1
    assert store.counts()["failed"] == 0


def test_a_lost_task_is_tried_again_and_then_given_up(store: Store) -> None:
    """With two attempts the first death of a worker queues the frame again and the second one fails it with a reason."""
    number = queue(store)
    assert store.task_lost(store.start_task(number, "label-0", 11), attempts=2)
    assert [waiting.frame for waiting in store.pending()] == [number]
    assert not store.task_lost(store.start_task(number, "label-0", 12), attempts=2)

    assert store.counts()["failed"] == 1
    assert store.failures() == [(number, "the label worker died 2 times on this frame")]


def test_a_task_is_lost_once(store: Store) -> None:
    """Losing a task that has ended does nothing."""
    number = queue(store)
    task = store.start_task(number, "label-0", 11)
    store.add_label(task, label())

    assert not store.task_lost(task, attempts=1)
    assert store.counts()["converged"] == 1


def test_an_orderly_stop_is_no_attempt(store: Store) -> None:
    """Frames released at a stop wait again, however often, and the first death after that is the first."""
    number = queue(store)
    for pid in range(5):
        store.start_task(number, "label-0", pid)
        store.release_running()
        assert (store.running(), len(store.pending())) == ([], 1)

    assert store.task_lost(store.start_task(number, "label-0", 11), attempts=2)


def test_a_label_that_comes_after_the_stop_counts(store: Store) -> None:
    """A result that was on disk when its task was released is stored, and its frame does not wait any more."""
    number = queue(store)
    task = store.start_task(number, "label-0", 11)
    store.release_running()

    assert store.add_label(task, label())
    assert store.pending() == []


def test_the_queue_has_its_newest_priorities_and_counts(store: Store) -> None:
    """Priorities change in place, and what was dropped is not counted as accepted; a failed label was paid for, so its role is."""
    numbers = [queue(store, seed, 0.1 * seed) for seed in range(4)]
    store.set_priority(numbers[0], 5.0)
    store.drop(numbers[1], "made room")
    store.add_failure(store.start_task(numbers[2], "label-0", 11), "no convergence")

    assert [(waiting.frame, waiting.priority) for waiting in store.pending()] == [(numbers[0], 5.0), (numbers[3], pytest.approx(0.3))]
    assert store.queued_by_role() == {Role.TRAIN: 3, Role.HOLDOUT: 0}
    assert store.count_reason(Reason.UNCERTAIN) == 3
    assert store.count_reason(Reason.AUDIT) == 0


def test_versions_and_events_are_kept(path: Path, store: Store) -> None:
    """A version and its state, and the events of a kind in their order, are there for the next one who opens the store."""
    store.add_version(StoredVersion(0, "ab" * 32, None, "versions/0.safetensors", "served", 0, {}))
    store.add_version(StoredVersion(1, "cd" * 32, 0, "versions/1.safetensors", "accepted", 3, {"rmse": 0.125}))
    store.set_version_state(1, "refused")
    store.add_event("swap", version=1)
    store.add_event("swap", version=0)
    other = Store(path, read_only=True)
    found, events = other.versions(), other.events("swap")
    other.close()

    assert [(version.number, version.parent, version.state) for version in found] == [(0, None, "served"), (1, 0, "refused")]
    assert found[1].metrics == {"rmse": 0.125}
    assert events == [{"version": 1}, {"version": 0}]
    with pytest.raises(sqlite3.IntegrityError):
        store.add_version(found[1])


def test_readers_do_not_wait_for_the_writer(path: Path, store: Store) -> None:
    """A reader sees what was committed while a transaction is open, and its own view does not block the commit."""
    queue(store, 0)
    reader = Store(path, read_only=True)
    try:
        with store._write():
            store._db.execute("UPDATE queue SET priority = 9.0")
            assert reader.pending()[0].priority == 0.3
        assert reader.pending()[0].priority == 9.0
    finally:
        reader.close()


def test_a_reader_cannot_write(path: Path, store: Store) -> None:
    """A store opened for reading turns writes away."""
    reader = Store(path, read_only=True)

    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        flag(reader)
    reader.close()


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    """A flag whose write fails half-way leaves no frame behind."""
    with pytest.raises(sqlite3.IntegrityError):
        store.add_flag(
            frame(), session="s", step=0, reason=Reason.INITIAL, score=float("nan"), version=0, energy=0.0, forces=np.ones((3, 3))
        )

    assert store._db.execute("SELECT COUNT(*) FROM frames").fetchone() == (0,)
    assert flag(store) == 1


def test_a_missing_file_cannot_be_read(path: Path) -> None:
    """Reading where there is no store is an error and makes no file."""
    with pytest.raises(StoreError, match="cannot be opened as a store"):
        Store(path, read_only=True)
    assert not path.exists()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_of_something_else_is_refused(path: Path, read_only: bool) -> None:
    """Garbage is refused with a sentence that names the file, and stays as it is."""
    path.write_bytes(b"this is no database. " * 100)

    with pytest.raises(StoreError, match="cannot be opened as a store") as caught:
        Store(path, read_only=read_only)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"this is no database. " * 100


def test_a_database_of_another_program_is_left_alone(path: Path) -> None:
    """An SQLite file with foreign tables is refused and gets none of ours."""
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE birds (name TEXT)")
    with pytest.raises(StoreError, match="another program"):
        Store(path)
    tables = database.execute("SELECT name FROM sqlite_master").fetchall()
    database.close()

    assert tables == [("birds",)]


def test_an_open_that_fails_leaves_no_descriptor(path: Path) -> None:
    """A store that is refused is closed again."""
    path.write_bytes(b"this is no database. " * 100)
    before = sorted(os.listdir("/proc/self/fd"))
    errors = []
    for _ in range(3):
        with pytest.raises(StoreError) as caught:
            Store(path)
        errors.append(caught.value)  # keeps the frames of the traceback, and with them the connection, alive

    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("read_only", [False, True])
def test_a_store_of_another_schema_is_refused(path: Path, read_only: bool) -> None:
    """A store of a later program is refused with both version numbers."""
    Store(path).close()
    database = sqlite3.connect(path)
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 6}")
    database.close()

    with pytest.raises(
        StoreError, match=f"schema version {SCHEMA_VERSION + 6}; this program reads up to version {SCHEMA_VERSION}: install"
    ):
        Store(path, read_only=read_only)


@pytest.mark.parametrize("name", ["a run?x=1", "100%41#b"])
def test_strange_paths_are_paths(tmp_path: Path, name: str) -> None:
    """Signs that mean something in a URI mean nothing in the name of a run directory."""
    folder = tmp_path / name
    folder.mkdir()
    Store(folder / FILE).close()

    assert (folder / FILE).exists()


def test_things_that_are_not_there_are_named(store: Store) -> None:
    """Asking for a frame that the store does not have names its number."""
    for ask in (store.frame, store.served_forces, store.role, store.reason):
        with pytest.raises(StoreError, match="41"):
            ask(41)


WRITER = """
import sys
import numpy as np
from pathlib import Path
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import Store

store = Store(Path(sys.argv[1]))
seed = store.counts()["flags"]
while True:
    rng = np.random.default_rng(seed)
    frame = Frame(np.array([8, 1, 1]), rng.standard_normal((3, 3)))
    number = store.add_flag(
        frame, session="s", step=seed, reason=Reason.UNCERTAIN, score=1.0, version=0, energy=0.0, forces=frame.positions)
    print("flag", number, flush=True)
    if store.enqueue(number, Reason.UNCERTAIN, Role.TRAIN, 1.0):
        print("queue", number, flush=True)
    task = store.start_task(number, "w", 1)
    if store.add_label(task, Label(float(seed), rng.standard_normal((3, 3)), "m", 0.0)):
        print("label", number, flush=True)
    seed += 1
"""


def test_a_kill_loses_nothing_that_was_accepted(path: Path) -> None:
    """Invariant 4: whatever a writer reported before SIGKILL is in the store, whole, and the next writer goes on from there."""
    rng = np.random.default_rng(5)
    told: set[tuple[str, int]] = set()
    for lines in rng.integers(3, 40, 3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline() for _ in range(lines)]
            writer.kill()
            said += writer.stdout.readlines()  # what was on its way when the signal came
        told |= {(what, int(number)) for what, number in (line.split() for line in said if line.endswith("\n"))}
    store = Store(path)
    labels = {stored.frame_id: stored for stored in store.labels("m")}
    queued = {row[0] for row in store._db.execute("SELECT frame FROM queue")}
    frames = {row[0] for row in store._db.execute("SELECT id FROM frames")}
    sound = store._db.execute("PRAGMA integrity_check").fetchone()[0]
    store.close()

    assert len(told) > 9
    assert {number for what, number in told if what == "flag"} <= frames
    assert {number for what, number in told if what == "queue"} <= queued
    assert {number for what, number in told if what == "label"} <= set(labels)
    assert all(np.isfinite(stored.label.forces).all() and len(stored.frame) == 3 for stored in labels.values())
    assert sound == "ok"
