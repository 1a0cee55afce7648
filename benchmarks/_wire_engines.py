"""The engines of the wire benchmark, and how each is timed: i-PI by its own log, ASE by the wall time of a force call, a raw ping-pong."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ase
import ase.units
import numpy as np
from _answerers import BIN, Place
from _floor_driver import reply, request_size
from ase.calculators.socketio import SocketIOCalculator

BLOCK = 100  # i-PI says the mean time of a step every so many steps
_ASE_SECONDS, _ASE_LEAST, _ASE_WARM = 0.5, 6, 3
_RAW_SECONDS, _RAW_BLOCK, _RAW_WARM = 0.4, 10, 50
_INPUT = """<simulation verbosity='medium' safe_stride='100000' floatformat='%25.17e'>
 <output prefix='md'> <properties stride='{stride}' filename='out'> [ step, conserved, kinetic_cv, potential, pressure_cv ] </properties> </output>
 <total_steps>{steps}</total_steps> <prng><seed>31415</seed></prng>
 <ffsocket name='ff' mode='{mode}' pbc='False'>
  <address>{address}</address> <port>{port}</port> <latency>1e-4</latency> <timeout>0</timeout> <batch_size>{batch}</batch_size>
 </ffsocket>
 <system>
  <initialize nbeads='{beads}'> <file mode='xyz'> init.xyz </file> <velocities mode='thermal' units='kelvin'> 300 </velocities> </initialize>
  <forces> <force forcefield='ff'/> </forces>
  <motion mode='dynamics'> <dynamics mode='nve'> <timestep units='femtosecond'> 0.1 </timestep> </dynamics> </motion>
  <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
 </system>
</simulation>
"""


def write_ipi_xyz(atoms: ase.Atoms, path: Path) -> None:
    """The structure as i-PI reads it, with the cell it insists on."""
    lengths = " ".join(str(length) for length in atoms.cell.lengths())
    head = f"# CELL(abcABC): {lengths} 90.0 90.0 90.0  positions{{angstrom}} cell{{angstrom}}"
    lines = [f"{symbol} {x:.10f} {y:.10f} {z:.10f}" for symbol, (x, y, z) in zip(atoms.symbols, atoms.positions, strict=True)]
    path.write_text("\n".join([str(len(atoms)), head, *lines, ""]))


class Ipi:
    """One i-PI run, started and waiting for its driver.

    Args:
        place: where it listens; its folder is where it works.
        atoms: to move, without any force.
        beads: of the ring polymers.
        batch: configurations in one message.
        blocks: steps, by the hundred.
    """

    def __init__(self, place: Place, atoms: ase.Atoms, beads: int, batch: int, blocks: int) -> None:
        self._folder, self._blocks = place.folder, blocks
        write_ipi_xyz(atoms, place.folder / "init.xyz")
        steps = blocks * BLOCK + 1
        mode, address = ("inet", "127.0.0.1") if place.kind == "tcp" else (place.kind, place.name)
        text = _INPUT.format(stride=steps, steps=steps, mode=mode, address=address, port=place.port, batch=batch, beads=beads)
        (place.folder / "input.xml").write_text(text)
        with open(place.folder / "ipi.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(BIN / "i-pi"), "-S", place.prefix, "input.xml"],
                cwd=place.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def ended(self) -> list[float]:
        """Wait for its end; return the mean milliseconds of a step in each block, without the first step."""
        code = self._process.wait(300)
        log = (self._folder / "ipi.log").read_text(errors="replace")
        found = [1000 * float(text) for text in re.findall(r"t/step:\s*(\S+)", log)[1:]]
        if code or "I-PI reports success" not in log or len(found) != self._blocks:
            raise RuntimeError(f"i-PI ended with code {code} and {len(found)} of {self._blocks} blocks:\n{log[-2000:]}")
        return found

    @property
    def output(self) -> str:
        """What it wrote of its physics, every digit of it."""
        return (self._folder / "md.out").read_text()

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def ase_calls(calculator: SocketIOCalculator, atoms: ase.Atoms) -> list[float]:
    """Milliseconds of each force call of an optimiser's kind: new positions, forces, energy."""
    atoms = atoms.copy()
    atoms.calc = calculator
    for _ in range(_ASE_WARM):  # the first waits for the answerer to start
        _ase_call(atoms)
    took: list[float] = []
    until = time.perf_counter() + _ASE_SECONDS
    while len(took) < _ASE_LEAST or time.perf_counter() < until:
        took.append(_ase_call(atoms))
    return took


def _ase_call(atoms: ase.Atoms) -> float:
    atoms.positions += 1e-3
    start = time.perf_counter()
    forces = atoms.get_forces()
    took = 1000 * (time.perf_counter() - start)
    if forces.any():
        raise ValueError("an answerer of zeros has sent a force")
    return took


@contextlib.contextmanager
def raw_listener(place: Place) -> Iterator[socket.socket]:
    """Where the answerers of the raw ping-pong dial in."""
    with socket.socket(socket.AF_INET if place.kind == "tcp" else socket.AF_UNIX) as sock:
        if place.kind == "tcp":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", place.port) if place.kind == "tcp" else place.prefix + place.name)
        sock.listen()
        sock.settimeout(60.0)
        yield sock


def raw_cycles(listener: socket.socket, atoms: ase.Atoms, *, handshake: bool) -> list[float]:
    """Milliseconds of a cycle, one value for each block: one write of a whole request, and the whole answer, with nothing in between.

    Args:
        listener: see `raw_listener`.
        atoms: in the request, which is the same all the time; a server looks at it, so they must not overlap.
        handshake: whether the answerer is a real driver, which wants INIT and STATUS first and EXIT at the end.
    """
    peer, _ = listener.accept()
    with peer:
        peer.settimeout(None)  # a limit would cost a system call each time
        if peer.family == socket.AF_INET:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if handshake:
            _shake_hands(peer)
        ask, answer = _request(atoms), memoryview(bytearray(len(reply(len(atoms)))))
        for _ in range(_RAW_WARM):
            _cycle(peer, ask, answer, handshake)
        took: list[float] = []
        until = time.perf_counter() + _RAW_SECONDS
        while (start := time.perf_counter()) < until:
            for _ in range(_RAW_BLOCK):
                _cycle(peer, ask, answer, handshake)
            took.append(1000 * (time.perf_counter() - start) / _RAW_BLOCK)
        if handshake:
            peer.sendall(b"EXIT        ")
        return took


def _cycle(peer: socket.socket, ask: bytes, answer: memoryview, any_extras: bool) -> None:
    peer.sendall(ask)
    got = 0
    while got < len(answer):
        count = peer.recv_into(answer[got:])
        if not count:
            raise ConnectionError("the answerer is gone")
        got += count
    if any_extras and (extras := int.from_bytes(answer[-4:], "little")):
        while extras:
            extras -= len(peer.recv(extras))


def _request(atoms: ase.Atoms) -> bytes:
    cell, positions = atoms.cell.array / ase.units.Bohr, atoms.positions / ase.units.Bohr
    numbers = (cell.T.tobytes(), np.linalg.inv(cell.T).tobytes(), np.int32(len(atoms)).tobytes(), positions.tobytes())
    request = b"".join((b"POSDATA     ", *numbers, b"GETFORCE    "))
    assert len(request) == request_size(len(atoms))
    return request


def _shake_hands(peer: socket.socket) -> None:
    for said, expected in (
        (b"STATUS      ", b"NEEDINIT    "),
        (b"INIT        " + bytes(4) + (1).to_bytes(4, "little") + b" STATUS      ", b"READY       "),
    ):
        peer.sendall(said)
        told = peer.recv(12, socket.MSG_WAITALL)
        if told != expected:
            raise ConnectionError(f"the answerer said {told!r} instead of {expected!r}")
