"""What travels with every force: which version it is from, how sure that one is, and what a swap did. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from tumbaga.driver import units
from tumbaga.online.ramp import Mix
from tumbaga.online.records import Array, Members, Prediction

UNKNOWN_STD = 1e6  # eV/Å, eV: said where an uncertainty is not finite, since JSON and engines know no infinity


@dataclass(frozen=True)
class Certainty:
    """How sure a version is of one frame.

    Attributes:
        std: largest force std of any atom, eV/Å; UNKNOWN_STD where it is not known.
        atom: its index, -1 where it is not known.
        score: the calibrated one, eV/Å, or None.
        lpr: the largest raw last-layer score.
    """

    std: float
    atom: int
    score: float | None
    lpr: float


def certainty(lpr: Array, scale: float | None, quantile: float) -> Certainty:
    """Make force uncertainties of last-layer scores.

    Args:
        lpr: score of each atom, shape (n_atoms,); NaN where the potential has no readout.
        scale: eV/Å of force std per unit of score, or None if that is not known.
        quantile: of the calibration: errors are below `quantile` times std as often as promised.
    """
    atom = int(lpr.argmax()) if lpr.size else -1  # a NaN counts as the largest
    largest = float(lpr[atom]) if lpr.size else math.nan
    if not math.isfinite(largest):
        return Certainty(UNKNOWN_STD, -1, None, largest)
    if scale is None:
        return Certainty(UNKNOWN_STD, atom, None, largest)
    return Certainty(scale * largest, atom, quantile * scale * largest, largest)


def extras(
    version: str,
    mix: Mix,
    std: float,
    atom: int,
    work: float,
    committee: tuple[Members, Prediction] | None = None,
    policy: str = "continue",
    energy_std: float = math.nan,
) -> bytes:
    """Return the extras of one answer: the same keys in every answer, since an engine may ask for them by name.

    Args:
        version: number and hash.
        mix: of versions that was served.
        std: largest force std, eV/Å.
        atom: its index.
        work: that swaps have done so far, eV.
        committee: what its members say and what is served, for i-PI's ffcommittee.
        policy: how the answer came about; see `tumbaga.online.policy.Decision`.
        energy_std: of the total energy up to a constant for each element, eV; NaN where it is not known.
    """
    energy_std = energy_std if math.isfinite(energy_std) else UNKNOWN_STD
    told = {
        "tumbaga": {
            "version": version,
            "force_std": std,
            "force_std_atom": atom,
            "energy_std": energy_std,
            "policy": policy,
            "ramp": 1.0 if mix.old == mix.new else mix.weight,
            "swap_work": work,
        },
        "tumbaga_force_std": std,
        "tumbaga_energy_std": energy_std,
        "tumbaga_version": mix.new,
        "tumbaga_swap_work": work,
    }
    if committee is not None:
        told |= _committee(*committee)
    return msgspec.json.encode(told)


def _committee(members: Members, served: Prediction) -> dict[str, list[object]]:
    """The members as i-PI reads them, in atomic units. i-PI moves atoms by their mean, so that is made what we serve, to a rounding."""
    energies = members.energies - members.energies.mean() + served.energy
    forces = members.forces - members.forces.mean(axis=0) + served.forces
    virials = members.virials - members.virials.mean(axis=0) + served.virial
    return {
        "committee_pot": (energies / units.HARTREE).tolist(),
        "committee_force": units.forces_to_wire(forces).tolist(),
        "committee_virial": units.virial_to_wire(virials).tolist(),
    }
