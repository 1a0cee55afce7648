"""What was wrong once, found by the fuzzer or while it was written: each with the input that showed it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.socket_protocol import errors
from tumbaga.socket_protocol.batched import Batched
from tumbaga.socket_protocol.codec import Layout, encode
from tumbaga.socket_protocol.connection import NEED_DATA, PAUSED, Connection, Limits, Role, State, Wait
from tumbaga.socket_protocol.events import Event, ForceBatch, ForceReady, GetForce, Init, NeedInit, PosBatch, PosData, Ready, Status
from tumbaga.socket_protocol.extras import check_extras
from tumbaga.socket_protocol.shm import KINDS
from tumbaga.socket_protocol.testing import events_of, pump


def frame(atoms: int) -> PosData:
    return PosData(9 * np.eye(3), np.ones((atoms, 3)))


def batch(size: int, atoms: int) -> PosBatch:
    return PosBatch.of([frame(atoms)], size)


def result(atoms: int) -> ForceReady:
    return ForceReady(0.0, np.zeros((atoms, 3)), np.zeros((3, 3)))


def results(size: int, atoms: int, extras: bytes = b"") -> ForceBatch:
    return ForceBatch(np.zeros(size), np.zeros((size, atoms, 3)), np.zeros((size, 3, 3)), (extras,) * size)


def wire(*events: Event, layout: Layout | None = None) -> bytes:
    return b"".join(encode(event, layout) for event in events)


def ready_engine(limits: Limits | None = None, init: bytes = b" ") -> Connection:
    engine = Connection(Role.ENGINE, limits or Limits())
    for event, answer in ((Status(), NeedInit()), (Init(0, init), None), (Status(), Ready())):
        engine.send(event)
        events_of(engine, wire(answer) if answer else b"")
    return engine


def feed_while_wanted(connection: Connection, data: bytes, piece: int) -> Event | Wait:
    """Read as a caller does: take events after each piece, stop where no data is wanted."""
    event: Event | Wait = NEED_DATA
    while data and connection.wants_data:
        connection.receive_data(data[:piece])
        data = data[piece:]
        event = connection.next_event()
    assert not data, "reading stopped within a message, for ever"
    return event


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"ipi_shm_found{os.getpid()}_"
    yield name
    assert not list(Path("/dev/shm").glob(f"{name}*"))


@pytest.fixture
def sharing(prefix: str) -> Iterator[tuple[Connection, Connection]]:
    """An ENGINE and a DRIVER in the middle of a frame in shared memory, one configuration of two atoms."""
    engine, driver = Connection(Role.ENGINE, shared=prefix), Connection(Role.DRIVER, shared=True)
    pump(engine, driver, Status())
    driver.answer_status()
    events_of(engine, wire(Ready()))
    pump(engine, driver, frame(2), GetForce())
    yield engine, driver
    engine.close()
    driver.close()


def test_an_init_that_announces_too_large_a_batch_is_our_own_mistake_and_changes_nothing() -> None:
    engine = Connection(Role.ENGINE)
    engine.send(Status())
    events_of(engine, wire(NeedInit()))

    with pytest.raises(errors.LocalProtocolError):
        engine.send(Init(0, b"batch_size:2000"))
    assert engine.state is State.NEEDINIT
    assert engine.dialect == "single"
    assert engine.send(Init(0, b"batch_size:2"))


def test_a_larger_number_of_atoms_that_is_expected_later_is_also_read() -> None:
    driver = Connection(Role.DRIVER, Limits(max_init=100), expected_atoms=2)
    events_of(driver, wire(frame(2), GetForce()))
    driver.complete()
    driver.next_event()
    driver.send(result(2))

    driver.expect(1000)
    assert isinstance(feed_while_wanted(driver, wire(frame(1000)), 500), PosData)


def test_a_batch_whose_extras_make_it_too_large_is_refused_and_not_waited_for() -> None:
    engine = ready_engine(Limits(max_message=2000, max_extras=10_000, max_init=100, max_atoms=100), b"batch_size:2")
    engine.send(batch(2, 1))
    engine.send(GetForce())

    with pytest.raises(errors.MessageTooLargeError):
        feed_while_wanted(engine, wire(results(2, 1, b" " * 4000), layout=Batched(2)), 500)


def test_a_frame_of_another_size_behind_a_held_init_does_not_break_the_memory_bound() -> None:
    driver = Connection(Role.DRIVER, expected_atoms=2)
    events_of(driver, wire(frame(2)))
    driver.receive_data(wire(Init(0, b" "), frame(90_000)))

    assert driver.next_event() is PAUSED
    assert driver.memory <= driver.memory_bound
    driver.complete()
    assert isinstance(driver.next_event(), Init)
    with pytest.raises(errors.AtomCountError):
        driver.next_event()


def test_an_init_in_havedata_does_not_change_the_layout_of_the_answer_under_way() -> None:
    driver = Connection(Role.DRIVER)
    events_of(driver, wire(Init(0, b"batch_size:4")) + wire(batch(4, 1), layout=Batched(4)))
    driver.complete()
    assert len(events_of(driver, wire(Init(0, b" "), GetForce()))) == 2

    assert driver.send(results(4, 1)) == encode(results(4, 1), Batched(4))
    assert events_of(driver, wire(frame(1)))


def test_an_init_read_ahead_does_not_change_the_answer_in_shared_memory(sharing: tuple[Connection, Connection]) -> None:
    engine, driver = sharing
    driver.receive_data(wire(Init(0, b"batch_size:2")))
    driver.next_event()
    driver.complete()
    assert driver.next_event() == GetForce()

    assert isinstance(events_of(engine, driver.send(result(2)))[0], ForceReady)


def test_a_batch_that_the_segments_were_not_made_for_is_refused_before_it_is_written(sharing: tuple[Connection, Connection]) -> None:
    engine, driver = sharing
    driver.complete()
    driver.next_event()
    events_of(engine, driver.send(result(2)))
    engine.send(Status())
    events_of(engine, wire(NeedInit()))
    engine.send(Init(0, b"batch_size:3"))
    engine.send(Status())
    events_of(engine, wire(Ready()))

    with pytest.raises(errors.LayoutError):
        engine.send(batch(3, 2))


def test_only_segments_of_engines_are_opened(prefix: str) -> None:
    other = Path("/dev/shm") / f"x{prefix}force"
    other.write_bytes(bytes(1000))
    names = [f"{prefix}{kind}" if kind != "force" else other.name for kind in KINDS]
    made = [Path("/dev/shm") / name for name in names]
    for path in made:
        path.write_bytes(bytes(1000))
    told = b"POSDATA     \2\0\0\0" + b"".join(len(name).to_bytes(4, "little") + name.encode() for name in names)
    try:
        with pytest.raises(errors.SharedMemoryError):
            events_of(Connection(Role.DRIVER, shared=True), told)
    finally:
        for path in made:
            path.unlink()


def test_extras_with_a_number_that_python_does_not_read_are_refused() -> None:
    extras = b'{"a":' + b"9" * 5000 + b"}"
    with pytest.raises(ValueError, match="digits"):
        json.loads(extras)

    with pytest.raises(errors.ExtrasError):
        check_extras(extras)


def test_a_finite_virial_stays_finite() -> None:
    huge = ForceReady(0.0, np.zeros((1, 3)), np.full((3, 3), 1.7e308))

    assert np.isfinite(huge.symmetric_virial).all()
