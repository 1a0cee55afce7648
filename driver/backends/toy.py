"""Toy potentials with exact answers: "toy:zero", "toy:lj", and "toy:nan" and "toy:hungry" that fail on purpose. To check a set-up, and for tests.

Options follow a question mark: "toy:lj?epsilon=0.0104&sigma=3.4" (eV, Å), "toy:nan?after=20&every=0".
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np

from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import PotentialSpec
from tumbaga.online.records import Array, Frame, Prediction


class Zero:
    """No interaction at all: E = 0, F = 0."""

    def __init__(self) -> None:
        self.spec = PotentialSpec(name="toy:zero", elements=(), cutoff=0.0, level="exact")

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Zeros for every frame."""
        return [Prediction(0.0, np.zeros((len(frame), 3)), np.zeros((3, 3))) for frame in frames]


class LennardJones:
    """E = sum over pairs of 4 epsilon ((sigma/r)^12 - (sigma/r)^6), all pairs, no cutoff; in a cell each pair by its nearest image.

    So it is exact for clusters, in a box of any size above twice the cluster's, wrapped or not; it is no model of a dense periodic system.

    Args:
        epsilon: well depth, eV.
        sigma: distance of zero energy, Å.

    Source:
        J. E. Jones, Proc. R. Soc. Lond. A 106, 463 (1924).
    """

    def __init__(self, epsilon: float = 0.0104, sigma: float = 3.4) -> None:
        self.epsilon, self.sigma = epsilon, sigma
        self.spec = PotentialSpec(name=f"toy:lj?epsilon={epsilon:g}&sigma={sigma:g}", elements=(), cutoff=np.inf, level="exact")

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Exact float64 energies and forces."""
        return [self._one(frame) for frame in frames]

    def _one(self, frame: Frame) -> Prediction:
        first, second = np.triu_indices(len(frame), 1)
        vectors = frame.positions[second] - frame.positions[first]
        if frame.periodic:
            fractional = vectors @ np.linalg.inv(frame.cell)
            vectors = (fractional - np.round(fractional)) @ frame.cell
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            square = np.einsum("pc,pc->p", vectors, vectors)
            six = (self.sigma**2 / square) ** 3
            energy = 4.0 * self.epsilon * float(np.sum(six * six - six))
            # dE/dr / r, so that the force on the second atom is -slope * vector
            slope = (24.0 * self.epsilon * (six - 2.0 * six * six) / square)[:, None] * vectors
        forces = np.zeros((len(frame), 3))
        np.add.at(forces, first, slope)
        np.add.at(forces, second, -slope)
        return Prediction(energy, forces, -vectors.T @ slope)


class NotANumber(LennardJones):
    """A Lennard-Jones potential that answers NaN after so many calls: the broken model that must never reach the wire.

    Args:
        after: number of good calls of this process before the first NaN.
        every: after that, every so many calls are NaN; 0 or 1 means all.
        epsilon: well depth of the good calls, eV.
        sigma: distance of zero energy of the good calls, Å; so short by default that water, too, gets forces fit to be served.
    """

    def __init__(self, after: int = 0, every: int = 1, epsilon: float = 0.05, sigma: float = 0.85) -> None:
        super().__init__(epsilon, sigma)
        self._after, self._every, self._calls = after, max(1, every), 0
        self.spec = PotentialSpec(name=f"toy:nan?after={after}&every={every}", elements=(), cutoff=np.inf, level="none")

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Good numbers first, then NaN in energy and one force."""
        good = super().predict(frames)
        self._calls += 1
        if self._calls <= self._after or (self._calls - self._after) % self._every:
            return good
        for prediction in good:
            prediction.forces[0, 0] = np.nan
        return [Prediction(np.nan, p.forces, p.virial) for p in good]


class Hungry(LennardJones):
    """A Lennard-Jones potential that needs memory in proportion to the atoms of a batch, in a process that may not have much of it.

    Args:
        need: MB an atom of the batch, which are taken for as long as the evaluation lasts.
        limit: MB that this process may take beside what it has at the first evaluation (RLIMIT_AS); 0 leaves it alone.
        epsilon: well depth, eV.
        sigma: distance of zero energy, Å.
    """

    def __init__(self, need: int = 10, limit: int = 0, epsilon: float = 0.0104, sigma: float = 3.4) -> None:
        super().__init__(epsilon, sigma)
        self._need, self._limit = need * 1_000_000, limit * 1_000_000
        self.spec = PotentialSpec(name=f"toy:hungry?need={need}&limit={limit}", elements=(), cutoff=np.inf, level="exact")

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Exact energies and forces, or a MemoryError: so large a piece comes from the system, whatever the allocator has in hand."""
        if self._limit:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + self._limit, resource.RLIM_INFINITY))
            self._limit = 0
        piece = np.ones(self._need * sum(len(frame) for frame in frames), dtype=np.uint8)
        found = super().predict(frames)
        del piece
        return found


_Toy = Zero | LennardJones
_TOYS: dict[str, tuple[Callable[..., _Toy], dict[str, type[float | int]]]] = {
    "zero": (Zero, {}),
    "lj": (LennardJones, {"epsilon": float, "sigma": float}),
    "hungry": (Hungry, {"need": int, "limit": int, "epsilon": float, "sigma": float}),
    "nan": (NotANumber, {"after": int, "every": int, "epsilon": float, "sigma": float}),
}


def load_backend(rest: str, device: str, dtype: str) -> _Toy:
    """Make a toy potential from the part of its name behind "toy:"; device and dtype do not matter.

    Raises:
        PotentialError: no such toy or option, or a value that is no number.
    """
    kind, _, query = rest.partition("?")
    if kind not in _TOYS:
        raise PotentialError(f"toy:{rest}", f"there is no toy {kind!r}; known are {', '.join(_TOYS)}")
    made, options = _TOYS[kind]
    given: dict[str, float | int] = {}
    for key, value in parse_qsl(query):
        if key not in options:
            raise PotentialError(f"toy:{rest}", f"has no option {key!r}; known are {', '.join(options) or 'none'}")
        try:
            given[key] = options[key](value)
            if not math.isfinite(given[key]):
                raise ValueError(value)
        except ValueError as error:
            raise PotentialError(f"toy:{rest}", f"option {key} is {value!r}, not a number") from error
    return made(**given)


def weights_file(rest: str) -> None:
    """A toy has none, and its name is right.

    Raises:
        PotentialError: no such toy or option.
    """
    load_backend(rest, "cpu", "float64")  # costs nothing, and sees a misspelt toy before the processes are started


def absolute(rest: str) -> str:
    """A toy names no file."""
    return rest
