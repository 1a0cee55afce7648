"""The ends that a run can come to, and how it goes on from there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver.testing import Program, command, processes_in, until

LJ = ("-m", "toy:lj?epsilon=0.05&sigma=0.85", "--no-learn", "--seed", "3")
STEPS = 3000


def begin(start: Callable[..., Program], *options: str, run: str = "run") -> Program:
    return start("run", "cuau-water", *LJ, "--steps", str(STEPS), *options, run=run)


def every_row_once(rows: np.ndarray) -> bool:
    return rows[:, 0].tolist() == list(range(0, STEPS + 1, 10)) and bool(np.isfinite(rows).all())


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "how"), [("ipi", "tumbaga stop"), ("ase", "ctrl-c")])
def test_a_run_stops_in_order_and_goes_on_from_there(engine: str, how: str, start: Callable[..., Program], table: Callable) -> None:
    """Exit code 0 and "stopped"; the same command again does what is left, and every row of the properties stands there once."""
    first = begin(start, "--engine", engine)
    first.steps(150)
    if how == "ctrl-c":
        os.kill(first.process.pid, signal.SIGINT)
    else:
        told = command("stop", str(first.run_dir))
        assert (told.returncode, told.stdout) == (0, f"{first.run_dir}: stopped\n")
    assert first.end() == 0, first.output
    assert "stopped by request" in first.output
    status = first.status()
    assert (status["state"], status["errors"]) == ("stopped", [])
    assert 150 <= status["steps"] < STEPS
    assert first.left_behind() == []
    if engine == "ipi":
        assert (first.run_dir / "engine" / "RESTART").exists()

    second = begin(start, "--engine", engine)
    assert second.end() == 0, second.output
    assert second.status()["state"] == "finished"
    assert second.status()["force_calls"] < STEPS
    assert second.status()["steps"] == STEPS
    assert every_row_once(table(second))


@pytest.mark.slow
def test_a_stopped_i_pi_run_has_the_trajectory_of_one_that_was_not(start: Callable[..., Program], table: Callable) -> None:
    """i-PI saves its random state: the rows after the stop are those of a run that never stopped, but for the digits of its restart file."""
    whole = begin(start, run="whole")
    assert whole.end() == 0, whole.output
    halted = begin(start, run="halted")
    halted.steps(100)
    assert halted.stop() == 0
    before = len(table(halted))
    halted = begin(start, run="halted")
    assert halted.end() == 0, halted.output

    rows = table(halted)
    assert before < len(rows) - 30
    assert every_row_once(rows)
    # the dynamics is chaotic: 300 steps on, the digits that the restart file lacks do not show yet
    np.testing.assert_allclose(rows[: before + 30], table(whole)[: before + 30], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_run_that_has_done_its_steps_says_so(start: Callable[..., Program], table: Callable) -> None:
    """The same command once more starts nothing, says why, and exits with 0; more steps go on from there."""
    short = ("run", "cuau-water", *LJ, "--steps")
    assert start(*short, "200").end() == 0
    again = start(*short, "200")
    assert again.end() == 0
    assert "has done its 200 steps; ask for more with --steps" in again.output
    more = start(*short, "400")
    assert more.end() == 0, more.output

    assert table(more)[-1, 0] == 400


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ipi", "ase"])
def test_a_killed_supervisor_takes_everything_along(engine: str, start: Callable[..., Program], table: Callable) -> None:
    """SIGKILL of the supervisor: all its processes leave by themselves, status says "died", and the same command goes on."""
    first = begin(start, "--engine", engine)
    first.steps(150)
    pids = {name: pid for name, pid in first.status()["pids"].items() if pid}
    assert set(pids) == {"gateway", "zygote", "evaluator-0", "engine"}
    first.process.kill()
    first.process.wait()
    until(lambda: not list(processes_in(first.run_dir)), 10.0, "all processes to leave")
    assert first.status()["state"] == "died"
    told = command("status", str(first.run_dir))
    assert "died" in told.stdout
    assert "start the run again to go on" in told.stdout

    second = begin(start, "--engine", engine)
    assert second.end() == 0, second.output
    assert every_row_once(table(second))


@pytest.mark.slow
def test_a_killed_engine_fails_the_run_and_the_next_start_goes_on(start: Callable[..., Program], table: Callable) -> None:
    """kill -9 of i-PI: exit code 1 and a sentence; the next start goes on from the newest checkpoint, and no step stands twice."""
    first = begin(start)
    first.until(lambda status: (status.get("engine") or {}).get("step", 0) >= 1050, "a checkpoint and steps behind it")
    first.kill("engine")
    assert first.end() == 1
    assert "i-PI ended with code -9" in first.output
    assert first.status()["state"] == "failed"
    assert table(first)[-1, 0] >= 1050

    second = begin(start)
    assert second.end() == 0, second.output
    assert second.status()["force_calls"] <= STEPS - 1000 + 1
    assert every_row_once(table(second))
    from ase.io import read

    frames = read(second.run_dir / "engine" / "md.pos_0.xyz", index=":", format="xyz")
    assert len(frames) == STEPS // 100 + 1


@pytest.mark.slow
def test_an_engine_that_leaves_early_has_not_finished(start: Callable[..., Program]) -> None:
    """i-PI ends with code 0 when somebody else tells it to: the run says how far it came, with exit code 1, and can go on."""
    first = begin(start)
    first.steps(150)
    first.kill("engine", signal.SIGTERM)
    assert first.end() == 1
    (told,) = first.status()["errors"]
    assert told.startswith("i-PI left at step ")
    assert told.endswith(f" of {STEPS}; the same command goes on from there")


def test_stop_says_so_where_nothing_runs(tmp_path: Path) -> None:
    """Stopping what never ran is a sentence and exit code 2; nothing is made or changed."""
    told = command("stop", str(tmp_path))
    assert told.returncode == 2
    assert told.stderr == f"tumbaga: run directory {tmp_path}: has no status yet; is it a run directory of tumbaga?\n"
    assert list(tmp_path.iterdir()) == []
