"""The batched layout of i-PI 3.3: several configurations of one size in one POSDATA. INIT announces it with `batch_size:B`.

```
POSDATA      12 | i4 N | B×(9 f8 h, 9 f8 h^-1) | B×3N f8 positions
FORCEREADY   12 | B f8 E | i4 N | B×3N f8 forces | B×9 f8 virial | B×(i4 len, len bytes extras)
```
There are always B configurations; where the engine has fewer, it repeats the last one and drops those results (`PosBatch.distinct`).

Source: `ipi/interfaces/sockets.py` of i-PI 3.3.1 (`dispatch_send_batch`, `_recv_forces_bulk_batch`).
"""

from __future__ import annotations

import numpy as np

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
)
from tumbaga.socket_protocol.errors import LayoutError
from tumbaga.socket_protocol.events import ForceBatch, ForceReady, PosBatch, PosData
from tumbaga.socket_protocol.states import Role

_INT = 4
_CELLS = HEADER + _INT
_ATOM = 3 * 8
_MATRIX = 9 * 8
_POSDATA, _FORCEREADY = header_of(PosBatch), header_of(ForceBatch)


class Batched:
    """POSDATA and FORCEREADY with a fixed number of configurations.

    Args:
        size: configurations in a message.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def cut_posdata(self, view: memoryview, limits: Limits, atoms: int | None) -> Cut:
        """Cut a POSDATA; see `Layout`."""
        if len(view) < _CELLS:
            return _CELLS
        count = int_at(view, HEADER)
        check_atoms(count, limits, atoms)
        positions_at = _CELLS + self.size * 2 * _MATRIX
        end = positions_at + self.size * count * _ATOM
        if len(view) < end:
            return end
        pairs = np.frombuffer(view, np.float64, 18 * self.size, _CELLS).reshape(self.size, 2, 3, 3)
        positions = np.frombuffer(view, np.float64, 3 * self.size * count, positions_at).copy()
        return Piece(PosBatch.cut(pairs[:, 0].transpose(0, 2, 1).copy(), positions.reshape(self.size, count, 3)), end)

    def cut_forceready(self, view: memoryview, limits: Limits, atoms: int | None) -> Cut:
        """Cut a FORCEREADY; see `Layout`."""
        count_at = HEADER + 8 * self.size
        forces_at = count_at + _INT
        if len(view) < forces_at:
            return forces_at
        count = int_at(view, count_at)
        check_atoms(count, limits, atoms)
        virials_at = forces_at + self.size * count * _ATOM
        extras_at = virials_at + self.size * _MATRIX
        extras = cut_extras(view, extras_at, self.size, limits)
        if isinstance(extras, int):
            return extras
        event = ForceBatch.cut(
            np.frombuffer(view, np.float64, self.size, HEADER).copy(),
            np.frombuffer(view, np.float64, 3 * self.size * count, forces_at).copy().reshape(self.size, count, 3),
            np.frombuffer(view, np.float64, 9 * self.size, virials_at).copy().reshape(self.size, 3, 3),
            extras,
        )
        return Piece(event, extras_at + extras_size(extras))

    def pack_posdata(self, event: PosData | PosBatch) -> bytes:
        """Pack a POSDATA; see `Layout`."""
        if not isinstance(event, PosBatch) or len(event) != self.size:
            raise LayoutError(event.word, f"{self.size} configurations")
        pairs = np.stack([np.stack((cell.T, inverse(cell).T)) for cell in event.cells])
        check_finite("POSDATA", pairs, event.positions)
        return b"".join((_POSDATA, pack_length(event.atoms), pairs.tobytes(), event.positions.data))

    def pack_forceready(self, event: ForceReady | ForceBatch) -> bytes:
        """Pack a FORCEREADY; see `Layout`."""
        if not isinstance(event, ForceBatch) or len(event) != self.size:
            raise LayoutError(event.word, f"{self.size} configurations")
        check_finite("FORCEREADY", event.energies, event.forces, event.virials)
        count = pack_length(event.forces.shape[1])
        numbers = (event.energies.data, count, event.forces.data, event.virials.data)
        return b"".join((_FORCEREADY, *numbers, *pack_extras(event.extras)))

    def largest(self, role: Role, limits: Limits, atoms: int) -> int:
        """Return the size of the largest message; see `Layout`."""
        if role is Role.DRIVER:
            return _CELLS + self.size * (2 * _MATRIX + atoms * _ATOM)
        return _CELLS + self.size * (8 + atoms * _ATOM + _MATRIX + _INT) + limits.max_extras


def cut_extras(view: memoryview, start: int, size: int, limits: Limits) -> tuple[bytes, ...] | int:
    """Return `size` extras, each behind its length, from `start` on, or the bytes that must be there before it is worth a try.

    Raises:
        BadLengthError, MessageTooLargeError: a length is negative, or all together are over the limit.
    """
    ends = []
    end, left = start, limits.max_extras
    for missing in range(size, 0, -1):
        if len(view) < end + _INT:
            return end + missing * _INT
        length = int_at(view, end)
        check_length("length of the extras", length, 0, left)
        left -= length
        end += _INT + length
        ends.append((end - length, end))
    # nothing is copied before all is there
    return tuple(bytes(view[begin:end]) for begin, end in ends) if len(view) >= end else end


def extras_size(extras: tuple[bytes, ...]) -> int:
    """Return the bytes that extras take on the wire."""
    return sum(_INT + len(one) for one in extras)


def pack_extras(extras: tuple[bytes, ...]) -> list[bytes]:
    """Return lengths and texts in the order in which they travel."""
    return [part for one in extras for part in (pack_length(len(one)), one)]
