"""Checks of the gate on what any potential is bound to: finite numbers, forces that are the slope of the energy, walls between atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Final

import numpy as np
import numpy.typing as npt
from ase.data import chemical_symbols

from tumbaga.online.gate_asking import Answers, Asked, Case
from tumbaga.online.gate_records import Check
from tumbaga.online.guards import COVALENT_RADII, Verdict, check_frame
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Array, Frame

Bools = npt.NDArray[np.bool_]
_STEP: Final = 0.02  # Å to either side: in float32 the noise of energies (a few 1e-6 eV) is then below 1e-4 eV/Å
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(3)
_FRAMES, _ATOMS = 2, 3
_RATIOS: Final = np.linspace(0.5, 1.0, 41)  # of the sum of covalent radii
_CLIMB: Final = 1.0  # eV: less of a wall is not compared


def weights(candidate: Trainable) -> Check:
    """Judge the tensors: all must be finite. Whatever else would be asked of a potential with others means nothing."""
    tensors = {name: one for name, one in candidate.state().items() if np.issubdtype(one.dtype, np.floating)}
    bad = sorted(name for name, one in tensors.items() if not np.isfinite(one).all())
    numbers = {"tensors": len(tensors), "not_finite": len(bad)}
    if bad:
        return Check("finite", False, numbers, f"{len(bad)} of {len(tensors)} tensors hold numbers that are not finite, {bad[0]!r} first")
    return Check("finite", True, numbers, f"all {len(tensors)} tensors are finite")


def finite(tensors: Check, answers: Answers) -> Check:
    """Judge what was said of the evidence: finite wherever the serving version's answer is.

    Args:
        tensors: what `weights` found, passed.
        answers: of both versions.
    """
    sound = [one for one in answers.every if one.serving.finite]
    bad = sum(not one.candidate.finite for one in sound)
    numbers = {**tensors.numbers, "frames": len(sound), "frames_not_finite": bad}
    if bad:
        return Check("finite", False, numbers, f"its answers to {bad} of {len(sound)} frames are not finite")
    return Check("finite", True, numbers, f"{tensors.reason}, and so are its answers to {len(sound)} frames")


def consistency(case: Case) -> Check:
    """Judge whether forces are the slope of the energy, and the same in the other precision if there is one.

    The serving version may be no better, in its arithmetic or its form; then as much is borne.
    """
    frames = _sound(case)
    if not frames:
        return Check("consistency", True, {"frames": 0}, "there is no frame to hold energies against forces on")
    limit = case.limits.gradient
    found = gradient_error(case.candidate, frames, case.limits.seed)
    numbers = {"frames": len(frames), "error": found, "limit": limit}
    if not found <= limit:
        numbers["serving"] = gradient_error(case.serving, frames, case.limits.seed)
        numbers["limit"] = max(limit, 2.0 * numbers["serving"])
    passed = bool(found <= numbers["limit"])
    told = f"forces and slopes of the energy differ by {found:.1e} of the largest force, {numbers['limit']:.1e} is borne"
    if case.evidence.twin is not None:
        numbers["precision"] = apart = _apart(case.candidate, case.evidence.twin, frames)
        passed = passed and apart <= case.limits.precision
        told += f"; float32 and float64 forces by {apart:.1e}, {case.limits.precision:.1e} is borne"
    return Check("consistency", passed, numbers, told)


def gradient_error(potential: Asked, frames: Sequence[Frame], seed: int = 0) -> float:
    """Return the largest difference between work done by the forces and the energy paid for it, along short ways of single atoms.

    The work is integrated with three points (Gauss-Legendre, exact to the fifth order), so the way can be 0.04 Å long: with a plain central
    difference either the curvature or the rounding of float32 would be larger than what is looked for.

    Args:
        potential: what is asked.
        frames: three atoms of each are moved.
        seed: of atoms and directions.

    Returns:
        eV/Å, or relative to the largest force of the frame where that is above 1 eV/Å; inf if something is not finite.
    """
    rng, worst = np.random.default_rng([seed, 2]), 0.0
    for frame in frames:
        for atom in rng.choice(len(frame), min(_ATOMS, len(frame)), replace=False):
            way = np.zeros_like(frame.positions)
            way[atom] = _STEP * _direction(rng)
            said = potential.predict([replace(frame, positions=frame.positions + at * way) for at in (-1.0, 1.0, *_NODES)])
            work = sum(weight * float((one.forces * way).sum()) for weight, one in zip(_WEIGHTS, said[2:], strict=True))
            largest = max(float(np.abs(one.forces).max()) for one in said)
            error = abs(work + said[1].energy - said[0].energy) / (2.0 * _STEP) / max(1.0, largest)
            worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def short_range(case: Case) -> Check:
    """Judge pairs of atoms, pressed together: where the original pushes them apart the candidate must, too, and not much less."""
    pairs = list(combinations_with_replacement(case.evidence.species, 2))
    scans = [_scan(pair) for pair in pairs]
    until, problems, worst, scanned, walls = case.until(0.15), [], 1.0, 0, 0
    for pair, scan in zip(pairs, scans, strict=True):
        if scanned and case.clock() >= until:
            break
        scanned += 1
        original = _Wall.of(case.original, scan)
        wall = original.pushes > case.limits.wall
        if not wall.any():
            continue  # not all models have walls everywhere: nothing that was never there is asked for
        walls += 1
        share, told = _Wall.of(case.candidate, scan).against(original, wall, case.limits.wall_height)
        if share < case.limits.wall_share and share < _Wall.of(case.serving, scan).against(original, wall, case.limits.wall_height)[0]:
            problems.append(f"{chemical_symbols[pair[0]]}-{chemical_symbols[pair[1]]} {told}")
        worst = min(worst, share)
    numbers = {"pairs": len(pairs), "scanned": scanned, "repulsive": walls, "broken": len(problems), "least_share": worst}
    if problems:
        return Check("short range", False, numbers, f"{len(problems)} of {walls} repulsive pairs are so no more: {problems[0]}")
    return Check("short range", True, numbers, f"{walls} of {scanned} pairs are repulsive in the original potential, and still are")


class _Wall:
    """A pair over its distances, ascending, Å: energy, eV, and the force that pushes it apart, eV/Å."""

    def __init__(self, distances: Array, energies: Array, pushes: Array) -> None:
        self.distances, self.energies, self.pushes = distances, energies, pushes

    @classmethod
    def of(cls, potential: Asked, scan: Sequence[Frame]) -> _Wall:
        said = potential.all_of(scan)
        distances = np.array([frame.positions[1, 0] for frame in scan])
        return cls(distances, np.array([one.energy for one in said]), np.array([one.forces[1, 0] for one in said]))

    def climb(self, wall: Bools) -> Array:
        """Energy from outside to each distance, over those steps alone that lie within the wall, eV."""
        steps = np.where(wall[:-1] & wall[1:], self.energies[:-1] - self.energies[1:], 0.0)
        return np.append(np.cumsum(steps[::-1])[::-1], 0.0)

    def against(self, original: _Wall, wall: Bools, height: float) -> tuple[float, str]:
        """Compare from outside to where the pair has climbed to a height, eV: what is behind is out of reach.

        Returns:
            The smallest share that is left of the original's climb, or, below 0, the strongest pull where there is any, eV/Å; in words, too.
        """
        if not (np.isfinite(self.pushes[wall]).all() and np.isfinite(self.energies).all()):
            return -np.inf, "has numbers that are not finite"
        climb, before = self.climb(wall), np.minimum(original.climb(wall), height)
        nearest = np.flatnonzero(climb >= height).max(initial=0)
        reached = wall & (np.arange(len(wall)) >= nearest)
        at = int(np.where(reached, self.pushes, np.inf).argmin())
        if self.pushes[at] < 0.0:
            return float(self.pushes[at]), f"is pulled together by {-self.pushes[at]:.1f} eV/Å at {self.distances[at]:.2f} Å"
        high = reached & (before > _CLIMB)
        share = float((climb[high] / before[high]).min()) if high.any() else 1.0
        return share, f"has {share:.0%} of its repulsion left"


def _scan(pair: tuple[int, int]) -> list[Frame]:
    distances = _RATIOS * float(COVALENT_RADII[list(pair)].sum())
    return [Frame(np.array(pair), np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])) for distance in distances]


def _sound(case: Case) -> list[Frame]:
    """A few frames of more than one atom in which the guards find nothing."""
    several = [one for one in [*case.evidence.recent, *case.evidence.frames] if len(one) > 1 and check_frame(one).verdict is Verdict.OK]
    return several[:_FRAMES]


def _apart(candidate: Asked, twin: Potential, frames: Sequence[Frame]) -> float:
    pairs = zip(candidate.predict(frames), twin.predict(frames), strict=True)
    return max(float(np.abs(one.forces - other.forces).max()) / max(1.0, float(np.abs(other.forces).max())) for one, other in pairs)


def _direction(rng: np.random.Generator) -> Array:
    drawn: Array = rng.standard_normal(3)
    return drawn / float(np.linalg.norm(drawn))
