"""Structures in the XSF form that ænet reads: one cluster or crystal, its energy in a comment, forces behind the coordinates. numpy only.

In XCrySDen's own definition forces are in Hartree/Å; ænet, and so this file, takes eV/Å.

Source:
    N. Artrith, A. Urban, Comput. Mater. Sci. 114, 135 (2016), and the documentation of ænet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from tumbaga.driver.errors import ConfigError
from tumbaga.online.errors import BadFrameError
from tumbaga.online.records import Array, Frame, Ints


class Structure(NamedTuple):
    """What an ".xsf" file of ænet holds.

    Attributes:
        frame: the structure.
        energy: total, eV; None where the file tells none.
        forces: shape (n_atoms, 3), float64, eV/Å; None where the file tells none.
    """

    frame: Frame
    energy: float | None = None
    forces: Array | None = None


def read_xsf(path: str | Path) -> Structure:
    """Read one structure, a cluster (ATOMS) or a crystal (CRYSTAL), with the energy of its comment line and forces where it has them.

    Raises:
        ConfigError: the file is missing, damaged, or holds something else than one such structure; the sentence names it.
    """
    try:
        lines = [one.strip() for one in Path(path).read_text(encoding="utf-8", errors="replace").splitlines()]
        return _structure(lines)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})") from error
    except (ValueError, IndexError, BadFrameError) as error:
        told = "it ends too early" if isinstance(error, IndexError) else str(error)
        raise ConfigError(str(path), f"is no structure in the XSF form of ænet: {told}") from error


def _structure(lines: list[str]) -> Structure:
    energy = next((_energy(one) for one in lines if one.startswith("#") and "total energy" in one.lower()), None)
    plain = [one for one in lines if one and not one.startswith("#")]
    heads = [one.split()[0].upper() for one in plain]
    if "ATOMS" in heads:
        start = heads.index("ATOMS") + 1
        numbers, positions, forces = _atoms(plain[start:])
        return Structure(Frame(numbers, positions), energy, forces)
    if "PRIMVEC" not in heads or "PRIMCOORD" not in heads or "CRYSTAL" not in heads:
        raise ValueError("it has neither ATOMS nor CRYSTAL with PRIMVEC and PRIMCOORD")
    start = heads.index("PRIMVEC") + 1
    cell = np.array([[float(word) for word in plain[start + k].split()] for k in range(3)])
    start = heads.index("PRIMCOORD") + 1
    count = int(plain[start].split()[0])
    numbers, positions, forces = _atoms(plain[start + 1 : start + 1 + count])
    if len(numbers) != count:
        raise ValueError(f"it announces {count} atoms and has {len(numbers)}")
    return Structure(Frame(numbers, positions, cell, periodic=True), energy, forces)


def _energy(line: str) -> float:
    words = line.replace("=", " ").split()
    return float(words[words.index("energy") + 1])


def _atoms(lines: Sequence[str]) -> tuple[Ints, Array, Array | None]:
    rows = [one.split() for one in lines]
    numbers = [int(row[0]) if row[0].isdigit() else atomic_numbers.get(row[0], 0) for row in rows]
    if unknown := [row[0] for row, z in zip(rows, numbers, strict=True) if not 0 < z < len(chemical_symbols)]:
        raise ValueError(f"{unknown[0]!r} is no element")
    widths = {len(row) for row in rows}
    if widths not in ({4}, {7}):
        raise ValueError("the lines of its atoms need a symbol, three coordinates, and in all or in none of them three forces")
    values = np.array([[float(word) for word in row[1:]] for row in rows])
    if not np.isfinite(values).all():
        raise ValueError("a number is not finite")
    return np.array(numbers), values[:, :3], values[:, 3:] if widths == {7} else None


def write_xsf(path: str | Path, structure: Structure) -> None:
    """Write one structure as ænet reads it; without an energy it has no comment line, without forces three numbers an atom."""
    frame, energy, forces = structure
    values = frame.positions if forces is None else np.concatenate([frame.positions, forces], axis=1)
    rows = [chemical_symbols[z] + "".join(f" {v:22.14f}" for v in row) for z, row in zip(frame.numbers, values, strict=True)]
    head = [] if energy is None else [f"# total energy = {float(energy)!r} eV", ""]
    if frame.periodic:
        cell = ["".join(f" {v:22.14f}" for v in row) for row in frame.cell]
        head += ["CRYSTAL", "PRIMVEC", *cell, "PRIMCOORD", f"{len(frame)} 1"]
    else:
        head += ["ATOMS"]
    Path(path).write_text("\n".join(head + rows) + "\n", encoding="utf-8")
