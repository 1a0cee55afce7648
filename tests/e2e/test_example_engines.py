"""The example of many engines runs as it stands, with few steps, and ends when it is interrupted."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver.testing import processes_in, until

EXAMPLE = Path(__file__).parents[2] / "examples" / "06_many_engines" / "run.py"
ENGINES = 16
ATOMS = {13, 20, 38, 55}


@contextmanager
def example(folder: Path, steps: int) -> Iterator[subprocess.Popen[str]]:
    """The example at work in a folder of its own; in the end none of its processes and none of their sockets is there."""
    program = [sys.executable, str(EXAMPLE), "--steps", str(steps), "--out", str(folder / "out")]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    until(lambda: not list(processes_in(folder)), 30.0, f"all processes in {folder} to end")
    assert list(Path("/tmp").glob(f"ipi_engines-{process.pid}-*")) == []


@pytest.mark.slow
def test_sixteen_engines_of_mixed_size_do_their_steps_on_one_server(tmp_path: Path) -> None:
    """Each of 16 engines does all its steps, of clusters of four sizes, and nobody is refused."""
    with example(tmp_path, steps=30) as running:
        told, _ = running.communicate(timeout=240)

    assert running.returncode == 0, told
    rows = [line.split() for line in told.splitlines() if line.startswith("engine-")]
    assert len(rows) == ENGINES, told
    assert {int(row[1]) for row in rows} == ATOMS
    assert {int(row[3]) for row in rows} == {30}
    assert np.array([row[4:6] for row in rows], float).min() > 0.0  # steps/s, K
    assert re.search(rf"^all: {30 * ENGINES} steps in", told, re.MULTILINE), told
    status = json.loads((tmp_path / "out" / "run" / "status.json").read_text())
    assert status["errors"] == []
    # of all conversations: one that is over may have been followed by the beginning of another
    assert status["force_calls"] == 31 * ENGINES


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_many_engines_end_cleanly_when_they_are_interrupted(number: int, tmp_path: Path) -> None:
    """Once engines move, an interrupt ends all of them and the server, and the steps so far are told."""
    with example(tmp_path, steps=10**6) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if re.match(rf"{ENGINES} of {ENGINES} engines", line):
                break
        running.send_signal(number)
        told, _ = running.communicate(timeout=120)

    assert running.returncode == 0, told
    assert "interrupted" in told
    assert len(re.findall(r"^engine-\d\d ", told, re.MULTILINE)) == ENGINES
    assert "Traceback" not in told
    assert json.loads((tmp_path / "out" / "run" / "status.json").read_text())["state"] == "stopped"
