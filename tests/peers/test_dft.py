"""A DFT code computes for our server role: CP2K, with a molecule of hydrogen in a minimal set-up of seconds.

Debian's `apt-get install cp2k` is enough. Up to release 2023.1 its sockets are at /tmp/ipi_NAME; some later ones look at /tmp/qiskit_NAME.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import ase.units
import numpy as np
import pytest

from tumbaga.socket_protocol.clients import Clients
from tumbaga.socket_protocol.events import Float64s, PosData
from tumbaga.socket_protocol.peers import Result
from tumbaga.socket_protocol.streams import Address

pytestmark = pytest.mark.dft

TIMEOUT = 120.0
PRINTED = 2e-8  # Hartree/Bohr: CP2K prints forces with eight digits
SCF = 1e-7  # Hartree: two ways to the same density at EPS_SCF 1e-8
STRAIN = 2e-3
BOX = 5.0  # Å
POSITIONS = np.array([[2.5, 2.5, 2.1], [2.5, 2.6, 2.9]])  # Å, neither at rest nor along an axis
SKEWED = np.array([[5.0, 0.3, 0.1], [0.2, 5.1, 0.0], [0.0, 0.4, 5.2]])  # Å
INPUT = """\
&GLOBAL
  PROJECT h2
  RUN_TYPE {run}
  PRINT_LEVEL LOW
&END GLOBAL
&MOTION
  &DRIVER
    HOST {name}
    UNIX .TRUE.
  &END DRIVER
&END MOTION
&FORCE_EVAL
  METHOD Quickstep
  STRESS_TENSOR ANALYTICAL
  &PRINT
    &FORCES
    &END FORCES
  &END PRINT
  &DFT
    BASIS_SET_FILE_NAME BASIS_SET
    POTENTIAL_FILE_NAME GTH_POTENTIALS
    &MGRID
      CUTOFF 200
    &END MGRID
    &SCF
      EPS_SCF 1.0E-8
      SCF_GUESS ATOMIC
      &OT
      &END OT
    &END SCF
    &XC
      &XC_FUNCTIONAL PADE
      &END XC_FUNCTIONAL
    &END XC
  &END DFT
  &SUBSYS
    &CELL
      ABC {box} {box} {box}
    &END CELL
    &COORD
      H {first}
      H {second}
    &END COORD
    &KIND H
      BASIS_SET DZVP-GTH-PADE
      POTENTIAL GTH-PADE-q1
    &END KIND
  &END SUBSYS
&END FORCE_EVAL
"""


@pytest.fixture
def name() -> Iterator[str]:
    made = f"tumbaga-test-{uuid.uuid4().hex}"
    yield made

    assert not os.path.lexists(f"/tmp/ipi_{made}")


@pytest.fixture
def cp2k(tmp_path: Path, name: str) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start CP2K on one core as "DRIVER" or "ENERGY_FORCE"; its output is in cp2k.log. At the end it is gone."""
    program = shutil.which("cp2k")
    if program is None:
        pytest.skip("cp2k is not on PATH; Debian and Ubuntu have it as the package cp2k")
    processes: list[subprocess.Popen[bytes]] = []

    def start(run: str) -> subprocess.Popen[bytes]:
        first, second = (" ".join(map(str, row)) for row in POSITIONS)
        (tmp_path / "cp2k.inp").write_text(INPUT.format(run=run, name=name, box=BOX, first=first, second=second))
        with open(tmp_path / "cp2k.log", "wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen([program, "cp2k.inp"], cwd=tmp_path, stdout=log, stderr=log, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def result_of(clients: Clients, cell: Float64s, positions: Float64s) -> Result:
    """Ask with cell and positions in Å."""
    result = clients.forces(PosData(cell / ase.units.Bohr, positions / ase.units.Bohr), timeout=TIMEOUT).result
    assert result is not None
    return result


def said_by(log: Path) -> tuple[float, Float64s]:
    """The energy and the forces that CP2K printed, atomic units."""
    text = log.read_text(encoding="utf-8", errors="replace")
    (energy,) = re.findall(r"ENERGY\| Total FORCE_EVAL.*?(-?\d+\.\d+)\s*$", text, re.MULTILINE)
    forces = re.findall(r"^ +\d+ +1 +H +(\S+) +(\S+) +(\S+)\s*$", text, re.MULTILINE)
    return float(energy), np.array(forces, np.float64)


def test_cp2k_gives_over_the_socket_what_it_prints_without(
    name: str, cp2k: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Energy and forces of the same input; the second force is asked for in one write, and another geometry gives other forces."""
    assert cp2k("ENERGY_FORCE").wait(TIMEOUT) == 0
    energy, forces = said_by(tmp_path / "cp2k.log")
    cell = BOX * np.eye(3)
    with Clients([Address.unix(name)], "cp2k") as clients:
        process = cp2k("DRIVER")
        first = result_of(clients, cell, POSITIONS)
        moved = result_of(clients, cell, POSITIONS * [[1.0, 1.0, 1.02], [1.0, 1.0, 1.0]])
        again = result_of(clients, cell, POSITIONS)
        assert clients.lost == 0

    assert process.wait(TIMEOUT) == 0
    assert first.has_stress
    for result in (first, again):
        assert result.energy == pytest.approx(energy, abs=SCF)
        assert np.allclose(result.forces, forces, rtol=0, atol=PRINTED + SCF)
    assert abs(moved.energy - energy) > 1e-4


def test_the_virial_of_cp2k_in_a_skewed_cell_is_minus_the_strain_derivative(
    name: str, cp2k: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """Sign, volume, and the order of the lattice vectors."""
    with Clients([Address.unix(name)], "cp2k") as clients:
        cp2k("DRIVER")
        virial = result_of(clients, SKEWED, POSITIONS).virial
        for i, j in ((2, 2), (1, 2), (0, 1)):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[i, j] += 0.5 * sign * STRAIN
                strain[j, i] += 0.5 * sign * STRAIN
                energies.append(result_of(clients, SKEWED @ strain, POSITIONS @ strain).energy)

            assert -(energies[0] - energies[1]) / (2 * STRAIN) == pytest.approx(virial[i, j], abs=5e-6)
    assert abs(virial[0, 1]) > 5e-4
