"""Events are checked when they are made, and know what a cell means; the free texts of INIT and extras."""

from __future__ import annotations

import inspect
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tumbaga.socket_protocol import errors
from tumbaga.socket_protocol.events import ForceReady, Init, PosData
from tumbaga.socket_protocol.extras import check_extras
from tumbaga.socket_protocol.init_text import InitInfo, parse_init

# a busy machine is no reason to fail
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ANGSTROM = 1.8897261
ROTATED = np.array([[0.0, 9.0, 1.0], [8.0, 0.0, 0.0], [0.0, 0.5, 10.0]])  # left-handed, as an engine that rotates its cell may send


@pytest.mark.parametrize(
    ("cell", "periodic"),
    [
        (np.zeros((3, 3)), False),
        (-ANGSTROM * np.eye(3), False),
        (-1.88972612584 * np.eye(3), False),
        (-ANGSTROM * np.eye(3) + 9e-5, False),
        (-ANGSTROM * np.eye(3) + 2e-4, True),
        (+ANGSTROM * np.eye(3), True),
        (-5.0 * np.eye(3), True),
        (ROTATED, True),
        (np.diag([0.0, 0.0, 8.0]), True),
    ],
)
def test_only_the_two_agreed_cells_mean_not_periodic(cell: np.ndarray, periodic: bool) -> None:
    assert PosData(cell, np.zeros((1, 3))).periodic is periodic


@pytest.mark.parametrize(
    ("cell", "positions"),
    [
        (np.eye(4), np.zeros((2, 3))),
        (np.eye(3)[:2], np.zeros((2, 3))),
        (np.eye(3), np.zeros((0, 3))),
        (np.eye(3), np.zeros((2, 4))),
        (np.eye(3), np.zeros(6)),
        (np.eye(3), "no numbers"),
        (None, np.zeros((2, 3))),
    ],
)
def test_a_frame_of_the_wrong_shape_cannot_be_made(cell: object, positions: object) -> None:
    with pytest.raises(errors.EventShapeError):
        PosData(cell, positions)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_event_with_a_number_that_is_not_finite_cannot_be_made(bad: float) -> None:
    good, spoilt, square = np.zeros((2, 3)), np.array([[0, 0, bad], [0, 0, 0]]), np.full((3, 3), bad)
    for make in (
        lambda: PosData(np.eye(3), spoilt),
        lambda: PosData(square, good),
        lambda: ForceReady(bad, good, np.eye(3)),
        lambda: ForceReady(0.0, spoilt, np.eye(3)),
        lambda: ForceReady(0.0, good, square),
    ):
        with pytest.raises(errors.EventNotFiniteError):
            make()


def test_an_event_takes_what_a_model_returns_and_holds_contiguous_float64() -> None:
    answer = ForceReady(np.float32(0.5), np.zeros((2, 3), np.float32), np.eye(3, dtype=np.float32)[::-1])  # type: ignore[arg-type]

    assert type(answer.energy) is float
    assert all(array.dtype == np.float64 and array.flags.c_contiguous for array in (answer.forces, answer.virial))


@pytest.mark.parametrize(("rid", "text"), [(2**31, b""), (0, "text")])
def test_an_init_that_cannot_be_written_cannot_be_made(rid: int, text: bytes) -> None:
    with pytest.raises(errors.InitError):
        Init(rid, text)


def test_an_upper_triangle_is_mirrored_and_two_triangles_are_averaged() -> None:
    full = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]])
    skew = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])

    for virial in (full, np.triu(full), full + skew):
        assert np.array_equal(ForceReady(0.0, np.zeros((1, 3)), virial).symmetric_virial, full)


@pytest.mark.parametrize(
    ("text", "info"),
    [
        (b" ", InitInfo()),
        (b"", InitInfo()),
        (b"\0", InitInfo()),
        (b"Initializing", InitInfo()),
        (b" model : abc , , batch_size:4", InitInfo(batch_size=4)),
        (b" batch_size:32", InitInfo(batch_size=32)),
        (b" batch_size : 0 , ", InitInfo()),
        (b" batch_size : many , ", InitInfo()),
        (b" path : a:b , batch_size : 3 , ", InitInfo(batch_size=3)),
        (b'{"numbers": [8, 1, 1], "pbc": [true, true, true]}\0', InitInfo(numbers=(8, 1, 1), pbc=(True, True, True))),
        (b'{"numbers": null, "pbc": [0, 0, 1]}', InitInfo(pbc=(False, False, True))),
        (b'{"numbers": ["O"], "pbc": 3}', InitInfo()),
        (b"[1, 2]", InitInfo()),
        (b"\xff\xfe, batch_size:2", InitInfo(batch_size=2)),
    ],
)
def test_init_texts_are_understood_as_far_as_they_can_be(text: bytes, info: InitInfo) -> None:
    assert parse_init(text) == info


@PATIENT
@given(st.one_of(st.binary(max_size=300), st.text(alphabet='{}[]":, batch_size1290', max_size=60).map(str.encode)))
def test_no_init_text_raises(text: bytes) -> None:
    assert parse_init(text).batch_size >= 1


def test_a_deeply_nested_init_text_is_junk_like_any_other() -> None:
    assert parse_init(b"[" * 60_000) == InitInfo()


@pytest.mark.parametrize(
    ("extras", "keys"),
    [(b"", set()), (b" \n", set()), (b"{}", set()), (b'{"a": 1, "b": {"raw": 2}}', {"a", "b"}), ('{"é": 1}'.encode(), {"é"})],
)
def test_good_extras_give_their_keys(extras: bytes, keys: set[str]) -> None:
    assert check_extras(extras) == keys


@pytest.mark.parametrize(
    "extras",
    [
        b"123",
        b"[1, 2]",
        b"null",
        b'"text"',
        b"text",
        b"\0",
        b'{"raw": 1}',
        b'{"a": "\xff"}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"[" * 60_000,
    ],
)
def test_extras_that_would_break_an_engine_are_refused(extras: bytes) -> None:
    with pytest.raises(errors.ExtrasError):
        check_extras(extras)


ERRORS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if "__init__" in vars(kind)]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_keeps_its_facts_through_pickling_and_makes_a_sentence(kind: type[Exception]) -> None:
    samples = {"bytes": b"STATUS", "int": 7, "str": "POSDATA", "tuple[str, ...]": ("READY",)}
    hints = [parameter.annotation for name, parameter in inspect.signature(kind).parameters.items() if name != "self"]
    error = kind(*(samples[hint] for hint in hints))
    again = pickle.loads(pickle.dumps(error))

    assert type(again) is kind
    assert vars(again) == vars(error)
    assert str(again) not in ("", str(again.args))
