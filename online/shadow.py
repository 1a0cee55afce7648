"""Shadow MD: a few short runs under a potential that does not serve yet, all in one batch a step. Numpy only; knows no gate.

First with a thermostat, then without: frames come from runs under other forces, so the start is not in equilibrium, and velocities are
drawn anew. Friction is strong: what the change of forces has set free is taken up within the first half of the thermostatted steps, and the
temperature is measured over the second.

Langevin dynamics in the splitting BAOAB (Leimkuhler & Matthews, Appl. Math. Res. Express 2013, 34), then velocity Verlet, which is the same
splitting without friction. Every atom feels friction and noise, the centre of mass too, so 3N degrees of freedom are thermal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from ase.data import atomic_masses

from tumbaga.online.bonds import BondWatch
from tumbaga.online.guards import Finding, Verdict, check_prediction
from tumbaga.online.overlap import OverlapWatch
from tumbaga.online.ports import Potential
from tumbaga.online.records import Array, Frame, Prediction

BOLTZMANN: Final = 8.617333262e-5  # eV/K
ACCELERATION: Final = 9.648533212e-3  # Å/fs² of 1 eV/Å on 1 amu
FRICTION_STEPS: Final = 20.0  # steps in which friction alone takes the velocity to 1/e
_HYDROGEN_STEP, _LONGEST_STEP = 0.5, 2.0  # fs


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        thermal_steps: with the thermostat; the temperature is measured over the second half of them.
        steady_steps: without it, after that.
        temperature: K.
        max_force: eV/Å; a replica with a larger one is broken.
        seed: of velocities and noise.
    """

    thermal_steps: int = 200
    steady_steps: int = 100
    temperature: float = 300.0
    max_force: float = 50.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Course:
    """How it went.

    Attributes:
        replicas: runs that were begun. steps: that were done, of each that did not break.
        timestep: fs.
        broken: what ended a replica, as (replica, step, sentence); at most one each.
        temperature: mean over the measured steps of what was not broken, K; nan where nothing was measured.
        temperature_std: standard deviation that this mean has by chance, K.
        drift: mean over replicas of the absolute drift of the total energy without thermostat, eV per atom and ps; nan where nothing was
            measured.
    """

    replicas: int
    steps: int
    timestep: float
    broken: list[tuple[int, int, str]]
    temperature: float
    temperature_std: float
    drift: float


def timestep(frames: Sequence[Frame]) -> float:
    """Return a time step for the lightest atom, fs: 0.5 for hydrogen, longer as the root of the mass, 2 at most.

    >>> timestep([Frame(np.array([8, 1]), np.eye(3)[:2])]), timestep([Frame(np.array([29]), np.zeros((1, 3)))])
    (0.5, 2.0)
    """
    lightest = min(float(atomic_masses[frame.numbers].min()) for frame in frames)
    return min(_LONGEST_STEP, _HYDROGEN_STEP * math.sqrt(lightest / float(atomic_masses[1])))


def temperature_std(temperature: float, atoms: int, steps: float) -> float:
    """Return the standard deviation of a mean temperature over a run with friction, K.

    A single temperature of 3N thermal degrees of freedom has the variance 2 T² / 3N. Their kinetic energies decay as the square of the
    velocity's autocorrelation C, and C'' + g C' + w² C = 0 gives, multiplied with C' and integrated for the response whose derivative C is,
    the integral of C² as 1/2g for any frequency w, zero included: so a run of length t holds g t independent temperatures.

    Args:
        temperature: of the thermostat, K.
        atoms: of all replicas together.
        steps: measured of each, of which FRICTION_STEPS are 1/g.
    """
    return temperature * math.sqrt(2.0 / (3.0 * atoms) * FRICTION_STEPS / steps)


@dataclass
class _Replica:
    """One run; `forces` and `energy` are those of `frame`."""

    index: int
    frame: Frame
    velocities: Array
    masses: Array
    rng: np.random.Generator
    forces: Array
    energy: float = 0.0
    overlap: OverlapWatch = field(default_factory=OverlapWatch)
    bonds: BondWatch = field(default_factory=BondWatch)
    temperatures: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)

    @property
    def kinetic(self) -> float:
        """eV."""
        return float(0.5 * (self.masses * self.velocities**2).sum() / ACCELERATION)

    def kick(self, time: float) -> None:
        """Forces change the velocities for a time in fs."""
        self.velocities = self.velocities + time * ACCELERATION * self.forces / self.masses

    def drift(self, time: float) -> None:
        """Velocities move the atoms for a time in fs."""
        old = self.frame
        self.frame = Frame.checked(old.numbers, old.positions + time * self.velocities, old.cell, old.periodic)

    def thermalise(self, kept: float, temperature: float) -> None:
        """Keep a part of the velocities and draw the rest."""
        spread = np.sqrt((1.0 - kept**2) * BOLTZMANN * temperature * ACCELERATION / self.masses)
        self.velocities = kept * self.velocities + spread * self.rng.standard_normal(self.velocities.shape)

    def take(self, said: Prediction, max_force: float) -> str:
        """Take the forces of the frame; say what is wrong with it or them, nothing if all is well."""
        findings: list[Finding] = [self.overlap.check(self.frame), check_prediction(said, max_force), self.bonds.check(self.frame)]
        self.forces, self.energy = said.forces, said.energy
        worst = max(findings, key=lambda one: one.verdict)
        return worst.sentence if worst.verdict > Verdict.OK else ""


def run(potential: Potential, frames: Sequence[Frame], plan: Plan, go_on: Callable[[int], bool] | None = None) -> Course:
    """Run from frames, with Maxwell-Boltzmann velocities.

    Runs of two potentials with equal frames and plans start with the same velocities and get the same noise.

    Args:
        potential: what gives the forces.
        frames: starts, of any sizes; at least one.
        plan: see there.
        go_on: asked before each step with how many were done; where it says no, the run ends there and is judged by what it has.
    """
    step = timestep(frames)
    every = [_begun(k, frame, plan) for k, frame in enumerate(frames)]
    broken: list[tuple[int, int, str]] = []
    alive = _asked(potential, every, plan, 0, broken)
    kept = math.exp(-1.0 / FRICTION_STEPS)
    done = 0
    for done in itertools.count():
        if done == plan.thermal_steps + plan.steady_steps or not alive or (go_on is not None and not go_on(done)):
            break
        thermal = done < plan.thermal_steps
        for one in alive:
            one.kick(0.5 * step)
            one.drift(0.5 * step)
            if thermal:
                one.thermalise(kept, plan.temperature)
            one.drift(0.5 * step)
        alive = _asked(potential, alive, plan, done + 1, broken)
        for one in alive:
            one.kick(0.5 * step)
            if thermal:
                one.temperatures.append(2.0 * one.kinetic / (3.0 * len(one.frame) * BOLTZMANN))
            else:
                one.totals.append(one.energy + one.kinetic)
    return _course(every, alive, done, step, broken, plan)


def _begun(index: int, frame: Frame, plan: Plan) -> _Replica:
    rng = np.random.default_rng([plan.seed, index])
    masses = atomic_masses[frame.numbers][:, None]
    zeros = np.zeros_like(frame.positions)
    one = _Replica(index, frame, zeros, masses, rng, zeros)
    one.thermalise(0.0, plan.temperature)
    return one


def _asked(potential: Potential, replicas: Sequence[_Replica], plan: Plan, step: int, broken: list[tuple[int, int, str]]) -> list[_Replica]:
    """Evaluate all replicas as one batch; return those that are sound, and add the others to the broken ones."""
    sound = []
    for one, said in zip(replicas, potential.predict([one.frame for one in replicas]), strict=True):
        if told := one.take(said, plan.max_force):
            broken.append((one.index, step, told))
        else:
            sound.append(one)
    return sound


def _course(
    every: Sequence[_Replica], alive: Sequence[_Replica], done: int, step: float, broken: list[tuple[int, int, str]], plan: Plan
) -> Course:
    measured = [one.temperatures[min(len(one.temperatures), plan.thermal_steps) // 2 :] for one in alive]
    steps, atoms = (len(measured[0]) if measured else 0), sum(len(one.frame) for one in alive)
    mean, std = math.nan, math.nan
    if steps:
        mean = sum(len(one.frame) * float(np.mean(each)) for one, each in zip(alive, measured, strict=True)) / atoms
        std = temperature_std(plan.temperature, atoms, max(steps, FRICTION_STEPS))
    return Course(len(every), done, step, broken, mean, std, _drift(alive, step))


def _drift(alive: Sequence[_Replica], step: float) -> float:
    """From the first quarter to the last, which are three quarters apart; means over a quarter take out the swing of the bonds."""
    quarter = len(alive[0].totals) // 4 if alive else 0
    if not quarter:
        return math.nan
    changes = [abs(np.mean(one.totals[-quarter:]) - np.mean(one.totals[:quarter])) / len(one.frame) for one in alive]
    return float(np.mean(changes)) / (1e-3 * step * (len(alive[0].totals) - quarter))
