"""The batched and the shared-memory dialect: layouts byte by byte, conversations of both roles, and what a peer can do wrong."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.socket_protocol import errors
from tumbaga.socket_protocol.codec import Limits, encode
from tumbaga.socket_protocol.connection import NEED_DATA, PAUSED, Connection, Role
from tumbaga.socket_protocol.events import ForceBatch, ForceReady, GetForce, Init, PosBatch, PosData, Ready, Status
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingDriver, BlockingEngine, connect, events_of, pump

TIMEOUT = 20.0
CELL = np.array([[10.0, 0.0, 0.0], [1.0, 9.0, 0.0], [2.0, 3.0, 8.0]])  # rows are lattice vectors; no symmetry
SHM = Path("/dev/shm")


def frames(count: int, atoms: int = 2, seed: int = 0) -> list[PosData]:
    generator = np.random.default_rng(seed)
    return [PosData(CELL + index, generator.normal(size=(atoms, 3))) for index in range(count)]


def answer(frame: PosData) -> ForceReady:
    return ForceReady(float(frame.positions.sum()), -2.0 * frame.positions, frame.cell.copy(), b'{"a": %d}' % int(frame.cell[0, 0]))


def f8(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array, dtype=np.float64).tobytes()


def i4(*numbers: int) -> bytes:
    return struct.pack(f"={len(numbers)}i", *numbers)


def initialised(size: int, shared: bool = False, limits: Limits | None = None) -> Connection:
    driver = Connection(Role.DRIVER, limits or Limits(), shared=shared)
    assert len(events_of(driver, encode(Init(0, b" batch_size:%d" % size)))) == 1
    return driver


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"ipi_shm_test{os.getpid()}_"
    yield name
    left = [path.name for path in SHM.iterdir() if path.name.startswith(name)]
    for one in left:
        (SHM / one).unlink()
    assert left == []


# --- batched: bytes -----------------------------------------------------------------------------------------------------------------


def batched_posdata(batch: list[PosData]) -> bytes:
    matrices = b"".join(f8(frame.cell.T) + f8(np.linalg.inv(frame.cell).T) for frame in batch)
    return b"POSDATA     " + i4(len(batch[0].positions)) + matrices + b"".join(f8(frame.positions) for frame in batch)


@pytest.mark.parametrize("chunk", [1, 7, 100, None])
def test_a_batch_is_read_as_ipi_lays_it_out(chunk: int | None) -> None:
    driver, batch = initialised(3), frames(3)
    events = events_of(driver, batched_posdata(batch) + encode(GetForce()), chunk)

    assert len(events) == 1
    assert isinstance(events[0], PosBatch)
    assert np.array_equal(events[0].positions, [frame.positions for frame in batch])
    assert np.array_equal(events[0].cells, [frame.cell for frame in batch])
    assert driver.next_event() is PAUSED
    assert driver.dialect == "batched 3"


def test_the_answer_is_laid_out_as_ipi_reads_it() -> None:
    driver, batch = initialised(2), frames(2)
    events_of(driver, batched_posdata(batch) + encode(GetForce()))
    results = [answer(frame) for frame in batch]
    driver.complete()
    assert driver.next_event() == GetForce()

    told = driver.send(ForceBatch.of(results, 2))

    numbers = f8(np.array([r.energy for r in results])) + i4(2) + b"".join(f8(r.forces) for r in results)
    extras = b"".join(i4(len(r.extras)) + r.extras for r in results)
    assert told == b"FORCEREADY  " + numbers + b"".join(f8(r.virial) for r in results) + extras


@pytest.mark.parametrize("chunk", [1, 11, None])
def test_an_engine_reads_what_a_driver_writes_whatever_the_pieces(chunk: int | None) -> None:
    engine, driver = Connection(Role.ENGINE), Connection(Role.DRIVER)
    pump(engine, driver, Status())
    events_of(engine, driver.answer_status())
    pump(engine, driver, Init(4, b" batch_size:3"), Status())
    events_of(engine, driver.answer_status())
    batch = frames(3, atoms=5)

    received = pump(engine, driver, PosBatch.of(batch, 3), GetForce(), chunk=chunk)
    driver.complete()
    driver.next_event()
    got = events_of(engine, driver.send(ForceBatch.of([answer(f) for f in batch], 3)), chunk)

    assert isinstance(received[0], PosBatch)
    assert isinstance(got[0], ForceBatch)
    for index, frame in enumerate(batch):
        assert np.array_equal(got[0].result(index).forces, answer(frame).forces)
        assert got[0].extras[index] == answer(frame).extras


def test_padding_is_what_repeats_the_last_frame_and_nothing_else() -> None:
    one, two = frames(2)

    assert PosBatch.of([one], 8).distinct == 1
    assert PosBatch.of([one, two], 8).distinct == 2
    assert PosBatch.of([two, one, two, one], 4).distinct == 4
    assert PosBatch.of([one, one, two], 4).distinct == 3
    nearly = PosData(one.cell, one.positions + 1e-300)
    moved = PosData(one.cell + 1e-12, one.positions)
    assert PosBatch.of([one, nearly, moved], 3).distinct == 3


def test_an_answer_of_another_size_or_kind_is_refused_and_the_right_one_still_goes() -> None:
    driver, batch = initialised(3), frames(3)
    events_of(driver, batched_posdata(batch) + encode(GetForce()))
    driver.complete()
    driver.next_event()
    results = [answer(frame) for frame in batch]

    for wrong in (results[0], ForceBatch.of(results[:2], 2)):
        with pytest.raises(errors.LayoutError, match="3 configurations"):
            driver.send(wrong)
    with pytest.raises(errors.AnswerAtomCountError):
        driver.send(ForceBatch.of([answer(frame) for frame in frames(3, atoms=4)], 3))
    odd = ForceReady(0.0, results[0].forces, results[0].virial, b'{"b": 1}')
    with pytest.raises(errors.ExtrasKeysError):
        driver.send(ForceBatch.of([*results[:2], odd], 3))
    assert driver.send(ForceBatch.of(results, 3)).startswith(b"FORCEREADY  ")


def test_the_layout_counts_from_the_init_on_even_if_that_was_read_ahead() -> None:
    driver = Connection(Role.DRIVER)
    single, batch = frames(1)[0], frames(2)
    driver.receive_data(
        encode(single) + encode(GetForce()) + encode(Init(0, b"batch_size:2")) + batched_posdata(batch) + encode(GetForce())
    )

    assert isinstance(driver.next_event(), PosData)
    assert driver.next_event() is PAUSED
    driver.complete()
    driver.next_event()
    assert len(driver.send(answer(single))) == 100 + 48 + len(answer(single).extras)
    assert isinstance(driver.next_event(), Init)
    assert isinstance(driver.next_event(), PosBatch)
    driver.complete()
    driver.next_event()
    assert driver.send(ForceBatch.of([answer(frame) for frame in batch], 2))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"POSDATA     " + i4(-1), "at least 1"),
        (b"POSDATA     " + i4(2**31 - 1), "at most 1000"),
        (b"POSDATA     " + i4(900), "size of POSDATA"),
    ],
)
def test_a_batch_beyond_the_limits_is_refused_before_its_body_is_there(data: bytes, problem: str) -> None:
    driver = initialised(8, limits=Limits(max_atoms=1000, max_message=100_000))

    with pytest.raises(errors.RemoteProtocolError, match=problem):
        events_of(driver, data + bytes(12))  # so much tells the layouts apart
    assert driver.memory <= driver.memory_bound


@pytest.mark.parametrize("size", [1025, 10**9])
def test_an_announced_batch_beyond_the_limit_is_refused(size: int) -> None:
    driver = Connection(Role.DRIVER)

    with pytest.raises(errors.MessageTooLargeError, match="batch_size"):
        events_of(driver, encode(Init(0, b" batch_size:%d" % size)))


def test_extras_of_a_batch_are_limited_together() -> None:
    limits = Limits(max_extras=100)
    engine = Connection(Role.ENGINE, limits)
    events_of(engine, engine.send(Status()) and encode(Ready()))
    engine._announced(Init(0, b"batch_size:2"))
    engine.send(PosBatch.of(frames(2), 2))
    engine.send(GetForce())
    numbers = f8(np.zeros(2)) + i4(2) + f8(np.zeros(12)) + f8(np.zeros(18))

    with pytest.raises(errors.MessageTooLargeError, match="extras"):
        events_of(engine, b"FORCEREADY  " + numbers + i4(60) + b" " * 60 + i4(60))


# --- shared memory ------------------------------------------------------------------------------------------------------------------


def conversation(tmp_path: Path, init: bytes, shared: str) -> tuple[list[list[int]], BlockingDriver]:
    """Ask a driver in a thread for batches of one to three frames over a unix socket; return what was asked and the driver."""
    with listen(Address.unix(str(tmp_path / "s"))) as listener:
        driver = BlockingDriver(connect(listener.address, TIMEOUT), answer, timeout=TIMEOUT)
        thread = threading.Thread(target=driver.serve)
        thread.start()
        asked = []
        with BlockingEngine.accept(listener, "pipelined", timeout=TIMEOUT, init_text=init, shared=shared) as engine:
            for count in (3, 1, 2) if b"batch" in init else (1, 1):
                batch = frames(count, atoms=7, seed=count)
                asked.append([count])
                for got, frame in zip(engine.batch(batch), batch, strict=True):
                    expected = answer(frame)
                    assert got.energy == expected.energy
                    assert np.array_equal(got.forces, expected.forces)
                    assert np.array_equal(got.virial, expected.virial)
                    assert got.extras == expected.extras
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    return asked, driver


@pytest.mark.parametrize("init", [b" ", b" batch_size:3"])
def test_engine_and_driver_talk_through_shared_memory(init: bytes, tmp_path: Path, prefix: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    asked, driver = conversation(tmp_path, init, prefix)

    assert driver.frames == sum(count for (count,) in asked)
    assert driver.connection.dialect == ("shared memory 3" if b"batch" in init else "shared memory 1")
    assert set(os.listdir("/proc/self/fd")) == before


def test_engine_and_driver_talk_in_batches(tmp_path: Path) -> None:
    asked, driver = conversation(tmp_path, b" batch_size:3", "")

    assert driver.frames == sum(count for (count,) in asked)
    assert driver.connection.dialect == "batched 3"


def shared_posdata(prefix: str, atoms: int, size: int = 1, *, short: str = "") -> bytes:
    told = b"POSDATA     " + i4(atoms)
    for kind in ("pos", "h", "ih", "pot", "force", "vir"):
        bytes_ = 8 * size * {"pos": 3 * atoms, "force": 3 * atoms, "pot": 1}.get(kind, 9)
        (SHM / f"{prefix}{kind}").write_bytes(bytes(bytes_ - 8 * (kind == short)))
        told += i4(len(prefix + kind)) + (prefix + kind).encode()
    return told


@pytest.fixture
def segments(prefix: str) -> Iterator[str]:
    yield prefix
    for path in SHM.iterdir():
        if path.name.startswith(prefix):
            path.unlink()


@pytest.mark.parametrize("chunk", [1, 13, None])
def test_shared_memory_is_recognised_from_the_first_frame(segments: str, chunk: int | None) -> None:
    data = shared_posdata(segments, 2)
    (SHM / f"{segments}h").write_bytes(f8(CELL.T))
    (SHM / f"{segments}pos").write_bytes(f8(np.arange(6.0)))
    driver = Connection(Role.DRIVER, shared=True)

    events = events_of(driver, encode(Init(0, b" ")) + data + encode(GetForce()), chunk)

    assert isinstance(events[1], PosData)
    assert np.array_equal(events[1].cell, CELL)
    assert np.array_equal(events[1].positions.ravel(), np.arange(6.0))
    driver.complete()
    assert driver.next_event() == GetForce()
    assert driver.send(ForceReady(3.0, np.ones((2, 3)), np.eye(3))) == b"FORCEREADY  " + i4(0)
    assert (SHM / f"{segments}pot").read_bytes() == f8(np.array([3.0]))
    assert (SHM / f"{segments}force").read_bytes() == f8(np.ones(6))
    assert driver.next_event() is NEED_DATA
    driver.close()


def test_shared_memory_is_refused_where_it_is_not_allowed(segments: str) -> None:
    with pytest.raises(errors.SharedMemoryError, match="cannot be used"):
        events_of(Connection(Role.DRIVER), shared_posdata(segments, 2))


@pytest.mark.parametrize("kind", ["pos", "h", "ih", "pot", "force", "vir"])
def test_a_segment_that_is_too_small_or_missing_is_refused(segments: str, kind: str) -> None:
    with pytest.raises(errors.SharedMemoryError, match="bytes where"):
        events_of(Connection(Role.DRIVER, shared=True), shared_posdata(segments, 2, short=kind))
    data = shared_posdata(segments, 2)
    (SHM / f"{segments}{kind}").unlink()
    with pytest.raises(errors.SharedMemoryError, match="no segment"):
        events_of(Connection(Role.DRIVER, shared=True), data)


def test_a_segment_truncated_in_mid_session_ends_the_session_and_not_the_process(segments: str) -> None:
    driver = Connection(Role.DRIVER, shared=True)
    events_of(driver, shared_posdata(segments, 200))
    driver.complete()
    events_of(driver, encode(GetForce()))
    driver.send(ForceReady(3.0, np.ones((200, 3)), np.eye(3)))
    os.truncate(SHM / f"{segments}pos", 0)

    with pytest.raises(errors.SharedMemoryError, match="shorter"):
        events_of(driver, b"POSDATA     " + i4(200))


def test_names_lead_nowhere_else(segments: str, tmp_path: Path) -> None:
    target = tmp_path / "secret"
    target.write_bytes(bytes(1000))
    link = SHM / f"{segments}pos"
    link.symlink_to(target)
    told = b"POSDATA     " + i4(1) + i4(len(link.name)) + link.name.encode()
    told += b"".join(i4(1) + b"x" for _ in range(5))
    with pytest.raises(errors.SharedMemoryError, match="no segment"):
        events_of(Connection(Role.DRIVER, shared=True), told)

    name = b"ipi_shm_/../" + os.fsencode(target)
    told = b"POSDATA     " + i4(1) + i4(len(name)) + name + b"".join(i4(1) + b"x" for _ in range(5))
    with pytest.raises(errors.SharedMemoryError, match="no name"):
        events_of(Connection(Role.DRIVER, shared=True), told)


def test_a_pipe_of_that_name_does_not_block(segments: str) -> None:
    data = shared_posdata(segments, 1)
    (SHM / f"{segments}pos").unlink()
    os.mkfifo(SHM / f"{segments}pos")

    with pytest.raises(errors.SharedMemoryError, match="bytes where"):
        events_of(Connection(Role.DRIVER, shared=True), data)


def test_not_a_number_in_shared_memory_is_refused(segments: str) -> None:
    data = shared_posdata(segments, 1)
    (SHM / f"{segments}pos").write_bytes(f8(np.array([0.0, np.nan, 0.0])))

    with pytest.raises(errors.NotFiniteError):
        events_of(Connection(Role.DRIVER, shared=True), data)


def test_the_number_of_atoms_may_change_only_with_an_init() -> None:
    driver = Connection(Role.DRIVER)
    two, three = frames(1, atoms=2)[0], frames(1, atoms=3)[0]
    events_of(driver, encode(two) + encode(GetForce()))
    driver.complete()
    driver.next_event()
    driver.send(answer(two))

    events = events_of(driver, encode(Init(1, b" ")) + encode(three) + encode(GetForce()))
    assert isinstance(events[1], PosData)
    assert len(events[1].positions) == 3
    driver.complete()
    driver.next_event()
    driver.send(answer(three))
    with pytest.raises(errors.AtomCountError, match="sent 2 atoms, 3 were expected"):
        events_of(driver, encode(two))


def test_a_message_that_has_begun_is_told_from_silence() -> None:
    driver = Connection(Role.DRIVER)
    assert driver.partial == 0
    for data in (b"STAT", b"US      "):
        driver.receive_data(data)
        assert bool(driver.partial) == (data == b"STAT")
    assert driver.next_event() == Status()
    driver.answer_status()
    whole = encode(frames(1)[0])
    driver.receive_data(whole[:-1])
    assert driver.next_event() is NEED_DATA
    assert driver.partial == len(whole) - 1
    driver.receive_data(whole[-1:])
    assert driver.partial == 0
