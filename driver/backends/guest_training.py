"""What the back ends of foreign packages share when they are opened for training: parts by name, new weights, the way back to a potential."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from tumbaga.driver.backends.guest import P, array_of, quiet
from tumbaga.driver.backends.trial import grouped
from tumbaga.online.ports import Tunable
from tumbaga.online.records import Array

READOUT_SPREAD: Final = 0.1  # eV; of the readout weights of a network that starts from nothing
G = TypeVar("G", bound=Tunable)


class GuestTuning(Generic[P, G]):
    """All of ``Tuning`` but what is a back end's own, `prepare` and `evaluate`.

    Args:
        module: has a "network" and a "readout", shape (n_elements, n_hidden), eV.
        parts: of the model.
        part: from the name of a parameter to the part of the potential that it is of.
        finish: makes a potential of parts.
    """

    def __init__(self, module: nn.Module, parts: P, part: Callable[[str], str], finish: Callable[[P], G]) -> None:
        self.module: Any = module
        self.reference = parts.reference.copy()
        self._parts, self._part, self._finish = parts, part, finish

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See ``Tuning.groups``."""
        return grouped(self.module, self._part)

    def trained(self, reference: Array, facts: Mapping[str, Any]) -> G:
        """See ``Tuning.trained``."""
        parts = self._parts._replace(
            network=copy.deepcopy(self.module.network).requires_grad_(False),
            readout=array_of(self.module.readout).copy(),
            reference=np.array(reference, dtype=np.float64),
            facts={**self._parts.facts, **facts},
        )
        return self._finish(parts)


def fresh(parts: P, seed: int, build: Callable[[], Any]) -> P:
    """Parts with new weights and reference energies of zero; the random numbers of the process stay as they are.

    Args:
        parts: of the model whose shape is kept.
        seed: of the weights.
        build: makes the network anew.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        network = build()
        readout = array_of(torch.randn(parts.readout.shape)) * READOUT_SPREAD
    return parts._replace(network=network, readout=readout, reference=np.zeros_like(parts.reference))
