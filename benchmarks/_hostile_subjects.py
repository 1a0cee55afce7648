"""What is drilled: the daemon with engines, a pool with clients; each with one well-behaved peer whose calls are timed and checked."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol, Self

import _hostile_clients as hostile_clients
import _hostile_engines as hostile_engines
import numpy as np
from _hostile_peers import Misdeed

from tumbaga.driver import config as configs
from tumbaga.driver.testing import Program
from tumbaga.socket_protocol.clients import ClientLimits, Clients
from tumbaga.socket_protocol.events import PosData
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine

MODEL = "toy:lj?epsilon=0.05&sigma=2.2"
_FRAMES = 4  # different ones, in turn
_AT_ONCE = 1.0  # s: what needs no waiting, on a machine that is busy
_CHORES = 1.5  # s: the gateway looks at limits every 0.5 s, and is called again after a pause


class Subject(Protocol):
    """What a drill needs of the side under test."""

    role: str
    where: tuple[Address, Address]
    misdeeds: tuple[Misdeed, ...]

    def call(self) -> float:
        """Have the well-behaved peer do one force, check it bit for bit, and return the seconds it took."""

    def prepare(self, misdeed: Misdeed) -> None:
        """A drill begins: what is said from now on belongs to it."""

    def told(self) -> list[str]:
        """All sentences about sessions that have ended since then."""

    def bound(self, misdeed: Misdeed) -> float:
        """Seconds within which a misdeed must have been ended."""

    def descriptors(self) -> int:
        """How many files the side under test has open."""

    def peak(self) -> float:
        """The most memory that it has had so far, MiB."""


class WrongNumbersError(Exception):
    """The well-behaved peer got other numbers than before."""


def _peak(pid: int | str) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found.group(1)) / 1024


def free_port() -> int:
    """A port that nobody listens at."""
    with listen(Address.tcp("127.0.0.1", 0)) as free:
        return free.address.port


class Daemon:
    """`tumbaga serve` with three addresses: a good engine's and two hostile ones. Have the hostile side listen first, or soon.

    Args:
        folder: an empty one.
        message: serve.message_seconds.
        unread: serve.unread_seconds.
    """

    role = "engine"
    misdeeds = hostile_engines.MISDEEDS

    def __init__(self, folder: Path, message: float = 1.0, unread: float = 1.0) -> None:
        self.run_dir, self._good = folder / "run", Address.unix(str(folder / "good"))
        self.where = Address.tcp("127.0.0.1", free_port()), Address.unix(str(folder / "bad"))
        self._limits = {"": _AT_ONCE, "message": message + _CHORES, "unread": unread + 2 * _CHORES}
        self._settings(folder, message, unread)
        self._frames = [hostile_engines.positions(100 + seed) for seed in range(_FRAMES)]
        self._answers: list[bytes] = []
        self._calls = self._said = 0
        self._stack = contextlib.ExitStack()

    def _settings(self, folder: Path, message: float, unread: float) -> None:
        rows = hostile_engines.positions() / hostile_engines.BOHR
        atoms = "\n".join(f"Cu {x:.6f} {y:.6f} {z:.6f}" for x, y, z in rows)
        (folder / "cluster.xyz").write_text(f"{len(rows)}\n\n{atoms}\n")
        connect = tuple(str(address) for address in (self._good, *self.where))
        serve = configs.Serve(connect=connect, prefix="", message_seconds=message, unread_seconds=unread)
        potential = configs.Potential(model=MODEL, template=str(folder / "cluster.xyz"))
        self.run_dir.mkdir()
        (self.run_dir / configs.FILE).write_text(configs.dumps(configs.Config(serve=serve, potential=potential)))

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(listen(self._good))
            scratch = self.run_dir.with_name("scratch")
            self.program = stack.enter_context(Program(self.run_dir, "serve", "--no-learn", "--quiet", scratch=scratch))
            self.engine = stack.enter_context(BlockingEngine.accept(listener, "pipelined"))
            self._answers = [self._answer(index) for index in range(_FRAMES)]
            self.gateway = self.program.until(lambda status: status["state"] == "running", "the daemon")["pids"]["gateway"]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _answer(self, index: int) -> bytes:
        got = self.engine.forces(self._frames[index])
        return b"".join((np.float64(got.energy).tobytes(), got.forces.tobytes(), got.virial.tobytes()))

    def call(self) -> float:
        """See `Subject`."""
        self._calls += 1
        index = self._calls % _FRAMES
        began = time.perf_counter()
        answer = self._answer(index)
        seconds = time.perf_counter() - began
        if answer != self._answers[index]:
            raise WrongNumbersError(f"frame {index} got other numbers than at first")
        return seconds

    def _log(self) -> Path:
        return self.run_dir / "log" / "gateway.jsonl"

    def prepare(self, misdeed: Misdeed) -> None:
        """See `Subject`."""
        self._said = self._log().stat().st_size

    def told(self) -> list[str]:
        """See `Subject`."""
        with open(self._log(), "rb") as file:
            file.seek(self._said)
            whole, _, _ = file.read().rpartition(b"\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        return [line["fault"] or line["left"] for line in lines if line["event"] == "session ended"]

    def bound(self, misdeed: Misdeed) -> float:
        """See `Subject`."""
        return self._limits[misdeed.limit]

    def descriptors(self) -> int:
        """See `Subject`."""
        return len(os.listdir(f"/proc/{self.gateway}/fd"))

    def peak(self) -> float:
        """See `Subject`."""
        return _peak(self.gateway)


class _Sentences(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Pool:
    """`Clients` in this process, a good client in another. Frames of another size are bait: the good client gets none of them.

    Args:
        folder: an empty one.
        limit: seconds for everything a client may take its time for; twice that for a job.
    """

    role = "client"
    misdeeds = hostile_clients.MISDEEDS

    def __init__(self, folder: Path, limit: float = 1.0) -> None:
        self._limits = {"": _AT_ONCE, "job": 2 * limit + _AT_ONCE, **dict.fromkeys(("ready", "message", "reading"), limit + _AT_ONCE)}
        # the door must not slow down what is drilled one by one, and still close before a flood
        limits = ClientLimits(ready=limit, job=2 * limit, message=limit, reading=limit, farewell=0.5, clients=16, newcomers=20)
        self.clients = Clients([Address.tcp("127.0.0.1", 0), Address.unix(str(folder / "pool"))], limits=limits)
        self.where = (self.clients.addresses[0], self.clients.addresses[1])
        self._sentences, self._log = _Sentences(), logging.getLogger("tumbaga.socket_protocol")
        rng = np.random.default_rng(0)
        self._frames = [self._frame(hostile_clients.ATOMS + 1, rng) for _ in range(_FRAMES)]
        self._small, self._large = self._frame(hostile_clients.ATOMS, rng), self._frame(hostile_clients.LARGE, rng)
        self._bait = self._small
        self._baits: set[int] = set()
        self._calls = 0

    @staticmethod
    def _frame(atoms: int, rng: np.random.Generator) -> PosData:
        return PosData(np.diag([50.0, 51.0, 52.0]), rng.normal(size=(atoms, 3)))

    def __enter__(self) -> Self:
        self._log.addHandler(self._sentences)
        self._level = self._log.level
        self._log.setLevel(logging.INFO)
        program = [sys.executable, str(Path(hostile_clients.__file__).with_name("_hostile_peers.py")), "good", str(self.where[0])]
        self._client = subprocess.Popen(program)
        while self.clients.free == 0:
            self.clients.turn(0.1)
        self.clients.forces(self._frames[0], timeout=30.0)  # from now on it gets frames of this size only
        return self

    def __exit__(self, *_: object) -> None:
        self.clients.close()
        self._client.wait(10.0)
        self._log.removeHandler(self._sentences)
        self._log.setLevel(self._level)

    def call(self) -> float:
        """See `Subject`."""
        self._calls += 1
        frame = self._frames[self._calls % _FRAMES]
        if self._baits and not self.clients.waiting:
            self._baits.add(self.clients.submit(self._bait))
        began = time.perf_counter()
        ticket = self.clients.submit(frame)
        while not (ended := [done for done in self.clients.turn(1.0) if done.ticket == ticket]):
            pass
        seconds = time.perf_counter() - began
        result = ended[0].result
        if result is None or not np.array_equal(result.forces, -frame.positions) or result.energy != float(frame.positions.sum()):
            raise WrongNumbersError(ended[0].problem or "the numbers are of another frame")
        return seconds

    def prepare(self, misdeed: Misdeed) -> None:
        """See `Subject`."""
        self._sentences.lines.clear()
        for ticket in self._baits:
            self.clients.withdraw(ticket)
        self._bait = self._large if misdeed.unix else self._small
        self._baits = {self.clients.submit(self._bait)}

    def told(self) -> list[str]:
        """See `Subject`."""
        return [line for line in self._sentences.lines if " ended: " in line or line.startswith("refused ")]

    def bound(self, misdeed: Misdeed) -> float:
        """See `Subject`."""
        return self._limits[misdeed.limit]

    def descriptors(self) -> int:
        """See `Subject`; hostile clients count until they are noticed to be gone."""
        return len(os.listdir("/proc/self/fd"))

    def peak(self) -> float:
        """See `Subject`."""
        return _peak("self")
