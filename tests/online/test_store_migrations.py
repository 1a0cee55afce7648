"""Stores of older programs: brought up to date with everything that is in them, or read as they are."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from tumbaga.online.errors import StoreError
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, SCHEMA_VERSION, Queued, Store
from tumbaga.online.store.schema import MIGRATIONS

# what tumbaga wrote before there were migrations, word for word
VERSION_1 = """
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
STATES = ["labelled", "labelled", "pending", "running", "failed", "dropped"]


def frame(seed: int) -> Frame:
    return Frame(np.array([8, 1, 1]), np.random.default_rng(seed).standard_normal((3, 3)))


def energy(seed: int) -> float:
    return -53210.1 - seed / 3


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store of version 1 with a frame in each state, two labels, a failure, two versions and an event."""
    path = tmp_path / FILE
    database = sqlite3.connect(path)
    database.execute("PRAGMA journal_mode=WAL")
    database.executescript(VERSION_1)
    for number, state in enumerate(STATES, 1):
        one = frame(number)
        blobs = (one.numbers.tobytes(), one.positions.tobytes(), one.cell.tobytes())
        database.execute("INSERT INTO frames VALUES (?, ?, ?, ?, ?, 0, 5.0)", (number, one.key, *blobs))
        flag = (number, "unix:/s", 7, "uncertain", 0.3, 1, -1.0, one.positions.tobytes())
        database.execute("INSERT INTO flags VALUES (NULL, ?, ?, ?, ?, ?, NULL, ?, ?, ?, 5.0)", flag)
        database.execute("INSERT INTO queue VALUES (?, 'uncertain', ?, 0.5, ?, '')", (number, "train" if number != 2 else "holdout", state))
    for number, seconds in ((1, 30.0), (2, 50.0)):
        database.execute("INSERT INTO tasks VALUES (NULL, ?, 'label-0', 11, 'done', 100.0, ?)", (number, 100.0 + seconds))
        told = (number, energy(number), frame(number + 50).positions.tobytes(), seconds, json.dumps({"cycles": number}))
        database.execute("INSERT INTO labels VALUES (NULL, ?, 'test:a', ?, ?, ?, ?, 6.0)", told)
    database.execute("INSERT INTO tasks VALUES (NULL, 4, 'label-0', 11, 'running', 300.0, NULL)")
    database.execute("INSERT INTO tasks VALUES (NULL, 5, 'label-0', 11, 'failed', 200.0, 220.0)")
    database.execute("INSERT INTO failures VALUES (NULL, 5, 4, 'no convergence', 7.0)")
    database.execute("INSERT INTO versions VALUES (0, 'aa', NULL, 'versions/0', 'served', 0, '{}', 1.0)")
    database.execute("INSERT INTO versions VALUES (1, 'bb', 0, 'versions/1', 'refused', 1, '{\"rmse\": 0.1}', 2.0)")
    database.execute("INSERT INTO events VALUES (NULL, 'swap', '{\"version\": 1}', 3.0)")
    database.execute("PRAGMA user_version = 1")
    database.commit()
    database.close()
    return path


def holds_everything(store: Store) -> None:
    """All that `old` put in is there, and means the same."""
    assert [(one.frame_id, one.frame.key, one.role, one.label.energy, one.id) for one in store.labels("test:a")] == [
        (1, frame(1).key, Role.TRAIN, energy(1), 1),
        (2, frame(2).key, Role.HOLDOUT, energy(2), 2),
    ]
    first = store.labels()[0]
    np.testing.assert_array_equal(first.label.forces, frame(51).positions)
    assert (first.label.details, first.label.seconds, first.label.virial, first.imported) == ({"cycles": 1}, 30.0, None, False)
    counts = {"pending": 1, "running": 1, "converged": 2, "failed": 1, "dropped": 1, "quarantined": 0, "flags": len(STATES)}
    assert store.counts() == counts
    assert store.pending() == [Queued(3, Reason.UNCERTAIN, Role.TRAIN, 0.5)]
    assert [(task.task, task.frame) for task in store.running()] == [(3, 4)]
    assert store.failures() == [(5, "no convergence")]
    assert [(v.number, v.parent, v.state, v.kind, v.metrics) for v in store.versions()] == [
        (0, None, "served", "base", {}),
        (1, 0, "refused", "last-layer", {"rmse": 0.1}),
    ]
    assert store.events("swap") == [{"version": 1}]
    assert [(flag.session, flag.step, flag.version) for flag in store.flags(2)] == [("unix:/s", 7, 1)]
    assert store.spent() == (2, 100.0)


def test_an_old_store_is_brought_up_to_date(old: Path) -> None:
    """Opened for writing, a store of version 1 becomes one of this version with everything in it, once, and is sound."""
    for _ in range(2):
        with Store(old) as store:
            holds_everything(store)
            assert store._db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
            assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert store._db.execute("PRAGMA foreign_key_check").fetchall() == []


def test_an_old_store_has_the_schema_of_a_new_one(old: Path, tmp_path: Path) -> None:
    """Table by table, column by column and index by index an old store is what a new one is."""

    def schema(path: Path) -> list[tuple[str, str]]:
        with Store(path) as store:
            return sorted(store._db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall())

    assert schema(old) == schema(tmp_path / "new.sqlite")


def test_an_old_store_goes_on(old: Path) -> None:
    """What only this version can do is done in an old store: a label is set aside that was stored by the old program."""
    with Store(old) as store:
        assert store.task_lost(3, attempts=3)
        assert store.add_label(store.start_task(3, "label-0", 12), Label(-1.0, np.zeros((3, 3)), "test:a", 2.0))
        assert not store.add_label(store.start_task(1, "label-0", 12), Label(-1.0, np.zeros((3, 3)), "test:a", 2.0))
        store.set_aside(1, "neighbours", "it is far off")
        assert [one.frame_id for one in store.labels()] == [2, 3]
        assert [one.stored.label.energy for one in store.quarantined()] == [energy(1)]


def test_what_is_set_aside_stays_so(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels in the quarantine of a store of version 2 are there in the next ones, with what was measured."""
    monkeypatch.setattr("tumbaga.online.store.database.MIGRATIONS", MIGRATIONS[:2])
    with Store(old) as store:
        store.set_aside(1, "forces", "others say otherwise", {"sigmas": 7.0})
    monkeypatch.undo()
    with Store(old) as store:
        (held,) = store.quarantined()
        assert (held.stored.id, held.check, held.numbers, held.state) == (1, "forces", {"sigmas": 7.0}, "held")
        assert store.take_back(1, "no longer")


def test_reading_changes_nothing(old: Path) -> None:
    """Opened for reading, a store of version 1 shows everything, takes nothing, and its file stays byte by byte."""
    before = old.read_bytes()
    with Store(old, read_only=True) as store:
        holds_everything(store)
        assert store.quarantined() == []
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            store.add_event("swap")

    assert old.read_bytes() == before


@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_store_is_refused(old: Path, read_only: bool) -> None:
    """A store of a later program is left alone, with a sentence that says what to do."""
    Store(old).close()
    database = sqlite3.connect(old)
    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    database.close()

    with pytest.raises(
        StoreError, match=r"has schema version \d+; this program reads up to version \d+: install the tumbaga that wrote it"
    ):
        Store(old, read_only=read_only)


def test_an_empty_file_cannot_be_read_and_becomes_a_store(tmp_path: Path) -> None:
    """A file of no bytes, as a kill before the first transaction leaves it, is named when it is read and a store once it is written."""
    path = tmp_path / FILE
    path.touch()
    with pytest.raises(StoreError, match="is empty"):
        Store(path, read_only=True)
    with Store(path) as store:
        assert store.counts()["flags"] == 0


def test_a_migration_that_fails_leaves_the_old_store(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration is one transaction: where its last statement fails, the file is as the one before left it, and the next try makes it new."""
    broken = (*MIGRATIONS[:-1], MIGRATIONS[-1] + "; CREATE TABLE frames (id INTEGER)")
    monkeypatch.setattr("tumbaga.online.store.database.MIGRATIONS", broken)
    with pytest.raises(StoreError, match="already exists"):
        Store(old)
    monkeypatch.undo()
    database = sqlite3.connect(old)
    assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION - 1,)
    assert database.execute("SELECT COUNT(*) FROM labels").fetchone() == (2,)
    database.close()
    with Store(old) as store:
        holds_everything(store)
