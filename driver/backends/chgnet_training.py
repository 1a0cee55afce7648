"""A CHGNet potential opened for training: its network and the readout of each element as one torch module; see ``chgnet_parts``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from tumbaga.driver.backends.chgnet_net import Indices, Network, joined
from tumbaga.driver.backends.chgnet_parts import Parts
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import Trial
from tumbaga.online.records import Array, Frame

if TYPE_CHECKING:
    from tumbaga.driver.backends.chgnet import CHGNet

READOUT_SPREAD: Final = 0.1  # eV; of the readout weights of a network that starts from nothing
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


class CHGNetTuning:
    """Implements ``Tuning`` for CHGNet.

    Args:
        parts: of the model; its network is copied.
        readout: to start from, shape (n_elements, n_hidden), eV.
        prepare: makes the graph of one frame.
        finish: makes a potential of parts.
    """

    def __init__(self, parts: Parts, readout: Tensor, prepare: Callable[[Frame], Prepared], finish: Callable[[Parts], CHGNet]) -> None:
        self.module, self.reference = Module(parts.network, readout), parts.reference.copy()
        self.prepare = prepare
        self._parts, self._finish = parts, finish

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See ``Tuning.groups``."""
        found: dict[str, list[str]] = {}
        for name, _ in self.module.named_parameters():
            found.setdefault(_group(name), []).append(name)
        return {group: tuple(names) for group, names in found.items()}

    def evaluate(self, prepared: Sequence[Prepared], *, forces: bool = True, virials: bool = False, create_graph: bool = True) -> Trial:
        """See ``Tuning.evaluate``."""
        indices = joined([one.indices for one in prepared])
        species, vectors = torch.cat([one.species for one in prepared]), torch.cat([one.vectors for one in prepared])
        sizes = [len(one.species) for one in prepared]
        sloped = forces or virials
        with torch.set_grad_enabled(sloped or create_graph):
            vectors = vectors.requires_grad_(sloped)
            atoms = self.module(vectors, indices, species)
            energies = atoms.new_zeros(len(sizes)).index_add(0, _repeated(sizes, atoms), atoms)
            if not sloped:
                return Trial(energies)
            (gradients,) = torch.autograd.grad(atoms.sum(), vectors, create_graph=create_graph)
        energies = energies if create_graph else energies.detach()
        first, second = indices.pairs.unbind(dim=1)
        pulls = gradients.new_zeros((len(species), 3)).index_add(0, first, gradients).index_add(0, second, gradients, alpha=-1)
        if not virials:
            return Trial(energies, pulls)
        each = -vectors.detach()[:, :, None] * gradients[:, None, :]
        of_pairs = _repeated([len(one.vectors) for one in prepared], atoms)
        strain = gradients.new_zeros((len(sizes), 3, 3)).index_add(0, of_pairs, each)
        return Trial(energies, pulls if forces else None, 0.5 * (strain + strain.transpose(1, 2)))

    def trained(self, reference: Array, facts: Mapping[str, Any]) -> CHGNet:
        """See ``Tuning.trained``."""
        network = copy.deepcopy(self.module.network).requires_grad_(False)
        readout = self.module.readout.detach().cpu().double().numpy().copy()
        held = {**self._parts.facts, **facts}
        return self._finish(
            self._parts._replace(network=network, readout=readout, reference=np.array(reference, dtype=np.float64), facts=held)
        )


def fresh(parts: Parts, seed: int, build: Callable[[], Network]) -> Parts:
    """Parts with new weights and reference energies of zero; the random numbers of the process stay as they are.

    Args:
        parts: of the model whose shape is kept.
        seed: of the weights.
        build: makes the network anew.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build()
        readout = torch.randn(parts.readout.shape).double().numpy() * READOUT_SPREAD
    return parts._replace(network=network, readout=readout, reference=np.zeros_like(parts.reference))


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


def _repeated(sizes: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(np.repeat(np.arange(len(sizes)), sizes), device=like.device)
