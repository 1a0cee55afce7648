"""The foundation models "sevennet:…" of the package sevenn, adapted to the ports of ``tumbaga.online.ports``.

    E = sum_i w[z_i] · f_i + sum_i e[z_i]

with features f of the network, a readout w and a reference energy e for each element (see ``sevennet_parts``); energies and forces are summed
up here, in float64. A model serves all its elements; it learns where a few of them are named ("?elements=Cu,Au,O,H"), since each has a block
of weights of its own, and the covariance of them all must fit into memory.

Source:
    Y. Park, J. Kim, S. Hwang, S. Han, J. Chem. Theory Comput. 20, 4857 (2024).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from tumbaga.driver.backends.flat import DTYPES, Graph, chosen_device, flattened, scattered, species_table
from tumbaga.driver.backends.painn_lists import Lists
from tumbaga.driver.backends.sevennet_files import wanted
from tumbaga.driver.backends.sevennet_parts import ARCHITECTURE, READOUT, REFERENCE, Parts, quiet, taken_apart, untrained
from tumbaga.driver.backends.sevennet_training import SevenNetTuning, fresh
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import ForceRows, PotentialSpec
from tumbaga.online.records import Array, Frame, Prediction

_PAIRS: Final = 4096  # of all tangents that are pushed through the network at once: more are slower on a CPU, and memory is finite


class SevenNet:
    """A SevenNet potential; implements ``Tunable``.

    Args:
        name: as the user wrote it.
        parts: of the model; its network is moved to the device and kept.
        learns: whether it has a readout to be learnt; otherwise it serves only.
        device: "cpu", "cuda", …, or "auto" for a GPU where there is one.
        dtype: "float32" or "float64", inside the network.

    Raises:
        PotentialError: there is no such device or dtype.
    """

    def __init__(self, name: str, parts: Parts, learns: bool, device: str = "cpu", dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise PotentialError(name, f"dtype {dtype!r} is not float32 or float64")
        self._device, self._dtype, self._parts = chosen_device(name, device), DTYPES[dtype], parts
        cutoff, self._width = float(parts.config["cutoff"]), parts.readout.shape[1]
        n_hidden = self._width if learns else 0
        mean_h2 = float(parts.facts.get("mean_h2", 0.0))
        self.spec = PotentialSpec(name, parts.elements, cutoff, n_hidden, parts.level, mean_h2, dtype=dtype, licence=parts.licence)
        self._network = parts.network.to(self._device, self._dtype)
        self._types = np.array(parts.types)
        self._table, self._lists = species_table(parts.elements), Lists(cutoff)

    def __repr__(self) -> str:
        learns = f"learns {''.join(chemical_symbols[z] for z in self.spec.elements)}" if self.spec.n_hidden else "serves only"
        return f"<SevenNet {self.spec.name} {learns} {str(self._dtype).removeprefix('torch.')} on {self._device}>"

    @property
    def metadata(self) -> dict[str, str]:
        """What a file of its tensors must say beside them: "architecture", and "hyper" (elements, model) and "facts" as JSON."""
        hyper = {"elements": self._parts.elements, "model": {key: one for key, one in self._parts.config.items() if _is_json(one)}}
        facts = {**self._parts.facts, "level": self.spec.level, "licence": self.spec.licence}
        return {"architecture": ARCHITECTURE, "hyper": json.dumps(hyper), "facts": json.dumps(facts)}

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Evaluate frames of any sizes as one batch; see ``Potential.predict``.

        Raises:
            UnknownElementError: a frame holds an element outside `spec.elements`.
        """
        if not frames:
            return []
        graph = self._graph(frames)
        weights = self._weights(graph, len(frames), readouts)
        features, gradients = self._run(graph, weights)
        energies = (features * weights).sum(axis=1) + self._parts.reference[graph.species]
        forces = scattered(graph, gradients)
        found = []
        for k in range(len(frames)):
            atoms, edges = slice(*graph.atoms[k : k + 2]), slice(*graph.edges[k : k + 2])
            strain = graph.vectors[edges].T @ gradients[edges]
            shown = features[atoms] if self.spec.n_hidden else None
            found.append(Prediction(float(energies[atoms].sum()), forces[atoms], -0.5 * (strain + strain.T), shown))
        return found

    def readout(self) -> Array:
        """Its own readout weights, shape (n_columns,), float64, eV, in element blocks; a copy."""
        return self._parts.readout.reshape(-1).copy() if self.spec.n_hidden else np.zeros(0)

    def force_rows(self, frame: Frame) -> ForceRows:
        """The linear model of one frame, in the dtype of `predict`; only blocks of present elements are not zero.

        Raises:
            UnknownElementError: the frame holds an element outside `spec.elements`.
        """
        if not self.spec.n_hidden:
            (said,) = self.predict([frame])
            return ForceRows(np.zeros(0), np.zeros((3 * len(frame), 0)), said.energy, said.forces)
        graph = self._graph([frame])
        features, slopes = self._jacobian(graph)
        blocks = (len(self.spec.elements), self._width)
        phi, rows = np.zeros(blocks), np.zeros((3 * len(frame), *blocks))
        for one in np.unique(graph.species):
            phi[one] = features[graph.species == one].sum(axis=0)
            rows[:, one] = -slopes[:, graph.species == one].sum(axis=1)
        fixed = float(self._parts.reference[graph.species].sum())
        return ForceRows(phi.reshape(-1), rows.reshape(len(rows), -1), fixed, np.zeros((len(frame), 3)))

    def state(self, readout: Array | None = None) -> dict[str, np.ndarray]:
        """All tensors by name: the network's in the dtype they run in, "readout" (its own or the given one) and "reference" in float64; copies."""
        own = {key: value.detach().cpu().numpy().copy() for key, value in self._network.state_dict().items()}
        given = self._parts.readout if readout is None or not self.spec.n_hidden else readout
        return {**own, READOUT: given.reshape(-1).copy(), REFERENCE: self._parts.reference.copy()}

    def tuning(self, seed: int | None = None) -> SevenNetTuning:
        """Open a copy for training, in the dtype and on the device of this one; see ``Tunable.tuning``.

        Raises:
            PotentialError: its elements are not named, and what was trained could not learn afterwards.
        """
        if not self.spec.n_hidden:
            raise PotentialError(self.spec.name, "is trained for named elements; write for example sevennet:7net-0?elements=Cu,Au,O,H")
        parts, readout, reference = self._parts, self._parts.readout, self._parts.reference.copy()
        if seed is not None:
            parts, readout = fresh(parts, seed, lambda: untrained(self.spec.name, parts).to(self._device, self._dtype))
            reference = np.zeros_like(reference)
        start = torch.tensor(readout, dtype=self._dtype, device=self._device)
        return SevenNetTuning(parts, start, reference, self._graph, self._finished)

    def with_elements(self, like: Mapping[int, int]) -> SevenNet:
        """Not possible: it knows 89 elements already, and each learns from its own weights.

        Raises:
            PotentialError: always.
        """
        raise PotentialError(self.spec.name, "has weights for 89 elements; name those you need with ?elements= instead of mapping one")

    def _finished(self, parts: Parts, facts: Mapping[str, Any]) -> SevenNet:
        held = {**parts.facts, **facts}
        made = parts._replace(facts=held, level=str(held.get("level", parts.level)))
        return SevenNet(self.spec.name, made, True, str(self._device), str(self._dtype).removeprefix("torch."))

    def _graph(self, frames: Sequence[Frame]) -> Graph:
        return flattened(self.spec.name, self.spec.elements, self._table, self._lists, frames)

    def _weights(self, graph: Graph, n_frames: int, readouts: Array | None) -> Array:
        """Readout weights of each atom, shape (n_atoms, n_hidden)."""
        if readouts is None or not self.spec.n_hidden:
            return self._parts.readout[graph.species]
        return np.asarray(readouts, dtype=np.float64).reshape(n_frames, -1, self._width)[graph.frame_of, graph.species]

    def _features(self, graph: Graph, vectors: Tensor) -> Tensor:
        """Features of all atoms, shape (n_atoms, n_hidden), of pairs with these vectors, shape (n_pairs, 3), Å."""
        data = {
            "x": torch.tensor(self._types[graph.species], device=self._device),
            "edge_vec": vectors,
            "edge_index": torch.tensor(np.stack([graph.first, graph.second]), device=self._device),
        }
        features: Tensor = self._network(data)[self._parts.key]
        return features

    def _run(self, graph: Graph, weights: Array) -> tuple[Array, Array]:
        """Features (n_atoms, n_hidden) and dE/dvectors (n_pairs, 3), float64, under the weights of each atom."""
        vectors = torch.tensor(graph.vectors, dtype=self._dtype, device=self._device).requires_grad_()
        features = self._features(graph, vectors)
        seed = torch.tensor(weights, dtype=self._dtype, device=self._device)
        (gradients,) = torch.autograd.grad(features, vectors, seed)
        return _numpy(features), _numpy(gradients)

    def _jacobian(self, graph: Graph) -> tuple[Array, Array]:
        """Features of one frame (n_atoms, n_hidden), and how they change with the positions (3 * n_atoms, n_atoms, n_hidden), per Å.

        By forward differentiation: it takes a pass for each coordinate, backwards it would take one for each column of the readout.
        """
        n_atoms, n_pairs = len(graph.species), len(graph.vectors)
        vectors = torch.tensor(graph.vectors, dtype=self._dtype, device=self._device)

        def features(moved: Tensor) -> Tensor:
            return self._features(graph, moved)

        def slope(tangent: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(features, (vectors,), (tangent,))[1]
            return found

        if not n_pairs:
            return _numpy(features(vectors)), np.zeros((3 * n_atoms, n_atoms, self._width))
        tangents = torch.tensor(_tangents(graph), dtype=self._dtype, device=self._device)
        with quiet():
            slopes = torch.func.vmap(slope, chunk_size=max(1, _PAIRS // n_pairs))(tangents)
        return _numpy(features(vectors)), _numpy(slopes)


def _tangents(graph: Graph) -> Array:
    """How the vectors of all pairs change with each coordinate, shape (3 * n_atoms, n_pairs, 3)."""
    found = np.zeros((len(graph.species), 3, len(graph.vectors), 3))
    pairs = np.arange(len(graph.vectors))
    for c in range(3):
        # one after the other: both ends of a pair may be images of one atom
        found[graph.second, c, pairs, c] += 1.0
        found[graph.first, c, pairs, c] -= 1.0
    return found.reshape(-1, len(graph.vectors), 3)


def load_backend(rest: str, device: str = "auto", dtype: str = "float32") -> SevenNet:
    """Load what follows "sevennet:" in a name; see ``sevennet_files``.

    Raises:
        PotentialError: the package is not installed, or the file is missing, damaged, or no model of one level of theory with a linear
            readout; the sentence says which.
    """
    asked = wanted(rest)
    parts, learns = taken_apart(asked)
    return SevenNet(asked.name, parts, learns, device, dtype)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
