"""The gate: what a candidate version must pass before it serves. Pure, no torch; the same offline and in a run.

    checks = gate(candidate, serving, original, Evidence(labels, replay, recent))
    if passed(checks): ...
    "; ".join(refusals(checks))

A candidate is never asked for more than the serving version has: where that one explodes, has no wall or drifts, the candidate may do the
same, but not worse. Otherwise a bad version could never be replaced by a better one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from tumbaga.online import gate_labels, gate_physics, gate_shadow, gate_walls
from tumbaga.online.gate_asking import Asked, Case, collect
from tumbaga.online.gate_records import FINE_TUNE, LAST_LAYER, Check, Evidence, Known, Limits
from tumbaga.online.ports import Potential, Trainable

__all__ = ["FINE_TUNE", "LAST_LAYER", "Check", "Evidence", "Known", "Limits", "gate", "passed", "refusals"]


def gate(
    candidate: Trainable,
    serving: Trainable,
    original: Potential | None,
    evidence: Evidence,
    limits: Limits = FINE_TUNE,
    progress: Callable[[str], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Check]:
    """Judge a candidate version.

    Args:
        candidate: what is to serve.
        serving: what serves now.
        original: what the run began with; None where it is not at hand: the serving version then takes its place.
        evidence: see there; elements that one of the potentials does not know must not occur.
        limits: `FINE_TUNE` or `LAST_LAYER`, or others.
        progress: told which check is under way, after each batch of frames: at least every few seconds, whatever the potential.
        clock: seconds.

    Returns:
        One finding a check: finite, consistency, audits, replay, short range, shadow MD, calibration.
        A candidate that is not finite gets only the first: the others would mean nothing.
    """
    doing = ["finite"]

    def told() -> None:
        if progress is not None:
            progress(doing[0])

    def run(name: str, check: Callable[[], Check]) -> Check:
        doing[0] = name
        told()
        return check()

    with np.errstate(all="ignore"):  # overflows are findings here
        tensors = run("finite", lambda: gate_physics.weights(candidate))
        if not tensors.passed:
            return [tensors]
        after, before = Asked(candidate, clock, told), Asked(serving, clock, told)
        case = Case(after, before, before if original is None else Asked(original, clock, told), evidence, limits, clock)
        answers = collect(case)
        finite = gate_physics.finite(tensors, answers)
        if not finite.passed:
            return [finite]
        checks = {
            "consistency": lambda: gate_physics.consistency(case),
            "audits": lambda: gate_labels.audits(case, answers),
            "replay": lambda: gate_labels.replay(case, answers),
            "short range": lambda: gate_walls.short_range(case),
            "shadow MD": lambda: gate_shadow.shadow_md(case),
            "calibration": lambda: gate_labels.calibration(case),
        }
        return [finite, *(run(name, check) for name, check in checks.items())]


def passed(checks: Sequence[Check]) -> bool:
    """Whether a candidate with these findings may serve."""
    return all(check.passed for check in checks)


def refusals(checks: Sequence[Check]) -> list[str]:
    """What is to be said of those that were not passed, "check: reason" each."""
    return [f"{check.name}: {check.reason}" for check in checks if not check.passed]
