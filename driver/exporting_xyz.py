"""Extended XYZ with every bit: ASE writes eight decimals, of which all-electron energies and repeated exports lose by rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols

from tumbaga.driver.exporting import Exported, Fact
from tumbaga.online.records import Array


def write(rows: Sequence[Exported], path: Path, /, *, prefix: str, title: str) -> None:
    """Write extended XYZ.

    Energy (eV), forces (eV/Å), virials (-dE/dstrain, eV) and stress (-virials / volume, eV/Å³, as ASE has it) bear the prefix;
    `config_type` is why the frame was picked, or "IsolatedAtom" for a single atom in no cell, which MACE takes as its reference energy.

    Args:
        rows: what is written.
        path: of the new file.
        prefix: "REF_" is what MACE and others look for; without one ASE's reader takes the names as results of a calculator.
        title: not used here.
    """
    with open(path, "w", encoding="utf-8") as file:
        for one in rows:
            file.writelines(line + "\n" for line in _lines(one, prefix))


def _lines(one: Exported, prefix: str) -> Iterator[str]:
    frame, label = one.frame, one.label
    columns: list[tuple[str, Array]] = [("pos", frame.positions)]
    head: dict[str, Fact | Array] = {}
    if label is not None:
        columns.append((f"{prefix}forces", label.forces))
        head[f"{prefix}energy"] = label.energy
        if label.virial is not None and frame.periodic:
            head[f"{prefix}virials"] = label.virial
            head[f"{prefix}stress"] = -label.virial / abs(float(np.linalg.det(frame.cell)))
    if one.served_forces is not None:
        columns.append(("served_forces", one.served_forces))
    head["config_type"] = "IsolatedAtom" if len(frame) == 1 and not frame.periodic else one.facts["reason"]
    head |= one.facts
    yield str(len(frame))
    properties = ":".join(["species:S:1", *(f"{name}:R:3" for name, _ in columns)])
    cell = f"Lattice={_text(frame.cell.T)} " if frame.periodic else ""
    told = " ".join(f"{key}={_text(value)}" for key, value in head.items())
    yield f'{cell}Properties={properties} pbc="{" ".join("FT"[frame.periodic] * 3)}" {told}'
    for number, *numbers in zip(frame.numbers, *(column for _, column in columns), strict=True):
        yield " ".join([f"{chemical_symbols[number]:2s}", *(repr(float(x)) for x in np.concatenate(numbers))])


def _text(value: Fact | Array) -> str:
    """A value as the format has it; a matrix column by column. Python writes the shortest digits that give a float64 back."""
    if isinstance(value, np.ndarray):
        return '"' + " ".join(repr(float(x)) for x in value.ravel(order="F")) + '"'
    if isinstance(value, str):
        return '"' + " ".join(value.replace("\\", "/").replace('"', "'").split()) + '"'
    return repr(value)
