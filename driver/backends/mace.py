"""Models "mace:…" of the package mace-torch, adapted to the ports of ``tumbaga.online.ports``.

    E = sum_i w[z_i] · f_i + sum_i (s ZBL_i + e[z_i])

with features f of all layers, a readout w and a reference energy e for each element (see ``mace_net``), and a pair repulsion where the model
has one; energies and forces are summed up here, in float64. A model serves all its elements; it learns where a few of them are named
("?elements=Cu,Au,O,H"), since each has a block of weights of its own, and the covariance of them all must fit into memory.

Source:
    I. Batatia, D. P. Kovács, G. N. C. Simm, C. Ortner, G. Csányi, Adv. Neural Inf. Process. Syst. 35 (2022).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from torch import Tensor
from torch.nn.functional import one_hot

from tumbaga.driver.backends.flat import Graph
from tumbaga.driver.backends.guest import Bound, Guest
from tumbaga.driver.backends.mace_files import wanted
from tumbaga.driver.backends.mace_parts import ARCHITECTURE, Parts, taken_apart

_PAIRS: Final = 4096  # of all tangents that are pushed through the network at once: memory is finite


class MACE(Guest[Parts]):
    """A MACE potential; implements ``Trainable``."""

    architecture = ARCHITECTURE

    def _bound(self, graph: Graph) -> Bound:
        types = self._indices(np.array(self._parts.types)[graph.species])
        species = one_hot(types, len(self._parts.config["atomic_numbers"])).to(self._dtype)
        pairs = self._indices(np.stack([graph.first, graph.second]))

        def say(vectors: Tensor) -> tuple[Tensor, Tensor | None]:
            features, repulsion = self._network(species, pairs, vectors)
            return features, None if repulsion is None else self._parts.scale * repulsion

        return Bound(say, max(1, _PAIRS // max(1, len(graph.vectors))))


def load_backend(rest: str, device: str = "auto", dtype: str = "float32") -> MACE:
    """Load what follows "mace:" in a name; see ``mace_files``.

    Raises:
        PotentialError: the package is not installed, or the file is missing, damaged, or no model of energies with linear last layers; the
            sentence says which.
    """
    asked = wanted(rest)
    parts, learns = taken_apart(asked)
    return MACE(asked.name, parts, learns, device, dtype)
