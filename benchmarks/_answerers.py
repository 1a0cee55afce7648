"""Who answers an engine in the wire benchmark: the engine's own driver, tumbaga's wire alone, or the whole daemon. As processes of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
PEER, WIRE, DAEMON = "peer", "wire", "daemon"
_LISTENING = {"unix": "00010000", "tcp": "0A"}


@dataclass(frozen=True)
class Place:
    """Where one engine of one measurement listens, and what it works on.

    Attributes:
        folder: of this measurement.
        kind: unix, tcp or shm.
        port: for tcp.
        name: of the unix socket.
        prefix: of the unix socket.
        structure: file with the atoms.
        atoms: how many.
    """

    folder: Path
    kind: str
    port: int
    name: str
    prefix: str
    structure: Path
    atoms: int

    @property
    def address(self) -> str:
        """As tumbaga's options have it."""
        return f"tcp:127.0.0.1:{self.port}" if self.kind == "tcp" else f"unix:{self.prefix}{self.name}"

    def listening(self) -> bool:
        """Whether the engine listens; asks the kernel, since an engine takes whoever connects for a driver."""
        table = Path("/proc/net/tcp" if self.kind == "tcp" else "/proc/net/unix").read_text().splitlines()[1:]
        if self.kind == "tcp":
            ours = {f"{host}:{self.port:04X}" for host in ("0100007F", "00000000")}  # ASE listens at every address of the machine
            return any(line.split()[1] in ours and line.split()[3] == _LISTENING["tcp"] for line in table)
        return any(line.endswith(f" {self.prefix}{self.name}") and line.split()[3] == _LISTENING["unix"] for line in table)


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for it.

    Raises:
        TimeoutError: in vain.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.01)


def ipi_driver(place: Place) -> list[str]:
    """i-PI's own driver, with its potential of zeros."""
    where = {
        "unix": ["-u", "-a", place.name, "-S", place.prefix],
        "shm": ["--shm", "-a", place.name, "-S", place.prefix],
        "tcp": ["-a", "127.0.0.1", "-p", str(place.port)],
    }
    return [sys.executable, str(BIN / "i-pi-driver-py"), "-m", "dummy", *where[place.kind]]


def ase_client(place: Place) -> list[str]:
    """ASE's own client, with a calculator of zeros."""
    return [sys.executable, str(HERE / "_ase_zero_client.py"), place.address, str(place.structure)]


def wire(place: Place) -> list[str]:
    """tumbaga's wire in one process."""
    return [sys.executable, str(HERE / "_zero_driver.py"), place.address]


def floor(place: Place) -> list[str]:
    """The least that Python can do."""
    return [sys.executable, str(HERE / "_floor_driver.py"), place.address, str(place.atoms)]


def daemon(place: Place) -> list[str]:
    """The server as users start it: supervisor, gateway, evaluator."""
    told = ["-m", "toy:zero", "-t", str(place.structure), "--no-learn", "--quiet", "--connect", place.address]
    return [sys.executable, "-m", "tumbaga.driver.cli", "serve", *told, "--run-dir", str(place.folder / "run")]


@contextlib.contextmanager
def answering(command: list[str], place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """Start one of them once the engine listens; end it, if it has not ended by itself."""
    until(place.listening, 60.0, f"an engine at {place.address}")
    with open(place.folder / "answerer.log", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=place.folder, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
