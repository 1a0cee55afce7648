"""The queue: which frames wait for a label, who works at them, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from tumbaga.online.records import Reason, Role
from tumbaga.online.store.frames import Frames


@dataclass(frozen=True)
class Queued:
    """A frame that waits for its label; priority is its force uncertainty, eV/Å (higher first).

    `tried` says that its label was begun before: whoever worked at it was stopped or died. `strategy` is how it is to be labelled, where
    somebody asked for another way than the usual one; empty otherwise.
    """

    frame: int
    reason: Reason
    role: Role
    priority: float
    tried: bool = False
    strategy: str = ""


@dataclass(frozen=True)
class RunningTask:
    """A label under way."""

    task: int
    frame: int
    worker: str
    pid: int


class Spent(NamedTuple):
    """What labels have cost: how many came, and the core-seconds of all tasks that ended, in vain or not."""

    labels: int
    core_seconds: float


class Queue(Frames):
    """The part of the store that keeps the queue and the tasks."""

    def enqueue(self, frame_id: int, reason: Reason, role: Role, priority: float) -> bool:
        """Queue a frame for its label; False when it is queued, running, labelled, set aside or failed already."""
        with self._write():
            cursor = self._db.execute(
                "INSERT INTO queue (frame, reason, role, priority, state) VALUES (?, ?, ?, ?, 'pending') ON CONFLICT (frame) DO UPDATE "
                "SET reason = excluded.reason, role = excluded.role, priority = excluded.priority, state = 'pending', note = '' "
                "WHERE state = 'dropped'",
                (frame_id, reason.value, role.value, priority),
            )
        return cursor.rowcount > 0

    def accepted(self, frame_id: int) -> bool:
        """Whether a frame is queued, running, labelled, set aside or failed: then `enqueue` would not take it."""
        return self._db.execute("SELECT 1 FROM queue WHERE frame = ? AND state != 'dropped'", (frame_id,)).fetchone() is not None

    def label_state(self, key: str) -> tuple[int, str] | None:
        """Where the label of a frame stands, as (frame id, state); None if it was not taken.

        The states are "pending", "running", "labelled", "quarantined", "failed" and "dropped".

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
        """Take a waiting frame off the queue, unless somebody asked for it (`retry`); it stays in the store with the reason."""
        with self._write():
            self._db.execute(
                "UPDATE queue SET state = 'dropped', note = ? WHERE frame = ? AND state = 'pending' AND strategy = ''", (note, frame_id)
            )

    def set_priority(self, frame_id: int, priority: float) -> None:
        """Give a waiting frame its newest force uncertainty, eV/Å."""
        with self._write():
            self._db.execute("UPDATE queue SET priority = ? WHERE frame = ?", (priority, frame_id))

    def pending(self) -> list[Queued]:
        """All frames that wait, oldest first."""
        rows = self._db.execute(
            "SELECT frame, reason, role, priority, EXISTS (SELECT 1 FROM tasks WHERE tasks.frame = queue.frame), strategy "
            "FROM queue WHERE state = 'pending' ORDER BY rowid"
        )
        return [Queued(row[0], Reason(row[1]), Role(row[2]), row[3], bool(row[4]), row[5]) for row in rows]

    # -- tasks -----------------------------------------------------------------------------------------------------------------------

    def start_task(self, frame_id: int, worker: str, pid: int, role: Role | None = None, cores: float = 1.0) -> int:
        """Give a frame to a worker that has so many cores, for good in this role if one is given; return the task's number."""
        with self._write():
            self._db.execute(
                "UPDATE queue SET state = 'running', role = COALESCE(?, role) WHERE frame = ?", (role and role.value, frame_id)
            )
            cursor = self._db.execute(
                "INSERT INTO tasks (frame, worker, pid, state, started, cores) VALUES (?, ?, ?, 'running', ?, ?)",
                (frame_id, worker, pid, self._clock(), cores),
            )
        return int(cursor.lastrowid or 0)

    def running(self) -> list[RunningTask]:
        """All tasks under way."""
        return [
            RunningTask(*row) for row in self._db.execute("SELECT id, frame, worker, pid FROM tasks WHERE state = 'running' ORDER BY id")
        ]

    def task_lost(self, task: int, attempts: int, at_most: float = math.inf) -> bool:
        """The worker of a task died or forgot it: queue the frame again, or record a failure after so many attempts. True when queued.

        Args:
            task: its number.
            attempts: how often its frame may be tried.
            at_most: seconds that the task may have worked, such as its time limit; nobody knows when exactly it ended.
        """
        with self._write():
            row = self._db.execute("SELECT frame, started FROM tasks WHERE id = ? AND state = 'running'", (task,)).fetchone()
            if row is None:
                return False
            frame_id, started = row
            self._end_task(task, "lost", min(self._clock() - started, at_most))
            tried = self._db.execute("SELECT COUNT(*) FROM tasks WHERE frame = ? AND state = 'lost'", (frame_id,)).fetchone()[0]
            if tried < attempts:
                self._db.execute("UPDATE queue SET state = 'pending' WHERE frame = ? AND state = 'running'", (frame_id,))
                return True
            self._fail(frame_id, task, f"the label worker died {tried} times on this frame")
            return False

    def release_running(self) -> None:
        """An orderly stop: what was running waits again, and it does not count as an attempt."""
        now = self._clock()
        with self._write():
            self._db.execute("UPDATE queue SET state = 'pending' WHERE state = 'running'")
            self._db.execute("UPDATE tasks SET state = 'stopped', ended = ?, seconds = ? - started WHERE state = 'running'", (now, now))

    def add_failure(self, task: int, reason: str, seconds: float | None = None) -> None:
        """Record that a label failed, with the reason and the wall time it took if that is known; its frame is never learnt from."""
        with self._write():
            frame_id = self._end_task(task, "failed", seconds)
            if frame_id is not None:
                self._fail(frame_id, task, reason)

    def _end_task(self, task: int, state: str, seconds: float | None = None) -> int | None:
        """End a task within a transaction, after so many seconds of work if that is known; its frame, None if there is no such task."""
        row = self._db.execute("SELECT frame FROM tasks WHERE id = ?", (task,)).fetchone()
        if row is None:
            return None
        now = self._clock()
        self._db.execute(
            "UPDATE tasks SET state = ?, ended = ?, seconds = COALESCE(?, ? - started) WHERE id = ?", (state, now, seconds, now, task)
        )
        return int(row[0])

    def _fail(self, frame_id: int, task: int, reason: str) -> None:
        self._db.execute(
            "UPDATE queue SET state = 'failed', note = ? WHERE frame = ? AND state NOT IN ('labelled', 'quarantined')", (reason, frame_id)
        )
        self._db.execute("INSERT INTO failures (frame, task, reason, created) VALUES (?, ?, ?, ?)", (frame_id, task, reason, self._clock()))

    def failures(self) -> list[tuple[int, str]]:
        """All failures as (frame id, reason), oldest first."""
        return [(int(frame), str(reason)) for frame, reason in self._db.execute("SELECT frame, reason FROM failures ORDER BY id")]

    # -- what stands in it -----------------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """How many frames are pending, running, converged (labelled), quarantined, failed and dropped, and how many flags there were.

        Imported labels are among the converged ones.
        """
        by_state = dict(self._db.execute("SELECT state, COUNT(*) FROM queue GROUP BY state").fetchall())
        return {
            "pending": by_state.get("pending", 0),
            "running": by_state.get("running", 0),
            "converged": by_state.get("labelled", 0),
            "quarantined": by_state.get("quarantined", 0),
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
        return str(self._one(f"SELECT {column} FROM queue WHERE frame = ?", (frame_id,), f"has no queued frame {frame_id}"))

    def count_reason(self, reason: Reason) -> int:
        """How many frames were accepted for a label for this reason (dropped ones not counted)."""
        row = self._db.execute("SELECT COUNT(*) FROM queue WHERE reason = ? AND state != 'dropped'", (reason.value,)).fetchone()
        return int(row[0])

    def started_by_role(self) -> dict[Role, int]:
        """How many labels run or are done, by role; imported ones are not counted, so that the run's own ones are shared out as ever."""
        rows = self._db.execute(
            "SELECT role, COUNT(*) FROM queue WHERE state IN ('running', 'labelled') AND reason != ? GROUP BY role",
            (Reason.IMPORTED.value,),
        ).fetchall()
        return {role: dict(rows).get(role.value, 0) for role in Role}

    def queued_by_role(self) -> dict[Role, int]:
        """How many frames have ever been accepted for a label, by role: waiting, running, labelled, set aside and failed ones, which cost
        as much. Imported ones cost nothing and are not counted.
        """
        rows = self._db.execute(
            "SELECT role, COUNT(*) FROM queue WHERE state != 'dropped' AND reason != ? GROUP BY role", (Reason.IMPORTED.value,)
        ).fetchall()
        return {role: dict(rows).get(role.value, 0) for role in Role}

    def spent(self) -> Spent:
        """What the run's labels have cost so far; those set aside and all that failed, died or was stopped are paid for as well."""
        labels = self._db.execute("SELECT COUNT(*) FROM labels WHERE NOT imported").fetchone()[0]
        seconds = self._db.execute("SELECT COALESCE(SUM(cores * seconds), 0.0) FROM tasks").fetchone()[0]
        return Spent(int(labels), float(seconds))
