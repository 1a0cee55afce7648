"""The engines of the soak: one that asks back to back for as long as it is told to, as a process of its own, and short sessions of all kinds.

`python _soak_engines.py ADDRESS STRUCTURE CALLS` listens, serves itself of whoever dials, and says how it goes in lines of JSON, a few times
a second. After CALLS calls, or at a first line on standard input, it says so and stays connected; at the end of its input it leaves.
"""

from __future__ import annotations

import itertools
import json
import select
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import ase.io
import numpy as np
from ase.units import Bohr

from tumbaga.socket_protocol.streams import Address, Listener
from tumbaga.socket_protocol.testing import BlockingEngine, accept

SHAKE = 0.03 / Bohr  # every frame is another one, or there would be nothing new to label
_WINDOW_S = 0.25
_HEAD = 24  # FORCEREADY, energy, number of atoms
_PATIENCE_S = 60.0
_HALF = b"POSDATA     " + bytes(2)  # in every dialect


@dataclass(frozen=True)
class Window:
    """Some calls of one engine in a row.

    Attributes:
        began: seconds on the system's clock of intervals.
        ended: the same.
        calls: answered.
        longest: seconds of the longest.
        infinite: answers with a number that is not finite.
    """

    began: float
    ended: float
    calls: int
    longest: float
    infinite: int


class RawEngine:
    """Asks for frames in one write each and checks what comes; no event, no state, so that it costs little beside what it measures.

    Args:
        sock: connected to a driver.
        positions: of the structure, Bohr.
    """

    def __init__(self, sock: socket.socket, positions: np.ndarray) -> None:
        self._socket, self._positions, self._random = sock, positions, np.random.default_rng(0)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._before = b"POSDATA     " + bytes(144) + len(positions).to_bytes(4, "little")
        self._answer = memoryview(bytearray(_HEAD + 24 * len(positions) + 72 + 4))
        self._extras = memoryview(bytearray(1 << 16))

    def shake_hands(self) -> None:
        """Lead the driver to READY."""
        for said, expected in (
            (b"STATUS      ", b"NEEDINIT    "),
            (b"INIT        " + bytes(4) + (1).to_bytes(4, "little") + b" STATUS      ", b"READY       "),
        ):
            self._socket.sendall(said)
            if (told := self._socket.recv(12, socket.MSG_WAITALL)) != expected:
                raise ConnectionError(f"the driver said {told!r} instead of {expected!r}")

    def call(self) -> tuple[float, bool]:
        """One new frame; return the seconds it took, and whether all of the answer was finite."""
        frame = self._positions + SHAKE * self._random.standard_normal(self._positions.shape)
        asked = b"".join((self._before, frame.tobytes(), b"GETFORCE    "))
        began = time.perf_counter()
        self._socket.sendall(asked)
        self._fill(self._answer)
        self._fill(self._extras[: int.from_bytes(self._answer[-4:], "little")])
        seconds = time.perf_counter() - began
        energy = np.frombuffer(self._answer, np.float64, 1, 12)
        rest = np.frombuffer(self._answer, np.float64, 3 * len(frame) + 9, _HEAD)
        return seconds, bool(np.isfinite(energy).all() and np.isfinite(rest).all())

    def _fill(self, view: memoryview) -> None:
        got = 0
        while got < len(view):
            if not (count := self._socket.recv_into(view[got:])):
                raise ConnectionError("the driver is gone")
            got += count


def _told() -> bool:
    return bool(select.select([sys.stdin], [], [], 0.0)[0])


def load(engine: RawEngine, calls: int) -> None:
    """Ask until all is done or something comes in, and tell of each stretch of it."""
    left = calls
    while left and not _told():
        began, done, longest, infinite = time.monotonic(), 0, 0.0, 0
        while done < left and time.monotonic() - began < _WINDOW_S:
            seconds, finite = engine.call()
            done, longest, infinite = done + 1, max(longest, seconds), infinite + (not finite)
        left -= done
        print(json.dumps(asdict(Window(began, time.monotonic(), done, longest, infinite))), flush=True)


class Load:
    """Such an engine, in its process.

    Args:
        address: where it listens.
        structure: file with its atoms.
        calls: after which it rests.
    """

    def __init__(self, address: Address, structure: Path, calls: int) -> None:
        program = [sys.executable, __file__, str(address), str(structure), str(calls)]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.windows: list[Window] = []
        self._reader = threading.Thread(target=self._read, name=f"load-{address}")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.windows.append(Window(**json.loads(line)))

    @property
    def calls(self) -> int:
        """Answered so far."""
        return sum(window.calls for window in list(self.windows))

    @property
    def gone(self) -> bool:
        """Whether it has ended, which it does not by itself unless its driver is gone."""
        return self._process.poll() is not None

    def rest(self) -> None:
        """Have it ask no more."""
        assert self._process.stdin is not None
        print("rest", file=self._process.stdin, flush=True)

    def close(self) -> None:
        """Have it leave."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()


Ending = Literal["EXIT", "closed socket", "half a message"]
ENDINGS: tuple[Ending, ...] = ("EXIT", "closed socket", "half a message")


class Brief:
    """Sessions that are opened, served and ended in every way, one after the other, over each socket in turn.

    Args:
        listeners: where the server dials; the last is for shared memory.
        positions: of the structure, Bohr.
    """

    CALLS = 3

    def __init__(self, listeners: tuple[Listener, ...], positions: np.ndarray) -> None:
        self._kinds = itertools.cycle([(where, end) for end in ENDINGS for where in listeners])
        self._shared, self._positions, self._random = listeners[-1], positions, np.random.default_rng(1)
        self._tag = f"ipi_shm_soak{uuid.uuid4().hex[:12]}_"
        self.sessions = self.infinite = 0

    @property
    def left_in_memory(self) -> list[str]:
        """Names of shared memory that is still there."""
        return [path.name for path in Path("/dev/shm").glob(f"{self._tag}*")]

    def one(self) -> None:
        """Open, use and end a session."""
        listener, ending = next(self._kinds)
        self.sessions += 1
        stream = accept(listener, _PATIENCE_S)
        shared = f"{self._tag}{self.sessions}_" if listener is self._shared else ""
        engine = BlockingEngine(stream, "pipelined" if self.sessions % 2 else "classic", shared=shared)
        with engine:
            for _ in range(self.CALLS):
                frame = self._positions + SHAKE * self._random.standard_normal(self._positions.shape)
                got = engine.forces(frame)
                self.infinite += not (np.isfinite(got.energy) and np.isfinite(got.forces).all() and np.isfinite(got.virial).all())
            if ending == "half a message":
                stream.send(_HALF)
            if ending != "EXIT":
                engine.connection.close()
                stream.close()


def bohr(structure: Path) -> np.ndarray:
    """Positions of a structure file."""
    positions: np.ndarray = ase.io.read(structure).positions / Bohr
    return positions


def listening(address: Address) -> socket.socket:
    """A socket that listens and waits a minute for whoever dials."""
    sock = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET)
    if not address.path:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address.path or (address.host, address.port))
    sock.listen()
    sock.settimeout(_PATIENCE_S)
    return sock


def main() -> None:
    where, structure, calls = sys.argv[1:]
    with listening(Address.parse(where)) as sock:
        peer, _ = sock.accept()
    with peer:
        peer.settimeout(None)  # a limit would cost a system call each time
        engine = RawEngine(peer, bohr(Path(structure)))
        engine.shake_hands()
        load(engine, int(calls))
        sys.stdin.read()
        peer.sendall(b"EXIT        ")


if __name__ == "__main__":
    main()
