"""The page on writing a back end: its package is a potential that keeps all promises, is found by its name, and serves."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

from tumbaga.driver.backends import registry
from tumbaga.driver.calculator import Tumbaga
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.serving import serve
from tumbaga.online.conformance import CHECKS

PAGE = (Path(__file__).parents[2] / "docs" / "backends.md").read_text()
FILES = dict(re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))

TRAINING = 4  # checks of a Tunable, which the page's example is not


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the page's package, installed as far as Python is concerned."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    project = tomllib.loads(FILES["pyproject.toml"])["project"]
    told = tmp_path / "tumbaga_morse-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [
        f"[{group}]\n" + "\n".join(f"{key} = {value}" for key, value in found.items()) for group, found in project["entry-points"].items()
    ]
    (told / "entry_points.txt").write_text("\n".join(points) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(registry, "_of_others", registry._of_others.__wrapped__)
    return tmp_path


@pytest.mark.slow
def test_its_tests_pass(package: Path) -> None:
    """The page's test file, run by pytest as it says, passes all checks of both metals but those of training more than the readout."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "test_morse.py"],
        cwd=package,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{2 * (len(CHECKS) - TRAINING)} passed, {2 * TRAINING} skipped" in done.stdout


def test_it_is_found_by_its_name(package: Path) -> None:
    """The registry loads it, gives the atoms of a crystal nearly their cohesive energy, and passes on what it says of a wrong name."""
    copper = registry.load("morse:cu")
    atoms = bulk("Cu", cubic=True)
    atoms.calc = Tumbaga("morse:cu")

    assert copper.spec.elements == (29,)
    assert atoms.get_potential_energy() / len(atoms) == pytest.approx(-3.5, abs=0.2)  # the 1959 sum has no cutoff
    with pytest.raises(PotentialError, match="there is no file 'xe', and it is none of cu, ni"):
        registry.load("morse:xe")


@pytest.mark.slow
def test_it_serves_with_an_uncertainty(package: Path, tmp_path: Path) -> None:
    """A server in processes of its own gives its forces, and tells how sure it is of them."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = Tumbaga("morse:cu", dtype="float64")
    direct = atoms.get_forces()
    with serve(atoms, "morse:cu", run_dir=tmp_path / "run", learn=False) as served:
        atoms.calc = served
        np.testing.assert_allclose(atoms.get_forces(), direct, atol=1e-9)
        assert served.results["force_std"] > 0


def test_the_page_lists_every_check() -> None:
    """The table of promises is that of the suite."""
    listed = re.findall(r"^\| (.+) \| (.+) \|$", PAGE.split("| check | promise |\n|---|---|\n")[1].split("\n\n")[0], re.MULTILINE)

    assert listed == [(str(check).replace("_", " "), check.promise) for check in CHECKS]
