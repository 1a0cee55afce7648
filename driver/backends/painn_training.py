"""The embedded potential opened for training: the network of ``painn_net`` and its readout as one torch module, and elements made of others.

    E - sum_i e[z_i] = sum_i w[z_i] · f_i + E_core

The serving path of ``painn`` runs in numpy on a CPU; here all is torch and differentiable twice. A test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tumbaga.driver.backends.flat import species_table
from tumbaga.driver.backends.painn_net import Hyper, Network
from tumbaga.driver.backends.painn_pairs import Core, pairs
from tumbaga.driver.backends.trial import joined, tried
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import Trial
from tumbaga.online.records import Array, Frame

if TYPE_CHECKING:
    from tumbaga.driver.backends.painn import PaiNN

READOUT_SPREAD: Final = 0.1  # eV; of the readout weights of a network that starts from nothing


class Prepared(NamedTuple):
    """One frame: its pairs, and what the core says of it."""

    species: Tensor
    first: Tensor
    second: Tensor
    vectors: Tensor
    core_energy: float
    core_forces: Tensor
    core_virial: Tensor


class Module(nn.Module):
    """Network and readout as one thing to train.

    The network keeps the filters of all layers in one tensor, because one product is faster than several. Here each layer has its own, so
    that a layer can be frozen.

    Args:
        network: its weights are taken over.
        readout: shape (n_elements, n_hidden), eV.
    """

    def __init__(self, network: Network, readout: Tensor) -> None:
        super().__init__()
        sizes = _filter_rows(network.hyper)
        self.filters = nn.ParameterList(nn.Parameter(part.detach().clone()) for part in torch.split(network.filters, sizes))
        del network.filters
        network.register_buffer("filters", torch.cat(list(self.filters)).detach(), persistent=False)
        self.network = network.requires_grad_(True)
        self.readout = nn.Parameter(readout)

    def forward(self, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor) -> Tensor:
        """Return the energy of each atom, shape (n_atoms,), eV, without reference and core; arguments as in ``Network.forward``."""
        parts = {"filters": torch.cat(list(self.filters))}
        features: Tensor = torch.func.functional_call(self.network, parts, (vectors, first, second, species))
        return (features * self.readout[species]).sum(dim=1)

    def tensors(self) -> dict[str, np.ndarray]:
        """All tensors by the names of a weights file, but "reference"; copies."""
        found = {key: value.detach().cpu().numpy().copy() for key, value in self.network.state_dict().items()}
        found["filters"] = torch.cat(list(self.filters)).detach().cpu().numpy().copy()
        return {**found, "readout": self.readout.detach().cpu().numpy().reshape(-1).astype(np.float64)}


class PaiNNTuning:
    """Implements ``Tuning`` for the embedded potential.

    Args:
        hyper: shape of the network.
        module: what is trained; its first parameter gives dtype and device.
        reference: shape (n_elements,), eV.
        finish: makes a potential of tensors and facts.
    """

    def __init__(
        self, hyper: Hyper, module: Module, reference: Array, finish: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], PaiNN]
    ) -> None:
        self.hyper, self.module, self.reference, self._finish = hyper, module, reference, finish
        self._like = module.readout
        self._core, self._table = Core(hyper.elements), species_table(hyper.elements)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See ``Tuning.groups``."""
        found: dict[str, list[str]] = {
            "embedding": [],
            **{f"interactions.{k}": [] for k in range(self.hyper.layers)},
            "head": [],
            "readout": [],
        }
        for name, _ in self.module.named_parameters():
            words = name.removeprefix("network.").split(".")
            layer = next((word for word in words if word.isdigit()), None)
            part = f"interactions.{layer}" if layer is not None else {"hidden": "head"}.get(words[0], words[0])
            found[part].append(name)
        return {part: tuple(names) for part, names in found.items()}

    def prepare(self, frame: Frame) -> Prepared:
        """Find the pairs of a frame of known elements, and what its core adds."""
        found, species = pairs(frame, self.hyper.cutoff), self._table[frame.numbers]
        energies, gradients = self._core(species[found.first], species[found.second], found.vectors)
        forces = np.zeros((len(frame), 3))
        np.add.at(forces, found.first, gradients)
        np.subtract.at(forces, found.second, gradients)
        virial = -(found.vectors.T @ gradients)
        first, second, kinds = (torch.tensor(one, device=self._like.device) for one in (found.first, found.second, species))
        return Prepared(
            kinds,
            first,
            second,
            self._floats(found.vectors),
            float(energies.sum()),
            self._floats(forces),
            self._floats(0.5 * (virial + virial.T)),
        )

    def evaluate(self, prepared: Sequence[Prepared], *, forces: bool = True, virials: bool = False, create_graph: bool = True) -> Trial:
        """See ``Tuning.evaluate``."""
        species, batch = joined(prepared)
        said = tried(lambda vectors: self.module(vectors, batch.first, batch.second, species), batch, forces, virials, create_graph)
        return Trial(
            said.energies + self._floats([one.core_energy for one in prepared]),
            None if said.forces is None else said.forces + torch.cat([one.core_forces for one in prepared]),
            None if said.virials is None else said.virials + torch.stack([one.core_virial for one in prepared]),
        )

    def trained(self, reference: Array, facts: Mapping[str, Any]) -> PaiNN:
        """See ``Tuning.trained``."""
        return self._finish({**self.module.tensors(), "reference": np.array(reference, dtype=np.float64)}, facts)

    def _floats(self, value: Any) -> Tensor:
        return torch.tensor(np.asarray(value), dtype=self._like.dtype, device=self._like.device)


def fresh(hyper: Hyper, seed: int) -> dict[str, np.ndarray]:
    """Tensors of a network that knows nothing, float64; the random numbers of the process stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {key: value.detach().double().numpy() for key, value in Network(hyper).state_dict().items()}
        made["readout"] = torch.randn(len(hyper.elements) * hyper.n_hidden).double().numpy() * READOUT_SPREAD
    return {**made, "reference": np.zeros(len(hyper.elements))}


def with_elements(
    name: str, hyper: Hyper, tensors: Mapping[str, np.ndarray], like: Mapping[int, int]
) -> tuple[Hyper, dict[str, np.ndarray]]:
    """Return shape and tensors of a network in which some elements are copies of others: row of the embedding, block of the readout, reference.

    Args:
        name: of the potential, for the error.
        hyper, tensors: of the network as it is; not changed. Further tensors than the network has are left out.
        like: atomic number of an element, known or new, to a known one.

    Raises:
        PotentialError: an element to start from is not known.
    """
    from ase.data import chemical_symbols

    for new, old in like.items():
        if old not in hyper.elements:
            known = ", ".join(chemical_symbols[z] for z in hyper.elements)
            raise PotentialError(
                name, f"cannot start {chemical_symbols[new]} from {chemical_symbols[old]}, which it does not know; it knows {known}"
            )
    elements = tuple(sorted({*hyper.elements, *like}))
    rows = [hyper.elements.index(like.get(z, z)) for z in elements]
    made = {key: np.array(tensors[key]) for key in fresh(hyper, 0)}
    made["embedding"] = made["embedding"][rows]
    made["readout"] = made["readout"].reshape(len(hyper.elements), -1)[rows].reshape(-1)
    made["reference"] = made["reference"][rows]
    return replace(hyper, elements=elements), made


def described(metadata: Mapping[str, str], facts: Mapping[str, Any], hyper: Hyper | None = None) -> dict[str, str]:
    """Return the metadata of a weights file with other facts, and another shape if one is given; facts that are not named stay."""
    own = json.loads(metadata.get("facts", "{}"))
    shape = {} if hyper is None else {"hyper": json.dumps(asdict(hyper))}  # else to the letter what it was: versions are compared by it
    return {**metadata, **shape, "facts": json.dumps({**own, **facts}, sort_keys=True)}


def _filter_rows(hyper: Hyper) -> list[int]:
    return [2 * hyper.channels] + [3 * hyper.channels] * (hyper.layers - 1)
