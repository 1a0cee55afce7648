"""Uncertainty of a linear readout: a cheap score of every atom at every step, the exact spread of every force where force rows are at hand.

Pure numpy, float64 but for the score. Source: Bigi, Chong, Ceriotti, Grasselli, arXiv 2403.02251 (prediction rigidity of the last layer).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tumbaga.online.records import Array, Ints

_WIDE = 128  # features of an atom from which the product for all species is dearer than parting the atoms by species


class AtomScore:
    """Per-atom score sqrt(f_i^T C_z f_i) for one covariance, prepared so that a call is one matrix product.

    In float32: the score needs no more digits, and at every step the factors displace from the cache what the network needs.

    Args:
        covariance: of the readout, shape (n_columns, n_columns), eV²; element blocks, n_columns = n_species * n_hidden.
        n_species: how many blocks.
    """

    def __init__(self, covariance: Array, n_species: int) -> None:
        n_hidden = len(covariance) // n_species
        starts = range(0, n_species * n_hidden, n_hidden)
        self._roots = [_root(covariance[start : start + n_hidden, start : start + n_hidden]).astype(np.float32) for start in starts]
        self._factors = np.ascontiguousarray(np.hstack(self._roots))
        self._shape = (n_species, n_hidden)

    def __call__(self, features: Array, species: Ints) -> Array:
        """Return the score of each atom, shape (n_atoms,), float64, eV (its share of the energy's standard deviation).

        Args:
            features: last-layer features, shape (n_atoms, n_hidden).
            species: index of each atom's block, shape (n_atoms,).
        """
        features = np.asarray(features, dtype=np.float32)
        if self._shape[1] >= _WIDE:
            return self._by_species(features, species)
        # of few features every atom times every species' factor costs less than parting the atoms
        spread = (features @ self._factors).reshape(len(features), *self._shape)
        squares = np.einsum("nsh,nsh->ns", spread, spread)[np.arange(len(features)), species]
        scores: Array = np.sqrt(squares, dtype=np.float64)
        return scores

    def _by_species(self, features: Array, species: Ints) -> Array:
        scores = np.empty(len(features))
        for one in np.unique(species):
            atoms = np.flatnonzero(species == one)
            scores[atoms] = np.linalg.norm(features[atoms] @ self._roots[one], axis=1)
        return scores


def atom_lpr(features: Array, species: Ints, blocks: Array) -> Array:
    """Return sqrt(f_i^T C_z f_i) of each atom from covariance blocks, shape (n_species, n_hidden, n_hidden); the plain form of `AtomScore`."""
    scores: Array = np.sqrt(np.maximum(np.einsum("nh,nhk,nk->n", features, blocks[species], features), 0.0))
    return scores


def species_index(numbers: Ints, elements: Sequence[int]) -> Ints:
    """Return the block of each atom, shape (n_atoms,), int64.

    Raises:
        KeyError: an atomic number is not among the elements.
    """
    places = {z: place for place, z in enumerate(elements)}
    return np.array([places[int(z)] for z in numbers], dtype=np.int64)


def force_std(rows: Array, covariance: Array) -> Array:
    """Return the standard deviation of each atom's force, norm over xyz, shape (n_atoms,), float64, eV/Å.

    Args:
        rows: -dphi/dR, shape (3 * n_atoms, n_columns), per Å.
        covariance: of the readout, shape (n_columns, n_columns), eV².
    """
    variances = np.einsum("ij,ij->i", rows @ covariance, rows)
    stds: Array = np.sqrt(np.maximum(variances.reshape(-1, 3).sum(axis=1), 0.0))
    return stds


@dataclass(frozen=True)
class ScoreScale:
    """A running, robust ratio between the largest force std of a frame and its largest atom score; start anew after each swap.

    The median over recent frames, so that one odd frame does not move it.

    Attributes:
        ratios: the last ratios, oldest first, 1/Å.
        memory: how many are kept.
    """

    ratios: tuple[float, ...] = ()
    memory: int = 32
    _median: float = math.nan

    @property
    def known(self) -> bool:
        """Whether any frame has been seen with both numbers."""
        return bool(self.ratios)

    def updated(self, score_max: float, sigma_max: float) -> ScoreScale:
        """Return the scale after a frame with both numbers; itself where the ratio means nothing (zero or not finite)."""
        ratio = sigma_max / score_max if score_max > 0 else math.nan
        if not (math.isfinite(ratio) and ratio > 0):
            return self
        ratios = (*self.ratios, ratio)[-self.memory :]
        return ScoreScale(ratios, self.memory, statistics.median(ratios))

    def sigma(self, score_max: float) -> float:
        """Return the estimated largest force std, eV/Å; inf while nothing is known, which asks for the exact one."""
        return score_max * self._median if self.ratios else math.inf


def _root(block: Array) -> Array:
    """A matrix S with S S^T = block; by eigenvalues, which unlike Cholesky bears a block that is singular to rounding."""
    values, vectors = np.linalg.eigh(block)
    root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
    return root
