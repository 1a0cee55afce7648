"""Move atoms: GFN xTB and potentials as functions from positions to forces, and Langevin MD under either."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before tblite is imported: its OpenMP threads slow small clusters down

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from ase.data import atomic_masses
from ase.units import Bohr, Hartree, fs, kB
from tblite.interface import Calculator

from tumbaga.driver.backends.painn import PaiNN
from tumbaga.online.records import Array, Frame

ForcesOf = Callable[[Array], tuple[float, Array]]  # positions (Å) to energy (eV) and forces (eV/Å)

MAX_FORCE = 40.0  # eV/Å; beyond it the pair repulsion of the potential rules, and xTB itself is doubtful
TIMESTEP = 1.0 * fs
FRICTION = 0.02 / fs
WALL_STIFFNESS = 1.0  # eV/Å²
WALL_MARGIN = 1.5  # Å beyond the outermost atom of the start


class XTB:
    """One xTB method for one composition; keeps the last wave function as the next guess unless `cold`."""

    def __init__(self, method: str, numbers: npt.NDArray[np.int64], cold: bool = False) -> None:
        self._method, self._numbers, self._cold = method, numbers, cold
        self._calculator: Calculator | None = None
        self._last = None

    def __call__(self, positions: Array) -> tuple[float, Array]:
        """Return energy (eV) and forces (eV/Å). Raises RuntimeError where the SCF does not converge."""
        if self._calculator is None or self._cold:
            self._calculator = Calculator(self._method, self._numbers, positions / Bohr, uhf=_odd(self._numbers))
            self._calculator.set("verbosity", 0)
            self._last = None
        else:
            self._calculator.update(positions / Bohr)
        try:
            result = self._calculator.singlepoint(self._last) if self._last is not None else self._calculator.singlepoint()
        except Exception:
            self._calculator = None
            raise
        self._last = result
        return float(result.get("energy")) * Hartree, -np.asarray(result.get("gradient")) * Hartree / Bohr


def _odd(numbers: npt.NDArray[np.int64]) -> int:
    return int(numbers.sum() % 2)


class Served:
    """The forces of a potential for one composition; RuntimeError where they are beyond any sense, which ends a trajectory."""

    def __init__(self, potential: PaiNN, numbers: npt.NDArray[np.int64]) -> None:
        self._potential, self._numbers = potential, numbers

    def __call__(self, positions: Array) -> tuple[float, Array]:
        """Return energy (eV) and forces (eV/Å)."""
        said = self._potential.predict([Frame(self._numbers, positions)])[0]
        if not said.finite or np.abs(said.forces).max() > MAX_FORCE:
            raise RuntimeError("the potential left the physical range")
        return said.energy, said.forces


def langevin(
    numbers: npt.NDArray[np.int64],
    positions: Array,
    forces_of: ForcesOf,
    kelvin: float,
    rng: np.random.Generator,
    timestep: float = TIMESTEP,
    wall: bool = True,
) -> Iterator[tuple[Array, Array]]:
    """Yield positions (Å) and velocities (ASE units) of Langevin MD (BAOAB splitting), without end; in a soft spherical wall if wanted.

    Several runs of one composition may go side by side: positions of shape (n_runs, n_atoms, 3) then, without a wall.
    The centre of mass is left to the thermostat: taking it out of the noise overheats small clusters.
    Source: Leimkuhler, Matthews, Appl. Math. Res. eXpress 2013, 34.
    """
    masses = atomic_masses[numbers][:, None]
    thermal = np.sqrt(kB * kelvin / masses)
    velocities = thermal * rng.normal(size=positions.shape)
    decay = np.exp(-FRICTION * timestep)
    if wall:
        forces_of = _walled(forces_of, np.linalg.norm(positions - positions.mean(axis=0), axis=1).max() + WALL_MARGIN)
    forces = forces_of(positions)[1]
    while True:
        velocities = velocities + 0.5 * timestep * forces / masses
        positions = positions + 0.5 * timestep * velocities
        velocities = decay * velocities + np.sqrt(1 - decay**2) * thermal * rng.normal(size=positions.shape)
        positions = positions + 0.5 * timestep * velocities
        forces = forces_of(positions)[1]
        velocities = velocities + 0.5 * timestep * forces / masses
        yield positions, velocities


def _walled(forces_of: ForcesOf, radius: float) -> ForcesOf:
    def found(positions: Array) -> tuple[float, Array]:
        energy, forces = forces_of(positions)
        centred = positions - positions.mean(axis=0)
        distance = np.linalg.norm(centred, axis=1, keepdims=True)
        excess = np.maximum(distance - radius, 0.0)
        return energy + 0.5 * WALL_STIFFNESS * float((excess**2).sum()), forces - WALL_STIFFNESS * excess * centred / np.maximum(
            distance, 1e-9
        )

    return found
