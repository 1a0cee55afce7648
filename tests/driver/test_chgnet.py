"""CHGNet as a back end, against its own calculator and against the mathematics that the ports promise. `make chgnet` runs this file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111

from tumbaga.driver.backends import chgnet_files, registry
from tumbaga.driver.backends.flat import UnknownElementError
from tumbaga.driver.backends.painn import DATA
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.slot import Slot
from tumbaga.driver.structures import read_frame
from tumbaga.online import versions
from tumbaga.online.conformance import CHECKS, Check, Subject, Tolerances
from tumbaga.online.errors import VersionError
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Frame, Prediction

ELEMENTS = (1, 8, 29, 79)
LEARNS, SERVES = "chgnet:0.3.0?elements=Cu,Au,O,H", "chgnet:0.3.0"
SINGLE = 1e-4  # eV and eV/Å: float32 inside the network, energies of some ten to some hundred eV
EXACT = 1e-9  # float64 sums in another order
BOX = 40.0  # Å: wide enough for the package's own calculator to see a cluster as free


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """The package warns when it is imported and prints when a model is made."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def package() -> None:
    with hushed():
        pytest.importorskip("chgnet.model")


@pytest.fixture(scope="module")
def single(package: None) -> Any:
    return registry.load(LEARNS, "cpu")


@pytest.fixture(scope="module")
def double(package: None) -> Any:
    return registry.load(LEARNS, "cpu", "float64")


@pytest.fixture(scope="module")
def serving(package: None) -> Any:
    return registry.load(SERVES, "cpu")


def own(name: str) -> Any:
    """The package's own calculator."""
    with hushed():
        from chgnet.model import CHGNet, CHGNetCalculator

        return CHGNetCalculator(CHGNet.load(model_name=name, use_device="cpu"), use_device="cpu", on_isolated_atoms="ignore")


def cluster(seed: int = 1, rattle: float = 0.08) -> Frame:
    """CuAu(H2O)2, a little displaced."""
    frame = read_frame(DATA / "cuau-water.xyz")
    return moved(frame, frame.positions + np.random.default_rng(seed).normal(0.0, rattle, frame.positions.shape))


def crystal(seed: int = 2) -> Frame:
    """Cu3Au in a sheared cell that is smaller than the cutoff, a little displaced."""
    atoms = bulk("Cu", cubic=True, a=3.75)
    cell = np.array(atoms.cell) @ np.array([[1.02, 0.03, 0.0], [0.0, 0.99, 0.02], [0.0, 0.0, 1.04]])
    positions = atoms.get_scaled_positions() @ cell + np.random.default_rng(seed).normal(0.0, 0.1, (4, 3))
    return Frame(np.array([79, 29, 29, 29]), positions, cell, periodic=True)


def slab(seed: int = 3) -> Frame:
    """Four layers of a disordered alloy under vacuum, displaced so far that bonds make and break angles."""
    rng, atoms = np.random.default_rng(seed), fcc111("Cu", (2, 3, 4), orthogonal=False, vacuum=8.0, periodic=True)
    numbers = np.where(rng.random(len(atoms)) < 0.4, 79, 29)
    return Frame(numbers, atoms.positions + rng.normal(0.0, 0.12, (len(atoms), 3)), np.array(atoms.cell), periodic=True)


def primitive() -> Frame:
    """One atom in a cell less than half as wide as the cutoff: all its neighbours are itself."""
    return Frame(np.array([29]), np.zeros((1, 3)), np.array(bulk("Cu", a=3.6).cell), periodic=True)


def chain() -> Frame:
    """Atoms so far apart that there are pairs, but no angles."""
    return few([29, 79, 8], [[0.0, 0.0, 0.0], [0.0, 0.0, 3.6], [0.0, 0.4, 7.2]])


def few(numbers: list[int], positions: npt.ArrayLike) -> Frame:
    return Frame(np.array(numbers, dtype=np.int64), np.array(positions, dtype=np.float64))


def moved(frame: Frame, positions: npt.NDArray[np.float64]) -> Frame:
    return Frame(frame.numbers, positions, frame.cell, frame.periodic)


def shown(said: Prediction) -> npt.NDArray[np.float64]:
    assert said.features is not None
    return said.features


KINDS = {
    "cluster": cluster(),
    "crystal": crystal(),
    "slab": slab(),
    "primitive": primitive(),
    "chain": chain(),
    "atom": few([8], [[0, 0, 0]]),
}


# -- without the package ---------------------------------------------------------------------------------------------------------------


def test_without_the_package_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both doors name the extra."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (registry.load, registry.weights_file):
        with pytest.raises(PotentialError, match=r"chgnet:0.3.0: needs the package chgnet, .*pip install 'tumbaga\[chgnet\]'"):
            ask(SERVES)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("elements=Cu,Xx", "'Xx', which is no element"),
        ("elements=", "'', which is no element"),
        ("elements=Cu,X", "'X', which is no element"),
        ("element=Cu", "has no option 'element'; known are elements"),
        ("Cu", "has no option 'Cu'"),
        ("&", "write for example"),
    ],
)
def test_a_misspelt_option_is_a_sentence(options: str, told: str) -> None:
    """Seen before anything is imported or started."""
    with pytest.raises(PotentialError, match=told):
        registry.weights_file(f"{SERVES}?{options}")


def test_names_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file keeps its options; a model of the package and what does not exist stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.pth.tar").touch()
    assert registry.absolute("chgnet:mine.pth.tar?elements=Cu") == f"chgnet:{tmp_path}/mine.pth.tar?elements=Cu"
    assert registry.absolute("chgnet:mine.pth.tar") == f"chgnet:{tmp_path}/mine.pth.tar"
    for name in (SERVES, LEARNS, "chgnet:other.pth.tar"):
        assert registry.absolute(name) == name


# -- what it says ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(chgnet_files.PACKAGED))
def test_it_says_what_its_own_calculator_says(package: None, name: str) -> None:
    """Energy, forces and, in a cell, the virial are those of CHGNetCalculator to float32, in one ragged batch as frame by frame there.

    Clusters, for which the package has no graph, stand in a wide box there. 0.2.0 has biases that act only where a frame has angles.
    """
    calculator, batch = own(name), registry.load(f"chgnet:{name}", "cpu").predict(list(KINDS.values()))
    for frame, said in zip(KINDS.values(), batch, strict=True):
        atoms = Atoms(
            frame.numbers, frame.positions, cell=frame.cell if frame.periodic else BOX * np.eye(3), pbc=True, calculator=calculator
        )
        assert said.energy == pytest.approx(atoms.get_potential_energy(), abs=SINGLE)
        np.testing.assert_allclose(said.forces, atoms.get_forces(), atol=SINGLE)
        if frame.periodic:
            np.testing.assert_allclose(-said.virial / atoms.get_volume(), atoms.get_stress(voigt=False), atol=SINGLE / 10)


def test_a_model_that_learns_says_what_one_that_serves_says(single: Any, serving: Any) -> None:
    """To the bit: naming elements changes what is learnt, not what is said."""
    for frame in KINDS.values():
        mine, theirs = single.predict([frame])[0], serving.predict([frame])[0]
        assert mine.energy == theirs.energy
        np.testing.assert_array_equal(mine.forces, theirs.forces)
        np.testing.assert_array_equal(mine.virial, theirs.virial)


def test_coinciding_atoms_give_no_finite_lie(single: Any) -> None:
    """Two atoms in one place are answered with non-finite numbers, not with an exception."""
    assert not single.predict([few([1, 8], np.zeros((2, 3)))])[0].finite


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_says_the_same(single: Any) -> None:
    """Forces, features and force rows of both devices agree to float32."""
    there, frames = registry.load(LEARNS, "cuda"), [cluster(), crystal(), few([8], [[0.0, 0.0, 0.0]])]
    for here, said in zip(single.predict(frames), there.predict(frames), strict=True):
        assert said.energy == pytest.approx(here.energy, abs=SINGLE)
        np.testing.assert_allclose(said.forces, here.forces, atol=SINGLE)
        np.testing.assert_allclose(shown(said), shown(here), atol=SINGLE)
    assert isinstance(there, Trainable)
    np.testing.assert_allclose(there.force_rows(frames[1]).rows, single.force_rows(frames[1]).rows, atol=SINGLE)


# -- elements --------------------------------------------------------------------------------------------------------------------------


def test_without_elements_it_serves_all_and_learns_none(serving: Any) -> None:
    """89 elements, no readout, no features; the linear model of a frame is then its fixed part alone."""
    said, rows = serving.predict([cluster()])[0], serving.force_rows(cluster())

    assert len(serving.spec.elements) == 89
    assert set(ELEMENTS) < set(serving.spec.elements)
    assert serving.spec.n_hidden == serving.spec.n_columns == serving.readout().size == 0
    assert said.features is None
    assert rows.rows.shape == (3 * len(said.forces), 0)
    assert rows.energy_fixed == said.energy
    np.testing.assert_array_equal(rows.forces_fixed, said.forces)
    with pytest.raises(VersionError, match="has no linear readout"):
        Slot(serving).load(1, Path("any"), ())


def test_unknown_elements_are_refused_with_a_sentence(single: Any, serving: Any) -> None:
    """The error names the element and the known ones, and survives pickling; what is not known is refused when it is loaded.

    The network has rows for Z = 1 to 94, but no structure of MPtrj holds Po, At, Rn, Fr or Ra.
    """
    with pytest.raises(UnknownElementError, match="it does not know Pt; it knows H, O, Cu, Au") as caught:
        single.predict([few([1, 78], [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])])
    with pytest.raises(UnknownElementError):
        single.force_rows(few([78], [[0.0, 0.0, 0.0]]))
    for number, symbol in ((86, "Rn"), (95, "Am")):
        with pytest.raises(UnknownElementError, match=f"it does not know {symbol}; it knows H, He"):
            serving.predict([few([number], [[0.0, 0.0, 0.0]])])
    with pytest.raises(PotentialError, match="it does not know Po, Rn, Am; it knows H, He"):
        registry.load(f"{SERVES}?elements=Rn,H,Am,Po", "cpu")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# -- the linear readout ----------------------------------------------------------------------------------------------------------------


def test_it_declares_what_it_is(single: Any) -> None:
    """Elements, cutoff, width, level of theory, licence."""
    spec = single.spec
    assert isinstance(single, Trainable)
    assert (spec.name, spec.elements, spec.cutoff, spec.n_hidden, spec.n_columns) == (LEARNS, ELEMENTS, 6.0, 64, 256)
    assert spec.level.startswith("PBE, PBE+U")
    assert spec.licence == "BSD-3-Clause-LBNL"


def test_it_keeps_its_dtype(package: None) -> None:
    """No other than float32 and float64."""
    with pytest.raises(PotentialError, match="dtype 'float16' is not float32 or float64"):
        registry.load(SERVES, "cpu", "float16")


def subject_of(name: str) -> Subject:
    """In float64, with the strictest tolerances, an atom alone, and one whose neighbours are all itself."""
    load, rest = registry.loader(name)
    return Subject(
        load(rest, "cpu", "float64"), [KINDS[one] for one in ("atom", "cluster", "crystal", "primitive")], Tolerances(), load, rest
    )


@pytest.fixture(scope="module")
def subject(package: None) -> Subject:
    return subject_of(LEARNS)


# the suite's step is in proportion to the largest parameter, here a frequency of 109 / cutoff, and so too long for CHGNet: the gradient is
# held against finite differences of each parameter in test_chgnet_training
PROMISES = [one for one in CHECKS if str(one) != "a_loss_has_its_gradient"]


@pytest.mark.parametrize("promise", PROMISES, ids=str)
def test_it_keeps_every_promise_of_its_port(promise: Check, subject: Subject) -> None:
    """The conformance suite for a potential that learns and can be trained."""
    promise(subject)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chgnet:0.2.0?elements=Cu,Au,O,H", "chgnet:r2scan?elements=Cu,Au,O,H", SERVES])
def test_the_other_models_keep_every_promise(package: None, name: str) -> None:
    """The conformance suite for the older architecture, for the other level of theory, and for a potential that only serves."""
    subject = subject_of(name)
    for promise in PROMISES:
        if not promise.why_not(subject):
            promise(subject)


def test_force_rows_of_many_atoms_give_the_forces_of_any_readout(double: Any) -> None:
    """With more coordinates than columns they are made another way: backwards, column by column; columns of absent elements are zero."""
    frame = few([29] * 24, slab().positions)
    assert 3 * len(frame) > double.spec.n_hidden
    rows = double.force_rows(frame)
    for w in (double.readout(), np.random.default_rng(6).normal(size=256)):
        served = double.predict([frame], w[None])[0]
        np.testing.assert_allclose((rows.rows @ w).reshape(-1, 3) + rows.forces_fixed, served.forces, atol=1e-8)
        assert served.energy == pytest.approx(float(rows.phi @ w) + rows.energy_fixed, abs=1e-8)
    assert not rows.rows.reshape(-1, 4, 64)[:, [0, 1, 3]].any()


def test_force_rows_of_float32_are_those_of_float64(single: Any, double: Any) -> None:
    """To single precision: what is learnt does not depend on the dtype that serves."""
    np.testing.assert_allclose(single.force_rows(cluster()).rows, double.force_rows(cluster()).rows, atol=SINGLE)


# -- versions and files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(chgnet_files.PACKAGED))
def test_a_version_serves_in_a_slot_and_by_itself(package: None, tmp_path: Path, name: str) -> None:
    """A version file gives its readout to the potential it belongs to, and is a potential of its own, without the checkpoint."""
    model = registry.load(f"chgnet:{name}?elements=Cu,Au,O,H", "cpu")
    assert isinstance(model, Trainable)
    frame, readout = cluster(), 1.01 * model.readout()
    layer = versions.LastLayer(readout, 1e-6 * np.eye(256))
    path = tmp_path / versions.write(tmp_path, 1, model.state(readout), layer, model.metadata).path
    slot = Slot(model)
    slot.load(1, path, ())
    (answer,) = slot.answer([frame], [(1, 1, 0.0)])
    alone = registry.load(f"chgnet:{path}", "cpu")
    (said,) = alone.predict([frame])

    np.testing.assert_array_equal(answer.prediction.forces, model.predict([frame], readout[None])[0].forces)
    assert np.isfinite(answer.lpr).all()
    assert isinstance(alone, Trainable)
    assert (alone.spec.elements, alone.spec.n_columns) == (ELEMENTS, 256)
    assert (alone.spec.level, alone.spec.licence, alone.metadata) == (model.spec.level, model.spec.licence, model.metadata)
    np.testing.assert_array_equal(alone.readout(), readout)
    np.testing.assert_array_equal(said.forces, answer.prediction.forces)
    assert said.energy == answer.prediction.energy
    with pytest.raises(PotentialError, match="says itself which elements"):
        registry.load(f"chgnet:{path}?elements=Cu", "cpu")


def test_models_are_found_by_name(package: None, tmp_path: Path) -> None:
    """Every model that the wheel brings has its file; others ask for a path."""
    for name in chgnet_files.PACKAGED:
        path = registry.weights_file(f"chgnet:{name}?elements=Cu")
        assert path is not None
        assert path.is_file()
    for name in ("0.4.0", f"{tmp_path}/none.pth.tar"):
        with pytest.raises(PotentialError, match=r"there is no file .*; the package has 0.3.0, .* give the path"):
            registry.weights_file(f"chgnet:{name}")


@pytest.mark.parametrize("name", list(chgnet_files.PACKAGED))
def test_a_copied_checkpoint_is_the_same_potential(package: None, tmp_path: Path, name: str) -> None:
    """A path does what the name does, but claims no level of theory and no licence that it cannot know."""
    path = tmp_path / "mine.pth.tar"
    path.write_bytes(chgnet_files.wanted(name).path.read_bytes())
    copied, packaged = (registry.load(f"chgnet:{rest}?elements=H,O,Cu,Au", "cpu") for rest in (path, name))

    np.testing.assert_array_equal(copied.predict([cluster()])[0].forces, packaged.predict([cluster()])[0].forces)
    assert (copied.spec.level, copied.spec.licence) == ("", "")


def test_what_its_trainer_saves_can_be_served(package: None, tmp_path: Path) -> None:
    """A checkpoint of the package's own trainer holds optimiser, settings and a history of numpy numbers; nothing of it is executed."""
    with hushed():
        from chgnet.model import CHGNet
        from chgnet.trainer import Trainer

        trainer = Trainer(model=CHGNet.load(use_device="cpu"), targets="ef", use_device="cpu", epochs=1)
        trainer.training_history["e"]["train"].append(np.float64(0.1))
        trainer.save(str(tmp_path / "mine.pth.tar"))
    mine, packaged = registry.load(f"chgnet:{tmp_path}/mine.pth.tar", "cpu"), registry.load(SERVES, "cpu")

    assert mine.spec.elements == tuple(range(1, 95))
    np.testing.assert_array_equal(mine.predict([cluster()])[0].forces, packaged.predict([cluster()])[0].forces)


class _Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_nothing_in_a_checkpoint_is_executed(package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that asks for a function is refused with a sentence, and so are damaged files and foreign ones."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"model_args": _Bomb(), "state_dict": {}}}, "bomb.pth")
    torch.save({"weights": torch.zeros(3)}, "foreign.pth")
    torch.save([1, 2], "list.pth")
    Path("damaged.pth").write_bytes(Path("foreign.pth").read_bytes()[:-200])
    Path("foreign.safetensors").write_bytes((DATA / "cuau-water.safetensors").read_bytes())
    for name in ("bomb.pth", "foreign.pth", "list.pth", "damaged.pth"):
        with pytest.raises(PotentialError, match="is no CHGNet checkpoint of tensors and settings alone"):
            registry.load(f"chgnet:{name}", "cpu")
    with pytest.raises(PotentialError, match=r"is no version of a CHGNet potential .*declares the architecture 'tumbaga-painn-1'"):
        registry.load("chgnet:foreign.safetensors", "cpu")
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mlp_first": False}, "no linear readout of atoms; models with mlp_first or is_intensive off"),
        ({"is_intensive": False}, "no linear readout of atoms; models with mlp_first or is_intensive off"),
        ({"n_conv": 3}, "its tensors do not fit its settings"),
        ({"num_angular": 8}, "cannot be built from its settings"),
    ],
)
def test_a_model_that_cannot_be_taken_apart_is_refused(package: None, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    """The sentence says why."""
    held = torch.load(chgnet_files.wanted("0.3.0").path, map_location="cpu", weights_only=True)
    held["model"]["model_args"] |= change
    torch.save({"model": held["model"]}, tmp_path / "mine.pth")
    with pytest.raises(PotentialError, match=told):
        registry.load(f"chgnet:{tmp_path}/mine.pth", "cpu")


def test_a_model_without_a_table_of_elements_is_served(serving: Any, tmp_path: Path) -> None:
    """Its energies are then those of the network alone; a composition model that is no table is refused."""
    held = torch.load(chgnet_files.wanted("0.3.0").path, map_location="cpu", weights_only=True)["model"]
    table = held["state_dict"].pop("composition_model.fc.weight")[0]
    torch.save({"model": held}, tmp_path / "bare.pth")
    held["state_dict"]["composition_model.fc1.weight"] = torch.zeros(3)
    torch.save({"model": held}, tmp_path / "other.pth")
    frame = cluster()
    (said,), (whole,) = (model.predict([frame]) for model in (registry.load(f"chgnet:{tmp_path}/bare.pth", "cpu"), serving))

    assert said.energy == pytest.approx(whole.energy - float(table[frame.numbers - 1].double().sum()), abs=EXACT)
    np.testing.assert_array_equal(said.forces, whole.forces)
    with pytest.raises(PotentialError, match="composition models other than AtomRef are not supported"):
        registry.load(f"chgnet:{tmp_path}/other.pth", "cpu")


def test_its_settings_are_json(single: Any) -> None:
    """The metadata of a version file say of which model it is, in JSON that reads back the same."""
    hyper = json.loads(single.metadata["hyper"])
    assert tuple(hyper["elements"]) == ELEMENTS
    assert hyper["model"]["atom_graph_cutoff"] == 6
    assert json.loads(json.dumps(hyper)) == hyper


def test_loading_prints_nothing(package: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The package tells how many parameters it has on standard output, which belongs to the user's commands."""
    registry.load(SERVES, "cpu")
    assert capsys.readouterr() == ("", "")


def test_looking_up_a_name_imports_neither_torch_nor_the_package(package: None) -> None:
    """The gateway and the command line look names up."""
    code = (
        f"import sys; from tumbaga.driver.backends import registry; registry.weights_file({LEARNS!r}); "
        "sys.exit('torch' in sys.modules or 'chgnet' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
