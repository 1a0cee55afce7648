"""`tumbaga transfer` on a tiny embedded potential and labels of another one: the file it writes, the table, killing, stopping, and mistakes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from safetensors.numpy import save_file

from tumbaga.driver import cli, transferring
from tumbaga.driver.backends import painn_training, registry
from tumbaga.driver.backends.painn import ARCHITECTURE, PaiNN, load
from tumbaga.driver.backends.painn_net import Hyper
from tumbaga.driver.errors import ConfigError, PotentialError
from tumbaga.driver.serving import serve
from tumbaga.driver.slot import BASE, Slot
from tumbaga.online import last_layer, versions
from tumbaga.online.errors import VersionError
from tumbaga.online.last_layer import labelled
from tumbaga.online.records import Frame, Label, LabelledFrame
from tumbaga.online.training.loop import Sets
from tumbaga.online.training.settings import Settings
from tumbaga.online.versions import LastLayer

HYPER = Hyper((1, 8), cutoff=3.5, channels=8, layers=2, n_radial=6, n_hidden=4)
QUICK = ("--epochs", "3", "--batch-atoms", "16", "--device", "cpu", "--quiet")
Tumbaga = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny operators on several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed: int = 0, noise: float = 0.0, offset: float = 0.0) -> PaiNN:
    rng = np.random.default_rng(seed + 100)
    tensors = {key: value + noise * rng.standard_normal(value.shape) for key, value in painn_training.fresh(HYPER, seed).items()}
    tensors["reference"] = np.array([-13.0, -2000.0]) + offset
    metadata = {"architecture": ARCHITECTURE, "hyper": json.dumps(asdict(HYPER)), "facts": json.dumps({"level": "first", "mean_h2": 1.0})}
    return PaiNN("painn:tiny", tensors, metadata, dtype="float64")


def frames(count: int, seed: int, elements: Sequence[int] = (1, 8)) -> list[Frame]:
    rng = np.random.default_rng(seed)
    grid = 1.5 * np.array([[x, y, z] for x in range(2) for y in range(2) for z in range(2)])
    return [Frame(rng.choice(elements, n), grid[:n] + 0.2 * rng.standard_normal((n, 3))) for n in rng.integers(3, 6, count)]


def labels(given: Sequence[Frame], teacher: PaiNN) -> list[LabelledFrame]:
    said = teacher.predict(given)
    return [LabelledFrame(one, Label(p.energy, p.forces, "second", 0.0)) for one, p in zip(given, said, strict=True)]


def save(path: Path, data: Sequence[LabelledFrame], number: dict[int, int] | None = None) -> None:
    """Write labelled frames as extended XYZ, some elements under other names."""
    images = []
    for one in data:
        atoms = Atoms([(number or {}).get(z, z) for z in one.frame.numbers.tolist()], one.frame.positions)
        atoms.calc = SinglePointCalculator(atoms, energy=one.label.energy, forces=one.label.forces)
        images.append(atoms)
    write(path, images, format="extxyz")


TEACHER = tiny(noise=0.15, offset=-5.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with start.safetensors and data.extxyz, 30 frames, as the working directory."""
    monkeypatch.chdir(tmp_path)
    start = tiny()
    save_file(start.state(), tmp_path / "start.safetensors", start.metadata)
    save(tmp_path / "data.extxyz", labels(frames(30, 1), TEACHER))
    return tmp_path


@pytest.fixture
def tumbaga(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tumbaga:
    """Runs the command line in this process, in the folder; returns exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tumbaga", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


def transfer(tumbaga: Tumbaga, *arguments: str, model: str = "painn:start.safetensors", data: str = "data.extxyz") -> str:
    code, out, err = tumbaga("transfer", model, data, "--out", "new.safetensors", *QUICK, *arguments)
    assert code == 0, err
    return out


def mistake(tumbaga: Tumbaga, *arguments: str, model: str = "painn:start.safetensors", data: str = "data.extxyz") -> str:
    code, out, err = tumbaga("transfer", model, data, "--out", "new.safetensors", *QUICK, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("tumbaga: ")
    assert err.count("\n") == 1
    return err


# -- what comes out --------------------------------------------------------------------------------------------------------------------


def test_a_transfer_ends_with_a_potential_a_table_and_plots(tumbaga: Tumbaga, folder: Path) -> None:
    """One command gives a loadable potential, errors of three arms on frames that were not selected, plots and numbers for programs."""
    out = transfer(tumbaga, "--select", "20", "--level", "PBE")
    new = registry.load("painn:new.safetensors", "cpu")
    told = json.loads((folder / "new-training" / "result.json").read_text())

    assert "18 labels, 2 more to validate; errors on 10 frames that were not selected" in out
    assert [arm["name"] for arm in told["arms"]] == ["tuned", "untuned", "from scratch"]
    assert all(arm["forces"]["rmse"] > 0 for arm in told["arms"])
    assert new.spec.level == "PBE"
    assert {path.name for path in (folder / "new-training").glob("*.png")} == {"learning.png", "forces.png"}
    assert "the force error is" in out


@pytest.mark.slow
def test_the_file_says_what_was_done(tumbaga: Tumbaga) -> None:
    """Facts in the file name start, labels, epochs and settings, and the scale of the new features, computed from the training frames."""
    transfer(tumbaga, "--no-compare", "--valid", "0", "--seed", "3")
    new = load("painn:new.safetensors", "cpu", "float64")
    facts = json.loads(new.metadata["facts"])
    given = [one.frame for one in labels(frames(30, 1), TEACHER)]
    rows = np.concatenate([new.force_rows(one).rows for one in given])

    assert facts["training"]["labels"] == 30
    assert facts["training"]["epochs_done"] == 3
    assert facts["training"]["seed"] == 3
    assert facts["training"]["start"].endswith("start.safetensors")
    assert new.spec.mean_h2 == pytest.approx(float((rows**2).sum(axis=1).mean()), rel=1e-3)


def test_no_compare_trains_once(tumbaga: Tumbaga, folder: Path) -> None:
    """Without the comparison there is one training and one row."""
    transfer(tumbaga, "--no-compare")

    assert (folder / "new-training" / "tuned").is_dir()
    assert not (folder / "new-training" / "from-scratch").exists()
    assert [arm["name"] for arm in json.loads((folder / "new-training" / "result.json").read_text())["arms"]] == ["tuned"]


@pytest.mark.slow
def test_from_scratch_starts_from_nothing(tumbaga: Tumbaga) -> None:
    """--from-scratch gives other weights than the transfer, compared with the untuned potential alone."""
    out = transfer(tumbaga, "--from-scratch")
    facts = json.loads(load("painn:new.safetensors").metadata["facts"])

    assert facts["training"]["start"] == "nothing"
    assert re.search(r"^ *from scratch ", out, re.MULTILINE)
    assert re.search(r"^ *untuned ", out, re.MULTILINE)
    assert not re.search(r"^ *tuned ", out, re.MULTILINE)


@pytest.mark.slow
def test_frozen_groups_are_in_the_file_as_they_were(tumbaga: Tumbaga) -> None:
    """What --freeze names comes out to the bit, what it does not name has changed."""
    transfer(tumbaga, "--freeze", "embedding,interactions.0", "--freeze", "reference", "--no-compare")
    old, new = load("painn:start.safetensors", dtype="float32").state(), load("painn:new.safetensors").state()
    same = {key for key in old if np.array_equal(old[key], new[key])}

    assert {"embedding", "message_in.0.weight", "mix.0.weight", "reference"} <= same
    assert not {"message_in.1.weight", "hidden.weight", "readout"} & same


def test_diverse_frames_are_those_that_differ(tumbaga: Tumbaga, folder: Path) -> None:
    """--by diverse leaves out copies: of 30 frames and 10 copies each of two, none is taken twice."""
    data = labels(frames(30, 1), TEACHER)
    save(folder / "data.extxyz", data[:1] * 10 + data + data[1:2] * 10)
    transfer(tumbaga, "--select", "30", "--by", "diverse", "--valid", "0", "--no-compare")
    log = json.loads((folder / "new-training" / "result.json").read_text())

    assert log["training"]["labels"] == 30
    assert log["test"] == 20


@pytest.mark.slow
def test_a_new_element_is_learnt_from_a_similar_one(tumbaga: Tumbaga, folder: Path) -> None:
    """--map S=O adds sulfur to a potential of H and O; it serves frames of all three and fits the labels' reference energies."""
    save(folder / "sulfur.extxyz", labels(frames(20, 5), TEACHER), {8: 16})
    transfer(tumbaga, "--map", "S=O", "--select", "15", data="sulfur.extxyz")
    new = load("painn:new.safetensors", "cpu")
    told = json.loads((folder / "new-training" / "result.json").read_text())

    assert new.spec.elements == (1, 8, 16)
    assert told["arms"][0]["energies"]["rmse"] < 0.5  # eV per atom; the offsets between the elements are thousands
    assert new.predict([Frame(np.array([16, 1, 8]), frames(1, 5)[0].positions[:3])])[0].finite


@pytest.mark.slow
def test_replay_takes_data_and_generated_frames(tumbaga: Tumbaga, folder: Path) -> None:
    """Replay of a file with the start's own labels and of generated frames is counted, and its error is told for each arm."""
    save(folder / "old.extxyz", labels(frames(6, 7), TEACHER))
    out = transfer(tumbaga, "--replay", "old.extxyz", "--replay", "generated", "--pseudo", "--replay-ratio", "1", "--select", "5")
    told = json.loads((folder / "new-training" / "result.json").read_text())

    assert told["training"]["replay_frames"] == 6 + 50
    assert "replay" in out
    # pseudo-labels are what the start says, so its error on them is nothing but the rounding of float32
    assert [arm["replay_forces"]["rmse"] < 1e-5 for arm in told["arms"]] == [False, True, False]


@pytest.mark.slow
def test_named_test_frames_judge(tumbaga: Tumbaga, folder: Path) -> None:
    """--test names the frames of the table."""
    save(folder / "test.extxyz", labels(frames(7, 9), TEACHER))

    assert "errors on 7 frames of --test" in transfer(tumbaga, "--test", "test.extxyz", "--no-compare")


@pytest.mark.slow
def test_what_judges_is_told_where_nothing_better_is_there(tumbaga: Tumbaga) -> None:
    """Without a selection or --test the table says that its frames chose the epoch, or were learnt."""
    assert "validation frames, which chose the best epoch" in transfer(tumbaga, "--no-compare")
    Path("new.safetensors").unlink()
    assert "frames that were learnt" in transfer(tumbaga, "--no-compare", "--valid", "0", "--run-dir", "b")


# -- the file among versions -----------------------------------------------------------------------------------------------------------


def carried_out(start: PaiNN, folder: Path) -> transferring.Result:
    sets = Sets(labels(frames(12, 1), TEACHER))
    return transferring.carry_out(transferring.Plan(start, sets, [], Settings(epochs=3, batch_atoms=16), compare=False), folder)


def version(potential: PaiNN, run_dir: Path, number: int) -> Path:
    """A version file as a learner writes it after an update from one label."""
    one = labels(frames(1, 11), TEACHER)[0]
    base = potential.readout()
    fit = last_layer.fit(
        [labelled(potential.force_rows(one.frame), one.frame, one.label, base, potential.spec.elements)],
        base,
        mean_h2=potential.spec.mean_h2,
    )
    readout = base + fit.delta
    file = versions.write(run_dir, number, potential.state(readout), LastLayer(readout, fit.covariance), potential.metadata)
    return run_dir / file.path


def test_a_trained_potential_serves_and_learns(tmp_path: Path) -> None:
    """In a slot it serves as version 0, takes a last-layer update as version 1, and the update lowers the error of its label."""
    new = carried_out(tiny(), tmp_path).potential
    assert isinstance(new, PaiNN)
    slot, one = Slot(new), labels(frames(1, 11), TEACHER)[0]
    slot.load(1, version(new, tmp_path, 1), keep=(BASE,))
    before, after = (slot.answer([one.frame], [(number, number, 1.0)])[0].prediction for number in (BASE, 1))

    assert new.spec.mean_h2 > 0
    assert np.abs(after.forces - one.label.forces).max() < np.abs(before.forces - one.label.forces).max()


def test_versions_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A version learnt on a potential with a mapped element does not serve in a slot of the one without, nor the other way."""
    old, new = tiny(), carried_out(tiny().with_elements({16: 8}), tmp_path).potential
    assert isinstance(new, PaiNN)
    for slot, file in ((Slot(old), version(new, tmp_path, 1)), (Slot(new), version(old, tmp_path, 2))):
        with pytest.raises(VersionError):
            slot.load(1, file, keep=(BASE,))


@pytest.mark.slow
def test_a_trained_file_is_served(tumbaga: Tumbaga, folder: Path) -> None:
    """A server that is told the file answers an ASE script with the file's own energies and forces."""
    transfer(tumbaga, "--no-compare")
    frame = frames(1, 13)[0]
    atoms = Atoms(frame.numbers, frame.positions)
    with serve(atoms, "painn:new.safetensors", run_dir=folder / "run", learn=False, device="cpu") as served:
        atoms.calc = served
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    (said,) = load("painn:new.safetensors", "cpu").predict([frame])

    assert energy == pytest.approx(said.energy, abs=1e-4)
    np.testing.assert_allclose(forces, said.forces, atol=1e-4)


# -- killed and stopped ----------------------------------------------------------------------------------------------------------------


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own; what it says comes line by line."""
    text = "import sys; from tumbaga.driver.cli import main; main()"
    command = [sys.executable, "-u", "-c", text, "transfer", "painn:start.safetensors", "data.extxyz", "--device", "cpu", *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def until(child: subprocess.Popen[str], pattern: str) -> str:
    assert child.stderr is not None
    said = []
    for line in child.stderr:
        said.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"it never said {pattern!r} but {said}")


LONG = ("--epochs", "12", "--batch-atoms", "16", "--patience", "0")


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_potential(tumbaga: Tumbaga, folder: Path) -> None:
    """Killed with SIGKILL in its second training, the same command with --resume ends with the tensors and figures of one left alone."""
    child = started(folder, *LONG, "--out", "killed.safetensors")
    until(child, r"from scratch: epoch 5/12")
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert child.stderr is not None
    child.stderr.close()
    assert not (folder / "killed.safetensors").exists()
    for name, more in (("killed", ("--resume",)), ("whole", ())):
        code, _, err = tumbaga(
            "transfer", "painn:start.safetensors", "data.extxyz", "--device", "cpu", *LONG, "--out", f"{name}.safetensors", *more
        )
        assert code == 0, err
    killed, whole = (load(f"painn:{name}.safetensors").state() for name in ("killed", "whole"))
    told = [json.loads((folder / f"{name}-training" / "result.json").read_text())["arms"] for name in ("killed", "whole")]

    for key, value in whole.items():
        np.testing.assert_allclose(killed[key], value, rtol=0, atol=1e-6)  # float32
    for one, other in zip(*told, strict=True):
        assert one["forces"]["rmse"] == pytest.approx(other["forces"]["rmse"], rel=1e-5)
        assert (one["epochs"], one["best_epoch"]) == (other["epochs"], other["best_epoch"])


@pytest.mark.slow
def test_ctrl_c_stops_with_a_checkpoint_and_says_how_to_go_on(tumbaga: Tumbaga, folder: Path) -> None:
    """SIGINT ends the command with code 130, a checkpoint, and the command that goes on, which does."""
    child = started(folder, *LONG, "--out", "new.safetensors", "--no-compare")
    until(child, r"tuned: epoch 3/12")
    child.send_signal(signal.SIGINT)
    line = until(child, "stopped in epoch")
    assert child.stderr is not None
    child.stderr.close()

    assert child.wait() == 130
    assert (folder / "new-training" / "tuned" / "checkpoint.pt").exists()
    assert "go on with: tumbaga transfer painn:start.safetensors data.extxyz" in line
    arguments = line.strip().split("tumbaga ")[1].split()
    assert arguments[-1] == "--resume"
    assert tumbaga(*arguments)[0] == 0
    assert load("painn:new.safetensors").spec.elements == (1, 8)


@pytest.mark.slow
def test_a_folder_with_a_training_is_not_overwritten(tumbaga: Tumbaga, folder: Path) -> None:
    """A second command into the same folder is refused without --resume, and with --resume if its data or settings are others."""
    transfer(tumbaga, "--no-compare")
    (folder / "new.safetensors").unlink()

    assert "holds a training already; go on with it by --resume" in mistake(tumbaga, "--no-compare")
    assert "other data, settings or start" in mistake(tumbaga, "--no-compare", "--resume", "--seed", "5")


# -- mistakes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--freeze", "backbone"), r"'backbone' is none of this potential's; known are embedding, interactions\.0"),
        (("--map", "Xx=O"), r"--map: cannot read 'Xx=O'; write NEW=OLD"),
        (("--map", "S=Cu"), "cannot start S from Cu, which it does not know; it knows H, O"),
        (("--rate", "-1"), "--rate: must be above 0"),
        (("--out", "new.pt"), "must end in .safetensors"),
        (("--out", "nowhere/new.safetensors"), "there is no such folder"),
        (("--pseudo",), "--pseudo: is about the frames of --replay"),
        (("--replay", "none.extxyz"), "there is no such file"),
        (("--with", "Cu"), "none of the 30 frames"),
    ],
)
def test_mistakes_are_sentences(tumbaga: Tumbaga, arguments: tuple[str, ...], told: str) -> None:
    """Each mistake is one line that says what is wrong; nothing is written."""
    assert re.search(told, mistake(tumbaga, *arguments))
    assert not Path("new.safetensors").exists()


def test_an_unknown_element_is_told_with_the_way_out(tumbaga: Tumbaga, folder: Path) -> None:
    """Data with an element that the potential does not know say how to start it from another."""
    save(folder / "sulfur.extxyz", labels(frames(5, 5), TEACHER), {8: 16})

    assert "hold S, which" in (said := mistake(tumbaga, data="sulfur.extxyz"))
    assert "--map S=O" in said


def test_what_cannot_be_trained_is_a_sentence(tumbaga: Tumbaga) -> None:
    """A toy has no weights to train."""
    assert "cannot be trained" in mistake(tumbaga, model="toy:lj")


def test_an_existing_file_is_not_overwritten(tumbaga: Tumbaga, folder: Path) -> None:
    """--out must be new."""
    (folder / "new.safetensors").write_bytes(b"mine")

    assert "is there already" in mistake(tumbaga)
    assert (folder / "new.safetensors").read_bytes() == b"mine"


# -- parts -----------------------------------------------------------------------------------------------------------------------------


def test_maps_are_read() -> None:
    """Elements by symbol, several in one or more options."""
    assert transferring.element_map(["Au=Cu", "Ge=Si,S=O"]) == {79: 29, 32: 14, 16: 8}
    for wrong in ("Au", "Au=", "=Cu", "Au:Cu", ""):
        with pytest.raises(ConfigError, match="--map"):
            transferring.element_map([wrong])


def test_a_potential_without_a_training_half_is_refused() -> None:
    """The sentence names the potential."""
    with pytest.raises(PotentialError, match="toy:zero: cannot be trained"):
        transferring.opened(registry.load("toy:zero"), "toy:zero", {})


def test_few_labels_get_more_epochs() -> None:
    """By default a training has about a thousand steps, within bounds, and its patience follows."""
    few, many = (transferring.settings_for(tiny(), Sets(labels(frames(n, 1), TEACHER)), False, {"batch_atoms": 4}) for n in (5, 200))

    assert few.epochs > many.epochs >= transferring.LEAST_EPOCHS
    assert few.epochs <= transferring.MOST_EPOCHS
    assert few.patience == max(30, few.epochs // 3)
