"""The nouns of tumbaga: frame, prediction, label, version. Frozen, checked when made, numpy only.

Inside tumbaga: eV, Å, eV/Å, float64; a virial is W = -dE/dstrain, so a positive trace pushes the cell outwards (ASE's stress is -W / volume).
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tumbaga.online.errors import BadFrameError

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _checked(what: str, value: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
    array = np.ascontiguousarray(value, dtype=np.float64)
    if array.shape != shape:
        raise BadFrameError(what, f"has shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise BadFrameError(what, "holds a number that is not finite")
    return array


_NO_CELL: Array = np.zeros((3, 3))
_NO_CELL.flags.writeable = False


@dataclass(frozen=True, eq=False)
class Frame:
    """One configuration.

    Attributes:
        numbers: atomic numbers, shape (n_atoms,), int64.
        positions: shape (n_atoms, 3), float64, Å; wrapped or not.
        cell: lattice vectors as rows, shape (3, 3), float64, Å; zeros for a cluster.
        periodic: whether the three directions repeat (all or none).

    Raises:
        BadFrameError: a shape is wrong, a number is not finite, or a periodic cell has no volume.
    """

    numbers: Ints
    positions: Array
    cell: Array = field(default_factory=lambda: np.zeros((3, 3)))
    periodic: bool = False

    def __post_init__(self) -> None:
        numbers = np.ascontiguousarray(self.numbers, dtype=np.int64)
        if numbers.ndim != 1 or numbers.size == 0 or numbers.min() < 1 or numbers.max() > 118:
            raise BadFrameError("numbers", "must be a non-empty list of atomic numbers 1..118")
        object.__setattr__(self, "numbers", numbers)
        object.__setattr__(self, "positions", _checked("positions", self.positions, (numbers.size, 3)))
        object.__setattr__(self, "cell", _checked("cell", self.cell, (3, 3)))
        if self.periodic and abs(np.linalg.det(self.cell)) < 1e-6:
            raise BadFrameError("cell", "has no volume, but the frame is periodic")

    @classmethod
    def checked(cls, numbers: Ints, positions: Array, cell: Array | None = None, periodic: bool = False) -> Frame:
        """Make a frame of arrays that were checked before, with the shapes and types above: the force path checks once."""
        frame = object.__new__(cls)
        object.__setattr__(frame, "numbers", numbers)
        object.__setattr__(frame, "positions", positions)
        object.__setattr__(frame, "cell", _NO_CELL if cell is None else cell)
        object.__setattr__(frame, "periodic", periodic)
        return frame

    def __len__(self) -> int:
        return int(self.numbers.size)

    @property
    def key(self) -> str:
        """Content hash: 16 hex digits of SHA-256 over species, positions, cell and periodicity. Equal frames have equal keys."""
        digest = hashlib.sha256()
        for part in (self.numbers.tobytes(), self.positions.tobytes(), self.cell.tobytes(), bytes([self.periodic])):
            digest.update(part)
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a potential says of one frame.

    Attributes:
        energy: eV.
        forces: shape (n_atoms, 3), float64, eV/Å.
        virial: -dE/dstrain, shape (3, 3), float64, eV, symmetric.
        features: per-atom last-layer features, shape (n_atoms, n_hidden), float64; None where the back end has no linear readout.

    A prediction may hold non-finite numbers: a model may fail. `finite` tells; nothing else may leave on the wire.
    """

    energy: float
    forces: Array
    virial: Array
    features: Array | None = None

    @property
    def finite(self) -> bool:
        """Whether energy, forces and virial are all finite."""
        return bool(np.isfinite(self.energy) and np.isfinite(self.forces).all() and np.isfinite(self.virial).all())


@dataclass(frozen=True, eq=False)
class Members:
    """What the members of a committee say of one frame; their mean is what is served, to the rounding of the potential.

    Attributes:
        energies: shape (n_members,), float64, eV.
        forces: shape (n_members, n_atoms, 3), float64, eV/Å.
        virials: -dE/dstrain, shape (n_members, 3, 3), float64, eV.
    """

    energies: Array
    forces: Array
    virials: Array

    @property
    def finite(self) -> bool:
        """Whether all numbers of all members are finite."""
        return all(bool(np.isfinite(numbers).all()) for numbers in (self.energies, self.forces, self.virials))


@dataclass(frozen=True, eq=False)
class Label:
    """Reference energy and forces of a frame; only converged ones are ever made.

    Attributes:
        energy: total energy as the method gives it, eV, float64 (all-electron totals are about -5e4 eV: never cast to float32).
        forces: shape (n_atoms, 3), float64, eV/Å.
        method: what identifies the level of theory, e.g. "pyscf:pbe/def2-svp"; labels of different methods are never mixed.
        seconds: wall time it took.
        details: engine facts worth keeping (SCF cycles, spin, versions), JSON-compatible.
        virial: -dE/dstrain as the method gives it, shape (3, 3), float64, eV; None where it gives none.

    Raises:
        BadFrameError: non-finite numbers or a wrong shape.
    """

    energy: float
    forces: Array
    method: str
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    virial: Array | None = None

    def __post_init__(self) -> None:
        forces = np.asarray(self.forces, dtype=np.float64)
        object.__setattr__(self, "forces", _checked("label forces", forces, (len(forces), 3)))
        if not np.isfinite(self.energy):
            raise BadFrameError("label energy", "is not finite")
        if self.virial is not None:
            object.__setattr__(self, "virial", _checked("label virial", self.virial, (3, 3)))


@dataclass(frozen=True, eq=False)
class LabelledFrame:
    """A frame with its label, as a data set holds it.

    Attributes:
        frame: the frame.
        label: its reference energy, forces and, where known, virial.
        source: where it comes from, for people, e.g. "train.extxyz#12".

    Raises:
        BadFrameError: the label has forces of another number of atoms.
    """

    frame: Frame
    label: Label
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.label.forces) != len(self.frame):
            raise BadFrameError("label forces", f"are of {len(self.label.forces)} atoms, the frame has {len(self.frame)}")


class Reason(enum.Enum):
    """Why a frame was picked for labelling."""

    INITIAL = "initial"  # a session's first frame: a level-of-theory error is invisible to the uncertainty, so start with the truth
    UNCERTAIN = "uncertain"  # the force uncertainty passed the user's threshold
    AUDIT = "audit"  # picked at random; held out to judge the potential
    GUARD = "guard"  # a guard saw something unusual
    STALLED = "stalled"  # an engine waits for this label
    PRECURSOR = "precursor"  # one of the last good frames before a session had to be ended
    IMPORTED = "imported"  # its label was computed elsewhere


class Role(enum.Enum):
    """What a label is used for; a frame never changes its role."""

    TRAIN = "train"
    HOLDOUT = "holdout"
