"""The layout of the messages: one table of events and their bytes drives encoder and decoder alike."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tumbaga.socket_protocol import errors
from tumbaga.socket_protocol.codec import Limits, decode, encode
from tumbaga.socket_protocol.events import Event, Exit, ForceReady, GetForce, HaveData, Init, NeedInit, PosData, Ready, Status
from tumbaga.socket_protocol.states import Role

DRIVER, ENGINE = Role.DRIVER, Role.ENGINE
LIMITS = Limits()
# a busy machine is no reason to fail
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CELL = np.array([[10.0, 0.0, 0.0], [1.0, 9.0, 0.0], [2.0, 3.0, 8.0]])  # rows are lattice vectors; no symmetry


def f8(*numbers: float) -> bytes:
    return struct.pack(f"={len(numbers)}d", *numbers)


def i4(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}i", *numbers)


def posdata(h: bytes, count: int, positions: bytes, second: bytes = f8(*[0.0] * 9)) -> bytes:
    return b"POSDATA     " + h + second + i4(count) + positions


def forceready(energy: float, count: int, forces: bytes, virial: bytes, extras: bytes = b"", length: int | None = None) -> bytes:
    return b"FORCEREADY  " + f8(energy) + i4(count) + forces + virial + i4(len(extras) if length is None else length) + extras


COLUMNS = f8(10, 1, 2, 0, 9, 3, 0, 0, 8)
INVERSE = np.ascontiguousarray(np.linalg.inv(CELL).T).tobytes()
TABLE: list[tuple[Role, Event, bytes]] = [
    (DRIVER, Status(), b"STATUS      "),
    (DRIVER, Init(3, b" model : a , "), b"INIT        " + i4(3, 13) + b" model : a , "),
    (DRIVER, Init(-1, b"\0"), b"INIT        " + i4(-1, 1) + b"\0"),
    (DRIVER, PosData(CELL, np.arange(6.0).reshape(2, 3)), posdata(COLUMNS, 2, f8(0, 1, 2, 3, 4, 5), INVERSE)),
    (DRIVER, PosData(np.zeros((3, 3)), np.ones((1, 3))), posdata(f8(*[0.0] * 9), 1, f8(1, 1, 1))),
    (DRIVER, GetForce(), b"GETFORCE    "),
    (DRIVER, Exit(), b"EXIT        "),
    (ENGINE, NeedInit(), b"NEEDINIT    "),
    (ENGINE, Ready(), b"READY       "),
    (ENGINE, HaveData(), b"HAVEDATA    "),
    (
        ENGINE,
        ForceReady(-1.5, np.arange(6.0).reshape(2, 3), np.arange(9.0).reshape(3, 3), b'{"a": 1}'),
        forceready(-1.5, 2, f8(0, 1, 2, 3, 4, 5), f8(*range(9)), b'{"a": 1}'),
    ),
    (ENGINE, ForceReady(0.0, np.zeros((1, 3)), np.zeros((3, 3))), forceready(0.0, 1, f8(0, 0, 0), f8(*[0] * 9))),
]
IDS = [f"{event.word}-{index}" for index, (_, event, _) in enumerate(TABLE)]


def same(one: Event, other: Event) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)]
    return type(one) is type(other) and all(np.array_equal(a, b) for a, b in pairs)


def cut(role: Role, data: bytes, limits: Limits = LIMITS, atoms: int | None = None) -> Event | None:
    piece = decode(role, memoryview(data), limits, atoms)
    return None if isinstance(piece, int) else piece.event


@pytest.mark.parametrize(("role", "event", "data"), TABLE, ids=IDS)
def test_an_event_is_encoded_as_the_documents_say(role: Role, event: Event, data: bytes) -> None:
    assert encode(event) == data


@pytest.mark.parametrize(("role", "event", "data"), TABLE, ids=IDS)
def test_the_bytes_are_decoded_to_the_event_and_the_next_message_is_left_alone(role: Role, event: Event, data: bytes) -> None:
    piece = decode(role, memoryview(data + b"STATUS      "), Limits())

    assert not isinstance(piece, int)
    assert same(piece.event, event)
    assert piece.size == len(data)


@pytest.mark.parametrize(("role", "event", "data"), TABLE, ids=IDS)
def test_a_part_of_a_message_is_no_message_and_consumes_nothing(role: Role, event: Event, data: bytes) -> None:
    for end in range(len(data)):
        needed = decode(role, memoryview(data[:end]), Limits())

        assert isinstance(needed, int)
        assert end < needed <= len(data)


def test_decoded_arrays_are_copies_so_that_the_buffer_can_be_reused() -> None:
    buffer = bytearray(TABLE[3][2])
    piece = decode(DRIVER, memoryview(buffer), Limits())
    assert not isinstance(piece, int)
    assert isinstance(piece.event, PosData)
    buffer[:] = b"x" * len(buffer)

    assert piece.event.positions.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert piece.event.positions.flags.writeable


def test_the_second_matrix_is_never_read() -> None:
    event = cut(DRIVER, posdata(COLUMNS, 1, f8(0, 0, 0), f8(*[float("nan")] * 9)))

    assert isinstance(event, PosData)
    assert np.array_equal(event.cell, CELL)


def test_an_init_without_text_is_sent_with_one_byte_and_can_be_received_without() -> None:
    assert encode(Init(0, b"")) == b"INIT        " + i4(0, 1) + b" "
    assert cut(DRIVER, b"INIT        " + i4(7, 0)) == Init(7, b"")


NAN, INF = float("nan"), float("inf")
BROKEN: list[tuple[str, Role, bytes, type[errors.RemoteProtocolError]]] = [
    ("lower case", DRIVER, b"status      ", errors.UnknownHeaderError),
    ("padded with NUL", DRIVER, b"STATUS\0\0\0\0\0\0", errors.UnknownHeaderError),
    ("busy", ENGINE, b"BUSY        ", errors.UnknownHeaderError),
    ("word of an engine", ENGINE, b"STATUS      ", errors.UnknownHeaderError),
    ("word of a driver", DRIVER, b"READY       ", errors.UnknownHeaderError),
    ("MDI", DRIVER, i4(1, 4, 16), errors.UnknownHeaderError),
    ("init negative", DRIVER, b"INIT        " + i4(0, -1), errors.BadLengthError),
    ("init long", DRIVER, b"INIT        " + i4(0, 101), errors.MessageTooLargeError),
    ("no atoms", DRIVER, posdata(COLUMNS, 0, b""), errors.BadLengthError),
    ("negative atoms", DRIVER, posdata(COLUMNS, -5, b""), errors.BadLengthError),
    ("many atoms", DRIVER, posdata(COLUMNS, 11, b""), errors.MessageTooLargeError),
    ("most atoms", DRIVER, posdata(COLUMNS, 2**31 - 1, b""), errors.MessageTooLargeError),
    ("other atoms", DRIVER, posdata(COLUMNS, 3, b""), errors.AtomCountError),
    ("nan position", DRIVER, posdata(COLUMNS, 2, f8(0, 0, 0, 0, 0, NAN)), errors.NotFiniteError),
    ("inf cell", DRIVER, posdata(f8(INF, *[0] * 8), 2, f8(*[0] * 6)), errors.NotFiniteError),
    ("other atoms in reply", ENGINE, forceready(0.0, 3, b"", b""), errors.AtomCountError),
    ("no atoms in reply", ENGINE, forceready(0.0, 0, b"", b""), errors.BadLengthError),
    ("nan energy", ENGINE, forceready(NAN, 2, f8(*[0] * 6), f8(*[0] * 9)), errors.NotFiniteError),
    ("inf force", ENGINE, forceready(0.0, 2, f8(INF, *[0] * 5), f8(*[0] * 9)), errors.NotFiniteError),
    ("nan virial", ENGINE, forceready(0.0, 2, f8(*[0] * 6), f8(*[0] * 8, NAN)), errors.NotFiniteError),
    ("extras negative", ENGINE, forceready(0.0, 2, f8(*[0] * 6), f8(*[0] * 9), length=-1), errors.BadLengthError),
    ("extras long", ENGINE, forceready(0.0, 2, f8(*[0] * 6), f8(*[0] * 9), length=101), errors.MessageTooLargeError),
]


@pytest.mark.parametrize(("role", "data", "error"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_message_is_refused_before_its_body_is_there(role: Role, data: bytes, error: type[errors.RemoteProtocolError]) -> None:
    with pytest.raises(error) as caught:
        cut(role, data, Limits(max_atoms=10, max_init=100, max_extras=100), atoms=2)

    assert "expected" in str(caught.value) or "accepted" in str(caught.value)


def test_the_error_of_an_mdi_peer_says_so() -> None:
    with pytest.raises(errors.UnknownHeaderError, match="MDI"):
        cut(DRIVER, i4(1, 4, 16))


def test_a_number_spoilt_after_the_event_was_made_is_refused_by_the_encoder() -> None:
    answer = ForceReady(0.0, np.zeros((2, 3)), np.zeros((3, 3)))
    answer.forces[1, 2] = NAN
    frame = PosData(CELL, np.zeros((2, 3)))
    frame.positions[0, 0] = INF

    with pytest.raises(errors.EventNotFiniteError, match="FORCEREADY"):
        encode(answer)
    with pytest.raises(errors.EventNotFiniteError, match="POSDATA"):
        encode(frame)


@pytest.mark.parametrize("cell", [np.zeros((3, 3)), np.ones((3, 3)), 1e-308 * np.eye(3)], ids=["zeros", "singular", "overflow"])
def test_the_second_matrix_that_we_send_is_finite_whatever_the_cell(cell: np.ndarray) -> None:
    data = encode(PosData(cell, np.zeros((1, 3))))

    assert np.isfinite(np.frombuffer(data, np.float64, 9, 12 + 72)).all()


finite = st.floats(allow_nan=False, allow_infinity=False, width=64)
rows = st.integers(1, 7).flatmap(lambda n: hnp.arrays(np.float64, (n, 3), elements=finite))
matrices = hnp.arrays(np.float64, (3, 3), elements=st.floats(-1e3, 1e3))


@PATIENT
@given(matrices, rows)
def test_any_frame_survives_the_wire_bit_for_bit(cell: np.ndarray, positions: np.ndarray) -> None:
    event = PosData(cell, positions)

    assert same(event, cut(DRIVER, encode(event)) or Exit())


@PATIENT
@given(finite, rows, hnp.arrays(np.float64, (3, 3), elements=finite), st.binary(max_size=40))
def test_any_result_survives_the_wire_bit_for_bit(energy: float, forces: np.ndarray, virial: np.ndarray, extras: bytes) -> None:
    event = ForceReady(energy, forces, virial, extras)

    assert same(event, cut(ENGINE, encode(event)) or Exit())


@PATIENT
@given(st.integers(-(2**31), 2**31 - 1), st.binary(min_size=1, max_size=200).filter(lambda text: b"batch_size" not in text))
def test_any_init_survives_the_wire(rid: int, text: bytes) -> None:
    assert cut(DRIVER, encode(Init(rid, text))) == Init(rid, text)
