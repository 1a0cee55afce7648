"""Labels: one a frame and method, paid once, kept for good. Doubtful ones are set aside with the reason, and can come back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tumbaga.online.errors import StoreError
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store.frames import frame_of, vectors
from tumbaga.online.store.queue import Queue

_COLUMNS = "f.id, f.numbers, f.positions, f.cell, f.periodic, l.energy, l.forces, l.method, l.seconds, l.details, l.virial, q.role, l.id, l.imported"


@dataclass(frozen=True)
class StoredLabel:
    """A label with its frame and its role; `id` names the label (0: not from a store), `imported` says that the run did not compute it."""

    frame_id: int
    frame: Frame
    label: Label
    role: Role
    id: int = 0
    imported: bool = False


@dataclass(frozen=True)
class Quarantined:
    """A label that was set aside.

    Attributes:
        stored: the label, its frame and its role.
        check: name of the check that it failed.
        reason: why, as a sentence.
        numbers: what the check measured, JSON-compatible.
        state: "held", "retried" (its frame was queued again, see `strategy`), "released" (by a person: it is believed since) or "returned" (the others
            contradict it no longer: it is a label like any other since).
        strategy: how its frame is to be labelled the next time.
        created: when it was set aside, seconds since the epoch.
    """

    stored: StoredLabel
    check: str
    reason: str
    numbers: dict[str, Any]
    state: str
    strategy: str
    created: float


class Imported(NamedTuple):
    """How many labels were taken in, and how many were there before."""

    added: int
    known: int


class Noise(NamedTuple):
    """What labels that were computed twice differ by.

    Attributes:
        labels: how many were. failures: of how many the second one failed.
        force_rmse: over components of all of them, eV/Å. force_max, energy_max: the largest difference, eV/Å and eV.
    """

    labels: int
    failures: int
    force_rmse: float
    force_max: float
    energy_max: float


class Labels(Queue):
    """The part of the store that keeps labels and the quarantine."""

    def add_label(self, task: int, label: Label) -> bool:
        """Store a label for its task's frame; False when the frame has one of that method already, or the task gave one (nothing is changed)."""
        with self._write():
            if self._gave_label(task):
                return False
            frame_id = self._end_task(task, "done", label.seconds)
            if frame_id is None:
                return False
            added = self._insert(frame_id, label, task=task)
            self._db.execute("UPDATE queue SET state = 'labelled' WHERE frame = ?", (frame_id,))
        return added is not None

    def _insert(self, frame_id: int, label: Label, *, task: int | None = None, aside: bool = False, imported: bool = False) -> int | None:
        """The id of a new label, within a transaction; None when the frame has one of that method."""
        virial = None if label.virial is None else label.virial.tobytes()
        cursor = self._db.execute(
            "INSERT OR IGNORE INTO labels (frame, task, method, energy, forces, virial, seconds, details, aside, imported, created) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                frame_id,
                task,
                label.method,
                label.energy,
                label.forces.tobytes(),
                virial,
                label.seconds,
                json.dumps(label.details),
                aside,
                imported,
                self._clock(),
            ),
        )
        return int(cursor.lastrowid or 0) if cursor.rowcount > 0 else None

    def _gave_label(self, task: int) -> bool:
        """Whether the label of a task is in the store: its file in the spool is read again after a kill at the wrong instant."""
        return self._db.execute("SELECT 1 FROM labels WHERE task = ?", (task,)).fetchone() is not None

    def labels(self, method: str | None = None) -> list[StoredLabel]:
        """All labels in the order they arrived, of one method or of all; without those set aside."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM labels l JOIN frames f ON f.id = l.frame LEFT JOIN queue q ON q.frame = f.id "
            "WHERE NOT l.aside AND (? IS NULL OR l.method = ?) ORDER BY l.id",
            (method, method),
        )
        return [_stored(row) for row in rows]

    def label_of(self, frame_id: int, method: str) -> StoredLabel | None:
        """The label of a frame, None if it has none of that method or that one was set aside."""
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM labels l JOIN frames f ON f.id = l.frame LEFT JOIN queue q ON q.frame = f.id "
            "WHERE NOT l.aside AND l.frame = ? AND l.method = ?",
            (frame_id, method),
        ).fetchone()
        return None if row is None else _stored(row)

    def noise(self) -> Noise | None:
        """What labels that were computed twice differ by (`label.repeat_every`); None if there are none."""
        # details are free: what a method of the user's says under the same name is something else
        rows = self._db.execute("SELECT json_extract(details, '$.repeat') FROM labels WHERE json_type(details, '$.repeat') = 'object'")
        told = [one for row in rows if (one := json.loads(row[0])).keys() >= {"force_rmse", "force_max", "energy"} or "failure" in one]
        good = [one for one in told if "failure" not in one]
        if not told:
            return None
        squares = [one["force_rmse"] ** 2 for one in good]
        rmse = math.sqrt(sum(squares) / len(squares)) if squares else math.nan
        return Noise(
            len(good),
            len(told) - len(good),
            rmse,
            max((one["force_max"] for one in good), default=math.nan),
            max((abs(one["energy"]) for one in good), default=math.nan),
        )

    def label_ids(self, method: str, role: Role | None = None) -> list[int]:
        """The ids of all labels of a method, of one role or of both, in the order they arrived."""
        rows = self._db.execute(
            "SELECT l.id FROM labels l LEFT JOIN queue q ON q.frame = l.frame WHERE NOT l.aside AND l.method = ? "
            "AND (? IS NULL OR COALESCE(q.role, 'train') = ?) ORDER BY l.id",
            (method, role and role.value, role and role.value),
        )
        return [int(row[0]) for row in rows]

    def import_labels(self, found: Iterable[tuple[Frame, Label, Role]]) -> Imported:
        """Take in labels that were computed elsewhere: all of them or, if something is wrong with one, none.

        A frame that waited for its label needs none any more, and keeps its role. Labels set aside stay there.
        """
        added = known = 0
        with self._write():
            for frame, label, role in found:
                frame_id = self._add_frame(frame)
                if self._insert(frame_id, label, imported=True) is None:
                    known += 1
                    continue
                added += 1
                self._db.execute(
                    "INSERT INTO queue (frame, reason, role, priority, state) VALUES (?, ?, ?, 0.0, 'labelled') "
                    "ON CONFLICT (frame) DO UPDATE SET state = 'labelled'",
                    (frame_id, Reason.IMPORTED.value, role.value),
                )
        return Imported(added, known)

    # -- quarantine ------------------------------------------------------------------------------------------------------------------

    def quarantine(self, task: int, label: Label, check: str, reason: str, numbers: dict[str, Any] | None = None) -> bool:
        """Set a label aside instead of storing it with the others; it is kept, and nothing is learnt from it.

        False when nothing is known of the task, or its label is in the store already.

        Args:
            task: that computed it.
            label: what it computed.
            check: name of the check that it failed.
            reason: why, as a sentence.
            numbers: what the check measured, JSON-compatible.
        """
        with self._write():
            frame_id = None if self._gave_label(task) else self._end_task(task, "done", label.seconds)
            if frame_id is None:
                return False
            label_id = self._insert(frame_id, label, task=task, aside=True)
            self._hold(frame_id, label_id, check, reason, numbers)
        return True

    def set_aside(self, label_id: int, check: str, reason: str, numbers: dict[str, Any] | None = None) -> None:
        """Set a label aside that was stored with the others; versions that it made keep it among their labels.

        Raises:
            StoreError: there is no such label, or it is set aside already.
        """
        with self._write():
            query = "SELECT frame FROM labels WHERE id = ? AND NOT aside"
            frame_id = int(self._one(query, (label_id,), f"has no label {label_id} that could be set aside"))
            self._db.execute("UPDATE labels SET aside = 1 WHERE id = ?", (label_id,))
            self._hold(frame_id, label_id, check, reason, numbers)

    def _hold(self, frame_id: int, label_id: int | None, check: str, reason: str, numbers: dict[str, Any] | None) -> None:
        self._db.execute(
            "INSERT INTO quarantine (label, check_name, reason, numbers, state, created) VALUES (?, ?, ?, ?, 'held', ?)",
            (label_id, check, reason, json.dumps(numbers or {}), self._clock()),
        )
        # a frame that has another, good label stays labelled
        self._db.execute(
            "UPDATE queue SET note = ?, state = CASE WHEN EXISTS (SELECT 1 FROM labels WHERE labels.frame = queue.frame AND NOT aside) "
            "THEN 'labelled' ELSE 'quarantined' END WHERE frame = ?",
            (reason, frame_id),
        )

    def quarantined(self) -> list[Quarantined]:
        """All labels that are set aside now, oldest first, also of frames that were queued again."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS}, z.check_name, z.reason, z.numbers, z.state, z.strategy, z.created FROM quarantine z "
            "JOIN labels l ON l.id = z.label JOIN frames f ON f.id = l.frame LEFT JOIN queue q ON q.frame = f.id "
            "WHERE z.state NOT IN ('released', 'returned') ORDER BY z.id"
        )
        return [Quarantined(_stored(row), row[14], row[15], json.loads(row[16]), *row[17:]) for row in rows]

    def released(self) -> set[int]:
        """The ids of all labels that a person has released: they are believed from then on."""
        return {int(row[0]) for row in self._db.execute("SELECT label FROM quarantine WHERE state = 'released'")}

    def release(self, frame_id: int) -> StoredLabel:
        """Make the newest label of a frame that is set aside a label like any other, and return it.

        Raises:
            StoreError: none is set aside, the frame has another label of the method by now, or is being labelled.
        """
        with self._write():
            row = self._held(frame_id)
            if self._queue_value("state", frame_id) == "running":
                raise StoreError(
                    str(self._path), f"cannot release the label of frame {frame_id} now: the frame is being labelled once more"
                )
            label_id, method = row
            if self.label_of(frame_id, method) is not None:
                raise StoreError(
                    str(self._path), f"cannot release the label of frame {frame_id}: the frame has another one of {method} by now"
                )
            self._db.execute("UPDATE labels SET aside = 0 WHERE id = ?", (label_id,))
            self._db.execute(
                "UPDATE quarantine SET state = 'released', ended = ? WHERE label = ? AND state != 'released'", (self._clock(), label_id)
            )
            self._db.execute("UPDATE queue SET state = 'labelled', note = 'released by hand' WHERE frame = ?", (frame_id,))
            released = self.label_of(frame_id, method)
            assert released is not None
        return released

    def take_back(self, label_id: int, note: str) -> bool:
        """Make a label that is set aside one like any other again, because the others contradict it no longer.

        Returns:
            False where nothing changes: it is not held any more, or its frame has another label by now, or is about to get one.
        """
        with self._write():
            row = self._db.execute(
                "SELECT l.frame FROM labels l JOIN quarantine z ON z.label = l.id JOIN queue q ON q.frame = l.frame "
                "WHERE l.id = ? AND l.aside AND z.state = 'held' AND q.state = 'quarantined'",
                (label_id,),
            ).fetchone()
            if row is None:
                return False
            self._db.execute("UPDATE labels SET aside = 0 WHERE id = ?", (label_id,))
            self._db.execute(
                "UPDATE quarantine SET state = 'returned', ended = ? WHERE label = ? AND state = 'held'", (self._clock(), label_id)
            )
            self._db.execute("UPDATE queue SET state = 'labelled', note = ? WHERE frame = ?", (note, row[0]))
        return True

    def retry(self, frame_id: int, strategy: str) -> None:
        """Queue a frame again whose label was set aside or failed, to be labelled in another way; what was set aside stays so.

        Args:
            frame_id: the frame.
            strategy: how, in the words of whoever labels; `Queued.strategy` then.

        Raises:
            StoreError: its label neither failed nor was set aside.
        """
        with self._write():
            state = self._queue_value("state", frame_id)
            if state not in ("quarantined", "failed"):
                raise StoreError(str(self._path), f"cannot queue frame {frame_id} again: it is {state}, neither quarantined nor failed")
            self._db.execute(
                "UPDATE queue SET state = 'pending', strategy = ?, note = ? WHERE frame = ?",
                (strategy, f"after it was {state}, again by strategy {strategy}", frame_id),
            )
            self._db.execute(
                "UPDATE quarantine SET state = 'retried', strategy = ?, ended = ? "
                "WHERE state = 'held' AND label IN (SELECT id FROM labels WHERE frame = ?)",
                (strategy, self._clock(), frame_id),
            )

    def _held(self, frame_id: int) -> tuple[int, str]:
        row = self._db.execute("SELECT id, method FROM labels WHERE frame = ? AND aside ORDER BY id DESC LIMIT 1", (frame_id,)).fetchone()
        if row is None:
            raise StoreError(str(self._path), f"has no label of frame {frame_id} in quarantine")
        return int(row[0]), str(row[1])


def _stored(row: tuple[Any, ...]) -> StoredLabel:
    """A label from `_COLUMNS`."""
    virial = None if row[10] is None else vectors(row[10])
    label = Label(row[5], vectors(row[6]), row[7], row[8], json.loads(row[9]), virial)
    return StoredLabel(row[0], frame_of(*row[1:5]), label, Role(row[11] or Role.TRAIN.value), row[12], bool(row[13]))
