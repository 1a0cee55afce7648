"""DeePMD's NumPy folders, through `dpdata`: ROLE/FORMULA with a set for each role, order of atoms and periodicity, in float64."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from tumbaga.driver.exporting import MARK, Exported, missing


def write(rows: Sequence[Exported], path: Path, /, *, prefix: str, title: str) -> None:
    """Write a folder of systems; all have the same type map, so that one training can take them all.

    The format has no place for method, uncertainty and versions: the method and the list of systems stand in `MARK`.

    Args:
        rows: what is written; all have labels.
        path: of the new folder.
        prefix: not used here.
        title: kept in `MARK`.

    Raises:
        DriverError: dpdata is missing.
    """
    try:
        import dpdata
    except ImportError as error:
        raise missing("dpdata", error) from error
    symbols = [chemical_symbols[number] for number in sorted({int(number) for one in rows for number in one.frame.numbers})]
    systems: dict[str, int] = {}
    for name, group in _groups(rows).items():
        made = dpdata.LabeledSystem(data=_data(group, symbols))
        # its default is float32, in which an all-electron energy is good to some meV an atom and no better
        made.to("deepmd/npy", str(path / name), set_size=len(group), comp_prec=np.float64)
        systems[name] = len(group)
    methods = sorted({one.label.method for one in rows if one.label is not None})
    told = {"title": title, "method": ", ".join(methods), "type_map": symbols, "systems": systems}
    (path / MARK).write_text(json.dumps(told, indent=1))


def _groups(rows: Sequence[Exported]) -> dict[str, list[Exported]]:
    """Rows that can be one system, by the name of its folder: the same atoms in the same order, all with a virial or none."""
    groups: dict[tuple[Any, ...], list[Exported]] = defaultdict(list)
    for one in rows:
        assert one.label is not None
        assert one.role is not None
        groups[one.role.value, one.frame.numbers.tobytes(), one.frame.periodic, one.label.virial is None].append(one)
    named: dict[str, list[Exported]] = {}
    for (role, *_), group in groups.items():
        name = f"{role}/{formula(group[0].frame.numbers)}"
        same = sum(known.partition("-")[0] == name for known in named)
        named[f"{name}-{same + 1}" if same else name] = group
    return named


def formula(numbers: Any) -> str:
    """Elements by atomic number, heavy ones last.

    >>> formula(np.array([8, 1, 1, 29]))
    'H2OCu'
    """
    found, counts = np.unique(numbers, return_counts=True)
    return "".join(f"{chemical_symbols[number]}{count if count > 1 else ''}" for number, count in zip(found, counts, strict=True))


def _data(group: Sequence[Exported], symbols: Sequence[str]) -> dict[str, Any]:
    """What dpdata calls the data of a labelled system: eV, Å, eV/Å; its virials are -dE/dstrain, as ours."""
    first = group[0].frame
    types = np.array([symbols.index(chemical_symbols[number]) for number in first.numbers])
    labels = [one.label for one in group if one.label is not None]
    data: dict[str, Any] = {
        "atom_names": list(symbols),
        "atom_numbs": np.bincount(types, minlength=len(symbols)).tolist(),
        "atom_types": types,
        "orig": np.zeros(3),
        "cells": np.array([one.frame.cell for one in group]),
        "coords": np.array([one.frame.positions for one in group]),
        "energies": np.array([label.energy for label in labels]),
        "forces": np.array([label.forces for label in labels]),
    }
    if not first.periodic:
        data["nopbc"] = True
    elif labels[0].virial is not None:
        data["virials"] = np.array([label.virial for label in labels])
    return data
