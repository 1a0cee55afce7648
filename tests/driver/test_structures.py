"""Structure files become frames, or one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.io import write

from tumbaga.driver.errors import ConfigError
from tumbaga.driver.structures import from_atoms, read_frame, to_atoms


@pytest.mark.parametrize("name", ["w.xyz", "w.traj", "w.cif", "w.json"])
def test_what_ase_writes_is_read(tmp_path: Path, name: str) -> None:
    """A periodic structure comes back from several formats with its species, positions and cell."""
    atoms = bulk("Cu", cubic=True)
    write(tmp_path / name, atoms)
    frame = read_frame(tmp_path / name)

    assert frame.periodic
    assert frame.numbers.tolist() == [29] * 4
    np.testing.assert_allclose(frame.cell, atoms.cell.array, atol=1e-6)
    np.testing.assert_allclose(frame.positions, atoms.positions, atol=1e-6)


def test_the_last_structure_counts(tmp_path: Path) -> None:
    """Of a trajectory the last structure is taken."""
    write(tmp_path / "t.xyz", [molecule("H2O"), molecule("NH3")])

    assert read_frame(tmp_path / "t.xyz").numbers.tolist() == molecule("NH3").numbers.tolist()


def test_a_molecule_has_no_cell() -> None:
    """A structure that does not repeat is a cluster, whatever box it is in."""
    boxed = from_atoms(molecule("H2O", vacuum=5.0))

    assert not boxed.periodic
    assert not boxed.cell.any()


def test_a_slab_is_told_what_to_do() -> None:
    """A structure that repeats in two directions is neither cut out nor repeated in silence; with all three it is a lattice."""
    slab = fcc111("Au", (1, 1, 2), vacuum=5.0)
    with pytest.raises(ConfigError, match="periodic in some directions only"):
        from_atoms(slab)
    slab.pbc = True

    assert from_atoms(slab).periodic


def test_there_and_back_is_the_same() -> None:
    """Frame to Atoms to Frame keeps every bit, with and without a lattice."""
    for atoms in (bulk("CuAu", "rocksalt", a=5.5), molecule("CH4")):
        frame = from_atoms(atoms)
        assert from_atoms(to_atoms(frame)).key == frame.key


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.xyz", "3\nwater\nO 0 0\nH 1 0 0\n"),
        ("t.xyz", "not a number\n"),
        ("t.xyz", ""),
        ("t.cif", "data_x\n"),
        ("t.unknown", "once upon a time\nthere was a file\n"),
        ("POSCAR", "junk\n"),
    ],
)
def test_a_file_that_is_no_structure_is_a_sentence(tmp_path: Path, name: str, text: str) -> None:
    """Whatever a reader thinks of a file, the user gets one line that names it."""
    (tmp_path / name).write_text(text)

    with pytest.raises(ConfigError, match="template: ") as caught:
        read_frame(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("atoms", [Atoms("X"), Atoms("Cu", cell=[3, 3, 0], pbc=True)], ids=["a ghost atom", "a flat cell"])
def test_a_structure_that_cannot_be_evaluated_is_a_sentence(tmp_path: Path, atoms: Atoms) -> None:
    """Ghost atoms and periodic structures without a volume are refused with the file's name."""
    write(tmp_path / "t.traj", atoms)

    with pytest.raises(ConfigError, match="holds no structure that can be evaluated"):
        read_frame(tmp_path / "t.traj")


def test_a_missing_file_and_a_folder_are_sentences(tmp_path: Path) -> None:
    """A path that is not there, or is a folder, is named."""
    with pytest.raises(ConfigError, match=r"there is no file .*none\.xyz"):
        read_frame(tmp_path / "none.xyz")
    with pytest.raises(ConfigError, match="template: "):
        read_frame(tmp_path)
