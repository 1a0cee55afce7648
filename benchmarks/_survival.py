"""Does MD under a potential stay physical? Several runs side by side, each judged by fixed rules and never by the potential's own uncertainty.

A run ends at the first of
  failed       a number that is not finite; a force above 50 eV/Å; a temperature above three times the target for 50 fs; a pair below 0.6 of the
               sum of covalent radii
  reacted      O-H beyond 1.6 Å in a water that was intact at the start
  evaporated   an atom more than 12 Å from the centre of mass

A soft wall about the origin, where there is one, keeps together what would evaporate.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase.data import atomic_masses, covalent_radii
from ase.units import fs, kB

from tumbaga.online.ports import Potential
from tumbaga.online.records import Array, Frame, Ints

MAX_FORCE, HOT, HOT_FS, TOO_CLOSE, REACTED, FAR = 50.0, 3.0, 50.0, 0.6, 1.6, 12.0
TIMESTEP_FS = 1.0
FRICTION = 0.02  # per fs
WALL_STIFFNESS = 1.0  # eV/Å²
SURVIVED = "survived"


class Rules:
    """The ends of one run, asked after every step; empty text while it goes on."""

    def __init__(self, start: Frame, kelvin: float) -> None:
        numbers, self._kelvin, self._hot = start.numbers, kelvin, 0.0
        self._masses = atomic_masses[numbers]
        radii = covalent_radii[numbers]
        self._contact = TOO_CLOSE * (radii[:, None] + radii[None] - np.diag(np.full(len(numbers), np.inf)))
        bonded = (_distances(start.positions) < 1.3) & (numbers[:, None] == 8) & (numbers[None] == 1)
        self._oxygens, self._hydrogens = np.nonzero(bonded)

    def __call__(self, positions: Array, velocities: Array, forces: Array) -> str:
        if not (np.isfinite(positions).all() and np.isfinite(forces).all()):
            return "failed: not finite"
        if np.linalg.norm(forces, axis=1).max() > MAX_FORCE:
            return "failed: force"
        kelvin = float((self._masses[:, None] * velocities**2).sum() / (3 * len(self._masses) * kB))
        self._hot = self._hot + TIMESTEP_FS if kelvin > HOT * self._kelvin else 0.0
        if self._hot >= HOT_FS:
            return "failed: hot"
        apart = _distances(positions)
        if (apart < self._contact).any():
            return "failed: too close"
        if (apart[self._oxygens, self._hydrogens] > REACTED).any():
            return "reacted"
        centre = self._masses @ positions / self._masses.sum()
        return "evaporated" if np.linalg.norm(positions - centre, axis=1).max() > FAR else ""


def _distances(positions: Array) -> Array:
    found: Array = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    return found


def runs(
    potential: Potential, starts: Sequence[Frame], kelvins: Sequence[float], horizon_fs: float, seed: int, wall: float = np.inf
) -> list[tuple[str, float]]:
    """Move all starts, of one composition, at their temperatures; return how each ended and when, fs.

    Langevin dynamics in BAOAB splitting (Leimkuhler, Matthews, Appl. Math. Res. eXpress 2013, 34), in a wall of that radius, Å; the centre of mass is left
    to the thermostat. The runs that go on are one batch.
    """
    rng = np.random.default_rng(seed)
    rules = [Rules(start, kelvin) for start, kelvin in zip(starts, kelvins, strict=True)]
    numbers, masses = starts[0].numbers, atomic_masses[starts[0].numbers][:, None]
    thermal = np.sqrt(kB * np.array(kelvins)[:, None, None] / masses)
    at, velocities = np.stack([start.positions for start in starts]), thermal * rng.normal(size=(len(starts), len(numbers), 3))
    going, ends = np.arange(len(starts)), [(SURVIVED, horizon_fs)] * len(starts)
    forces, step = _forces(potential, numbers, at) + _pushed(at, wall), TIMESTEP_FS * fs
    decay = np.exp(-FRICTION * TIMESTEP_FS)
    for count in itertools.takewhile(lambda n: n * TIMESTEP_FS <= horizon_fs, itertools.count(1)):
        velocities = velocities + 0.5 * step * forces / masses
        at = at + 0.5 * step * velocities
        velocities = decay * velocities + np.sqrt(1 - decay**2) * thermal[going] * rng.normal(size=at.shape)
        at = at + 0.5 * step * velocities
        forces = _forces(potential, numbers, at)
        pushed = forces + _pushed(at, wall)
        velocities = velocities + 0.5 * step * pushed / masses
        told = [rules[run](*one) for run, one in zip(going, zip(at, velocities, forces, strict=True), strict=True)]
        for run, end in zip(going, told, strict=True):
            if end:
                ends[run] = (end, count * TIMESTEP_FS)
        kept: Any = np.array([not end for end in told])
        going, at, velocities, forces = going[kept], at[kept], velocities[kept], pushed[kept]
        if not len(going):
            break
    return ends


def _pushed(at: Array, wall: float) -> Array:
    """Force of the wall on each atom, eV/Å: none inside of it."""
    distance = np.linalg.norm(at, axis=2, keepdims=True)
    found: Array = -WALL_STIFFNESS * np.maximum(distance - wall, 0.0) * at / np.maximum(distance, 1e-9)
    return found


def _forces(potential: Potential, numbers: Ints, at: Array) -> Array:
    """Forces of each run; nan where its positions are not finite any more."""
    found = np.full(at.shape, np.nan)
    fine = np.flatnonzero(np.isfinite(at).all(axis=(1, 2)))
    for k, said in zip(fine, potential.predict([Frame(numbers, at[k]) for k in fine]), strict=True):
        found[k] = said.forces
    return found
