"""Pairs of a frame and what holds for any pair by itself: the neighbour list and the repulsive core. numpy float64, no torch."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from ase.data import covalent_radii
from vesin import NeighborList

from tumbaga.online.records import Array, Frame, Ints

DENSE_LIMIT: Final = 100  # atoms; all distances at once, against a cell list: 0.02, 0.1, 0.6 against 0.07, 0.35, 1.1 ms at 8, 30, 100 atoms
MARGIN: Final = 1e-6  # Å, above all rounding of a search: what is closer than the cutoff is found, and `within` decides
CORE_INNER, CORE_OUTER = 0.4, 0.7  # of the sum of covalent radii: the core is whole below the first, and gone from the second on
_COULOMB: Final = 14.399645  # e^2 / (4 pi epsilon_0), eV Å
_BOHR: Final = 0.529177  # Å
_ZBL: Final = ((0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162))


class Pairs(NamedTuple):
    """All ordered pairs of a frame within a cutoff.

    Attributes:
        first: rows of the atoms that look, shape (n_pairs,), int64, ascending.
        second: rows of the atoms seen, shape (n_pairs,), int64.
        vectors: from first to the image of second, shape (n_pairs, 3), float64, Å.
    """

    first: Ints
    second: Ints
    vectors: Array


class Candidates(NamedTuple):
    """Pairs that are, or may soon be, closer than a cutoff; ascending in (first, second, image), which no motion changes.

    Attributes:
        first, second: as in `Pairs`.
        images: cells between the positions of `second` as they stand and its image, shape (n_pairs, 3); None without a cell.
        offsets: the same in Å, shape (n_pairs, 3), float64; None without a cell.
    """

    first: Ints
    second: Ints
    images: Ints | None
    offsets: Array | None


def pairs(frame: Frame, cutoff: float) -> Pairs:
    """Return all ordered pairs closer than the cutoff (Å), images included, ascending in (first, second, image).

    Positions need not be wrapped. ``painn_lists`` gives the same to the last bit without searching at every step.
    """
    if not frame.periodic and len(frame) <= DENSE_LIMIT:
        return _dense(frame.positions, cutoff)
    return within(candidates(frame, cutoff + MARGIN), frame.positions, cutoff)


def candidates(frame: Frame, reach: float) -> Candidates:
    """Search all ordered pairs closer than the reach, Å, to the rounding of the search."""
    first, second, images = (numbers.astype(np.int64) for numbers in _searched(frame, reach))
    lowest = images.min(axis=0, initial=0)
    key = first * len(frame) + second
    for axis, span in enumerate(images.max(axis=0, initial=0) - lowest + 1):
        key = key * span + (images[:, axis] - lowest[axis])
    order = np.argsort(key)  # one order for equal frames: sums in float32 depend on it
    first, second = first[order], second[order]
    if not frame.periodic:
        return Candidates(first, second, None, None)
    # an atom that has left its home cell keeps its pairs and their order, only its images count from another place
    homes = np.floor(_fractional(frame)).astype(np.int64)
    images = images[order] + (homes[first] - homes[second])
    return Candidates(first, second, images, offsets(images, frame.cell))


def _searched(frame: Frame, reach: float) -> tuple[npt.NDArray[np.integer[Any]], ...]:
    """First, second and image of all pairs, in any order, of the wrapped positions."""
    positions = frame.positions
    if frame.periodic:
        fractional = _fractional(frame)
        positions = (fractional - np.floor(fractional)) @ frame.cell
    return tuple(NeighborList(cutoff=reach, full_list=True).compute(positions, frame.cell, frame.periodic, "ijS", copy=True))


def _fractional(frame: Frame) -> Array:
    found: Array = frame.positions @ np.linalg.inv(frame.cell)
    return found


def offsets(images: Ints, cell: Array) -> Array:
    """Images in Å. One product after the other: the last bits of a matrix product may depend on how many rows it has."""
    found: Array = images[:, :1] * cell[0] + images[:, 1:2] * cell[1] + images[:, 2:] * cell[2]
    return found


def within(found: Candidates, positions: Array, cutoff: float) -> Pairs:
    """Keep the candidates that are closer than the cutoff now; each number is that of its pair alone, whatever other candidates there are."""
    vectors = positions.take(found.second, axis=0) - positions.take(found.first, axis=0)
    if found.offsets is not None:
        vectors += found.offsets
    kept = np.flatnonzero(_square(vectors) < cutoff * cutoff)
    return Pairs(found.first.take(kept), found.second.take(kept), vectors.take(kept, axis=0))


def _square(vectors: Array) -> Array:
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    found: Array = x * x + y * y + z * z
    return found


def _dense(positions: Array, cutoff: float) -> Pairs:
    between = positions[None] - positions[:, None]
    square = _square(between)
    np.fill_diagonal(square, np.inf)
    first, second = np.nonzero(square < cutoff * cutoff)
    return Pairs(first, second, between[first, second])


class Core:
    """Screened nuclear repulsion at short distance, switched off smoothly (twice differentiable) well below any bond length.

    No training frame shows a network the inside of an atom; without the core it may invent a hole there, and a run falls in.

    Args:
        elements: atomic numbers; species are indices into them.

    Source:
        J. F. Ziegler, J. P. Biersack, U. Littmark, The Stopping and Range of Ions in Solids (1985): universal screening function.
    """

    def __init__(self, elements: tuple[int, ...]) -> None:
        charges = np.array(elements, dtype=np.float64)
        radii = covalent_radii[list(elements)]
        self._contact = radii[:, None] + radii[None]
        self._charge = _COULOMB * charges[:, None] * charges[None]
        self._length = 0.8854 * _BOHR / (charges[:, None] ** 0.23 + charges[None] ** 0.23)
        self._reach = float(CORE_OUTER * self._contact.max())

    def __call__(self, first: Ints, second: Ints, vectors: Array) -> tuple[Array, Array]:
        """Return what each ordered pair adds.

        Args:
            first: species of the looking atoms, shape (n_pairs,).
            second: species of the atoms seen, shape (n_pairs,).
            vectors: shape (n_pairs, 3), float64, Å; a full list.

        Returns:
            Energies, shape (n_pairs,), eV (half the pair energy, since each pair comes twice), and their gradients with respect to the
            vectors, shape (n_pairs, 3), eV/Å.
        """
        energies, gradients = np.zeros(len(vectors)), np.zeros_like(vectors)
        distance = np.sqrt(np.einsum("pc,pc->p", vectors, vectors))
        near = np.flatnonzero(distance < self._reach)
        if near.size:
            near = near[distance[near] < CORE_OUTER * self._contact[first[near], second[near]]]
        if near.size:
            kind, r = (first[near], second[near]), distance[near]
            energy, slope = _switched_zbl(r, self._charge[kind], self._length[kind], self._contact[kind])
            energies[near] = 0.5 * energy
            with np.errstate(divide="ignore", invalid="ignore"):
                gradients[near] = (0.5 * slope / r)[:, None] * vectors[near]
        return energies, gradients


def _switched_zbl(r: Array, charge: Array, length: Array, contact: Array) -> tuple[Array, Array]:
    """Energy (eV) and derivative (eV/Å) of one unordered pair; not finite where two atoms coincide."""
    x = r / length
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        screen = sum(c * np.exp(-b * x) for c, b in _ZBL)
        screen_slope = sum(-c * b * np.exp(-b * x) for c, b in _ZBL) / length
        bare = charge / r * screen
        bare_slope = charge / r * screen_slope - bare / r
        u = np.clip((r / contact - CORE_INNER) / (CORE_OUTER - CORE_INNER), 0.0, 1.0)
        switch = 1.0 - u**3 * (10.0 - 15.0 * u + 6.0 * u * u)
        switch_slope = -30.0 * (u * (1.0 - u)) ** 2 / ((CORE_OUTER - CORE_INNER) * contact)
        energy: npt.NDArray[np.float64] = bare * switch
        slope: npt.NDArray[np.float64] = bare_slope * switch + bare * switch_slope
    return energy, slope
