"""Structure files in and out, through ASE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tumbaga.driver.errors import ConfigError
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
        raise ConfigError("template", f"{path} is not a structure file that ASE can read ({error})") from error
    return from_atoms(atoms)


def from_atoms(atoms: Any) -> Frame:
    """Make a frame of ASE's Atoms; periodic only if all three directions are."""
    periodic = bool(np.all(atoms.pbc))
    return Frame(atoms.numbers, atoms.positions, atoms.cell.array if periodic else np.zeros((3, 3)), periodic)


def to_atoms(frame: Frame) -> Any:
    """Make ASE's Atoms of a frame."""
    from ase import Atoms

    return Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell if frame.periodic else None, pbc=frame.periodic)
