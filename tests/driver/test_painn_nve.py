"""Without a thermostat: energy is conserved while neighbour lists are kept from step to step, and a trajectory does not depend on which are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ase import units
from ase.data import atomic_masses

from tumbaga.driver.backends import painn_lists
from tumbaga.driver.backends.painn import DATA, PaiNN, load
from tumbaga.driver.structures import read_frame
from tumbaga.online.records import Array, Frame

STEP_FS = 0.25
DRIFT = 0.1  # meV/atom/ps; 0.01 or less was found
SWING = 0.2  # meV/atom between the highest and the lowest total energy; of the integrator: 0.02 and 0.05 were found


def model(dtype: str = "float32") -> PaiNN:
    return load("painn:cuau-water", device="cpu", dtype=dtype)


def cluster() -> Frame:
    return read_frame(DATA / "cuau-water.xyz")


def water() -> Frame:
    """Eight molecules in a box smaller than twice the cutoff."""
    rng = np.random.default_rng(0)
    molecule = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])
    places = 3.1 * np.array([[i, j, k] for i in range(2) for j in range(2) for k in range(2)])
    turned = [molecule @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + place for place in places]
    return Frame(np.tile([8, 1, 1], 8), np.concatenate(turned), 6.2 * np.eye(3), periodic=True)


def run(frame: Frame, steps: int, potential: Callable[[int], PaiNN]) -> tuple[Array, Array]:
    """Velocity Verlet from 300 K; total energy after each step, meV/atom, and the last positions."""
    masses, step = atomic_masses[frame.numbers][:, None], STEP_FS * units.fs
    velocities = np.random.default_rng(10).normal(size=frame.positions.shape) * np.sqrt(units.kB * 300.0 / masses)
    said, totals = potential(0).predict([frame])[0], []
    for k in range(steps):
        velocities = velocities + 0.5 * step * said.forces / masses
        frame = Frame(frame.numbers, frame.positions + step * velocities, frame.cell, frame.periodic)
        said = potential(k).predict([frame])[0]
        velocities = velocities + 0.5 * step * said.forces / masses
        totals.append(said.energy + float(0.5 * (masses * velocities**2).sum()))
    return 1e3 * np.array(totals) / len(frame), frame.positions


@pytest.fixture(autouse=True)
def kept_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small clusters keep lists here, too."""
    monkeypatch.setattr(painn_lists, "PLAIN_LIMIT", 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("frame", [cluster(), water()], ids=["cluster", "water"])
def test_energy_is_conserved(frame: Frame, dtype: str) -> None:
    """A quarter of a picosecond at 300 K: the total energy neither drifts nor jumps when a list is searched anew."""
    potential, steps = model(dtype), 1000
    totals, _ = run(frame, steps, lambda _: potential)
    picoseconds = 1e-3 * STEP_FS * np.arange(steps)

    assert 2 < potential._lists.searches < steps / 5
    assert abs(np.polyfit(picoseconds, totals, 1)[0]) < DRIFT
    assert np.ptp(totals) < SWING
    assert np.abs(np.diff(totals)).max() < SWING / 4


@pytest.mark.parametrize("frame", [cluster(), water()], ids=["cluster", "water"])
def test_a_trajectory_does_not_tell_when_its_lists_were_made(frame: Frame) -> None:
    """A potential that is made anew on the way, as after a kill, and one that keeps no list end at the same bits as one that lives on."""
    first, second, fresh = model(), model(), model()
    energies, positions = run(frame, 60, lambda _: first)
    assert 1 <= first._lists.searches < 20
    for others in (lambda k: first if k < 23 else second, lambda _: fresh):
        fresh._lists = painn_lists.Lists(5.0, skin=0.0)
        again, ends = run(frame, 60, others)
        assert again.tobytes() == energies.tobytes()
        assert ends.tobytes() == positions.tobytes()
    assert fresh._lists.searches >= 60
