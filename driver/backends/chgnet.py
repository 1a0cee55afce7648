"""The foundation models "chgnet:…" of the package chgnet, adapted to the ports of ``tumbaga.online.ports``.

    E = sum_i w[z_i] · f_i + sum_i e[z_i]

with features f of the network (``chgnet_net``), a readout w and a reference energy e for each element (``chgnet_parts``); energies and forces
are summed up here, in float64. A model serves all its elements; it learns where a few of them are named ("?elements=Cu,Au,O,H"), since each
has a block of weights of its own, and the covariance of them all must fit into memory.

Source:
    B. Deng, P. Zhong, K. Jun, J. Riebesell, K. Han, C. J. Bartel, G. Ceder, Nat. Mach. Intell. 5, 1031 (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tumbaga.driver.backends.chgnet_files import wanted
from tumbaga.driver.backends.chgnet_net import Indices, Network
from tumbaga.driver.backends.chgnet_parts import ARCHITECTURE, Parts, taken_apart, untrained
from tumbaga.driver.backends.chgnet_training import CHGNetTuning, Prepared, with_elements
from tumbaga.driver.backends.flat import Graph, scattered
from tumbaga.driver.backends.guest import Bound, Guest, array_of
from tumbaga.driver.backends.guest_training import fresh
from tumbaga.driver.errors import PotentialError
from tumbaga.online.records import Array, Frame, Ints

_LINES: Final = 32768  # pairs and angles of all tangents that are pushed through the network at once: memory is finite


class CHGNet(Guest[Parts]):
    """A CHGNet potential; implements ``Tunable``."""

    architecture = ARCHITECTURE

    def tuning(self, seed: int | None = None) -> CHGNetTuning:
        """Open a copy for training, in the dtype and on the device of this one; see ``Tunable.tuning``.

        Raises:
            PotentialError: its elements are not named, and what was trained could not learn afterwards.
        """
        if not self.spec.n_hidden:
            raise PotentialError(self.spec.name, "is trained for named elements; write for example chgnet:0.3.0?elements=Cu,Au,O,H")
        parts = self._parts if seed is None else fresh(self._parts, seed, self._untrained)
        return CHGNetTuning(parts, self._floats(parts.readout), self._prepared, self._finished)

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
        return Prepared(self._indices(graph.species), self._floats(graph.vectors), self._lines(graph))

    def _lines(self, graph: Graph) -> Indices:
        indices: Indices = self._network.indices(graph, np.array(self._parts.elements)[graph.species], self._device)
        return indices

    def _bound(self, graph: Graph) -> Bound:
        indices = self._lines(graph)

        def say(vectors: Tensor) -> tuple[Tensor, None]:
            return self._network(vectors, indices), None

        return Bound(say, max(1, _LINES // max(1, len(graph.vectors) + len(indices.left))))

    def _slopes(self, graph: Graph, bound: Bound, present: Ints) -> Array:
        """The same by the shorter way."""
        # one pass forwards for each coordinate, or one backwards for each column: either costs about the same
        if 3 * len(graph.species) <= self._width * len(present):
            return super()._slopes(graph, bound, present)
        vectors = self._floats(graph.vectors).requires_grad_()
        features, _ = bound.say(vectors)
        found = np.zeros((3 * len(graph.species), len(present), self._width))
        for k, one in enumerate(present):
            for column, value in enumerate(features[self._indices(graph.species == one)].sum(dim=0)):
                (gradients,) = torch.autograd.grad(value, vectors, retain_graph=True)
                found[:, k, column] = -scattered(graph, array_of(gradients)).reshape(-1)
        return found


def load_backend(rest: str, device: str = "auto", dtype: str = "float32") -> CHGNet:
    """Load what follows "chgnet:" in a name; see ``chgnet_files``.

    Raises:
        PotentialError: the package is not installed, or the file is missing, damaged, or no model with a linear readout of atoms; the
            sentence says which.
    """
    asked = wanted(rest)
    parts, learns = taken_apart(asked)
    return CHGNet(asked.name, parts, learns, device, dtype)
