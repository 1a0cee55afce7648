"""What the readers of all formats give: one frame as the file has it, nothing checked yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Raw:
    """A frame as the file has it.

    Attributes:
        numbers: atomic numbers.
        positions: Å.
        cell: lattice vectors as rows, Å.
        pbc: whether it repeats, for each direction.
        results: everything named beside the structure: energies (eV), forces (eV/Å), stresses (eV/Å³), virials (eV).
        reference: what is to be taken off the energy, eV.
        broken: why this frame cannot be used at all; empty if it can be looked at.
    """

    numbers: Any
    positions: Any
    cell: Any
    pbc: Any
    results: Mapping[str, Any] = field(default_factory=dict)
    reference: float = 0.0
    broken: str = ""
