"""ASE's own client of the i-PI protocol with a calculator that returns zeros: `python _ase_zero_client.py ADDRESS STRUCTURE`."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.socketio import SocketClient
from ase.io import read


class Zero(Calculator):
    """E = 0, F = 0, no stress."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces", "stress"]

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": 0.0, "forces": np.zeros((len(self.atoms), 3)), "stress": np.zeros(6)}


if __name__ == "__main__":
    kind, _, rest = sys.argv[1].partition(":")
    atoms = read(sys.argv[2])
    atoms.calc = Zero()
    host, _, port = rest.rpartition(":")
    client = SocketClient(unixsocket=rest.removeprefix("/tmp/ipi_")) if kind == "unix" else SocketClient(host=host, port=int(port))
    client.run(atoms, use_stress=False)
