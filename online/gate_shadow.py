"""The gate's check by shadow MD: what a course must look like, and how long it may take. The dynamics are in `shadow`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from tumbaga.online.gate_asking import Asked, Case
from tumbaga.online.gate_records import Check, Limits, Number
from tumbaga.online.guards import Verdict, check_frame
from tumbaga.online.records import Frame
from tumbaga.online.shadow import FRICTION_STEPS, Course, Plan, run

_SHARE: Final = 0.25  # of the gate's time, for either version
_LEAST: Final = 40  # steps of a run, however slow the potential is said to be; the deadline still ends it
_SETTLED: Final = 2.0 * FRICTION_STEPS  # steps before temperatures are measured, or they are not judged
_TEMPERATURE: Final = 300.0  # K


def shadow_md(case: Case) -> Check:
    """Judge short runs from recent frames: sound to the end, at the right temperature, and conserving energy without thermostat.

    The serving version runs only where the candidate leaves something to be desired: from the same start, with the same noise.
    """
    limits = case.limits
    if limits.shadow_steps <= 0:
        return Check("shadow MD", True, {"replicas": 0}, "shadow MD was not asked for")
    quiet = [one for one in case.evidence.recent if check_frame(one).verdict is Verdict.OK][: limits.shadow_frames]
    if not quiet:
        return Check("shadow MD", True, {"replicas": 0}, "there are no recent frames to start shadow MD from")
    frames, plan = _affordable(case, quiet)
    course = _within(case, case.candidate, frames, plan)
    before = None if not _problems(course, None, plan, limits) else _within(case, case.serving, frames, plan)
    problems = _problems(course, before, plan, limits)
    asked = limits.shadow_steps + limits.steady_steps
    numbers: dict[str, Number] = {**_numbers(course), "steps_asked": asked, "left_out": len(case.evidence.recent) - len(quiet)}
    if before is not None:
        numbers |= {f"{key}_serving": value for key, value in _numbers(before).items() if key in ("broken", "temperature", "drift")}
    short = f" (of {asked}: there was no time for more)" if course.steps < asked and len(course.broken) < course.replicas else ""
    told = f"{course.replicas} runs of {course.steps} steps{short} of {course.timestep:.2g} fs at {plan.temperature:g} K: "
    if before is not None and not problems:
        told += f"{'; '.join(_problems(course, None, plan, limits))}, but no worse than the serving version"
    else:
        told += "; ".join(problems) or _sound(course)
    return Check("shadow MD", not problems, numbers, told)


def _affordable(case: Case, frames: Sequence[Frame]) -> tuple[list[Frame], Plan]:
    """As many starts, and then steps, as there is time for."""
    limits, chosen = case.limits, list(frames)
    temperature = case.evidence.temperature or _TEMPERATURE
    plan = Plan(limits.shadow_steps, limits.steady_steps, temperature, limits.shadow_force, limits.seed)
    steps = plan.thermal_steps + plan.steady_steps

    def share() -> float:
        cost = case.candidate.seconds_per_atom * steps * sum(map(len, chosen))
        return _SHARE * limits.seconds / cost if cost > 0 else math.inf

    while len(chosen) > 1 and share() < 1.0:
        chosen.pop()
    if share() < 1.0:
        factor = max(share(), _LEAST / steps)
        plan = replace(plan, thermal_steps=round(factor * plan.thermal_steps), steady_steps=round(factor * plan.steady_steps))
    return chosen, plan


def _within(case: Case, potential: Asked, frames: Sequence[Frame], plan: Plan) -> Course:
    until = case.until(2.0 * _SHARE)  # what was estimated is not what it takes
    return run(potential, frames, plan, lambda done: case.clock() < until)


def _problems(course: Course, before: Course | None, plan: Plan, limits: Limits) -> list[str]:
    """What is wrong with a course that was not so under the serving version; all that is wrong where that is None."""
    found = []
    if len(course.broken) > (len(before.broken) if before else 0):
        replica, step, sentence = course.broken[0]
        found.append(f"{len(course.broken)} broke, run {replica} in step {step}: {sentence}")
    off, borne = abs(course.temperature - plan.temperature), _temperature_borne(course, plan, limits)
    if off > borne and not (before and abs(before.temperature - plan.temperature) >= off):
        found.append(f"the temperature is {course.temperature:.0f} K, {borne:.0f} K off would be borne")
    most = max(limits.drift_energy, limits.drift_energy_ratio * before.drift if before else 0.0)
    if course.drift > most:
        found.append(f"energy drifts by {1e3 * course.drift:.3g} meV/atom/ps, {1e3 * most:.3g} would be borne")
    return found


def _sound(course: Course) -> str:
    told = ["sound"]
    if math.isfinite(course.temperature):
        told.append(f"{course.temperature:.0f} K measured")
    if math.isfinite(course.drift):
        told.append(f"energy drifts by {1e3 * course.drift:.2g} meV/atom/ps")
    return ", ".join(told)


def _temperature_borne(course: Course, plan: Plan, limits: Limits) -> float:
    """K; infinite where the runs were too short to settle."""
    if 0.5 * min(course.steps, plan.thermal_steps) < _SETTLED:
        return math.inf
    return limits.temperature_sigmas * course.temperature_std + limits.temperature_slack * plan.temperature


def _numbers(course: Course) -> dict[str, Number]:
    return {
        "replicas": course.replicas,
        "steps": course.steps,
        "timestep_fs": course.timestep,
        "broken": len(course.broken),
        "temperature": course.temperature,
        "temperature_std": course.temperature_std,
        "drift": course.drift,
    }
