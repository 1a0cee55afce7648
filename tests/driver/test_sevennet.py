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
from tumbaga.online.errors import VersionError
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Frame, Prediction
from tumbaga.online.testing import Tolerances, check_trainable

ELEMENTS = (1, 8, 29, 79)
LEARNS, SERVES = "sevennet:7net-0?elements=Cu,Au,O,H", "sevennet:7net-0"
STEP = 1e-3  # Å, central differences: an error of about 1e-6 of the third derivative
SINGLE = 1e-4  # eV and eV/Å: float32 inside the network, energies of some ten eV
EXACT = 1e-9  # float64 sums in another order


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


FRAMES = pytest.mark.parametrize("frame", [cluster(), crystal()], ids=["cluster", "crystal"])


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


def test_a_batch_says_what_its_frames_say_alone(double: Any) -> None:
    """Frames of different sizes, with and without a cell, do not feel one another."""
    frames = [cluster(), crystal(), few([8], [[0.0, 0.0, 0.0]]), primitive(), cluster(3)]
    for together, frame in zip(double.predict(frames), frames, strict=True):
        alone = double.predict([frame])[0]
        assert together.energy == pytest.approx(alone.energy, abs=EXACT)
        np.testing.assert_allclose(together.forces, alone.forces, atol=EXACT)
        np.testing.assert_allclose(together.virial, alone.virial, atol=EXACT)
        np.testing.assert_allclose(shown(together), shown(alone), atol=EXACT)
    assert double.predict([]) == []


def test_float32_follows_float64(single: Any, double: Any) -> None:
    """What is said is float64 in either case, and differs by the rounding of the network."""
    one, two = single.predict([cluster()])[0], double.predict([cluster()])[0]

    assert one.energy == pytest.approx(two.energy, abs=SINGLE)
    np.testing.assert_allclose(one.forces, two.forces, atol=SINGLE)
    assert one.forces.dtype == one.virial.dtype == shown(one).dtype == np.float64


@FRAMES
def test_forces_are_the_slope_of_the_energy(double: Any, frame: Frame) -> None:
    """Forces agree with central differences of the energy."""
    frames = []
    for i in range(len(frame)):
        for c in range(3):
            for shift in (STEP, -STEP):
                positions = frame.positions.copy()
                positions[i, c] += shift
                frames.append(moved(frame, positions))
    energies = np.array([p.energy for p in double.predict(frames)]).reshape(len(frame), 3, 2)

    forces = double.predict([frame])[0].forces
    assert np.abs(forces).max() > 0.1
    np.testing.assert_allclose(forces, (energies[..., 1] - energies[..., 0]) / (2 * STEP), atol=1e-4 * np.abs(forces).max())


@FRAMES
def test_the_virial_is_minus_the_slope_along_strain(double: Any, frame: Frame) -> None:
    """The virial agrees with central differences over the nine strains, symmetrised."""
    numeric = np.zeros((3, 3))
    for a in range(3):
        for b in range(3):
            sides = []
            for sign in (1, -1):
                deform = np.eye(3)
                deform[a, b] += sign * STEP
                sides.append(Frame(frame.numbers, frame.positions @ deform, frame.cell @ deform, frame.periodic))
            up, down = double.predict(sides)
            numeric[a, b] = -(up.energy - down.energy) / (2 * STEP)

    virial = double.predict([frame])[0].virial
    np.testing.assert_allclose(virial, 0.5 * (numeric + numeric.T), atol=1e-4 * np.abs(virial).max())


def test_the_energy_is_invariant_and_the_forces_turn_along(double: Any) -> None:
    """Rotation, translation and renumbering change nothing but the axes and the order."""
    rng, frame = np.random.default_rng(4), cluster()
    turn, order = np.linalg.qr(rng.normal(size=(3, 3)))[0], rng.permutation(len(frame))
    turn *= np.linalg.det(turn)  # a rotation: the model knows no reflection
    plain, turned, shuffled = double.predict(
        [frame, moved(frame, frame.positions @ turn + 7.0), Frame(frame.numbers[order], frame.positions[order])]
    )

    # the rotation matrices of the network have float32 constants
    assert turned.energy == pytest.approx(plain.energy, abs=1e-5)
    np.testing.assert_allclose(turned.forces, plain.forces @ turn, atol=1e-5)
    np.testing.assert_allclose(turned.virial, turn.T @ plain.virial @ turn, atol=1e-4)
    assert shuffled.energy == pytest.approx(plain.energy, abs=EXACT)
    np.testing.assert_allclose(shuffled.forces, plain.forces[order], atol=EXACT)
    np.testing.assert_allclose(plain.forces.sum(axis=0), 0.0, atol=EXACT)


def test_a_supercell_is_its_cells(double: Any) -> None:
    """Twice the cell is twice the energy and the same forces, though one of the two is smaller than the cutoff."""
    frame = crystal()
    twice = Frame(
        np.tile(frame.numbers, 2),
        np.concatenate([frame.positions, frame.positions + frame.cell[1]]),
        frame.cell * [[1], [2], [1]],
        periodic=True,
    )
    one, two = double.predict([frame, twice])

    assert two.energy == pytest.approx(2 * one.energy, abs=EXACT * 100)
    np.testing.assert_allclose(two.forces, np.tile(one.forces, (2, 1)), atol=EXACT * 100)
    np.testing.assert_allclose(two.virial, 2 * one.virial, atol=EXACT * 1000)


@pytest.mark.parametrize("number", [1, 29])
def test_an_atom_alone_feels_nothing(single: Any, number: int) -> None:
    """No pairs: zero forces and virial, a finite energy, features of the right shape, force rows of zero."""
    frame = few([number], [[1.0, 2.0, 3.0]])
    (said,) = single.predict([frame])
    rows = single.force_rows(frame)

    assert np.isfinite(said.energy)
    assert not said.forces.any()
    assert not said.virial.any()
    assert not rows.rows.any()
    assert shown(said).shape == (1, single.spec.n_hidden)
    assert said.energy == pytest.approx(float(rows.phi @ single.readout()) + rows.energy_fixed, abs=EXACT)


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


def test_features_and_readout_give_the_energy(single: Any, double: Any) -> None:
    """E = phi · w + fixed, with phi summed from the features of a plain prediction."""
    frame = cluster()
    for model in (single, double):
        said, rows = model.predict([frame])[0], model.force_rows(frame)
        phi = np.zeros((4, model.spec.n_hidden))
        np.add.at(phi, np.searchsorted(ELEMENTS, frame.numbers), shown(said))

        assert isinstance(model, Trainable)
        assert model.spec.elements == ELEMENTS
        assert model.spec.n_columns == model.readout().size == 4 * 64
        np.testing.assert_allclose(rows.phi, phi.reshape(-1), atol=1e-5)
        assert said.energy == pytest.approx(float(phi.reshape(-1) @ model.readout()) + rows.energy_fixed, abs=1e-8)


@pytest.mark.parametrize("frame", [cluster(), crystal(), primitive()], ids=["cluster", "crystal", "primitive"])
def test_force_rows_give_the_forces_of_any_readout(double: Any, frame: Frame) -> None:
    """rows @ w + fixed are the forces under w, whatever w; columns of absent elements are zero."""
    rows = double.force_rows(frame)
    for w in (double.readout(), np.random.default_rng(6).normal(size=256)):
        served = double.predict([frame], w[None])[0]
        np.testing.assert_allclose((rows.rows @ w).reshape(-1, 3) + rows.forces_fixed, served.forces, atol=1e-8)
        assert served.energy == pytest.approx(float(rows.phi @ w) + rows.energy_fixed, abs=1e-8)
    absent = [k for k, z in enumerate(ELEMENTS) if z not in frame.numbers]
    assert not rows.rows.reshape(-1, 4, 64)[:, absent].any()


def test_force_rows_of_float32_are_those_of_float64(single: Any, double: Any) -> None:
    """To single precision: what is learnt does not depend on the dtype that serves."""
    np.testing.assert_allclose(single.force_rows(cluster()).rows, double.force_rows(cluster()).rows, atol=SINGLE)


def test_it_keeps_every_promise_of_its_port(double: Any) -> None:
    """The conformance suite for trainable potentials; a turned frame shows that the network's rotations have float32 constants."""
    check_trainable(double, [few([8], [[0.0, 0.0, 0.0]]), cluster(), crystal()], Tolerances(1e-3, 1e-4, 1e-5))


def test_each_frame_is_served_by_its_own_readout(double: Any) -> None:
    """One batch, different weights a frame: the ramps of different sessions do not mix."""
    frames, weights = [cluster(), crystal(), cluster()], np.random.default_rng(7).normal(size=(3, 256))
    for k, together in enumerate(double.predict(frames, weights)):
        alone = double.predict([frames[k]], weights[k : k + 1])[0]
        assert together.energy == pytest.approx(alone.energy, abs=1e-8)
        np.testing.assert_allclose(together.forces, alone.forces, atol=1e-8)


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
