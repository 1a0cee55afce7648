"""Bytes to events and back: the layout of the messages, and nothing of who may say what when.

Numbers are int32 and float64 in native byte order, matrices row-major, headers 12 bytes of upper-case ASCII padded with blanks. A length
is checked against its limit before anything of that length is read or allocated.

```
STATUS GETFORCE EXIT NEEDINIT READY HAVEDATA    12
INIT         12 | i4 rid | i4 len | len bytes
POSDATA      12 | 9 f8 h | 9 f8 h^-1 | i4 N | 3N f8 positions
FORCEREADY   12 | f8 E | i4 N | 3N f8 forces | 9 f8 virial | i4 len | len bytes extras
```
The lattice vectors are the columns of h. The second matrix of POSDATA is never read: its convention differs between engines.

Source: "Communication protocol" in the i-PI documentation, checked against i-PI 3.3.1 and ASE 3.29.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from tumbaga.socket_protocol.errors import (
    AtomCountError,
    BadLengthError,
    EventNotFiniteError,
    InitError,
    MessageTooLargeError,
    NotFiniteError,
    UnknownHeaderError,
)
from tumbaga.socket_protocol.events import (
    Event,
    Exit,
    Float64s,
    ForceReady,
    GetForce,
    HaveData,
    Init,
    NeedInit,
    PosData,
    Ready,
    Status,
    all_finite,
)
from tumbaga.socket_protocol.init_text import parse_init
from tumbaga.socket_protocol.states import Role

HEADER: Final = 12
_RID_AND_LENGTH = struct.Struct("=ii")
_LENGTH = struct.Struct("=i")
_ENERGY_AND_COUNT = struct.Struct("=12sdi")
_ATOM = 3 * 8
_MATRIX = 9 * 8

_POSDATA_COUNT = HEADER + 2 * _MATRIX
_POSDATA_POSITIONS = _POSDATA_COUNT + 4
_FORCEREADY_FORCES = _ENERGY_AND_COUNT.size


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a connection accepts; what is announced beyond ends it.

    Attributes:
        max_atoms: atoms in a message.
        max_init: bytes in the text of INIT.
        max_extras: bytes in the extras of FORCEREADY.
    """

    max_atoms: int = 100_000
    max_init: int = 1 << 16
    max_extras: int = 1 << 24


class Piece(NamedTuple):
    """A decoded message and the number of bytes it took."""

    event: Event
    size: int


Decoder = Callable[[bytearray, Limits, int | None], Piece | None]


def largest_message(role: Role, limits: Limits, atoms: int | None) -> int:
    """Return the size in bytes of the largest message that may be received in `role`."""
    most = limits.max_atoms if atoms is None else atoms
    if role is Role.DRIVER:
        return max(_POSDATA_POSITIONS + most * _ATOM, HEADER + _RID_AND_LENGTH.size + limits.max_init)
    return _FORCEREADY_FORCES + most * _ATOM + _MATRIX + _LENGTH.size + limits.max_extras


# --- decoding -----------------------------------------------------------------------------------------------------------------------


def decode(role: Role, buffer: bytearray, limits: Limits, atoms: int | None = None) -> Piece | None:
    """Return the first message in `buffer`, or None if it is not whole yet; the buffer is left as it is.

    Args:
        role: ours, which decides the words that may come.
        buffer: received bytes, a message begins at the first.
        limits: the most to accept.
        atoms: the atom count to insist on, or None for any up to the limit.

    Raises:
        UnknownHeaderError: the 12 bytes are no word of the other role.
        MessageTooLargeError, BadLengthError, AtomCountError: an announced length is over the limit, negative, or not ours.
        NotFiniteError: a number that is used is NaN or infinite.
    """
    if len(buffer) < HEADER:
        return None
    header = bytes(buffer[:HEADER])
    decoder = _DECODERS[role].get(header)
    if decoder is None:
        raise UnknownHeaderError(header, _WORDS[role])
    try:
        return decoder(buffer, limits, atoms)
    except EventNotFiniteError as problem:
        raise NotFiniteError(problem.field) from None


def _decode_init(buffer: bytearray, limits: Limits, _atoms: int | None) -> Piece | None:
    start = HEADER + _RID_AND_LENGTH.size
    if len(buffer) < start:
        return None
    rid, length = _RID_AND_LENGTH.unpack_from(buffer, HEADER)
    _check_length("length of the INIT text", length, 0, limits.max_init)
    if len(buffer) < start + length:
        return None
    return Piece(Init(rid, bytes(buffer[start : start + length])), start + length)


def _decode_posdata(buffer: bytearray, limits: Limits, atoms: int | None) -> Piece | None:
    if len(buffer) < _POSDATA_POSITIONS:
        return None
    (count,) = _LENGTH.unpack_from(buffer, _POSDATA_COUNT)
    _check_atoms(count, limits, atoms)
    size = _POSDATA_POSITIONS + count * _ATOM
    if len(buffer) < size:
        return None
    # copies: a view would pin the buffer, which the next message is written to
    columns = np.frombuffer(buffer, np.float64, 9, HEADER).reshape(3, 3)
    positions = np.frombuffer(buffer, np.float64, 3 * count, _POSDATA_POSITIONS).copy().reshape(count, 3)
    return Piece(PosData(columns.T.copy(), positions), size)


def _decode_forceready(buffer: bytearray, limits: Limits, atoms: int | None) -> Piece | None:
    if len(buffer) < _FORCEREADY_FORCES:
        return None
    _, energy, count = _ENERGY_AND_COUNT.unpack_from(buffer, 0)
    _check_atoms(count, limits, atoms)
    virial_at = _FORCEREADY_FORCES + count * _ATOM
    extras_at = virial_at + _MATRIX + _LENGTH.size
    if len(buffer) < extras_at:
        return None
    (length,) = _LENGTH.unpack_from(buffer, virial_at + _MATRIX)
    _check_length("length of the extras", length, 0, limits.max_extras)
    if len(buffer) < extras_at + length:
        return None
    forces = np.frombuffer(buffer, np.float64, 3 * count, _FORCEREADY_FORCES).copy().reshape(count, 3)
    virial = np.frombuffer(buffer, np.float64, 9, virial_at).copy().reshape(3, 3)
    return Piece(ForceReady(energy, forces, virial, bytes(buffer[extras_at : extras_at + length])), extras_at + length)


def _check_length(field: str, announced: int, least: int, most: int) -> None:
    if announced < least:
        raise BadLengthError(field, announced, least)
    if announced > most:
        raise MessageTooLargeError(field, announced, most)


def _check_atoms(count: int, limits: Limits, atoms: int | None) -> None:
    _check_length("number of atoms", count, 1, limits.max_atoms)
    if atoms is not None and count != atoms:
        raise AtomCountError(atoms, count)


def _bare(event: Event) -> Decoder:
    """Return a decoder for a message that is only its header."""
    piece = Piece(event, HEADER)
    return lambda _buffer, _limits, _atoms: piece


def _header(event: Event | type[Event]) -> bytes:
    return event.word.encode("ascii").ljust(HEADER)


_DECODERS: Final[Mapping[Role, Mapping[bytes, Decoder]]] = {
    Role.DRIVER: {
        **{_header(event): _bare(event) for event in (Status(), GetForce(), Exit())},
        _header(Init): _decode_init,
        _header(PosData): _decode_posdata,
    },
    Role.ENGINE: {
        **{_header(event): _bare(event) for event in (NeedInit(), Ready(), HaveData())},
        _header(ForceReady): _decode_forceready,
    },
}
_WORDS = {role: tuple(header.decode().rstrip() for header in decoders) for role, decoders in _DECODERS.items()}


# --- encoding -----------------------------------------------------------------------------------------------------------------------


def encode(event: Event) -> bytes:
    """Return the message as bytes, to be written in one go.

    An INIT without text is sent with one blank: drivers written in C take a text of length 0 for a lost connection.

    Raises:
        EventNotFiniteError: an array was changed since the event was made and holds a NaN or an infinite number.
        InitError: the text would announce the batched layout.
    """
    whole = _WHOLE.get(type(event))
    if whole is not None:
        return whole
    if isinstance(event, ForceReady):
        return _encode_forceready(event)
    if isinstance(event, PosData):
        return _encode_posdata(event)
    assert isinstance(event, Init)  # the last of the union
    return _encode_init(event)


def _encode_init(event: Init) -> bytes:
    if parse_init(event.text).batch_size > 1:
        raise InitError("would announce batches, which this connection does not speak; leave batch_size out")
    text = event.text or b" "
    return _header(Init) + _RID_AND_LENGTH.pack(event.rid, len(text)) + text


def _encode_posdata(event: PosData) -> bytes:
    numbers = np.concatenate((event.cell.T.ravel(), _inverse(event.cell).T.ravel()))
    _check_finite("POSDATA", numbers, event.positions)
    return b"".join((_header(PosData), numbers.tobytes(), _LENGTH.pack(len(event.positions)), event.positions.tobytes()))


def _inverse(cell: Float64s) -> Float64s:
    """Return the inverse of `cell`, or zeros without one: drivers should not read it, and ASE's insists that it is finite."""
    try:
        inverse = np.asarray(np.linalg.inv(cell), np.float64)
    except np.linalg.LinAlgError:
        return np.zeros((3, 3))
    return inverse if np.isfinite(inverse).all() else np.zeros((3, 3))


def _encode_forceready(event: ForceReady) -> bytes:
    _check_finite("FORCEREADY", event.forces, event.virial)
    return b"".join(
        (
            _ENERGY_AND_COUNT.pack(_FORCEREADY, event.energy, len(event.forces)),
            event.forces.tobytes(),
            event.virial.tobytes(),
            _LENGTH.pack(len(event.extras)),
            event.extras,
        )
    )


def _check_finite(word: str, *arrays: Float64s) -> None:
    """Refuse NaN and infinity: the last line of defence, because arrays can change after their event was made."""
    for array in arrays:
        if not all_finite(array):
            raise EventNotFiniteError(word)


_FORCEREADY = _header(ForceReady)
_WHOLE: Mapping[type[Event], bytes] = {
    type(event): _header(event) for event in (Status(), GetForce(), Exit(), NeedInit(), Ready(), HaveData())
}
