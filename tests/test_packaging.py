"""The wheel and the sdist hold what they must: an empty wheel builds without an error, and the editable install hides it."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_the_sdist_holds_each_folder_once_and_no_links(built: Path) -> None:
    """The sdist holds the three rooms under their own names, the tests and the licence, and nothing under .ns."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]

    for expected in ("driver/cli.py", "online/records.py", "socket_protocol/connection.py", "LICENSE", "README.md", "constraints.txt"):
        assert names.count(expected) == 1
    assert not any(name.startswith(".ns") for name in names)


@pytest.mark.slow
def test_the_wheel_holds_code_types_and_data(built: Path) -> None:
    """The wheel, made from the sdist, holds modules, type markers, weights and the packaged cluster under tumbaga/."""
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()

    for expected in (
        "driver/gateway.py",
        "online/py.typed",
        "socket_protocol/bus.py",
        "driver/data/cuau-water.safetensors",
        "driver/data/cuau-water.xyz",
    ):
        assert f"tumbaga/{expected}" in names
    assert "tumbaga/__init__.py" not in names


@pytest.mark.slow
def test_the_installed_wheel_runs(built: Path, tmp_path: Path) -> None:
    """Installed elsewhere, the wheel's own command line answers, from its own files."""
    target = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(next(built.glob("*.whl"))),
    ]
    subprocess.run(install, check=True, timeout=120)
    code = "import tumbaga.driver.cli as c, sys; print(c.__file__); sys.argv = ['tumbaga', '--help']; c.main()"
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout.splitlines()[0]
    assert "learns while it serves" in done.stdout


def test_modules_go_by_one_name() -> None:
    """No module is imported under its bare folder name: that would make two copies of every class."""
    import tumbaga.driver.cli
    import tumbaga.online.store
    import tumbaga.socket_protocol.bus

    assert tumbaga.driver.cli.__name__ == "tumbaga.driver.cli"
    assert not {"driver", "online", "socket_protocol"} & set(sys.modules)
