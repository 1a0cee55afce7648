"""The store under SIGKILL and on a full disk: what it accepted is there, what it did not accept left nothing."""

from __future__ import annotations

import errno
import multiprocessing
import resource
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from tumbaga.online.errors import StoreError, StoreFullError, is_full
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Store, StoredVersion

METHOD = "test:a"
KILLS = 40
FORK = multiprocessing.get_context("fork")


def frame(seed: int, n_atoms: int = 3) -> Frame:
    return Frame(np.ones(n_atoms, dtype=int), np.random.default_rng(seed).standard_normal((n_atoms, 3)))


def label(seed: int, n_atoms: int = 3) -> Label:
    return Label(-53210.1 + seed / 3, np.random.default_rng([seed, 1]).standard_normal((n_atoms, 3)), METHOD, 1.0)


def put(store: Store, seed: int, n_atoms: int = 3) -> int:
    """Take a frame through all of its states, one of seven set aside; the frame's id."""
    one = frame(seed, n_atoms)
    number = store.add_flag(
        one, session="s", step=seed, reason=Reason.UNCERTAIN, score=1.0, version=0, energy=0.0, forces=np.zeros((n_atoms, 3))
    )
    store.enqueue(number, Reason.UNCERTAIN, Role.TRAIN, 1.0)
    task = store.start_task(number, "w", 1)
    if seed % 7 == 6:
        store.quarantine(task, label(seed, n_atoms), "neighbours", "far off")
    else:
        store.add_label(task, label(seed, n_atoms))
        store.add_version(StoredVersion(seed + 1, "ab", 0, "f", "accepted", 0, {}), store.label_ids(METHOD))
    return number


def write_for_ever(path: Path, first: int, say: Connection) -> None:
    """Store frame after frame, and say the number of each once it is stored."""
    store = Store(path)
    for seed in range(first, first + 100_000):
        put(store, seed)
        say.send(seed)


@pytest.mark.slow
def test_many_kills_lose_nothing(tmp_path: Path) -> None:
    """Invariant 4: after 40 kills at any instant all that was acknowledged is there, whole, and the file is sound each time."""
    path, rng = tmp_path / FILE, np.random.default_rng(5)
    told: set[int] = set()
    first = 0
    for _ in range(KILLS):
        hear, say = FORK.Pipe(duplex=False)
        writer = FORK.Process(target=write_for_ever, args=(path, first, say))
        writer.start()
        say.close()
        for _ in range(rng.integers(0, 4)):
            told.add(hear.recv())
        until = time.perf_counter() + rng.uniform(0.0, 0.004)
        while time.perf_counter() < until:
            pass
        writer.kill()
        writer.join()
        assert writer.exitcode == -signal.SIGKILL
        try:
            while True:
                told.add(hear.recv())  # what was on its way when the signal came
        except EOFError:
            hear.close()
        with Store(path) as store:
            assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert store._db.execute("PRAGMA foreign_key_check").fetchall() == []
            known = {round(3 * (one.label.energy + 53210.1)): one for one in store.labels(METHOD)}
            aside = {round(3 * (one.stored.label.energy + 53210.1)): one.stored for one in store.quarantined()}
            assert told <= {*known, *aside}
            for task in store.running():
                store.task_lost(task.task, attempts=10**6)
            first = max((flag.step for one in range(1, store.counts()["flags"] + 1) for flag in store.flags(one)), default=-1) + 1

    assert len(told) > KILLS
    for seed, stored in {**known, **aside}.items():
        assert stored.frame.key == frame(seed).key
        np.testing.assert_array_equal(stored.label.forces, label(seed).forces)
    assert all(seed % 7 != 6 for seed in known)
    assert all(seed % 7 == 6 for seed in aside)


def fill(store: Store) -> int:
    """Store frames until there is no room; how many were acknowledged."""
    for seed in range(100_000):
        try:
            put(store, seed, n_atoms=50)
        except StoreFullError:
            return seed
    raise AssertionError("there was room without end")


def test_a_full_store_takes_nothing_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """At any write of a label's way the sentence says so, no transaction stays open, and the same write is taken once there is room."""
    with Store(tmp_path / FILE) as store:
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages + 60}")
        stored = fill(store)
        assert stored > 5
        with pytest.raises(StoreFullError, match="cannot be written: the disk is full"):
            store.add_event("x" * 100_000)
        assert not store._db.in_transaction
        assert len(store.labels()) + len(store.quarantined()) in (stored, stored + 1)
        store._db.execute("PRAGMA max_page_count = 100000")
        put(store, 1000)
        store.add_event("x" * 100_000)
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        labels = {one.label.energy for one in store.labels()}
        assert {label(seed).energy for seed in range(stored) if seed % 7 != 6} <= labels


def _limited(path: Path, say: Connection) -> None:
    """With files of 1 MB at most: fill the store, then lift the limit and go on."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    store = Store(path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    stored = fill(store)
    try:
        (path.parent / "file").write_bytes(b"x" * 1_200_000)
        errno_of_file = 0
    except OSError as error:
        errno_of_file = errno.ENOSPC if is_full(error) else -1
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    put(store, 1000)
    say.send((stored, errno_of_file, store._db.execute("PRAGMA integrity_check").fetchone()[0]))
    store.close()


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """A limit of the system on the size of files is the same: an error of the store, and on with it when the limit is lifted."""
    hear, say = FORK.Pipe(duplex=False)
    writer = FORK.Process(target=_limited, args=(tmp_path / FILE, say))
    writer.start()
    say.close()
    stored, of_file, sound = hear.recv()
    writer.join()

    assert stored > 5
    assert of_file == errno.ENOSPC
    assert sound == "ok"
    with Store(tmp_path / FILE, read_only=True) as store:
        assert len(store.labels()) + len(store.quarantined()) > stored


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
sys.path.insert(0, sys.argv[2])
from test_store_faults import fill, put, StoreFullError
from tumbaga.online.store import FILE, Store
ballast = disk / "ballast"
ballast.write_bytes(b"x" * 1_000_000)
closed = Store(disk / "closed.sqlite")
put(closed, 0)
closed.close()
store = Store(disk / FILE)
stored = fill(store)
with open(disk / "rest", "wb", buffering=0) as rest:
    try:
        while True:
            rest.write(b"x")
    except OSError:
        pass
stored_one = Store(disk / "closed.sqlite", read_only=True)
print(len(stored_one.labels()), end=" ")
stored_one.close()
try:
    Store(disk / "another.sqlite")
    print("another store was made on a full disk")
except StoreFullError:
    pass
ballast.unlink()
(disk / "rest").unlink()
put(store, 1000)
print(stored, len(store.labels()) + len(store.quarantined()), store._db.execute("PRAGMA integrity_check").fetchone()[0])
"""


@pytest.fixture
def own_mounts() -> list[str]:
    """A command that gives a program mounts of its own, which go with it."""
    command = ["unshare", "--map-root-user", "--mount"]
    try:
        able = subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("this system lets nobody mount a small disk (unshare --map-root-user --mount)")
    return command


def test_a_full_disk(tmp_path: Path, own_mounts: list[str]) -> None:
    """On a disk that is really full a store keeps what it took, can be read, and goes on when there is room; none can be made."""
    done = subprocess.run(
        [*own_mounts, sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    closed, stored, there, sound = done.stdout.split()

    assert closed == "1"
    assert int(stored) > 5
    assert int(there) > int(stored)
    assert sound == "ok"


ON_A_READ_ONLY_DISK = """
import subprocess, sys
from pathlib import Path
disk = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from test_store_faults import put
from tumbaga.online.store import FILE, Store
with Store(disk / FILE) as store:
    put(store, 0)
subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
with Store(disk / FILE, read_only=True) as store:
    print(len(store.labels()))
"""


def test_an_archive_can_be_read(tmp_path: Path, own_mounts: list[str]) -> None:
    """A run that lies where nobody can write is read."""
    done = subprocess.run(
        [*own_mounts, sys.executable, "-c", ON_A_READ_ONLY_DISK, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


def test_what_counts_as_full() -> None:
    """No room, no quota and too large a file are a full disk; other faults of a disk are not."""
    assert all(is_full(OSError(number, "")) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert is_full(StoreFullError("store.sqlite"))
    assert not is_full(OSError(errno.EIO, ""))
    assert not is_full(StoreError("store.sqlite", "is gone"))
