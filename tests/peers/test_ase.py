"""Real ASE as an engine of the server: dynamics, optimisers, bands and cells come out as with the potential in ASE's own process.

The reference computes in eV and Å and knows no wire; ASE's units and ours are the same constants, so only rounding may differ. Dynamics and
optimisers repeat it at every step, and would make more of it if there were more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.socketio import SocketIOCalculator
from ase.cluster import Icosahedron
from ase.filters import FrechetCellFilter
from ase.io import write
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS
from ase.stress import full_3x3_to_voigt_6_stress

from tumbaga.driver import structures
from tumbaga.driver.backends import registry

MODEL = "toy:lj?epsilon=0.05&sigma=2.2"
SAME = 1e-10  # relative to the largest component
TIMEOUT = 30.0
STRAIN = 1e-4


class InProcess(Calculator):
    """The potential itself."""

    implemented_properties: ClassVar[list[str]] = ["energy", "forces", "stress"]
    potential = registry.load(MODEL, "cpu", "float64")

    def calculate(self, atoms: Atoms | None = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        told = self.potential.predict([structures.from_atoms(self.atoms)])[0]
        self.results = {"energy": told.energy, "forces": told.forces}
        if all(self.atoms.pbc):
            self.results["stress"] = full_3x3_to_voigt_6_stress(-told.virial / self.atoms.get_volume())


Made = tuple[SocketIOCalculator, str]


@pytest.fixture
def calculators(unix_name: Callable[[], str], free_port: Callable[[], str]) -> Iterator[Callable[[str], Made]]:
    """Make calculators that listen from now on, with the server's option for each; in the end all are closed."""
    with ExitStack() as stack:

        def make(kind: str) -> Made:
            name = unix_name() if kind == "unix" else free_port()
            told: dict[str, Any] = {"unixsocket": name} if kind == "unix" else {"port": int(name)}
            calculator = stack.enter_context(SocketIOCalculator(timeout=TIMEOUT, **told))
            return calculator, f"--connect=unix:{name}" if kind == "unix" else f"--connect=tcp:127.0.0.1:{name}"

        yield make


@contextmanager
def closed(calculators: list[SocketIOCalculator]) -> Iterator[None]:
    """Close them before the server ends, as a script that is done does."""
    yield
    for calculator in calculators:
        calculator.close()


def cluster(seed: int = 0) -> Atoms:
    made = Icosahedron("Cu", 2)
    atoms = Atoms(made.symbols, made.positions)
    atoms.rattle(0.05, seed=seed)
    return atoms


def crystal() -> Atoms:
    """Seven atoms in a cell without any symmetry, neither triangular nor right-angled, no two of them half a lattice vector apart."""
    cell = np.array([[7.1, 0.4, -0.3], [1.1, 6.8, 0.5], [-0.8, 0.6, 7.9]])
    inside = np.array([[0, 0, 0], [4, 1, 1], [1, 4, 2], [3, 4, 6], [7, 2, 4], [5, 7, 3], [2, 8, 7]]) / 9
    return Atoms("Cu7", (inside + 0.03 * np.sin(np.arange(21)).reshape(7, 3)) @ cell, cell=cell, pbc=True)


def same(got: Any, expected: Any) -> None:
    """Equal up to rounding, on the scale of the largest component."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=SAME * np.abs(expected).max())


def moved(atoms: Atoms, calculator: Calculator) -> list[np.ndarray]:
    """Forces, energies and places along a short trajectory."""
    atoms = atoms.copy()
    atoms.calc = calculator
    atoms.set_momenta(np.random.default_rng(3).normal(scale=3.0, size=(len(atoms), 3)))
    forces, others = [], []
    dynamics = VelocityVerlet(atoms, 2.0 * units.fs)
    dynamics.attach(lambda: forces.append(atoms.get_forces()))
    dynamics.attach(lambda: others.append([atoms.get_potential_energy(), atoms.get_kinetic_energy()]))
    dynamics.run(40)
    return [np.array(forces), np.array(others), atoms.positions, atoms.get_momenta()]


@pytest.mark.slow
def test_dynamics_over_unix_and_tcp(calculators: Callable[[str], Made], serve: Callable[..., Any]) -> None:
    """The same trajectory as in the process; a calculator that is closed and made anew does not disturb the other one."""
    (by_unix, unix), (by_tcp, tcp) = calculators("unix"), calculators("tcp")
    server = serve(unix, tcp)
    expected = moved(cluster(), InProcess())
    with closed([by_unix, by_tcp]):
        for calculator in (by_unix, by_tcp):
            for got, wanted in zip(moved(cluster(), calculator), expected, strict=True):
                same(got, wanted)
    assert server.stop() == 0, server.output
    assert server.status()["frames"] == 2 * 41
    assert server.status()["errors"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_an_optimiser_goes_the_same_way_and_its_follower_is_served_too(
    kind: str, calculators: Callable[[str], Made], serve: Callable[..., Any]
) -> None:
    """BFGS takes the same steps to the same minimum; another script with a new calculator at the same address does so as well."""
    calculator, option = calculators(kind)
    server = serve(option)
    alone = cluster()
    alone.calc = InProcess()
    alone_way = BFGS(alone, logfile=None)
    alone_way.run(fmax=1e-3, steps=60)
    for attempt in range(2):
        atoms = cluster()
        atoms.calc = calculator
        way = BFGS(atoms, logfile=None)
        with closed([calculator]):
            way.run(fmax=1e-3, steps=60)
            assert way.nsteps == alone_way.nsteps > 3
            np.testing.assert_allclose(atoms.positions, alone.positions, rtol=0, atol=1e-8)  # a flat minimum magnifies rounding
            same(atoms.get_potential_energy(), alone.get_potential_energy())
        if not attempt:
            told = {"unixsocket": option.partition(":")[2]} if kind == "unix" else {"port": int(option.rpartition(":")[2])}
            calculator = SocketIOCalculator(timeout=TIMEOUT, **told)
    assert server.stop() == 0, server.output
    assert server.status()["errors"] == []


def band(calculators: list[Calculator], shared: bool) -> np.ndarray:
    """Places of the images of a band after some steps: one atom of the cluster goes around its neighbour."""
    ends = [cluster(), cluster()]
    for end, way in zip(ends, (0.0, 1.0), strict=True):
        end.positions[12] += [0.3 * way, 0.9 * way, 0.0]
        end.calc = InProcess()
    images = [ends[0], *[ends[0].copy() for _ in range(3)], ends[1]]
    neb = NEB(images, k=0.5, climb=False, allow_shared_calculator=shared, method="improvedtangent")
    neb.interpolate()
    for image, calculator in zip(images[1:-1], calculators, strict=True):
        image.calc = calculator
    BFGS(neb, logfile=None, maxstep=0.05).run(fmax=1e-4, steps=8)
    return np.array([image.positions for image in images])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_band_with_one_calculator_for_all_images_and_with_one_each(
    kind: str, calculators: Callable[[str], Made], serve: Callable[..., Any]
) -> None:
    """Images that take turns on one connection and images with connections of their own end where they end without any."""
    made = [calculators(kind) for _ in range(4)]
    server = serve(*(option for _, option in made))
    with closed([calculator for calculator, _ in made]):
        expected = band([InProcess() for _ in range(3)], shared=False)
        same(band([made[0][0]] * 3, shared=True), expected)
        same(band([calculator for calculator, _ in made[1:]], shared=False), expected)
    assert server.stop() == 0, server.output
    assert server.status()["errors"] == []
    assert [session["state"] for session in server.status()["sessions"]] == ["dialling"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_stress_is_the_strain_derivative_over_the_volume_and_cells_relax(
    kind: str, calculators: Callable[[str], Made], serve: Callable[..., Any], tmp_path: Path
) -> None:
    """Sign, Voigt order and cell by central differences through ASE on a triclinic crystal, and a relaxation of its cell."""
    write(tmp_path / "crystal.xyz", crystal())
    calculator, option = calculators(kind)
    server = serve(option, template=tmp_path / "crystal.xyz")
    with closed([calculator]):
        atoms = crystal()
        atoms.calc = calculator
        stress, volume = atoms.get_stress(), atoms.get_volume()
        measured = []
        for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[i, j] += 0.5 * sign * STRAIN
                strain[j, i] += 0.5 * sign * STRAIN
                atoms.set_cell(crystal().cell.array @ strain, scale_atoms=False)
                atoms.positions = crystal().positions @ strain
                energies.append(atoms.get_potential_energy())
            measured.append((energies[0] - energies[1]) / (2 * STRAIN) / volume)

        assert np.abs(stress).min() > 0.02 * np.abs(stress).max()  # every element is put to the test
        np.testing.assert_allclose(stress, measured, rtol=0, atol=1e-6 * np.abs(stress).max())
        relaxed = []
        for one in (calculator, InProcess()):
            atoms = crystal()
            atoms.calc = one
            BFGS(FrechetCellFilter(atoms), logfile=None, maxstep=0.05).run(fmax=1e-4, steps=10)
            relaxed.append((atoms.cell.array, atoms.positions, atoms.get_forces(), atoms.get_stress()))
        for got, wanted in zip(*relaxed, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=100 * SAME * np.abs(wanted).max())  # ten steps with a stiff cell
    assert server.stop() == 0, server.output
    assert server.status()["errors"] == []
