"""`tumbaga run` with real engines: to its end, in order, and away without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver.testing import Program, command

LJ = ("-m", "toy:lj?epsilon=0.05&sigma=0.85", "--no-learn")
STEPS = 300
KEYS = {
    "state": str,
    "steps": int,
    "sessions": list,
    "serving_version": int,
    "versions": int,
    "labels": {"pending": int, "running": int, "converged": int, "failed": int},
    "flags": int,
    "swaps": int,
    "force_calls": int,
    "call_ms": {"p50": float, "p99": float, "max": float},
    "uncertainty": {"last": float, "max": float},
    "evaluator_restarts": int,
    "errors": list,
}


def ask_status(run_dir: Path) -> dict:
    told = command("status", str(run_dir), "--json")
    assert told.stderr == ""
    return json.loads(told.stdout)


def check_keys(told: dict, keys: dict) -> None:
    for key, kind in keys.items():
        if isinstance(kind, dict):
            check_keys(told[key], kind)
        else:
            assert isinstance(told[key], kind), key


def traces(program: Program) -> list[str]:
    """Sockets and files outside the run directory that bear a name of this run."""
    label = str(program.run_dir)
    sockets = [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines() if label in line]
    address = program.status()["sessions"][0]["name"].removeprefix("unix:")
    return [*sockets, *([address] if Path(address).exists() else []), *program.left_behind()]


@pytest.mark.parametrize("engine", ["ipi", pytest.param("ase", marks=pytest.mark.slow)])
def test_a_run_does_its_steps_and_leaves_nothing_behind(engine: str, start: Callable[..., Program], table: Callable) -> None:
    """Exit code 0, every step, finite numbers; no process, no socket, no temporary file remains."""
    before = {path.name for path in Path("/dev/shm").iterdir()}
    program = start("run", "cuau-water", *LJ, "--engine", engine, "--steps", str(STEPS))
    assert program.end() == 0, program.output

    rows = table(program)
    assert rows[:, 0].tolist() == list(range(0, STEPS + 1, 10))
    assert np.isfinite(rows).all()
    status = program.status()
    assert (status["state"], status["steps"], status["errors"]) == ("finished", STEPS, [])
    assert status["force_calls"] == STEPS + 1
    assert status["engine"]["finite"] is True
    assert "finished" in program.output
    assert traces(program) == []
    assert {path.name for path in Path("/dev/shm").iterdir() if "ipi" in path.name} <= before


@pytest.mark.slow
def test_status_answers_during_and_after_a_run(start: Callable[..., Program]) -> None:
    """`tumbaga status --json` prints one object with every promised key, while the run goes on and from the directory afterwards."""
    program = start("run", "cuau-water", *LJ, "--steps", "100000")
    program.steps(1)
    during = ask_status(program.run_dir)
    check_keys(during, KEYS)
    assert during["state"] == "running"
    assert during["steps"] > 0
    assert during["sessions"][0]["state"] in ("connected", "computing")
    assert program.stop() == 0

    after = ask_status(program.run_dir)
    check_keys(after, KEYS)
    assert after["state"] == "stopped"
    assert after["steps"] >= during["steps"]


@pytest.mark.slow
def test_a_long_path_is_no_obstacle(tmp_path: Path, start: Callable[..., Program]) -> None:
    """A run directory whose path is longer than a unix socket's name may be works like any other."""
    run = "/".join(["a-folder-with-a-long-name"] * 6)
    assert len(str(tmp_path / run)) > 107
    program = start("run", "cuau-water", *LJ, "--steps", "50", run=run)
    assert program.end() == 0, program.output
    assert program.status()["steps"] == 50


@pytest.mark.slow
def test_a_run_directory_serves_one_run_at_a_time(start: Callable[..., Program]) -> None:
    """A second run in the same directory is refused with a sentence, and the first one does not notice."""
    first = start("run", "cuau-water", *LJ, "--steps", "100000")
    first.steps(1)
    second = command("run", "cuau-water", *LJ, "--run-dir", str(first.run_dir))
    assert second.returncode == 2
    assert f"is in use by process {first.process.pid}" in second.stderr
    assert second.stderr.count("\n") == 1
    so_far = first.status()["steps"]
    first.steps(so_far + 10)
    assert first.stop() == 0
