"""What clients put behind their forces is read without ever failing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tumbaga.socket_protocol.client_extras import MOST_BYTES, ClientExtras, read_extras


@pytest.mark.parametrize("blank", [b"", b" ", b"\0", b" \0\n"], ids=["nothing", "a blank", "ASE's NUL", "several"])
def test_blank_extras_say_nothing(blank: bytes) -> None:
    assert read_extras(blank) == ClientExtras()


@pytest.mark.parametrize(
    ("sent", "text"), [(b"nada", "nada"), (b"[1, 2]", "[1, 2]"), (b"12", "12"), (b'{"a": ', '{"a":'), (b"\xff\xfe", "\ufffd\ufffd")]
)
def test_what_is_no_json_object_is_kept_as_text(sent: bytes, text: str) -> None:
    assert read_extras(sent) == ClientExtras({}, text, None)


def test_a_json_object_gives_its_keys_with_finite_numbers_only() -> None:
    read = read_extras(b'{"dipole": [0.5, NaN, -Infinity, 1e999], "n": 3}')

    assert read.values == {"dipole": [0.5, None, None, None], "n": 3}
    assert read.error is None


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b'{"error": "Traceback\\nMemoryError: no more"}', "Traceback\nMemoryError: no more"),
        (b'{"error": ["SCF", 50]}', "['SCF', 50]"),
        (b'{"error": ""}', None),
        (b'{"error": " "}', None),
        (b'{"error": null}', None),
        (b'"error"', None),
    ],
)
def test_the_key_error_is_an_error_if_it_says_anything(sent: bytes, error: str | None) -> None:
    assert read_extras(sent).error == error


def test_of_a_long_error_the_end_is_kept() -> None:
    """The last lines of a traceback say what happened."""
    said = read_extras(b'{"error": "' + 5000 * b"x" + b' the end"}').error

    assert said is not None
    assert len(said) == 400
    assert said.endswith("the end")


def test_extras_beyond_the_limit_are_cut_and_not_parsed() -> None:
    read = read_extras(b'{"a": "' + MOST_BYTES * b"x" + b'"}')

    assert not read.values
    assert len(read.text) == MOST_BYTES


@pytest.mark.parametrize("sent", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + 5000 * b"9" + b"}"], ids=["lists", "objects", "digits"])
def test_nesting_and_long_numbers_do_no_harm(sent: bytes) -> None:
    assert read_extras(sent).values == {}


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_junk_never_raises(junk: bytes) -> None:
    read_extras(junk)
