"""The store: frames, flags, tasks, labels, failures, versions and events of one run, in SQLite.

Nothing counts before it stands here. One process writes (the learner); others may read at any time (WAL). Every write is one transaction
with synchronous=FULL, so a kill at any instant loses nothing that was accepted. One label a frame and method: paid once, kept for good.
On a full disk a write raises `StoreFullError` and leaves the store as it was; the next one is taken as soon as there is room.

    with Store(run / FILE, read_only=True) as store:
        for one in store.labels(): ...

`database` opens the file, `schema` is what it holds, and the parts stand in `frames`, `queue`, `labels` and `versions`.
"""

from __future__ import annotations

from tumbaga.online.store.frames import StoredFlag
from tumbaga.online.store.labels import Imported, Labels, Quarantined, StoredLabel
from tumbaga.online.store.queue import Queued, RunningTask, Spent
from tumbaga.online.store.schema import SCHEMA_VERSION
from tumbaga.online.store.versions import Audit, Gate, Ramp, StoredVersion, Versions

__all__ = [
    "FILE",
    "SCHEMA_VERSION",
    "Audit",
    "Gate",
    "Imported",
    "Quarantined",
    "Queued",
    "Ramp",
    "RunningTask",
    "Spent",
    "Store",
    "StoredFlag",
    "StoredLabel",
    "StoredVersion",
]

FILE = "store.sqlite"


class Store(Labels, Versions):
    """One run's store."""
