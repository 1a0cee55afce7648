"""Models "mace:…" of the package mace-torch, adapted to the ports of ``tumbaga.online.ports``.

    E = sum_i w[z_i] · f_i + sum_i (s ZBL_i + e[z_i])

with features f of all layers, a readout w and a reference energy e for each element (see ``mace_net``), and a pair repulsion where the model
has one; energies and forces are summed up here, in float64. A model serves all its elements; it learns where a few of them are named
("?elements=Cu,Au,O,H"), since each has a block of weights of its own, and the covariance of them all must fit into memory.

Source:
    I. Batatia, D. P. Kovács, G. N. C. Simm, C. Ortner, G. Csányi, Adv. Neural Inf. Process. Syst. 35 (2022).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from tumbaga.driver.backends.flat import DTYPES, Graph, chosen_device, flattened, scattered, species_table
from tumbaga.driver.backends.mace_files import wanted
from tumbaga.driver.backends.mace_parts import ARCHITECTURE, READOUT, REFERENCE, Parts, quiet, taken_apart
from tumbaga.driver.backends.painn_lists import Lists
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import ForceRows, PotentialSpec
from tumbaga.online.records import Array, Frame, Prediction

_PAIRS: Final = 4096  # of all tangents that are pushed through the network at once: memory is finite


class _Said(NamedTuple):
    """What the network says of a batch: features (n_atoms, n_hidden), pair repulsion (n_atoms,), dE/dvectors (n_pairs, 3); float64."""

    features: Array
    repulsion: Array
    gradients: Array


class MACE:
    """A MACE potential; implements ``Trainable``.

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
        cutoff, self._width = float(parts.config["r_max"]), parts.readout.shape[1]
        self.spec = PotentialSpec(
            name=name,
            elements=parts.elements,
            cutoff=cutoff,
            n_hidden=self._width if learns else 0,
            level=parts.level,
            dtype=dtype,
            licence=parts.licence,
        )
        self._network = parts.network.to(self._device, self._dtype)
        self._onehot = torch.eye(len(parts.config["atomic_numbers"]), dtype=self._dtype)[list(parts.types)]
        self._table, self._lists = species_table(parts.elements), Lists(cutoff)

    def __repr__(self) -> str:
        learns = f"learns {''.join(chemical_symbols[z] for z in self.spec.elements)}" if self.spec.n_hidden else "serves only"
        return f"<MACE {self.spec.name} {learns} {self.spec.dtype} on {self._device}>"

    @property
    def metadata(self) -> dict[str, str]:
        """What a file of its tensors must say beside them: "architecture", and "hyper" (elements, head, model) and "facts" as JSON."""
        hyper = {"elements": self._parts.elements, "head": self._parts.head, "model": self._parts.config}
        facts = {"level": self.spec.level, "licence": self.spec.licence}
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
        said = self._run(graph, weights)
        energies = (said.features * weights).sum(axis=1) + self._fixed(graph, said.repulsion)
        forces = scattered(graph, said.gradients)
        found = []
        for k in range(len(frames)):
            atoms, edges = slice(*graph.atoms[k : k + 2]), slice(*graph.edges[k : k + 2])
            strain = graph.vectors[edges].T @ said.gradients[edges]
            shown = said.features[atoms] if self.spec.n_hidden else None
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
            (served,) = self.predict([frame])
            return ForceRows(np.zeros(0), np.zeros((3 * len(frame), 0)), served.energy, served.forces)
        graph = self._graph([frame])
        said = self._run(graph, np.zeros((len(frame), self._width)))
        slopes = self._slopes(graph)
        blocks = (len(self.spec.elements), self._width)
        phi, rows = np.zeros(blocks), np.zeros((3 * len(frame), *blocks))
        for one in np.unique(graph.species):
            phi[one] = said.features[graph.species == one].sum(axis=0)
            rows[:, one] = -slopes[:, graph.species == one].sum(axis=1)
        fixed = float(self._fixed(graph, said.repulsion).sum())
        return ForceRows(phi.reshape(-1), rows.reshape(len(rows), -1), fixed, scattered(graph, said.gradients))

    def state(self, readout: Array | None = None) -> dict[str, np.ndarray]:
        """All tensors by name: the network's in the dtype they run in, "readout" (its own or the given one) and "reference" in float64; copies."""
        own = {key: value.detach().cpu().numpy().copy() for key, value in self._network.state_dict().items()}
        given = self._parts.readout if readout is None or not self.spec.n_hidden else readout
        return {**own, READOUT: given.reshape(-1).copy(), REFERENCE: self._parts.reference.copy()}

    def _graph(self, frames: Sequence[Frame]) -> Graph:
        return flattened(self.spec.name, self.spec.elements, self._table, self._lists, frames)

    def _weights(self, graph: Graph, n_frames: int, readouts: Array | None) -> Array:
        """Readout weights of each atom, shape (n_atoms, n_hidden)."""
        if readouts is None or not self.spec.n_hidden:
            return self._parts.readout[graph.species]
        return np.asarray(readouts, dtype=np.float64).reshape(n_frames, -1, self._width)[graph.frame_of, graph.species]

    def _fixed(self, graph: Graph, repulsion: Array) -> Array:
        """What no readout changes in the energy of each atom, shape (n_atoms,), eV."""
        return self._parts.reference[graph.species] + self._parts.scale * repulsion

    def _inputs(self, graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
        """What the network takes: species, pairs, vectors."""
        species = self._onehot[torch.tensor(graph.species)].to(self._device)
        pairs = torch.tensor(np.stack([graph.first, graph.second]), device=self._device)
        return species, pairs, torch.tensor(graph.vectors, dtype=self._dtype, device=self._device)

    def _run(self, graph: Graph, weights: Array) -> _Said:
        """Evaluate a batch under the weights of each atom, shape (n_atoms, n_hidden)."""
        species, pairs, vectors = self._inputs(graph)
        features, repulsion = self._network(species, pairs, vectors.requires_grad_())
        outputs, seeds = [features], [torch.tensor(weights, dtype=self._dtype, device=self._device)]
        if repulsion is not None:
            outputs.append(repulsion)
            seeds.append(torch.full_like(repulsion, self._parts.scale))
        (gradients,) = torch.autograd.grad(outputs, vectors, seeds)
        return _Said(_numpy(features), np.zeros(len(graph.species)) if repulsion is None else _numpy(repulsion), _numpy(gradients))

    def _slopes(self, graph: Graph) -> Array:
        """How the features of one frame change with the positions, shape (3 * n_atoms, n_atoms, n_hidden), per Å.

        By forward differentiation: it takes a pass for each coordinate, backwards it would take one for each column of the readout.
        """
        n_atoms, n_pairs = len(graph.species), len(graph.vectors)
        if not n_pairs:
            return np.zeros((3 * n_atoms, n_atoms, self._width))
        species, pairs, vectors = self._inputs(graph)

        def features(moved: Tensor) -> Tensor:
            found: Tensor = self._network(species, pairs, moved)[0]
            return found

        def slope(tangent: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(features, (vectors,), (tangent,))[1]
            return found

        tangents = torch.tensor(_tangents(graph), dtype=self._dtype, device=self._device)
        with quiet():
            return _numpy(torch.func.vmap(slope, chunk_size=max(1, _PAIRS // n_pairs))(tangents))


def _tangents(graph: Graph) -> Array:
    """How the vectors of all pairs change with each coordinate, shape (3 * n_atoms, n_pairs, 3)."""
    found = np.zeros((len(graph.species), 3, len(graph.vectors), 3))
    pairs = np.arange(len(graph.vectors))
    for c in range(3):
        # one after the other: both ends of a pair may be images of one atom
        found[graph.second, c, pairs, c] += 1.0
        found[graph.first, c, pairs, c] -= 1.0
    return found.reshape(-1, len(graph.vectors), 3)


def load_backend(rest: str, device: str = "auto", dtype: str = "float32") -> MACE:
    """Load what follows "mace:" in a name; see ``mace_files``.

    Raises:
        PotentialError: the package is not installed, or the file is missing, damaged, or no model of energies with linear last layers; the
            sentence says which.
    """
    asked = wanted(rest)
    parts, learns = taken_apart(asked)
    return MACE(asked.name, parts, learns, device, dtype)


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
