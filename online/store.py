"""The store: frames, flags, tasks, labels, failures, versions and events of one run, in SQLite.

Nothing counts before it stands here. One process writes (the learner); others may read at any time (WAL). Every write is one transaction
with synchronous=FULL, so a kill at any instant loses nothing that was accepted. One label a frame and method: paid once, kept for good.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tumbaga.online.errors import StoreError
from tumbaga.online.records import Array, Frame, Label, Reason, Role

FILE = "store.sqlite"
SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE frames (
  id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, numbers BLOB NOT NULL, positions BLOB NOT NULL, cell BLOB NOT NULL,
  periodic INTEGER NOT NULL, created REAL NOT NULL);
CREATE TABLE flags (
  id INTEGER PRIMARY KEY, frame INTEGER NOT NULL REFERENCES frames, session TEXT NOT NULL, step INTEGER NOT NULL, reason TEXT NOT NULL,
  score REAL NOT NULL, force_std REAL, version INTEGER NOT NULL, energy REAL NOT NULL, forces BLOB NOT NULL, created REAL NOT NULL);
CREATE TABLE queue (
  frame INTEGER PRIMARY KEY REFERENCES frames, reason TEXT NOT NULL, role TEXT NOT NULL, priority REAL NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'labelled', 'failed', 'dropped')), note TEXT NOT NULL DEFAULT '');
CREATE INDEX queue_state ON queue (state);
CREATE TABLE tasks (
  id INTEGER PRIMARY KEY AUTOINCREMENT, frame INTEGER NOT NULL REFERENCES frames, worker TEXT NOT NULL, pid INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'lost', 'stopped')), started REAL NOT NULL, ended REAL);
CREATE TABLE labels (
  id INTEGER PRIMARY KEY, frame INTEGER NOT NULL REFERENCES frames, method TEXT NOT NULL, energy REAL NOT NULL, forces BLOB NOT NULL,
  seconds REAL NOT NULL, details TEXT NOT NULL, created REAL NOT NULL, UNIQUE (frame, method));
CREATE TABLE failures (
  id INTEGER PRIMARY KEY, frame INTEGER NOT NULL REFERENCES frames, task INTEGER, reason TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE versions (
  number INTEGER PRIMARY KEY, hash TEXT NOT NULL, parent INTEGER, file TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('accepted', 'served', 'refused')), labels INTEGER NOT NULL, metrics TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE events (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, detail TEXT NOT NULL, created REAL NOT NULL);
"""


@dataclass(frozen=True)
class Queued:
    """A frame that waits for its label; priority is its force uncertainty, eV/Å (higher first).

    `tried` says that its label was begun before: whoever worked at it was stopped or died.
    """

    frame: int
    reason: Reason
    role: Role
    priority: float
    tried: bool = False


@dataclass(frozen=True)
class RunningTask:
    """A label under way."""

    task: int
    frame: int
    worker: str
    pid: int


@dataclass(frozen=True)
class StoredLabel:
    """A label with its frame and its role."""

    frame_id: int
    frame: Frame
    label: Label
    role: Role


@dataclass(frozen=True)
class StoredVersion:
    """A version as the store knows it; `metrics` is JSON-compatible."""

    number: int
    hash: str
    parent: int | None
    file: str
    state: str
    labels: int
    metrics: dict[str, Any]


class Store:
    """One run's store.

    Args:
        path: the SQLite file; made when missing.
        clock: gives the time stamps, seconds since the epoch.
        read_only: open for reading only; a missing file is an error then.

    Raises:
        StoreError: the file is not a store of this program or cannot be opened.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, *, read_only: bool = False) -> None:
        self._path, self._clock = path, clock
        try:
            uri = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None)
        except sqlite3.Error as error:
            raise StoreError(str(path), f"cannot be opened as a store ({error})") from error
        try:
            self._prepare(read_only)
        except sqlite3.Error as error:
            self._db.close()
            raise StoreError(str(path), f"cannot be opened as a store ({error})") from error
        except StoreError:
            self._db.close()
            raise

    def _prepare(self, read_only: bool) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            raise StoreError(str(self._path), "is a database of another program")
        if version != SCHEMA_VERSION and (version or read_only):
            raise StoreError(str(self._path), f"has schema version {version}; this program reads version {SCHEMA_VERSION}")
        if read_only:
            return
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")
        if version == 0:
            with self._write():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def _write(self) -> Iterator[None]:
        """One transaction: all of it or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # -- frames and flags ------------------------------------------------------------------------------------------------------------

    def add_flag(
        self, frame: Frame, *, session: str, step: int, reason: Reason, score: float, version: int, energy: float, forces: Array
    ) -> int:
        """Record that a frame was flagged, with the energy (eV) and forces (eV/Å) that were served; return the frame's id.

        A frame that is known already keeps its id: equal frames are one frame.
        """
        now = self._clock()
        with self._write():
            self._db.execute(
                "INSERT OR IGNORE INTO frames (key, numbers, positions, cell, periodic, created) VALUES (?, ?, ?, ?, ?, ?)",
                (frame.key, frame.numbers.tobytes(), frame.positions.tobytes(), frame.cell.tobytes(), int(frame.periodic), now),
            )
            frame_id = int(self._db.execute("SELECT id FROM frames WHERE key = ?", (frame.key,)).fetchone()[0])
            self._db.execute(
                "INSERT INTO flags (frame, session, step, reason, score, version, energy, forces, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (frame_id, session, step, reason.value, score, version, energy, np.asarray(forces, dtype=np.float64).tobytes(), now),
            )
        return frame_id

    def frame(self, frame_id: int) -> Frame:
        """Return a frame by id.

        Raises:
            StoreError: there is no such frame.
        """
        row = self._db.execute("SELECT numbers, positions, cell, periodic FROM frames WHERE id = ?", (frame_id,)).fetchone()
        if row is None:
            raise StoreError(str(self._path), f"has no frame {frame_id}")
        return _frame(*row)

    def served_forces(self, frame_id: int) -> Array:
        """The forces that were served when the frame was first flagged, shape (n_atoms, 3), float64, eV/Å."""
        row = self._db.execute("SELECT forces FROM flags WHERE frame = ? ORDER BY id LIMIT 1", (frame_id,)).fetchone()
        if row is None:
            raise StoreError(str(self._path), f"has no flag of frame {frame_id}")
        return _vectors(row[0])

    # -- queue and tasks -------------------------------------------------------------------------------------------------------------

    def enqueue(self, frame_id: int, reason: Reason, role: Role, priority: float) -> bool:
        """Queue a frame for its label; False when it is queued, running, labelled or failed already."""
        with self._write():
            cursor = self._db.execute(
                "INSERT INTO queue (frame, reason, role, priority, state) VALUES (?, ?, ?, ?, 'pending') ON CONFLICT (frame) DO UPDATE "
                "SET reason = excluded.reason, role = excluded.role, priority = excluded.priority, state = 'pending', note = '' "
                "WHERE state = 'dropped'",
                (frame_id, reason.value, role.value, priority),
            )
        return cursor.rowcount > 0

    def accepted(self, frame_id: int) -> bool:
        """Whether a frame is queued, running, labelled or failed: then `enqueue` would not take it."""
        return self._db.execute("SELECT 1 FROM queue WHERE frame = ? AND state != 'dropped'", (frame_id,)).fetchone() is not None

    def label_state(self, key: str) -> tuple[int, str] | None:
        """Where the label of a frame stands, as (frame id, "pending", "running", "labelled", "failed" or "dropped"); None if it was not taken.

        Args:
            key: of the frame.
        """
        row = self._db.execute(
            "SELECT queue.frame, state FROM queue JOIN frames ON frames.id = queue.frame WHERE key = ?", (key,)
        ).fetchone()
        return None if row is None else (int(row[0]), str(row[1]))

    def hurry(self, frame_id: int) -> None:
        """An engine waits for the label of a frame that is queued already: it comes next."""
        with self._write():
            self._db.execute("UPDATE queue SET reason = ? WHERE frame = ? AND state = 'pending'", (Reason.STALLED.value, frame_id))

    def drop(self, frame_id: int, note: str) -> None:
        """Take a waiting frame off the queue; it stays in the store with the reason."""
        with self._write():
            self._db.execute("UPDATE queue SET state = 'dropped', note = ? WHERE frame = ? AND state = 'pending'", (note, frame_id))

    def set_priority(self, frame_id: int, priority: float) -> None:
        """Give a waiting frame its newest force uncertainty, eV/Å."""
        with self._write():
            self._db.execute("UPDATE queue SET priority = ? WHERE frame = ?", (priority, frame_id))

    def pending(self) -> list[Queued]:
        """All frames that wait, oldest first."""
        rows = self._db.execute(
            "SELECT frame, reason, role, priority, EXISTS (SELECT 1 FROM tasks WHERE tasks.frame = queue.frame) "
            "FROM queue WHERE state = 'pending' ORDER BY rowid"
        )
        return [Queued(frame, Reason(reason), Role(role), priority, bool(tried)) for frame, reason, role, priority, tried in rows]

    def start_task(self, frame_id: int, worker: str, pid: int, role: Role | None = None) -> int:
        """Give a frame to a worker, for good in this role if one is given; return the task's number."""
        with self._write():
            self._db.execute(
                "UPDATE queue SET state = 'running', role = COALESCE(?, role) WHERE frame = ?", (role and role.value, frame_id)
            )
            cursor = self._db.execute(
                "INSERT INTO tasks (frame, worker, pid, state, started) VALUES (?, ?, ?, 'running', ?)",
                (frame_id, worker, pid, self._clock()),
            )
        return int(cursor.lastrowid or 0)

    def running(self) -> list[RunningTask]:
        """All tasks under way."""
        return [
            RunningTask(*row) for row in self._db.execute("SELECT id, frame, worker, pid FROM tasks WHERE state = 'running' ORDER BY id")
        ]

    def task_lost(self, task: int, attempts: int) -> bool:
        """The worker of a task died or forgot it: queue the frame again, or record a failure after so many attempts. True when queued."""
        with self._write():
            row = self._db.execute("SELECT frame FROM tasks WHERE id = ? AND state = 'running'", (task,)).fetchone()
            if row is None:
                return False
            self._db.execute("UPDATE tasks SET state = 'lost', ended = ? WHERE id = ?", (self._clock(), task))
            tried = self._db.execute("SELECT COUNT(*) FROM tasks WHERE frame = ? AND state = 'lost'", row).fetchone()[0]
            if tried < attempts:
                self._db.execute("UPDATE queue SET state = 'pending' WHERE frame = ? AND state = 'running'", row)
                return True
            self._fail(row[0], task, f"the label worker died {tried} times on this frame")
            return False

    def release_running(self) -> None:
        """An orderly stop: what was running waits again, and it does not count as an attempt."""
        with self._write():
            self._db.execute("UPDATE queue SET state = 'pending' WHERE state = 'running'")
            self._db.execute("UPDATE tasks SET state = 'stopped', ended = ? WHERE state = 'running'", (self._clock(),))

    # -- labels ----------------------------------------------------------------------------------------------------------------------

    def add_label(self, task: int, label: Label) -> bool:
        """Store a label for its task's frame; False when the frame has one of that method already (nothing is changed then)."""
        with self._write():
            frame_id = self._end_task(task, "done")
            if frame_id is None:
                return False
            cursor = self._db.execute(
                "INSERT OR IGNORE INTO labels (frame, method, energy, forces, seconds, details, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (frame_id, label.method, label.energy, label.forces.tobytes(), label.seconds, json.dumps(label.details), self._clock()),
            )
            self._db.execute("UPDATE queue SET state = 'labelled' WHERE frame = ?", (frame_id,))
        return cursor.rowcount > 0

    def add_failure(self, task: int, reason: str) -> None:
        """Record that a label failed, with the reason; its frame is never learnt from."""
        with self._write():
            frame_id = self._end_task(task, "failed")
            if frame_id is not None:
                self._fail(frame_id, task, reason)

    def _end_task(self, task: int, state: str) -> int | None:
        row = self._db.execute("SELECT frame FROM tasks WHERE id = ?", (task,)).fetchone()
        if row is None:
            return None
        self._db.execute("UPDATE tasks SET state = ?, ended = ? WHERE id = ?", (state, self._clock(), task))
        return int(row[0])

    def _fail(self, frame_id: int, task: int, reason: str) -> None:
        self._db.execute("UPDATE queue SET state = 'failed', note = ? WHERE frame = ? AND state != 'labelled'", (reason, frame_id))
        self._db.execute("INSERT INTO failures (frame, task, reason, created) VALUES (?, ?, ?, ?)", (frame_id, task, reason, self._clock()))

    def labels(self, method: str | None = None) -> list[StoredLabel]:
        """All labels in the order they arrived, of one method or of all."""
        rows = self._db.execute(
            "SELECT f.id, f.numbers, f.positions, f.cell, f.periodic, l.energy, l.forces, l.method, l.seconds, l.details, q.role "
            "FROM labels l JOIN frames f ON f.id = l.frame LEFT JOIN queue q ON q.frame = f.id WHERE ? IS NULL OR l.method = ? ORDER BY l.id",
            (method, method),
        )
        return [
            StoredLabel(
                row[0],
                _frame(*row[1:5]),
                Label(row[5], _vectors(row[6]), row[7], row[8], json.loads(row[9])),
                Role(row[10] or Role.TRAIN.value),
            )
            for row in rows
        ]

    def failures(self) -> list[tuple[int, str]]:
        """All failures as (frame id, reason), oldest first."""
        return [(int(frame), str(reason)) for frame, reason in self._db.execute("SELECT frame, reason FROM failures ORDER BY id")]

    def counts(self) -> dict[str, int]:
        """How many frames are pending, running, converged (labelled), failed and dropped, and how many flags there were."""
        by_state = dict(self._db.execute("SELECT state, COUNT(*) FROM queue GROUP BY state").fetchall())
        return {
            "pending": by_state.get("pending", 0),
            "running": by_state.get("running", 0),
            "converged": by_state.get("labelled", 0),
            "failed": by_state.get("failed", 0),
            "dropped": by_state.get("dropped", 0),
            "flags": int(self._db.execute("SELECT COUNT(*) FROM flags").fetchone()[0]),
        }

    def role(self, frame_id: int) -> Role:
        """What the label of a queued frame is used for."""
        return Role(self._queue_value("role", frame_id))

    def reason(self, frame_id: int) -> Reason:
        """Why a queued frame was picked."""
        return Reason(self._queue_value("reason", frame_id))

    def _queue_value(self, column: str, frame_id: int) -> str:
        row = self._db.execute(f"SELECT {column} FROM queue WHERE frame = ?", (frame_id,)).fetchone()
        if row is None:
            raise StoreError(str(self._path), f"has no queued frame {frame_id}")
        return str(row[0])

    def count_reason(self, reason: Reason) -> int:
        """How many frames were accepted for a label for this reason (dropped ones not counted)."""
        row = self._db.execute("SELECT COUNT(*) FROM queue WHERE reason = ? AND state != 'dropped'", (reason.value,)).fetchone()
        return int(row[0])

    def started_by_role(self) -> dict[Role, int]:
        """How many labels run or are done, by role."""
        rows = self._db.execute("SELECT role, COUNT(*) FROM queue WHERE state IN ('running', 'labelled') GROUP BY role").fetchall()
        return {role: dict(rows).get(role.value, 0) for role in Role}

    def queued_by_role(self) -> dict[Role, int]:
        """How many frames have ever been accepted for a label, by role: waiting, running, labelled and failed ones, which cost as much."""
        rows = self._db.execute("SELECT role, COUNT(*) FROM queue WHERE state != 'dropped' GROUP BY role").fetchall()
        return {role: dict(rows).get(role.value, 0) for role in Role}

    # -- versions and events ---------------------------------------------------------------------------------------------------------

    def add_version(self, version: StoredVersion) -> None:
        """Record a version, served or refused; numbers are never used twice."""
        with self._write():
            self._db.execute(
                "INSERT INTO versions (number, hash, parent, file, state, labels, metrics, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    version.number,
                    version.hash,
                    version.parent,
                    version.file,
                    version.state,
                    version.labels,
                    json.dumps(version.metrics),
                    self._clock(),
                ),
            )

    def set_version_state(self, number: int, state: str) -> None:
        """Note that a version was served or refused."""
        with self._write():
            self._db.execute("UPDATE versions SET state = ? WHERE number = ?", (state, number))

    def versions(self) -> list[StoredVersion]:
        """All versions by number."""
        rows = self._db.execute("SELECT number, hash, parent, file, state, labels, metrics FROM versions ORDER BY number")
        return [StoredVersion(r[0], r[1], r[2], r[3], r[4], r[5], json.loads(r[6])) for r in rows]

    def add_event(self, kind: str, **detail: object) -> None:
        """Record that something happened; the detail is JSON-compatible."""
        with self._write():
            self._db.execute("INSERT INTO events (kind, detail, created) VALUES (?, ?, ?)", (kind, json.dumps(detail), self._clock()))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of one kind, oldest first."""
        return [json.loads(row[0]) for row in self._db.execute("SELECT detail FROM events WHERE kind = ? ORDER BY id", (kind,))]


def _frame(numbers: bytes, positions: bytes, cell: bytes, periodic: int) -> Frame:
    return Frame(np.frombuffer(numbers, dtype=np.int64), _vectors(positions), _vectors(cell), bool(periodic))


def _vectors(buffer: bytes) -> Array:
    return np.frombuffer(buffer, dtype=np.float64).reshape(-1, 3)
