"""Does 300 K MD under the potential stay physical, in the eyes of its teacher? One line a run, then counts and bounds.

A run fails at the first of: a number that is not finite; a force above 50 eV/Å; a temperature above three times the target for 50 fs;
a pair below 0.6 of the sum of covalent radii. Recorded apart: "reacted" (O-H beyond 1.6 Å in a water intact at the start) and "evaporated"
(an atom more than 12 Å from the centre of mass); both end the run but are no failures. Every 50 fs GFN2-xTB judges the forces.

    python examples/cuau_water_model/survival.py
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import dataset
import numpy as np
import numpy.typing as npt
import torch
from ase.data import atomic_masses, covalent_radii
from ase.units import fs, kB
from moving import XTB, ForcesOf, langevin

from tumbaga.driver.backends.painn import PaiNN, load
from tumbaga.online.records import Array, Frame

RUNS = (("CuAu(H2O)2", 5), ("CuAu(H2O)4", 3), ("Cu4Au4(H2O)2", 3), ("Cu4Au2(H2O)3", 2), ("Cu2Au4(H2O)8", 2))
TIMESTEP_FS, KELVIN = 0.5, 300.0
MAX_FORCE, HOT, HOT_FS, TOO_CLOSE, REACTED, FAR = 50.0, 3.0, 50.0, 0.6, 1.6, 12.0
JUDGED_FS = 50.0


@dataclass
class Outcome:
    """One run: how and when it ended, its mean temperature, and the teacher's verdict on sampled frames (force RMSE, meV/Å)."""

    formula: str
    seed: int
    end: str
    ps: float
    kelvin: float
    judged: int
    unjudged: int
    rmse: float
    worst_tenth: float
    worst: float


class Rules:
    """The ends of a run, checked on every step; empty text while it goes on."""

    def __init__(self, numbers: npt.NDArray[np.int64], positions: Array) -> None:
        self._numbers, self._masses = numbers, atomic_masses[numbers]
        self._contact = covalent_radii[numbers][:, None] + covalent_radii[numbers][None] + np.diag(np.full(len(numbers), -np.inf))
        oxygens, hydrogens = np.flatnonzero(numbers == 8), np.flatnonzero(numbers == 1)
        apart = _distances(positions)
        self._bonds = [(o, h) for o in oxygens for h in hydrogens if apart[o, h] < 1.3]
        self._hot = 0.0

    def kelvin(self, velocities: Array) -> float:
        """Instantaneous temperature, all 3N degrees of freedom."""
        return float((self._masses[:, None] * velocities**2).sum() / (3 * len(self._masses) * kB))

    def __call__(self, positions: Array, velocities: Array, forces: Array) -> str:
        if not (np.isfinite(positions).all() and np.isfinite(forces).all()):
            return "failed: not finite"
        if np.linalg.norm(forces, axis=1).max() > MAX_FORCE:
            return "failed: force"
        self._hot = self._hot + TIMESTEP_FS if self.kelvin(velocities) > HOT * KELVIN else 0.0
        if self._hot >= HOT_FS:
            return "failed: hot"
        apart = _distances(positions)
        if (apart < TOO_CLOSE * self._contact).any():
            return "failed: too close"
        if any(apart[o, h] > REACTED for o, h in self._bonds):
            return "reacted"
        centre = self._masses @ positions / self._masses.sum()
        return "evaporated" if np.linalg.norm(positions - centre, axis=1).max() > FAR else ""


def _distances(positions: Array) -> Array:
    found: Array = np.linalg.norm(positions[:, None] - positions[None], axis=2)
    return found


class Watched:
    """Forces of the potential for several runs side by side, as one batch. A run that has ended is held at its start and ignored."""

    def __init__(self, potential: PaiNN, frames: list[Frame]) -> None:
        self._potential, self._starts = potential, frames
        self.forces: Array = np.zeros((len(frames), len(frames[0]), 3))
        self.going = [True] * len(frames)

    def __call__(self, positions: Array) -> tuple[float, Array]:
        """Return the summed energy (eV) and all forces, shape (n_runs, n_atoms, 3), eV/Å."""
        for k, here in enumerate(positions):
            if not self.going[k] or not np.isfinite(here).all():
                positions[k] = self._starts[k].positions
        said = self._potential.predict([Frame(self._starts[0].numbers, here) for here in positions])
        self.forces = np.stack([one.forces for one in said])
        return sum(one.energy for one in said), self.forces


def starts(data: dataset.DataSet, formula: str, count: int) -> list[Frame]:
    """The last 300 K frame of as many different trajectories of one composition."""
    rows = [k for k in range(len(data)) if data.kinds[k] == "md300" and data.trajectories[k].startswith(formula + "/")]
    last = {data.trajectories[k]: data.frames[k] for k in sorted(rows, key=lambda k: int(data.steps[k]))}
    names = sorted(last)
    return [last[names[k % len(names)]] for k in range(count)]


def judge(teacher: ForcesOf, positions: Array, forces: Array) -> float | None:
    """Root mean square force error, eV/Å; None where the teacher's SCF does not converge."""
    try:
        return float(np.sqrt(np.mean((teacher(positions)[1] - forces) ** 2)))
    except RuntimeError:
        return None


def run(potential: PaiNN, frames: list[Frame], formula: str, horizon: float) -> list[Outcome]:
    """All runs of one composition, each `horizon` ps at most; seeds count the runs."""
    rng, numbers = np.random.default_rng([len(frames), 7]), frames[0].numbers
    watched, rules = Watched(potential, frames), [Rules(numbers, frame.positions) for frame in frames]
    teacher = XTB("GFN2-xTB", numbers, cold=True)
    every = round(JUDGED_FS / TIMESTEP_FS)
    ends, lasted, heat = [""] * len(frames), [0] * len(frames), [0.0] * len(frames)
    verdicts: list[list[float | None]] = [[] for _ in frames]
    moving = langevin(numbers, np.stack([f.positions for f in frames]), watched, KELVIN, rng, TIMESTEP_FS * fs, wall=False)
    for step, (positions, velocities) in enumerate(islice(moving, round(horizon * 1e3 / TIMESTEP_FS)), 1):
        for k in np.flatnonzero(watched.going):
            lasted[k] = step
            heat[k] += rules[k].kelvin(velocities[k])
            ends[k] = rules[k](positions[k], velocities[k], watched.forces[k])
            if (step % every == 0 or ends[k]) and "not finite" not in ends[k]:
                verdicts[k].append(judge(teacher, positions[k], watched.forces[k]))
            watched.going[k] = not ends[k]
        if not any(watched.going):
            break
    return [_outcome(formula, k, ends[k], lasted[k], heat[k], verdicts[k]) for k in range(len(frames))]


def _outcome(formula: str, seed: int, end: str, steps: int, heat: float, verdicts: list[float | None]) -> Outcome:
    errors = 1e3 * np.array([v for v in verdicts if v is not None] or [np.nan])
    return Outcome(
        formula,
        seed,
        end or "survived",
        steps * TIMESTEP_FS / 1e3,
        heat / steps,
        len(errors),
        verdicts.count(None),
        float(np.sqrt((errors**2).mean())),
        float(np.quantile(errors, 0.9)),
        float(errors.max()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="painn:cuau-water")
    parser.add_argument("--ps", type=float, default=10.0, help="length of the runs of the first composition; the others get half")
    parser.add_argument("--only", default="", help="one composition of the list")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    potential, data, outcomes = load(args.model, device="cpu"), dataset.read(), []
    for formula, count in RUNS:
        if args.only and formula != args.only:
            continue
        frames = starts(data, formula, count)
        for one in run(potential, frames, formula, args.ps if formula == RUNS[0][0] else 0.5 * args.ps):
            outcomes.append(one)
            print(
                f"{formula:14s} {len(frames[0]):2d} atoms, seed {one.seed}: {one.end} at {one.ps:.2f} ps, {one.kelvin:.0f} K, teacher's force RMSE "
                f"{one.rmse:.0f} (90 % {one.worst_tenth:.0f}, worst {one.worst:.0f}) meV/Å on {one.judged} frames, {one.unjudged} not converged",
                flush=True,
            )
    failures, total = sum(o.end.startswith("failed") for o in outcomes), sum(o.ps for o in outcomes)
    bound = f", failure rate below {3 / total:.3f} per ps (95 %)" if not failures else ""
    other = sum(o.end in ("reacted", "evaporated") for o in outcomes)
    print(f"{failures} of {len(outcomes)} runs failed in {total:.1f} ps{bound}; {other} reacted or evaporated")
    if args.json:
        args.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))


if __name__ == "__main__":
    main()
