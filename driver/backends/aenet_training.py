"""An ænet potential opened for training, made from nothing, and elements made of others.

The statistics of the descriptors are no parameters, nor are ænet's weights of species: a transferred potential keeps those of its origin,
and the learnt layers their meaning.

Source of the transfer mechanism:
    A. El Aisnada et al., arXiv 2408.12939 (keep the statistics and the energy scale, freeze layers).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from tumbaga.driver.backends.aenet_descriptors import Fingerprint
from tumbaga.driver.backends.aenet_files import FLAT, Basis, spins
from tumbaga.driver.backends.aenet_net import Hyper, Network
from tumbaga.driver.backends.aenet_parts import ARCHITECTURE, SPINS, Tensors
from tumbaga.driver.backends.flat import species_table
from tumbaga.driver.backends.painn_pairs import pairs
from tumbaga.driver.backends.trial import grouped, joined, tried
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import Trial
from tumbaga.online.records import Array, Frame

if TYPE_CHECKING:
    from tumbaga.driver.backends.aenet import Aenet

READOUT_SPREAD: Final = 0.1  # eV; of the readout weights of a network that starts from nothing
_STATISTICS: Final = ("average", "scale", "lowest", "highest")


class Prepared(NamedTuple):
    """The species and pairs of one frame."""

    species: Tensor
    first: Tensor
    second: Tensor
    vectors: Tensor


class Module(nn.Module):
    """Network and readout as one thing to train.

    The weights of the species are trained, too, where no order of species gives them: two that weigh the same, since one started as the
    other, must be able to part. Those of ænet stay as they are, so that what was ænet's stays ænet's.

    Args:
        network: its weights are taken over.
        readout: shape (n_elements, n_hidden), eV.
    """

    def __init__(self, network: Network, readout: Tensor) -> None:
        super().__init__()
        self.network = network.requires_grad_(True)
        if _free_weights(network.fingerprint):
            network.fingerprint.spins = nn.Parameter(network.fingerprint.spins)
        self.readout = nn.Parameter(readout)

    def forward(self, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor) -> Tensor:
        """Return the energy of each atom, shape (n_atoms,), eV, without reference; arguments as in ``Network.forward``."""
        features: Tensor = self.network(vectors, first, second, species)
        return (features * self.readout[species]).sum(dim=1)

    def tensors(self) -> Tensors:
        """All tensors by the names of a weights file, but "reference"; copies."""
        found = {key: value.detach().cpu().numpy().copy() for key, value in self.network.state_dict().items()}
        return {**found, "readout": self.readout.detach().cpu().numpy().reshape(-1).astype(np.float64)}


class AenetTuning:
    """Implements ``Tuning``.

    Args:
        network, readout: see `Module`; the readout gives dtype and device.
        reference: shape (n_elements,), eV.
        finish: makes a potential of tensors and facts.
    """

    def __init__(
        self, network: Network, readout: Tensor, reference: Array, finish: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], Aenet]
    ) -> None:
        self.hyper, self.module, self.reference, self._finish = network.hyper, Module(network, readout), reference, finish
        self._table = species_table(self.hyper.elements)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """See ``Tuning.groups``: "embedding" are the weights of species, "interactions.0" is the first hidden layer of all elements."""
        named = {f"network.{SPINS}": "embedding", "readout": "readout"}
        return dict(sorted(grouped(self.module, lambda name: named.get(name, f"interactions.{name.rpartition('.')[2]}")).items()))

    def prepare(self, frame: Frame) -> Prepared:
        """Find the pairs of a frame of known elements."""
        found, readout = pairs(frame, self.hyper.basis.radial_cutoff), self.module.readout
        species, first, second = (torch.tensor(a, device=readout.device) for a in (self._table[frame.numbers], found.first, found.second))
        return Prepared(species, first, second, torch.tensor(found.vectors, dtype=readout.dtype, device=readout.device))

    def evaluate(self, prepared: Sequence[Prepared], *, forces: bool = True, virials: bool = False, create_graph: bool = True) -> Trial:
        """See ``Tuning.evaluate``."""
        species, batch = joined(prepared)
        return tried(lambda vectors: self.module(vectors, batch.first, batch.second, species), batch, forces, virials, create_graph)

    def trained(self, reference: Array, facts: Mapping[str, Any]) -> Aenet:
        """See ``Tuning.trained``."""
        return self._finish({**self.module.tensors(), "reference": np.array(reference, dtype=np.float64)}, facts)


def _free_weights(fingerprint: Fingerprint) -> bool:
    """Whether there are weights of species that no order of species gives."""
    rows = fingerprint.spins.tolist()
    return fingerprint.weighted and any(len(set(row)) < len(row) or any(s % 1 for s in row) for row in rows)


def fresh(hyper: Hyper, seed: int) -> Tensors:
    """Tensors of a network that knows nothing, float64, without the statistics of its descriptors; the process keeps its random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {
            key: value.detach().double().numpy() for key, value in Network(hyper).state_dict().items() if key not in (*_STATISTICS, SPINS)
        }
        made["readout"] = torch.randn(len(hyper.elements) * hyper.n_hidden).double().numpy() * READOUT_SPREAD / hyper.members**0.5
    return {**made, "reference": np.zeros(len(hyper.elements))}


def created(
    frames: Sequence[Frame],
    elements: Sequence[int],
    basis: Basis | None = None,
    widths: Sequence[int] = (64, 64),
    members: int = 1,
    seed: int = 0,
) -> tuple[Tensors, dict[str, str]]:
    """Return tensors and metadata of a potential that knows nothing yet, for ``Aenet``; its layers are tanh.

    Args:
        frames: give the statistics of the descriptors.
        elements: atomic numbers; each must occur in the frames.
        basis: of the descriptors.
        widths: of the hidden layers.
        members: of the committee, each with weights of its own.
        seed: of the weights.

    Raises:
        PotentialError: an element does not occur.
    """
    known = tuple(sorted(set(elements)))
    order = [chemical_symbols[z] for z in known]
    each = len(known)
    weights = np.tile([spins(order)[s] for s in order], (each, 1))
    hyper = Hyper(known, basis or Basis(), each > 1, (tuple(widths),) * each, ((1,) * len(widths),) * each, members)
    facts = {"level": "", "licence": "", "mean_h2": 0.0, "environments": [order] * each, "atomic": [0.0] * each}
    metadata = {"architecture": ARCHITECTURE, "hyper": json.dumps(asdict(hyper)), "facts": json.dumps(facts)}
    return {**fresh(hyper, seed), SPINS: weights, **_statistics(hyper, weights, frames)}, metadata


def _statistics(hyper: Hyper, weights: Array, frames: Sequence[Frame]) -> Tensors:
    fingerprint, table = Fingerprint(hyper.basis, weights, hyper.weighted), species_table(hyper.elements)
    values, kinds = [], []
    for frame in (frame for frame in frames if set(frame.numbers) <= set(hyper.elements)):
        found, species = pairs(frame, hyper.basis.radial_cutoff), table[frame.numbers]
        values.append(fingerprint(*(torch.tensor(a) for a in (found.vectors, found.first, found.second, species))).numpy())
        kinds.append(species)
    made = {key: np.zeros((len(hyper.elements), hyper.n_descriptors)) for key in _STATISTICS}
    for k, z in enumerate(hyper.elements):
        if not any((kind == k).any() for kind in kinds):
            raise PotentialError("aenet:new", f"no frame holds {chemical_symbols[z]}, so the statistics of its descriptors are unknown")
        own = np.concatenate([value[kind == k] for value, kind in zip(values, kinds, strict=True)])
        deviation = own.std(axis=0)
        made["average"][k], made["lowest"][k], made["highest"][k] = own.mean(axis=0), own.min(axis=0), own.max(axis=0)
        made["scale"][k] = np.where(deviation > FLAT, 1.0 / np.maximum(deviation, FLAT), 0.0)
    return {key: np.repeat(value[None], hyper.members, axis=0) for key, value in made.items()}


def with_elements(
    name: str,
    hyper: Hyper,
    tensors: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
    like: Mapping[int, int],
    weights: Mapping[int, float],
    only: bool = False,
) -> tuple[Hyper, Tensors, dict[str, Any]]:
    """Return shape, tensors and facts of a potential in which some elements are copies of others; see ``Aenet.with_elements``.

    Args:
        name: of the potential, for the error.
        hyper, tensors, facts: of the potential as it is; not changed.
        like: atomic number of an element, known or new, to a known one.
        weights: of new elements as neighbours.
        only: whether elements that `like` does not name are left out.

    Raises:
        PotentialError: an element to start from is not known, or none is left.
    """
    for new, old in like.items():
        if old not in hyper.elements:
            known = ", ".join(chemical_symbols[z] for z in hyper.elements)
            told = f"cannot start {chemical_symbols[new]} from {chemical_symbols[old]}, which it does not know; it knows {known}"
            raise PotentialError(name, told if new != old else f"it does not know {chemical_symbols[new]}; it knows {known}")
    elements = tuple(sorted(like)) if only else tuple(sorted({*hyper.elements, *like}))
    if not elements:
        raise PotentialError(name, "a potential needs an element")
    centre = [hyper.elements.index(like.get(z, z)) for z in elements]
    seen = [hyper.elements.index(z if z in hyper.elements else like[z]) for z in elements]
    own = np.array(tensors[SPINS])[np.ix_(centre, seen)]
    for z, weight in weights.items():
        if z not in elements:
            raise PotentialError(name, f"a weight is given for {chemical_symbols[z]}, which it would not know")
        own[:, elements.index(z)] = weight
    made = replace(
        hyper,
        elements=elements,
        widths=tuple(hyper.widths[k] for k in centre),
        activations=tuple(hyper.activations[k] for k in centre),
    )
    return made, {**_copied(hyper, made, tensors, centre), SPINS: own}, _facts(facts, centre)


def _copied(hyper: Hyper, made: Hyper, tensors: Mapping[str, np.ndarray], centre: Sequence[int]) -> Tensors:
    found = {key: np.array(tensors[key][:, centre]) for key in _STATISTICS}
    for z, k in zip(made.elements, centre, strict=True):
        source = f"networks.{chemical_symbols[hyper.elements[k]]}."
        for key, value in tensors.items():
            if key.startswith(source):
                found[f"networks.{chemical_symbols[z]}.{key.removeprefix(source)}"] = np.array(value)
    blocks = tensors["readout"].reshape(len(hyper.elements), hyper.members, hyper.n_each)[centre, :, : made.n_each]
    return {**found, "readout": blocks.reshape(-1), "reference": np.array(tensors["reference"][centre])}


def _facts(facts: Mapping[str, Any], centre: Sequence[int]) -> dict[str, Any]:
    """Those that stand in the order of elements follow them."""
    return {**facts, **{key: [facts[key][k] for k in centre] for key in ("environments", "atomic") if key in facts}}


def described(metadata: Mapping[str, str], hyper: Hyper, facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a weights file with another shape and other facts; facts that are not named stay."""
    own = json.loads(metadata.get("facts", "{}"))
    return {**metadata, "hyper": json.dumps(asdict(hyper)), "facts": json.dumps({**own, **facts}, sort_keys=True)}
