"""ASE databases (SQLite): energy, forces and stress as results of a calculator, facts as key-value pairs, the rest as data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.stress import full_3x3_to_voigt_6_stress

from tumbaga.driver.exporting import Exported


def write(rows: Sequence[Exported], path: Path, /, *, prefix: str, title: str) -> None:
    """Write an ASE database; select from it with `role=train`, `force_std>0.2`, `version=3` …

    Args:
        rows: what is written.
        path: of the new file, which ends in .db.
        prefix: not used here: a database has the results of a calculator.
        title: kept as the metadata's title.
    """
    with connect(str(path)) as database:
        for one in rows:
            pairs = {name: value for name, value in one.facts.items() if name not in ("frame", "problem")}
            data: dict[str, Any] = {name: one.facts[name] for name in ("frame", "problem") if name in one.facts}
            if one.served_forces is not None:
                data["served_forces"] = one.served_forces
            if one.label is not None:
                data["details"] = one.label.details
                if one.label.virial is not None:
                    data["virial"] = one.label.virial
            database.write(atoms_of(one), key_value_pairs=pairs, data=data)
        database.metadata = {"title": title}


def atoms_of(one: Exported) -> Atoms:
    """ASE's atoms with the label as results of a calculator, if there is one; the energy is also the free energy, as ASE wants it."""
    frame, label = one.frame, one.label
    atoms = Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell if frame.periodic else None, pbc=frame.periodic)
    if label is not None:
        results: dict[str, Any] = {"energy": label.energy, "forces": np.array(label.forces)}
        if label.virial is not None and frame.periodic:
            results["stress"] = full_3x3_to_voigt_6_stress(-label.virial / atoms.get_volume())
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms
