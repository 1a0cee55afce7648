"""Bytes to events and back: the layout of single messages, and nothing of who may say what when.

Numbers are int32 and float64 in native byte order, matrices row-major, headers 12 bytes of upper-case ASCII padded with blanks. A length
is checked against its limit before anything of that length is read or allocated.

```
STATUS GETFORCE EXIT NEEDINIT READY HAVEDATA    12
INIT         12 | i4 rid | i4 len | len bytes
POSDATA      12 | 9 f8 h | 9 f8 h^-1 | i4 N | 3N f8 positions
FORCEREADY   12 | f8 E | i4 N | 3N f8 forces | 9 f8 virial | i4 len | len bytes extras
```
A `Layout` is what POSDATA and FORCEREADY look like; `SINGLE` is the common one, `batched.py` and `shm.py` have the others.
The lattice vectors are the columns of h. The second matrix of POSDATA is never read: its convention differs between engines.

Source: "Communication protocol" in the i-PI documentation, checked against i-PI 3.3.1 and ASE 3.29.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np

from tumbaga.socket_protocol.errors import (
    AtomCountError,
    BadLengthError,
    EventNotFiniteError,
    LayoutError,
    MessageTooLargeError,
    NotFiniteError,
    UnknownHeaderError,
)
from tumbaga.socket_protocol.events import (
    Event,
    Exit,
    Float64s,
    ForceBatch,
    ForceReady,
    GetForce,
    HaveData,
    Init,
    NeedInit,
    PosBatch,
    PosData,
    Ready,
    Status,
    all_finite,
)
from tumbaga.socket_protocol.states import Role

HEADER: Final = 12
_RID_AND_LENGTH = struct.Struct("=ii")
_LENGTH = struct.Struct("=i")
pack_length: Final = _LENGTH.pack
pack_number: Final = struct.Struct("=d").pack
_ENERGY_AND_COUNT = struct.Struct("=12sdi")
_ATOM = 3 * 8
_MATRIX = 9 * 8

INIT_TEXT: Final = HEADER + _RID_AND_LENGTH.size
_POSDATA_COUNT = HEADER + 2 * _MATRIX
_POSDATA_POSITIONS = _POSDATA_COUNT + 4
_FORCEREADY_FORCES = _ENERGY_AND_COUNT.size


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a connection accepts; what is announced beyond ends it.

    Attributes:
        max_atoms: atoms in a message.
        max_init: bytes in the text of INIT.
        max_extras: bytes in the extras of FORCEREADY, in a batch of all together.
        max_batch: configurations in a batch.
        max_message: bytes in any message, whatever the other limits allow.
    """

    max_atoms: int = 100_000
    max_init: int = 1 << 16
    max_extras: int = 1 << 24
    max_batch: int = 1024
    max_message: int = 1 << 28


class Piece(NamedTuple):
    """A decoded message and the number of bytes it took."""

    event: Event
    size: int


Cut: TypeAlias = Piece | int
"""What cutting the first message off a buffer gives: the message, or the number of bytes that must be there before it is worth a try."""


class Layout(Protocol):
    """What POSDATA and FORCEREADY look like in one dialect."""

    def cut_posdata(self, view: memoryview, limits: Limits, atoms: int | None) -> Cut:
        """Cut a POSDATA off `view`, which begins with it; raises what `decode` raises."""

    def cut_forceready(self, view: memoryview, limits: Limits, atoms: int | None) -> Cut:
        """Cut a FORCEREADY off `view`, which begins with it; raises what `decode` raises."""

    def pack_posdata(self, event: PosData | PosBatch) -> bytes:
        """Return the bytes of a POSDATA; raises what `encode` raises."""

    def pack_forceready(self, event: ForceReady | ForceBatch) -> bytes:
        """Return the bytes of a FORCEREADY; raises what `encode` raises."""

    def largest(self, role: Role, limits: Limits, atoms: int) -> int:
        """Return the size in bytes of the largest POSDATA (to a DRIVER) or FORCEREADY (to an ENGINE) with at most so many atoms."""


# --- decoding -----------------------------------------------------------------------------------------------------------------------


def decode(role: Role, view: memoryview, limits: Limits, atoms: int | None = None, layout: Layout | None = None) -> Cut:
    """Return the first message in `view`, or how many bytes it must have at least if it is not whole yet; nothing is consumed.

    Args:
        role: ours, which decides the words that may come.
        view: received bytes, a message begins at the first.
        limits: the most to accept.
        atoms: the atom count to insist on, or None for any up to the limit.
        layout: of POSDATA and FORCEREADY; None is `SINGLE`.

    Raises:
        UnknownHeaderError: the 12 bytes are no word of the other role.
        MessageTooLargeError, BadLengthError, AtomCountError: an announced length is over the limit, negative, or not ours.
        NotFiniteError: a number that is used is NaN or infinite.
    """
    if len(view) < HEADER:
        return HEADER
    header = bytes(view[:HEADER])
    bare = _BARE[role].get(header)
    if bare is not None:
        return bare
    if header not in _LONG[role]:
        raise UnknownHeaderError(header, _WORDS[role])
    try:
        if header == _POSDATA:
            found = (layout or SINGLE).cut_posdata(view, limits, atoms)
        elif header == _FORCEREADY:
            found = (layout or SINGLE).cut_forceready(view, limits, atoms)
        else:
            found = _cut_init(view, limits)
    except EventNotFiniteError as problem:
        raise NotFiniteError(problem.field) from None
    size = found if type(found) is int else found[1]  # type: ignore[index]
    if size > limits.max_message:
        raise MessageTooLargeError(f"size of {header.decode().rstrip()} in bytes", size, limits.max_message)
    return found


def _cut_init(view: memoryview, limits: Limits) -> Cut:
    if len(view) < INIT_TEXT:
        return INIT_TEXT
    rid, length = int_at(view, HEADER), int_at(view, HEADER + 4)
    check_length("length of the INIT text", length, 0, limits.max_init)
    end = INIT_TEXT + length
    return Piece(Init(rid, bytes(view[INIT_TEXT:end])), end) if len(view) >= end else end


def int_at(view: memoryview, place: int) -> int:
    """Return the int32 at a place."""
    return int(_LENGTH.unpack_from(view, place)[0])


def check_length(field: str, announced: int, least: int, most: int) -> None:
    """Refuse an announced length that is out of its bounds.

    Raises:
        BadLengthError, MessageTooLargeError: too small, too large.
    """
    if announced < least:
        raise BadLengthError(field, announced, least)
    if announced > most:
        raise MessageTooLargeError(field, announced, most)


def check_atoms(count: int, limits: Limits, atoms: int | None) -> None:
    """Refuse an atom count that is not `atoms`, or, where that is None, out of its bounds.

    Raises:
        BadLengthError, MessageTooLargeError, AtomCountError: too small, too large, another one.
    """
    if count == atoms:
        return
    check_length("number of atoms", count, 1, limits.max_atoms)
    if atoms is not None:
        raise AtomCountError(atoms, count)


def header_of(event: Event | type[Event]) -> bytes:
    """Return the 12 bytes that a message begins with."""
    return event.word.encode("ascii").ljust(HEADER)


_BARE: Final[Mapping[Role, Mapping[bytes, Piece]]] = {
    role: {header_of(event): Piece(event, HEADER) for event in events}
    for role, events in ((Role.DRIVER, (Status(), GetForce(), Exit())), (Role.ENGINE, (NeedInit(), Ready(), HaveData())))
}
_POSDATA, _FORCEREADY = header_of(PosData), header_of(ForceReady)
_LONG: Final[Mapping[Role, tuple[bytes, ...]]] = {Role.DRIVER: (header_of(Init), _POSDATA), Role.ENGINE: (_FORCEREADY,)}
_WORDS = {role: tuple(header.decode().rstrip() for header in (*_BARE[role], *_LONG[role])) for role in _LONG}


# --- encoding -----------------------------------------------------------------------------------------------------------------------


def encode(event: Event, layout: Layout | None = None) -> bytes:
    """Return the message as bytes, to be written in one go.

    An INIT without text is sent with one blank: drivers written in C take a text of length 0 for a lost connection.

    Args:
        event: the message.
        layout: of POSDATA and FORCEREADY; None is `SINGLE`.

    Raises:
        EventNotFiniteError: an array was changed since the event was made and holds a NaN or an infinite number.
        LayoutError: a batch for a single layout, or the other way round.
    """
    whole = _WHOLE.get(type(event))
    if whole is not None:
        return whole
    if isinstance(event, (ForceReady, ForceBatch)):
        return (layout or SINGLE).pack_forceready(event)
    if isinstance(event, (PosData, PosBatch)):
        return (layout or SINGLE).pack_posdata(event)
    assert isinstance(event, Init)  # the last of the union
    text = event.text or b" "
    return header_of(Init) + _RID_AND_LENGTH.pack(event.rid, len(text)) + text


def inverse(cell: Float64s) -> Float64s:
    """Return the inverse of `cell`, or zeros without one: drivers should not read it, and ASE's insists that it is finite."""
    try:
        inverted = np.asarray(np.linalg.inv(cell), np.float64)
    except np.linalg.LinAlgError:
        return np.zeros((3, 3))
    return inverted if np.isfinite(inverted).all() else np.zeros((3, 3))


def check_finite(word: str, *arrays: Float64s) -> None:
    """Refuse NaN and infinity: the last line of defence, because arrays can change after their event was made.

    Raises:
        EventNotFiniteError: there is one.
    """
    for array in arrays:
        if not all_finite(array):
            raise EventNotFiniteError(word)


_WHOLE: Mapping[type[Event], bytes] = {
    type(event): header_of(event) for event in (Status(), GetForce(), Exit(), NeedInit(), Ready(), HaveData())
}


# --- the common layout --------------------------------------------------------------------------------------------------------------


class Single:
    """One configuration a message: what every engine and driver speaks."""

    def cut_posdata(self, view: memoryview, limits: Limits, atoms: int | None) -> Cut:
        """Cut a POSDATA; see `Layout`."""
        if len(view) < _POSDATA_POSITIONS:
            return _POSDATA_POSITIONS
        count = int_at(view, _POSDATA_COUNT)
        check_atoms(count, limits, atoms)
        size = _POSDATA_POSITIONS + count * _ATOM
        if len(view) < size:
            return size
        # copies: a view would show the next message, which is written to the same buffer
        columns = np.frombuffer(view, np.float64, 9, HEADER).reshape(3, 3)
        positions = np.frombuffer(view, np.float64, 3 * count, _POSDATA_POSITIONS).copy().reshape(count, 3)
        return Piece(PosData.cut(columns.T.copy(), positions), size)

    def cut_forceready(self, view: memoryview, limits: Limits, atoms: int | None) -> Cut:
        """Cut a FORCEREADY; see `Layout`."""
        if len(view) < _FORCEREADY_FORCES:
            return _FORCEREADY_FORCES
        _, energy, found = _ENERGY_AND_COUNT.unpack_from(view, 0)
        count = int(found)
        check_atoms(count, limits, atoms)
        virial_at = _FORCEREADY_FORCES + count * _ATOM
        extras_at = virial_at + _MATRIX + _LENGTH.size
        if len(view) < extras_at:
            return extras_at
        length = int_at(view, virial_at + _MATRIX)
        check_length("length of the extras", length, 0, limits.max_extras)
        end = extras_at + length
        if len(view) < end:
            return end
        forces = np.frombuffer(view, np.float64, 3 * count, _FORCEREADY_FORCES).copy().reshape(count, 3)
        virial = np.frombuffer(view, np.float64, 9, virial_at).copy().reshape(3, 3)
        return Piece(ForceReady.cut(energy, forces, virial, bytes(view[extras_at:end])), end)

    def pack_posdata(self, event: PosData | PosBatch) -> bytes:
        """Pack a POSDATA; see `Layout`."""
        if not isinstance(event, PosData):
            raise LayoutError(event.word, "one configuration")
        numbers = np.concatenate((event.cell.T.ravel(), inverse(event.cell).T.ravel()))
        check_finite("POSDATA", numbers, event.positions)
        return b"".join((_POSDATA, numbers.tobytes(), _LENGTH.pack(len(event.positions)), event.positions.tobytes()))

    def pack_forceready(self, event: ForceReady | ForceBatch) -> bytes:
        """Pack a FORCEREADY; see `Layout`."""
        if not isinstance(event, ForceReady):
            raise LayoutError(event.word, "one configuration")
        check_finite("FORCEREADY", event.forces, event.virial)
        return b"".join(
            (
                _ENERGY_AND_COUNT.pack(_FORCEREADY, event.energy, len(event.forces)),
                event.forces.data,  # not tobytes: that would copy it once more
                event.virial.data,
                _LENGTH.pack(len(event.extras)),
                event.extras,
            )
        )

    def largest(self, role: Role, limits: Limits, atoms: int) -> int:
        """Return the size of the largest message; see `Layout`."""
        if role is Role.DRIVER:
            return _POSDATA_POSITIONS + atoms * _ATOM
        return _FORCEREADY_FORCES + atoms * _ATOM + _MATRIX + _LENGTH.size + limits.max_extras


SINGLE: Final = Single()
