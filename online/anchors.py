"""Where an update is not to go: pairs of atoms pressed together, which no run visits until something has gone wrong.

A readout fitted to frames of a run says nothing of such pairs, and may turn the wall between two atoms into a hole. The force rows of scans of
pairs, with the target "no change", are the closed form of replay (`last_layer.fit`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from itertools import combinations_with_replacement
from typing import Final

import numpy as np

from tumbaga.online.guards import COVALENT_RADII
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Array, Frame

RATIOS: Final = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)  # of the sum of covalent radii; bonds of a run are longer
SECONDS: Final = 3.0  # that the rows may cost, once for each network


def pair_rows(
    potential: Trainable, elements: Collection[int], seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
) -> Array:
    """Return the force rows along the line between two atoms, for all pairs of elements at all ratios.

    Args:
        potential: whose rows.
        elements: atomic numbers that occur.
        seconds: when they are over, pairs at further ratios are left out: first come all pairs at a middle one, then nearer and farther.
        clock: seconds.

    Returns:
        Shape (n_pairs, n_columns), float64, per Å; no rows for a potential that takes longer for the first than it may for all.
    """
    pairs = list(combinations_with_replacement(sorted(elements), 2))
    middle = float(np.mean(RATIOS))
    wanted = [(pair, ratio) for ratio in sorted(RATIOS, key=lambda ratio: abs(ratio - middle)) for pair in pairs]
    rows, until = [], clock() + seconds
    for pair, ratio in wanted:
        if clock() >= until:
            break
        numbers = np.array(pair)
        apart = ratio * float(COVALENT_RADII[numbers].sum())
        frame = Frame(numbers, np.array([[0.0, 0.0, 0.0], [apart, 0.0, 0.0]]))
        rows.append(potential.force_rows(frame).rows[3])  # the second atom along x
    return np.array(rows).reshape(-1, potential.spec.n_columns)
