"""No foreign peer can hang, poison or slow tumbaga: each misdeed ends that session with a sentence, and the one beside it notices nothing.

What it does to the times of the session beside it is measured by `benchmarks/hostile.py`, which commits the same misdeeds.
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tumbaga.driver.testing import until

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _hostile_clients as hostile_clients
import _hostile_engines as hostile_engines
from _hostile_peers import Deeds, Misdeed
from _hostile_subjects import Daemon, Pool

TIMEOUT = 30.0
LIMIT = 0.5  # s, for everything that peers may take their time for


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder with a name short enough for sockets; nothing is left in it that belongs to a socket."""
    with tempfile.TemporaryDirectory(prefix="tumbaga-") as made:
        yield Path(made)
        assert [path for path in Path(made).iterdir() if path.is_socket()] == []


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[tuple[Daemon, hostile_engines.Host]]:
    """One daemon for all misdeeds of engines: what one of them leaves behind is there for the next."""
    made = Daemon(folder, LIMIT, LIMIT)
    with hostile_engines.Host(*made.where) as host, made:
        host.rest()
        yield made, host
        assert made.program.stop() == 0, made.program.output
    assert made.program.left_behind() == []


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[Pool]:
    """One pool for all misdeeds of clients."""
    with Pool(folder, LIMIT) as made:
        yield made


def marked(misdeeds: tuple[Misdeed, ...]) -> list[object]:
    """The core always, all others where slow tests are run."""
    return [pytest.param(one, id=one.name, marks=() if one.core else pytest.mark.slow) for one in misdeeds]


def drill(subject: Daemon | Pool, commit: Callable[[str, float], Deeds], misdeed: Misdeed) -> None:
    """Commit a misdeed once while the good session goes on; every answer to that one is right, to the last bit."""
    subject.call()
    before = subject.descriptors()
    subject.prepare(misdeed)
    committed: list[Deeds] = []
    thread = threading.Thread(target=lambda: committed.append(commit(misdeed.name, 0.0)), name="hostile")
    thread.start()

    def found() -> list[str]:
        subject.call()
        return [said for said in subject.told() if re.search(misdeed.sentence, said)]

    try:
        while thread.is_alive():
            subject.call()
        until(found, TIMEOUT, f"a sentence like {misdeed.sentence!r} after {misdeed.name}", lambda: "")
    except TimeoutError as error:
        raise AssertionError(f"{error}; it was said: {subject.told()}") from None
    finally:
        thread.join(TIMEOUT)
    assert committed, "the hostile peer itself failed"
    assert (committed[0].unended, committed[0].trouble) == (0, "")
    until(lambda: subject.call() and subject.descriptors() <= before, TIMEOUT, f"{before} open files again")


@pytest.mark.parametrize("misdeed", marked(hostile_engines.MISDEEDS))
def test_an_engine_that_misbehaves(misdeed: Misdeed, daemon: tuple[Daemon, hostile_engines.Host]) -> None:
    """The session ends with the sentence, the same address is served again afterwards, and the engine beside it gets its forces."""
    subject, host = daemon
    drill(subject, host.commit, misdeed)

    status = subject.program.status()
    assert status["state"] == "running"
    assert status["pids"]["gateway"] == subject.gateway
    assert "given up" not in [session["state"] for session in status["sessions"]]


def test_an_engine_that_says_nothing_is_served_when_it_speaks(daemon: tuple[Daemon, hostile_engines.Host]) -> None:
    """i-PI takes a connection late when it is busy: silence costs nothing and ends nothing."""
    subject, host = daemon
    done = host.commit(hostile_engines.SILENCE, 2 * LIMIT)

    assert (done.times, done.unended, done.trouble) == (1, 0, "")
    subject.call()


@pytest.mark.parametrize("misdeed", marked(hostile_clients.MISDEEDS))
def test_a_client_that_misbehaves(misdeed: Misdeed, pool: Pool) -> None:
    """The client ends with the sentence, and the one beside it goes on computing."""
    drill(pool, hostile_clients.Crowd(*pool.where).commit, misdeed)
    until(lambda: pool.call() and pool.clients.connected == 1, TIMEOUT, "the good client to be alone")
