"""`docs/protocol.md` is what the code says now, and the layouts in it are those of the encoder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from tumbaga.socket_protocol import document, errors
from tumbaga.socket_protocol.batched import Batched
from tumbaga.socket_protocol.codec import Limits, encode
from tumbaga.socket_protocol.events import Event, ForceBatch, ForceReady, Init, PosBatch, PosData
from tumbaga.socket_protocol.layouts import MESSAGES, Message, value
from tumbaga.socket_protocol.shm import KINDS, Shared
from tumbaga.socket_protocol.states import TRANSITIONS, Role

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
SIZES = [(1, 1), (3, 2), (7, 4)]
EXTRAS = b'{"a": 1}'


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == document.document(), "python -m tumbaga.socket_protocol.document > docs/protocol.md"


def message(word: str, dialect: str) -> Message:
    (found,) = (one for one in MESSAGES if (one.word, one.dialect) == (word, dialect))
    return found


def frames(atoms: int, size: int) -> list[PosData]:
    return [PosData(np.arange(9.0).reshape(3, 3) + index, np.full((atoms, 3), 7.0)) for index in range(size)]


def results(atoms: int, size: int) -> list[ForceReady]:
    return [ForceReady(5.0, np.full((atoms, 3), 6.0), np.arange(9.0).reshape(3, 3), EXTRAS)] * size


def place(message: Message, name: str, **sizes: int) -> int:
    return next(value(offset, **sizes) for offset, field in message.placed() if field.name == name)


@pytest.mark.parametrize(("atoms", "size"), SIZES)
def test_the_documented_sizes_are_those_of_the_encoder(atoms: int, size: int) -> None:
    batch, answer = PosBatch.of(frames(atoms, size), size), ForceBatch.of(results(atoms, size), size)
    text = b" batch_size:2"

    cases: list[tuple[Message, bytes, int]] = [
        (message("INIT", ""), encode(Init(1, text)), len(text)),
        (message("POSDATA", "single"), encode(batch.frame(0)), 0),
        (message("FORCEREADY", "single"), encode(answer.result(0)), len(EXTRAS)),
        (message("POSDATA", "batched"), encode(batch, Batched(size)), 0),
        (message("FORCEREADY", "batched"), encode(answer, Batched(size)), size * len(EXTRAS)),
    ]
    for described, data, length in cases:
        assert value(described.size, atoms=atoms, configurations=size, text=length) == len(data)
        assert data.startswith(described.word.ljust(12).encode())


def test_the_documented_sizes_of_shared_memory_are_those_of_the_encoder() -> None:
    prefix = f"ipi_shm_document{os.getpid()}_"
    layout = Shared(2, prefix)
    try:
        batch: Event = PosBatch.of(frames(3, 2), 2)
        first, later = encode(batch, layout), encode(batch, layout)
        described = message("POSDATA", "shared")
        assert value(described.size, text=sum(len(prefix + kind) for kind in KINDS)) == len(first)
        assert place(described, "length, name") == len(later)
        assert first.startswith(later)
    finally:
        layout.close()


@pytest.mark.parametrize(("atoms", "size"), SIZES)
def test_numbers_stand_where_the_document_says(atoms: int, size: int) -> None:
    (frame,), (result,) = frames(atoms, 1), results(atoms, 1)
    posdata, forceready = message("POSDATA", "single"), message("FORCEREADY", "single")
    data = encode(frame)
    h = np.frombuffer(data, np.float64, 9, place(posdata, "h")).reshape(3, 3)
    assert np.array_equal(h[:, 0], frame.cell[0])
    assert np.frombuffer(data, np.int32, 1, place(posdata, "N"))[0] == atoms
    assert np.frombuffer(data, np.float64, 1, place(posdata, "positions"))[0] == 7.0

    data = encode(result)
    assert np.frombuffer(data, np.float64, 1, place(forceready, "energy"))[0] == 5.0
    assert np.frombuffer(data, np.float64, 1, place(forceready, "forces", atoms=atoms))[0] == 6.0
    assert np.array_equal(np.frombuffer(data, np.float64, 9, place(forceready, "virial", atoms=atoms)), np.arange(9.0))
    assert data[place(forceready, "extras", atoms=atoms) :] == EXTRAS

    batched = message("FORCEREADY", "batched")
    data = encode(ForceBatch.of([result], size), Batched(size))
    at = place(batched, "virials", atoms=atoms, configurations=size)
    assert np.array_equal(np.frombuffer(data, np.float64, 9, at), np.arange(9.0))


def test_every_state_limit_and_error_is_in_the_document() -> None:
    text = document.document()
    for role in Role:
        for state, row in TRANSITIONS[role].items():
            assert text.count(f"| **{state.name}** |") >= 2
            assert len(row.receive) + len(row.send) == 0 or state.name in text
    for field in dataclasses.fields(Limits):
        assert f"| `{field.name}` | {field.default:,}".replace(",", " ") in text
    assert {type(error) for error in document.EXAMPLES} == set(errors.RemoteProtocolError.__subclasses__())
