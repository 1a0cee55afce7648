"""The schema of the store and how an older one becomes it: a numbered list of migrations, each one transaction.

A migration is never changed once a release has written it; what comes later is a new one at the end of the list.
"""

from __future__ import annotations

from typing import Final

_FIRST: Final = """
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
CREATE TABLE events (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, detail TEXT NOT NULL, created REAL NOT NULL)
"""

# SQLite cannot change a CHECK or a UNIQUE: such tables are made anew, and their rows moved with their numbers
_TRUST: Final = """
CREATE TABLE queue_2 (
  frame INTEGER PRIMARY KEY REFERENCES frames, reason TEXT NOT NULL, role TEXT NOT NULL, priority REAL NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('pending', 'running', 'labelled', 'failed', 'dropped', 'quarantined')),
  note TEXT NOT NULL DEFAULT '', strategy TEXT NOT NULL DEFAULT '');
INSERT INTO queue_2 (frame, reason, role, priority, state, note) SELECT frame, reason, role, priority, state, note FROM queue ORDER BY rowid;
DROP TABLE queue;
ALTER TABLE queue_2 RENAME TO queue;
CREATE INDEX queue_state ON queue (state);

ALTER TABLE tasks ADD COLUMN cores REAL NOT NULL DEFAULT 1.0;
ALTER TABLE tasks ADD COLUMN seconds REAL;
UPDATE tasks SET seconds = ended - started WHERE ended IS NOT NULL;

CREATE TABLE labels_2 (
  id INTEGER PRIMARY KEY, frame INTEGER NOT NULL REFERENCES frames, task INTEGER REFERENCES tasks, method TEXT NOT NULL,
  energy REAL NOT NULL, forces BLOB NOT NULL, virial BLOB, seconds REAL NOT NULL, details TEXT NOT NULL,
  aside INTEGER NOT NULL DEFAULT 0, imported INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL);
INSERT INTO labels_2 (id, frame, task, method, energy, forces, seconds, details, created)
  SELECT id, frame, (SELECT MAX(tasks.id) FROM tasks WHERE tasks.frame = labels.frame AND tasks.state = 'done'),
  method, energy, forces, seconds, details, created FROM labels ORDER BY id;
DROP TABLE labels;
ALTER TABLE labels_2 RENAME TO labels;
CREATE UNIQUE INDEX labels_one ON labels (frame, method) WHERE aside = 0;
CREATE INDEX labels_frame ON labels (frame);
CREATE INDEX labels_task ON labels (task);
CREATE TABLE quarantine (
  id INTEGER PRIMARY KEY, label INTEGER NOT NULL REFERENCES labels, check_name TEXT NOT NULL, reason TEXT NOT NULL, numbers TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('held', 'retried', 'released')), strategy TEXT NOT NULL DEFAULT '', created REAL NOT NULL, ended REAL);
CREATE INDEX quarantine_label ON quarantine (label);

CREATE TABLE versions_2 (
  number INTEGER PRIMARY KEY, hash TEXT NOT NULL, parent INTEGER, file TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('candidate', 'accepted', 'served', 'refused', 'withdrawn')),
  kind TEXT NOT NULL CHECK (kind IN ('base', 'last-layer', 'fine-tune', 'rollback')), network TEXT NOT NULL DEFAULT '',
  labels INTEGER NOT NULL, metrics TEXT NOT NULL, created REAL NOT NULL);
INSERT INTO versions_2 (number, hash, parent, file, state, kind, labels, metrics, created)
  SELECT number, hash, parent, file, state, CASE WHEN parent IS NULL THEN 'base' ELSE 'last-layer' END, labels, metrics, created
  FROM versions ORDER BY number;
DROP TABLE versions;
ALTER TABLE versions_2 RENAME TO versions;
CREATE TABLE version_labels (
  version INTEGER NOT NULL REFERENCES versions, label INTEGER NOT NULL REFERENCES labels, PRIMARY KEY (version, label)) WITHOUT ROWID;
CREATE TABLE gates (
  id INTEGER PRIMARY KEY, version INTEGER NOT NULL REFERENCES versions, check_name TEXT NOT NULL, passed INTEGER NOT NULL,
  reason TEXT NOT NULL, numbers TEXT NOT NULL, created REAL NOT NULL);
CREATE INDEX gates_version ON gates (version);
CREATE TABLE ramps (
  id INTEGER PRIMARY KEY, session TEXT NOT NULL, from_version INTEGER NOT NULL, to_version INTEGER NOT NULL,
  first_step INTEGER NOT NULL, last_step INTEGER, work_ev REAL, created REAL NOT NULL);
CREATE INDEX ramps_session ON ramps (session, first_step);
CREATE TABLE audits (
  id INTEGER PRIMARY KEY, frame INTEGER NOT NULL REFERENCES frames, label INTEGER NOT NULL REFERENCES labels, version INTEGER NOT NULL,
  force_rmse REAL NOT NULL, force_max REAL NOT NULL, ratio REAL NOT NULL, promised REAL NOT NULL, numbers TEXT NOT NULL, created REAL NOT NULL);
CREATE INDEX flags_frame ON flags (frame)
"""

# labels that were set aside may come back by themselves
_TAKEN_BACK: Final = """
CREATE TABLE quarantine_2 (
  id INTEGER PRIMARY KEY, label INTEGER NOT NULL REFERENCES labels, check_name TEXT NOT NULL, reason TEXT NOT NULL, numbers TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('held', 'retried', 'released', 'returned')), strategy TEXT NOT NULL DEFAULT '', created REAL NOT NULL,
  ended REAL);
INSERT INTO quarantine_2 SELECT id, label, check_name, reason, numbers, state, strategy, created, ended FROM quarantine ORDER BY id;
DROP TABLE quarantine;
ALTER TABLE quarantine_2 RENAME TO quarantine;
CREATE INDEX quarantine_label ON quarantine (label)
"""

MIGRATIONS: Final = (_FIRST, _TRUST, _TAKEN_BACK)  # the n-th makes a store of schema version n + 1 out of one of version n
SCHEMA_VERSION: Final = len(MIGRATIONS)


def statements(migration: str) -> list[str]:
    """The statements of a migration, in order; none holds a semicolon in itself."""
    return [one.strip() for one in migration.split(";")]
