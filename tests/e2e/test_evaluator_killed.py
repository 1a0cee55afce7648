"""DESIGN.md §2, invariant 3: the evaluator is killed in mid-run, and the engine's trajectory is the one it would have had."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest

from tumbaga.driver.testing import Program

pytestmark = pytest.mark.slow
OUTPUT = {"ipi": ["md.out", "md.pos_0.xyz", "md.std_0"], "ase": ["md.out"]}
LJ = "toy:lj?epsilon=0.05&sigma=0.85"


def disturb(program: Program, kills: int, steps: int) -> None:
    """Kill the evaluator at points spread at random over the run."""
    for point in sorted(Random(11).sample(range(steps // 20, steps * 3 // 4), kills)):
        program.steps(point)
        program.restarted("evaluator-0", program.kill("evaluator-0"))


def same_output(engine: str, left: Program, right: Program) -> None:
    for name in OUTPUT[engine]:
        first, second = (program.run_dir / "engine" / name for program in (left, right))
        assert first.read_bytes() == second.read_bytes(), name
    if engine == "ase":
        from ase.io import read

        frames, others = (read(program.run_dir / "engine" / "md.traj", index=":") for program in (left, right))
        assert len(frames) == len(others) > 1
        for frame, other in zip(frames, others, strict=True):
            np.testing.assert_array_equal(frame.positions, other.positions)
            np.testing.assert_array_equal(frame.get_momenta(), other.get_momenta())
            np.testing.assert_array_equal(frame.get_forces(), other.get_forces())


@pytest.mark.parametrize(
    ("engine", "model", "steps", "kills"),
    [("ipi", LJ, 4000, 3), ("ase", LJ, 4000, 3), ("ipi", "painn:cuau-water", 1000, 2)],
)
def test_the_trajectory_is_the_one_it_would_have_had(
    engine: str, model: str, steps: int, kills: int, start: Callable[..., Program], table: Callable
) -> None:
    """kill -9 of the evaluator, several times in one run: every byte that the engine wrote is the same as without.

    So many steps that the kills fall into the run on a fast machine as well: a step takes a millisecond, the look at where it is up to half a second.
    """
    options = ("run", "cuau-water", "-m", model, "--no-learn", "--engine", engine, "--steps", str(steps), "--seed", "7")
    calm = start(*options, run="calm")
    assert calm.end() == 0, calm.output
    stormy = start(*options, run="stormy")
    disturb(stormy, kills, steps)
    assert stormy.end() == 0, stormy.output

    assert stormy.status()["evaluator_restarts"] == kills
    assert calm.status()["evaluator_restarts"] == 0
    assert stormy.status()["force_calls"] == calm.status()["force_calls"] == steps + 1
    assert table(calm)[-1, 0] == steps
    same_output(engine, calm, stormy)
