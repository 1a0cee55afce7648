"""Pairs in blocks of atoms with equally many neighbours, for ``painn_step``: what depends on one pair vector alone, and back. numpy only."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from tumbaga.online.records import Array, Ints

Numbers = npt.NDArray[Any]  # float32 or float64, as the network
BLOCK: Final = 1024  # pairs that are treated at once


class Radial(NamedTuple):
    """The cutoff, Å, and the frequencies of the radial basis."""

    cutoff: float
    frequencies: Numbers


class Block(NamedTuple):
    """Some atoms, their pairs in equal numbers, and what depends on one pair vector alone."""

    atoms: slice
    rows: Ints  # of the pair list, (atoms, neighbours); its end where there is no such neighbour
    second: Ints  # (atoms, neighbours)
    species: Ints  # of `second`
    unit: Numbers  # (atoms, neighbours, 3)
    inverse: Numbers  # 1/r, (atoms, neighbours, 1)
    basis: Numbers  # (atoms, neighbours, n_radial)
    bent: Numbers  # unit times basis, (atoms, neighbours, 3, n_radial)
    slope: Numbers  # d basis / dr


class Found(NamedTuple):
    """Gradients with respect to what the block calls basis and bent."""

    basis: Numbers
    bent: Numbers


def blocks(vectors: Array, second: Ints, species: Ints, counts: Ints, order: Ints, radial: Radial) -> list[Block]:
    """Split atoms into blocks.

    Args:
        vectors, second: of all pairs, those of an atom together, atom after atom.
        species: of all atoms.
        counts: how many pairs each atom has.
        order: atoms in the order of the blocks, with ascending counts: less to pad.
        radial: what the basis is made of.
    """
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    # one pair more, beyond the cutoff, stands where an atom has no further neighbour
    vectors = np.concatenate((vectors, [[2.0 * radial.cutoff, 0.0, 0.0]])).astype(radial.frequencies.dtype)
    seen = np.concatenate((place[second], [0]))
    starts, ends, sizes = (np.cumsum(counts) - counts)[order], np.cumsum(counts)[order], counts[order]
    found, begin = [], 0
    while begin < len(order):
        # sizes ascend, so the last atom of a block has most neighbours
        width = sizes[begin : begin + BLOCK] * np.arange(1, len(sizes[begin : begin + BLOCK]) + 1)
        end = begin + max(1, int(np.searchsorted(width, BLOCK, side="right")))
        rows = starts[begin:end, None] + np.arange(max(1, sizes[end - 1]))
        there = rows < ends[begin:end, None]
        rows = np.where(there, rows, len(second))
        # the neighbour that is not there is the atom itself: times 0, but 0 times what another frame says may not be 0
        beside = np.where(there, seen[rows], np.arange(begin, end)[:, None])
        found.append(_block(slice(begin, end), rows, beside, species[order], vectors, radial))
        begin = end
    return found


def _block(atoms: slice, rows: Ints, second: Ints, species: Ints, vectors: Numbers, radial: Radial) -> Block:
    vectors = vectors.take(rows, axis=0)
    square = _dot(vectors, vectors)
    distance, reach = np.sqrt(square), radial.cutoff**-2
    inverse = 1.0 / distance
    left = np.maximum(1.0 - square * reach, 0.0)
    envelope = left * left * left * inverse
    envelope_slope = -left * left * (left * inverse * inverse + 6.0 * reach)
    phase = distance * radial.frequencies
    sine = np.sin(phase)
    slope = sine * envelope_slope + np.cos(phase) * (envelope * radial.frequencies)
    unit, basis = vectors * inverse, sine * envelope
    bent = unit[..., None] * basis[:, :, None]
    return Block(atoms, rows, second, species[second], unit, inverse, basis, bent, slope)


def _dot(left: Numbers, right: Numbers) -> Numbers:
    """Over the last axis, which is short and is kept."""
    found: Numbers = np.einsum("...c,...c->...", left, right)[..., None]
    return found


def along_vectors(block: Block, found: Found) -> Numbers:
    """The gradient with respect to pair vectors, from those with respect to basis and bent."""
    along = np.einsum("njak,njk->nja", found.bent, block.basis)
    basis = found.basis + np.einsum("njak,nja->njk", found.bent, block.unit)
    across = along - block.unit * _dot(along, block.unit)
    gradient: Numbers = block.unit * _dot(basis, block.slope) + across * block.inverse
    return gradient
