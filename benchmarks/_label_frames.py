"""Frames for the benchmark of labels: distorted copper-gold/water clusters and short MD. The same on every machine with the same tblite."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "cuau_water_model"))
from moving import XTB, langevin
from sample import composition, random_start, relax

from tumbaga.online.guards import COVALENT_RADII, pair_distances
from tumbaga.online.records import Array, Frame

TEACHER = "GFN1-xTB"
MD_KELVIN, MD_STRIDE, MD_SETTLE = 500.0, 8, 50  # fs
RATIOS = (0.75, 0.80, 0.85, 0.90)  # of the sum of covalent radii, to which one bond is compressed
STRETCHES = (1.05, 1.10, 1.15, 1.20, 1.30, 1.40)  # of all distances
RATTLES = (0.1, 0.2, 0.3, 0.4)  # Å, standard deviation of each coordinate
TEARS = (1.2, 1.4, 1.6, 1.9)  # Å, of one O-H
STRETCHED, COMPRESSED, RATTLED, TORN, MD = "stretched", "compressed", "rattled", "dissociated", "MD"


@dataclass(frozen=True)
class System:
    """A cluster and how many frames of each kind are taken from it."""

    formula: str
    charge: int
    counts: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return f"[{self.formula}]{self.charge:+d}" if self.charge else self.formula


@dataclass(frozen=True, eq=False)
class Case:
    """One frame to be labelled."""

    system: System
    kind: str
    number: int
    frame: Frame

    @property
    def name(self) -> str:
        return f"{self.system.name} {self.kind} {self.number}"


def cases(system: System) -> Iterator[Case]:
    """All frames of a system; the relaxed structures and the MD are those of the neutral cluster by xTB."""
    numbers = composition(system.formula)
    for kind, count in system.counts:
        made = _moving(system.formula, count) if kind == MD else _distorted(system.formula, kind, count)
        for number, positions in enumerate(made):
            yield Case(system, kind, number, Frame(numbers, positions))


@functools.cache
def _relaxed(formula: str, seed: int) -> Array:
    numbers = composition(formula)
    for attempt in itertools.count():
        rng = np.random.default_rng([seed, attempt, *numbers])
        try:
            return relax(random_start(numbers, rng), XTB(TEACHER, numbers), 150)
        except RuntimeError:  # of this start xTB does not converge
            continue
    raise AssertionError


def _moving(formula: str, count: int) -> Iterator[Array]:
    numbers = composition(formula)
    path = langevin(numbers, _relaxed(formula, 0), XTB(TEACHER, numbers), MD_KELVIN, np.random.default_rng([7, *numbers]))
    for positions, _ in itertools.islice(path, MD_SETTLE, MD_SETTLE + MD_STRIDE * count, MD_STRIDE):
        yield positions.copy()


def _distorted(formula: str, kind: str, count: int) -> Iterator[Array]:
    numbers = composition(formula)
    starts = [_relaxed(formula, seed) for seed in range(2)]
    for k in range(count):
        rng, positions = np.random.default_rng([len(kind), k, *numbers]), starts[k % 2].copy()
        if kind == STRETCHED:
            positions *= STRETCHES[k % len(STRETCHES)]
            yield positions + 0.05 * rng.standard_normal(positions.shape)
        elif kind == RATTLED:
            yield positions + RATTLES[k % len(RATTLES)] * rng.standard_normal(positions.shape)
        elif kind == COMPRESSED:
            yield _compressed(numbers, positions, RATIOS[(k // 2) % len(RATIOS)], k // 2)
        else:
            yield _torn(numbers, positions, k, rng)


def _compressed(numbers: Array, positions: Array, ratio: float, turn: int) -> Array:
    """One bond, the nearest of its kind (metal-metal, metal-oxygen, oxygen-hydrogen in turn), at a ratio of its covalent length."""
    metal, oxygen, hydrogen = numbers > 20, numbers == 8, numbers == 1
    kinds = [(metal, oxygen), (oxygen, hydrogen)]
    if metal.sum() > 1:
        kinds.insert(0, (metal, metal))
    one, other = kinds[turn % len(kinds)]
    distances = np.where(one[:, None] & other[None, :], pair_distances(Frame(numbers, positions)), np.inf)
    first, second = np.unravel_index(int(np.argmin(distances)), distances.shape)
    length = ratio * float(COVALENT_RADII[numbers[first]] + COVALENT_RADII[numbers[second]])
    axis = positions[second] - positions[first]
    step = axis * (length / np.linalg.norm(axis) - 1.0)
    group = [second]
    if oxygen[second]:  # the water comes along whole
        group += [h for h in np.flatnonzero(hydrogen) if np.linalg.norm(positions[h] - positions[second]) < 1.3]
    positions[group] += step
    return positions


def _torn(numbers: Array, positions: Array, k: int, rng: np.random.Generator) -> Array:
    """A hydrogen of water pulled out along its bond, or, every second pair of frames, put on a metal 1.6 Å away from it."""
    oxygen = int(rng.choice(np.flatnonzero(numbers == 8)))
    near = np.linalg.norm(positions - positions[oxygen], axis=1)
    hydrogen = int(min(np.flatnonzero(numbers == 1), key=lambda atom: near[atom]))
    if (k // 2) % 2:
        metal = int(rng.choice(np.flatnonzero(numbers > 20)))
        outward = positions[metal] - positions.mean(axis=0) + 0.5 * rng.standard_normal(3)
        positions[hydrogen] = positions[metal] + 1.6 * outward / np.linalg.norm(outward)
    else:
        axis = positions[hydrogen] - positions[oxygen]
        positions[hydrogen] = positions[oxygen] + TEARS[(k // 4 + k % 2 * 2) % len(TEARS)] * axis / np.linalg.norm(axis)
    return positions
