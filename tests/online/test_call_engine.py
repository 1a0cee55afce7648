"""Labels by functions of the user and by ASE calculators with options, in the spelling of the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels.factory import UnknownMethodError, absolute_method, make_labeller, split_options
from tumbaga.online.records import Frame

COPPER_GOLD = Frame(np.array([29, 79]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.6]]))
CRYSTAL = Frame(np.array([29] * 4), np.array([[0, 0, 0], [0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0.1]]), np.eye(3) * 3.7, True)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Write a file with a function of a user; return the method that calls it."""

    def write(body: str, arguments: str = "atoms", name: str = "mine.py") -> str:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / name).write_text(f"import numpy as np\n\n\ndef label({arguments}):\n{lines}")
        return f"call:{tmp_path / name}:label"

    return write


def test_a_function_labels(written: Callable[..., str]) -> None:
    """Energy and forces of ASE's EMT, through a function of four lines; the numbers are ASE's own."""
    from ase import Atoms
    from ase.calculators.emt import EMT

    body = "from ase.calculators.emt import EMT\natoms.calc = EMT()\nreturn atoms.get_potential_energy(), atoms.get_forces()"
    label = make_labeller(written(body)).label(COPPER_GOLD)
    atoms = Atoms(COPPER_GOLD.numbers, COPPER_GOLD.positions, calculator=EMT())

    assert label.energy == atoms.get_potential_energy()
    np.testing.assert_array_equal(label.forces, atoms.get_forces())
    assert label.method == "call:mine.py:label"
    assert label.virial is None
    assert list(label.details) == ["source"]


def test_a_function_may_tell_more(written: Callable[..., str]) -> None:
    """A dict holds a virial and details; numpy's numbers become JSON, and the hash of the file is kept beside them."""
    body = "return dict(energy=np.float32(1.5), forces=[[0, 0, 1], [0, 0, -1]], virial=np.eye(3), details=dict(cycles=np.int64(7), gaps=np.ones(2)))"
    label = make_labeller(written(body)).label(COPPER_GOLD)

    assert label.energy == 1.5
    assert label.virial is not None
    np.testing.assert_array_equal(label.virial, np.eye(3))
    assert label.details | {"source": ""} == {"source": "", "cycles": 7, "gaps": [1.0, 1.0]}
    assert label.details["source"] != make_labeller(written("return 0.0, np.zeros((2, 3))")).label(COPPER_GOLD).details["source"]


def test_a_file_is_imported_like_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds modules beside it, and may define dataclasses."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("ENERGY = 2.5\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom beside_it import ENERGY\n"
        "@dataclass\nclass Made:\n    energy: float\n"
        "def label(atoms):\n    return Made(ENERGY).energy, 0 * atoms.positions\n"
    )

    assert make_labeller(f"call:{tmp_path / 'mine.py'}:label").label(COPPER_GOLD).energy == 2.5


def test_a_function_gets_the_frame_as_it_is(written: Callable[..., str]) -> None:
    """Species, positions, cell and periodicity."""
    body = "return dict(energy=atoms.get_volume(), forces=atoms.positions, details=dict(z=atoms.numbers, pbc=atoms.pbc))"
    label = make_labeller(written(body)).label(CRYSTAL)

    assert label.energy == pytest.approx(3.7**3)
    np.testing.assert_array_equal(label.forces, CRYSTAL.positions)
    assert (label.details["z"], label.details["pbc"]) == ([29] * 4, [True] * 3)


def test_a_function_gets_its_options(written: Callable[..., str]) -> None:
    """Behind the method as text or JSON, or by keyword; the level of theory is for people alone, and both are part of the method's name."""
    method = written("return scale * 2, np.zeros((2, 3))", "atoms, scale, what='x'")
    labels = [
        make_labeller(f"{method}?scale=1.5&what=PBE+D3&level=PBE%26D3").label(COPPER_GOLD),
        make_labeller(method, scale=1.5, what="PBE+D3", level="PBE&D3").label(COPPER_GOLD),
    ]

    assert [label.energy for label in labels] == [3.0, 3.0]
    assert {label.method for label in labels} == {"call:mine.py:label(level=PBE&D3, scale=1.5, what=PBE+D3)"}


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return None", "the function label returned None; expected are energy and forces, or a dict"),
        ("return 1.0", "the function label returned 1.0; expected"),
        ("return 1.0, np.zeros((3, 3))", "the function label returned forces of shape (3, 3) for 2 atoms"),
        ("return 1.0, np.zeros(6)", "the function label returned forces of shape (6,)"),
        ("return 1.0, 'none'", "the function label returned 'none' as forces, which are no numbers"),
        ("return [1.0, 2.0], np.zeros((2, 3))", "the function label returned energy of shape (2,)"),
        ("return np.nan, np.zeros((2, 3))", "the function label returned label energy is not finite"),
        ("return 1.0, np.full((2, 3), np.inf)", "the function label returned label forces holds a number that is not finite"),
        ("return dict(energy=1.0)", "the function label returned {'energy': 1.0}; expected"),
        ("return dict(energy=1.0, forces=np.zeros((2, 3)), stress=0)", "the function label returned the key 'stress'; there are energy"),
        ("return dict(energy=1.0, forces=np.zeros((2, 3)), virial=[1, 2])", "the function label returned virial of shape (2,)"),
        (
            "return dict(energy=1.0, forces=np.zeros((2, 3)), details={'x': object()})",
            "details that cannot be kept as JSON: object is no JSON",
        ),
        ("return dict(energy=1.0, forces=np.zeros((2, 3)), details=3)", "the function label returned 3 as details; a dict was expected"),
        ("raise RuntimeError('SCF not converged')", "the function label failed: RuntimeError: SCF not converged"),
        ("1 / 0", "the function label failed: ZeroDivisionError: division by zero"),
    ],
)
def test_bad_functions_are_failed_labels(body: str, sentence: str, written: Callable[..., str]) -> None:
    """Whatever a function raises or returns in place of a label is one sentence."""
    with pytest.raises(LabelFailedError) as caught:
        make_labeller(written(body)).label(COPPER_GOLD)

    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_imported_is_a_failed_label(tmp_path: Path) -> None:
    """A syntax error, an import that fails, a function that is not there: the sentence says which."""
    for text, sentence in (
        ("def label(:", "SyntaxError"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("x = 1", "mine.py has no function label"),
    ):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(LabelFailedError, match=sentence):
            make_labeller(f"call:{tmp_path / 'mine.py'}:label").label(COPPER_GOLD)


def test_naming_a_function_executes_nothing(tmp_path: Path) -> None:
    """The file is read by the first label, so not by those who only check the settings; the same holds for modules."""
    (tmp_path / "mine.py").write_text("raise SystemExit('executed')\n")
    program = (
        "import sys\n"
        "from tumbaga.online.labels.factory import make_labeller\n"
        "make_labeller(sys.argv[1]); make_labeller('call:mine:label')\n"
        "assert not {'mine', 'ase', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, f"call:{tmp_path / 'mine.py'}:label"], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("call:label", "must be call:/PATH/FILE.py:FUNCTION or call:MODULE:FUNCTION"),
        ("call:mine.py:label", "must name its file with the whole path"),
        ("call:/no/such/file.py:label", "needs the file /no/such/file.py, which is not there"),
        ("call:no_such_module:label", "needs the module no_such_module, which is not found"),
        ("call:/x.py:not a name", "must be call:"),
        ("pyscf?grid", "has 'grid' where KEY=VALUE was expected, with & between several"),
        ("pyscf?functional=pbe", "has no option 'functional'"),
        ("test:lj?delay=soon", "cannot read delay = 'soon' as float"),
    ],
)
def test_mistakes_are_explained(method: str, sentence: str) -> None:
    """Before anything starts, as a sentence that says what was expected."""
    with pytest.raises(UnknownMethodError) as caught:
        make_labeller(method)

    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("pyscf?basis=def2-tzvp&grid=3", {"basis": "def2-tzvp", "grid": 3}),
        ("test:lj?epsilon=0.5", {"epsilon": 0.5}),
        ("ase:tblite.ase:TBLite?method=GFN1-xTB&max_iterations=100", {"method": "GFN1-xTB", "max_iterations": 100}),
        ("ase:ase.calculators.emt:EMT?fixed_cutoff=true", {"fixed_cutoff": True}),
    ],
)
def test_one_spelling_of_options_for_all_methods(method: str, options: dict[str, Any]) -> None:
    """Behind the method or by keyword: the same method in name."""
    called, _ = split_options(method)

    assert make_labeller(method).method == make_labeller(called, **options).method


def test_a_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command line has it: relative to where it was typed; modules and other methods stay as they are."""
    monkeypatch.chdir(tmp_path)

    assert absolute_method("call:a/b.py:f?x=a/b.py") == f"call:{tmp_path}/a/b.py:f?x=a/b.py"
    assert absolute_method("call:package.module:f") == "call:package.module:f"
    assert absolute_method("test:lj?journal=b.py:f") == "test:lj?journal=b.py:f"


def test_xtb_labels_by_its_import_path() -> None:
    """GFN1-xTB of tblite, from the command line's spelling: the energy of tblite itself, forces that are its slope."""
    pytest.importorskip("tblite")
    engine = make_labeller("ase:tblite.ase:TBLite?method=GFN1-xTB&verbosity=0&accuracy=0.01")
    water = np.array([[0.0, 0.02, 0.0], [0.79, 0.62, 0.05], [-0.74, 0.56, 0.0]])

    def label(shift: float) -> Any:
        moved = water.copy()
        moved[1, 0] += shift
        return engine.label(Frame(np.array([8, 1, 1]), moved))

    assert label(0.0).energy == pytest.approx(-5.7686 * 27.211386, abs=0.5)  # GFN1-xTB water, Hartree
    slope = (label(1e-3).energy - label(-1e-3).energy) / 2e-3
    assert -slope == pytest.approx(label(0.0).forces[1, 0], abs=1e-4)


def test_periodic_frames_have_a_virial() -> None:
    """W = -stress * volume, as ASE has the stress; clusters have none."""
    from ase import Atoms
    from ase.calculators.emt import EMT

    engine = make_labeller("ase:ase.calculators.emt:EMT")
    atoms = Atoms(CRYSTAL.numbers, CRYSTAL.positions, cell=CRYSTAL.cell, pbc=True, calculator=EMT())
    virial = engine.label(CRYSTAL).virial

    assert virial is not None
    np.testing.assert_allclose(virial, -atoms.get_volume() * atoms.get_stress(voigt=False), rtol=1e-12)
    assert engine.label(COPPER_GOLD).virial is None


def test_a_calculator_that_failed_is_made_anew() -> None:
    """After an error its state is not trusted: the next frame has the numbers that it would have had without."""
    engine = make_labeller("ase:ase.calculators.emt:EMT")
    expected = engine.label(COPPER_GOLD).energy
    with pytest.raises(LabelFailedError, match="NotImplementedError"):
        engine.label(Frame(np.array([26]), np.zeros((1, 3))))

    assert engine.label(COPPER_GOLD).energy == expected
