"""DFT codes compute for our server role: CP2K and Quantum ESPRESSO, with a molecule of hydrogen in minimal set-ups of seconds.

Debian's `apt-get install cp2k quantum-espresso` is enough. Sockets of CP2K 2023.1 are at /tmp/ipi_NAME; some later releases look at
/tmp/qiskit_NAME. The pw.x 6.7 of Debian 12 ends with a segmentation fault at its second frame, with ASE as the server too.
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
def run(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a program on one core in the test's folder; its output is in program.log. At the end it is gone."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(program: str, *arguments: str) -> subprocess.Popen[bytes]:
        found = shutil.which(program)
        if found is None:
            pytest.skip(f"{program} is not on PATH; Debian and Ubuntu have the packages cp2k and quantum-espresso")
        with open(tmp_path / "program.log", "wb") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen([found, *arguments], cwd=tmp_path, stdout=log, stderr=log, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def cp2k(tmp_path: Path, name: str, run: Callable[..., subprocess.Popen[bytes]]) -> Callable[[str], subprocess.Popen[bytes]]:
    """Start CP2K as "DRIVER" or "ENERGY_FORCE"."""

    def start(kind: str) -> subprocess.Popen[bytes]:
        first, second = (" ".join(map(str, row)) for row in POSITIONS)
        (tmp_path / "cp2k.inp").write_text(INPUT.format(run=kind, name=name, box=BOX, first=first, second=second))
        return run("cp2k", "cp2k.inp")

    return start


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


@pytest.mark.slow
def test_cp2k_gives_over_the_socket_what_it_prints_without(
    name: str, cp2k: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Energy and forces of the same input; the second force is asked for in one write, and another geometry gives other forces."""
    assert cp2k("ENERGY_FORCE").wait(TIMEOUT) == 0
    energy, forces = said_by(tmp_path / "program.log")
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


@pytest.mark.slow
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


# --- Quantum ESPRESSO -----------------------------------------------------------------------------------------------------------------

PSEUDOPOTENTIAL = """\
&input
 title='H', zed=1.0, rel=0, config='1s1', iswitch=3, dft='PZ'
/
&inputp
 lloc=0, pseudotype=1, file_pseudopw='H.upf', tm=.true.
/
1
1S 1 0 1.00 0.00 1.20 1.20 0.0
"""
PW = """\
&CONTROL
 calculation='scf', outdir='./out', pseudo_dir='.', tprnfor=.true., tstress=.true.
/
&SYSTEM
 ibrav=0, nat=2, ntyp=1, ecutwfc=25.0, nosym=.true.
/
&ELECTRONS
 conv_thr=1e-9
/
ATOMIC_SPECIES
H 1.008 H.upf
K_POINTS automatic
1 1 1 0 0 0
CELL_PARAMETERS angstrom
{cell}
ATOMIC_POSITIONS angstrom
H {first}
H {second}
"""
RYDBERG = 0.5  # Hartree
QE_CONSTANTS = 1e-6  # its Bohr has other digits than ours


@pytest.fixture
def pw(tmp_path: Path, run: Callable[..., subprocess.Popen[bytes]]) -> Callable[..., subprocess.Popen[bytes]]:
    """Start pw.x with a pseudopotential that it made itself, in a skewed cell."""
    (tmp_path / "ld1.in").write_text(PSEUDOPOTENTIAL)
    assert run("ld1.x", "-in", "ld1.in").wait(TIMEOUT) == 0
    cell, first, second = "\n".join(" ".join(map(str, row)) for row in SKEWED), *(" ".join(map(str, row)) for row in POSITIONS)
    (tmp_path / "pw.in").write_text(PW.format(cell=cell, first=first, second=second))
    return lambda *flags: run("pw.x", "-in", "pw.in", *flags)


@pytest.mark.slow
def test_quantum_espresso_asks_for_init_and_gives_what_it_prints_without_the_socket(
    name: str, pw: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Energy, forces and stress of the same input; after its force it asks for INIT again and waits for the next job."""
    assert pw().wait(TIMEOUT) == 0
    text = (tmp_path / "program.log").read_text()
    (energy,) = re.findall(r"^! +total energy += +(\S+) Ry", text, re.MULTILINE)
    forces = np.array(re.findall(r"atom +\d+ type +1 +force = +(\S+) +(\S+) +(\S+)", text)[:2], np.float64) * RYDBERG
    stress = np.array(re.findall(r"^ +(-?\d\.\d{8}) +(-?\d\.\d{8}) +(-?\d\.\d{8}) ", text, re.MULTILINE)[:3], np.float64) * RYDBERG
    with Clients([Address.unix(name)], "qe") as clients:
        process = pw("-ipi", f"{name}:UNIX")
        result = result_of(clients, SKEWED, POSITIONS)
        while not clients.free:
            clients.turn(TIMEOUT)
        assert clients.lost == 0

    process.wait(TIMEOUT)  # EXIT is an unknown word to it, which releases end with different codes
    assert "Receiving replica" in (tmp_path / "program.log").read_text(errors="replace")
    assert result.energy == pytest.approx(float(energy) * RYDBERG, abs=QE_CONSTANTS)
    assert np.allclose(result.forces, forces, rtol=0, atol=QE_CONSTANTS)
    volume = np.linalg.det(SKEWED / ase.units.Bohr)
    assert np.allclose(result.virial, stress * volume, rtol=0, atol=1e-8 * volume)
    assert np.abs(stress[0, 1]) > 1e-7  # ten times what the comparison lets pass
