"""What leaves a store is read back by others, to the last bit: ASE, our own reader, dpdata, chemiscope's reader, MACE's data loader."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest

from tumbaga.driver import datasets, exporting
from tumbaga.driver.errors import ConfigError, DriverError, RunDirError
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Store

METHOD = "pyscf:pbe/def2-svp"
MACE = Path(__file__).parents[2] / ".venv-mace" / "bin" / "python"
KINDS = (([79, 29, 8, 1, 1], False), ([29, 8, 1, 1, 79], False), ([29, 29, 79, 79], True))  # the first two are one formula in two orders
N = 12


def frame(seed: int) -> Frame:
    numbers, periodic = KINDS[seed % 3]
    rng = np.random.default_rng(seed)
    cell = 8.0 * np.eye(3) + 0.1 * rng.standard_normal((3, 3)) if periodic else np.zeros((3, 3))
    return Frame(np.array(numbers), 8.0 * rng.random((len(numbers), 3)), cell, periodic)


def label(seed: int, method: str = METHOD) -> Label:
    """All-electron energies, about -5e4 eV an atom, and for crystals a virial."""
    one, rng = frame(seed), np.random.default_rng([seed, 1])
    virial = rng.standard_normal((3, 3)) if one.periodic else None
    forces = rng.standard_normal((len(one), 3))
    return Label(
        -53210.123456789 * len(one) + rng.standard_normal(),
        forces,
        method,
        1.5,
        {"cycles": 9},
        None if virial is None else virial + virial.T,
    )


def add(store: Store, seed: int) -> int:
    """Flag a frame and give it to a worker; returns the task."""
    one = frame(seed)
    served = label(seed).forces + 0.1
    number = store.add_flag(
        one,
        session="unix:/tmp/ipi_x",
        step=10 * seed,
        reason=Reason.UNCERTAIN,
        score=0.25 + seed,
        version=2,
        energy=-1.0 / 3,
        forces=served,
    )
    store.enqueue(number, Reason.UNCERTAIN, Role.HOLDOUT if seed % 4 == 1 else Role.TRAIN, 0.3)
    return store.start_task(number, "label-0", 1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with 12 labels, a failure and a label that was set aside."""
    folder = tmp_path / "first"
    folder.mkdir()
    with Store(folder / FILE) as store:
        for seed in range(N):
            store.add_label(add(store, seed), label(seed))
        store.add_failure(add(store, N), 'the SCF did not "converge"\nin 100 cycles')
        store.quarantine(add(store, N + 1), label(N + 1), "neighbours", "its forces are 9 eV/Å off", {"distance": 9.0})
    return folder


Export = Callable[..., Path]


@pytest.fixture
def export(run: Path, tmp_path: Path) -> Export:
    def write(to: str, name: str, which: str = "labels", role: Role | None = None, **more: object) -> Path:
        path = tmp_path / name
        exporting.write(exporting.collect(run, which, role), to, path, **more)  # type: ignore[arg-type]
        return path

    return write


def test_ase_reads_extended_xyz_to_the_last_bit(export: Export) -> None:
    """Every number of every frame comes back equal, under the names that MACE and others look for, with all facts beside it."""
    for seed, atoms in enumerate(ase.io.read(export("extxyz", "a.extxyz"), ":")):
        one, told = frame(seed), label(seed)
        assert atoms.info["REF_energy"] == told.energy
        np.testing.assert_array_equal(atoms.arrays["REF_forces"], told.forces)
        np.testing.assert_array_equal(atoms.arrays["served_forces"], told.forces + 0.1)
        np.testing.assert_array_equal(atoms.positions, one.positions)
        np.testing.assert_array_equal(atoms.numbers, one.numbers)
        assert atoms.pbc.tolist() == [one.periodic] * 3
        np.testing.assert_array_equal(atoms.cell.array, one.cell)
        if told.virial is not None:
            np.testing.assert_array_equal(atoms.info["REF_virials"].reshape(3, 3), told.virial)
            np.testing.assert_allclose(atoms.info["REF_stress"].reshape(3, 3), -told.virial / atoms.get_volume(), rtol=1e-12)
        assert atoms.calc is None
        facts = {"method": METHOD, "role": "holdout" if seed % 4 == 1 else "train", "frame": f"sha256:{one.key}", "step": 10 * seed}
        facts |= {"session": "unix:/tmp/ipi_x", "version": 2, "force_std": 0.25 + seed, "served_energy": -1.0 / 3, "label_seconds": 1.5}
        facts |= {"reason": "uncertain", "config_type": "uncertain"}
        assert {name: atoms.info[name] for name in facts} == facts
    assert seed == N - 1


def test_without_a_prefix_ase_has_a_calculator(export: Export) -> None:
    """Plain names are results of a calculator for ASE's reader; stress is minus the virial over the volume."""
    for seed, atoms in enumerate(ase.io.read(export("extxyz", "a.xyz", prefix=""), ":")):
        assert atoms.get_potential_energy() == label(seed).energy
        np.testing.assert_array_equal(atoms.get_forces(), label(seed).forces)
        if (virial := label(seed).virial) is not None:
            np.testing.assert_allclose(atoms.get_stress(voigt=False), -virial / atoms.get_volume(), rtol=1e-12)


@pytest.mark.parametrize(
    ("to", "name", "prefix"),
    [("extxyz", "a.extxyz", "REF_"), ("extxyz", "a.extxyz", ""), ("extxyz", "a.xyz", "dft_"), ("ase-db", "a.db", "")],
)
def test_our_own_reader_reads_it(export: Export, to: str, name: str, prefix: str) -> None:
    """Frames come back with their keys, and so with every bit; labels with method, role and virial."""
    found = datasets.read(export(to, name, prefix=prefix))

    assert [one.frame.key for one in found] == [frame(seed).key for seed in range(N)]
    for seed, one in enumerate(found):
        assert one.label.energy == label(seed).energy
        np.testing.assert_array_equal(one.label.forces, label(seed).forces)
        assert one.label.details == {"method": METHOD, "role": "holdout" if seed % 4 == 1 else "train", "label_seconds": 1.5}
        if (virial := label(seed).virial) is not None:
            assert one.label.virial is not None
            np.testing.assert_allclose(one.label.virial, virial, rtol=1e-12)


def test_ase_reads_the_database_to_the_last_bit(export: Export) -> None:
    """Energy, forces and stress are results of a calculator; facts can be selected by, details and served forces are data."""
    with ase.db.connect(export("ase-db", "a.db")) as database:
        rows = list(database.select())
        assert database.count("role=holdout") == 3
        assert database.count("force_std>5") == 7
        assert database.metadata["title"] == "tumbaga"
    for seed, row in enumerate(rows):
        atoms, told = row.toatoms(), label(seed)
        assert atoms.get_potential_energy() == told.energy
        np.testing.assert_array_equal(atoms.get_forces(), told.forces)
        np.testing.assert_array_equal(atoms.positions, frame(seed).positions)
        np.testing.assert_array_equal(row.data["served_forces"], told.forces + 0.1)
        assert (row.method, row.version, row.step, row.data["details"]) == (METHOD, 2, 10 * seed, {"cycles": 9})
        assert row.data["frame"] == f"sha256:{frame(seed).key}"
        if told.virial is not None:
            np.testing.assert_array_equal(row.data["virial"], told.virial)
            np.testing.assert_allclose(atoms.get_stress(voigt=False), -told.virial / atoms.get_volume(), rtol=1e-12)


def test_dpdata_reads_the_folders_to_the_last_bit(export: Export) -> None:
    """Each role, order of atoms and periodicity is a system; all have one type map, and float64 keeps every digit of the energies."""
    dpdata = pytest.importorskip("dpdata")
    folder = export("deepmd", "systems")
    told = json.loads((folder / exporting.MARK).read_text())
    expected = {label(seed).energy: seed for seed in range(N)}

    assert told["method"] == METHOD
    assert told["type_map"] == ["H", "O", "Cu", "Au"]
    assert sum(told["systems"].values()) == N
    assert {name.partition("/")[0] for name in told["systems"]} == {"train", "holdout"}
    assert {"train/H2OCuAu", "train/H2OCuAu-2", "train/Cu2Au2"} <= set(told["systems"])
    for name in told["systems"]:
        system = dpdata.LabeledSystem(str(folder / name), fmt="deepmd/npy")
        assert system.nopbc is (not name.endswith("Cu2Au2"))
        assert (folder / name / "type_map.raw").read_text().split() == told["type_map"]
        for k, energy in enumerate(system["energies"]):
            seed = expected.pop(float(energy))
            assert name.startswith("holdout/") is (seed % 4 == 1)
            np.testing.assert_array_equal(system["forces"][k], label(seed).forces)
            np.testing.assert_array_equal(system["coords"][k], frame(seed).positions)
            symbols = [system["atom_names"][kind] for kind in system["atom_types"]]
            assert symbols == ase.Atoms(numbers=frame(seed).numbers).get_chemical_symbols()
            if (virial := label(seed).virial) is not None:
                np.testing.assert_array_equal(system["virials"][k], virial)
                np.testing.assert_array_equal(system["cells"][k], frame(seed).cell)
    assert expected == {}


def chemiscope_reads(path: Path) -> dict[str, object]:
    """As its reader does: gzip or not, and NaN for what is not known."""
    packed = path.read_bytes()
    found: dict[str, object] = json.loads(gzip.decompress(packed) if path.name.endswith(".gz") else packed)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["a.json.gz", "a.json"])
def test_chemiscope_opens_its_file(export: Export, name: str) -> None:
    """Its own reader takes the file; each frame is there with energy, largest force, uncertainty, error, role and step."""
    chemiscope = pytest.importorskip("chemiscope")
    path = export("chemiscope", name, title="first: labels")
    found = chemiscope_reads(path)
    values = {name: one["values"] for name, one in found["properties"].items()}  # type: ignore[attr-defined]

    assert chemiscope.show_input(str(path)) is not None
    assert found["meta"]["name"] == "first: labels"  # type: ignore[index]
    assert values["energy"] == [label(seed).energy for seed in range(N)]
    np.testing.assert_allclose(values["largest force"], [np.linalg.norm(label(seed).forces, axis=1).max() for seed in range(N)], rtol=1e-12)
    np.testing.assert_allclose(values["force error"], np.sqrt(3) * 0.1, rtol=1e-9)
    assert values["force uncertainty"] == [0.25 + seed for seed in range(N)]
    assert values["step"] == [10.0 * seed for seed in range(N)]
    assert values["role"].count("holdout") == 3
    first = found["structures"][0]  # type: ignore[index]
    np.testing.assert_array_equal(np.array([first["x"], first["y"], first["z"]]).T, frame(0).positions)


def test_chemiscope_hides_what_is_not_known(run: Path, tmp_path: Path) -> None:
    """An imported label has no uncertainty and no error: those are NaN for it and numbers for the others."""
    pytest.importorskip("chemiscope")
    with Store(run / FILE) as store:
        store.import_labels([(frame(50), label(50), Role.TRAIN)])
    exporting.write(exporting.collect(run), "chemiscope", tmp_path / "a.json")
    values = {name: one["values"] for name, one in chemiscope_reads(tmp_path / "a.json")["properties"].items()}  # type: ignore[attr-defined]

    assert [bool(np.isnan(value)) for value in values["force uncertainty"]] == [False] * N + [True]
    assert [bool(np.isnan(value)) for value in values["force error"]] == [False] * N + [True]
    assert not np.isnan(values["energy"]).any()
    assert values["reason"][-1] == "imported"


MACE_READS = """
import json, sys
import torch
from mace.data.utils import KeySpecification, config_from_atoms, load_from_xyz
from mace.data import AtomicData
from mace.tools import AtomicNumberTable
energies, configs = load_from_xyz(sys.argv[1], KeySpecification.from_defaults(), extract_atomic_energies=True)
torch.set_default_dtype(torch.float64)
table = AtomicNumberTable([1, 8, 29, 79])
data = [AtomicData.from_config(one, z_table=table, cutoff=3.0) for one in configs]
print(json.dumps({
    "atomic_energies": {str(number): energy for number, energy in energies.items()},
    "configs": [{
        "numbers": one.atomic_numbers.tolist(), "positions": one.positions.tolist(), "config_type": one.config_type,
        "pbc": [bool(x) for x in one.pbc],
        **{name: getattr(made, name).tolist() for name in ("energy", "forces", "virials", "stress")},
        "weights": {name: one.property_weights[name] for name in ("energy", "forces", "virials", "stress")},
    } for one, made in zip(configs, data)]}))
"""


def mace_reads(python: str, path: Path) -> dict[str, object]:
    done = subprocess.run([python, "-W", "ignore", "-c", MACE_READS, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(not MACE.exists(), reason="MACE has an environment of its own: make mace")
def test_mace_reads_it_to_the_last_bit(run: Path, tmp_path: Path) -> None:
    """MACE's data loader has energy, forces, virials and stress of each frame by its own default names, and a single atom's energy as E0."""
    atom = Frame(np.array([29]), np.zeros((1, 3)))
    with Store(run / FILE) as store:
        store.import_labels([(atom, Label(-44630.5 - 1 / 3, np.zeros((1, 3)), METHOD, 1.0), Role.TRAIN)])
    exporting.write(exporting.collect(run), "extxyz", tmp_path / "a.extxyz")
    found = mace_reads(str(MACE), tmp_path / "a.extxyz")

    assert found["atomic_energies"] == {"29": -44630.5 - 1 / 3}
    assert len(found["configs"]) == N  # type: ignore[arg-type]
    for seed, one in enumerate(found["configs"]):  # type: ignore[arg-type]
        told = label(seed)
        assert one["numbers"] == frame(seed).numbers.tolist()
        assert one["energy"] == told.energy
        np.testing.assert_array_equal(one["forces"], told.forces)
        np.testing.assert_array_equal(one["positions"], frame(seed).positions)
        assert one["pbc"] == [frame(seed).periodic] * 3
        assert (one["weights"]["energy"], one["weights"]["forces"]) == (1.0, 1.0)
        if told.virial is None:
            assert (one["weights"]["virials"], one["weights"]["stress"]) == (0.0, 0.0)
        else:
            np.testing.assert_array_equal(one["virials"], [told.virial])
            volume = abs(np.linalg.det(frame(seed).cell))
            np.testing.assert_allclose(one["stress"], [-told.virial / volume], rtol=1e-12)
            assert one["weights"]["virials"] == 1.0


@pytest.mark.parametrize(("to", "name"), [("extxyz", "a.extxyz"), ("ase-db", "a.db"), ("chemiscope", "a.json")])
def test_failures_can_be_looked_at(export: Export, to: str, name: str) -> None:
    """A frame whose label failed is written without one, with the reason and what had been served."""
    if to == "chemiscope":
        pytest.importorskip("chemiscope")
        values = {key: one["values"] for key, one in chemiscope_reads(export(to, name, "failures"))["properties"].items()}  # type: ignore[attr-defined]
        assert "energy" not in values
        assert values["problem"] == ['the SCF did not "converge"\nin 100 cycles']
        return
    path = export(to, name, "failures")
    (atoms,) = ase.io.read(path, ":")
    np.testing.assert_array_equal(atoms.positions, frame(N).positions)
    assert atoms.calc is None
    if to == "extxyz":
        assert atoms.info["problem"] == "the SCF did not 'converge' in 100 cycles"
        assert not any("REF" in name for name in (*atoms.info, *atoms.arrays))


def test_the_quarantine_can_be_looked_at(export: Export) -> None:
    """A label that was set aside is in an export of its own, with the check and the reason, and in no other."""
    (atoms,) = ase.io.read(export("extxyz", "a.extxyz", "quarantine"), ":")

    assert atoms.info["REF_energy"] == label(N + 1).energy
    assert (atoms.info["check"], atoms.info["problem"]) == ("neighbours", "its forces are 9 eV/Å off")


def test_one_role(export: Export) -> None:
    """Held-out labels can be had alone."""
    found = ase.io.read(export("extxyz", "a.extxyz", role=Role.HOLDOUT), ":")

    assert [atoms.info["role"] for atoms in found] == ["holdout"] * 3


def test_methods_are_not_mixed(run: Path) -> None:
    """Labels of two methods are not written as one set; each can be had by its name."""
    with Store(run / FILE) as store:
        store.import_labels([(frame(50), label(50, "test:b"), Role.TRAIN)])

    with pytest.raises(ConfigError, match=f"--method: must be one of .*do not mix: {METHOD}, test:b"):
        exporting.collect(run)
    assert len(exporting.collect(run, method="test:b")) == 1
    assert len(exporting.collect(run, method=METHOD)) == N
    with pytest.raises(RunDirError, match=f"has no labels of method test:c; there are {METHOD}, test:b"):
        exporting.collect(run, method="test:c")


def test_nothing_is_overwritten_by_accident(export: Export, tmp_path: Path) -> None:
    """What is there stays, unless --force says otherwise; a folder that no export has written stays in any case."""
    pytest.importorskip("dpdata")
    for to, name in (("extxyz", "a.extxyz"), ("deepmd", "systems")):
        path = export(to, name)
        with pytest.raises(ConfigError, match=f"{path} is there already"):
            export(to, name)
        export(to, name, role=Role.HOLDOUT, force=True)
    assert len(ase.io.read(tmp_path / "a.extxyz", ":")) == 3
    assert not (tmp_path / "systems" / "train").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is a folder that no export has written"):
        export("deepmd", "mine", force=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.extxyz", "first", "mine", "systems"]


@pytest.mark.parametrize(("to", "name"), [("extxyz", "a.extxyz"), ("ase-db", "a.db"), ("deepmd", "systems"), ("chemiscope", "a.json.gz")])
def test_a_file_is_written_whole_or_not_at_all(run: Path, tmp_path: Path, to: str, name: str) -> None:
    """Where the writer fails at the last frame, nothing new is there, and the earlier export is what it was."""
    pytest.importorskip("dpdata")
    pytest.importorskip("chemiscope")
    rows = exporting.collect(run)
    exporting.write(rows[:2], to, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    broken = exporting.Exported(rows[0].frame, rows[0].label, rows[0].role, {"reason": object()}, np.zeros((7, 3)))  # type: ignore[dict-item]
    if to == "deepmd":
        object.__setattr__(broken.label, "forces", np.zeros((1, 3)))

    with pytest.raises(Exception, match=r"."):
        exporting.write([*rows, broken], to, tmp_path / name, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_place_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    """A name that does not fit and a folder that cannot be made are sentences."""
    rows = exporting.collect(run)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output: .*a.txt must end in .extxyz or .xyz"):
        exporting.write(rows, "extxyz", tmp_path / "a.txt")
    with pytest.raises(DriverError, match="cannot be written: "):
        exporting.write(rows, "extxyz", tmp_path / "file" / "a.extxyz")
    with pytest.raises(ConfigError, match="deepmd holds labelled frames only; extxyz, ase-db, chemiscope hold others too"):
        exporting.write(exporting.collect(run, "failures"), "deepmd", tmp_path / "systems")


def test_a_run_without_anything(tmp_path: Path) -> None:
    """A folder that is no run, a store without labels and a broken store are named."""
    with pytest.raises(RunDirError, match=f"has no {FILE}"):
        exporting.collect(tmp_path)
    Store(tmp_path / FILE).close()
    for which in exporting.WHICH:
        with pytest.raises(RunDirError, match=f"has no {which}"):
            exporting.collect(tmp_path, which)
    (tmp_path / FILE).write_bytes(b"this is no database. " * 100)
    with pytest.raises(RunDirError, match="cannot be opened as a store"):
        exporting.collect(tmp_path)
