"""The examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tumbaga.driver.testing import processes_in

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def python(script: str, folder: Path) -> str:
    """What an example writes, run in a folder of its own."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_ase_example_does_its_steps(tmp_path: Path) -> None:
    """01_ase.py integrates 200 steps over a socket, and its server ends with it."""
    told = python("01_ase.py", tmp_path)

    assert "step  200" in told
    assert "version 0-base" in told
    assert f"force calls: 201; run directory: {tmp_path / 'runs'}" in told
    assert list(processes_in(tmp_path)) == []


@pytest.mark.slow
def test_the_calculator_example_tells_the_uncertainty(tmp_path: Path) -> None:
    """03_ase_calculator.py relaxes, and the more the atoms are shaken the less sure the potential is."""
    told = python("03_ase_calculator.py", tmp_path)

    stds = [float(line.partition("±")[2].split()[0]) for line in told.splitlines() if line.startswith("shaken")]
    assert len(stds) == 4
    assert stds[0] < stds[-1]


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


@pytest.mark.slow
def test_the_committee_example_tells_the_spread(tmp_path: Path) -> None:
    """04_ipi_committee/run.sh ends with step 500; each energy spread that i-PI wrote is positive, and most are not above its threshold."""
    done = subprocess.run(
        ["bash", str(EXAMPLES / "04_ipi_committee" / "run.sh"), str(tmp_path / "out"), "--no-learn"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
        timeout=180,
        check=False,
    )

    assert "5.00000000e+02" in done.stdout, done.stdout + done.stderr
    rows = [line for line in (tmp_path / "out" / "md.uncertainty_0").read_text().splitlines() if line.strip() and "#" not in line]
    assert len(rows) == 51
    assert min(map(float, rows)) > 0.0
    above = re.search(r"steps above the threshold: (\d+)", done.stdout)
    assert above is not None, done.stdout
    assert 0 < int(above[1]) < 500
    assert list(processes_in(tmp_path)) == []
