"""What a converged calculation must pass before it is a label, and the facts of it that are kept. Knows PySCF's SCF objects."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.records import Array, Frame

MAX_FORCE = 30.0  # eV/Å: beyond it a label teaches the repulsive wall and nothing else
NET_FORCE = 0.01  # eV/Å times sqrt(n_atoms)
NET_TORQUE = (
    0.05  # eV times sqrt(n_atoms): the atoms' grids do not turn with the molecule, so that torques vanish less well than net forces
)
CONTAMINATION = 0.3  # of <S^2> over s(s+1): beyond it the state is a mixture of spins, and no single determinant's forces are right
LOW_GAP = 0.4  # eV


def check_forces(frame: Frame, forces: Array) -> dict[str, float]:
    """Return the norms of net force (eV/Å) and, of a cluster, net torque about the centroid (eV).

    Raises:
        LabelFailedError: a force is not finite or beyond `MAX_FORCE`, or the net force or torque beyond its bound.
    """
    if not np.isfinite(forces).all():
        raise LabelFailedError("a force of the label is not finite")
    largest = float(np.linalg.norm(forces, axis=1).max())
    if largest > MAX_FORCE:
        raise LabelFailedError(f"the largest force of the label is {largest:.1f} eV/Å; beyond {MAX_FORCE:.0f} nothing is to be learnt")
    root = float(np.sqrt(len(forces)))
    found = {"net_force": float(np.linalg.norm(forces.sum(axis=0)))}
    if found["net_force"] > NET_FORCE * root:
        raise LabelFailedError(f"the forces of the label add up to {found['net_force']:.3f} eV/Å instead of zero")
    if not frame.periodic:
        arms = frame.positions - frame.positions.mean(axis=0)
        found["net_torque"] = float(np.linalg.norm(np.cross(arms, forces).sum(axis=0)))
        if found["net_torque"] > NET_TORQUE * root:
            raise LabelFailedError(
                f"the forces of the label turn the cluster with a torque of {found['net_torque']:.3f} eV instead of none"
            )
    return found


def check_spin(done: Any) -> dict[str, float]:
    """Return <S^2> and its excess over s(s+1) of an unrestricted state; nothing of a restricted one, which has none.

    Raises:
        LabelFailedError: the excess is beyond `CONTAMINATION`.
    """
    spin = int(done.mol.spin)
    if not spin:
        return {}
    square = float(done.spin_square()[0])
    excess = square - 0.25 * spin * (spin + 2)
    if excess > CONTAMINATION:
        raise LabelFailedError(
            f"the state is a mixture of spins: <S^2> is {square:.2f} and of 2S = {spin} it is {square - excess:.2f}; "
            f"no label where it is off by more than {CONTAMINATION:g}"
        )
    return {"s2": square, "s2_excess": excess}


def warnings_of(gaps: Sequence[float | None]) -> list[str]:
    """What to know before this label is believed, in sentences."""
    smallest = min((one for one in gaps if one is not None), default=LOW_GAP)
    if smallest >= LOW_GAP:
        return []
    return [f"a gap of {smallest:.2f} eV, below {LOW_GAP:g} eV: another spin state or occupation may be as low"]


def versions() -> dict[str, str]:
    """Of PySCF and of the library of functionals."""
    from pyscf.dft import libxc

    return {"pyscf": importlib.metadata.version("pyscf"), "libxc": str(libxc.__version__)}


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, MB."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return round(kilobytes / 1024, 1)
