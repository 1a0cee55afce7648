"""Frames and their flags: what was seen, and what was served for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tumbaga.online.errors import StoreError
from tumbaga.online.records import Array, Frame, Reason
from tumbaga.online.store.database import Database


@dataclass(frozen=True, eq=False)
class StoredFlag:
    """One time that a frame was flagged.

    Attributes:
        frame: its id.
        session: which session it was of.
        step: its number there.
        reason: why it was flagged.
        score: calibrated force uncertainty as the gateway had it, eV/Å.
        version: what served it.
        energy: what was served, eV.
        forces: what was served, shape (n_atoms, 3), float64, eV/Å.
        created: seconds since the epoch.
    """

    frame: int
    session: str
    step: int
    reason: Reason
    score: float
    version: int
    energy: float
    forces: Array
    created: float


class Frames(Database):
    """The part of the store that keeps frames and flags."""

    def add_flag(
        self, frame: Frame, *, session: str, step: int, reason: Reason, score: float, version: int, energy: float, forces: Array
    ) -> int:
        """Record that a frame was flagged, with the energy (eV) and forces (eV/Å) that were served; return the frame's id.

        A frame that is known already keeps its id: equal frames are one frame.
        """
        now = self._clock()
        with self._write():
            frame_id = self._add_frame(frame)
            self._db.execute(
                "INSERT INTO flags (frame, session, step, reason, score, version, energy, forces, created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (frame_id, session, step, reason.value, score, version, energy, np.asarray(forces, dtype=np.float64).tobytes(), now),
            )
        return frame_id

    def _add_frame(self, frame: Frame) -> int:
        """The id of a frame, which is kept if it is new; within a transaction."""
        self._db.execute(
            "INSERT OR IGNORE INTO frames (key, numbers, positions, cell, periodic, created) VALUES (?, ?, ?, ?, ?, ?)",
            (frame.key, frame.numbers.tobytes(), frame.positions.tobytes(), frame.cell.tobytes(), int(frame.periodic), self._clock()),
        )
        return int(self._db.execute("SELECT id FROM frames WHERE key = ?", (frame.key,)).fetchone()[0])

    def frame(self, frame_id: int) -> Frame:
        """Return a frame by id.

        Raises:
            StoreError: there is no such frame.
        """
        row = self._db.execute("SELECT numbers, positions, cell, periodic FROM frames WHERE id = ?", (frame_id,)).fetchone()
        if row is None:
            raise StoreError(str(self._path), f"has no frame {frame_id}")
        return frame_of(*row)

    def flagged_last(self, most: int) -> list[int]:
        """The ids of the frames that were flagged last, newest first, each once."""
        rows = self._db.execute("SELECT frame FROM flags GROUP BY frame ORDER BY MAX(id) DESC LIMIT ?", (most,))
        return [int(row[0]) for row in rows]

    def served_forces(self, frame_id: int) -> Array:
        """The forces that were served when the frame was first flagged, shape (n_atoms, 3), float64, eV/Å."""
        return vectors(
            self._one("SELECT forces FROM flags WHERE frame = ? ORDER BY id LIMIT 1", (frame_id,), f"has no flag of frame {frame_id}")
        )

    def flags(self, frame_id: int) -> list[StoredFlag]:
        """All flags of a frame, the first one first; none for a frame that was imported."""
        return self._flags("frame = ?", frame_id)

    def flags_between(self, session: str, first: int, last: int) -> list[StoredFlag]:
        """All flags of a session from one step to another, both included."""
        return self._flags("session = ? AND step BETWEEN ? AND ?", session, first, last)

    def _flags(self, which: str, *values: object) -> list[StoredFlag]:
        rows = self._db.execute(
            f"SELECT frame, session, step, reason, score, version, energy, forces, created FROM flags WHERE {which} ORDER BY id", values
        )
        return [StoredFlag(*(*row[:3], Reason(row[3]), *row[4:7], vectors(row[7]), row[8])) for row in rows]


def frame_of(numbers: bytes, positions: bytes, cell: bytes, periodic: int) -> Frame:
    """A frame from its columns."""
    return Frame(np.frombuffer(numbers, dtype=np.int64), vectors(positions), vectors(cell), bool(periodic))


def vectors(buffer: bytes) -> Array:
    """Rows of three numbers, shape (n, 3), float64."""
    return np.frombuffer(buffer, dtype=np.float64).reshape(-1, 3)
