"""Chebyshev fingerprints of neighbourhoods, in torch: pair vectors and species in, descriptors of every atom out. Knows no frames.

    radial   R_n = sum_j s_j f(r_ij; R_r) T_n(2 r_ij / R_r - 1)
    angular  A_n = sum_{j<k} s_j s_k f(r_ij; R_a) f(r_ik; R_a) T_n(cos theta_ijk)

with f(r; R) = (cos(pi r / R) + 1) / 2 inside R, once with s = 1 and, where there are several species, once with a weight s for each of
them.

The angular part is linear in the number of neighbours: T_n is a sum over Legendre polynomials P_l, and by the addition theorem

    sum_jk g_j g_k P_l(u_j · u_k) = sum_m (sum_j g_j C_lm(u_j))²

with real spherical harmonics C_lm (so normalised that C_00 = 1). Half of that, less the terms j = k, is the sum over j < k. Nothing
larger than pairs times (n_angular + 1)² is ever made. Harmonics rather than moments of x, y, z: they are fewer, and their squares do not
cancel, so that float32 is enough.

Source:
    N. Artrith, A. Urban, G. Ceder, Phys. Rev. B 96, 014112 (2017).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
        angular: harmonics, shape (n_atoms, n_species, (n_angular + 1)²).
        itself: squared cut-offs, shape (n_atoms, n_species, 1).
    """

    radial: Tensor
    angular: Tensor
    itself: Tensor


class Fingerprint(nn.Module):
    """Descriptors of all atoms; their derivatives are continuous, they vanish for an atom alone. Its weights of species are a buffer.

    Args:
        basis: cutoffs and orders.
        spins: weight of each neighbour species (columns) as seen by each species (rows), shape (n_species, n_species).
        weighted: whether the weighted descriptors follow the plain ones.
    """

    spins: Tensor
    table: Tensor
    pick: Tensor
    squares: Tensor
    slope: Tensor
    radial_slope: Tensor
    powers_slope: Tensor

    def __init__(self, basis: Basis, spins: Array, weighted: bool) -> None:
        super().__init__()
        self.basis, self.weighted, self.n_species = basis, weighted, len(spins)
        order = basis.n_angular
        table, pick = _harmonic_tables(order)
        derived = {
            "table": table,
            "pick": pick,
            "squares": _legendre_of_chebyshev(order),
            "slope": _slope_of_polynomials(order),
            "radial_slope": _slope_of_polynomials(basis.n_radial),
            "powers_slope": _slope_of_powers(order),
        }
        self.register_buffer("spins", torch.tensor(spins, dtype=torch.float64))
        for name, value in derived.items():
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
        bins, n_bins = first * self.n_species + species[second], len(species) * self.n_species
        columns = self.angular(vectors.index_select(0, near), lengths.index_select(0, near))
        summed = (
            vectors.new_zeros(n_bins, self.basis.n_radial + 1).index_add(0, bins, self.radial(lengths)),
            *torch.split_with_sizes(
                columns.new_zeros(n_bins, columns.shape[1]).index_add(0, bins[near], columns), [columns.shape[1] - 1, 1], dim=1
            ),
        )
        return Moments(*(one.view(len(species), self.n_species, one.shape[1]) for one in summed))

    def descriptors(self, moments: Moments, species: Tensor) -> Tensor:
        """Return the descriptors behind these sums, shape (n_atoms, width)."""
        weights = self.weights(species)
        harmonics = weights @ moments.angular
        # T_n(1) = 1, so the terms j = k add the same to all orders
        angular = 0.5 * ((harmonics * harmonics) @ self.squares - (weights * weights) @ moments.itself)
        return torch.cat((weights @ moments.radial, angular), dim=2).view(len(species), self.width)

    def weights(self, species: Tensor) -> Tensor:
        """Return the weights of the neighbours of atoms, shape (n_atoms, 1 or 2, n_species): ones, then, if there are any, the others."""
        own = self.spins[species]
        return torch.stack((torch.ones_like(own), own) if self.weighted else (torch.ones_like(own),), dim=1)

    def near(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lengths, shape (n_pairs, 1), and which pairs the angular part sees, shape (n_near,)."""
        lengths = (vectors * vectors).sum(dim=1, keepdim=True).sqrt()
        # not finite is near: such a frame must not get finite numbers
        return lengths, (~(lengths.detach()[:, 0] >= self.basis.angular_cutoff)).nonzero()[:, 0]

    def radial(self, lengths: Tensor) -> Tensor:
        """What each pair adds to the radial sums, shape (n_pairs, n_radial + 1)."""
        reach = self.basis.radial_cutoff
        return _cut(lengths, reach) * polynomials(lengths * (2.0 / reach) - 1.0, self.radial_slope)

    def angular(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        """What each pair adds to the angular sums, shape (n_pairs, (n_angular + 1)² + 1), within the angular cutoff."""
        cut = _cut(lengths, self.basis.angular_cutoff)
        x, y, z = torch.split_with_sizes(vectors / lengths, [1, 1, 1], dim=1)
        zenith = polynomials(z, self.slope) @ self.table
        azimuth: Tensor = _Powers.apply(x, y, self.powers_slope) @ self.pick  # type: ignore[no-untyped-call]
        return torch.cat((zenith * azimuth * cut, cut * cut), dim=1)


class _Polynomials(torch.autograd.Function):
    """T_0 … T_n, whose slopes are sums of themselves: much less to remember and to go back through than the recurrence."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        found = x.new_empty(len(x), len(slope))
        found[:, :1] = 1.0
        found[:, 1:2] = x[:, : len(slope) - 1]
        have = 2
        while have < len(slope):  # T_{k+j} = 2 T_k T_j - T_{k-j}
            more = min(have - 1, len(slope) - have)
            found[:, have : have + more] = 2.0 * found[:, have - 1 : have] * found[:, 1 : 1 + more]
            found[:, have : have + more] -= found[:, have - 1 - more : have - 1].flip(1)
            have += more
        ctx.save_for_backward(found, slope)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        found, slope = ctx.saved_tensors
        return ((gradients[0] @ slope) * found).sum(dim=1, keepdim=True), None


class _Powers(torch.autograd.Function):
    """Real parts of (x + iy)^m, m = 0 … n, then the imaginary parts; slopes are sums of themselves here, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        factors = torch.complex(x, y).expand(len(x), slope.shape[1] // 2).clone()
        factors[:, 0] = 1.0
        powers = torch.cumprod(factors, dim=1)
        found = torch.cat((powers.real, powers.imag), dim=1)
        ctx.save_for_backward(found, slope)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        found, slope = ctx.saved_tensors
        along = ((gradients[0] @ slope[0]) * found).sum(dim=1, keepdim=True)
        across = ((gradients[0] @ slope[1]) * found).sum(dim=1, keepdim=True)
        return along, across, None


def polynomials(x: Tensor, slope: Tensor) -> Tensor:
    """Return T_0 … T_n of x, shape (n_values, 1), as shape (n_values, n + 1); twice differentiable and more.

    Args:
        x: the arguments.
        slope: what makes the sum of slopes, weighted with g, of T: g @ slope · T; shape (n + 1, n + 1).
    """
    found: Tensor = _Polynomials.apply(x, slope)  # type: ignore[no-untyped-call]
    return found


def _cut(lengths: Tensor, reach: float) -> Tensor:
    return 0.5 * torch.cos(lengths * (math.pi / reach)) + 0.5


def _harmonic_tables(order: int) -> tuple[Array, Array]:
    """What makes C_lm of T_0(z) … T_order(z), shape (order + 1, n), and of powers of x + iy, shape (2 * (order + 1), n); n = (order + 1)².

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


def _slope_of_polynomials(order: int) -> Array:
    """Row n: dT_n/dx as a sum over T, shape (order + 1, order + 1)."""
    found = np.zeros((order + 1, order + 1))
    for n in range(1, order + 1):
        found[n, :n] = chebyshev.chebder(np.eye(n + 1)[n])
    return found


def _slope_of_powers(order: int) -> Array:
    """Row of a power: its derivatives by x and by y as sums over the powers, shape (2, 2 * (order + 1), 2 * (order + 1))."""
    count = order + 1
    found = np.zeros((2, 2 * count, 2 * count))
    for m in range(1, count):
        real, imaginary, lower = m, count + m, m - 1
        found[0, real, lower] = found[0, imaginary, count + lower] = m
        found[1, real, count + lower], found[1, imaginary, lower] = -m, m
    return found
