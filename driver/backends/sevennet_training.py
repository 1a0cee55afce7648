"""A SevenNet potential opened for training: its network and the readout of each element as one torch module; see ``sevennet_parts``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tumbaga.driver.backends.flat import Graph
from tumbaga.driver.backends.sevennet_parts import Parts, quiet
from tumbaga.online.ports import Trial
from tumbaga.online.records import Array, Frame

if TYPE_CHECKING:
    from tumbaga.driver.backends.sevennet import SevenNet

# constants of the model rather than weights, although torch calls them parameters
_CONSTANTS: Final = ("denominator", "basis_function.coeffs")
READOUT_SPREAD: Final = 0.1  # eV; of the readout weights of a network that starts from nothing


class Prepared(NamedTuple):
    """One frame: species, what the network calls them, and its pairs."""

    species: Tensor
    types: Tensor
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
            value.requires_grad_(not name.endswith(_CONSTANTS))
        self.readout = nn.Parameter(readout)

    def forward(self, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor, types: Tensor) -> Tensor:
        """Return the energy of each atom without its reference energy, shape (n_atoms,), eV; arguments as in `Prepared`."""
        data = {"x": types, "edge_vec": vectors, "edge_index": torch.stack([first, second])}
        features: Tensor = self.network(data)[self._key]
        return (features * self.readout[species]).sum(dim=1)


class SevenNetTuning:
    """Implements ``Tuning`` for SevenNet.

    Args:
        parts: of the model; its network is copied.
        readout: to start from, shape (n_elements, n_hidden), eV.
        reference: shape (n_elements,), eV.
        graph: makes the batch of one frame.
        finish: makes a potential of parts and facts.
    """

    def __init__(
        self,
        parts: Parts,
        readout: Tensor,
        reference: Array,
        graph: Callable[[Sequence[Frame]], Graph],
        finish: Callable[[Parts, Mapping[str, Any]], SevenNet],
    ) -> None:
        self.module, self.reference = Module(parts.network, parts.key, readout), reference
        self._parts, self._graph, self._finish = parts, graph, finish
        self._types, self._like = np.array(parts.types), self.module.readout

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See ``Tuning.groups``."""
        found: dict[str, list[str]] = {}
        for name, _ in self.module.named_parameters():
            found.setdefault(_group(name), []).append(name)
        return {group: tuple(names) for group, names in found.items()}

    def prepare(self, frame: Frame) -> Prepared:
        """Find the pairs of a frame of known elements."""
        graph = self._graph([frame])
        species, types, first, second = (
            torch.tensor(one, device=self._like.device) for one in (graph.species, self._types[graph.species], graph.first, graph.second)
        )
        return Prepared(species, types, first, second, torch.tensor(graph.vectors, dtype=self._like.dtype, device=self._like.device))

    def evaluate(self, prepared: Sequence[Prepared], *, forces: bool = True, virials: bool = False, create_graph: bool = True) -> Trial:
        """See ``Tuning.evaluate``."""
        sizes = [len(one.species) for one in prepared]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        first = torch.cat([one.first + start for one, start in zip(prepared, starts, strict=True)])
        second = torch.cat([one.second + start for one, start in zip(prepared, starts, strict=True)])
        species, types = torch.cat([one.species for one in prepared]), torch.cat([one.types for one in prepared])
        vectors = torch.cat([one.vectors for one in prepared])
        sloped = forces or virials
        with quiet(), torch.set_grad_enabled(sloped or create_graph):
            vectors = vectors.requires_grad_(sloped)
            atoms = self.module(vectors, first, second, species, types)
            energies = atoms.new_zeros(len(sizes)).index_add(0, self._repeated(sizes), atoms)
            if not sloped:
                return Trial(energies)
            (gradients,) = torch.autograd.grad(atoms.sum(), vectors, create_graph=create_graph)
        energies = energies if create_graph else energies.detach()
        pulls = gradients.new_zeros((len(species), 3)).index_add(0, first, gradients).index_add(0, second, gradients, alpha=-1)
        if not virials:
            return Trial(energies, pulls)
        each = -vectors[:, :, None] * gradients[:, None, :]
        strain = gradients.new_zeros((len(sizes), 3, 3)).index_add(0, self._repeated([len(one.first) for one in prepared]), each)
        return Trial(energies, pulls if forces else None, 0.5 * (strain + strain.transpose(1, 2)))

    def trained(self, reference: Array, facts: Mapping[str, Any]) -> SevenNet:
        """See ``Tuning.trained``."""
        network = copy.deepcopy(self.module.network).requires_grad_(False)
        readout = self.module.readout.detach().cpu().double().numpy().copy()
        parts = self._parts._replace(network=network, readout=readout, reference=np.array(reference, dtype=np.float64))
        return self._finish(parts, facts)

    def _repeated(self, sizes: Sequence[int]) -> Tensor:
        return torch.tensor(np.repeat(np.arange(len(sizes)), sizes), device=self._like.device)


def fresh(parts: Parts, seed: int, build: Callable[[], Any]) -> tuple[Parts, Array]:
    """Parts with a network of new weights, and readout weights; the random numbers of the process stay as they are.

    Args:
        parts: of the model whose shape is kept.
        seed: of the weights.
        build: makes the network anew.
    """
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        network = build()
        readout = torch.randn(parts.readout.shape).double().numpy() * READOUT_SPREAD
    return parts._replace(network=network), readout


def _group(name: str) -> str:
    """The part of the potential that a parameter is of: modules of a layer begin with its number."""
    if not name.startswith("network."):
        return "readout"
    module = name.split(".")[1]
    layer, _, _ = module.partition("_")
    if layer.isdigit():
        return f"interactions.{layer}"
    return "head" if module.startswith("reduce_") else "embedding"
