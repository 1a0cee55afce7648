"""The embedded potential "painn:…": weights from a safetensors file, adapted to the ports of ``tumbaga.online.ports``.

    E = sum_i w[z_i] · f_i + sum_i e[z_i] + E_core

with features f from ``painn_net``, a readout w for each element, reference energies e and the core of ``painn_pairs``; the last two are
what the ports call the fixed part. The network runs in float32 by default; energies and forces are summed up in float64. On a CPU force
calls go through ``painn_step``, elsewhere through ``painn_net`` and autograd.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from ase.data import chemical_symbols
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tumbaga.driver.backends.flat import DTYPES, Graph, UnknownElementError, chosen_device, flattened, scattered, species_table
from tumbaga.driver.backends.painn_files import weights_file
from tumbaga.driver.backends.painn_lists import Lists
from tumbaga.driver.backends.painn_net import Hyper, Network
from tumbaga.driver.backends.painn_pairs import Core
from tumbaga.driver.backends.painn_rows import feature_jacobian
from tumbaga.driver.backends.painn_step import Step
from tumbaga.driver.backends.painn_training import Module, PaiNNTuning, described, fresh, with_elements
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import ForceRows, PotentialSpec
from tumbaga.online.records import Array, Frame, Prediction

__all__ = ["ARCHITECTURE", "DATA", "PaiNN", "UnknownElementError", "load", "load_backend"]

ARCHITECTURE: Final = "tumbaga-painn-1"
DATA: Final = Path(__file__).parent.parent / "data"
_READOUT, _REFERENCE = "readout", "reference"  # the tensors outside the network, float64


class PaiNN:
    """A PaiNN potential with a linear readout for each element; implements ``Tunable``.

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
        self.hyper, facts = _declared(name, metadata)
        self._device = chosen_device(name, device)
        self._dtype, self._dtype_name = DTYPES[dtype], dtype
        elements = self.hyper.elements
        self.spec = PotentialSpec(
            name=name,
            elements=elements,
            cutoff=self.hyper.cutoff,
            n_hidden=self.hyper.n_hidden,
            level=str(facts.get("level", "")),
            mean_h2=float(facts.get("mean_h2", 0.0)),
            dtype=dtype,
            licence=str(facts.get("licence", "")),
        )
        self._network = _filled(name, self.hyper, tensors).to(self._device, self._dtype)
        self._readout = _outside(name, tensors, _READOUT, self.spec.n_columns)
        self._reference = _outside(name, tensors, _REFERENCE, len(elements))
        self._core = Core(elements)
        self._lists = Lists(self.hyper.cutoff)
        self._species_of = species_table(elements)
        self._step = Step(self._network) if self._device.type == "cpu" else None
        self._exact: Network | None = None

    def __repr__(self) -> str:
        known = "".join(chemical_symbols[z] for z in self.hyper.elements)
        return f"<PaiNN {self.spec.name} {known} {self.hyper.channels}x{self.hyper.layers} {self._dtype_name} on {self._device}>"

    @property
    def metadata(self) -> dict[str, str]:
        """What the weights file says beside its tensors: "architecture", and "hyper" and "facts" as JSON. Write it into version files too."""
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
        blocks = np.broadcast_to(own, (len(frames), self.spec.n_columns)).reshape(len(frames), -1, self.hyper.n_hidden)
        weights = blocks[graph.frame_of, graph.species]
        features, gradients = self._run(graph, weights)
        core, core_gradients = self._core(graph.species[graph.first], graph.species[graph.second], graph.vectors)
        gradients += core_gradients
        forces = scattered(graph, gradients)
        energies = (features * weights).sum(axis=1) + self._reference[graph.species]
        found = []
        for k in range(len(frames)):
            atoms, edges = slice(*graph.atoms[k : k + 2]), slice(*graph.edges[k : k + 2])
            strain = graph.vectors[edges].T @ gradients[edges]
            energy = float(energies[atoms].sum() + core[edges].sum())
            found.append(Prediction(energy, forces[atoms], -0.5 * (strain + strain.T), features[atoms]))
        return found

    def readout(self) -> Array:
        """Its own readout weights, shape (n_columns,), float64, eV, in element blocks; a copy."""
        return self._readout.copy()

    def force_rows(self, frame: Frame) -> ForceRows:
        """The linear model of one frame, in float64 throughout whatever the dtype of `predict`; only blocks of present elements are not zero.

        Raises:
            UnknownElementError: the frame holds an element outside `spec.elements`.
        """
        graph = self._graph([frame])
        width = self.hyper.n_hidden
        features, slopes = self._jacobian(graph)
        phi, rows = np.zeros((len(self.hyper.elements), width)), np.zeros((3 * len(frame), len(self.hyper.elements), width))
        for one in np.unique(graph.species):
            phi[one] = features[graph.species == one].sum(axis=0)
            rows[:, one] = -slopes[:, graph.species == one].sum(axis=1).reshape(-1, width)
        core, core_gradients = self._core(graph.species[graph.first], graph.species[graph.second], graph.vectors)
        fixed = float(self._reference[graph.species].sum() + core.sum())
        return ForceRows(phi.reshape(-1), rows.reshape(len(rows), -1), fixed, scattered(graph, core_gradients))

    def state(self, readout: Array | None = None) -> dict[str, np.ndarray]:
        """All tensors by name: the network's in the dtype they run in, "readout" (its own or the given one) and "reference" in float64; copies."""
        own = {key: value.detach().cpu().numpy().copy() for key, value in self._network.state_dict().items()}
        return {**own, _READOUT: (self._readout if readout is None else readout).copy(), _REFERENCE: self._reference.copy()}

    def with_state(self, tensors: Mapping[str, np.ndarray]) -> PaiNN:
        """Return the same potential with other weights, e.g. those of a version file.

        Raises:
            PotentialError: a tensor is missing or has the wrong shape.
        """
        return PaiNN(self.spec.name, tensors, self._metadata, str(self._device), self._dtype_name)

    def tuning(self, seed: int | None = None) -> PaiNNTuning:
        """Open a copy for training, in the dtype and on the device of this one; see ``Tunable.tuning``."""
        tensors = self.state() if seed is None else fresh(self.hyper, seed)
        network = _filled(self.spec.name, self.hyper, tensors).to(self._device, self._dtype)
        readout = torch.tensor(tensors[_READOUT], dtype=self._dtype, device=self._device).reshape(len(self.hyper.elements), -1)
        return PaiNNTuning(self.hyper, Module(network, readout), tensors[_REFERENCE], self._finished)

    def with_elements(self, like: Mapping[int, int]) -> PaiNN:
        """Return a potential in which some elements start as others; see ``Tunable.with_elements``.

        Raises:
            PotentialError: an element to start from is not known.
        """
        hyper, tensors = with_elements(self.spec.name, self.hyper, self.state(), like)
        return PaiNN(self.spec.name, tensors, described(self._metadata, {}, hyper), str(self._device), self._dtype_name)

    def _finished(self, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> PaiNN:
        return PaiNN(self.spec.name, tensors, described(self._metadata, facts), str(self._device), self._dtype_name)

    def _graph(self, frames: Sequence[Frame]) -> Graph:
        return flattened(self.spec.name, self.hyper.elements, self._species_of, self._lists, frames)

    def _tensors(self, graph: Graph, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # torch.tensor copies into aligned memory: with unaligned borrowed memory the last bits may differ from process to process
        first, second, species = (torch.tensor(a, device=self._device) for a in (graph.first, graph.second, graph.species))
        return torch.tensor(graph.vectors, dtype=dtype, device=self._device).requires_grad_(), first, second, species

    def _run(self, graph: Graph, weights: Array) -> tuple[Array, Array]:
        """Features (n_atoms, n_hidden) and dE/dvectors (n_pairs, 3), both float64, of the network part under the weights of each atom.

        The slope of a pair may be shared between its two directions in any way.
        """
        if self._step is not None:
            said = self._step(graph.vectors, graph.first, graph.second, graph.species, weights)
            return said[0].astype(np.float64), said[1].astype(np.float64)
        vectors, first, second, species = self._tensors(graph, self._dtype)
        features = self._network(vectors, first, second, species)
        seed = torch.tensor(weights, dtype=self._dtype, device=self._device)
        (gradients,) = torch.autograd.grad(features, vectors, seed)
        return _numpy(features), _numpy(gradients)

    def _jacobian(self, graph: Graph) -> tuple[Array, Array]:
        """Features of one frame, and how they change with the positions (see ``feature_jacobian``); float64 arithmetic."""
        if self._exact is None:
            self._exact = copy.deepcopy(self._network).double()
        vectors, first, second, species = self._tensors(graph, torch.float64)
        features, slopes = feature_jacobian(self._exact, vectors, first, second, species)
        return _numpy(features), _numpy(slopes)


def load(name: str, device: str = "auto", dtype: str = "float32") -> PaiNN:
    """Load "painn:cuau-water" from the package, or "painn:/path/to/file.safetensors"; the prefix may be left out.

    Raises:
        PotentialError: the file is missing, damaged or of another architecture; the sentence says which.
    """
    rest = name.removeprefix("painn:")
    path, name = weights_file(rest), f"painn:{rest}"
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise PotentialError(
            name, f"the file {str(path)!r} cannot be read as safetensors; it is damaged or something else ({error})"
        ) from error
    return PaiNN(name, tensors, metadata, device, dtype)


def load_backend(rest: str, device: str = "auto", dtype: str = "float32") -> PaiNN:
    """What the registry calls with the part of the name after "painn:"; see `load`."""
    return load(rest, device, dtype)


def _declared(name: str, metadata: Mapping[str, str]) -> tuple[Hyper, dict[str, Any]]:
    found = metadata.get("architecture", "none given")
    if found != ARCHITECTURE:
        raise PotentialError(name, f"the file declares the architecture {found!r}, but this back end reads {ARCHITECTURE!r}")
    try:
        hyper = json.loads(metadata["hyper"])
        return Hyper(**{**hyper, "elements": tuple(hyper["elements"])}), json.loads(metadata.get("facts", "{}"))
    except (KeyError, TypeError, ValueError) as error:
        raise PotentialError(name, f"the metadata of the file are damaged ({error!r})") from error


def _filled(name: str, hyper: Hyper, tensors: Mapping[str, np.ndarray]) -> Network:
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
