"""A CHGNet potential opened for training: its network and the readout of each element as one torch module; see ``chgnet_parts``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from tumbaga.driver.backends.chgnet_net import Indices, Network, joined
from tumbaga.driver.backends.chgnet_parts import Parts
from tumbaga.driver.backends.guest_training import GuestTuning
from tumbaga.driver.backends.trial import Batch, tried
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import Trial
from tumbaga.online.records import Frame

if TYPE_CHECKING:
    from tumbaga.driver.backends.chgnet import CHGNet

_HEAD: Final = ("readout_norm", "mlp")


class Prepared(NamedTuple):
    """One frame: species, the vectors of its pairs, and its graph."""

    species: Tensor
    vectors: Tensor
    indices: Indices


class Module(nn.Module):
    """Network and readout as one thing to train.

    Args:
        network: it is copied.
        readout: shape (n_elements, n_hidden), eV.
    """

    def __init__(self, network: Network, readout: Tensor) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(True)
        self.readout = nn.Parameter(readout)

    def forward(self, vectors: Tensor, indices: Indices, species: Tensor) -> Tensor:
        """Return the energy of each atom without its reference energy, shape (n_atoms,), eV; arguments as in `Prepared`."""
        features: Tensor = self.network(vectors, indices)
        return (features * self.readout[species]).sum(dim=1)


class CHGNetTuning(GuestTuning[Parts, "CHGNet"]):
    """Implements ``Tuning`` for CHGNet.

    Args:
        parts: of the model; its network is copied.
        readout: to start from, shape (n_elements, n_hidden), eV.
        prepare: makes the graph of one frame.
        finish: makes a potential of parts.
    """

    def __init__(self, parts: Parts, readout: Tensor, prepare: Callable[[Frame], Prepared], finish: Callable[[Parts], CHGNet]) -> None:
        super().__init__(Module(parts.network, readout), parts, _group, finish)
        self.prepare = prepare

    def evaluate(self, prepared: Sequence[Prepared], *, forces: bool = True, virials: bool = False, create_graph: bool = True) -> Trial:
        """See ``Tuning.evaluate``."""
        indices = joined([one.indices for one in prepared])
        species = torch.cat([one.species for one in prepared])
        first, second = indices.pairs.unbind(dim=1)
        batch = Batch(
            first,
            second,
            vectors=torch.cat([one.vectors for one in prepared]),
            n_atoms=[len(one.species) for one in prepared],
            n_pairs=[len(one.vectors) for one in prepared],
        )
        return tried(lambda vectors: self.module(vectors, indices, species), batch, forces, virials, create_graph)


def with_elements(name: str, parts: Parts, like: Mapping[int, int]) -> Parts:
    """Parts in which some elements are copies of others: row of the embedding, block of the readout, reference energy.

    Args:
        name: of the potential, for the error.
        parts: of the model as it is; not changed.
        like: atomic number of an element, known or new, to a known one.

    Raises:
        PotentialError: an element to start from is not known, or the network has no row for a new one.
    """
    network = copy.deepcopy(parts.network)
    rows = network.atom_embedding.embedding.weight
    for new, old in like.items():
        pair = f"cannot start {chemical_symbols[new]} from {chemical_symbols[old]}"
        if old not in parts.elements:
            known = ", ".join(chemical_symbols[z] for z in parts.elements)
            raise PotentialError(name, f"{pair}, which it does not know; it knows {known}")
        if new > len(rows):
            raise PotentialError(name, f"{pair}: it has rows up to {chemical_symbols[len(rows)]} only")
    before = rows.detach().clone()  # a map is read at once: two elements may change places
    with torch.no_grad():
        for new, old in like.items():
            rows[new - 1] = before[old - 1]
    elements = tuple(sorted({*parts.elements, *like}))
    places = [parts.elements.index(like.get(z, z)) for z in elements]
    return parts._replace(network=network, elements=elements, readout=parts.readout[places], reference=parts.reference[places])


def _group(name: str) -> str:
    """The part of the potential that a parameter is of: layers of one number pass messages on together."""
    words = name.split(".")
    if words[0] == "readout":
        return "readout"
    if words[1].endswith("_layers"):
        return f"interactions.{words[2]}"
    return "head" if words[1] in _HEAD else "embedding"
