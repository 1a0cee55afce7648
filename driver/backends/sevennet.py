"""The foundation models "sevennet:…" of the package sevenn, adapted to the ports of ``tumbaga.online.ports``.

    E = sum_i w[z_i] · f_i + sum_i e[z_i]

with features f of the network, a readout w and a reference energy e for each element (see ``sevennet_parts``); energies and forces are summed
up here, in float64. A model serves all its elements; it learns where a few of them are named ("?elements=Cu,Au,O,H"), since each has a block
of weights of its own, and the covariance of them all must fit into memory.

Source:
    Y. Park, J. Kim, S. Hwang, S. Han, J. Chem. Theory Comput. 20, 4857 (2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from torch import Tensor

from tumbaga.driver.backends.flat import Graph
from tumbaga.driver.backends.guest import Bound, Guest
from tumbaga.driver.backends.guest_training import fresh
from tumbaga.driver.backends.sevennet_files import wanted
from tumbaga.driver.backends.sevennet_parts import ARCHITECTURE, Parts, taken_apart, untrained
from tumbaga.driver.backends.sevennet_training import Prepared, SevenNetTuning
from tumbaga.driver.errors import PotentialError
from tumbaga.online.records import Frame

_PAIRS: Final = 4096  # of all tangents that are pushed through the network at once: more are slower on a CPU, and memory is finite


class SevenNet(Guest[Parts]):
    """A SevenNet potential; implements ``Tunable``."""

    architecture = ARCHITECTURE

    def tuning(self, seed: int | None = None) -> SevenNetTuning:
        """Open a copy for training, in the dtype and on the device of this one; see ``Tunable.tuning``.

        Raises:
            PotentialError: its elements are not named, and what was trained could not learn afterwards.
        """
        if not self.spec.n_hidden:
            raise PotentialError(self.spec.name, "is trained for named elements; write for example sevennet:7net-0?elements=Cu,Au,O,H")
        parts = self._parts if seed is None else fresh(self._parts, seed, self._untrained)
        return SevenNetTuning(parts, self._floats(parts.readout), self._prepared, self._finished)

    def with_elements(self, like: Mapping[int, int]) -> SevenNet:
        """Not possible: it knows 89 elements already, and each learns from its own weights.

        Raises:
            PotentialError: always.
        """
        raise PotentialError(self.spec.name, "has weights for 89 elements; name those you need with ?elements= instead of mapping one")

    def _untrained(self) -> Any:
        return untrained(self.spec.name, self._parts).to(self._device, self._dtype)

    def _prepared(self, frame: Frame) -> Prepared:
        graph = self._graph([frame])
        species, first, second = (self._indices(one) for one in (graph.species, graph.first, graph.second))
        return Prepared(species, first, second, self._floats(graph.vectors))

    def _bound(self, graph: Graph) -> Bound:
        types, pairs = self._indices(np.array(self._parts.types)[graph.species]), self._indices(np.stack([graph.first, graph.second]))

        def say(vectors: Tensor) -> tuple[Tensor, None]:
            return self._network({"x": types, "edge_vec": vectors, "edge_index": pairs})[self._parts.key], None

        return Bound(say, max(1, _PAIRS // max(1, len(graph.vectors))))


def load_backend(rest: str, device: str = "auto", dtype: str = "float32") -> SevenNet:
    """Load what follows "sevennet:" in a name; see ``sevennet_files``.

    Raises:
        PotentialError: the package is not installed, or the file is missing, damaged, or no model of one level of theory with a linear
            readout; the sentence says which.
    """
    asked = wanted(rest)
    parts, learns = taken_apart(asked)
    return SevenNet(asked.name, parts, learns, device, dtype)
