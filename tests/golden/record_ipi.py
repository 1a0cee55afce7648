"""Record what real i-PI says to a driver, into the two files beside this one: `python tests/golden/record_ipi.py`.

Two atoms, three steps, in the pipelined dialect (the default of i-PI 3.3) and in the classic one (`consolidate_messages` False). Each line of
a recording is one turn of one side: who spoke, and the bytes in hexadecimal.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tumbaga.socket_protocol.connection import Connection
from tumbaga.socket_protocol.events import ForceReady, PosData
from tumbaga.socket_protocol.streams import Stream
from tumbaga.socket_protocol.testing import BlockingDriver

INPUT = """<simulation verbosity='low'>
 <total_steps>3</total_steps> <prng><seed>31415</seed></prng>
 <ffsocket name='ff' mode='unix' pbc='False'> <address>golden</address> <parameters>{{model: abc}}</parameters>
  <consolidate_messages>{fused}</consolidate_messages> </ffsocket>
 <system>
  <initialize nbeads='1'> <file mode='xyz'> init.xyz </file> <velocities mode='thermal' units='kelvin'> 300 </velocities> </initialize>
  <forces> <force forcefield='ff'/> </forces>
  <motion mode='dynamics'> <dynamics mode='nve'> <timestep units='femtosecond'> 0.5 </timestep> </dynamics> </motion>
  <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
 </system>
</simulation>
"""
ATOMS = """2
# CELL(abcABC): 10.0 11.0 12.0 80.0 85.0 95.0  positions{angstrom} cell{angstrom}
Cu 0.0 0.0 0.0
Au 2.6 0.1 0.2
"""


def answer(frame: PosData) -> ForceReady:
    """An exact toy: every atom on a spring of 0.01 Hartree/Bohr² at the origin."""
    return ForceReady(
        0.005 * float((frame.positions**2).sum()), -0.01 * frame.positions, -0.01 * frame.positions.T @ frame.positions, b'{"toy": 1}'
    )


class Recorder(Stream):
    """A stream that keeps what passes."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, "i-PI")
        self.turns: list[tuple[str, bytes]] = []

    def receive(self, connection: Connection) -> int:
        before = bytes(connection._buffer)
        count = super().receive(connection)
        self._note("engine", bytes(connection._buffer)[len(before) :])
        return count

    def send(self, data: bytes) -> None:
        super().send(data)
        self._note("driver", data)

    def _note(self, who: str, data: bytes) -> None:
        if data and self.turns and self.turns[-1][0] == who:
            self.turns[-1] = (who, self.turns[-1][1] + data)
        elif data:
            self.turns.append((who, data))


def record(fused: bool) -> list[tuple[str, bytes]]:
    """Run i-PI once and return the turns of the conversation."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "init.xyz").write_text(ATOMS)
        Path(folder, "input.xml").write_text(INPUT.format(fused=fused))
        program = os.path.join(os.path.dirname(sys.executable), "i-pi")
        process = subprocess.Popen([program, "-S", f"{folder}/s_", "input.xml"], cwd=folder, stdout=subprocess.DEVNULL)
        sock = socket.socket(socket.AF_UNIX)
        while sock.connect_ex(f"{folder}/s_golden"):
            time.sleep(0.05)
        stream = Recorder(sock)
        BlockingDriver(stream, answer).serve()
        process.wait(60)
        return stream.turns


if __name__ == "__main__":
    for name, fused in (("pipelined", True), ("classic", False)):
        lines = [json.dumps({"from": who, "hex": data.hex()}) for who, data in record(fused)]
        Path(__file__).with_name(f"ipi_{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(name, len(lines), "turns")
