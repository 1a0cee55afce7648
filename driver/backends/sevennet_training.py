"""A SevenNet potential opened for training: its network and the readout of each element as one torch module; see ``sevennet_parts``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tumbaga.driver.backends.guest import quiet
from tumbaga.driver.backends.guest_training import GuestTuning
from tumbaga.driver.backends.sevennet_parts import CONSTANTS, Parts
from tumbaga.driver.backends.trial import joined, tried
from tumbaga.online.ports import Trial
from tumbaga.online.records import Frame

if TYPE_CHECKING:
    from tumbaga.driver.backends.sevennet import SevenNet


class Prepared(NamedTuple):
    """The species and pairs of one frame."""

    species: Tensor
    first: Tensor
    second: Tensor
    vectors: Tensor


class Module(nn.Module):
    """Network and readout as one thing to train.

    Args:
        network: it is copied.
        key: of the features in what the network returns.
        readout: shape (n_elements, n_hidden), eV.
    """

    def __init__(self, network: Any, key: str, readout: Tensor) -> None:
        super().__init__()
        self.network, self._key = copy.deepcopy(network), key
        for name, value in self.network.named_parameters():
            value.requires_grad_(not name.endswith(CONSTANTS))
        self.readout = nn.Parameter(readout)

    def forward(self, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor, types: Tensor) -> Tensor:
        """Return the energy of each atom without its reference energy, shape (n_atoms,), eV.

        Args:
            vectors, first, second, species: see ``trial.Pairs``.
            types: what the network calls the species, shape (n_atoms,).
        """
        data = {"x": types, "edge_vec": vectors, "edge_index": torch.stack([first, second])}
        features: Tensor = self.network(data)[self._key]
        return (features * self.readout[species]).sum(dim=1)


class SevenNetTuning(GuestTuning[Parts, "SevenNet"]):
    """Implements ``Tuning`` for SevenNet.

    Args:
        parts: of the model; its network is copied.
        readout: to start from, shape (n_elements, n_hidden), eV.
        prepare: finds the pairs of one frame.
        finish: makes a potential of parts.
    """

    def __init__(self, parts: Parts, readout: Tensor, prepare: Callable[[Frame], Prepared], finish: Callable[[Parts], SevenNet]) -> None:
        super().__init__(Module(parts.network, parts.key, readout), parts, _group, finish)
        self.prepare, self._types = prepare, torch.tensor(parts.types, device=readout.device)

    def evaluate(self, prepared: Sequence[Prepared], *, forces: bool = True, virials: bool = False, create_graph: bool = True) -> Trial:
        """See ``Tuning.evaluate``."""
        species, batch = joined(prepared)
        fixed = batch.first, batch.second, species, self._types[species]
        with quiet():
            return tried(lambda vectors: self.module(vectors, *fixed), batch, forces, virials, create_graph)


def _group(name: str) -> str:
    """The part of the potential that a parameter is of: modules of a layer begin with its number."""
    if not name.startswith("network."):
        return "readout"
    module = name.split(".")[1]
    layer, _, _ = module.partition("_")
    if layer.isdigit():
        return f"interactions.{layer}"
    return "head" if module.startswith("reduce_") else "embedding"
