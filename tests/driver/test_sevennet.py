"""SevenNet as a back end, against its own calculator and against the mathematics that the ports promise. `make sevennet` runs this file."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from tumbaga.driver.backends import registry, sevennet_files
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
LEARNS, SERVES = "sevennet:7net-0?elements=Cu,Au,O,H", "sevennet:7net-0"
SINGLE = 1e-4  # eV and eV/Å: float32 inside the network, energies of some ten eV
ALLOWED = Tolerances(1e-3, 1e-4, 1e-5, SINGLE)  # the rotations inside have float32 constants, and the network bends slowly


@pytest.fixture(scope="module")
def package() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sevenn")


@pytest.fixture(scope="module")
def single(package: None) -> Any:
    return registry.load(LEARNS, "cpu")


@pytest.fixture(scope="module")
def double(package: None) -> Any:
    return registry.load(LEARNS, "cpu", "float64")


@pytest.fixture(scope="module")
def serving(package: None) -> Any:
    return registry.load(SERVES, "cpu")


@pytest.fixture(scope="module")
def own(package: None) -> Any:
    """The package's own calculator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sevenn.calculator import SevenNetCalculator

        return SevenNetCalculator("7net-0", device="cpu")


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


def primitive() -> Frame:
    """One atom in a cell half as wide as the cutoff: all its neighbours are itself."""
    return Frame(np.array([29]), np.zeros((1, 3)), np.array(bulk("Cu", a=3.6).cell), periodic=True)


def few(numbers: list[int], positions: npt.ArrayLike) -> Frame:
    return Frame(np.array(numbers, dtype=np.int64), np.array(positions, dtype=np.float64))


def moved(frame: Frame, positions: npt.NDArray[np.float64]) -> Frame:
    return Frame(frame.numbers, positions, frame.cell, frame.periodic)


def shown(said: Prediction) -> npt.NDArray[np.float64]:
    assert said.features is not None
    return said.features


# -- without the package ---------------------------------------------------------------------------------------------------------------


def test_without_the_package_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both doors name the extra."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (registry.load, registry.weights_file):
        with pytest.raises(PotentialError, match=r"sevennet:7net-0: needs the package sevenn, .*pip install 'tumbaga\[sevennet\]'"):
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
    (tmp_path / "mine.pth").touch()
    assert registry.absolute("sevennet:mine.pth?elements=Cu") == f"sevennet:{tmp_path}/mine.pth?elements=Cu"
    assert registry.absolute("sevennet:mine.pth") == f"sevennet:{tmp_path}/mine.pth"
    for name in (SERVES, LEARNS, "sevennet:other.pth"):
        assert registry.absolute(name) == name


# -- what it says ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame", [cluster(), crystal(), primitive()], ids=["cluster", "crystal", "primitive"])
def test_it_says_what_its_own_calculator_says(single: Any, serving: Any, own: Any, frame: Frame) -> None:
    """Energy, forces and, in a cell, the virial are those of SevenNetCalculator to float32."""
    atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.periodic, calculator=own)
    for model in (single, serving):
        (said,) = model.predict([frame])
        assert said.energy == pytest.approx(atoms.get_potential_energy(), abs=SINGLE)
        np.testing.assert_allclose(said.forces, atoms.get_forces(), atol=SINGLE)
        if frame.periodic:
            np.testing.assert_allclose(-said.virial / atoms.get_volume(), atoms.get_stress(voigt=False), atol=SINGLE / 10)


def test_coinciding_atoms_give_no_finite_lie(single: Any) -> None:
    """Two atoms in one place are answered with non-finite numbers, not with an exception."""
    assert not single.predict([few([1, 8], np.zeros((2, 3)))])[0].finite


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_says_the_same(single: Any) -> None:
    """Forces, features and force rows of both devices agree to float32."""
    there, frames = registry.load(LEARNS, "cuda"), [cluster(), crystal()]
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
    """The error names the element and the known ones, and survives pickling; one that SevenNet never saw is refused when it is loaded."""
    with pytest.raises(UnknownElementError, match="it does not know Pt; it knows H, O, Cu, Au") as caught:
        single.predict([few([1, 78], [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])])
    with pytest.raises(UnknownElementError):
        single.force_rows(few([78], [[0.0, 0.0, 0.0]]))
    with pytest.raises(UnknownElementError, match="it does not know Rn; it knows H, He"):
        serving.predict([few([86], [[0.0, 0.0, 0.0]])])
    with pytest.raises(PotentialError, match="it does not know Po, Rn; it knows H, He"):
        registry.load(f"{SERVES}?elements=Rn,H,Po", "cpu")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# -- the linear readout ----------------------------------------------------------------------------------------------------------------


def test_force_rows_of_float32_are_those_of_float64(single: Any, double: Any) -> None:
    """To single precision: what is learnt does not depend on the dtype that serves."""
    np.testing.assert_allclose(single.force_rows(cluster()).rows, double.force_rows(cluster()).rows, atol=SINGLE)


@pytest.fixture(scope="module")
def subject(double: Any) -> Subject:
    """In float64, with a frame of one atom whose neighbours are all itself, and one of an atom alone."""
    load, rest = registry.loader(LEARNS)
    return Subject(double, [few([8], [[0.0, 0.0, 0.0]]), cluster(), crystal(), primitive()], ALLOWED, load, rest)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_it_keeps_every_promise_of_its_port(check: Check, subject: Subject) -> None:
    """The conformance suite for a potential that learns."""
    check(subject)


def test_a_version_serves_in_a_slot_and_by_itself(single: Any, tmp_path: Path) -> None:
    """A version file gives its readout to the potential it belongs to, and is a potential of its own, without the checkpoint."""
    frame, readout = cluster(), 1.01 * single.readout()
    layer = versions.LastLayer(readout, 1e-6 * np.eye(256))
    path = tmp_path / versions.write(tmp_path, 1, single.state(readout), layer, single.metadata).path
    slot = Slot(single)
    slot.load(1, path, ())
    (answer,) = slot.answer([frame], [(1, 1, 0.0)])
    alone = registry.load(f"sevennet:{path}", "cpu")
    (said,) = alone.predict([frame])

    np.testing.assert_array_equal(answer.prediction.forces, single.predict([frame], readout[None])[0].forces)
    assert np.isfinite(answer.lpr).all()
    assert isinstance(alone, Trainable)
    assert (alone.spec.elements, alone.spec.n_columns, alone.spec.level) == (ELEMENTS, 256, single.spec.level)
    assert (alone.spec.licence, alone.spec.dtype) == ("MIT", "float32")
    np.testing.assert_array_equal(alone.readout(), readout)
    np.testing.assert_array_equal(said.forces, answer.prediction.forces)
    with pytest.raises(PotentialError, match="says itself which elements"):
        registry.load(f"sevennet:{path}?elements=Cu", "cpu")


# -- files -----------------------------------------------------------------------------------------------------------------------------


def test_models_are_found_by_name(package: None, tmp_path: Path) -> None:
    """Every model that the wheel brings has its file; others ask for a path."""
    for name in sevennet_files.PACKAGED:
        path = registry.weights_file(f"sevennet:{name}?elements=Cu")
        assert path is not None
        assert path.is_file()
    for name in ("7net-omat", f"{tmp_path}/none.pth"):
        with pytest.raises(PotentialError, match=r"there is no file .*; the package has 7net-0, .* give the path"):
            registry.weights_file(f"sevennet:{name}")


def test_a_copied_checkpoint_is_the_same_potential(single: Any, tmp_path: Path) -> None:
    """A path does what the name does."""
    path = tmp_path / "mine.pth"
    path.write_bytes(sevennet_files.wanted("7net-0").path.read_bytes())
    model = registry.load(f"sevennet:{path}?elements=H,O,Cu,Au", "cpu")

    np.testing.assert_array_equal(model.predict([cluster()])[0].forces, single.predict([cluster()])[0].forces)


class _Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def test_nothing_in_a_checkpoint_is_executed(package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that asks for a function is refused with a sentence, and so are damaged files and foreign ones."""
    monkeypatch.chdir(tmp_path)
    torch.save({"config": _Bomb(), "model_state_dict": {}}, "bomb.pth")
    torch.save({"weights": torch.zeros(3)}, "foreign.pth")
    Path("damaged.pth").write_bytes(Path("foreign.pth").read_bytes()[:-200])
    Path("foreign.safetensors").write_bytes((DATA / "cuau-water.safetensors").read_bytes())
    for name in ("bomb.pth", "foreign.pth", "damaged.pth"):
        with pytest.raises(PotentialError, match="is no SevenNet checkpoint of tensors and settings alone"):
            registry.load(f"sevennet:{name}", "cpu")
    with pytest.raises(PotentialError, match=r"is no version of a SevenNet potential .*declares the architecture 'tumbaga-painn-1'"):
        registry.load("sevennet:foreign.safetensors", "cpu")
    assert not Path("executed").exists()


def test_a_model_of_several_levels_is_refused(package: None) -> None:
    """A multi-fidelity model says what it is."""
    path = sevennet_files.wanted("7net-0").path.parents[1] / "SevenNet_MF_0" / "checkpoint_sevennet_mf_0.pth"
    with pytest.raises(PotentialError, match=r"several levels of theory \(R2SCAN, PBE\), which is not supported"):
        registry.load(f"sevennet:{path}", "cpu")


def test_looking_up_a_name_imports_neither_torch_nor_the_package(package: None) -> None:
    """The gateway and the command line look names up."""
    code = (
        f"import sys; from tumbaga.driver.backends import registry; registry.weights_file({LEARNS!r}); "
        "sys.exit('torch' in sys.modules or 'sevenn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
