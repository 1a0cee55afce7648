"""Dispersion corrections D3(BJ) and D4 of density functionals. The only file that knows the packages dftd3 and dftd4 (extra `dispersion`).

They depend on positions and charge alone and are added to a converged label; PySCF never sees them.

Sources:
    D3: Grimme, Antony, Ehrlich, Krieg, J. Chem. Phys. 132, 154104 (2010); BJ damping: Grimme, Ehrlich, Goerigk, J. Comput. Chem. 32, 1456
    (2011); here without the three-body term, as published functionals are parametrised. D4: Caldeweyher et al., J. Chem. Phys. 150, 154122
    (2019), with its three-body term.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import numpy as np

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.records import Array, Frame

PACKAGES = {"d3bj": "dftd3", "d4": "dftd4"}


def problem(kind: str) -> str | None:
    """Why a correction cannot be computed here, or None; imports nothing."""
    if kind not in PACKAGES:
        return f"has no dispersion {kind!r}; there are {', '.join(PACKAGES)}"
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        return f"needs the package {PACKAGES[kind]} for disp={kind}: pip install 'tumbaga[dispersion]'"
    return None


def correction(kind: str, functional: str, frame: Frame, charge: int) -> tuple[float, Array, str]:
    """Return energy (eV), forces (n_atoms, 3) in eV/Å, and the package with its version.

    Raises:
        LabelFailedError: there are no parameters for the functional.
    """
    from ase.units import Bohr, Hartree

    periodic: dict[str, Any] = {"lattice": frame.cell / Bohr, "periodic": np.full(3, True)} if frame.periodic else {}
    try:
        if kind == "d3bj":
            from dftd3.interface import DispersionModel, RationalDampingParam

            found = DispersionModel(frame.numbers, frame.positions / Bohr, **periodic).get_dispersion(
                RationalDampingParam(method=functional, atm=False), grad=True
            )
        else:
            from dftd4.interface import DampingParam
            from dftd4.interface import DispersionModel as ChargeDependentModel

            found = ChargeDependentModel(frame.numbers, frame.positions / Bohr, charge=float(charge), **periodic).get_dispersion(
                DampingParam(method=functional), grad=True
            )
    except RuntimeError as error:
        raise LabelFailedError(f"there is no {kind} dispersion for {functional}: {error}") from error
    package = PACKAGES[kind]
    forces = -np.asarray(found["gradient"], dtype=np.float64) * (Hartree / Bohr)
    return float(found["energy"]) * Hartree, forces, f"{package} {importlib.metadata.version(package)}"
