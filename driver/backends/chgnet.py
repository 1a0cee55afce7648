"""The foundation models "chgnet:…" of the package chgnet, adapted to the ports of ``tumbaga.online.ports``.

    E = sum_i w[z_i] · f_i + sum_i e[z_i]

with features f of the network (``chgnet_net``), a readout w and a reference energy e for each element (``chgnet_parts``); energies and forces
are summed up here, in float64. A model serves all its elements; it learns where a few of them are named ("?elements=Cu,Au,O,H"), since each
has a block of weights of its own, and the covariance of them all must fit into memory.

Source:
    B. Deng, P. Zhong, K. Jun, J. Riebesell, K. Han, C. J. Bartel, G. Ceder, Nat. Mach. Intell. 5, 1031 (2023).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from tumbaga.driver.backends.chgnet_files import wanted
from tumbaga.driver.backends.chgnet_net import Indices, Network
from tumbaga.driver.backends.chgnet_parts import ARCHITECTURE, READOUT, REFERENCE, Parts, quiet, taken_apart, untrained
from tumbaga.driver.backends.chgnet_training import CHGNetTuning, Prepared, fresh, with_elements
from tumbaga.driver.backends.flat import DTYPES, Graph, chosen_device, flattened, scattered, species_table
from tumbaga.driver.backends.painn_lists import Lists
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import ForceRows, PotentialSpec
from tumbaga.online.records import Array, Frame, Ints, Prediction

_LINES: Final = 32768  # pairs and angles of all tangents that are pushed through the network at once: memory is finite


class CHGNet:
    """A CHGNet potential; implements ``Tunable``.

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
        cutoff, self._width = parts.network.cutoff, parts.readout.shape[1]
        self.spec = PotentialSpec(
            name=name,
            elements=parts.elements,
            cutoff=cutoff,
            n_hidden=self._width if learns else 0,
            level=str(parts.facts.get("level", "")),
            mean_h2=float(parts.facts.get("mean_h2", 0.0)),
            dtype=dtype,
            licence=str(parts.facts.get("licence", "")),
        )
        self._network = parts.network.to(self._device, self._dtype)
        self._numbers = np.array(parts.elements)
        self._table, self._lists = species_table(parts.elements), Lists(cutoff)

    def __repr__(self) -> str:
        learns = f"learns {''.join(chemical_symbols[z] for z in self.spec.elements)}" if self.spec.n_hidden else "serves only"
        return f"<CHGNet {self.spec.name} {learns} {self.spec.dtype} on {self._device}>"

    @property
    def metadata(self) -> dict[str, str]:
        """What a file of its tensors must say beside them: "architecture", and "hyper" (elements, model) and "facts" as JSON."""
        hyper = {"elements": self._parts.elements, "model": self._parts.config}
        return {"architecture": ARCHITECTURE, "hyper": json.dumps(hyper), "facts": json.dumps(self._parts.facts)}

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
        blocks = (len(self.spec.elements), self._width)
        phi, rows = np.zeros(blocks), np.zeros((3 * len(frame), *blocks))
        present = np.unique(graph.species)
        # one pass forwards for each coordinate, or one backwards for each column: either costs about the same
        fill = self._rows_forwards if 3 * len(frame) <= self._width * len(present) else self._rows_backwards
        fill(graph, present, phi, rows)
        fixed = float(self._parts.reference[graph.species].sum())
        return ForceRows(phi.reshape(-1), rows.reshape(len(rows), -1), fixed, np.zeros((len(frame), 3)))

    def state(self, readout: Array | None = None) -> dict[str, np.ndarray]:
        """All tensors by name: the network's in the dtype they run in, "readout" (its own or the given one) and "reference" in float64; copies."""
        own = {key: value.detach().cpu().numpy().copy() for key, value in self._network.state_dict().items()}
        given = self._parts.readout if readout is None or not self.spec.n_hidden else readout
        return {**own, READOUT: given.reshape(-1).copy(), REFERENCE: self._parts.reference.copy()}

    def tuning(self, seed: int | None = None) -> CHGNetTuning:
        """Open a copy for training, in the dtype and on the device of this one; see ``Tunable.tuning``.

        Raises:
            PotentialError: its elements are not named, and what was trained could not learn afterwards.
        """
        if not self.spec.n_hidden:
            raise PotentialError(self.spec.name, "is trained for named elements; write for example chgnet:0.3.0?elements=Cu,Au,O,H")
        parts = self._parts if seed is None else fresh(self._parts, seed, self._untrained)
        return CHGNetTuning(parts, torch.tensor(parts.readout, dtype=self._dtype, device=self._device), self._prepared, self._finished)

    def with_elements(self, like: Mapping[int, int]) -> CHGNet:
        """Return a potential in which some elements start as others; see ``Tunable.with_elements``.

        Raises:
            PotentialError: its elements are not named, an element to start from is not known, or the network has no row for a new one.
        """
        if not self.spec.n_hidden:
            raise PotentialError(
                self.spec.name, "knows its elements from the start; name those that are to change, as in ?elements=Cu,Au,O,H"
            )
        return self._finished(with_elements(self.spec.name, self._parts, like))

    def _untrained(self) -> Network:
        return untrained(self.spec.name, self._parts).to(self._device, self._dtype)

    def _prepared(self, frame: Frame) -> Prepared:
        graph = self._graph([frame])
        return Prepared(torch.tensor(graph.species, device=self._device), *self._inputs(graph))

    def _finished(self, parts: Parts) -> CHGNet:
        return CHGNet(self.spec.name, parts, True, str(self._device), self.spec.dtype)

    def _graph(self, frames: Sequence[Frame]) -> Graph:
        return flattened(self.spec.name, self.spec.elements, self._table, self._lists, frames)

    def _weights(self, graph: Graph, n_frames: int, readouts: Array | None) -> Array:
        """Readout weights of each atom, shape (n_atoms, n_hidden)."""
        if readouts is None or not self.spec.n_hidden:
            return self._parts.readout[graph.species]
        return np.asarray(readouts, dtype=np.float64).reshape(n_frames, -1, self._width)[graph.frame_of, graph.species]

    def _inputs(self, graph: Graph) -> tuple[Tensor, Indices]:
        vectors = torch.tensor(graph.vectors, dtype=self._dtype, device=self._device)
        return vectors, self._network.indices(graph, self._numbers[graph.species], self._device)

    def _run(self, graph: Graph, weights: Array) -> tuple[Array, Array]:
        """Features (n_atoms, n_hidden) and dE/dvectors (n_pairs, 3), float64, under the weights of each atom."""
        vectors, indices = self._inputs(graph)
        features = self._network(vectors.requires_grad_(), indices)
        seed = torch.tensor(weights, dtype=self._dtype, device=self._device)
        (gradients,) = torch.autograd.grad(features, vectors, seed)
        return _numpy(features), _numpy(gradients)

    def _rows_forwards(self, graph: Graph, present: Ints, phi: Array, rows: Array) -> None:
        """Fill the blocks of present species: features summed up, and less their slopes along the coordinates."""
        vectors, indices = self._inputs(graph)
        n_lines = len(graph.vectors) + len(indices.left)

        def slope(tangent: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(lambda moved: self._network(moved, indices), (vectors,), (tangent,))[1]
            return found

        features, slopes = _numpy(self._network(vectors, indices)), np.zeros((len(rows), *graph.species.shape, self._width))
        if n_lines:
            tangents = torch.tensor(_tangents(graph), dtype=self._dtype, device=self._device)
            with quiet():
                slopes = _numpy(torch.func.vmap(slope, chunk_size=max(1, _LINES // n_lines))(tangents))
        for one in present:
            phi[one] = features[graph.species == one].sum(axis=0)
            rows[:, one] = -slopes[:, graph.species == one].sum(axis=1)

    def _rows_backwards(self, graph: Graph, present: Ints, phi: Array, rows: Array) -> None:
        """The same as `_rows_forwards`."""
        vectors, indices = self._inputs(graph)
        features = self._network(vectors.requires_grad_(), indices)
        for one in present:
            sums = features[torch.tensor(graph.species == one, device=self._device)].sum(dim=0)
            phi[one] = _numpy(sums)
            for column, value in enumerate(sums):
                (gradients,) = torch.autograd.grad(value, vectors, retain_graph=True)
                rows[:, one, column] = scattered(graph, _numpy(gradients)).reshape(-1)


def _tangents(graph: Graph) -> Array:
    """How the vectors of all pairs change with each coordinate, shape (3 * n_atoms, n_pairs, 3)."""
    found = np.zeros((len(graph.species), 3, len(graph.vectors), 3))
    pairs = np.arange(len(graph.vectors))
    for c in range(3):
        # one after the other: both ends of a pair may be images of one atom
        found[graph.second, c, pairs, c] += 1.0
        found[graph.first, c, pairs, c] -= 1.0
    return found.reshape(-1, len(graph.vectors), 3)


def load_backend(rest: str, device: str = "auto", dtype: str = "float32") -> CHGNet:
    """Load what follows "chgnet:" in a name; see ``chgnet_files``.

    Raises:
        PotentialError: the package is not installed, or the file is missing, damaged, or no model with a linear readout of atoms; the
            sentence says which.
    """
    asked = wanted(rest)
    parts, learns = taken_apart(asked)
    return CHGNet(asked.name, parts, learns, device, dtype)


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
