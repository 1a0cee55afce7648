"""Reference energies of the elements: fitted to what labels and potential disagree about before anything is trained.

Totals of two levels of theory differ by up to 1e4 eV an atom. What is linear in the composition is no matter of the network, exerts no
force, and is taken off in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from tumbaga.online.ports import Tuning
from tumbaga.online.records import Array, LabelledFrame
from tumbaga.online.training.dataset import composition

_SAME: Final = 1e-6  # compositions that differ by less, relatively, do not tell elements apart
_ATOMS: Final = 512  # in one batch


def untrained_energies(tuning: Tuning, data: Sequence[LabelledFrame]) -> Array:
    """Return what the module says now, without reference energies, shape (n_frames,), float64, eV."""
    found: list[float] = []
    for batch in _pieces(data):
        said = tuning.evaluate([tuning.prepare(one.frame) for one in batch], forces=False, create_graph=False)
        found += said.energies.double().tolist()
    return np.array(found)


def fitted(energies: Array, said: Array, counts: Array, start: Array) -> Array:
    """Return reference energies by least squares of the residuals: start + argmin |energies - said - counts (start + x)|, of least norm x.

    One composition alone determines only one sum of them; the least norm then shares the rest out by the number of atoms, which does no harm
    as long as the composition stays.

    Args:
        energies: of the labels, shape (n_frames,), float64, eV.
        said: of the potential without reference energies, shape (n_frames,), eV.
        counts: atoms of each element, shape (n_frames, n_elements).
        start: reference energies as they are, shape (n_elements,), eV.
    """
    found: Array = start + np.linalg.lstsq(counts, energies - said - counts @ start, rcond=_SAME)[0]
    return found


def reference_for(tuning: Tuning, elements: Sequence[int], data: Sequence[LabelledFrame]) -> Array:
    """Return reference energies for one data set under the weights as they are, shape (n_elements,), float64, eV."""
    if not data:
        return np.array(tuning.reference)
    counts = np.stack([composition(one.frame, elements) for one in data])
    energies = np.array([one.label.energy for one in data])
    return fitted(energies, untrained_energies(tuning, data), counts, tuning.reference)


def _pieces(data: Sequence[LabelledFrame]) -> list[list[LabelledFrame]]:
    found: list[list[LabelledFrame]] = [[]]
    for one in data:
        if found[-1] and sum(len(other.frame) for other in found[-1]) + len(one.frame) > _ATOMS:
            found.append([])
        found[-1].append(one)
    return found
