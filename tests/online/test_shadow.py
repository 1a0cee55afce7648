"""Shadow MD: on exact oscillators the temperatures scatter as derived, and the embedded potential runs soundly from frames of its data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver.backends import painn
from tumbaga.online import shadow
from tumbaga.online.ports import PotentialSpec
from tumbaga.online.records import Array, Frame, Prediction
from tumbaga.online.shadow import Plan

DATA = Path(__file__).parents[2] / "examples" / "cuau_water_model" / "data" / "cuau-water.npz"
GRID = 6.0 * np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)])  # Å: far from each other


@dataclass
class Springs:
    """Each atom on a spring to its place on the grid, eV/Å²; with `leak`, forces are no gradient; from step `fails` on they are not finite."""

    stiffness: float
    leak: float = 0.0
    fails: int = 10**9
    calls: int = 0

    @property
    def spec(self) -> PotentialSpec:
        return PotentialSpec("test:springs", (), 0.0)

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        self.calls += 1
        return [self._one(frame) for frame in frames]

    def _one(self, frame: Frame) -> Prediction:
        away = frame.positions - GRID[: len(frame)]
        forces = -self.stiffness * away + self.leak * away[:, [1, 2, 0]] * np.array([1.0, -1.0, 1.0])
        if self.calls > self.fails:
            forces = np.full_like(forces, np.nan)
        return Prediction(float(0.5 * self.stiffness * (away**2).sum()), forces, np.zeros((3, 3)))


def water(count: int = 5, kind: str = "md300", atoms: int = 8, seed: int = 0) -> list[Frame]:
    """Frames of the data set behind the embedded potential: MD with GFN2-xTB."""
    with np.load(DATA) as held:
        ends, counts = np.cumsum(held["counts"]), held["counts"]
        chosen = np.random.default_rng(seed).choice(np.flatnonzero((held["kind"] == kind) & (counts == atoms)), count, replace=False)
        numbers, positions = held["numbers"], held["positions"]
    rows = [slice(ends[k] - counts[k], ends[k]) for k in chosen]
    return [Frame(numbers[each], positions[each].astype(np.float64)) for each in rows]


def copper(count: int, stretched: float = 0.0) -> list[Frame]:
    return [Frame(np.full(8, 29), GRID + stretched) for _ in range(count)]


@pytest.mark.parametrize("stiffness", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, pytest.param(20.0, marks=pytest.mark.slow)])
def test_mean_temperatures_scatter_as_derived(stiffness: float) -> None:
    """Free, soft or stiff: over runs, the mean temperature is the thermostat's and its standard deviation is the derived one."""
    courses = [shadow.run(Springs(stiffness), copper(1), Plan(200, 0, seed=seed)) for seed in range(40)]
    found = np.array([course.temperature for course in courses])
    expected = courses[0].temperature_std

    assert expected == pytest.approx(300.0 * np.sqrt(2.0 / (3 * 8) / (100 / shadow.FRICTION_STEPS)))
    assert abs(found.mean() - 300.0) < 4.0 * expected / np.sqrt(len(found)) + 3.0  # K, of the splitting at a finite step
    assert 0.67 < found.std() / expected < 1.33  # 40 runs know a standard deviation to a ninth


def test_what_the_start_sets_free_is_gone_before_temperatures_are_measured() -> None:
    """Springs that are stretched by 0.3 Å at the start, 900 K worth, leave nothing in the measured temperature."""
    course = shadow.run(Springs(2.6), copper(4, stretched=0.3), Plan(steady_steps=0))

    assert abs(course.temperature - 300.0) < 3.0 * course.temperature_std


def test_a_conservative_potential_does_not_drift_and_another_does() -> None:
    """Without thermostat the total energy stays where forces are its gradient, and leaves where they are not."""
    sound, leaking = (shadow.run(Springs(5.0, leak), copper(3), Plan()) for leak in (0.0, 2.0))

    assert sound.drift < 1e-3  # eV per atom and ps
    assert leaking.drift > 5e-3


def test_a_replica_that_breaks_is_named_and_ends_alone() -> None:
    """Two atoms that start within each other break their own run at once; the others go on, and only they are measured."""
    frames = copper(3)
    frames[1] = replace(frames[1], positions=np.concatenate([GRID[:7], GRID[:1] + 0.5]))
    course = shadow.run(Springs(1.0), frames, Plan(40, 8))

    assert [one[:2] for one in course.broken] == [(1, 0)]
    assert "0.866 Å apart" in course.broken[0][2]
    assert (course.replicas, course.steps) == (3, 48)
    assert course.temperature_std == pytest.approx(shadow.temperature_std(300.0, 16, 20))


def test_numbers_that_are_not_finite_break_all_and_end_the_run() -> None:
    """From the step on where the potential fails nothing is asked any more."""
    potential = Springs(1.0, fails=10)
    course = shadow.run(potential, copper(2), Plan())

    assert [one[:2] for one in course.broken] == [(0, 10), (1, 10)]
    assert potential.calls == 11
    assert course.steps == 10
    assert np.isnan(course.temperature)


def test_equal_plans_give_equal_starts_whatever_the_potential() -> None:
    """Two potentials without forces, in unlike batches, see the very same positions."""

    class Seen(Springs):
        def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
            seen.append(frames[0].key)
            return super().predict(frames)

    seen: list[str] = []
    shadow.run(Seen(0.0), copper(2), Plan(20, 5))
    first, seen = seen, []
    shadow.run(Seen(0.0), copper(4), Plan(20, 5))

    assert first == seen
    assert len(set(first)) == 26


def test_a_run_ends_when_it_is_told_to() -> None:
    """Where there is no more time the run is what it has."""
    course = shadow.run(Springs(1.0), copper(2), Plan(), lambda done: done < 30)

    assert (course.steps, course.broken) == (30, [])
    assert np.isnan(course.drift)


@pytest.mark.parametrize(
    ("kind", "temperature", "seed"),
    [("md300", 300.0, 0), pytest.param("md600", 300.0, 1, marks=pytest.mark.slow), pytest.param("md300", 600.0, 2, marks=pytest.mark.slow)],
)
def test_the_embedded_potential_runs_soundly(kind: str, temperature: float, seed: int) -> None:
    """From frames of MD under another potential, at their temperature or another: nothing breaks, temperature and energy are right."""
    course = shadow.run(painn.load("painn:cuau-water", "cpu"), water(kind=kind, seed=seed), Plan(temperature=temperature, seed=seed))

    assert course.broken == []
    assert course.timestep == 0.5
    assert abs(course.temperature - temperature) < 3.0 * course.temperature_std
    assert course.drift < 2e-3  # eV per atom and ps; 2e-4 to 1e-3 was found
