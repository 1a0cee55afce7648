"""The shared-memory layout of i-PI 3.3 (`mode="shm"`): the numbers lie in memory that both sides see, the socket says when to look.

```
POSDATA      12 | i4 N | at the first time only: 6×(i4 len, name) in the order pos, h, ih, pot, force, vir
FORCEREADY   12 | B×(i4 len, len bytes extras)
```
The segments hold float64: pos (B, 3N), h and ih (B, 3, 3), pot (B), force (B, 3N), vir (B, 3, 3), B from INIT or 1. The engine makes and
removes them. With B = 1 the messages are `PosData` and `ForceReady`, as they are without shared memory, with more `PosBatch` and
`ForceBatch`. The mode is not announced: it is recognised by the names in the first POSDATA, which in any other layout are numbers.

The memory is read and written through its descriptor, not mapped: an engine that truncates a mapped segment would end this process.

Source: `SHMDriver` in `ipi/interfaces/sockets.py` of i-PI 3.3.1.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from tumbaga.socket_protocol.batched import cut_extras, extras_size, pack_extras
from tumbaga.socket_protocol.codec import (
    HEADER,
    Cut,
    Limits,
    Piece,
    check_atoms,
    check_finite,
    check_length,
    header_of,
    int_at,
    inverse,
    pack_length,
    pack_number,
)
from tumbaga.socket_protocol.errors import AtomCountError, LayoutError, SharedMemoryError
from tumbaga.socket_protocol.events import Float64s, ForceBatch, ForceReady, PosBatch, PosData
from tumbaga.socket_protocol.states import Role

KINDS: Final = ("pos", "h", "ih", "pot", "force", "vir")
MARK: Final = b"ipi_shm_"
"""What the names of i-PI's segments begin with; at this place another layout has a number of the order of 1e250."""
MARK_AT: Final = HEADER + 8

_FOLDER = "/dev/shm"  # Linux only
_NAME = re.compile(r"ipi_shm_[A-Za-z0-9_.-]{1,192}")  # no other memory of ours is for a peer to name
_INT = 4
_NAMES = HEADER + _INT
_MOST_NAME = 200
_POSDATA, _FORCEREADY = header_of(PosBatch), header_of(ForceBatch)


class Segments:
    """The six segments of one session, open.

    Args:
        descriptors: kind → open file, owned from now on.
        size: configurations.
        atoms: in each.
    """

    def __init__(self, descriptors: Mapping[str, int], size: int, atoms: int) -> None:
        self._descriptors = dict(descriptors)
        self.size, self.atoms = size, atoms

    def __del__(self) -> None:
        self.close()

    @classmethod
    def attach(cls, names: Sequence[str], size: int, atoms: int) -> Segments:
        """Open the segments that an engine made.

        Raises:
            SharedMemoryError: one is missing, too small, or no such segment.
        """
        opened: dict[str, int] = {}
        try:
            for kind, name in zip(KINDS, names, strict=True):
                opened[kind] = _open(name, _bytes(kind, size, atoms))
        except BaseException:
            _close(opened)
            raise
        return cls(opened, size, atoms)

    @classmethod
    def create(cls, names: Sequence[str], size: int, atoms: int) -> Segments:
        """Make new segments; `unlink` their names when the driver has opened them.

        Raises:
            OSError: no memory, or the names are taken.
        """
        opened: dict[str, int] = {}
        try:
            for kind, name in zip(KINDS, names, strict=True):
                opened[kind] = os.open(f"{_FOLDER}/{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                os.ftruncate(opened[kind], _bytes(kind, size, atoms))
        except BaseException:
            unlink(names[: len(opened)])
            _close(opened)
            raise
        return cls(opened, size, atoms)

    def read(self, kind: str, shape: tuple[int, ...]) -> Float64s:
        """Return a copy of a segment.

        Raises:
            SharedMemoryError: it is shorter than it was.
        """
        array = np.empty(shape)
        try:
            count = os.preadv(self._descriptors[kind], [array.data], 0)
        except OSError as problem:
            raise SharedMemoryError(f"the segment {kind!r} cannot be read ({problem.strerror})") from problem
        if count != array.nbytes:
            raise SharedMemoryError(f"the segment {kind!r} has become shorter than {array.nbytes} bytes")
        return array

    def write(self, kind: str, data: bytes | memoryview) -> None:
        """Write a whole segment.

        Raises:
            SharedMemoryError: the memory is not there any more.
        """
        try:
            written = os.pwrite(self._descriptors[kind], data, 0)
        except OSError as problem:
            raise SharedMemoryError(f"the segment {kind!r} cannot be written to ({problem.strerror})") from problem
        if written != (size := memoryview(data).nbytes):
            raise SharedMemoryError(f"the segment {kind!r} takes {written} of {size} bytes")

    def close(self) -> None:
        """Close all. Can be called twice."""
        _close(self._descriptors)


def _bytes(kind: str, size: int, atoms: int) -> int:
    return 8 * size * {"pos": 3 * atoms, "force": 3 * atoms, "pot": 1}.get(kind, 9)


def _open(name: str, least: int) -> int:
    if not _NAME.fullmatch(name):
        raise SharedMemoryError(f"{name[:40]!r} is no name of a segment")
    try:
        # a pipe or a link of that name must neither block nor lead elsewhere
        descriptor = os.open(f"{_FOLDER}/{name}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as problem:
        raise SharedMemoryError(f"there is no segment {name!r} ({problem.strerror}); engine and driver must share one machine") from problem
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size < least:
        os.close(descriptor)
        raise SharedMemoryError(f"the segment {name!r} has {found.st_size} bytes where {least} are needed")
    return descriptor


def _close(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def unlink(names: Sequence[str]) -> None:
    """Remove segments by name; those who have them open keep them."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{_FOLDER}/{name}")


class Shared:
    """POSDATA and FORCEREADY of a session with shared memory.

    Args:
        size: configurations in a message.
        prefix: ENGINE: what the names of new segments begin with; must begin with `ipi_shm_` and be unique on the machine.
    """

    def __init__(self, size: int, prefix: str = "") -> None:
        self.size = size
        self._names = [prefix + kind for kind in KINDS]
        self._segments: Segments | None = None
        self._linked = False  # ENGINE: whether the names are still there

    def resized(self, size: int) -> Shared:
        """Return the layout for another number of configurations: the segments stay, and must be large enough."""
        self.size = size
        return self

    def close(self) -> None:
        """Let go of the memory, and remove what we made. Can be called twice."""
        if self._linked:
            unlink(self._names)
            self._linked = False
        if self._segments is not None:
            self._segments.close()
            self._segments = None

    # --- DRIVER ---------------------------------------------------------------------------------------------------------------------

    def cut_posdata(self, view: memoryview, limits: Limits, atoms: int | None) -> Cut:
        """Cut a POSDATA and copy what it announces; see `Layout`. Also raises SharedMemoryError."""
        if len(view) < _NAMES:
            return _NAMES
        count = int_at(view, HEADER)
        check_atoms(count, limits, atoms)
        check_length("bytes of a frame in shared memory", self.size * (3 * count + 18) * 8, 0, limits.max_message)
        end = _NAMES
        if self._segments is None:
            found = _cut_names(view)
            if isinstance(found, int):
                return found
            names, end = found
            self._segments = Segments.attach(names, self.size, count)
        segments = self._segments
        if count != segments.atoms:
            raise AtomCountError(segments.atoms, count)
        if self.size > segments.size:
            raise SharedMemoryError(f"it was made for {segments.size} configurations, INIT now announces {self.size}")
        if self.size == 1:
            return Piece(PosData.cut(segments.read("h", (3, 3)).T.copy(), segments.read("pos", (count, 3))), end)
        cells = segments.read("h", (self.size, 3, 3)).transpose(0, 2, 1).copy()
        return Piece(PosBatch.cut(cells, segments.read("pos", (self.size, count, 3))), end)

    def pack_forceready(self, event: ForceReady | ForceBatch) -> bytes:
        """Write the results to the memory and pack the FORCEREADY that says so; see `Layout`. Also raises SharedMemoryError."""
        # the size may have changed since the frame came; that they fit to one another is the connection's to check
        segments = self._segments
        if segments is None or (isinstance(event, ForceBatch) and len(event) > segments.size):
            raise LayoutError(event.word, f"{self.size} configurations")
        if isinstance(event, ForceReady):
            check_finite("FORCEREADY", event.forces, event.virial)
            segments.write("pot", pack_number(event.energy))
            segments.write("force", event.forces.data)
            segments.write("vir", event.virial.data)
            return b"".join((_FORCEREADY, pack_length(len(event.extras)), event.extras))
        check_finite("FORCEREADY", event.energies, event.forces, event.virials)
        segments.write("pot", event.energies.data)
        segments.write("force", event.forces.data)
        segments.write("vir", event.virials.data)
        return b"".join((_FORCEREADY, *pack_extras(event.extras)))

    # --- ENGINE ---------------------------------------------------------------------------------------------------------------------

    def pack_posdata(self, event: PosData | PosBatch) -> bytes:
        """Write the configurations to the memory and pack the POSDATA that says so; see `Layout`. Also raises OSError."""
        cells = event.cell[None] if isinstance(event, PosData) else event.cells
        if len(cells) != self.size or (self.size == 1) is not isinstance(event, PosData):
            raise LayoutError(event.word, "one configuration" if self.size == 1 else f"{self.size} configurations")
        check_finite("POSDATA", cells, event.positions)
        atoms = event.positions.shape[-2]
        told: list[bytes] = []
        if self._segments is None:
            self._segments = Segments.create(self._names, self.size, atoms)
            self._linked = True
            told = pack_extras(tuple(name.encode() for name in self._names))
        if self.size > self._segments.size:
            raise LayoutError(event.word, f"at most {self._segments.size} configurations, for which the memory was made,")
        if atoms != self._segments.atoms:
            raise LayoutError(event.word, f"{self._segments.atoms} atoms a configuration")
        self._segments.write("pos", event.positions.data)
        self._segments.write("h", cells.transpose(0, 2, 1).copy().data)
        self._segments.write("ih", np.ascontiguousarray([inverse(cell).T for cell in cells]).data)
        return b"".join((_POSDATA, pack_length(atoms), *told))

    def cut_forceready(self, view: memoryview, limits: Limits, atoms: int | None) -> Cut:
        """Cut a FORCEREADY and copy the results; see `Layout`. Also raises SharedMemoryError."""
        extras = cut_extras(view, HEADER, self.size, limits)
        if isinstance(extras, int):
            return extras
        if self._segments is None:
            raise SharedMemoryError("results were announced before there was any memory")
        if self._linked:  # the driver has answered, so it has opened all: nothing is left behind however this process ends
            unlink(self._names)
            self._linked = False
        count = self._segments.atoms
        energies = self._segments.read("pot", (self.size,))
        forces = self._segments.read("force", (self.size, count, 3))
        virials = self._segments.read("vir", (self.size, 3, 3))
        event = (
            ForceReady.cut(float(energies[0]), forces[0], virials[0], extras[0])
            if self.size == 1
            else ForceBatch.cut(energies, forces, virials, extras)
        )
        return Piece(event, HEADER + extras_size(extras))

    def largest(self, role: Role, limits: Limits, atoms: int) -> int:
        """Return the size of the largest message; see `Layout`."""
        if role is Role.DRIVER:
            return _NAMES + len(KINDS) * (_INT + _MOST_NAME)
        return HEADER + self.size * _INT + limits.max_extras


def _cut_names(view: memoryview) -> tuple[list[str], int] | int:
    """Return the names of the segments and where they end, or the bytes that must be there before it is worth a try."""
    names = []
    end = _NAMES
    for _ in KINDS:
        if len(view) < end + _INT:
            return end + _INT
        length = int_at(view, end)
        check_length("length of the name of a segment", length, 1, _MOST_NAME)
        end += _INT + length
        if len(view) < end:
            return end
        names.append(bytes(view[end - length : end]).decode("ascii", "replace"))
    return names, end
