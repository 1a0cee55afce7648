"""Versions and their lineage: which labels made them, what the gate said of them, which steps they served, what audits showed, events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tumbaga.online.store.database import Database


@dataclass(frozen=True)
class StoredVersion:
    """A version as the store knows it.

    Attributes:
        number: never used twice.
        hash: of its file.
        parent: the version that served when it was made; None for the first one.
        file: relative to the run directory.
        state: "candidate" (the gate has not spoken), "accepted", "served", "refused" or "withdrawn" (it served, and was gone back from).
        labels: how many labels were known when it was made.
        metrics: JSON-compatible.
        kind: "base", "last-layer", "fine-tune" or "rollback"; empty means "base" without a parent and "last-layer" with one.
        network: `online.versions.fingerprint` of what lies before the readout, where it is known.
        created: seconds since the epoch; the store sets it.
    """

    number: int
    hash: str
    parent: int | None
    file: str
    state: str
    labels: int
    metrics: dict[str, Any]
    kind: str = ""
    network: str = ""
    created: float = 0.0

    @property
    def may_serve(self) -> bool:
        """Whether the gate passed it, and nobody took it back."""
        return self.state in ("accepted", "served")


@dataclass(frozen=True)
class Gate:
    """What one check of the gate said of a version; `numbers` is what it measured, JSON-compatible."""

    version: int
    check: str
    passed: bool
    reason: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0


@dataclass(frozen=True)
class Ramp:
    """How a session came from one version to another.

    Attributes:
        session: its name.
        from_version: what served before `first_step`; the same as `to_version` where the session began with it.
        to_version: what serves alone after `last_step`.
        first_step: of the ramp, as the session counts.
        last_step: None while it is under way.
        work_ev: energy that the ramp put into the session, eV; None while it is under way.
        id: names it; the store sets it.
        created: seconds since the epoch; the store sets it.
    """

    session: str
    from_version: int
    to_version: int
    first_step: int
    last_step: int | None = None
    work_ev: float | None = None
    id: int = 0
    created: float = 0.0


@dataclass(frozen=True)
class Audit:
    """What a label said of forces that were served.

    Attributes:
        frame: its id.
        label: its id.
        version: what had served the frame.
        force_rmse: error of a force component, eV/Å.
        force_max: largest error of an atom's force, eV/Å.
        ratio: error over the uncertainty that was told, the quantity that calibration tracks.
        promised: the largest calibrated force uncertainty that was told, eV/Å.
        numbers: whatever else was measured, JSON-compatible.
        created: seconds since the epoch; the store sets it.
    """

    frame: int
    label: int
    version: int
    force_rmse: float
    force_max: float
    ratio: float
    promised: float
    numbers: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0


class Taught(NamedTuple):
    """A label that a version was fitted to: its id, its frame's, its method, when it came (seconds since the epoch), and whether it was imported."""

    label: int
    frame: int
    method: str
    created: float
    imported: bool


class Versions(Database):
    """The part of the store that keeps versions and what became of them."""

    def add_version(self, version: StoredVersion, made_by: Iterable[int] = (), gates: Iterable[Gate] = ()) -> None:
        """Record a version with all that it came from, or nothing of it; numbers are never used twice.

        Args:
            version: the version, whatever its state.
            made_by: ids of the labels that it was fitted to.
            gates: what checks said of it.
        """
        kind = version.kind or ("base" if version.parent is None else "last-layer")
        with self._write():
            self._db.execute(
                "INSERT INTO versions (number, hash, parent, file, state, labels, metrics, kind, network, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    version.number,
                    version.hash,
                    version.parent,
                    version.file,
                    version.state,
                    version.labels,
                    json.dumps(version.metrics),
                    kind,
                    version.network,
                    self._clock(),
                ),
            )
            self._db.executemany("INSERT INTO version_labels VALUES (?, ?)", [(version.number, label) for label in made_by])
            self._db.executemany(
                "INSERT INTO gates (version, check_name, passed, reason, numbers, created) VALUES (?, ?, ?, ?, ?, ?)",
                [(version.number, one.check, one.passed, one.reason, json.dumps(dict(one.numbers)), self._clock()) for one in gates],
            )

    def set_version_state(self, number: int, state: str) -> None:
        """Note what became of a version; see `StoredVersion.state`."""
        with self._write():
            self._db.execute("UPDATE versions SET state = ? WHERE number = ?", (state, number))

    def versions(self) -> list[StoredVersion]:
        """All versions by number."""
        rows = self._db.execute(
            "SELECT number, hash, parent, file, state, labels, metrics, kind, network, created FROM versions ORDER BY number"
        )
        return [StoredVersion(*(*row[:6], json.loads(row[6]), *row[7:])) for row in rows]

    def version_labels(self, number: int) -> list[int]:
        """The ids of the labels that a version was fitted to; none is known of versions that an older tumbaga made."""
        rows = self._db.execute("SELECT label FROM version_labels WHERE version = ? ORDER BY label", (number,))
        return [int(row[0]) for row in rows]

    def taught(self, number: int) -> list[Taught]:
        """What a version was fitted to, in the order in which the labels came."""
        rows = self._db.execute(
            "SELECT l.id, l.frame, l.method, l.created, l.imported FROM version_labels v JOIN labels l ON l.id = v.label "
            "WHERE v.version = ? ORDER BY l.id",
            (number,),
        )
        return [Taught(label, frame, method, created, bool(imported)) for label, frame, method, created, imported in rows]

    # -- gate, ramps, audits ---------------------------------------------------------------------------------------------------------

    def gates(self, version: int) -> list[Gate]:
        """What all checks said of a version, in their order."""
        rows = self._db.execute(
            "SELECT version, check_name, passed, reason, numbers, created FROM gates WHERE version = ? ORDER BY id", (version,)
        )
        return [Gate(row[0], row[1], bool(row[2]), row[3], json.loads(row[4]), row[5]) for row in rows]

    def add_ramp(self, ramp: Ramp) -> int:
        """Record that a session goes over to a version, and return the ramp's id for `end_ramp`."""
        with self._write():
            cursor = self._db.execute(
                "INSERT INTO ramps (session, from_version, to_version, first_step, last_step, work_ev, created) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (ramp.session, ramp.from_version, ramp.to_version, ramp.first_step, ramp.last_step, ramp.work_ev, self._clock()),
            )
        return int(cursor.lastrowid or 0)

    def end_ramp(self, ramp: int, last_step: int, work_ev: float) -> None:
        """Record that a session has come over, after which step, and the energy that it was given, eV."""
        with self._write():
            self._db.execute("UPDATE ramps SET last_step = ?, work_ev = ? WHERE id = ?", (last_step, work_ev, ramp))

    def ramps(self, session: str | None = None) -> list[Ramp]:
        """All ramps in the order they were recorded, of one session or of all."""
        rows = self._db.execute(
            "SELECT session, from_version, to_version, first_step, last_step, work_ev, id, created FROM ramps "
            "WHERE ? IS NULL OR session = ? ORDER BY id",
            (session, session),
        )
        return [Ramp(*row) for row in rows]

    def add_audit(self, audit: Audit) -> None:
        """Record what a label said of what was served."""
        with self._write():
            self._db.execute(
                "INSERT INTO audits (frame, label, version, force_rmse, force_max, ratio, promised, numbers, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    audit.frame,
                    audit.label,
                    audit.version,
                    audit.force_rmse,
                    audit.force_max,
                    audit.ratio,
                    audit.promised,
                    json.dumps(dict(audit.numbers)),
                    self._clock(),
                ),
            )

    def audits(self) -> list[Audit]:
        """All audits in their order."""
        rows = self._db.execute(
            "SELECT frame, label, version, force_rmse, force_max, ratio, promised, numbers, created FROM audits ORDER BY id"
        )
        return [Audit(*(*row[:7], json.loads(row[7]), row[8])) for row in rows]

    # -- events ----------------------------------------------------------------------------------------------------------------------

    def add_event(self, kind: str, **detail: object) -> None:
        """Record that something happened; the detail is JSON-compatible."""
        with self._write():
            self._db.execute("INSERT INTO events (kind, detail, created) VALUES (?, ?, ?)", (kind, json.dumps(detail), self._clock()))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """All events of one kind, oldest first."""
        return [json.loads(row[0]) for row in self._db.execute("SELECT detail FROM events WHERE kind = ? ORDER BY id", (kind,))]
