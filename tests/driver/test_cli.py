"""Every mistake of a user is one sentence on standard error and exit code 2; nothing is started and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ase.build import bulk, molecule
from ase.io import write

from tumbaga.driver import cli
from tumbaga.driver import config as configs
from tumbaga.driver.rundir import RunDir

COMMANDS = ("run", "serve", "status", "stop", "doctor")
Tumbaga = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tumbaga(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tumbaga:
    """Runs the command line in this process, in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tumbaga", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def water(tmp_path: Path) -> str:
    write(tmp_path / "water.xyz", molecule("H2O"))
    return "water.xyz"


def sentence(tumbaga: Tumbaga, *arguments: str) -> str:
    code, out, err = tumbaga(*arguments)
    assert code == 2, err
    assert out == ""
    assert err.startswith("tumbaga: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    assert "Traceback" not in err
    return err.removeprefix("tumbaga: ").strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(tumbaga: Tumbaga, command: str) -> None:
    """Each command explains itself and ends well."""
    code, out, err = tumbaga(command, "--help")

    assert code == 0
    assert err == ""
    assert f"tumbaga {command}" in out
    assert len(out.splitlines()) > 8


def test_the_program_lists_its_commands(tumbaga: Tumbaga) -> None:
    """Help names every command and the one to start with."""
    code, out, _ = tumbaga("--help")

    assert code == 0
    assert all(command in out for command in COMMANDS)
    assert "tumbaga run cuau-water" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "gold-fish"), "there is no example 'gold-fish'; there is cuau-water"),
        (("run", "cuau-water", "--engine", "lammps"), "lammps: is not an engine that tumbaga can start; choose ipi or ase"),
        (("run", "cuau-water", "-m", "magic"), "potential magic: there is no back end 'magic'"),
        (("run", "cuau-water", "-m", "painn:none.safetensors"), "there is no file 'none.safetensors'"),
        (("run", "cuau-water", "-m", "toy:spring"), "there is no toy 'spring'"),
        (("run", "cuau-water", "--label", "gaussian"), "label method 'gaussian' is not known"),
        (("run", "cuau-water", "--label", "ase:nothing"), "must be ase:MODULE:CLASS"),
        (("run", "cuau-water", "--label", "test:lj?speed=9"), "has no option 'speed'"),
        (("run", "cuau-water", "--labels", "-1"), "label.budget: is -1; it must be at least 0"),
        (("run", "cuau-water", "--force-error", "0"), "flag.force_error: is 0.0; it must be a positive number"),
        (("run", "cuau-water", "--force-error", "nan"), "flag.force_error: is nan"),
        (("serve",), "needs a potential (-m MODEL)"),
        (("serve", "-m", "toy:lj"), "needs an address"),
        (("status", "nowhere"), "has no status yet; is it a run directory of tumbaga?"),
        (("stop", "nowhere"), "has no status yet; is it a run directory of tumbaga?"),
    ],
)
def test_a_mistake_is_one_sentence(tumbaga: Tumbaga, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """What is wrong and what would be right stand in one line, and no run directory is made."""
    assert said in sentence(tumbaga, *arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "needs an address: -u -a NAME for a unix socket, -a HOST -p PORT for tcp, or --connect"),
        (("-a", "localhost"), "--port: is missing"),
        (("-u", "-a", "x", "-p", "31415"), "--port: a unix socket (-u) has no port"),
        (("--connect", "31415"), "write unix:NAME, unix:/a/path or tcp:HOST:PORT"),
        (("--connect", "tcp:localhost"), "the port is missing or out of range"),
        (("-p", "99999"), "the port is missing or out of range"),
        (("-u", "-a", "x" * 200), "the system allows 107"),
    ],
)
def test_an_address_that_cannot_be_meant_is_one_sentence(
    tumbaga: Tumbaga, water: str, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    """Each way to get an address wrong is told by its flag or its text."""
    assert said in sentence(tumbaga, "serve", "-m", "toy:lj", "-t", water, "--no-learn", *arguments)
    assert os.listdir(tmp_path) == [water]


@pytest.mark.parametrize(("name", "text"), [("none.xyz", None), ("t.xyz", "3\nwater\nO 0 0\n"), ("t.dat", "once upon a time")])
def test_a_template_that_is_none_is_one_sentence(tumbaga: Tumbaga, tmp_path: Path, name: str, text: str | None) -> None:
    """A template that is missing, broken or of no known format is named."""
    if text is not None:
        (tmp_path / name).write_text(text)

    assert name in sentence(tumbaga, "serve", "-m", "toy:lj", "-t", name, "-u", "-a", "x", "--no-learn")


@pytest.mark.parametrize("method", ["pyscf", "pyscf?grid=1"])
def test_pyscf_is_not_asked_about_crystals(tumbaga: Tumbaga, tmp_path: Path, method: str) -> None:
    """A periodic template with PySCF labels of clusters is refused before anything starts."""
    write(tmp_path / "cu.xyz", bulk("Cu"))

    assert "isolated clusters only" in sentence(tumbaga, "serve", "-m", "toy:lj", "-t", "cu.xyz", "-u", "--label", method)


def test_pyscf_for_crystals_is_not_asked_about_clusters(tumbaga: Tumbaga, water: str) -> None:
    """The other way round."""
    method = "pyscf?kpts=1x1x1&basis=gth-szv-molopt-sr"

    assert "this one is an isolated cluster" in sentence(tumbaga, "serve", "-m", "toy:lj", "-t", water, "-u", "--label", method)


def test_a_run_directory_in_use_is_left_alone(tumbaga: Tumbaga, tmp_path: Path, water: str) -> None:
    """A second run in a folder that is held is told by whom, and how to stop it."""
    holder = RunDir(tmp_path / "r")
    holder.hold()
    said = sentence(tumbaga, "serve", "-m", "toy:lj", "-t", water, "-u", "--no-learn", "--run-dir", "r")
    holder.release()

    assert f"is in use by process {os.getpid()}" in said
    assert "tumbaga stop" in said


def test_a_run_directory_that_cannot_be_made_is_one_sentence(tumbaga: Tumbaga, water: str) -> None:
    """A folder below a file cannot be made."""
    said = sentence(tumbaga, "serve", "-m", "toy:lj", "-t", water, "-u", "--no-learn", "--run-dir", f"{water}/r")

    assert "cannot be made or written" in said


def test_a_run_directory_of_another_potential_is_not_mixed(tumbaga: Tumbaga, tmp_path: Path, water: str) -> None:
    """A folder that holds the labels of one potential is not given to another, and a broken configuration is named."""
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / configs.FILE).write_text(configs.dumps(configs.Config(potential=configs.Potential(model="toy:zero", template=water))))
    assert "toy:zero" in sentence(tumbaga, "serve", "-m", "toy:lj", "-t", water, "-u", "--run-dir", "r")
    (folder / configs.FILE).write_text("[flag]\nforce_eror = 1")

    assert "force_eror" in sentence(tumbaga, "serve", "-u", "--run-dir", "r")


def test_a_status_is_json_for_programs(tumbaga: Tumbaga, tmp_path: Path) -> None:
    """The status of a run that ended is one JSON object, and stopping it again says that nothing runs."""
    run_dir = RunDir(tmp_path / "r")
    run_dir.hold()
    run_dir.write_status({"state": "finished", "steps": 3})
    run_dir.release()

    assert tumbaga("status", "r", "--json") == (0, '{"state": "finished", "steps": 3}\n', "")
    assert tumbaga("stop", "r") == (0, "r: nothing runs there\n", "")


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As a real process, too, a mistake is one line on standard error and exit code 2."""
    ended = subprocess.run(
        [sys.executable, "-m", "tumbaga.driver.cli", "run", "gold-fish"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "tumbaga: EXAMPLE: there is no example 'gold-fish'; there is cuau-water\n"


def test_a_mistake_costs_no_torch(tmp_path: Path) -> None:
    """The command line answers a mistake without importing torch."""
    code = "import sys; from tumbaga.driver import cli, supervisor; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
