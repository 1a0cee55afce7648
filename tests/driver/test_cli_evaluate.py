"""tumbaga evaluate from the command line: what it prints and writes, and one sentence for every mistake."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from safetensors.numpy import save_file

from tumbaga.driver import cli
from tumbaga.driver.backends import painn

DATA = Path(__file__).parents[2] / "examples" / "cuau_water_model" / "data" / "cuau-water.npz"
MODEL = "painn:cuau-water"
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


def frames(chosen: range) -> list[Atoms]:
    """Frames of the data set behind the embedded potential, as ASE holds them."""
    made = []
    with np.load(DATA) as held:
        ends = np.cumsum(held["counts"])
        for k in chosen:
            rows = slice(ends[k] - held["counts"][k], ends[k])
            atoms = Atoms(held["numbers"][rows], held["positions"][rows].astype(float))
            atoms.calc = SinglePointCalculator(atoms, energy=held["energy"][k], forces=held["forces"][rows].astype(float))
            made.append(atoms)
    return made


@pytest.fixture
def few(tmp_path: Path) -> str:
    """Sixteen frames of molecular dynamics."""
    write(tmp_path / "few.extxyz", frames(range(200, 1800, 100)))
    return "few.extxyz"


@pytest.mark.slow
def test_a_table_a_file_and_plots(tumbaga: Tumbaga, few: str, tmp_path: Path) -> None:
    """One call prints the errors that the file holds, writes the plots and says nothing on standard error."""
    code, out, err = tumbaga("evaluate", MODEL, few, "--json", "result.json", "--plots", "plots", "--uncertain-frames", "3")

    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["schema"], found["model"], found["frames"], found["frames_read"]) == (1, MODEL, 16, 16)
    assert found["level"].startswith("GFN2-xTB")
    said = re.search(r"all +(\d+) +([\d.]+) +([\d.]+)", out)
    assert said is not None
    assert int(said[1]) == found["forces"]["atoms"]
    assert float(said[2]) == pytest.approx(1000 * found["forces"]["rmse"], abs=0.06)
    assert float(said[3]) == pytest.approx(1000 * found["forces"]["mae"], abs=0.06)
    assert "offsets added to the predictions" in out
    assert f"{found['slope']['origin']['value']:.3f} (" in out
    assert found["uncertainty"]["frames"] == 3
    assert found["softening"] is None
    assert sorted(os.listdir(tmp_path / "plots")) == ["energies.png", "forces.png", "uncertainty.png"]
    for name in os.listdir(tmp_path / "plots"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"plot plots/{name}" in out


def test_the_same_call_says_the_same(tumbaga: Tumbaga, few: str, tmp_path: Path) -> None:
    """Choice, bootstrap and sample of uncertainties follow the seed."""
    for name in ("one.json", "two.json"):
        assert tumbaga("evaluate", MODEL, few, "--frames", "8", "--uncertain-frames", "2", "--seed", "4", "--json", name)[0] == 0

    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


@pytest.mark.slow
def test_conditions_choose_frames(tumbaga: Tumbaga, few: str, tmp_path: Path) -> None:
    """Elements, counts, forces and chance choose from all files that are named; the title says how many were used."""
    write(tmp_path / "copper.extxyz", frames(range(0, 7000, 250)))

    code, out, _ = tumbaga(
        "evaluate", MODEL, few, "copper.extxyz", "--with", "Cu,O", "--count", "atoms<=14", "--frames", "5", "--json", "a.json"
    )
    assert code == 0
    assert f"{MODEL} on 5 of 44 frames" in out
    found = json.loads((tmp_path / "a.json").read_text())
    assert {"Cu", "O"} <= set(found["by_element"])
    assert found["forces"]["atoms"] <= 5 * 14


def test_a_soft_potential_is_mended(tumbaga: Tumbaga, few: str, tmp_path: Path) -> None:
    """A potential with 0.8 of its readout, against labels of the whole: the scale is found, and the new file says what the whole one says."""
    whole = painn.load(MODEL, "cpu", "float64")
    save_file(whole.state(0.8 * whole.readout()), tmp_path / "soft.safetensors", whole.metadata)
    made = frames(range(200, 1800, 100))
    for atoms in made:
        said = whole.predict([painn.Frame(atoms.numbers, atoms.positions)])[0]
        atoms.calc = SinglePointCalculator(atoms, energy=said.energy, forces=said.forces)
    write(tmp_path / "labels.db", made)
    arguments = ("--fix-softening", "--out", "stiff.safetensors", "--dtype", "float64", "--uncertain-frames", "0")

    code, out, err = tumbaga("evaluate", "painn:soft.safetensors", "labels.db", *arguments, "--json", "a.json")

    assert (code, err) == (0, "")
    assert "fix of softening: a scale of 1.250 from 1 label changes the force RMSE on 8 held-out frames from" in out
    assert "accepted" in out
    assert "the scaled potential is painn:stiff.safetensors" in out
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["softening"]["accepted"]
    assert found["written"] == "painn:stiff.safetensors"
    mended = painn.load("painn:stiff.safetensors", "cpu", "float64")
    assert json.loads(mended.metadata["softening"])["of"] == f"painn:{tmp_path / 'soft.safetensors'}"
    frame = painn.Frame(made[0].numbers, made[0].positions)
    np.testing.assert_allclose(mended.predict([frame])[0].forces, whole.predict([frame])[0].forces, atol=1e-5)
    # and the command takes the new file as it took the old one
    assert tumbaga("evaluate", "painn:stiff.safetensors", "labels.db", "--uncertain-frames", "0")[0] == 0


def test_a_fix_that_does_not_help_is_refused(tumbaga: Tumbaga, few: str, tmp_path: Path) -> None:
    """Refused in one sentence, nothing written, and no failure: the answer is that the potential is not soft."""
    write(tmp_path / "own.extxyz", [relabelled(atoms, noise=0.2) for atoms in frames(range(200, 1800, 100))])
    arguments = ("--fix-softening", "--labels", "2", "--out", "stiff.safetensors", "--uncertain-frames", "0")

    code, out, err = tumbaga("evaluate", MODEL, "own.extxyz", *arguments)

    assert (code, err) == (0, "")
    assert re.search(r"^fix of softening: a scale of .* from 2 labels .*: refused, the interval is not below zero$", out, re.MULTILINE)
    assert not (tmp_path / "stiff.safetensors").exists()


def relabelled(atoms: Atoms, noise: float) -> Atoms:
    said = painn.load(MODEL, "cpu").predict([painn.Frame(atoms.numbers, atoms.positions)])[0]
    forces = said.forces + noise * np.random.default_rng(len(atoms)).standard_normal(said.forces.shape)
    atoms.calc = SinglePointCalculator(atoms, energy=said.energy, forces=forces)
    return atoms


def test_bad_frames_are_left_out_on_request(tumbaga: Tumbaga, tmp_path: Path) -> None:
    """One frame without forces stops the command with its number; --skip-bad leaves it out and says so."""
    made = frames(range(200, 600, 100))
    made[2].calc = SinglePointCalculator(made[2], energy=-1.0)
    write(tmp_path / "few.extxyz", made)

    code, out, err = tumbaga("evaluate", MODEL, "few.extxyz")
    assert (code, out) == (2, "")
    assert err.startswith("tumbaga: data few.extxyz, frame 2 (the first is 0): it has no forces")
    code, out, err = tumbaga("evaluate", MODEL, "few.extxyz", "--skip-bad", "--uncertain-frames", "0")
    assert code == 0
    assert f"{MODEL} on 3 of 3 frames" in out
    assert err.startswith("left out 1 frame that is not fit for use; the first: data few.extxyz, frame 2")


def test_pickles_are_opened_on_request(tumbaga: Tumbaga, tmp_path: Path) -> None:
    """OC20's .lmdb is refused without --trust-pickles; with it the frames are judged, and a warning has been given."""
    with lmdb.open(str(tmp_path / "oc.lmdb"), subdir=False, map_size=2**20, lock=False) as held, held.begin(write=True) as view:
        for k, atoms in enumerate(frames(range(200, 600, 100))):
            fields = {"pos": atoms.positions, "atomic_numbers": atoms.numbers, "cell": 20.0 * np.eye(3)}
            fields |= {"y": atoms.calc.results["energy"], "force": atoms.calc.results["forces"]}
            view.put(str(k).encode(), pickle.dumps({name: np.asarray(value) for name, value in fields.items()}))

    code, _, err = tumbaga("evaluate", MODEL, "oc.lmdb")
    assert code == 2
    assert "say so with --trust-pickles" in err
    code, out, _ = tumbaga("evaluate", MODEL, "oc.lmdb", "--trust-pickles", "--uncertain-frames", "0")
    assert code == 0
    assert f"{MODEL} on 4 of 4 frames" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("magic", "few.extxyz"), "potential magic: there is no back end 'magic'"),
        (("painn:gone.safetensors", "few.extxyz"), "potential painn:gone.safetensors: there is no file"),
        ((MODEL, "gone.extxyz"), "data gone.extxyz: there is no such file"),
        ((MODEL, "notes.txt"), "data notes.txt: its format is not known"),
        ((MODEL, "few.extxyz", "--device", "cpu,cpu"), "--device: is 'cpu,cpu'; one device evaluates"),
        ((MODEL, "few.extxyz", "--device", "abacus"), f"potential {MODEL}: cannot run on device 'abacus'"),
        ((MODEL, "few.extxyz", "--with", "Xx"), "--with: there is no element 'Xx'"),
        ((MODEL, "few.extxyz", "--with", "Pt"), "subset: none of the 16 frames meets the conditions"),
        ((MODEL, "few.extxyz", "--count", "two"), "--count: 'two' is neither a condition"),
        ((MODEL, "few.extxyz", "--energy-key", "e"), "data few.extxyz, frame 0 (the first is 0): it has no energy of the name 'e'"),
        ((MODEL, "few.extxyz", "--json", "nowhere/a.json"), "--json: nowhere/a.json cannot be written: there is no such folder"),
        ((MODEL, "few.extxyz", "--json", "."), "--json: . cannot be written: it is a folder"),
        ((MODEL, "few.extxyz", "--plots", "few.extxyz"), "--plots: few.extxyz is a file; name a folder"),
        ((MODEL, "few.extxyz", "--out", "a.safetensors"), "--out: is where --fix-softening writes"),
        ((MODEL, "few.extxyz", "--fix-softening", "--out", "a.pt"), "--out: is a.pt; the name of the file must end in .safetensors"),
        ((MODEL, "few.extxyz", "--fix-softening", "--labels", "9"), "--labels: is 9, and the half of the data that is not held out has 8"),
        (("toy:zero", "few.extxyz", "--fix-softening"), "--fix-softening: toy:zero has no linear readout that could be scaled"),
    ],
)
def test_a_mistake_is_a_sentence(tumbaga: Tumbaga, few: str, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """Exit code 2, one line that names what is wrong, nothing written."""
    (tmp_path / "notes.txt").write_text("no data")
    before = sorted(os.listdir(tmp_path))

    code, out, err = tumbaga("evaluate", *arguments)

    assert code == 2
    assert out == ""
    assert err.startswith(f"tumbaga: {said}"), err
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_a_file_that_is_there_stays(tumbaga: Tumbaga, few: str, tmp_path: Path) -> None:
    """--out does not write over a potential."""
    (tmp_path / "mine.safetensors").write_text("dear to me")

    code, _, err = tumbaga("evaluate", MODEL, few, "--fix-softening", "--out", "mine.safetensors")

    assert (code, err) == (2, "tumbaga: --out: mine.safetensors is there already; choose another name\n")
    assert (tmp_path / "mine.safetensors").read_text() == "dear to me"


def test_without_matplotlib_plots_are_a_sentence(tumbaga: Tumbaga, few: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found out before anything is computed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    code, out, err = tumbaga("evaluate", MODEL, few, "--plots", "plots")

    assert (code, out) == (2, "")
    assert "pip install 'tumbaga[plots]'" in err


def test_help_teaches(tumbaga: Tumbaga) -> None:
    """The command explains itself with examples."""
    code, out, _ = tumbaga("evaluate", "--help")

    assert code == 0
    for word in ("MODEL", "DATA", "--fix-softening", "--skip-bad", "tumbaga evaluate painn:cuau-water test.extxyz"):
        assert word in out


@pytest.mark.slow
def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    """Interrupted while it reads, the command says so in one line, and leaves no file."""
    os.mkfifo(tmp_path / "endless.extxyz")
    # a test that itself runs in the background would hand on that interrupts are ignored
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from tumbaga.driver.cli import main; main()"
    command = [sys.executable, "-c", start, "evaluate", MODEL, "endless.extxyz", "--json", "a.json"]
    with (
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        open(tmp_path / "endless.extxyz", "w"),  # waits until the command has opened it, too
    ):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (130, "", "stopped; nothing was written\n")
    assert os.listdir(tmp_path) == ["endless.extxyz"]
