"""The file under the store: opening it, bringing an older one up to date, transactions, a full disk. Knows nothing of frames and labels."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

from tumbaga.online.errors import StoreError, StoreFullError
from tumbaga.online.store.schema import MIGRATIONS, SCHEMA_VERSION, statements

_NO_ROOM: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)


class Database:
    """One run's SQLite file.

    Args:
        path: the file; made when missing, and brought to this program's schema when it is older.
        clock: gives the time stamps, seconds since the epoch.
        read_only: open for reading only; a missing file is an error then, and of an older one a copy in memory is brought up to date.

    Raises:
        StoreError: the file is not a store of this program, is one of a newer program, or cannot be opened.
        StoreFullError: the disk is full.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time, *, read_only: bool = False) -> None:
        self._path, self._clock = path, clock
        with self._mapped("cannot be opened as a store"):
            self._db = self._connected("ro" if read_only else "rwc")
        try:
            with self._mapped("cannot be opened as a store"):
                self._prepare(read_only)
        except StoreError:
            self._db.close()
            raise

    def _connected(self, mode: str) -> sqlite3.Connection:
        uri = f"{self._path.resolve().as_uri()}?mode={mode}"
        found = sqlite3.connect(uri, uri=True, isolation_level=None)
        if mode == "ro" and self._path.exists():
            try:
                found.execute("PRAGMA user_version")
            except sqlite3.OperationalError:
                found.close()
                log = self._path.with_name(self._path.name + "-wal")
                if log.exists() and log.stat().st_size:
                    raise
                # a reader puts a small file beside the store, which a full or read-only disk does not take; and nobody writes to it now
                found = sqlite3.connect(f"{uri}&immutable=1", uri=True, isolation_level=None)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, read_only: bool) -> None:
        version = self._checked_version()
        if read_only:
            if version == 0:
                raise StoreError(str(self._path), "is empty; it becomes a store when its run starts")
            if version < SCHEMA_VERSION:
                self._copy_to_memory()
                self._migrate()
            self._db.execute("PRAGMA query_only=ON")
            return
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        if version < SCHEMA_VERSION:
            self._migrate()
        self._db.execute("PRAGMA foreign_keys=ON")  # after the migrations: they make tables anew that others refer to

    def _checked_version(self) -> int:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version == 0 and self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            raise StoreError(str(self._path), "is a database of another program")
        if not 0 <= version <= SCHEMA_VERSION:
            told = f"has schema version {version}; this program reads up to version {SCHEMA_VERSION}: install the tumbaga that wrote it, or a newer one"
            raise StoreError(str(self._path), told)
        return version

    def _copy_to_memory(self) -> None:
        """Nobody may change a file that was opened for reading: its rows are brought up to date in a copy."""
        copy = sqlite3.connect(":memory:", isolation_level=None)
        self._db.backup(copy)
        self._db.close()
        self._db = copy

    def _migrate(self) -> None:
        for number, migration in enumerate(MIGRATIONS, 1):
            with self._write():
                if self._checked_version() >= number:
                    continue  # asked within the transaction: another process may have been first
                for statement in statements(migration):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {number}")

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        """Errors of SQLite become errors of the store."""
        try:
            yield
        except sqlite3.Error as error:
            if no_room(error):
                raise StoreFullError(str(self._path)) from error
            raise StoreError(str(self._path), f"{what} ({error})") from error

    @contextmanager
    def _write(self) -> Iterator[None]:
        """One transaction: all of it or nothing.

        Raises:
            StoreFullError: there is no room for it.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite itself goes back on some errors, a full disk among them
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            if no_room(error):
                raise StoreFullError(str(self._path)) from error
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # -- notes of the run as a whole -------------------------------------------------------------------------------------------------

    def get_meta(self, key: str) -> str | None:
        """A note by its key; None if there is none."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str | None) -> None:
        """Keep a note; None takes it away."""
        with self._write():
            if value is None:
                self._db.execute("DELETE FROM meta WHERE key = ?", (key,))
            else:
                self._db.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value))

    def _one(self, query: str, values: tuple[Any, ...], missing: str) -> Any:
        """The only column of the only row of a query.

        Raises:
            StoreError: there is no such row; `missing` says which.
        """
        row = self._db.execute(query, values).fetchone()
        if row is None:
            raise StoreError(str(self._path), missing)
        return row[0]


def no_room(error: sqlite3.Error) -> bool:
    """Whether SQLite failed because the disk, the quota or the file's limit is full."""
    return getattr(error, "sqlite_errorcode", None) in _NO_ROOM
