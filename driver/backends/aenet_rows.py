"""How the features of an ænet network change with the pair vectors: what force rows and force uncertainties are made of.

The sums over neighbours are all that features and pairs have in common. So features are differentiated by the sums of their own atom, and
what a pair adds to the sums by its vector; one product an atom puts both together. It costs about as much as some predictions, where a
backward pass for each of the columns of the readout would cost hundreds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tumbaga.driver.backends.aenet_descriptors import Fingerprint, Moments
from tumbaga.driver.backends.aenet_net import Network


def slopes(network: Network, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor) -> tuple[Tensor, Tensor]:
    """Return features, and how those of atom `first` of each pair change with the vector of the pair; with others they do not change.

    Args:
        network: its weights give the dtype.
        vectors, first, second, species: as in ``Network.forward``; `first` ascending.

    Returns:
        Shapes (n_atoms, n_hidden) and (n_pairs, 3, n_hidden), per Å.
    """
    fingerprint = network.fingerprint
    with torch.no_grad():
        sums = fingerprint.moments(vectors, first, second, species)
        features, by_descriptors = network.jacobian(fingerprint.descriptors(sums, species), species)
        by_radial, by_angular = _by_sums(fingerprint, sums, species, by_descriptors)
        weights = fingerprint.weights(species)[first, :, species[second]][:, None, :, None]
        _, near = fingerprint.near(vectors)
    found = vectors.new_zeros(len(vectors), 3, features.shape[1])
    radial = weights * _along(lambda v: fingerprint.radial(_lengths(v)), vectors)[:, :, None]
    angular = _along(lambda v: fingerprint.angular(v, _lengths(v)), vectors[near])[:, :, None]
    angular = torch.cat((weights[near] * angular[..., :-1], weights[near] ** 2 * angular[..., -1:]), dim=3)
    for pairs, added, by_sums in ((torch.arange(len(vectors), device=near.device), radial, by_radial), (near, angular, by_angular)):
        counts = torch.bincount(first[pairs], minlength=len(species)).tolist()
        parts = [some.flatten(2) @ own for some, own in zip(torch.split_with_sizes(added, counts), by_sums, strict=True)]
        found[pairs] += torch.cat(parts)
    return features, found


def _by_sums(fingerprint: Fingerprint, sums: Moments, species: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """How features change with the sums of their atom, plain and weighted, shapes (n_atoms, n_sums, n_hidden); `by`: its descriptors."""
    n_atoms, _, n_hidden = by.shape
    blocks = by.view(n_atoms, -1, fingerprint.basis.width, n_hidden)
    radial, angular = torch.split_with_sizes(blocks, [fingerprint.basis.n_radial + 1, fingerprint.basis.n_angular + 1], dim=2)
    harmonics = (fingerprint.weights(species) @ sums.angular)[..., None] * (fingerprint.squares @ angular)
    itself = -0.5 * angular.sum(dim=2, keepdim=True)
    return radial.flatten(1, 2), torch.cat((harmonics, itself), dim=2).flatten(1, 2)


def _along(added: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """d added / d vectors, shape (n_pairs, 3, n_columns): what a pair adds depends on its own vector alone.

    The backward pass is linear in its seed, so its derivative by the seed is the forward derivative: three passes instead of one a column.
    """
    moved = vectors.detach().requires_grad_()
    columns = added(moved)
    seed = torch.zeros_like(columns, requires_grad=True)
    (back,) = torch.autograd.grad(columns, moved, seed, create_graph=True)
    found = [torch.autograd.grad(back[:, c].sum(), seed, retain_graph=True)[0] for c in range(3)]
    return torch.stack(found, dim=1)


def _lengths(vectors: Tensor) -> Tensor:
    return (vectors * vectors).sum(dim=1, keepdim=True).sqrt()
