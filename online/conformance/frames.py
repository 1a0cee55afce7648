"""Sound frames for the checks, made from covalent radii: what a user of the suite need not think of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tumbaga.online.guards import COVALENT_RADII
from tumbaga.online.records import Array, Frame

_MOST = 4  # elements, of those that are known
_ANY = (1, 8, 29)  # for potentials that do not care
_SPACING, _RATTLE = 1.1, 0.06  # of the largest sum of two covalent radii


def sample_frames(elements: Sequence[int], seed: int = 0) -> list[Frame]:
    """Return an atom, a pair, a cluster of seven atoms and a crystal of four, with no two atoms nearer than in a bond.

    Args:
        elements: atomic numbers that the potential knows; of many a few are taken, empty means any.
        seed: of species and places.
    """
    chosen, rng = _few(elements), np.random.default_rng(seed)
    bond = _bond(chosen)
    grid = np.array([[x, y, z] for x in range(2) for y in range(2) for z in range(2)], dtype=np.float64)
    clusters = [Frame(_species(chosen, n, rng), bond * grid[:n] + _RATTLE * bond * rng.uniform(-1, 1, (n, 3))) for n in (1, 2, 7)]
    cell = bond * np.array([[2.0, 0.0, 0.0], [0.2, 2.1, 0.0], [-0.1, 0.3, 1.1]])
    places = np.array([[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0.5, 0.5, 0]]) @ cell
    return [*clusters, Frame(_species(chosen, 4, rng), places + _RATTLE * bond * rng.uniform(-1, 1, (4, 3)), cell, True)]


def sample_crystal(elements: Sequence[int], widest: float = np.inf) -> Frame:
    """Return a crystal of two atoms in a slanted cell whose vectors are no longer than `widest`, Å."""
    chosen = _few(elements)
    side = min(1.2 * _bond(chosen), widest / 1.1)
    cell = side * np.array([[1.0, 0.0, 0.0], [0.1, 1.02, 0.0], [-0.05, 0.15, 1.05]])
    return Frame(_species(chosen, 2, np.random.default_rng(0)), np.array([[0.0, 0.0, 0.0], [0.46, 0.53, 0.49]]) @ cell, cell, True)


def boxed(frame: Frame, gap: float) -> Frame:
    """Return a cluster in a slanted periodic box in which it is at least `gap` Å from all its images."""
    width = float(np.ptp(frame.positions, axis=0).max()) + gap
    return replace(frame, cell=width * np.array([[1.3, 0.0, 0.0], [0.2, 1.4, 0.0], [-0.1, 0.2, 1.5]]), periodic=True)


def turned(frame: Frame, turn: Array) -> Frame:
    """Return a frame under a rotation, shape (3, 3)."""
    return replace(frame, positions=frame.positions @ turn.T, cell=frame.cell @ turn.T)


def _few(elements: Sequence[int]) -> tuple[int, ...]:
    known = tuple(elements) or _ANY
    return tuple(known[k] for k in np.unique(np.linspace(0, len(known) - 1, _MOST).round().astype(int)))


def _bond(elements: Sequence[int]) -> float:
    return _SPACING * 2.0 * float(COVALENT_RADII[list(elements)].max())


def _species(elements: Sequence[int], n: int, rng: np.random.Generator) -> np.ndarray:
    """All of them as far as there are places, so that none goes untested; shape (n,), int64."""
    return rng.permutation(np.resize(np.array(elements, dtype=np.int64), n))
