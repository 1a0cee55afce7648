"""The ænet network in torch: one feed-forward network an element, on standardised Chebyshev fingerprints. No frames, files or energies.

All members of a committee are evaluated at once, their weights stacked in a first dimension; the features of an atom are the last hidden
layers of all members one after the other, so the mean energy of the committee is linear in one readout.

Source:
    N. Artrith, A. Urban, G. Ceder, Phys. Rev. B 96, 014112 (2017); N. Artrith, A. Urban, Comput. Mater. Sci. 114, 135 (2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from tumbaga.driver.backends.aenet_descriptors import Fingerprint
from tumbaga.driver.backends.aenet_files import Basis


@dataclass(frozen=True)
class Hyper:
    """Shape of a potential; what is told of elements stands in the order of `elements`.

    Attributes:
        elements: atomic numbers, ascending; a species is an index into them.
        basis: of the fingerprints.
        weighted: whether there are weighted fingerprints beside the plain ones.
        widths: of the hidden layers of each element; none make a linear model.
        activations: code of each hidden layer of each element; see ``aenet_files.ElementNetwork``.
        members: of the committee.
    """

    elements: tuple[int, ...]
    basis: Basis
    weighted: bool
    widths: tuple[tuple[int, ...], ...]
    activations: tuple[tuple[int, ...], ...]
    members: int = 1

    @classmethod
    def of(cls, told: Any) -> Hyper:
        """Make one of what JSON gives back.

        Raises:
            TypeError, KeyError, ValueError: it is something else.
        """
        nested = {key: tuple(map(tuple, told[key])) for key in ("widths", "activations")}
        return cls(**{**told, **nested, "elements": tuple(told["elements"]), "basis": Basis(**told["basis"])})

    @property
    def n_descriptors(self) -> int:
        """Inputs of each network."""
        return self.basis.width * (2 if self.weighted else 1)

    @property
    def n_each(self) -> int:
        """Features of one member; elements with a narrower last layer have zeros behind them."""
        return max(self.n_last(k) for k in range(len(self.elements)))

    @property
    def n_hidden(self) -> int:
        """Features of all members."""
        return self.members * self.n_each

    def n_last(self, species: int) -> int:
        """Width of the last hidden layer of an element."""
        return (self.n_descriptors, *self.widths[species])[-1]


def _twisted(x: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(x * (2.0 / 3.0)) + 0.1 * x


def _scaled(x: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(x * (2.0 / 3.0))


def _same(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: Final[Sequence[Callable[[Tensor], Tensor]]] = (_same, torch.tanh, torch.sigmoid, _scaled, _twisted)  # by ænet's codes


class Layers(nn.Module):
    """The hidden layers of one element, of all members.

    Args:
        n_in: width of the input.
        widths: of the layers.
        activations: their codes.
        members: of the committee.
    """

    def __init__(self, n_in: int, widths: Sequence[int], activations: Sequence[int], members: int) -> None:
        super().__init__()
        sizes = list(zip((n_in, *widths), widths, strict=False))
        self._functions = [_ACTIVATIONS[code] for code in activations]
        # uniform within the root of 3 / n_in: standardised inputs give outputs of unit variance
        self.weights = nn.ParameterList((torch.rand(members, n_out, n) * 2 - 1) * (3.0 / n) ** 0.5 for n, n_out in sizes)
        self.biases = nn.ParameterList(torch.zeros(members, n_out) for _, n_out in sizes)

    def forward(self, values: Tensor) -> Tensor:
        """Return the last layer, shape (members, n_atoms, width), of inputs of shape (members, n_atoms, n_in)."""
        for weight, bias, function in zip(self.weights, self.biases, self._functions, strict=True):
            values = function(torch.baddbmm(bias.unsqueeze(1), values, weight.transpose(1, 2)))
        return values

    def jacobian(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same, and how it changes with the inputs, shape (members, n_atoms, width, n_in)."""
        found = torch.eye(values.shape[2], dtype=values.dtype, device=values.device).expand(*values.shape, values.shape[2])
        for weight, bias, function in zip(self.weights, self.biases, self._functions, strict=True):
            before = torch.baddbmm(bias.unsqueeze(1), values, weight.transpose(1, 2)).detach().requires_grad_()
            with torch.enable_grad():
                after = function(before)
                (slope,) = torch.autograd.grad(after.sum(), before)
            values, found = after.detach(), slope.unsqueeze(3) * (weight.unsqueeze(1) @ found)
        return values, found


class Network(nn.Module):
    """Per-atom features of a flat batch of frames; invariant, local in the radial cutoff.

    Its buffers are what the descriptors were in training, shapes (members, n_elements, n_descriptors): the averages that are taken off
    and the scales that follow, the lowest and the highest; and the weights of the species, "fingerprint.spins", of each neighbour species
    (columns) as seen by each species (rows). They are not trained: a transferred potential keeps those of its origin.

    Args:
        hyper: the shape.
    """

    average: Tensor
    scale: Tensor
    lowest: Tensor
    highest: Tensor

    def __init__(self, hyper: Hyper) -> None:
        super().__init__()
        self.hyper = hyper
        count = len(hyper.elements)
        self.fingerprint = Fingerprint(hyper.basis, np.zeros((count, count)), hyper.weighted)
        self.networks = nn.ModuleDict(
            {
                chemical_symbols[z]: Layers(hyper.n_descriptors, hyper.widths[k], hyper.activations[k], hyper.members)
                for k, z in enumerate(hyper.elements)
            }
        )
        shape = (hyper.members, count, hyper.n_descriptors)
        for name, start in (("average", 0.0), ("scale", 1.0), ("lowest", 0.0), ("highest", 0.0)):
            self.register_buffer(name, torch.full(shape, start))

    def forward(self, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor) -> Tensor:
        """Return the features of all atoms, shape (n_atoms, n_hidden); arguments as in ``Fingerprint.forward``."""
        return self.features(self.fingerprint(vectors, first, second, species), species)

    def features(self, descriptors: Tensor, species: Tensor) -> Tensor:
        """Return the features of atoms with these descriptors, shape (n_atoms, n_descriptors)."""
        order = torch.argsort(species, stable=True)
        sorted_species = species[order]
        inputs = (descriptors.index_select(0, order) - self.average[:, sorted_species]) * self.scale[:, sorted_species]
        counts = torch.bincount(species, minlength=len(self.hyper.elements)).tolist()
        parts = zip(self.networks.values(), torch.split_with_sizes(inputs, counts, dim=1), strict=True)
        hidden = [self._padded(layers(mine)) for layers, mine in parts if mine.shape[1]]
        return self._side_by_side(torch.cat(hidden, dim=1)).index_select(0, torch.argsort(order))

    @torch.no_grad()
    def jacobian(self, descriptors: Tensor, species: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features, and how they change with the descriptors of their atom, shape (n_atoms, n_descriptors, n_hidden)."""
        features = descriptors.new_empty(len(descriptors), self.hyper.n_hidden)
        found = descriptors.new_empty(*descriptors.shape, self.hyper.n_hidden)
        for k, layers in enumerate(self.networks.values()):
            assert isinstance(layers, Layers)  # narrows torch's type, checks no input
            mine = (species == k).nonzero()[:, 0]
            hidden, slopes = layers.jacobian((descriptors[mine] - self.average[:, k, None]) * self.scale[:, k, None])
            features[mine] = self._side_by_side(self._padded(hidden))
            slopes = (slopes * self.scale[:, k, None, None]).permute(3, 0, 1, 2)
            found[mine] = torch.stack([self._side_by_side(self._padded(one)) for one in slopes], dim=1)
        return features, found

    def _padded(self, hidden: Tensor) -> Tensor:
        missing = self.hyper.n_each - hidden.shape[2]
        return nn.functional.pad(hidden, (0, missing)) if missing else hidden

    def _side_by_side(self, hidden: Tensor) -> Tensor:
        """Members one after the other, shape (n_atoms, n_hidden), from shape (members, n_atoms, width)."""
        return hidden.transpose(0, 1).reshape(hidden.shape[1], self.hyper.n_hidden)
