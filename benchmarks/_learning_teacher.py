"""What both sides of suite L share: clusters, the teacher with its delay, starts, velocities. ASE and NumPy only: two environments import it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.cluster import Icosahedron, Octahedron
from ase.md.langevin import Langevin

KELVIN = 600.0
STEP_FS = 5.0
FRICTION = 0.02  # in ASE's units of inverse time
CELL = 40.0  # Å
RATTLE = 0.05  # Å, standard deviation of each coordinate
RATTLED = 10
TORN, INSIDE = 3.5, 1.6  # Å: a nearest neighbour further away than the first, any pair nearer than the second


class Teacher(EMT):  # type: ignore[misc] # ASE has no types
    """Effective-medium theory that takes as long as it is told to.

    Args:
        delay: seconds of each calculation, which a sleep stands in for.
    """

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.delay = delay

    def calculate(self, *arguments: Any, **more: Any) -> None:
        """Sleep, then what EMT does."""
        time.sleep(self.delay)
        super().calculate(*arguments, **more)


class Wrong(Calculator):  # type: ignore[misc] # ASE has no types
    """What a student was taught before: E'(R) = 0.8 E(R / 1.03) with EMT's E."""

    implemented_properties = ("energy", "forces")
    LONGER, SOFTER = 1.03, 0.8

    def calculate(self, *arguments: Any, **more: Any) -> None:
        """EMT of the shrunk frame."""
        super().calculate(*arguments, **more)
        small = Atoms(self.atoms.numbers, self.atoms.positions / self.LONGER)
        small.calc = EMT()
        self.results = {
            "energy": self.SOFTER * small.get_potential_energy(),
            "forces": self.SOFTER / self.LONGER * small.get_forces(),
        }


def cluster(size: int) -> Atoms:
    """Return the copper cluster of 13 or 38 atoms with gold on its first quarter, in the middle of an open cell."""
    bare = {13: lambda: Icosahedron("Cu", 2), 38: lambda: Octahedron("Cu", 4, 1)}[size]()
    atoms = Atoms(bare.numbers, bare.positions, cell=[CELL] * 3)
    atoms.numbers[: size // 4] = 79
    atoms.center()
    return atoms


def rattled(size: int, seed: int) -> list[Atoms]:
    """Return the ten distorted copies that both sides know before their first step."""
    frames = [cluster(size) for _ in range(RATTLED)]
    for number, atoms in enumerate(frames):
        atoms.rattle(RATTLE, rng=np.random.default_rng([seed, size, number]))
    return frames


def start(size: int, seed: int) -> Atoms:
    """Return the first frame with velocities of the temperature."""
    atoms = cluster(size)
    noise = np.random.default_rng([seed, size, RATTLED]).standard_normal((size, 3))
    atoms.set_momenta(noise * np.sqrt(KELVIN * units.kB * atoms.get_masses())[:, None])
    return atoms


def dynamics(atoms: Atoms, seed: int) -> Langevin:
    """Return the thermostatted dynamics of the suite; atoms have a calculator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ASE's of fixcm, which would heat a small cluster far above its temperature
        return Langevin(
            atoms, STEP_FS * units.fs, temperature_K=KELVIN, friction=FRICTION, fixcm=False, rng=np.random.default_rng([seed, len(atoms)])
        )


def walk(atoms: Atoms, seed: int, steps: int, restarted: list[int] | None = None) -> Iterator[int]:
    """Run the dynamics; yields the number of steps done after each, and 0 when the forces of the start are there.

    A cluster that has come apart, or whose atoms are inside each other, is set back to the start with other velocities: what a user does
    whose potential is not there yet. The steps at which that happened are added to `restarted`.
    """
    for done, _ in enumerate(dynamics(atoms, seed).irun(steps)):
        yield done
        if restarted is not None and broken(atoms):
            restarted.append(done)
            again = start(len(atoms), seed + 1000 * len(restarted))
            atoms.set_positions(again.positions)
            atoms.set_momenta(again.get_momenta())


def broken(atoms: Atoms) -> bool:
    """Whether an atom has lost its neighbours, two are inside each other, or it is three times too hot."""
    apart = atoms.get_all_distances() + np.eye(len(atoms)) * CELL
    return bool(apart.min(axis=1).max() > TORN or apart.min() < INSIDE or atoms.get_temperature() > 3 * KELVIN)


def teachers_own(size: int, seed: int, frames: int, settle: int = 200, stride: int = 10) -> list[Atoms]:
    """Return frames of the teacher's own dynamics, with its energies and forces."""
    atoms, found = start(size, seed), []
    atoms.calc = EMT()
    for step in walk(atoms, seed, settle + stride * frames):
        if step > settle and (step - settle) % stride == 0:
            found += labels_of([atoms])
    return found


def labels_of(frames: Sequence[Atoms]) -> list[Atoms]:
    """Return copies with the teacher's energies and forces, without a delay."""
    found, calculator = [], EMT()
    for atoms in frames:
        copy = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        copy.calc = calculator
        found.append(with_forces(copy, copy.get_potential_energy(), copy.get_forces()))
    return found


def wrong_ones(size: int, seed: int, frames: int) -> list[Atoms]:
    """Return frames of the dynamics of a wrong teacher with its energies and forces: bonds 3 % too long, everything a fifth too soft."""
    atoms, found, settle, stride = start(size, seed + 100), [], 200, 10
    atoms.calc = Wrong()
    for step in walk(atoms, seed, settle + stride * frames):
        if step > settle and (step - settle) % stride == 0:
            copy = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell)
            found.append(with_forces(copy, atoms.get_potential_energy(), atoms.get_forces()))
    return found


def with_forces(atoms: Atoms, energy: float, forces: Any) -> Atoms:
    """Return the atoms with a label, eV and eV/Å."""
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


def force_rmse(forces: Sequence[Any], frames: Sequence[Atoms]) -> float:
    """Return the root mean square of the errors of force components, eV/Å."""
    errors = [np.asarray(some) - atoms.get_forces() for some, atoms in zip(forces, frames, strict=True)]
    return float(np.sqrt(np.mean(np.square(np.concatenate(errors)))))


def covered(ratios: Any) -> dict[str, float]:
    """Return which shares of errors over predicted standard deviations lie within the intervals of 68.3 and 90 %."""
    return {"within_68": float(np.mean(ratios < 1.0)), "within_90": float(np.mean(ratios < 1.645))}


class Watch:
    """Times each force call of a calculator, and keeps every 20th frame with the forces that moved it.

    Args:
        calculator: whose `calculate` is timed from now on.
        atoms: that it moves.
    """

    STRIDE = 20

    def __init__(self, calculator: Any, atoms: Atoms) -> None:
        self._atoms, self._inner = atoms, calculator.calculate
        self._took: list[float] = []
        self._frames: list[Atoms] = []
        self._forces: list[Any] = []
        self._kelvins: list[float] = []
        self.restarted: list[int] = []
        calculator.calculate = self._timed

    def _timed(self, *arguments: Any, **more: Any) -> None:
        begun = time.perf_counter()
        self._inner(*arguments, **more)
        self._took.append(1000.0 * (time.perf_counter() - begun))

    def note(self, step: int) -> None:
        """Look at a step."""
        self._kelvins.append(self._atoms.get_temperature())
        if step % self.STRIDE == 0:
            self._frames.append(self._atoms.copy())
            self._forces.append(self._atoms.get_forces())

    def told(self) -> dict[str, Any]:
        """Quantiles of the calls, ms, the first left out; the mean temperature, K; the error of the forces that moved the atoms, eV/Å."""
        calls = np.array(self._took[1:] or self._took or [0.0])
        return {
            "p50_ms": float(np.median(calls)),
            "p99_ms": float(np.quantile(calls, 0.99)),
            "max_ms": float(calls.max()),
            "calls": len(self._took),
            "restarts": len(self.restarted),
            "kelvin": float(np.mean(self._kelvins)),
            "own_rmse": force_rmse(self._forces, labels_of(self._frames)),
        }
