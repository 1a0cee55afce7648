"""The cheap guards: is a frame something a potential may be asked about, and may its prediction be served? Pure numpy; knows no policy.

Absolute limits, from the first step on; `sequence` has those that learn from a run what is usual in it.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tumbaga.online.records import Array, Frame, Prediction

OVERLAP_RATIO = 0.3  # of the sum of covalent radii: nearer pairs are inside each other's cores, no label of them is of use
CLOSE_RATIO = 0.55  # nearer pairs are met in no run that goes well
MAX_FORCE = 1000.0  # eV/Å: no thermostat survives one step with it
_FEW = 400  # atoms up to which a table of all pairs is fastest
_BLOCK = 512  # rows of the distance table held at once, so that large frames need little memory

_RADII = (
    0.31, 0.28, 1.28, 0.96, 0.84, 0.76, 0.71, 0.66, 0.57, 0.58, 1.66, 1.41, 1.21, 1.11, 1.07, 1.05,
    1.02, 1.06, 2.03, 1.76, 1.70, 1.60, 1.53, 1.39, 1.39, 1.32, 1.26, 1.24, 1.32, 1.22, 1.22, 1.20,
    1.19, 1.20, 1.20, 1.16, 2.20, 1.95, 1.90, 1.75, 1.64, 1.54, 1.47, 1.46, 1.42, 1.39, 1.45, 1.44,
    1.42, 1.39, 1.39, 1.38, 1.39, 1.40, 2.44, 2.15, 2.07, 2.04, 2.03, 2.01, 1.99, 1.98, 1.98, 1.96,
    1.94, 1.92, 1.92, 1.89, 1.90, 1.87, 1.87, 1.75, 1.70, 1.62, 1.51, 1.44, 1.41, 1.36, 1.36, 1.32,
    1.45, 1.46, 1.48, 1.40, 1.50, 1.50, 2.60, 2.21, 2.15, 2.06, 2.00, 1.96, 1.90, 1.87, 1.80, 1.69,
)  # fmt: skip

COVALENT_RADII: Array = np.full(119, 1.69)
"""Covalent radii by atomic number, shape (119,), float64, Å; entry 0 has no meaning, 97–118 repeat curium.

Source: Cordero et al., Dalton Trans. 2832 (2008), doi:10.1039/b801115j (low-spin Mn, Fe, Co are 1.39, 1.32, 1.26; sp3 carbon 0.76).
"""
COVALENT_RADII[1:97] = _RADII
COVALENT_RADII.setflags(write=False)


class Verdict(enum.IntEnum):
    """How bad a finding is; the larger, the worse."""

    OK = 0
    WARN = 1  # unusual: worth a label
    CRIT = 2  # another version may do better, or the frame does not follow from those before it
    DEAD = 3  # never answer with numbers


@dataclass(frozen=True)
class Finding:
    """What a guard found.

    Attributes:
        verdict: how bad it is.
        sentence: what was seen and where, for the log and the engine's user; empty if OK.
    """

    verdict: Verdict
    sentence: str = ""


QUIET = Finding(Verdict.OK)
"""The finding of a guard that saw nothing wrong."""


def check_numbers(positions: npt.ArrayLike, cell: npt.ArrayLike) -> Finding:
    """Judge raw input before a `Frame` is made of it: DEAD if a number is not finite.

    Args:
        positions: shape (n_atoms, 3), any unit.
        cell: shape (3, 3), any unit.
    """
    if not np.isfinite(positions).all():
        return Finding(Verdict.DEAD, "a position is not finite")
    if not np.isfinite(cell).all():
        return Finding(Verdict.DEAD, "the cell holds a number that is not finite")
    return QUIET


def check_frame(frame: Frame) -> Finding:
    """Judge the geometry: DEAD if any pair is nearer than OVERLAP_RATIO times the sum of its covalent radii, CRIT below CLOSE_RATIO."""
    if not any_pair_within(frame, 0.0):
        return QUIET
    ratio, first, second = closest_pair(frame)
    if ratio >= CLOSE_RATIO:
        return QUIET
    verdict, limit = (Verdict.DEAD, OVERLAP_RATIO) if ratio < OVERLAP_RATIO else (Verdict.CRIT, CLOSE_RATIO)
    radii = COVALENT_RADII[frame.numbers[first]] + COVALENT_RADII[frame.numbers[second]]
    return Finding(verdict, f"atoms {first} and {second} are {ratio * radii:.3f} Å apart, less than {limit} of their covalent radii")


def check_prediction(prediction: Prediction, max_force: float = MAX_FORCE) -> Finding:
    """Judge what a potential said: CRIT if anything is not finite, DEAD if a force is beyond `max_force` (eV/Å)."""
    forces = prediction.forces
    together = float(np.vdot(forces, forces))
    # the usual case in two products: all forces together are below the limit for one, and NaN is below nothing
    if together <= max_force**2 and math.isfinite(prediction.energy) and math.isfinite(np.vdot(prediction.virial, prediction.virial)):
        return QUIET
    largest = float(np.einsum("ij,ij->i", forces, forces).max())  # the square; NaN and inf survive it
    if not np.isfinite(largest) or not prediction.finite:
        return Finding(Verdict.CRIT, "the potential returned a number that is not finite")
    if largest > max_force**2:
        return Finding(Verdict.DEAD, f"the largest force is {np.sqrt(largest):.0f} eV/Å, more than {max_force:.0f}")
    return QUIET


@functools.lru_cache(maxsize=256)
def _largest_radius(numbers: bytes) -> float:
    """The largest covalent radius, Å, of atoms given as int64 atomic numbers; a run asks for the same again and again."""
    return float(COVALENT_RADII[np.frombuffer(numbers, np.int64)].max())


def any_pair_within(frame: Frame, extra: float, overlap: float = CLOSE_RATIO) -> bool:
    """Whether any pair is nearer than `overlap` times the sum of its covalent radii and `extra` (Å) more; cheap where, as usual, none is."""
    most = overlap * 2.0 * _largest_radius(frame.numbers.tobytes()) + extra
    if frame.periodic or len(frame) > _FEW:
        return _swept(frame, overlap, extra, most)
    centred = frame.positions - frame.positions[0]  # far-away clusters would lose digits
    products = centred @ centred.T
    norms = products.diagonal()
    squares = norms[:, None] + norms
    squares -= 2.0 * products
    squares.flat[:: len(frame) + 1] = np.inf
    if squares.min() > most * most:
        return False
    radii = COVALENT_RADII[frame.numbers]
    return bool((squares < (overlap * (radii[:, None] + radii) + extra) ** 2).any())


def _swept(frame: Frame, overlap: float, extra: float, most: float) -> bool:
    """`any_pair_within` for many atoms: sorted along one axis, each is compared with the next ones as long as they are within `most`, Å."""
    if frame.periodic:
        inverse = np.linalg.inv(frame.cell)
        widths = 1.0 / np.linalg.norm(inverse, axis=0)
        if widths.min() < 2.0 * most:
            return True  # an atom may meet itself: left to those who look at every pair
        places = frame.positions @ inverse
        places -= np.floor(places)
    else:
        widths, places = np.ones(3), frame.positions
    axis = int((np.ptp(places, axis=0) * widths).argmax())
    order = np.argsort(places[:, axis])
    if frame.periodic:  # those at the beginning follow upon those at the end
        again = order[: np.searchsorted(places[order, axis], most / widths[axis], side="right")]
        order = np.concatenate([order, again])
        places = places[order]
        places[len(frame) :, axis] += 1.0
    else:
        places = places[order]
    along, radii = places[:, axis] * widths[axis], COVALENT_RADII[frame.numbers[order]]
    for step in range(1, len(order)):
        near = np.flatnonzero(along[step:] - along[:-step] < most)
        if not near.size:
            return False
        apart = places[near + step] - places[near]
        if frame.periodic:
            apart -= np.round(apart)
            apart = apart @ frame.cell
        squares = np.einsum("ij,ij->i", apart, apart)
        if (squares < (overlap * (radii[near + step] + radii[near]) + extra) ** 2).any():
            return True
    return False


def closest_pair(frame: Frame) -> tuple[float, int, int]:
    """Return the smallest distance over the sum of covalent radii, and the pair; (inf, 0, 0) for a single atom.

    Periodic frames use the nearest image by rounding fractional coordinates. That is exact for every distance below half the cell's
    smallest width, so nothing nearer than an overlap is missed in a cell wider than about 3 Å.
    """
    best = (np.inf, 0, 0)
    for start in range(0, len(frame), _BLOCK):
        ratios = _ratios_squared(frame, start, min(start + _BLOCK, len(frame)))
        place = int(ratios.argmin())
        first, second = divmod(place, len(frame))
        if ratios.flat[place] < best[0]:
            best = (float(ratios.flat[place]), start + first, second)
    return float(np.sqrt(best[0])), best[1], best[2]


def pair_distances(frame: Frame, start: int = 0, stop: int | None = None) -> Array:
    """Return distances of atoms start..stop to all atoms, shape (stop - start, n_atoms), Å; nearest images, inf on the diagonal."""
    squares = _squares(frame, start, len(frame) if stop is None else stop)
    return np.sqrt(squares)


def _squares(frame: Frame, start: int, stop: int) -> Array:
    squares = _nearest_image_squares(frame, start, stop) if frame.periodic else _open_squares(frame.positions, start, stop)
    squares[np.arange(stop - start), np.arange(start, stop)] = np.inf
    return squares


def _open_squares(positions: Array, start: int, stop: int) -> Array:
    # one matrix product instead of a table of vectors; centred, or far-away clusters would lose digits
    centred = positions - positions[0]
    norms = np.einsum("ij,ij->i", centred, centred)
    squares: Array = centred[start:stop] @ centred.T
    squares *= -2.0
    squares += norms[start:stop, None]
    squares += norms
    np.maximum(squares, 0.0, out=squares)
    return squares


def _nearest_image_squares(frame: Frame, start: int, stop: int) -> Array:
    vectors = (frame.positions[None, :, :] - frame.positions[start:stop, None, :]) @ np.linalg.inv(frame.cell)
    vectors -= np.round(vectors)
    vectors = vectors @ frame.cell
    squares: Array = np.einsum("ijk,ijk->ij", vectors, vectors)
    return squares


def _ratios_squared(frame: Frame, start: int, stop: int) -> Array:
    radii = COVALENT_RADII[frame.numbers]
    sums = radii[start:stop, None] + radii[None, :]
    return _squares(frame, start, stop) / (sums * sums)
