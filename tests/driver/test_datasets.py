"""Data sets: every format gives the same frames, and what is not fit for use is named by file and frame."""

from __future__ import annotations

import io
import json
import lzma
import os
import pickle
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.io import write

from tumbaga.driver import datasets
from tumbaga.driver.datasets import Reading
from tumbaga.driver.errors import DataError
from tumbaga.online.records import LabelledFrame

TEXT = 1e-7  # extended XYZ has eight decimals


def labelled(seed: int = 0) -> Atoms:
    """Four copper and gold atoms, rattled and sheared, with EMT's energy, forces and stress; one atom held fixed."""
    atoms = bulk("Cu", cubic=True)
    atoms.numbers[seed % 4] = 79
    atoms.set_cell(atoms.cell @ (np.eye(3) + 0.03 * np.array([[0, 1, 0], [0, 0, 0], [1, 0, 0]])), scale_atoms=True)
    atoms.rattle(0.1, seed=seed)
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.set_constraint(FixAtoms([0]))
    return atoms


@pytest.fixture
def truth() -> list[Atoms]:
    return [labelled(0), labelled(1), labelled(2)]


def agrees(found: list[LabelledFrame], truth: list[Atoms], tolerance: float) -> None:
    assert len(found) == len(truth)
    for one, atoms in zip(found, truth, strict=True):
        results = atoms.calc.results
        np.testing.assert_array_equal(one.frame.numbers, atoms.numbers)
        np.testing.assert_allclose(one.frame.positions, atoms.positions, atol=tolerance)
        np.testing.assert_allclose(one.frame.cell, atoms.cell.array, atol=tolerance)
        assert one.frame.periodic
        assert one.label.energy == pytest.approx(results["energy"], abs=tolerance)
        np.testing.assert_allclose(one.label.forces, results["forces"], atol=tolerance)
        assert np.abs(one.label.forces[0]).max() > 0.1  # the atom that was held fixed has its force
        xx, yy, zz, yz, xz, xy = results["stress"]
        stress = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
        assert one.label.virial is not None
        np.testing.assert_allclose(one.label.virial, -stress * atoms.get_volume(), atol=100 * tolerance)


def write_ase_rows(path: Path, truth: list[Atoms], arrays: Callable[[np.ndarray], Any]) -> None:
    """What fairchem writes: rows as compressed JSON under the keys "1", "2", … beside bookkeeping."""
    with lmdb.open(str(path), subdir=False, map_size=2**22, lock=False) as held, held.begin(write=True) as view:
        for number, atoms in enumerate(truth, 1):
            row = {"numbers": arrays(atoms.numbers), "positions": arrays(atoms.positions), "cell": arrays(atoms.cell.array)}
            row |= {"pbc": arrays(atoms.pbc), "energy": atoms.calc.results["energy"], "forces": arrays(atoms.calc.results["forces"])}
            row |= {"stress": arrays(atoms.calc.results["stress"]), "key_value_pairs": {"sid": number}, "data": {}}
            view.put(str(number).encode(), zlib.compress(json.dumps(row).encode()))
        view.put(b"nextid", zlib.compress(str(len(truth) + 1).encode()))
        view.put(b"deleted_ids", zlib.compress(b"[]"))


def as_ndarray(values: np.ndarray) -> dict[str, Any]:
    """ASE's own JSON form of an array."""
    return {"__ndarray__": [list(values.shape), str(values.dtype), values.ravel().tolist()]}


@pytest.mark.parametrize(
    ("name", "form", "tolerance"),
    [
        ("set.extxyz", "extxyz", TEXT),
        ("set.xyz", "extxyz", TEXT),
        ("set.extxyz.gz", "extxyz", TEXT),
        ("set.extxyz.xz", "extxyz", TEXT),
        ("set.extxyz.bz2", "extxyz", TEXT),
        ("set.db", "db", 1e-12),
        ("set.json", "json", 1e-12),
    ],
)
def test_formats_of_ase_give_energies_forces_and_virials(
    tmp_path: Path, truth: list[Atoms], name: str, form: str, tolerance: float
) -> None:
    """Frames, energies, forces and minus stress times volume come back from every format that ASE writes."""
    write(tmp_path / name, truth, format=form)

    found = datasets.read(tmp_path / name)

    agrees(found, truth, tolerance)
    assert [one.source for one in found] == [f"{name}#0", f"{name}#1", f"{name}#2"]


@pytest.mark.parametrize("arrays", [np.ndarray.tolist, as_ndarray])
def test_rows_of_fairchem_in_lmdb(tmp_path: Path, truth: list[Atoms], arrays: Callable[[np.ndarray], Any]) -> None:
    """An .aselmdb gives its rows in the order of their numbers, ten after nine, and leaves nothing beside the file."""
    many = [labelled(k) for k in range(11)]
    write_ase_rows(tmp_path / "set.aselmdb", many, arrays)

    found = datasets.read(tmp_path / "set.aselmdb")

    agrees(found, many, 1e-12)
    assert os.listdir(tmp_path) == ["set.aselmdb"]


def test_xsf_of_aenet(tmp_path: Path, truth: list[Atoms]) -> None:
    """A folder of XSF files, one frame each, is a data set; one without an energy, or that is no XSF, is named."""
    for number, atoms in enumerate(truth):
        rows = np.concatenate([atoms.positions, atoms.calc.results["forces"]], axis=1)
        lines = [f"# total energy = {atoms.calc.results['energy']:.12f} eV", "", "CRYSTAL", "PRIMVEC"]
        lines += [" ".join(f"{value:.12f}" for value in row) for row in atoms.cell.array] + ["PRIMCOORD", "4 1"]
        lines += [f"{symbol} " + " ".join(f"{value:.12f}" for value in row) for symbol, row in zip(atoms.symbols, rows, strict=True)]
        (tmp_path / f"structure{number}.xsf").write_text("\n".join(lines) + "\n")
        del atoms.calc.results["stress"]  # the format has none

    found = datasets.read(tmp_path)

    for one, atoms in zip(found, truth, strict=True):
        assert one.frame.periodic
        assert one.label.virial is None
        np.testing.assert_allclose(one.frame.cell, atoms.cell.array, atol=1e-10)
        np.testing.assert_array_equal(one.frame.numbers, atoms.numbers)
        assert one.label.energy == pytest.approx(atoms.calc.results["energy"], abs=1e-10)
        np.testing.assert_allclose(one.label.forces, atoms.calc.results["forces"], atol=1e-10)
    (tmp_path / "structure1.xsf").write_text("ATOMS\nO 0 0 0 0 0 0\n")
    with pytest.raises(DataError, match=r"structure1.xsf, frame 0 \(the first is 0\): it has no energy"):
        datasets.read(tmp_path)
    (tmp_path / "structure1.xsf").write_text("no XSF")
    with pytest.raises(DataError, match=r"structure1.xsf, frame 0 \(the first is 0\): is no structure in the XSF form"):
        datasets.read(tmp_path)
    left: list[DataError] = []
    assert [one.source for one in datasets.read(tmp_path, bad=left.append)] == ["structure0.xsf#0", "structure2.xsf#0"]
    assert len(left) == 1


@pytest.mark.parametrize("text", ["s2ef.txt", "s2ef.txt.xz"])
@pytest.mark.parametrize("structures", ["s2ef.extxyz", "s2ef.extxyz.xz"])
def test_reference_energies_of_oc20_are_taken_off(tmp_path: Path, truth: list[Atoms], structures: str, text: str) -> None:
    """Beside a text file of OC20 energies are those of adsorption: total minus the reference in the third column."""
    write(tmp_path / structures, truth, format="extxyz")
    lines = "".join(f"random{k},frame{k},{-1.5 * k}\n" for k in range(3)).encode()
    (tmp_path / text).write_bytes(lzma.compress(lines) if text.endswith("xz") else lines)

    found = datasets.read(tmp_path / structures)

    for k, (one, atoms) in enumerate(zip(found, truth, strict=True)):
        assert one.label.energy == pytest.approx(atoms.calc.results["energy"] + 1.5 * k, abs=TEXT)


@pytest.mark.parametrize(("lines", "said"), [(2, "frame 2 (the first is 0): has no reference energy in"), (4, "has 3 frames, but")])
def test_a_text_file_of_oc20_must_fit(tmp_path: Path, truth: list[Atoms], lines: int, said: str) -> None:
    """A reference energy too few or too many is an error: all energies might be off by one line."""
    write(tmp_path / "s2ef.extxyz", truth)
    (tmp_path / "s2ef.txt").write_text("".join(f"random{k},frame{k},-1.5\n" for k in range(lines)))

    with pytest.raises(DataError) as caught:
        datasets.read(tmp_path / "s2ef.extxyz")

    assert said in str(caught.value)


def test_a_text_of_the_user_is_no_text_of_oc20(tmp_path: Path, truth: list[Atoms]) -> None:
    """Notes that lie beside the structures change no energy."""
    write(tmp_path / "set.extxyz", truth)
    (tmp_path / "set.txt").write_text("made by me, on Monday, with EMT\n")

    agrees(datasets.read(tmp_path / "set.extxyz"), truth, TEXT)


# -- OC20's pickles --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def geometric(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands for torch_geometric while a test writes pickles: classes of the same names and the same state, made here."""
    names = ("torch_geometric", "torch_geometric.data", "torch_geometric.data.data", "torch_geometric.data.storage")
    modules = {name: ModuleType(name) for name in names}
    for module, name in (("torch_geometric.data.data", "Data"), ("torch_geometric.data.storage", "GlobalStorage")):
        made = type(name, (), {"__module__": module})
        setattr(modules[module], name, made)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["torch_geometric.data"]


def fields(atoms: Atoms, **others: Any) -> dict[str, Any]:
    results = atoms.calc.results
    found = {"pos": torch.tensor(atoms.positions), "cell": torch.tensor(atoms.cell.array)[None], "natoms": len(atoms)}
    found |= {"atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.float32), "y": results["energy"], "sid": 3, "fid": 7}
    return found | {"force": torch.tensor(results["forces"]), "fixed": np.zeros(4), "tags": torch.zeros(4)} | others


def data_of_today(values: dict[str, Any]) -> Any:
    data, store = (
        getattr(sys.modules[f"torch_geometric.data.{where}"], name)() for where, name in (("data", "Data"), ("storage", "GlobalStorage"))
    )
    store.__dict__.update(_mapping=values, _parent=data)
    data.__dict__.update(_store=store)
    return data


def data_of_old(values: dict[str, Any]) -> Any:
    data = sys.modules["torch_geometric.data.data"].Data()
    data.__dict__.update(values, edge_attr=None)
    return data


def write_pickles(path: Path, frames: list[Any]) -> None:
    with lmdb.open(str(path), subdir=False, map_size=2**22, lock=False) as held, held.begin(write=True) as view:
        for number, frame in enumerate(frames):
            view.put(str(number).encode(), pickle.dumps(frame, protocol=-1))
        view.put(b"length", pickle.dumps(len(frames)))


@pytest.mark.parametrize("made", [data_of_today, data_of_old, dict])
def test_pickles_of_oc20_give_their_frames(
    tmp_path: Path, truth: list[Atoms], geometric: ModuleType, caplog: pytest.LogCaptureFixture, made: Callable[[dict[str, Any]], Any]
) -> None:
    """S2EF frames of any age of torch_geometric are read, with a warning, when the user says that the file is trusted."""
    write_pickles(tmp_path / "set.lmdb", [made(fields(atoms)) for atoms in truth])

    found = datasets.read(tmp_path / "set.lmdb", Reading(pickles=True))

    assert "holds pickles" in caplog.text
    for one, atoms in zip(found, truth, strict=True):
        assert one.frame.periodic
        np.testing.assert_array_equal(one.frame.numbers, atoms.numbers)
        np.testing.assert_allclose(one.frame.positions, atoms.positions, atol=1e-12)
        assert one.label.energy == pytest.approx(atoms.calc.results["energy"], abs=1e-12)
        np.testing.assert_allclose(one.label.forces, atoms.calc.results["forces"], atol=1e-12)


def test_pickles_stay_closed_unless_asked_for(tmp_path: Path, truth: list[Atoms], geometric: ModuleType) -> None:
    """Without the user's word a file of pickles is not opened, and the sentence says how to give it."""
    write_pickles(tmp_path / "set.lmdb", [data_of_today(fields(truth[0]))])

    with pytest.raises(DataError, match="--trust-pickles"):
        datasets.read(tmp_path / "set.lmdb")


class Attack:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing(tmp_path: Path, truth: list[Atoms], geometric: ModuleType) -> None:
    """Even of a trusted file a pickle can only make tensors and containers: one that calls something is refused, and nothing has run."""
    hidden = io.BytesIO()
    torch.save({"a": Attack(tmp_path / "deep")}, hidden, _use_new_zipfile_serialization=False)
    write_pickles(tmp_path / "set.lmdb", [fields(truth[0], extra=Attack(tmp_path / "made"))])
    write_pickles(tmp_path / "deep.lmdb", [fields(truth[0], extra=_Loads(hidden.getvalue()))])

    with pytest.raises(DataError, match=r"frame 0 .*neither a tensor nor a container"):
        datasets.read(tmp_path / "set.lmdb", Reading(pickles=True))
    with pytest.raises(DataError, match=r"frame 0 .*UnpicklingError"):
        datasets.read(tmp_path / "deep.lmdb", Reading(pickles=True))
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "deep").exists()


class _Loads:
    """Asks, as a tensor does, for torch to load an archive; this one holds an attack."""

    def __init__(self, archive: bytes) -> None:
        self.archive = archive

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.archive,)


# -- names -----------------------------------------------------------------------------------------------------------------------------


def water(info: dict[str, Any] | None = None, arrays: dict[str, Any] | None = None) -> Atoms:
    atoms = molecule("H2O")
    atoms.info.update(info or {})
    for name, values in (arrays or {}).items():
        atoms.arrays[name] = np.asarray(values)
    return atoms


@pytest.mark.parametrize("maker", ["REF_", "ref_", "dft_", "DFT_"])
def test_common_names_are_found(tmp_path: Path, maker: str) -> None:
    """REF_energy and its like need no option."""
    write(tmp_path / "set.extxyz", water({f"{maker}energy": -3.5}, {f"{maker}forces": np.ones((3, 3))}))

    (one,) = datasets.read(tmp_path / "set.extxyz")

    assert one.label.energy == -3.5
    np.testing.assert_array_equal(one.label.forces, np.ones((3, 3)))
    assert one.label.virial is None


def test_other_names_are_told(tmp_path: Path) -> None:
    """Any name can be given, of a virial as well; a wrong one is answered with those that are there."""
    atoms = water({"e_cc": -3.5, "my_virial": np.arange(9.0)}, {"f_cc": np.ones((3, 3))})
    atoms.set_cell(10 * np.eye(3))
    atoms.pbc = True
    write(tmp_path / "set.extxyz", atoms)

    (one,) = datasets.read(tmp_path / "set.extxyz", Reading("e_cc", "f_cc", "my_virial"))

    assert one.label.energy == -3.5
    assert one.label.virial is not None
    assert sorted(one.label.virial.ravel().tolist()) == list(range(9))
    with pytest.raises(DataError, match=r"it has no energy of the name 'e_mp2'; it has e_cc, f_cc, my_virial"):
        datasets.read(tmp_path / "set.extxyz", Reading("e_mp2", "f_cc"))


def test_two_different_energies_need_a_word(tmp_path: Path) -> None:
    """Where two known names hold different numbers none is taken in silence."""
    atoms = water({"REF_energy": -3.5}, {"REF_forces": np.ones((3, 3))})
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    write(tmp_path / "set.extxyz", atoms)

    with pytest.raises(DataError, match=r"it has energy as energy and, with other numbers, as REF_energy; choose with --energy-key"):
        datasets.read(tmp_path / "set.extxyz")
    assert datasets.read(tmp_path / "set.extxyz", Reading("REF_energy"))[0].label.energy == -3.5


# -- what is not fit for use -----------------------------------------------------------------------------------------------------------


def bad(**changes: Any) -> Atoms:
    atoms = labelled(1)
    results = {**atoms.calc.results, **changes}
    atoms.calc = SinglePointCalculator(atoms, **{name: value for name, value in results.items() if value is not None})
    return atoms


def slab() -> Atoms:
    atoms = labelled(1)
    atoms.pbc = (True, True, False)
    return atoms


FORCES_WITH_NAN = np.where(np.eye(4, 3) > 0, np.nan, 1.0)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (bad(energy=None), "it has no energy; names that are tried are energy, REF_energy"),
        (bad(forces=None), "it has no forces; names that are tried are forces, REF_forces"),
        (bad(energy=np.nan), "it has "),  # SQLite knows no NaN, so that a database has no energy there
        (bad(energy=np.inf), "it has energy with a number that is not finite"),
        (bad(forces=FORCES_WITH_NAN), "it has forces with a number that is not finite"),
        (bad(stress=np.full(6, np.nan)), "it has stress with a number that is not finite"),
        (slab(), "is periodic in some directions only"),
    ],
)
@pytest.mark.parametrize("form", ["extxyz", "db"])
def test_an_unfit_frame_is_named(tmp_path: Path, broken: Atoms, said: str, form: str) -> None:
    """One sentence with file and frame; or the frame is left out and the rest is read, if that is asked for."""
    if form == "db":
        with connect(tmp_path / "set.db") as held:
            for atoms in (labelled(0), broken, labelled(2)):
                held.write(atoms)
    else:
        write(tmp_path / "set.extxyz", [labelled(0), broken, labelled(2)])
    path, left = tmp_path / f"set.{form}", []

    with pytest.raises(DataError) as caught:
        datasets.read(path)
    found = datasets.read(path, bad=left.append)

    assert str(caught.value).startswith(f"data {path}, frame 1 (the first is 0): {said}")
    assert "\n" not in str(caught.value)
    agrees(found, [labelled(0), labelled(2)], TEXT)
    assert [str(one) for one in left] == [str(caught.value)]


def test_where_all_frames_are_unfit_nothing_is_left(tmp_path: Path) -> None:
    """To leave out bad frames does not make a data set of none."""
    write(tmp_path / "set.extxyz", [molecule("H2O")] * 2)
    left: list[DataError] = []

    with pytest.raises(DataError, match=r"set.extxyz: holds no frame that is fit for use"):
        datasets.read(tmp_path / "set.extxyz", bad=left.append)
    assert [one.frame for one in left] == [0, 1]


def test_a_wrong_number_of_forces_is_named(tmp_path: Path) -> None:
    """Forces of another number of atoms are refused, here of a row that no program of ASE would write."""
    atoms = labelled(0)
    atoms.calc.results["forces"] = np.ones((3, 3))
    write_ase_rows(tmp_path / "set.aselmdb", [labelled(1), atoms], np.ndarray.tolist)

    with pytest.raises(DataError, match=r"frame 1 \(the first is 0\): it has forces of shape \(3, 3\), expected \(4, 3\)"):
        datasets.read(tmp_path / "set.aselmdb")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("set.extxyz", b"", "holds no frame"),
        ("set.extxyz", b"three\n\nO 0 0 0\n", "frame 0 (the first is 0): cannot be read any further"),
        ("set.extxyz.gz", b"not packed", "cannot be read any further"),
        ("set.db", b"no database at all, " * 100, "cannot be read any further"),
        ("set.json", b"{", "cannot be read any further"),
        ("set.aselmdb", b"no LMDB " * 2000, "cannot be read as LMDB"),
        ("set.cif", b"", "its format is not known; names end in .extxyz"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    """A file that is empty, damaged or of no known format is one sentence."""
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError) as caught:
        datasets.read(tmp_path / name)

    assert str(caught.value).startswith(f"data {tmp_path / name}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_ends_early_gives_what_it_holds_first(tmp_path: Path, truth: list[Atoms]) -> None:
    """Frames come one after the other: the first is there before the damage is found, and the sentence names the second."""
    write(tmp_path / "set.extxyz", truth)
    text = (tmp_path / "set.extxyz").read_text().splitlines()
    (tmp_path / "set.extxyz").write_text("\n".join([*text[:8], "4", text[7]]) + "\n")
    found = datasets.stream(tmp_path / "set.extxyz")

    with pytest.raises(DataError, match="cannot be read any further"):
        list(found)


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    """A row of LMDB that is no ASE row is a sentence with the frame."""
    with lmdb.open(str(tmp_path / "set.aselmdb"), subdir=False, lock=False) as held, held.begin(write=True) as view:
        view.put(b"1", zlib.compress(b"[1, 2]"))

    with pytest.raises(DataError, match=r"frame 0 \(the first is 0\): the entry 1 is no ASE row"):
        datasets.read(tmp_path / "set.aselmdb")


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    """A folder gives all its files, 2 before 10, and nothing else that lies there; one without any is refused."""
    for number in (10, 2, 1):
        write(tmp_path / f"part{number}.extxyz", labelled(number))
    (tmp_path / "notes.md").write_text("not data")
    (tmp_path / "empty").mkdir()

    agrees(datasets.read(tmp_path), [labelled(1), labelled(2), labelled(10)], TEXT)
    with pytest.raises(DataError, match="holds no file that ends in"):
        datasets.read(tmp_path / "empty")
    with pytest.raises(DataError, match="there is no such file"):
        datasets.read(tmp_path / "nowhere.extxyz")


def test_without_lmdb_the_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optional package is named where it is needed."""
    write_ase_rows(tmp_path / "set.aselmdb", [labelled(0)], np.ndarray.tolist)
    monkeypatch.setitem(sys.modules, "lmdb", None)

    with pytest.raises(DataError, match=r"pip install 'tumbaga\[data\]'"):
        datasets.read(tmp_path / "set.aselmdb")
