"""The path-integral example runs as it stands, with few steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

from tumbaga.driver.testing import processes_in

EXAMPLE = Path(__file__).parents[2] / "examples" / "05_ipi_pimd" / "run.sh"
STEPS = 20


@pytest.mark.slow
@pytest.mark.parametrize("beads", [8, 32])
def test_the_path_integral_example_moves_every_bead_by_forces_of_its_own(beads: int, tmp_path: Path) -> None:
    """05_ipi_pimd/run.sh with 8 and with 32 beads: finite output, every bead somewhere else, and so many frames as there are beads and steps."""
    out = tmp_path / "out"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(EXAMPLE), str(beads), str(out), "--no-learn"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "STEPS": str(STEPS)},
        timeout=180,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    table = np.loadtxt(out / "md.out")
    assert table[-1, 0] == STEPS
    assert np.isfinite(table).all()
    stds = [np.loadtxt(file) for file in sorted(out.glob("md.std_*"))]
    assert len(stds) == beads
    assert (np.array(stds) > 0.0).all()  # also finite: i-PI writes nan, which is not larger
    first, last = (np.array([read(file, index).positions for file in sorted(out.glob("md.pos_*.xyz"))]) for index in (0, -1))
    assert len(last) == beads
    assert np.isfinite(last).all()
    assert np.abs(last - first).max(axis=(1, 2)).min() > 1e-3
    apart = np.abs(last[:, None] - last[None]).max(axis=(2, 3)) + np.eye(beads)
    assert apart.min() > 1e-3  # no two beads in one place

    status = json.loads((out / "run" / "status.json").read_text())
    assert status["errors"] == []
    assert status["sessions"][0]["dialect"] == f"batched {beads}"
    # at the start all beads lie on each other, and what repeats within a message is computed once
    assert beads * STEPS < status["frames"] <= beads * (STEPS + 1)
    # one message a step; i-PI may send what it has before the last bead is there, which is rare
    assert STEPS < status["force_calls"] < 2 * STEPS
    assert list(processes_in(tmp_path)) == []
