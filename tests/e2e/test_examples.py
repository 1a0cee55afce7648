"""The examples run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.slow
def test_the_ase_example_does_its_steps(tmp_path: Path) -> None:
    """01_ase.py integrates 200 steps over a socket, stops its server and exits with 0."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "01_ase.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "step  200" in done.stdout
    assert "force calls: 201" in done.stdout


@pytest.mark.slow
def test_the_ipi_example_does_its_steps(tmp_path: Path) -> None:
    """02_ipi/run.sh ends with step 1000, and i-PI's outputs have the uncertainty and the version as columns."""
    done = subprocess.run(
        ["bash", str(EXAMPLES / "02_ipi" / "run.sh"), str(tmp_path / "out"), "--no-learn"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        timeout=180,
        check=False,
    )

    assert "1.00000000e+03" in done.stdout, done.stdout + done.stderr
    for name in ("md.std_0", "md.version_0"):
        assert float((tmp_path / "out" / name).read_text().split()[-1]) >= 0.0
