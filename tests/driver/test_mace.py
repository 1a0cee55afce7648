"""MACE as a back end, against its own calculator and against what the ports promise, with small random models. `make mace` runs this file."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from tumbaga.driver.backends import registry
from tumbaga.driver.backends.flat import UnknownElementError
from tumbaga.driver.backends.painn import DATA
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.slot import Slot
from tumbaga.driver.structures import read_frame
from tumbaga.online import versions
from tumbaga.online.conformance import CHECKS, Subject
from tumbaga.online.errors import VersionError
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Frame

ELEMENTS = (1, 8, 29, 79)
NAMED = "?elements=Cu,Au,O,H"
SINGLE = 1e-4  # eV and eV/Å: float32 inside the network, energies of some ten eV
EXACT = 1e-9  # float64 sums in another order
# layers, classes and options of the models that people have: MACE-MP-0 and -0b, MACE-MH, and plain ones of old
MODELS: dict[str, dict[str, Any]] = {
    "zbl": {"hidden_irreps": "8x0e+8x1o", "max_ell": 2, "pair_repulsion": True, "scale": 4.0},
    "plain": {
        "num_interactions": 3,
        "interaction_cls_first": "RealAgnosticInteractionBlock",
        "use_reduced_cg": False,
        "saved": torch.float64,
    },
    "density": {
        "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
        "distance_transform": "Agnesi",
        "correlation": 3,
        "scale": 1.5,
    },
    "heads": {
        "interaction_cls": "RealAgnosticResidualNonLinearInteractionBlock",
        "readout_cls": "NonLinearBiasReadoutBlock",
        "heads": ["pbe", "r2scan"],
        "apply_cutoff": False,
        "scale": 2.0,
    },
}
HEADS = {"heads": "r2scan"}
LATER = (
    "heads",
    "edge_irreps",
    "use_reduced_cg",
    "use_so3",
    "use_agnostic_product",
    "use_last_readout_only",
    "use_edge_irreps_first",
    "apply_cutoff",
)


def build(
    scale: float | None = None,
    saved: torch.dtype = torch.float32,
    heads: list[str] | None = None,
    interaction_cls: str = "RealAgnosticResidualInteractionBlock",
    interaction_cls_first: str = "",
    readout_cls: str = "NonLinearReadoutBlock",
    **settings: Any,
) -> Any:
    """A small random model: a MACE, or with a scale a ScaleShiftMACE."""
    from e3nn.o3 import Irreps
    from mace import modules

    n_heads = len(heads or [""])
    given: dict[str, Any] = {
        "r_max": 4.0,
        "num_bessel": 4,
        "num_polynomial_cutoff": 5,
        "max_ell": 1,
        "num_interactions": 2,
        "num_elements": len(ELEMENTS),
        "MLP_irreps": Irreps("4x0e"),
        "gate": torch.nn.functional.silu,
        "atomic_energies": np.array([-0.4, -1.6, -0.2, -0.3]) - 0.1 * np.arange(n_heads)[:, None],
        "avg_num_neighbors": 6.0,
        "atomic_numbers": list(ELEMENTS),
        "correlation": 2,
        "radial_MLP": [8, 8],
        **settings,
        "hidden_irreps": Irreps(settings.get("hidden_irreps", "8x0e")),
        "interaction_cls": modules.interaction_classes[interaction_cls],
        "interaction_cls_first": modules.interaction_classes[interaction_cls_first or interaction_cls],
        "readout_cls": modules.readout_classes[readout_cls],
        "heads": heads,
    }
    torch.set_default_dtype(saved)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            if scale is None:
                model = modules.MACE(**given)
            else:
                shifts = 0.3 + 0.2 * np.arange(n_heads)
                model = modules.ScaleShiftMACE(atomic_inter_scale=scale * (1.0 + shifts), atomic_inter_shift=shifts, **given)
            for key, tensor in model.readouts.named_parameters():
                # larger than random ones are: forces of some eV/Å, and biases that are not zero
                torch.nn.init.normal_(tensor, std=1.0 if key.endswith("bias") else 5.0)
    finally:
        torch.set_default_dtype(torch.float32)
    return model


@pytest.fixture(scope="module")
def package() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mace.modules", reason="mace-torch is not installed", exc_type=ImportError)


@pytest.fixture(scope="module")
def folder(package: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a `.model` file of each kind."""
    made = tmp_path_factory.mktemp("models")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, settings in MODELS.items():
            model = build(**settings)
            torch.save(aged(model) if kind == "plain" else model, made / f"{kind}.model")
    return made


def aged(model: Any) -> Any:
    """The same model as an earlier mace would have saved it: without what came later."""
    for key in LATER:
        delattr(model, key)
    for product in model.products:
        for contraction in product.symmetric_contractions.contractions:
            for key in [key for key, _ in contraction.named_buffers() if key.endswith("_zeroed")]:
                delattr(contraction, key)
    return model


@pytest.fixture(scope="module")
def load(folder: Path) -> Callable[..., Any]:
    """Loads a kind of model, once for each dtype."""
    held: dict[tuple[str, str], Any] = {}

    def loaded(kind: str, dtype: str = "float64") -> Any:
        if (kind, dtype) not in held:
            held[kind, dtype] = registry.load(name(folder, kind), "cpu", dtype)
        return held[kind, dtype]

    return loaded


def name(folder: Path, kind: str) -> str:
    head = f"&head={HEADS[kind]}" if kind in HEADS else ""
    return f"mace:{folder}/{kind}.model{NAMED}{head}"


def calculator(folder: Path, kind: str, dtype: str) -> Any:
    """The package's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mace.calculators import MACECalculator

        head = {"head": HEADS[kind]} if kind in HEADS else {}
        return MACECalculator(str(folder / f"{kind}.model"), device="cpu", default_dtype=dtype, **head)


def cluster(seed: int = 1) -> Frame:
    """CuAu(H2O)2, a little displaced."""
    frame = read_frame(DATA / "cuau-water.xyz")
    return moved(frame, frame.positions + np.random.default_rng(seed).normal(0.0, 0.08, frame.positions.shape))


def close() -> Frame:
    """Two pairs of atoms so near to one another that their shells repel."""
    return few([29, 79, 8, 1], [[0.0, 0.0, 0.0], [1.9, 0.1, 0.0], [3.0, 1.6, 0.2], [3.4, 2.2, 0.5]])


def crystal() -> Frame:
    """Cu3Au in a sheared cell that is smaller than the cutoff, a little displaced."""
    cell = np.array(bulk("Cu", cubic=True, a=3.75).cell) @ np.array([[1.02, 0.03, 0.0], [0.0, 0.99, 0.02], [0.0, 0.0, 1.04]])
    places = bulk("Cu", cubic=True).get_scaled_positions() @ cell
    return Frame(np.array([79, 29, 29, 29]), places + np.random.default_rng(2).normal(0.0, 0.1, (4, 3)), cell, periodic=True)


def primitive() -> Frame:
    """One atom in a cell half as wide as the cutoff: all its neighbours are itself."""
    return Frame(np.array([29]), np.zeros((1, 3)), np.array(bulk("Cu", a=3.6).cell), periodic=True)


def few(numbers: list[int], positions: npt.ArrayLike) -> Frame:
    return Frame(np.array(numbers, dtype=np.int64), np.array(positions, dtype=np.float64))


def moved(frame: Frame, positions: npt.NDArray[np.float64]) -> Frame:
    return Frame(frame.numbers, positions, frame.cell, frame.periodic)


FRAMES = {"cluster": cluster(), "close": close(), "crystal": crystal(), "primitive": primitive(), "atom": few([8], [[1.0, 2.0, 3.0]])}


# -- names -----------------------------------------------------------------------------------------------------------------------------


def test_without_the_package_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both doors name the extra."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (registry.load, registry.weights_file):
        with pytest.raises(PotentialError, match=r"mace:any.model: needs the package mace-torch, .*pip install 'tumbaga\[mace\]'"):
            ask("mace:any.model")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("elements=Cu,Xx", "'Xx', which is no element"),
        ("elements=", "'', which is no element"),
        ("element=Cu", "has no option 'element'; known are elements, head"),
        ("Cu", "has no option 'Cu'"),
        ("&", "write for example"),
    ],
)
def test_a_misspelt_option_is_a_sentence(options: str, told: str) -> None:
    """Seen before anything is imported or started."""
    with pytest.raises(PotentialError, match=told):
        registry.weights_file(f"mace:any.model?{options}")


def test_a_missing_file_is_a_sentence(package: None, tmp_path: Path) -> None:
    """It says that models are to be fetched by the user."""
    for ask in (registry.load, registry.weights_file):
        with pytest.raises(PotentialError, match=r"there is no file .*none.model'; the package brings no models: download one"):
            ask(f"mace:{tmp_path}/none.model")


def test_names_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file keeps its options; what does not exist stays as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.model").touch()
    assert registry.absolute("mace:mine.model?elements=Cu") == f"mace:{tmp_path}/mine.model?elements=Cu"
    assert registry.absolute("mace:mine.model") == f"mace:{tmp_path}/mine.model"
    assert registry.absolute("mace:other.model") == "mace:other.model"


def test_looking_up_a_name_imports_neither_torch_nor_the_package(folder: Path) -> None:
    """The gateway and the command line look names up; a lookup opens no pickle."""
    code = (
        f"import sys; from tumbaga.driver.backends import registry; registry.weights_file({name(folder, 'zbl')!r}); "
        "sys.exit('torch' in sys.modules or 'mace' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- what it says ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float64") for kind in MODELS), ("zbl", "float32"), ("heads", "float32")])
def test_it_says_what_its_own_calculator_says(folder: Path, load: Any, kind: str, dtype: str) -> None:
    """Energy, forces and, in a cell, the stress are those of MACECalculator, to the rounding of the dtype."""
    own, model, largest = calculator(folder, kind, dtype), load(kind, dtype), 0.0
    allowed = SINGLE if dtype == "float32" else EXACT
    for which, frame in FRAMES.items():
        atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell if frame.periodic else None, pbc=frame.periodic, calculator=own)
        (said,) = model.predict([frame])
        scale = 1.0 + float(np.abs(said.forces).max())
        assert said.energy == pytest.approx(atoms.get_potential_energy(), abs=allowed * scale), which
        np.testing.assert_allclose(said.forces, atoms.get_forces(), atol=allowed * scale, err_msg=which)
        if frame.periodic:
            stress = atoms.get_stress(voigt=False)
            np.testing.assert_allclose(-said.virial / atoms.get_volume(), stress, atol=allowed / 10, err_msg=which)
        largest = max(largest, scale - 1.0)
    assert largest > 0.1  # eV/Å: random weights must not make it a comparison of nothing


@pytest.fixture(scope="module")
def subjects(folder: Path) -> dict[str, Subject]:
    def loader(rest: str, device: str, dtype: str) -> Any:
        return registry.load(f"mace:{rest}", device, dtype)

    kinds = {kind: name(folder, kind).removeprefix("mace:") for kind in ("zbl", "heads")}
    return {kind: Subject.loaded(loader, rest) for kind, rest in kinds.items()}


@pytest.mark.parametrize("check", CHECKS, ids=str)
@pytest.mark.parametrize("kind", ["zbl", "heads"])
def test_it_keeps_every_promise_of_its_port(subjects: dict[str, Subject], kind: str, check: Any) -> None:
    """The conformance suite, in float64: pair repulsion stays outside the readout, and so do biases."""
    check(subjects[kind])


@pytest.mark.slow
def test_it_keeps_every_promise_in_float32(load: Any) -> None:
    """The same checks, to the rounding of float32."""
    subject = Subject.of(load("zbl", "float32"))
    for check in CHECKS:
        if not check.why_not(subject):
            check(subject)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_says_the_same(folder: Path, load: Any) -> None:
    """Forces, features and force rows of both devices agree to float32."""
    here, there = load("zbl", "float32"), registry.load(name(folder, "zbl"), "cuda")
    for frame in FRAMES.values():
        one, other = here.predict([frame])[0], there.predict([frame])[0]
        scale = 1.0 + float(np.abs(one.forces).max())
        assert other.energy == pytest.approx(one.energy, abs=SINGLE * scale)
        np.testing.assert_allclose(other.forces, one.forces, atol=SINGLE * scale)
    assert isinstance(there, Trainable)
    np.testing.assert_allclose(there.force_rows(crystal()).rows, here.force_rows(crystal()).rows, atol=SINGLE)


# -- the linear readout ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "width"), [("zbl", 8 + 4), ("plain", 8 + 8 + 4), ("density", 8 + 4), ("heads", 8 + 4)])
def test_the_last_layer_is_that_of_all_readouts(load: Any, kind: str, width: int) -> None:
    """Scalars of the layers with a linear readout, then the hidden activations of the last; of several heads those of the chosen one."""
    model = load(kind)
    assert model.spec.elements == ELEMENTS
    assert model.spec.n_hidden == width
    assert model.readout().size == model.spec.n_columns == 4 * width
    np.testing.assert_array_equal(*(model.readout().reshape(4, -1)[rows] for rows in ([0, 1], [2, 3])))


def test_pair_repulsion_is_no_matter_of_the_readout(load: Any) -> None:
    """With a readout of zero what is left is repulsion: it pushes two near atoms apart, and force rows have it as their fixed part."""
    model, frame = load("zbl"), few([29, 29], [[0.0, 0.0, 0.0], [1.2, 0.0, 0.0]])
    said, rows = model.predict([frame], np.zeros((1, model.spec.n_columns)))[0], model.force_rows(frame)

    assert said.forces[1, 0] > 10.0
    np.testing.assert_allclose(rows.forces_fixed, said.forces, atol=EXACT * 1e3)
    assert rows.energy_fixed == pytest.approx(said.energy, abs=EXACT * 1e3)


def test_without_elements_it_serves_all_and_learns_none(folder: Path, load: Any) -> None:
    """It says the same, has no readout and no features, and can load no version."""
    serving = registry.load(f"mace:{folder}/zbl.model", "cpu", "float64")
    (said,), (other,) = serving.predict([cluster()]), load("zbl").predict([cluster()])

    assert serving.spec.elements == ELEMENTS
    assert serving.spec.n_hidden == 0
    assert said.features is None
    np.testing.assert_array_equal(said.forces, other.forces)
    with pytest.raises(VersionError, match="has no linear readout"):
        Slot(serving).load(1, Path("any"), ())


def test_unknown_elements_are_refused_with_a_sentence(folder: Path) -> None:
    """The error names the element and the known ones, and survives pickling; one that the model never saw is refused when it is loaded."""
    model = registry.load(f"mace:{folder}/plain.model?elements=Cu,H", "cpu")
    with pytest.raises(UnknownElementError, match="it does not know Au; it knows H, Cu") as caught:
        model.predict([close()])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(PotentialError, match="it does not know Po, Rn; it knows H, O, Cu, Au"):
        registry.load(f"mace:{folder}/plain.model?elements=Rn,H,Po", "cpu")


def test_a_version_serves_in_a_slot_and_by_itself(load: Any, tmp_path: Path) -> None:
    """A version file gives its readout to the potential it belongs to, and is a potential of its own, with the head it was made with."""
    model, frame = load("heads"), cluster()
    readout = 1.01 * model.readout()
    layer = versions.LastLayer(readout, 1e-6 * np.eye(readout.size))
    path = tmp_path / versions.write(tmp_path, 1, model.state(readout), layer, model.metadata).path
    slot = Slot(model)
    slot.load(1, path, ())
    (answer,) = slot.answer([frame], [(1, 1, 0.0)])
    alone: Any = registry.load(f"mace:{path}", "cpu", "float64")

    assert np.isfinite(answer.lpr).all()
    np.testing.assert_array_equal(alone.readout(), readout)
    np.testing.assert_array_equal(alone.predict([frame])[0].forces, answer.prediction.forces)
    assert alone.metadata == model.metadata
    for option in ("elements=Cu", "head=pbe"):
        with pytest.raises(PotentialError, match="says itself which elements it learns"):
            registry.load(f"mace:{path}?{option}", "cpu")


# -- files -----------------------------------------------------------------------------------------------------------------------------


def test_the_user_is_warned_of_a_pickle_once(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each file is warned of when it is opened for the first time."""
    path = tmp_path / "mine.model"
    path.write_bytes((folder / "plain.model").read_bytes())
    with caplog.at_level(logging.WARNING, logger="tumbaga"):
        for _ in range(2):
            registry.load(f"mace:{path}", "cpu")
    (record,) = [one for one in caplog.records if one.name.startswith("tumbaga")]
    assert record.getMessage().startswith(f"{path} is a pickle: opening it runs code that it holds.")


def test_a_model_of_several_heads_asks_for_one(folder: Path) -> None:
    """Unless one is called default, as in mace's own calculator."""
    for option in ("", "?head=omat"):
        with pytest.raises(PotentialError, match=r"has the heads pbe, r2scan; choose one of them, for example \?head=pbe"):
            registry.load(f"mace:{folder}/heads.model{option}", "cpu")


def test_what_is_no_model_is_a_sentence(package: None, folder: Path, tmp_path: Path) -> None:
    """Damaged files, other pickles and versions of other potentials."""
    whole = (folder / "zbl.model").read_bytes()
    (tmp_path / "damaged.model").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.model").write_text("a model")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "other.model")
    (tmp_path / "foreign.safetensors").write_bytes((DATA / "cuau-water.safetensors").read_bytes())
    for which, told in (
        ("damaged.model", "is no pickled MACE model"),
        ("text.model", "is no pickled MACE model"),
        ("other.model", "holds a Linear; supported are MACE and ScaleShiftMACE"),
        ("foreign.safetensors", "is no version of a MACE potential .*declares the architecture 'tumbaga-painn-1'"),
    ):
        with pytest.raises(PotentialError, match=told):
            registry.load(f"mace:{tmp_path / which}", "cpu")


def test_a_model_that_would_be_built_wrongly_is_refused(folder: Path, tmp_path: Path) -> None:
    """What its settings do not tell shows in the energy; what wants charges or spins is refused before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = torch.load(folder / "plain.model", weights_only=False)
        odd.interactions[1].avg_num_neighbors = 3.0
        torch.save(odd, tmp_path / "odd.model")
        odd.embedding_specs = {"total_charge": {}}
        torch.save(odd, tmp_path / "charged.model")
    with pytest.raises(PotentialError, match=r"built from its settings gives .* eV for a test frame, the saved one"):
        registry.load(f"mace:{tmp_path}/odd.model", "cpu")
    with pytest.raises(PotentialError, match="wants to know charge, spin or the like"):
        registry.load(f"mace:{tmp_path}/charged.model", "cpu")


@pytest.mark.slow
def test_loading_leaves_the_process_as_it_was(folder: Path) -> None:
    """Nothing is printed, pickles are not trusted afterwards, and the default dtype and the random numbers are the ones before."""
    code = (
        "import os, torch; from tumbaga.driver.backends import registry; torch.manual_seed(1); before = torch.get_rng_state(); "
        f"registry.load({name(folder, 'plain')!r}, 'cpu'); assert torch.equal(before, torch.get_rng_state()); "
        "assert torch.get_default_dtype() is torch.float32; assert 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' not in os.environ"
    )
    clean = {key: value for key, value in os.environ.items() if key != "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "is a pickle" in line
