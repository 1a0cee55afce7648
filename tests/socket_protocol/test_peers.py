"""Independent programs decide: real ASE in both roles over unix and tcp, and i-PI's own driver.

The units stand here once more on purpose: this room has none, and the test must not take them from where they are to be tested.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.socketio import SocketClient, SocketIOCalculator

from tumbaga.socket_protocol.events import ForceReady, PosData
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingDriver, BlockingEngine, Forces, connect

TIMEOUT = 30.0
HARTREE, BOHR = ase.units.Ha, ase.units.Bohr
SAME = 1e-9  # round trips of unit factors, in eV and Å


@pytest.fixture
def unix_name() -> Iterator[str]:
    """A name for ASE, which knows no prefix but /tmp/ipi_."""
    name = f"tumbaga-test-{uuid.uuid4().hex}"
    yield name

    assert not os.path.lexists(f"/tmp/ipi_{name}")


def skewed() -> Atoms:
    """A crystal without any symmetry, so that rows and columns of its cell cannot be mistaken."""
    atoms = bulk("Cu", cubic=True)
    strain = np.array([[1.02, 0.03, -0.01], [0.0, 0.98, 0.05], [0.02, -0.04, 1.01]])
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    atoms.numbers[0] = 79
    return atoms


def emt(template: Atoms, frame: PosData) -> ForceReady:
    """What EMT says about a frame from the wire."""
    atoms = Atoms(template.numbers, frame.positions * BOHR, cell=frame.cell * BOHR, pbc=frame.periodic, calculator=EMT())
    virial = -atoms.get_stress(voigt=False) * atoms.get_volume() / HARTREE if frame.periodic else np.zeros((3, 3))
    return ForceReady(atoms.get_potential_energy() / HARTREE, atoms.get_forces() * BOHR / HARTREE, virial)


def calculator(kind: str, name: str) -> tuple[SocketIOCalculator, Address]:
    """ASE as an engine: it listens from here on and accepts when the first force is asked for."""
    if kind == "unix":
        return SocketIOCalculator(unixsocket=name, timeout=TIMEOUT), Address.unix(name)
    with listen(Address.tcp("127.0.0.1", 0)) as free:
        port = free.address.port
    return SocketIOCalculator(port=port, timeout=TIMEOUT), Address.tcp("127.0.0.1", port)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_ase_as_engine_gets_from_our_driver_what_it_gets_from_emt_itself(kind: str, unix_name: str) -> None:
    atoms = skewed()
    calc, address = calculator(kind, unix_name)
    with calc:
        driver = BlockingDriver(connect(address, TIMEOUT), lambda frame: emt(atoms, frame), timeout=TIMEOUT)
        thread = threading.Thread(target=driver.serve, name="driver")
        thread.start()
        for seed in (2, 3):
            atoms.rattle(0.05, seed=seed)
            alone = atoms.copy()
            alone.calc = EMT()
            atoms.calc = calc

            assert atoms.get_potential_energy() == pytest.approx(alone.get_potential_energy(), abs=SAME)
            assert np.allclose(atoms.get_forces(), alone.get_forces(), rtol=0, atol=SAME)
            assert np.allclose(atoms.get_stress(), alone.get_stress(), rtol=0, atol=SAME)
    thread.join(TIMEOUT)

    assert not thread.is_alive()  # ASE says no EXIT, it only closes
    assert [init.text for init in driver.inits] == [b"\0"]
    assert driver.frames == 2


def test_ase_without_a_cell_is_not_periodic(unix_name: str) -> None:
    frames: list[PosData] = []

    def compute(frame: PosData) -> ForceReady:
        frames.append(frame)
        return ForceReady(0.0, np.zeros_like(frame.positions), np.zeros((3, 3)))

    calc, address = calculator("unix", unix_name)
    with calc:
        thread = threading.Thread(target=BlockingDriver(connect(address, TIMEOUT), compute, timeout=TIMEOUT).serve, name="driver")
        thread.start()
        atoms = molecule("H2O")
        atoms.calc = calc
        atoms.get_forces()
    thread.join(TIMEOUT)

    assert [frame.periodic for frame in frames] == [False]
    assert np.allclose(frames[0].positions * BOHR, molecule("H2O").positions, rtol=0, atol=SAME)


def ase_client(kind: str, address: Address, name: str, atoms: Atoms) -> threading.Thread:
    """ASE as a driver, which dials in."""

    def run() -> None:
        client = SocketClient(unixsocket=name) if kind == "unix" else SocketClient(host=address.host, port=address.port)
        client.run(atoms, use_stress=True)

    thread = threading.Thread(target=run, name="ase-client")
    thread.start()
    return thread


@pytest.mark.parametrize("dialect", ["classic", "pipelined"])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_our_engine_gets_from_an_ase_driver_what_emt_says_and_the_virial_is_minus_the_strain_derivative(
    kind: str, dialect: Any, unix_name: str
) -> None:
    atoms = skewed()
    with listen(Address.unix(unix_name) if kind == "unix" else Address.tcp("127.0.0.1", 0)) as listener:
        template = atoms.copy()
        template.calc = EMT()
        thread = ase_client(kind, listener.address, unix_name, template)
        with BlockingEngine.accept(listener, dialect, timeout=TIMEOUT) as engine:
            result = ask(engine, atoms)
            measured = strain_derivative(engine, atoms)
        thread.join(TIMEOUT)

    expected = emt(atoms, PosData(atoms.cell.array / BOHR, atoms.positions / BOHR))
    assert not thread.is_alive()
    assert result.energy == pytest.approx(expected.energy, abs=SAME)
    assert np.allclose(result.forces, expected.forces, rtol=0, atol=SAME)
    assert np.allclose(result.virial, expected.virial, rtol=0, atol=SAME)
    assert np.allclose(-measured, result.virial, rtol=0, atol=1e-5)  # central differences, h = 1e-4
    assert np.abs(result.virial).min() > 1e-4  # every element was put to the test
    assert result.extras == b"\0"


def ask(engine: BlockingEngine, atoms: Atoms) -> Forces:
    return engine.forces(atoms.positions / BOHR, atoms.cell.array / BOHR)


def strain_derivative(engine: BlockingEngine, atoms: Atoms, step: float = 1e-4) -> np.ndarray:
    """dE/d(strain), Hartree, by central differences through the engine; the strain is symmetric."""
    derivative = np.zeros((3, 3))
    for i in range(3):
        for j in range(i, 3):
            energies = []
            for sign in (1, -1):
                strain = np.zeros((3, 3))
                strain[i, j] += 0.5 * sign * step
                strain[j, i] += 0.5 * sign * step
                strained = atoms.copy()
                strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
                energies.append(ask(engine, strained).energy)
            derivative[i, j] = derivative[j, i] = (energies[0] - energies[1]) / (2 * step)
    return derivative


@pytest.mark.parametrize("dialect", ["classic", "pipelined"])
def test_the_driver_that_comes_with_ipi_answers_our_engine(dialect: Any, tmp_path: Path) -> None:
    program = shutil.which("i-pi-driver-py", path=os.path.dirname(sys.executable)) or shutil.which("i-pi-driver-py")
    assert program is not None
    prefix = f"{tmp_path}/i_"
    positions = np.random.default_rng(0).normal(size=(5, 3))
    with listen(Address.unix("h", prefix=prefix)) as listener:
        process = subprocess.Popen(
            [program, "-u", "-a", "h", "-S", prefix, "-m", "harmonic", "-o", "0.5"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            with BlockingEngine.accept(listener, dialect, timeout=TIMEOUT) as engine:
                for scale in (1.0, 2.0):
                    result = engine.forces(scale * positions, 30 * np.eye(3))

                    assert result.energy == pytest.approx(0.25 * scale**2 * (positions**2).sum())
                    assert np.allclose(result.forces, -0.5 * scale * positions)
                    assert result.virial.shape == (3, 3)
            process.wait(TIMEOUT)
        finally:
            process.kill()
            process.wait()

    assert engine.inits_sent == 1
