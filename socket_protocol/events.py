"""The messages of the i-PI protocol as plain frozen records, checked when made.

This file knows shapes and units, and nothing of bytes, states or sockets. Everything is in atomic units: lengths in Bohr, energies in
Hartree, forces in Hartree/Bohr. The virial is W = -dE/d(strain) in Hartree, *not* divided by the volume.

Source: "Communication protocol" in the i-PI documentation (docs.ipi-code.org), and what i-PI and ASE really send.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from tumbaga.socket_protocol.errors import EventNotFiniteError, EventShapeError, InitError

Float64s: TypeAlias = NDArray[np.float64]

# i-PI writes "there is no cell" as a cell of -1 Å: minus the identity in its own Bohr (8 digits); ASE writes zeros.
_ANGSTROM = 1.8897261
_NO_CELL_TOLERANCE = 1e-4
_LONG = 4096
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Status:
    """Engine → driver: what do you need? Answered by NEEDINIT, READY or HAVEDATA."""

    word: ClassVar[str] = "STATUS"


@dataclass(frozen=True, slots=True)
class Init:
    """Engine → driver: the parameters of what follows; no answer.

    Attributes:
        rid: i-PI's replica counter (int32): over beads, force components and systems, *not* the bead number. ASE sends 0.
        text: free bytes; `parse_init` reads what can be read of them.

    Raises:
        InitError: `rid` is no int32, or `text` no bytes.
    """

    word: ClassVar[str] = "INIT"
    rid: int
    text: bytes

    def __post_init__(self) -> None:
        if not -(2**31) <= self.rid < 2**31:
            raise InitError(f"takes an int32 as rid, got {self.rid}")
        if not isinstance(self.text, bytes):
            raise InitError(f"takes bytes as text, got {type(self.text).__name__}")


@dataclass(frozen=True, slots=True, eq=False)
class PosData:
    """Engine → driver: the configuration to be computed; no answer.

    | field     | shape  | dtype   | unit | note                                                                          |
    |-----------|--------|---------|------|-------------------------------------------------------------------------------|
    | cell      | (3, 3) | float64 | Bohr | lattice vectors are the **rows**, as in ASE; on the wire they are the columns |
    | positions | (N, 3) | float64 | Bohr | N >= 1; not wrapped unless the engine was told to                             |

    Raises:
        EventShapeError: a wrong shape.
        EventNotFiniteError: a NaN or an infinite number.
    """

    word: ClassVar[str] = "POSDATA"
    cell: Float64s
    positions: Float64s

    def __post_init__(self) -> None:
        object.__setattr__(self, "cell", _finite_array("POSDATA cell", self.cell, 3))
        object.__setattr__(self, "positions", _finite_array("POSDATA positions", self.positions, None))

    @classmethod
    def cut(cls, cell: Float64s, positions: Float64s) -> Self:
        """Make it of arrays whose shape and type are right because they were cut so. Raises EventNotFiniteError."""
        if not (all_finite(cell) and all_finite(positions)):
            raise EventNotFiniteError("POSDATA cell" if not all_finite(cell) else "POSDATA positions")
        return _made(cls, cell=cell, positions=positions)

    @property
    def periodic(self) -> bool:
        """Whether the cell is meant: false for all zeros (ASE) and for minus one Ångström times the identity (i-PI).

        The sign of the determinant says nothing: an engine that rotates its cell may send left-handed lattice vectors.

        >>> PosData(np.zeros((3, 3)), np.zeros((1, 3))).periodic, PosData(np.eye(3)[::-1] * 9.0, np.zeros((1, 3))).periodic
        (False, True)
        """
        first = float(self.cell[0, 0])
        if first and abs(first + _ANGSTROM) > _NO_CELL_TOLERANCE:
            return True  # neither of the two forms begins like this
        if not self.cell.any():
            return False
        return bool(np.abs(self.cell + _ANGSTROM * np.eye(3)).max() > _NO_CELL_TOLERANCE)


@dataclass(frozen=True, slots=True, eq=False)
class PosBatch:
    """Engine → driver: several configurations at once, in the batched and the shared-memory dialect; no answer.

    | field     | shape     | dtype   | unit | note                                                    |
    |-----------|-----------|---------|------|---------------------------------------------------------|
    | cells     | (B, 3, 3) | float64 | Bohr | lattice vectors are the rows, as in `PosData`; B >= 1   |
    | positions | (B, N, 3) | float64 | Bohr | one N for all                                           |

    i-PI always sends as many configurations as it announced; where it has fewer it repeats the last one and drops those results.

    Raises:
        EventShapeError: a wrong shape.
        EventNotFiniteError: a NaN or an infinite number.
    """

    word: ClassVar[str] = "POSDATA"
    cells: Float64s
    positions: Float64s

    def __post_init__(self) -> None:
        cells, positions = _finite_stack("POSDATA cells", self.cells), _finite_stack("POSDATA positions", self.positions)
        if cells.shape != (len(positions), 3, 3):
            raise EventShapeError("POSDATA cells", f"an array of shape ({len(positions)}, 3, 3)", f"shape {cells.shape}")
        object.__setattr__(self, "cells", cells)
        object.__setattr__(self, "positions", positions)

    @classmethod
    def cut(cls, cells: Float64s, positions: Float64s) -> Self:
        """Make it of arrays whose shape and type are right because they were cut so. Raises EventNotFiniteError."""
        _check_finite("POSDATA cells", cells)
        _check_finite("POSDATA positions", positions)
        return _made(cls, cells=cells, positions=positions)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def atoms(self) -> int:
        """Atoms in each configuration."""
        return int(self.positions.shape[1])

    @property
    def distinct(self) -> int:
        """How many configurations there are before the padding: all that follow are copies of the last of these, bit for bit.

        >>> PosBatch(np.zeros((3, 3, 3)), np.array([[[0.0, 0, 0]], [[1.0, 0, 0]], [[1.0, 0, 0]]])).distinct
        2
        """
        count = len(self)
        while count > 1 and self._same(count - 1, count - 2):
            count -= 1
        return count

    def _same(self, one: int, other: int) -> bool:
        return bool((self.positions[one] == self.positions[other]).all() and (self.cells[one] == self.cells[other]).all())

    def frame(self, index: int) -> PosData:
        """Return one configuration as a single message."""
        return _made(PosData, cell=self.cells[index], positions=self.positions[index])

    @classmethod
    def of(cls, frames: Sequence[PosData], size: int) -> Self:
        """Return a batch of `size` configurations, padded with the last of `frames`.

        Raises:
            EventShapeError: no frames, more than `size`, or of different numbers of atoms.
        """
        if not 1 <= len(frames) <= size or len({len(frame.positions) for frame in frames}) > 1:
            counts = [len(frame.positions) for frame in frames]
            raise EventShapeError("POSDATA batch", f"1 to {size} frames of one number of atoms", f"frames of {counts} atoms")
        padded = [*frames, *[frames[-1]] * (size - len(frames))]
        return _made(cls, cells=_stacked([frame.cell for frame in padded]), positions=_stacked([frame.positions for frame in padded]))


@dataclass(frozen=True, slots=True)
class GetForce:
    """Engine → driver: send the result of the last POSDATA. Answered by FORCEREADY."""

    word: ClassVar[str] = "GETFORCE"


@dataclass(frozen=True, slots=True)
class Exit:
    """The peer is gone: EXIT, the end of its stream, or a broken connection, which mean the same."""

    word: ClassVar[str] = "EXIT"


@dataclass(frozen=True, slots=True)
class NeedInit:
    """Driver → engine: send INIT first."""

    word: ClassVar[str] = "NEEDINIT"


@dataclass(frozen=True, slots=True)
class Ready:
    """Driver → engine: send POSDATA."""

    word: ClassVar[str] = "READY"


@dataclass(frozen=True, slots=True)
class HaveData:
    """Driver → engine: the result is there, send GETFORCE."""

    word: ClassVar[str] = "HAVEDATA"


@dataclass(frozen=True, slots=True, eq=False)
class ForceReady:
    """Driver → engine: the result.

    | field  | shape  | dtype   | unit         | sign                                                                               |
    |--------|--------|---------|--------------|------------------------------------------------------------------------------------|
    | energy | ()     | float64 | Hartree      |                                                                                    |
    | forces | (N, 3) | float64 | Hartree/Bohr | -dE/dR, in the order of the positions                                              |
    | virial | (3, 3) | float64 | Hartree      | -dE/d(strain) = -V * stress; a positive trace pushes the cell outwards; send it full |
    | extras | bytes  |         |              | blank or a JSON object from us (`check_extras`), anything from others              |

    Raises:
        EventShapeError: a wrong shape or type.
        EventNotFiniteError: a NaN or an infinite number.
    """

    word: ClassVar[str] = "FORCEREADY"
    energy: float
    forces: Float64s
    virial: Float64s
    extras: bytes = b""

    def __post_init__(self) -> None:
        object.__setattr__(self, "energy", _finite_number("FORCEREADY energy", self.energy))
        object.__setattr__(self, "forces", _finite_array("FORCEREADY forces", self.forces, None))
        object.__setattr__(self, "virial", _finite_array("FORCEREADY virial", self.virial, 3))
        if not isinstance(self.extras, bytes):
            raise EventShapeError("FORCEREADY extras", "bytes", type(self.extras).__name__)

    @classmethod
    def unchecked(cls, energy: float, forces: Float64s, virial: Float64s, extras: bytes) -> Self:
        """Make it of parts whose shape and type are known to be right; numbers that are not finite are found when it is packed."""
        return _made(cls, energy=energy, forces=forces, virial=virial, extras=extras)

    @classmethod
    def cut(cls, energy: float, forces: Float64s, virial: Float64s, extras: bytes) -> Self:
        """Make it of parts whose shape and type are right because they were cut so. Raises EventNotFiniteError."""
        if not math.isfinite(energy):
            raise EventNotFiniteError("FORCEREADY energy")
        _check_finite("FORCEREADY forces", forces)
        _check_finite("FORCEREADY virial", virial)
        return _made(cls, energy=energy, forces=forces, virial=virial, extras=extras)

    @property
    def symmetric_virial(self) -> Float64s:
        """The virial as a symmetric matrix, shape (3, 3), Hartree, whatever the driver filled in.

        Some drivers (LAMMPS) fill only the upper triangle: it is mirrored. Otherwise both triangles are averaged.

        >>> upper = np.triu(np.ones((3, 3)))
        >>> ForceReady(0.0, np.zeros((1, 3)), upper).symmetric_virial.tolist() == np.ones((3, 3)).tolist()
        True
        """
        (_, _, _), (lower, _, _), (left, below, _) = self.virial.tolist()
        if not (lower or left or below):
            return self.virial + np.triu(self.virial, 1).T
        return 0.5 * self.virial + 0.5 * self.virial.T  # halves first: the sum of two large numbers may be none


@dataclass(frozen=True, slots=True, eq=False)
class ForceBatch:
    """Driver → engine: the results of a `PosBatch`, one for each configuration, padded ones included.

    | field    | shape     | dtype          | unit         | sign and meaning as in `ForceReady` |
    |----------|-----------|----------------|--------------|-------------------------------------|
    | energies | (B,)      | float64        | Hartree      |                                     |
    | forces   | (B, N, 3) | float64        | Hartree/Bohr |                                     |
    | virials  | (B, 3, 3) | float64        | Hartree      |                                     |
    | extras   | B         | tuple of bytes |              |                                     |

    Raises:
        EventShapeError: a wrong shape or type.
        EventNotFiniteError: a NaN or an infinite number.
    """

    word: ClassVar[str] = "FORCEREADY"
    energies: Float64s
    forces: Float64s
    virials: Float64s
    extras: tuple[bytes, ...]

    def __post_init__(self) -> None:
        forces, virials = _finite_stack("FORCEREADY forces", self.forces), _finite_stack("FORCEREADY virials", self.virials)
        energies: Float64s = np.ascontiguousarray(self.energies, dtype=np.float64)
        for field, shape, expected in (
            ("energies", energies.shape, (len(forces),)),
            ("virials", virials.shape, (len(forces), 3, 3)),
            ("extras", (len(self.extras),), (len(forces),)),
        ):
            if shape != expected:
                raise EventShapeError(f"FORCEREADY {field}", f"of shape {expected}", f"shape {shape}")
        _check_finite("FORCEREADY energies", energies)
        if not all(isinstance(extras, bytes) for extras in self.extras):
            raise EventShapeError("FORCEREADY extras", "bytes", "something else")
        object.__setattr__(self, "energies", energies)
        object.__setattr__(self, "forces", forces)
        object.__setattr__(self, "virials", virials)

    @classmethod
    def cut(cls, energies: Float64s, forces: Float64s, virials: Float64s, extras: tuple[bytes, ...]) -> Self:
        """Make it of parts whose shape and type are right because they were cut so. Raises EventNotFiniteError."""
        _check_finite("FORCEREADY energies", energies)
        _check_finite("FORCEREADY forces", forces)
        _check_finite("FORCEREADY virials", virials)
        return _made(cls, energies=energies, forces=forces, virials=virials, extras=extras)

    def __len__(self) -> int:
        return len(self.forces)

    def result(self, index: int) -> ForceReady:
        """Return one result as a single message."""
        fields = {"forces": self.forces[index], "virial": self.virials[index], "extras": self.extras[index]}
        return _made(ForceReady, energy=float(self.energies[index]), **fields)

    @classmethod
    def of(cls, results: Sequence[ForceReady], size: int) -> Self:
        """Return the results of a batch of `size` configurations, of which those behind `results` are copies of the last.

        Raises:
            EventShapeError: no results, more than `size`, or of different numbers of atoms.
        """
        if size == len(results) == 1:
            (one,) = results
            arrays = {"energies": np.array([one.energy]), "forces": one.forces[None], "virials": one.virial[None]}
            return _made(cls, **arrays, extras=(one.extras,))
        if not 1 <= len(results) <= size or len({len(result.forces) for result in results}) > 1:
            counts = [len(result.forces) for result in results]
            raise EventShapeError("FORCEREADY batch", f"1 to {size} results of one number of atoms", f"results of {counts} atoms")
        padded = [*results, *[results[-1]] * (size - len(results))]
        return _made(
            cls,
            energies=np.array([result.energy for result in padded]),
            forces=_stacked([result.forces for result in padded]),
            virials=_stacked([result.virial for result in padded]),
            extras=tuple(result.extras for result in padded),
        )


Event: TypeAlias = Status | Init | PosData | PosBatch | GetForce | Exit | NeedInit | Ready | HaveData | ForceReady | ForceBatch


def _made(kind: type[Made], **fields: Any) -> Made:
    """Return a message made of parts of messages that were checked when they were made."""
    event = object.__new__(kind)
    put = object.__setattr__  # they are frozen
    for name, value in fields.items():
        put(event, name, value)
    return event


def _check_finite(field: str, array: Float64s) -> None:
    if not all_finite(array):
        raise EventNotFiniteError(field)


def _stacked(arrays: list[Float64s]) -> Float64s:
    """Return arrays of one shape as one, without a copy where there is only one."""
    return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)


def all_finite(array: Float64s) -> bool:
    """Return whether there is no NaN and no infinity in `array`, of any shape.

    >>> all_finite(np.array([1e200, 0.0])), all_finite(np.array([np.inf, 0.0]))
    (True, False)
    """
    # the sum of squares takes half the time, and can only err towards infinity; for long arrays BLAS would start threads
    if array.size < _LONG and math.isfinite(np.vdot(array, array)):
        return True
    return bool(np.isfinite(array).all())


def _finite_array(field: str, value: Any, rows: int | None) -> Float64s:
    """Return `value` as a finite, C-contiguous float64 array of shape (rows, 3); a copy only where it has to be."""
    expected = f"an array of shape ({rows or 'N'}, 3)"
    try:
        array: Float64s = np.ascontiguousarray(value, dtype=np.float64)
    except (TypeError, ValueError) as problem:
        raise EventShapeError(field, expected, type(value).__name__) from problem
    if array.ndim != 2 or array.shape[1] != 3 or array.shape[0] != (rows or array.shape[0] or 1):
        raise EventShapeError(field, expected, f"shape {array.shape}")
    _check_finite(field, array)
    return array


def _finite_stack(field: str, value: Any) -> Float64s:
    """Return `value` as a finite, C-contiguous float64 array of shape (B, N, 3), neither B nor N zero."""
    expected = "an array of shape (B, N, 3)"
    try:
        array: Float64s = np.ascontiguousarray(value, dtype=np.float64)
    except (TypeError, ValueError) as problem:
        raise EventShapeError(field, expected, type(value).__name__) from problem
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise EventShapeError(field, expected, f"shape {array.shape}")
    _check_finite(field, array)
    return array


def _finite_number(field: str, value: Any) -> float:
    """Return `value` as a finite Python float."""
    try:
        number = float(value)
    except (TypeError, ValueError) as problem:
        raise EventShapeError(field, "one number", type(value).__name__) from problem
    if not math.isfinite(number):
        raise EventNotFiniteError(field)
    return number
