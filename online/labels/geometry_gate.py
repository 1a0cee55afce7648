"""The gate before any DFT: geometries whose label would be useless or would not converge. Pure; one sentence says why."""

from __future__ import annotations

import numpy as np

from tumbaga.online.guards import COVALENT_RADII, pair_distances
from tumbaga.online.records import Frame

FUSED_RATIO = 0.7  # of the sum of covalent radii, for every pair without an entry below
TORN_RATIO = 1.7  # an atom whose nearest neighbour is farther is torn off: O-H beyond 1.65 Å, Cu-Au beyond 4.6 Å
NOBLE = frozenset({2, 10, 18, 36, 54, 86})  # closed shells may be alone

# Å; measured on copper-gold/water: below, SCF fails or the forces are of no use. H-H stays at the general ratio, so that H2 is a molecule.
_COINAGE = (29, 47, 79)
_LIMITS: dict[tuple[int, int], float] = {(1, 8): 0.75}
_LIMITS |= {(1, metal): 1.3 for metal in _COINAGE} | {(8, metal): 1.6 for metal in _COINAGE}
_LIMITS |= {(one, other): 1.9 for one in _COINAGE for other in _COINAGE if one <= other}


def problem(frame: Frame) -> str | None:
    """Return why a frame must not be labelled, or None.

    Refused are fused pairs and single atoms torn off. A torn-off group of atoms (an OH, a metal dimer) is not recognised: the label
    engine reports the gap and the spin for that.
    """
    if len(frame) == 1:
        return None
    distances = pair_distances(frame)
    radii = COVALENT_RADII[frame.numbers]
    ratios = distances / (radii[:, None] + radii[None, :])
    # only pairs that could break a limit are looked up one by one; no limit is above this ratio
    for first, second in np.argwhere(np.triu(ratios < 0.9)):
        limit = _limit(int(frame.numbers[first]), int(frame.numbers[second]))
        if distances[first, second] < limit:
            return f"atoms {first} and {second} are {distances[first, second]:.2f} Å apart, nearer than {limit:.2f} Å"
    for atom, ratio in enumerate(ratios.min(axis=1)):
        if ratio > TORN_RATIO and int(frame.numbers[atom]) not in NOBLE:
            return f"atom {atom} is torn off: its nearest neighbour is {distances[atom].min():.2f} Å away"
    return None


def _limit(first: int, second: int) -> float:
    pair = (min(first, second), max(first, second))
    return _LIMITS.get(pair, FUSED_RATIO * float(COVALENT_RADII[first] + COVALENT_RADII[second]))
