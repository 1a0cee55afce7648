"""Raw engines for overhead.py and tenants.py: a socket, one write and one read for each frame, and no work of their own in between.

Their systems are small metal clusters in water, which is what the embedded potential knows: of metal alone, from 38 atoms on, it makes forces
that the server refuses to hand out. Requests are made beforehand, and the atoms of each differ a little from those of the one before, as in
a simulation: nobody can answer from memory.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase
import ase.units
import numpy as np
import numpy.typing as npt
from _answerers import Place, answering
from _floor_driver import reply, request_size
from _wire_engines import raw_listener
from ase.io import write
from embedded import random_cluster

from tumbaga.driver import units

Array = npt.NDArray[np.float64]
Where = list[tuple[Place, ase.Atoms, list[Array]]]
"""Of each engine: where it listens, its structure, and the positions that it asks for in turn, Å."""

PATIENCE_S = 180.0
"""For anybody to start: sixteen processes that import torch at once on two cores take most of a minute."""
SYSTEMS = {13: (2, 2, 3), 20: (2, 3, 5), 38: (3, 5, 10), 55: (3, 7, 15), 147: (2, 4, 47)}
"""Cu, Au and waters, by the number of atoms."""
_MOVED, _FRAMES = 0.02, 16  # Å; different frames, in turn
_EXTRAS = 4096  # bytes of extras that fit into one read; more are an error
_FORCES_AT = 24  # in a FORCEREADY: behind its word, the energy and the number of atoms
_LAST_WORDS = 500
_READ = struct.pack("ll", int(PATIENCE_S), 0)  # a timeval


def system(size: int, seed: int = 0) -> ase.Atoms:
    """A compact random cluster of so many atoms, in the box that i-PI insists on."""
    numbers, positions = random_cluster(*SYSTEMS[size], np.random.default_rng(seed))
    atoms = ase.Atoms(numbers, positions, cell=[40.0] * 3)
    atoms.center()
    return atoms


def moved(atoms: ase.Atoms, seed: int = 0) -> list[Array]:
    """Positions of the frames that an engine asks for in turn, shape (n_atoms, 3), Å."""
    rng = np.random.default_rng(seed)
    return [atoms.positions + rng.normal(scale=_MOVED, size=(len(atoms), 3)) for _ in range(_FRAMES)]


def request(cell: Array, positions: Array) -> bytes:
    """POSDATA and GETFORCE in one write; cell and positions in Å."""
    rows = cell / ase.units.Bohr
    numbers = (rows.T.tobytes(), np.linalg.inv(rows.T).tobytes(), np.int32(len(positions)).tobytes())
    made = b"".join((b"POSDATA     ", *numbers, (positions / ase.units.Bohr).tobytes(), b"GETFORCE    "))
    assert len(made) == request_size(len(positions))
    return made


class RawEngine:
    """One connection to whoever answers.

    Args:
        peer: that has dialled in.
        atoms: the structure; its cell goes into the requests.
        frames: positions that are asked for in turn, Å.
        handshake: whether the answerer is a real driver, which wants STATUS and INIT first.
    """

    def __init__(self, peer: socket.socket, atoms: ase.Atoms, frames: Sequence[Array], *, handshake: bool = True) -> None:
        self._peer = peer
        self._requests = [request(atoms.cell.array, positions) for positions in frames]
        self._fixed = len(reply(len(atoms)))
        self._answer = memoryview(bytearray(self._fixed + _EXTRAS))
        self._got = self._asked = 0
        # by the kernel: a limit of Python's own would cost a system call each time
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _READ)
        if handshake:
            self._expect(b"STATUS      ", b"NEEDINIT    ")
            self._expect(b"INIT        " + bytes(4) + (1).to_bytes(4, "little") + b" STATUS      ", b"READY       ")

    def _expect(self, said: bytes, expected: bytes) -> None:
        self._peer.sendall(said)
        if (told := self._peer.recv(12, socket.MSG_WAITALL)) != expected:
            raise ConnectionError(f"the answerer said {told!r} instead of {expected!r}")

    def fileno(self) -> int:
        """What to wait for."""
        return self._peer.fileno()

    def begin_again(self) -> None:
        """Ask for the first frame next."""
        self._asked = 0

    def ask(self) -> None:
        """Send the next frame."""
        self._got = 0
        self._peer.sendall(self._requests[self._asked % len(self._requests)])
        self._asked += 1

    def take(self) -> bool:
        """Read once, which waits if nothing is there; return whether the answer is whole.

        Raises:
            ConnectionError: the answerer is gone, or sent something else.
        """
        count = self._peer.recv_into(self._answer[self._got :])
        if not count:
            raise ConnectionError("the answerer is gone, or sent more extras than there is room for")
        self._got += count
        if self._got < self._fixed:
            return False
        if bytes(self._answer[:10]) != b"FORCEREADY":
            raise ConnectionError(f"the answerer sent {bytes(self._answer[:12])!r} where FORCEREADY was expected")
        return self._got >= self._fixed + int.from_bytes(self._answer[self._fixed - 4 : self._fixed], "little")

    def call(self) -> float:
        """Ask, wait for the whole answer, and return the seconds that this took."""
        began = time.perf_counter()
        self.ask()
        while not self.take():
            pass
        return time.perf_counter() - began

    def leave(self) -> None:
        """Say goodbye, if somebody is there to hear it."""
        with contextlib.suppress(OSError):
            self._peer.sendall(b"EXIT        ")

    def forces(self) -> Array:
        """Those of the last answer, shape (n_atoms, 3), eV/Å."""
        end = self._fixed - 72 - 4
        return units.forces_from_wire(np.frombuffer(self._answer[_FORCES_AT:end], np.float64).reshape(-1, 3))


def place(folder: Path, name: str, atoms: ase.Atoms) -> Place:
    """A folder of its own for one engine, with a unix socket and a structure file: a cluster, whatever box the engine has around it."""
    here = folder / name
    here.mkdir()
    write(here / "atoms.xyz", ase.Atoms(atoms.symbols, atoms.positions))
    return Place(here, "unix", 0, "engine", f"{here}/", here / "atoms.xyz", len(atoms))


def run_dir(where: Where) -> Path:
    """That of a server for these engines."""
    return where[0][0].folder / "run"


def server(model: str, where: Where, device: str = "auto") -> list[str]:
    """One server for all these engines, as users start it: supervisor, gateway, an evaluator for each device."""
    told = ["serve", "-m", model, "--no-learn", "--quiet", "--run-dir", str(run_dir(where)), "--device", device]
    for one, _, _ in where:
        told += ["--connect", f"{one.address}={one.structure}"]
    return [sys.executable, "-m", "tumbaga.driver.cli", *told]


@contextlib.contextmanager
def answered(commands: Sequence[list[str]], where: Where, *, handshake: bool = True) -> Iterator[tuple[list[int], list[RawEngine]]]:
    """Engines at these places, and who answers them: one process for all, or one for each. Logs are in the folders of the places.

    Yields:
        The ids of the processes, and the engines, connected and ready to ask.

    Raises:
        ConnectionError: one of them does not answer any more; with its last words.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explained(where))
        listeners = [stack.enter_context(raw_listener(one)) for one, _, _ in where]
        # all start at once: one after the other would take minutes
        processes = [stack.enter_context(answering(command, one)) for command, (one, _, _) in zip(commands, where, strict=False)]
        engines = []
        for index, (_, atoms, frames) in enumerate(where):
            peer = stack.enter_context(_accepted(listeners[index], processes[min(index, len(processes) - 1)]))
            engines.append(RawEngine(peer, atoms, frames, handshake=handshake))
        yield [process.pid for process in processes], engines
        if handshake:
            for engine in engines:
                engine.leave()


def _accepted(listener: socket.socket, process: subprocess.Popen[bytes]) -> socket.socket:
    """The answerer that has dialled in.

    Raises:
        ConnectionError: there will be none.
    """
    listener.settimeout(0.5)
    until = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(TimeoutError):
            return listener.accept()[0]
        if process.poll() is not None or time.monotonic() > until:
            raise ConnectionError("nobody came to answer")


@contextlib.contextmanager
def _explained(where: Where) -> Iterator[None]:
    """Add to an error what the logs say, before their folders are removed."""
    try:
        yield
    except ConnectionError as error:
        for one, _, _ in where:
            for log in sorted(path for path in one.folder.rglob("*") if path.suffix in (".log", ".jsonl", ".err")):
                error.add_note(f"{log.relative_to(one.folder.parent)}: {log.read_text(errors='replace')[-_LAST_WORDS:].strip()}")
        raise
