"""What the back ends of foreign packages share: a network cut off before its last linear layers, as a potential with a readout of each element.

    E = sum_i w[z_i] · f_i + sum_i (p_i + e[z_i])

with features f of the network, a readout w and a reference energy e for each element, and an energy p that no readout changes, where a model
has one (a pair repulsion). Energies and forces are summed up here, in float64. Knows no package and no files.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from tumbaga.driver.backends.flat import DTYPES, Graph, chosen_device, flattened, scattered, species_table
from tumbaga.driver.backends.painn_lists import Lists
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import ForceRows, PotentialSpec
from tumbaga.online.records import Array, Frame, Ints, Prediction

READOUT: Final = "readout"  # the tensors outside the network, float64
REFERENCE: Final = "reference"


class Parts(Protocol):
    """A model taken apart; back ends have named tuples of these and of what is their own."""

    @property
    def network(self) -> nn.Module:
        """From a graph to the features; not to be trained."""

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers, ascending."""

    @property
    def readout(self) -> Array:
        """Shape (n_elements, n_hidden), float64, eV."""

    @property
    def reference(self) -> Array:
        """Shape (n_elements,), float64, eV."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What a version file says of it, JSON-compatible: "level" of theory, "licence" of the weights, how it was made."""

    @property
    def cutoff(self) -> float:
        """Up to which length there are pairs, Å."""

    @property
    def hyper(self) -> Mapping[str, Any]:
        """What a version file says of its shape, JSON-compatible: "elements", and "model", which the package builds it from."""

    def _replace(self, *args: Any, **kwargs: Any) -> Self: ...


class Bound(NamedTuple):
    """The network, given all but the vectors of the pairs.

    Attributes:
        say: from vectors, shape (n_pairs, 3), Å, to features, shape (n_atoms, n_hidden), and to the energy of each atom that no readout
            changes, without its reference energy, shape (n_atoms,), eV; None where the model has none.
        at_once: how many tangents can be pushed through together.
    """

    say: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    at_once: int


class Said(NamedTuple):
    """What the network says of a batch: features (n_atoms, n_hidden), energies that no readout changes (n_atoms,), dE/dvectors (n_pairs, 3)."""

    features: Array
    fixed: Array
    gradients: Array


P = TypeVar("P", bound=Parts)


class Guest(ABC, Generic[P]):
    """A potential made of parts; implements ``Trainable``. A back end gives the name of its architecture, and `_bound`.

    Args:
        name: as the user wrote it.
        parts: of the model; its network is moved to the device and kept.
        learns: whether it has a readout to be learnt; otherwise it serves only.
        device: "cpu", "cuda", …, or "auto" for a GPU where there is one.
        dtype: "float32" or "float64", inside the network.

    Raises:
        PotentialError: there is no such device or dtype.
    """

    architecture: ClassVar[str]

    def __init__(self, name: str, parts: P, learns: bool, device: str = "cpu", dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise PotentialError(name, f"dtype {dtype!r} is not float32 or float64")
        self._device, self._dtype, self._parts = chosen_device(name, device), DTYPES[dtype], parts
        self._width = parts.readout.shape[1]
        self.spec = PotentialSpec(
            name=name,
            elements=parts.elements,
            cutoff=parts.cutoff,
            n_hidden=self._width if learns else 0,
            level=str(parts.facts.get("level", "")),
            mean_h2=float(parts.facts.get("mean_h2", 0.0)),
            dtype=dtype,
            licence=str(parts.facts.get("licence", "")),
        )
        self._network: Any = parts.network.to(self._device, self._dtype)
        self._table, self._lists = species_table(parts.elements), Lists(parts.cutoff)

    def __repr__(self) -> str:
        learns = f"learns {''.join(chemical_symbols[z] for z in self.spec.elements)}" if self.spec.n_hidden else "serves only"
        return f"<{type(self).__name__} {self.spec.name} {learns} {self.spec.dtype} on {self._device}>"

    @property
    def metadata(self) -> dict[str, str]:
        """What a file of its tensors must say beside them: "architecture", and "hyper" and "facts" of its parts as JSON."""
        return {"architecture": self.architecture, "hyper": json.dumps(self._parts.hyper), "facts": json.dumps(dict(self._parts.facts))}

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Evaluate frames of any sizes as one batch; see ``Potential.predict``.

        Raises:
            UnknownElementError: a frame holds an element outside `spec.elements`.
        """
        if not frames:
            return []
        graph = self._graph(frames)
        weights = self._weights(graph, len(frames), readouts)
        said = self._said(graph, self._bound(graph), weights)
        energies = (said.features * weights).sum(axis=1) + said.fixed
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
        bound, present = self._bound(graph), np.unique(graph.species)
        said = self._said(graph, bound, np.zeros((len(frame), self._width)))
        blocks = (len(self.spec.elements), self._width)
        phi, rows = np.zeros(blocks), np.zeros((3 * len(frame), *blocks))
        np.add.at(phi, graph.species, said.features)
        rows[:, present] = -self._slopes(graph, bound, present)
        return ForceRows(phi.reshape(-1), rows.reshape(len(rows), -1), float(said.fixed.sum()), scattered(graph, said.gradients))

    def state(self, readout: Array | None = None) -> dict[str, np.ndarray]:
        """All tensors by name: the network's in the dtype they run in, "readout" (its own or the given one) and "reference" in float64; copies."""
        own = {key: value.detach().cpu().numpy().copy() for key, value in self._network.state_dict().items()}
        given = self._parts.readout if readout is None or not self.spec.n_hidden else readout
        return {**own, READOUT: given.reshape(-1).copy(), REFERENCE: self._parts.reference.copy()}

    @abstractmethod
    def _bound(self, graph: Graph) -> Bound:
        """Give the network all but the vectors of a batch."""

    def _slopes(self, graph: Graph, bound: Bound, present: Ints) -> Array:
        """How the summed features of each present species change with the positions of one frame, per Å.

        By forward differentiation: it takes a pass for each coordinate, backwards it would take one for each column of the readout.

        Returns:
            Shape (3 * n_atoms, n_present, n_hidden).
        """
        vectors = self._floats(graph.vectors)

        def slope(tangent: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(lambda moved: bound.say(moved)[0], (vectors,), (tangent,))[1]
            return found

        found = np.zeros((3 * len(graph.species), len(present), self._width))
        if not len(vectors):
            return found
        with quiet():
            slopes = array_of(torch.func.vmap(slope, chunk_size=bound.at_once)(self._floats(_tangents(graph))))
        for k, one in enumerate(present):
            found[:, k] = slopes[:, graph.species == one].sum(axis=1)
        return found

    def _said(self, graph: Graph, bound: Bound, weights: Array) -> Said:
        """Evaluate a batch under the weights of each atom, shape (n_atoms, n_hidden)."""
        vectors = self._floats(graph.vectors).requires_grad_()
        features, further = bound.say(vectors)
        outputs, seeds, fixed = [features], [self._floats(weights)], self._parts.reference[graph.species]
        if further is not None:
            outputs, seeds, fixed = [features, further], [*seeds, torch.ones_like(further)], fixed + array_of(further)
        (gradients,) = torch.autograd.grad(outputs, vectors, seeds)
        return Said(array_of(features), fixed, array_of(gradients))

    def _weights(self, graph: Graph, n_frames: int, readouts: Array | None) -> Array:
        """Readout weights of each atom, shape (n_atoms, n_hidden)."""
        if readouts is None or not self.spec.n_hidden:
            return self._parts.readout[graph.species]
        return np.asarray(readouts, dtype=np.float64).reshape(n_frames, -1, self._width)[graph.frame_of, graph.species]

    def _graph(self, frames: Sequence[Frame]) -> Graph:
        return flattened(self.spec.name, self.spec.elements, self._table, self._lists, frames)

    def _finished(self, parts: P) -> Self:
        """The same of other parts."""
        return type(self)(self.spec.name, parts, True, str(self._device), self.spec.dtype)

    def _floats(self, array: Array) -> Tensor:
        return torch.tensor(array, dtype=self._dtype, device=self._device)

    def _indices(self, array: Ints) -> Tensor:
        return torch.tensor(array, device=self._device)


def array_of(tensor: Tensor) -> Array:
    """Return a tensor as an array, float64."""
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings back: nobody here can mend what a package, and torch on its behalf, call outdated or slow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tangents(graph: Graph) -> Array:
    """How the vectors of all pairs change with each coordinate, shape (3 * n_atoms, n_pairs, 3)."""
    found = np.zeros((len(graph.species), 3, len(graph.vectors), 3))
    pairs = np.arange(len(graph.vectors))
    for c in range(3):
        # one after the other: both ends of a pair may be images of one atom
        found[graph.second, c, pairs, c] += 1.0
        found[graph.first, c, pairs, c] -= 1.0
    return found.reshape(-1, len(graph.vectors), 3)
