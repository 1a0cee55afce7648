"""Crystals and boxes by PySCF: the Gamma point, GTH pseudopotentials, densities on a uniform grid. Knows PySCF's cells, no ladder.

Why only this: in PySCF 2.14 cells have no gradients with Gaussian density fitting, nor with the effective cores of the def2 and lanl sets, and
those with k-points have not been found right here. What is left is `MultiGridNumInt2` with GTH potentials at the Gamma point. Its forces
carry the error of the uniform grid, which shows as a net force: water in a box of 6 Å has 0.3 eV/Å at a cut-off of 120 Hartree and 0.06 at
300. So the cut-off is part of the method's name, and the bound on the net force refuses what is too coarse.

Source:
    Goedecker, Teter, Hutter, Phys. Rev. B 54, 1703 (1996), for the pseudopotentials.
"""

from __future__ import annotations

from typing import Any

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.records import Frame

GAMMA = "1x1x1"
PSEUDO = "gth-pbe"


def problem(kpts: str, basis: str) -> str | None:
    """Why cells cannot be computed with these options, or None."""
    if kpts != GAMMA:
        return f"cannot have kpts = {kpts!r}: PySCF has no forces for other meshes that agree with its energies; it is {GAMMA} or left away"
    if not basis.lower().startswith("gth-"):
        return f"needs a basis made for pseudopotentials with kpts = {GAMMA}, such as basis=gth-dzvp-molopt-sr, not {basis}"
    return None


def cell(frame: Frame, basis: str, cutoff: float, charge: int, spin: int, max_memory: float) -> Any:
    """PySCF's cell of a frame.

    Args:
        frame: a periodic one.
        basis: a GTH basis.
        cutoff: kinetic energy of the plane waves of the grid, Hartree.
        charge: of the cell, e.
        spin: unpaired electrons.
        max_memory: MB, advisory.

    Raises:
        LabelFailedError: there is no such basis or pseudopotential.
    """
    from pyscf.pbc import gto

    made = gto.Cell()
    made.atom = [(int(z), tuple(position)) for z, position in zip(frame.numbers, frame.positions.tolist(), strict=True)]
    made.a, made.unit = frame.cell, "Angstrom"
    made.basis, made.pseudo, made.ke_cutoff = basis, PSEUDO, cutoff
    made.charge, made.spin = charge, spin
    made.max_memory, made.verbose = max_memory, 0
    try:
        return made.build(dump_input=False, parse_arg=False)
    except (KeyError, RuntimeError, ValueError) as error:
        raise LabelFailedError(f"PySCF cannot set up this cell with basis {basis}: {error}") from error


def field(made: Any, xc: str) -> Any:
    """PySCF's SCF object of a cell, not yet run."""
    from pyscf.pbc import dft
    from pyscf.pbc.dft.multigrid import MultiGridNumInt2

    found = (dft.UKS if made.spin else dft.RKS)(made, xc=xc)
    found._numint = MultiGridNumInt2(made)
    return found
