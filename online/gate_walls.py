"""The gate's check on the walls between atoms, by scans of pairs alone and of bonds in a frame."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Final

import numpy as np
import numpy.typing as npt
from ase.data import chemical_symbols

from tumbaga.online.bonds import BONDED
from tumbaga.online.gate_asking import Asked, Case
from tumbaga.online.gate_records import Check, Limits
from tumbaga.online.guards import COVALENT_RADII
from tumbaga.online.records import Array, Frame

Bools = npt.NDArray[np.bool_]
_RATIOS: Final = np.linspace(0.5, 1.0, 41)  # of the sum of covalent radii
_MANY: Final = 100  # atoms: bonds in larger frames would cost too much
_CLIMB: Final = 1.0  # eV: less of a wall is not compared


def short_range(case: Case) -> Check:
    """Judge atoms that are pressed together: where the original pushes them apart the candidate must, too, and not much less.

    All pairs of elements by themselves, and the shortest bond of each kind in a recent frame.
    """
    scans = [_pair(*pair) for pair in combinations_with_replacement(case.evidence.species, 2)]
    scans += [scan for frame in case.sound[:1] for scan in _bonds(frame)]
    until, problems, worst, scanned, walls = case.until(0.15), [], 1.0, 0, 0
    for scan in scans:
        if scanned and case.clock() >= until:
            break
        scanned += 1
        original = _Wall.of(case.original, scan)
        wall = original.pushes > case.limits.wall
        if not wall.any():
            continue  # not all models have walls everywhere: nothing that was never there is asked for
        walls += 1
        share, told = _Wall.of(case.candidate, scan).against(original, wall, case.limits)
        if share < case.limits.wall_share and share < _Wall.of(case.serving, scan).against(original, wall, case.limits)[0]:
            problems.append(f"{scan.name} {told}")
        worst = min(worst, share)
    numbers = {"pairs": len(scans), "scanned": scanned, "repulsive": walls, "broken": len(problems), "least_share": worst}
    if problems:
        return Check("short range", False, numbers, f"{len(problems)} of {walls} repulsive pairs are so no more: {problems[0]}")
    return Check("short range", True, numbers, f"{walls} of {scanned} pairs are repulsive in the original potential, and still are")


class _Scan:
    """Frames in which an atom comes nearer to another one, which is at the first place, along a line; the nearest first."""

    def __init__(self, name: str, frame: Frame, still: int, moved: int, ratios: Array) -> None:
        apart = frame.positions[moved] - frame.positions[still]
        self.moved, self.way = moved, apart / float(np.linalg.norm(apart))
        kinds = frame.numbers[[still, moved]]
        self.name = f"{chemical_symbols[kinds[0]]}-{chemical_symbols[kinds[1]]}{name}"
        self.distances: Array = ratios * float(COVALENT_RADII[kinds].sum())
        self.frames = []
        for distance in self.distances:
            positions = frame.positions.copy()
            positions[moved] = frame.positions[still] + distance * self.way
            self.frames.append(replace(frame, positions=positions))


def _pair(first: int, second: int) -> _Scan:
    return _Scan("", Frame(np.array([first, second]), np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])), 0, 1, _RATIOS)


def _bonds(frame: Frame) -> list[_Scan]:
    """The shortest bond of each kind; none where a frame is too large for a table of all pairs."""
    if len(frame) > _MANY:
        return []
    radii = COVALENT_RADII[frame.numbers]
    ratios = np.linalg.norm(frame.positions[:, None] - frame.positions[None], axis=2) / (radii[:, None] + radii)
    found: dict[tuple[int, int], _Scan] = {}
    for place in np.argsort(ratios, axis=None):
        first, second = divmod(int(place), len(frame))
        if ratios[first, second] > BONDED:
            break
        kind = (int(frame.numbers[first]), int(frame.numbers[second]))
        if first != second and kind[0] >= kind[1] and kind not in found:
            found[kind] = _Scan(" in a frame", frame, first, second, _RATIOS[ratios[first, second] >= _RATIOS])
    return list(found.values())


class _Wall:
    """A pair over its distances, ascending, Å: energy, eV, and the force that pushes it apart, eV/Å."""

    def __init__(self, distances: Array, energies: Array, pushes: Array) -> None:
        self.distances, self.energies, self.pushes = distances, energies, pushes

    @classmethod
    def of(cls, potential: Asked, scan: _Scan) -> _Wall:
        said = potential.all_of(scan.frames)
        pushes = np.array([float(one.forces[scan.moved] @ scan.way) for one in said])
        return cls(scan.distances, np.array([one.energy for one in said]), pushes)

    @property
    def climb(self) -> Array:
        """Energy at each distance above the lowest one further out, eV: what it takes to get there from outside."""
        climb: Array = self.energies - np.minimum.accumulate(self.energies[::-1])[::-1]
        return climb

    def against(self, original: _Wall, wall: Bools, limits: Limits) -> tuple[float, str]:
        """Compare from outside to where the pair has climbed to `wall_height`: what is behind is out of reach.

        A dip on the way up is no hole: what counts is how far up it is. Where the candidate begins to climb is its own affair, too, since labels
        may have put the wall further out.

        Returns:
            The smallest share that is left of the original's climb or, below 0, the strongest pull where that is too little, eV/Å; in words, too.
        """
        if not (np.isfinite(self.pushes[wall]).all() and np.isfinite(self.energies).all()):
            return -np.inf, "has numbers that are not finite"
        climb, before = self.climb, np.minimum(original.climb, limits.wall_height)
        nearest = np.flatnonzero(climb >= limits.wall_height).max(initial=0)
        reached = wall & (np.arange(len(wall)) >= nearest)
        high = reached & (before > _CLIMB)
        share = float((climb[high] / before[high]).min()) if high.any() else 1.0
        # where the original has hardly begun to climb there is no share: but a fall below where its wall begins is a hole
        if (reached & (self.energies < self.energies[np.flatnonzero(wall)[-1]] - _CLIMB)).any():
            share = 0.0
        at = int(np.where(reached, self.pushes, np.inf).argmin())
        if share < limits.wall_share and self.pushes[at] < 0.0:
            return float(self.pushes[at]), f"is pulled together by {-self.pushes[at]:.1f} eV/Å at {self.distances[at]:.2f} Å"
        return share, f"has {share:.0%} of its repulsion left"
