"""The potentials "aenet:…": Chebyshev fingerprints and a network for each element, adapted to the ports of ``tumbaga.online.ports``.

    E = sum_i w[z_i] · f_i + sum_i e[z_i]

with features f of ``aenet_net``, a readout w and a reference energy e for each element (``aenet_parts`` says how they follow from the
files of ænet). What is served is the mean of a committee's members. The network runs in float32 by default; energies and forces are
summed up in float64.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tumbaga.driver.backends.aenet_files import ElementNetwork, read_network, write_network
from tumbaga.driver.backends.aenet_names import SUFFIX, files
from tumbaga.driver.backends.aenet_net import Hyper, Network
from tumbaga.driver.backends.aenet_parts import ARCHITECTURE, apart, joined
from tumbaga.driver.backends.aenet_rows import slopes
from tumbaga.driver.backends.aenet_training import AenetTuning, described, fresh, with_elements
from tumbaga.driver.backends.flat import DTYPES, Graph, chosen_device, flattened, scattered, species_table
from tumbaga.driver.backends.painn_lists import Lists
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import ForceRows, PotentialSpec
from tumbaga.online.records import Array, Frame, Prediction

_READOUT, _REFERENCE = "readout", "reference"  # the tensors outside the network, float64


class Aenet:
    """An ænet potential, or the mean of a committee of them; implements ``Tunable``.

    Args:
        name: as the user wrote it.
        tensors: the network's tensors, "readout" (n_columns,) and "reference" (n_elements,), eV; further ones are ignored, so that a
            version file, which holds more, can be loaded as it is.
        metadata: of the weights file; see `metadata`.
        device: "cpu", "cuda", …, or "auto" for a GPU where there is one.
        dtype: "float32" or "float64", inside the network.

    Raises:
        PotentialError: a tensor is missing or has the wrong shape, or the metadata are not of this architecture.
    """

    def __init__(
        self, name: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], device: str = "cpu", dtype: str = "float32"
    ) -> None:
        if dtype not in DTYPES:
            raise PotentialError(name, f"dtype {dtype!r} is not float32 or float64")
        self._metadata = dict(metadata)
        self.hyper, self._facts = _declared(name, metadata)
        self._device, self._dtype, self._dtype_name = chosen_device(name, device), DTYPES[dtype], dtype
        self.spec = PotentialSpec(
            name=name,
            elements=self.hyper.elements,
            cutoff=self.hyper.basis.radial_cutoff,
            n_hidden=self.hyper.n_hidden,
            level=str(self._facts.get("level", "")),
            mean_h2=float(self._facts.get("mean_h2", 0.0)),
            dtype=dtype,
            licence=str(self._facts.get("licence", "")),
        )
        self._network = _filled(name, self.hyper, tensors).to(self._device, self._dtype)
        self._readout = _outside(name, tensors, _READOUT, self.spec.n_columns)
        self._reference = _outside(name, tensors, _REFERENCE, len(self.hyper.elements))
        self._lists, self._table = Lists(self.spec.cutoff), species_table(self.hyper.elements)
        self._exact: Network | None = None

    def __repr__(self) -> str:
        known = "".join(chemical_symbols[z] for z in self.hyper.elements)
        members = f" {self.hyper.members} members" if self.hyper.members > 1 else ""
        return f"<Aenet {self.spec.name} {known}{members} {self._dtype_name} on {self._device}>"

    @property
    def metadata(self) -> dict[str, str]:
        """What a weights file says beside its tensors: "architecture", and "hyper" and "facts" as JSON. Write it into version files too."""
        return dict(self._metadata)

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Evaluate frames of any sizes as one batch; see ``Potential.predict``.

        Raises:
            UnknownElementError: a frame holds an element outside `spec.elements`.
        """
        if not frames:
            return []
        graph = self._graph(frames)
        own = self._readout[None] if readouts is None else np.asarray(readouts, dtype=np.float64)
        blocks = np.broadcast_to(own, (len(frames), self.spec.n_columns)).reshape(len(frames), -1, self.spec.n_hidden)
        weights = blocks[graph.frame_of, graph.species]
        features, gradients = self._run(graph, weights)
        forces = scattered(graph, gradients)
        energies = (features * weights).sum(axis=1) + self._reference[graph.species]
        found = []
        for k in range(len(frames)):
            atoms, edges = slice(*graph.atoms[k : k + 2]), slice(*graph.edges[k : k + 2])
            strain = graph.vectors[edges].T @ gradients[edges]
            found.append(Prediction(float(energies[atoms].sum()), forces[atoms], -0.5 * (strain + strain.T), features[atoms]))
        return found

    def readout(self) -> Array:
        """Its own readout weights, shape (n_columns,), float64, eV, in element blocks of all members; a copy."""
        return self._readout.copy()

    def member_readouts(self) -> Array:
        """Readouts under which a frame is served by one member alone, shape (n_members, n_columns), float64, eV; their mean is `readout`.

        Members share the reference energies: their energies differ by what their networks say, forces are those of the members' own files.
        """
        members = self.hyper.members
        found = np.zeros((members, len(self.hyper.elements), members, self.hyper.n_each))
        for m, block in enumerate(self._readout.reshape(found.shape[1:]).swapaxes(0, 1)):
            found[m, :, m] = members * block
        return found.reshape(members, -1)

    def force_rows(self, frame: Frame) -> ForceRows:
        """The linear model of one frame, in float64 whatever the dtype of `predict`; only blocks of present elements are not zero.

        Raises:
            UnknownElementError: the frame holds an element outside `spec.elements`.
        """
        graph = self._graph([frame])
        if self._exact is None:
            self._exact = copy.deepcopy(self._network).double()
        vectors, first, second, species = self._tensors(graph, torch.float64)
        features, along = slopes(self._exact, vectors, first, second, species)
        blocks, width = len(self.hyper.elements), self.spec.n_hidden
        phi = features.new_zeros(blocks, width).index_add(0, species, features)
        rows, looking = features.new_zeros(len(frame) * blocks, 3, width), species[first]
        rows.index_add_(0, first * blocks + looking, along).index_add_(0, second * blocks + looking, along, alpha=-1.0)
        rows = rows.view(len(frame), blocks, 3, width).transpose(1, 2).reshape(3 * len(frame), -1)
        fixed = float(self._reference[graph.species].sum())
        return ForceRows(_numpy(phi).reshape(-1), _numpy(rows), fixed, np.zeros((len(frame), 3)))

    def state(self, readout: Array | None = None) -> dict[str, np.ndarray]:
        """All tensors by name, copies: the network's in its dtype, "readout" (its own or the given one) and "reference" in float64."""
        own = {key: value.detach().cpu().numpy().copy() for key, value in self._network.state_dict().items()}
        return {**own, _READOUT: (self._readout if readout is None else readout).copy(), _REFERENCE: self._reference.copy()}

    def networks(self) -> tuple[tuple[ElementNetwork, ...], ...]:
        """Return the networks of each member as ænet keeps them, one an element.

        Raises:
            PotentialError: ænet could not express the weights of its species.
        """
        return apart(self.spec.name, self.hyper, self.state(), self._facts)

    def write(self, folder: str | Path) -> None:
        """Write a file "El.nn.ascii" for each element into the folder; of a committee, into a folder "member-1", … for each member there.

        Raises:
            PotentialError: ænet could not express the weights of its species.
        """
        members = self.networks()
        for number, networks in enumerate(members, 1):
            into = Path(folder) / f"member-{number}" if len(members) > 1 else Path(folder)
            into.mkdir(parents=True, exist_ok=True)
            for one in networks:
                write_network(into / f"{one.element}{SUFFIX}", one)

    def tuning(self, seed: int | None = None) -> AenetTuning:
        """Open a copy for training, in the dtype and on the device of this one; see ``Tunable.tuning``.

        New weights come with the old statistics of the descriptors. A committee is trained as a whole, on its mean: to keep its members
        different, train each by itself and put their `networks` together (``from_networks``).
        """
        tensors = self.state() if seed is None else {**self.state(), **fresh(self.hyper, seed)}
        network = _filled(self.spec.name, self.hyper, tensors).to(self._device, self._dtype)
        readout = torch.tensor(tensors[_READOUT], dtype=self._dtype, device=self._device).reshape(len(self.hyper.elements), -1)
        return AenetTuning(network, readout, tensors[_REFERENCE], self._finished)

    def with_elements(self, like: Mapping[int, int], weights: Mapping[int, float] | None = None) -> Aenet:
        """Return a potential in which some elements start as others; see ``Tunable.with_elements``.

        Args:
            like: atomic number of an element, known or not, to a known one: copied are network, statistics, readout and reference energy.
            weights: of new elements as neighbours, in place of that of the element they start as. With that one's weight neighbours of
                both are the same to all networks, until training parts them.

        Raises:
            PotentialError: an element to start from is not known.
        """
        hyper, tensors, facts = with_elements(self.spec.name, self.hyper, self.state(), self._facts, like, weights or {})
        return Aenet(self.spec.name, tensors, described(self._metadata, hyper, facts), str(self._device), self._dtype_name)

    def with_only(self, elements: Sequence[int]) -> Aenet:
        """Return the same potential for fewer elements.

        Raises:
            PotentialError: an element is not known, or there is none.
        """
        hyper, tensors, facts = with_elements(
            self.spec.name, self.hyper, self.state(), self._facts, {z: z for z in elements}, {}, only=True
        )
        return Aenet(self.spec.name, tensors, described(self._metadata, hyper, facts), str(self._device), self._dtype_name)

    def _finished(self, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Aenet:
        return Aenet(self.spec.name, tensors, described(self._metadata, self.hyper, facts), str(self._device), self._dtype_name)

    def _graph(self, frames: Sequence[Frame]) -> Graph:
        return flattened(self.spec.name, self.hyper.elements, self._table, self._lists, frames)

    def _tensors(self, graph: Graph, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first, second, species = (torch.tensor(a, device=self._device) for a in (graph.first, graph.second, graph.species))
        return torch.tensor(graph.vectors, dtype=dtype, device=self._device), first, second, species

    def _run(self, graph: Graph, weights: Array) -> tuple[Array, Array]:
        """Features (n_atoms, n_hidden) and dE/dvectors (n_pairs, 3), both float64, under the weights of each atom."""
        vectors, first, second, species = self._tensors(graph, self._dtype)
        features = self._network(vectors.requires_grad_(), first, second, species)
        seed = torch.tensor(weights, dtype=self._dtype, device=self._device)
        (gradients,) = torch.autograd.grad(features, vectors, seed)
        return _numpy(features), _numpy(gradients)


def from_networks(name: str, members: Sequence[Sequence[ElementNetwork]], device: str = "auto", dtype: str = "float32") -> Aenet:
    """Make a potential of networks of single elements: for each member of a committee, those of all elements.

    Raises:
        PotentialError: they do not belong together; the sentence says why.
    """
    tensors, metadata = joined(name, members)
    return Aenet(name, tensors, metadata, device, dtype)


def load_backend(rest: str, device: str = "auto", dtype: str = "float32") -> Aenet:
    """Load what follows "aenet:" in a name; see ``aenet_names``.

    Raises:
        PotentialError: a file is missing, damaged or of another kind; the sentence says which.
    """
    name, members = f"aenet:{rest}", files(rest)
    path = members[0][0]
    if path.name.endswith(SUFFIX):
        return from_networks(name, [[read_network(one) for one in member] for member in members], device, dtype)
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise PotentialError(
            name, f"the file {str(path)!r} cannot be read as safetensors; it is damaged or something else ({error})"
        ) from error
    return Aenet(name, tensors, metadata, device, dtype)


def _declared(name: str, metadata: Mapping[str, str]) -> tuple[Hyper, dict[str, Any]]:
    found = metadata.get("architecture", "none given")
    if found != ARCHITECTURE:
        raise PotentialError(name, f"the file declares the architecture {found!r}, but this back end reads {ARCHITECTURE!r}")
    try:
        return Hyper.of(json.loads(metadata["hyper"])), json.loads(metadata.get("facts", "{}"))
    except (KeyError, TypeError, ValueError) as error:
        raise PotentialError(name, f"the metadata of the file are damaged ({error!r})") from error


def _filled(name: str, hyper: Hyper, tensors: Mapping[str, np.ndarray]) -> Network:
    with torch.random.fork_rng(devices=[]):  # its first weights are thrown away; loading must not cost the process random numbers
        network = Network(hyper)
    own = network.state_dict()
    missing = sorted(set(own) - set(tensors))
    if missing:
        raise PotentialError(name, f"the file lacks the tensor {missing[0]!r}")
    for key, value in own.items():
        if tuple(value.shape) != tensors[key].shape:
            raise PotentialError(name, f"the tensor {key!r} has shape {tensors[key].shape}, expected {tuple(value.shape)}")
    # float64 first, so that float64 weights survive a float64 load
    network.double().load_state_dict({key: torch.tensor(tensors[key], dtype=torch.float64) for key in own})
    return network.requires_grad_(False)


def _outside(name: str, tensors: Mapping[str, np.ndarray], key: str, size: int) -> Array:
    if key not in tensors or tensors[key].shape != (size,):
        raise PotentialError(name, f"the file lacks the tensor {key!r} of {size} numbers")
    return np.array(tensors[key], dtype=np.float64)


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
