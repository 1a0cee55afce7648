"""Checks of the gate on what any potential is bound to: finite numbers, forces that are the slope of the energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from tumbaga.online.gate_asking import Answers, Asked, Case
from tumbaga.online.gate_records import Check
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Array, Frame

_STEP: Final = 0.02  # Å to either side: in float32 the noise of energies (a few 1e-6 eV) is then below 1e-4 eV/Å
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(3)
_FRAMES, _ATOMS = 2, 3


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
    frames = case.sound[:_FRAMES]
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


def _apart(candidate: Asked, twin: Potential, frames: Sequence[Frame]) -> float:
    pairs = zip(candidate.predict(frames), twin.predict(frames), strict=True)
    return max(float(np.abs(one.forces - other.forces).max()) / max(1.0, float(np.abs(other.forces).max())) for one, other in pairs)


def _direction(rng: np.random.Generator) -> Array:
    drawn: Array = rng.standard_normal(3)
    return drawn / float(np.linalg.norm(drawn))
