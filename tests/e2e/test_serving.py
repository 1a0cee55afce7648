"""The server that a script starts in one line: it answers, it ends with the script however that ends, and it says why it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read
from ase.md.verlet import VelocityVerlet

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.calculator import Tumbaga
from tumbaga.driver.errors import ConfigError, DriverError, RunDirError
from tumbaga.driver.serving import ServedCalculator, ServingError, serve
from tumbaga.driver.testing import processes_in, until

TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
README = Path(__file__).parents[2] / "README.md"
LJ = "toy:lj?epsilon=0.05&sigma=0.85"
SAME = 1e-10  # relative: two changes of units


@pytest.fixture
def atoms() -> Atoms:
    return read(TEMPLATE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the test works; in the end nothing runs there, and the test's sockets are gone."""
    monkeypatch.chdir(tmp_path)
    earlier = sockets_of_the_dead()
    yield tmp_path
    until(lambda: nothing_left(tmp_path), 15.0, "all processes to be gone")
    assert sockets_of_the_dead() - earlier == set()


def sockets_of_the_dead() -> set[Path]:
    """Socket files of scripts that have ended, and our own; other tests may be at work beside this one."""
    # names of runs are hexadecimal, and may begin with a number as well
    named = [(path, re.match(r"ipi_tumbaga-(\d+)-", path.name)) for path in Path("/tmp").glob("ipi_tumbaga-[0-9]*-*")]
    found = [(path, int(match.group(1))) for path, match in named if match]
    return {path for path, pid in found if pid == os.getpid() or not Path("/proc", str(pid)).exists()}


def nothing_left(folder: Path) -> bool:
    return not list(processes_in(folder))


# -- it answers ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dynamics_through_a_server_are_those_in_the_process(folder: Path, atoms: Atoms) -> None:
    """The same trajectory, uncertainty and version as with the in-process calculator; status and run directory are at hand."""
    alone = atoms.copy()
    with serve(atoms, learn=False, dtype="float64") as calc:
        atoms.calc, alone.calc = calc, Tumbaga(run=calc.run_dir)
        for moved in (atoms, alone):
            moved.rattle(0.02, seed=1)
            VelocityVerlet(moved, 0.5 * units.fs).run(5)
            moved.get_potential_energy()
        assert atoms.get_potential_energy() == pytest.approx(alone.get_potential_energy(), rel=SAME)
        np.testing.assert_allclose(atoms.get_forces(), alone.get_forces(), atol=1e-8)
        assert calc.results["force_std"] == pytest.approx(alone.calc.results["force_std"], rel=1e-8)
        for same in ("force_std_atom", "version"):
            assert calc.results[same] == alone.calc.results[same]
        assert np.isnan(calc.results["energy_std"])  # no label has said anything of energies
        with pytest.raises(PropertyNotImplementedError, match="not periodic"):
            atoms.get_stress()
        until(lambda: calc.status()["force_calls"] == 6, 5.0, "the calls to be counted")
        assert calc.run_dir.parent == folder / "runs"

    assert calc.status()["state"] == "stopped"
    assert nothing_left(folder)
    atoms.rattle(0.1)
    with pytest.raises(ServingError, match="the server was stopped"):
        atoms.get_potential_energy()


def test_the_log_tells_where_the_time_of_a_slow_call_went(folder: Path, atoms: Atoms) -> None:
    """A call that waits for an evaluator which is not at work: its line says that nothing was evaluated meanwhile."""
    with serve(atoms, "toy:zero", learn=False) as calc:
        calc.get_forces(atoms)
        evaluator = calc.status()["pids"]["evaluator-0"]
        atoms.rattle(0.01)
        asked = threading.Thread(target=calc.get_forces, args=[atoms])
        os.kill(evaluator, signal.SIGSTOP)
        try:
            asked.start()
            asked.join(0.3)
            assert asked.is_alive()
        finally:
            os.kill(evaluator, signal.SIGCONT)
        asked.join(20.0)
        log = calc.run_dir / "log" / "gateway.jsonl"
        lines = until(
            lambda: [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "slow call"], 5.0, "the line"
        )
        assert len(lines) == 1
        assert lines[0]["call"] == 1
        assert lines[0]["seconds"] > 0.25 > lines[0]["evaluating"]


@pytest.mark.slow
def test_a_crystal_has_a_stress_and_a_wide_cluster_is_not_folded(folder: Path, atoms: Atoms) -> None:
    """What the server says is what the potential says, with a cell that repeats and with one that does not."""
    solid = bulk("Cu", a=3.7, cubic=True) * (2, 2, 2)
    solid.rattle(0.1, seed=1)
    truth = Tumbaga(dtype="float64", template=solid)
    with serve(solid, learn=False, dtype="float64", run_dir="solid") as calc:
        np.testing.assert_allclose(calc.get_stress(solid), truth.get_stress(solid), atol=1e-9)
    atoms.center(vacuum=0.5)
    with serve(atoms, LJ, learn=False, run_dir="wide") as calc:
        np.testing.assert_allclose(calc.get_forces(atoms), Tumbaga(LJ).get_forces(atoms), atol=1e-9)
        assert np.isnan(calc.results["force_std"])


@pytest.mark.slow
def test_a_run_goes_on_in_its_directory(folder: Path, atoms: Atoms) -> None:
    """What was set stays set; another potential, other atoms and a directory in use are refused, and change nothing."""
    calc = serve(atoms, LJ, run_dir="run", labels=7, label="ase:ase.calculators.emt:EMT", learn=False, seed=5)
    settings = configs.load(calc.run_dir)
    with pytest.raises(RunDirError, match="is in use by process"):
        serve(atoms, run_dir="run")
    calc.close()
    calc.close()
    assert (settings.label.budget, settings.label.method, settings.seed) == (7, "ase:ase.calculators.emt:EMT", 5)

    for wrong, said in (((atoms, "toy:zero"), "is of a run of toy:lj"), ((atoms[::-1],), "is of a run of other atoms")):
        with pytest.raises(RunDirError, match=said):
            serve(*wrong, run_dir="run")
    with serve(atoms, run_dir="run", learn=False, labels=8) as again:
        again.get_potential_energy(atoms)
        with pytest.raises(ConfigError, match="have other species, or another order"):
            again.get_potential_energy(atoms[::-1])
    after = configs.load(again.run_dir)
    assert (after.label.budget, after.label.method, after.potential.model) == (8, settings.label.method, LJ)


@pytest.mark.slow
def test_a_calculator_has_the_uncertainty_of_a_server_that_learns(folder: Path, atoms: Atoms) -> None:
    """What the learner finds out about the uncertainty is noted in the run directory, for calculators and for the next server."""
    before = Tumbaga(dtype="float64", template=atoms)

    def agreed(served: ServedCalculator) -> bool:
        atoms.rattle(1e-3)
        told, alone = served.get_property("force_std", atoms), Tumbaga(run="run").get_property("force_std", atoms)
        return abs(told / alone - 1.0) < 1e-8 and abs(told / before.get_property("force_std", atoms) - 1.0) > 0.05

    for labels in (0, None):
        with serve(atoms, run_dir="run", labels=labels, dtype="float64") as calc:
            atoms.rattle(0.2, seed=1)
            calc.get_forces(atoms)
            until(lambda calc=calc: agreed(calc), 20.0, "the learner's scale to be served and noted")  # type: ignore[misc]


@pytest.mark.slow
def test_the_readme_runs_as_it_stands(folder: Path, atoms: Atoms, capsys: pytest.CaptureFixture[str]) -> None:
    """The two pieces of Python under "From ASE": a server that learns, and then a calculator on its run directory."""
    section = README.read_text().partition("## From ASE")[2].partition("\n## ")[0]
    pieces = [piece.partition("```")[0] for piece in section.split("```python")[1:]]
    assert len(pieces) == 2
    for piece in pieces:
        exec(piece, {"atoms": atoms})  # noqa: S102 - our own text
        assert np.isfinite(atoms.get_forces() if "Tumbaga" in piece else 0.0).all()
    assert capsys.readouterr().out.endswith("eV/Å at most, 0-base\n")


# -- it ends ---------------------------------------------------------------------------------------------------------------------------

SCRIPT = """
    import os, signal, sys, threading
    from ase.io import read
    from ase.md.verlet import VelocityVerlet
    from tumbaga.driver.serving import serve

    def start():
        return serve(atoms, {model!r}, learn=False, run_dir="run")

    def move(steps):
        atoms.calc = calc
        VelocityVerlet(atoms, 0.05).run(steps)
        print("moved", flush=True)

    atoms = read({template!r})
    print("begun", flush=True)
"""
ENDS = {
    "end of the script": ("calc = start(); move(5)", 0),
    "with-block": ("with start() as calc:\n    move(5)", 0),
    "exception": ("with start() as calc:\n    move(5)\n    raise ValueError('mine')", 1),
    "exception without with": ("calc = start(); move(5)\nraise ValueError('mine')", 1),
    "nobody holds it": ("calc = start(); move(5)\natoms.calc = None; del calc\nos._exit(0)", 0),
    "SIGKILL": ("calc = start(); move(5)\nos.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "SIGTERM": ("calc = start(); move(5)\nos.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
}


def script(folder: Path, body: str, model: str = LJ) -> subprocess.Popen[str]:
    text = textwrap.dedent(SCRIPT).format(model=model, template=str(TEMPLATE)) + body
    (folder / "script.py").write_text(text)
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "script.py"], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_the_server_ends_with_the_script(end: str, folder: Path) -> None:
    """However the script ends, its exit code is its own, and no process and no socket is left (the fixture looks)."""
    body, code = ENDS[end]
    out, err = (running := script(folder, body)).communicate(timeout=60)

    assert running.returncode == code, err
    assert "moved" in out
    assert "ResourceWarning" not in err
    if code == 0:
        assert err == ""
    elif code == 1:
        assert err.strip().endswith("ValueError: mine")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while it starts", "at work"])
def test_ctrl_c_ends_both(when: str, folder: Path) -> None:
    """KeyboardInterrupt in the script, an orderly stop of the server."""
    running = script(folder, "with start() as calc:\n    move(5)\n    move(10**9)")
    assert running.stdout is not None
    awaited = "begun\n" if when == "while it starts" else "moved\n"
    while running.stdout.readline() != awaited:
        assert running.poll() is None
    if when == "while it starts":
        until(lambda: list(folder.glob("run/log/gateway.err")), 30.0, "the server to be half started")
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)

    assert running.returncode == -signal.SIGINT
    assert err.strip().endswith("KeyboardInterrupt")
    assert "stopped" in (folder / "run" / "status.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["run/log/serve.out", "socket", "run/log/gateway.err"])
def test_a_script_killed_while_its_server_starts_leaves_nothing(when: str, folder: Path) -> None:
    """SIGKILL as soon as there is the server's log, the socket, the first of the server's own processes: no socket, no process is left."""
    running = script(folder, "calc = start()")

    def sockets() -> list[Path]:
        return list(Path("/tmp").glob(f"ipi_tumbaga-{running.pid}-*"))

    until(lambda: sockets() if when == "socket" else (folder / when).exists(), 30.0, when)
    running.kill()
    running.communicate(timeout=30)
    until(lambda: nothing_left(folder), 30.0, "the server's processes to be gone")
    assert sockets() == []


@pytest.mark.slow
def test_a_thread_may_start_it_and_end(folder: Path, atoms: Atoms) -> None:
    """The server belongs to the script, not to the thread that asked for it."""
    made: list[ServedCalculator] = []
    starter = threading.Thread(target=lambda: made.append(serve(atoms, LJ, learn=False, run_dir="run")))
    starter.start()
    starter.join(60)
    with made[0] as calc:
        atoms.calc = calc
        VelocityVerlet(atoms, 0.05).run(20)
        assert calc._process.poll() is None


# -- it says why -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failed_start_tells_why(folder: Path, atoms: Atoms) -> None:
    """A weights file that is none: one exception with the server's last words and the place of its log."""
    Path("weights.safetensors").write_bytes(b"no weights at all" * 9)
    with pytest.raises(ServingError) as told:
        serve(atoms, "painn:weights.safetensors", learn=False, run_dir="run")
    assert "the server did not start" in str(told.value)
    assert "cannot be read as safetensors" in str(told.value)
    assert str(folder / "run" / "log" / "serve.out") in str(told.value)


@pytest.mark.slow
def test_a_server_that_may_not_answer_tells_why(folder: Path, atoms: Atoms) -> None:
    """A broken potential: the exception in the script is the sentence of the log, at every further call too."""
    with serve(atoms, "toy:nan?after=10", learn=False, run_dir="run") as calc:
        atoms.calc = calc
        with pytest.raises(ServingError, match=r"a number that is not finite.*look at .*run/log"):
            VelocityVerlet(atoms, 0.05).run(20)
        with pytest.raises(ServingError, match=r"not finite"):
            atoms.get_forces()


@pytest.mark.slow
def test_a_killed_server_is_told(folder: Path, atoms: Atoms) -> None:
    """kill -9 of the supervisor: the next call says that the server has ended, and how."""
    with serve(atoms, LJ, learn=False, run_dir="run") as calc:
        calc.get_forces(atoms)
        calc._process.kill()
        until(lambda: nothing_left(folder), 15.0, "the server to be gone")
        atoms.rattle(0.01)
        with pytest.raises(ServingError, match=r"it has ended with code -9; look at .*run/log"):
            calc.get_forces(atoms)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "magic"}, "there is no back end 'magic'"),
        ({"model": "painn:none.safetensors"}, "there is no file 'none.safetensors'"),
        ({"model": LJ, "label": "gaussian"}, "label method 'gaussian' is not known"),
        ({"model": LJ, "labels": -1}, "label.budget: is -1"),
        ({"model": LJ, "dtype": "float16"}, "choose float32 or float64"),
    ],
)
def test_a_mistake_is_one_sentence_and_starts_nothing(arguments: dict[str, str], said: str, folder: Path, atoms: Atoms) -> None:
    with pytest.raises(DriverError) as told:
        serve(atoms, **arguments)
    assert said in str(told.value)
    assert list(folder.iterdir()) == []


def test_partly_periodic_atoms_are_refused(folder: Path, atoms: Atoms) -> None:
    atoms.set_cell([20.0, 20.0, 20.0])
    atoms.pbc = (False, False, True)
    with pytest.raises(ConfigError, match="atoms: is periodic in some directions only"):
        serve(atoms)
    assert list(folder.iterdir()) == []
