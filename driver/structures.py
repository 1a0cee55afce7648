"""Structure files in and out, through ASE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tumbaga.driver.errors import ConfigError
from tumbaga.online.errors import BadFrameError
from tumbaga.online.records import Frame


def read_frame(path: str | Path) -> Frame:
    """Read the last structure of a file of any format that ASE knows.

    Raises:
        ConfigError: the file is missing or not a structure; the sentence names it.
    """
    from ase.io import read

    try:
        atoms = read(str(path), index=-1)
    except FileNotFoundError as error:
        raise ConfigError("template", f"there is no file {path}") from error
    except Exception as error:  # a foreign reader: whatever it raises, the file is not a structure
        told = " ".join(str(error).split())  # some readers quote the file, line by line
        raise ConfigError("template", f"{path} is not a structure file that ASE can read ({type(error).__name__}: {told:.200})") from error
    try:
        return from_atoms(atoms)
    except BadFrameError as error:
        raise ConfigError("template", f"{path} holds no structure that can be evaluated: {error}") from error


def from_atoms(atoms: Any) -> Frame:
    """Make a frame of ASE's Atoms.

    Raises:
        ConfigError: periodic in one or two directions: as a cluster it would silently lose its neighbours.
    """
    periodic = bool(np.any(atoms.pbc))
    if periodic and not np.all(atoms.pbc):
        raise ConfigError("template", "is periodic in some directions only; set pbc in all three (with vacuum in the cell) or in none")
    return Frame(atoms.numbers, atoms.positions, atoms.cell.array if periodic else np.zeros((3, 3)), periodic)


def to_atoms(frame: Frame) -> Any:
    """Make ASE's Atoms of a frame."""
    from ase import Atoms

    return Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell if frame.periodic else None, pbc=frame.periodic)
