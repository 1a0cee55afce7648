"""Chebyshev fingerprints of neighbourhoods, in torch: pair vectors and species in, descriptors of every atom out. No files, frames or energies.

    radial   R_n = sum_j s_j f(r_ij; R_r) T_n(2 r_ij / R_r - 1)
    angular  A_n = sum_{j<k} s_j s_k f(r_ij; R_a) f(r_ik; R_a) T_n(cos theta_ijk)

with f(r; R) = (cos(pi r / R) + 1) / 2 inside R, once with s = 1 and, where there are several species, once with a weight s for each of them.

The angular part is linear in the number of neighbours: T_n is a sum over Legendre polynomials P_l, and by the addition theorem

    sum_jk g_j g_k P_l(u_j · u_k) = sum_m (sum_j g_j C_lm(u_j))²

with real spherical harmonics C_lm (so normalised that C_00 = 1). Half of that, less the terms j = k, is the sum over j < k. Nothing larger
than pairs times (n_angular + 1)² is ever made. Harmonics rather than moments of x, y, z: they are fewer, and their squares do not cancel, so
that float32 is enough.

Source:
    N. Artrith, A. Urban, G. Ceder, Phys. Rev. B 96, 014112 (2017).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import chebyshev, legendre
from torch import Tensor, nn

from tumbaga.driver.backends.aenet_files import Basis
from tumbaga.online.records import Array


class Moments(NamedTuple):
    """Sums over the neighbours of each atom, of each species apart.

    Attributes:
        radial: shape (n_atoms, n_species, n_radial + 1).
        angular: shape (n_atoms, n_species, (n_angular + 1)² + 1): the harmonics, and the squared cut-off.
    """

    radial: Tensor
    angular: Tensor


class Fingerprint(nn.Module):
    """Descriptors of all atoms; their derivatives are continuous, they vanish for an atom alone. It has no parameters.

    Args:
        basis: cutoffs and orders.
        spins: weight of each neighbour species (columns) as seen by each species (rows), shape (n_species, n_species).
        weighted: whether the weighted descriptors follow the plain ones.
    """

    spins: Tensor
    table: Tensor
    pick: Tensor
    squares: Tensor

    def __init__(self, basis: Basis, spins: Array, weighted: bool) -> None:
        super().__init__()
        self.basis, self.weighted, self.n_species = basis, weighted, len(spins)
        table, pick = _harmonic_tables(basis.n_angular)
        for name, value in (("spins", spins), ("table", table), ("pick", pick), ("squares", _legendre_of_chebyshev(basis.n_angular))):
            # they follow from the set-up, so they are no part of the weights
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64), persistent=False)

    @property
    def width(self) -> int:
        """Number of descriptors of an atom."""
        return self.basis.width * (2 if self.weighted else 1)

    def forward(self, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor) -> Tensor:
        """Return the descriptors of all atoms.

        Args:
            vectors: from atom `first` to the image of atom `second`, shape (n_pairs, 3), floating, Å; a full list up to the radial cutoff.
            first: shape (n_pairs,), int64, rows of `species`.
            second: shape (n_pairs,), int64.
            species: rows of `spins`, shape (n_atoms,), int64.

        Returns:
            Shape (n_atoms, width): radial, angular, weighted radial, weighted angular. Not finite where two atoms coincide.
        """
        return self.descriptors(self.moments(vectors, first, second, species), species)

    def moments(self, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor) -> Moments:
        """Return the sums over neighbours; arguments as in `forward`."""
        lengths, near = self.near(vectors)
        bins = first * self.n_species + species[second]
        return Moments(
            self._summed(bins, self.radial(lengths), len(species)),
            self._summed(bins[near], self.angular(vectors[near], lengths[near]), len(species)),
        )

    def descriptors(self, moments: Moments, species: Tensor) -> Tensor:
        """Return the descriptors behind these sums, shape (n_atoms, width)."""
        radial, angular = moments.radial.sum(dim=1), moments.angular.sum(dim=1)
        own = [radial, self._contracted(angular[:, :-1], angular[:, -1:])]
        if self.weighted:
            spins = self.spins[species][:, :, None]
            bent = moments.angular[:, :, :-1] * spins
            own += [(moments.radial * spins).sum(dim=1)]
            own += [self._contracted(bent.sum(dim=1), (moments.angular[:, :, -1:] * spins**2).sum(dim=1))]
        return torch.cat(own, dim=1)

    def near(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lengths, shape (n_pairs, 1), and which pairs the angular part sees, shape (n_near,)."""
        lengths = (vectors * vectors).sum(dim=1, keepdim=True).sqrt()
        # not finite is near: such a frame must not get finite numbers
        return lengths, (~(lengths.detach()[:, 0] >= self.basis.angular_cutoff)).nonzero()[:, 0]

    def radial(self, lengths: Tensor) -> Tensor:
        """What each pair adds to the radial sums, shape (n_pairs, n_radial + 1)."""
        reach = self.basis.radial_cutoff
        return _cut(lengths, reach) * polynomials(lengths * (2.0 / reach) - 1.0, self.basis.n_radial)

    def angular(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """What each pair adds to the angular sums, shape (n_pairs, (n_angular + 1)² + 1), within the angular cutoff."""
        cut, unit = _cut(lengths, self.basis.angular_cutoff), vectors / lengths
        zenith = polynomials(unit[:, 2:], self.basis.n_angular) @ self.table
        azimuth = _powers(unit[:, :1], unit[:, 1:2], self.basis.n_angular) @ self.pick
        return torch.cat((zenith * azimuth * cut, cut * cut), dim=1)

    def _summed(self, bins: Tensor, columns: Tensor, n_atoms: int) -> Tensor:
        found = columns.new_zeros(n_atoms * self.n_species, columns.shape[1]).index_add(0, bins, columns)
        return found.view(n_atoms, self.n_species, columns.shape[1])

    def _contracted(self, harmonics: Tensor, itself: Tensor) -> Tensor:
        """Sums over j < k of all orders, shape (n_atoms, n_angular + 1); T_n(1) = 1, so j = k adds the same to each."""
        return 0.5 * ((harmonics * harmonics) @ self.squares - itself)


def polynomials(x: Tensor, order: int) -> Tensor:
    """Return T_0 … T_order of x, shape (n, 1), as shape (n, order + 1); T_{k+j} = 2 T_k T_j - T_{k-j} doubles their number each time."""
    found = torch.cat((torch.ones_like(x), x), dim=1)
    while found.shape[1] <= order:
        k = found.shape[1] - 1
        found = torch.cat((found, 2.0 * found[:, k:] * found[:, 1:] - found[:, :k].flip(1)), dim=1)
    return found[:, : order + 1]


def _powers(x: Tensor, y: Tensor, order: int) -> Tensor:
    """Real and imaginary parts of (x + iy)^m, shape (n, 2 * (order + 1)): real ones of m = 0 … order, then imaginary ones."""
    real, imaginary = torch.cat((torch.ones_like(x), x), dim=1), torch.cat((torch.zeros_like(y), y), dim=1)
    while real.shape[1] <= order:
        last_real, last_imaginary = real[:, -1:], imaginary[:, -1:]
        more = last_real * real[:, 1:] - last_imaginary * imaginary[:, 1:]
        imaginary = torch.cat((imaginary, last_real * imaginary[:, 1:] + last_imaginary * real[:, 1:]), dim=1)
        real = torch.cat((real, more), dim=1)
    return torch.cat((real[:, : order + 1], imaginary[:, : order + 1]), dim=1)


def _cut(lengths: Tensor, reach: float) -> Tensor:
    return 0.5 * torch.cos(lengths * (math.pi / reach)) + 0.5


def _harmonic_tables(order: int) -> tuple[Array, Array]:
    """What makes C_lm of T_0(z) … T_order(z), shape (order + 1, n), and of the powers of x + iy, shape (2 * (order + 1), n); n = (order + 1)².

    C_lm = sqrt((2 - delta_m0) (l - m)! / (l + m)!) d^m P_l(z) / dz^m times the real or imaginary part of (x + iy)^m.
    """
    table, pick = np.zeros((order + 1, (order + 1) ** 2)), np.zeros((2 * (order + 1), (order + 1) ** 2))
    column = 0
    for degree in range(order + 1):
        for m in range(degree + 1):
            norm = math.sqrt((2 if m else 1) * math.factorial(degree - m) / math.factorial(degree + m))
            slope = legendre.legder(np.eye(degree + 1)[degree], m)
            nodes = chebyshev.chebpts1(degree - m + 1)
            shape = np.linalg.solve(chebyshev.chebvander(nodes, degree - m), norm * legendre.legval(nodes, slope))
            for part in range(2 if m else 1):
                table[: degree - m + 1, column] = shape
                pick[part * (order + 1) + m, column] = 1.0
                column += 1
    return table, pick


def _legendre_of_chebyshev(order: int) -> Array:
    """What makes T_n(cos) of the squared harmonics, shape ((order + 1)², order + 1): the part of P_l in T_n for each C_lm."""
    nodes, weights = legendre.leggauss(order + 1)
    polynomial = legendre.legvander(nodes, order)
    overlap = (polynomial * weights[:, None]).T @ chebyshev.chebvander(nodes, order)
    degrees = np.arange(order + 1)
    found: Array = np.repeat(overlap * (degrees[:, None] + 0.5), 2 * degrees + 1, axis=0)
    return found
