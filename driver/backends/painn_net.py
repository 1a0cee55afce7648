"""The PaiNN network in torch: pair vectors and species in, per-atom features out. It knows no frames, files or energies.

Few, large operators: on a CPU a cluster of 30 atoms costs operator overhead, not arithmetic. So the filters of all layers come from one
product, the first layer's scalars are computed once a species, vector features are skipped where they are still zero or no longer needed,
and the readout stays outside: forces are the gradient of the features, seeded with the readout weights.

Source:
    K. T. Schütt, O. T. Unke, M. Gastegger, ICML 2021, arXiv 2102.03150.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

SOFT: Final = 1e-3  # added under the root of squared vector norms: keeps all derivatives finite where a vector feature vanishes


@dataclass(frozen=True)
class Hyper:
    """Shape of a network.

    Attributes:
        elements: atomic numbers, ascending; a species is an index into them.
        cutoff: Å.
        channels: width of scalar and vector features.
        layers: number of message and update blocks.
        n_radial: number of radial basis functions.
        n_hidden: width of the features that the linear readout sees.
    """

    elements: tuple[int, ...]
    cutoff: float = 5.0
    channels: int = 64
    layers: int = 2
    n_radial: int = 20
    n_hidden: int = 32


class Network(nn.Module):
    """Per-atom features of a flat batch of frames; invariant, smooth (twice differentiable in the positions), local in `layers * cutoff`.

    Args:
        hyper: the shape.
    """

    frequencies: Tensor

    def __init__(self, hyper: Hyper) -> None:
        super().__init__()
        self.hyper = hyper
        width, n = hyper.channels, hyper.layers
        self.embedding = nn.Parameter(torch.randn(len(hyper.elements), width))
        # columns: (scalar, direction) of the first layer, then (scalar, direction, vector) of each later one
        self.filters = nn.Parameter(torch.randn((3 * n - 1) * width, hyper.n_radial) * hyper.n_radial**-0.5)
        self.message_in = nn.ModuleList(nn.Linear(width, width) for _ in range(n))
        self.message_out = nn.ModuleList(nn.Linear(width, (3 if layer else 2) * width) for layer in range(n))
        self.mix = nn.ModuleList(nn.Linear(width, 2 * width, bias=False) for _ in range(n))
        self.update_in = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(n))
        self.update_out = nn.ModuleList(nn.Linear(width, (3 if layer < n - 1 else 2) * width) for layer in range(n))
        self.hidden = nn.Linear(width, hyper.n_hidden)
        # derived from the cutoff, so it is no part of the weights
        self.register_buffer("frequencies", torch.arange(1, hyper.n_radial + 1) * (math.pi / hyper.cutoff), persistent=False)

    def forward(self, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor) -> Tensor:
        """Return the features of all atoms.

        Args:
            vectors: from atom `first` to the image of atom `second`, shape (n_pairs, 3), floating, Å; a full list (both directions).
            first: shape (n_pairs,), int64, rows of `species`.
            second: shape (n_pairs,), int64.
            species: index into `hyper.elements`, shape (n_atoms,), int64.

        Returns:
            Shape (n_atoms, n_hidden), after the last nonlinearity.
        """
        width = self.hyper.channels
        directions, basis = self._radial(vectors)
        filters = torch.split(linear(basis, self.filters), [2 * width] + [3 * width] * (self.hyper.layers - 1), dim=1)
        scalars, vector = self._first_message(filters[0], directions, first, second, species)
        scalars, vector = self._update(0, scalars, vector)
        for layer in range(1, self.hyper.layers):
            scalars, vector = self._message(layer, filters[layer], directions, first, second, scalars, vector)
            scalars, vector = self._update(layer, scalars, vector)
        return silu(self.hidden(scalars))

    def _radial(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors, shape (n_pairs, 3, 1), and the radial basis sin(k pi r / r_c) / r times (1 - r^2/r_c^2)^3, shape (n_pairs, n_radial)."""
        square = (vectors * vectors).sum(dim=1, keepdim=True)
        inverse = square.rsqrt()
        cutoff = torch.rsub(square, 1.0, alpha=self.hyper.cutoff**-2) ** 3
        basis = torch.sin((square * inverse) * self.frequencies) * (cutoff * inverse)
        return (vectors * inverse).unsqueeze(2), basis

    def _first_message(self, filters: Tensor, directions: Tensor, first: Tensor, second: Tensor, species: Tensor) -> tuple[Tensor, Tensor]:
        """All vectors are still zero and all scalars a matter of species: the dense part runs over species, not over atoms."""
        context = self.message_out[0](silu(self.message_in[0](self.embedding)))
        gates = filters * context.index_select(0, species.index_select(0, second))
        scalar, direction = gates.chunk(2, dim=1)
        scalars = self.embedding.index_select(0, species).index_add(0, first, scalar)
        start = scalars.new_zeros((len(species), 3, self.hyper.channels))
        return scalars, start.index_add(0, first, direction.unsqueeze(1) * directions)

    def _message(
        self, layer: int, filters: Tensor, directions: Tensor, first: Tensor, second: Tensor, scalars: Tensor, vector: Tensor
    ) -> tuple[Tensor, Tensor]:
        context = self.message_out[layer](silu(self.message_in[layer](scalars)))
        gates = filters * context.index_select(0, second)
        scalar, direction, carried = gates.chunk(3, dim=1)
        flow = torch.addcmul(direction.unsqueeze(1) * directions, carried.unsqueeze(1), vector.index_select(0, second))
        return scalars.index_add(0, first, scalar), vector.index_add(0, first, flow)

    def _update(self, layer: int, scalars: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.mix[layer](vector).chunk(2, dim=2)
        norm = ((right * right).sum(dim=1) + SOFT).sqrt()
        gates = self.update_out[layer](silu(self.update_in[layer](torch.cat((scalars, norm), dim=1))))
        parts = gates.chunk(gates.shape[1] // self.hyper.channels, dim=1)
        scalars = torch.addcmul(scalars + parts[0], parts[1], (left * right).sum(dim=1))
        if layer == self.hyper.layers - 1:  # vectors are read no more
            return scalars, vector
        return scalars, torch.addcmul(vector, parts[2].unsqueeze(1), left)
