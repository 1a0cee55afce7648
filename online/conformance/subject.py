"""What is held against the port, how exact it must be, and how a broken promise is told. Knows no single check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from tumbaga.online.conformance.frames import sample_crystal, sample_frames
from tumbaga.online.errors import OnlineError
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Frame, Prediction

Loader = Callable[[str, str, str], Potential]
"""(rest of the name, device, dtype) -> potential: what an entry point of the group `tumbaga.potentials` names."""


class ConformanceError(OnlineError, AssertionError):
    """An implementation breaks its port's contract; the message says which sentence of it, and what was found instead."""

    def __init__(self, claim: str, found: str) -> None:
        super().__init__(claim, found)
        self.claim, self.found = claim, found

    def __str__(self) -> str:
        return f"{self.claim}: {self.found}"


@dataclass(frozen=True)
class Tolerances:
    """What the checks allow; the defaults are those of a float64 back end, `Tolerances.of` gives those of either.

    Attributes:
        displacement: step of the finite differences, Å; strains move no atom by more.
        gradient: forces (eV/Å) and virials (eV) against finite differences, and steps at the cutoff, plus the same fraction of the largest.
        same: forces and virials that must agree because the physics is the same, plus the same fraction of the largest; energies, plus a
            hundredth of that fraction, since the reference energies of elements are large.
        single: the same between float32 and float64.
    """

    displacement: float = 1e-4
    gradient: float = 1e-5
    same: float = 1e-9
    single: float = 3e-4

    @classmethod
    def of(cls, dtype: str) -> Tolerances:
        """Those for arithmetic in "float64", or else float32: the rounding of some ten eV is 1e-5, over steps of 3e-3 Å that is 3e-3 eV/Å."""
        return cls() if dtype == "float64" else cls(displacement=3e-3, gradient=1e-2, same=2e-4)


@dataclass(frozen=True, eq=False)
class Subject:
    """A potential, and what it is held against the port with.

    Attributes:
        potential: itself.
        frames: sound frames of its elements, best of different sizes; `sample_frames` makes some.
        tolerances: what is allowed.
        load: its loader, for the checks that load it in another dtype or from a version file; None leaves those out.
        rest: what `load` gets, the part of the potential's name behind the colon.
    """

    potential: Potential
    frames: Sequence[Frame]
    tolerances: Tolerances
    load: Loader | None = None
    rest: str = ""

    @classmethod
    def of(cls, potential: Potential, frames: Sequence[Frame] | None = None, tolerances: Tolerances | None = None) -> Self:
        """A potential that is at hand; frames and tolerances are made to fit what it declares if none are given."""
        spec = potential.spec
        return cls(potential, sample_frames(spec.elements) if frames is None else frames, tolerances or Tolerances.of(spec.dtype))

    @classmethod
    def loaded(
        cls,
        load: Loader,
        rest: str = "",
        frames: Sequence[Frame] | None = None,
        tolerances: Tolerances | None = None,
        dtype: str = "float64",
    ) -> Self:
        """A potential as its loader gives it, on the CPU: all checks that there are."""
        one = cls.of(load(rest, "cpu", dtype), frames, tolerances)
        return cls(one.potential, one.frames, one.tolerances, load, rest)

    @property
    def elements(self) -> tuple[int, ...]:
        """Atomic numbers that the frames hold, ascending."""
        return tuple(sorted({int(z) for frame in self.frames for z in frame.numbers}))

    @property
    def clusters(self) -> list[Frame]:
        """The frames without a cell; made ones if there are none."""
        return [frame for frame in self.frames if not frame.periodic] or [f for f in sample_frames(self.elements) if not f.periodic]

    @property
    def crystals(self) -> list[Frame]:
        """The periodic frames, and one whose cell is smaller than the cutoff."""
        reach = self.potential.spec.cutoff
        small = sample_crystal(self.elements, 0.95 * reach if 0 < reach < np.inf else np.inf)
        return [*(frame for frame in self.frames if frame.periodic), small]

    @property
    def trainable(self) -> Trainable:
        """The potential, as one that learns.

        Raises:
            ConformanceError: it declares a readout and is no Trainable.
        """
        if not isinstance(self.potential, Trainable):
            raise ConformanceError("a potential with n_hidden > 0 is a Trainable", "it lacks readout, force_rows, metadata or state")
        return self.potential

    def predict(self, frame: Frame) -> Prediction:
        """Ask for one frame."""
        return self.potential.predict([frame])[0]


def demand(claim: str, holds: bool, found: str) -> None:
    """Raise a ConformanceError with what was found unless the claim holds."""
    if not holds:
        raise ConformanceError(claim, found)


def near(claim: str, one: npt.ArrayLike, other: npt.ArrayLike, tolerance: float, scale: float | None = None) -> None:
    """Demand that numbers agree to `tolerance` · (1 + scale), the largest of `other` if no scale is given; NaN never agrees."""
    theirs = np.asarray(other, dtype=np.float64)
    gaps = np.abs(np.asarray(one, dtype=np.float64) - theirs)
    worst = float(gaps.max()) if gaps.size else 0.0
    size = scale if scale is not None else float(np.abs(theirs).max()) if theirs.size else 0.0
    allowed = tolerance * (1.0 + size)
    demand(claim, worst <= allowed, f"off by {worst:.3g}, {allowed:.3g} is allowed")


def near_energy(claim: str, one: float, other: float, tolerance: float) -> None:
    """The same for energies, of whose size a hundredth counts."""
    near(claim, one, other, tolerance, 0.01 * abs(other))


def agree(claim: str, one: Prediction, other: Prediction, tolerance: float) -> None:
    """Demand that energy, forces and virial of two predictions agree; see `near`."""
    near_energy(f"{claim} (energy, eV)", one.energy, other.energy, tolerance)
    near(f"{claim} (forces, eV/Å)", one.forces, other.forces, tolerance)
    near(f"{claim} (virial, eV)", one.virial, other.virial, tolerance)
