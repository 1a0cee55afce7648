"""The two ends of the drills of labels: an engine that times every call, as a process of its own, and a labeller that goes wrong when told to.

`python _drill_parts.py ADDRESS STRUCTURE` listens, serves itself of whoever dials, and tells of its calls in lines of JSON, a few times a second,
until its standard input ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tumbaga.online.labels.testing import lennard_jones
from tumbaga.online.records import Frame
from tumbaga.socket_protocol.streams import Address

HANG, MEMORY = "hang", "memory"
_WINDOW_S = 0.25
_PATIENCE_S = 60.0


# --- the labeller, executed by the labelling process (call:FILE:label) ----------------------------------------------------------------


def label(atoms: Any, journal: str, orders: str, delay: float) -> tuple[float, np.ndarray]:
    """Lennard-Jones after a delay, written down when it starts and when it ends; an order in the folder makes it hang, or eat memory."""
    frame = Frame(atoms.numbers, atoms.positions)
    note(journal, "start", frame.key)
    for order in (HANG, MEMORY):
        if _taken(Path(orders) / order):
            note(journal, order, frame.key)
            _go_wrong(order)
    time.sleep(delay)
    energy, forces = lennard_jones(frame, 0.2)
    note(journal, "end", frame.key)
    return energy, forces


def note(journal: str, what: str, key: str) -> None:
    """One line, in one write: those of several processes do not mix."""
    descriptor = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{what} {key} {os.getpid()}\n".encode())
    finally:
        os.close(descriptor)


def _taken(order: Path) -> bool:
    try:
        order.unlink()
    except FileNotFoundError:
        return False
    return True


def _go_wrong(order: str) -> None:
    eaten = []
    while True:
        time.sleep(0.02)
        if order == MEMORY:
            eaten.append(np.ones(12_500_000))  # 100 MB


# --- the engine -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Some calls in a row: when they had ended (seconds on the system's clock of intervals), how long each took, how many were not finite."""

    ended: float
    seconds: list[float]
    infinite: int


class Caller:
    """An engine that asks back to back, in its process.

    Args:
        address: where it listens.
        structure: file with its atoms.
    """

    def __init__(self, address: Address, structure: Path) -> None:
        program = [sys.executable, __file__, str(address), str(structure)]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.windows: list[Window] = []
        self._reader = threading.Thread(target=self._read, name="caller")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.windows.append(Window(**json.loads(line)))

    @property
    def gone(self) -> bool:
        """Whether it has ended, which it does not by itself unless its driver is gone."""
        return self._process.poll() is not None

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


def _call(engine: Any, left: threading.Event) -> None:
    while not left.is_set():
        seconds: list[float] = []
        began, infinite = time.monotonic(), 0
        while time.monotonic() - began < _WINDOW_S:
            took, finite = engine.call()
            seconds.append(took)
            infinite += not finite
        print(json.dumps({"ended": time.monotonic(), "seconds": seconds, "infinite": infinite}), flush=True)


def main() -> None:
    from _soak_engines import RawEngine, bohr, listening

    where, structure = sys.argv[1:]
    with listening(Address.parse(where)) as sock:
        peer, _ = sock.accept()
    left = threading.Event()

    def watch() -> None:
        sys.stdin.read()
        left.set()

    threading.Thread(target=watch, name="input", daemon=True).start()
    with peer:
        peer.settimeout(None)
        engine = RawEngine(peer, bohr(Path(structure)))
        engine.shake_hands()
        _call(engine, left)
        peer.sendall(b"EXIT        ")


if __name__ == "__main__":
    main()
