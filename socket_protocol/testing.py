"""What tests of the wire need, here and in other rooms: a pair of connections in memory, a minimal engine and a minimal driver that block.

Engine and driver are the plain use of a `Connection` on a `Stream`, one conversation at a time, with a limit on every wait.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from tumbaga.socket_protocol.connection import Connection, Limits, Role, State, Wait
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
)
from tumbaga.socket_protocol.init_text import parse_init
from tumbaga.socket_protocol.streams import Address, Dialling, Listener, Stream, dial

Dialect: TypeAlias = Literal["classic", "pipelined"]


def connection_pair(atoms: int | None = None, limits: Limits | None = None) -> tuple[Connection, Connection]:
    """Return an ENGINE and a DRIVER that know of each other nothing but `atoms`."""
    limits = limits or Limits()
    return Connection(Role.ENGINE, limits, atoms), Connection(Role.DRIVER, limits, atoms)


def events_of(connection: Connection, data: bytes = b"", chunk: int | None = None) -> list[Event]:
    """Feed `data` in pieces of `chunk` bytes (None: whole) and return the events that come out, up to and with the first `Exit`."""
    events: list[Event] = []
    step = chunk or max(len(data), 1)
    for start in range(0, max(len(data), 1), step):
        if piece := data[start : start + step]:
            connection.receive_data(piece)
        while not isinstance(event := connection.next_event(), Wait):
            events.append(event)
            if isinstance(event, Exit):
                return events
    return events


def pump(sender: Connection, receiver: Connection, *events: Event, chunk: int | None = None) -> list[Event]:
    """Send `events` in one write from one connection to the other and return what comes out there.

    >>> engine, driver = connection_pair()
    >>> pump(engine, driver, Status())
    [Status()]
    >>> pump(driver, engine, NeedInit())
    [NeedInit()]
    """
    return events_of(receiver, b"".join(sender.send(event) for event in events), chunk)


class Forces(NamedTuple):
    """What `BlockingEngine.forces` returns: Hartree, Hartree/Bohr (N, 3), Hartree (3, 3), bytes; signs as in `ForceReady`."""

    energy: float
    forces: Float64s
    virial: Float64s
    extras: bytes


class _Talk:
    """A connection on a stream, with waiting."""

    def __init__(self, stream: Stream, connection: Connection, timeout: float) -> None:
        self.stream = stream
        self.connection = connection
        self.timeout = timeout
        self._readable = _poll(stream, select.POLLIN)  # made once: it is asked twice a frame

    def write(self, data: bytes) -> None:
        self.stream.send(data)
        while self.stream.pending_out:
            _wait(self.stream, self.timeout, write=True)
            self.stream.flush()

    def next(self) -> Event:
        while isinstance(event := self.connection.next_event(), Wait):
            if not self._readable.poll(1000 * self.timeout):  # asleep at once: on few cores, to stay awake takes time from the engine
                raise TimeoutError(f"nothing came within {self.timeout} s at {self.stream!r}")
            self.stream.receive(self.connection)
        return event


class BlockingEngine:
    """A minimal engine: asks whoever dialled in for forces, and waits for them.

    Args:
        stream: connected to a driver.
        dialect: "classic" sends one message at a time and waits for HAVEDATA, as ASE does; "pipelined" sends POSDATA and GETFORCE in one
            write from the first frame on, and STATUS after each force, as i-PI does.
        rid: sent in INIT.
        init_text: sent in INIT; with `batch_size:B` in it, frames travel by batches of B: use `batch`.
        timeout: seconds that one answer may take.
        limits: the most to accept.
        shared: what the names of shared-memory segments begin with, `ipi_shm_` and something unique; empty for none.
    """

    def __init__(
        self,
        stream: Stream,
        dialect: Dialect = "classic",
        *,
        rid: int = 0,
        init_text: bytes = b" ",
        timeout: float = 60.0,
        limits: Limits | None = None,
        shared: str = "",
    ) -> None:
        self.connection = Connection(Role.ENGINE, limits or Limits(), shared=shared)
        self._batch_size = parse_init(init_text).batch_size
        self.inits_sent = 0
        self._talk = _Talk(stream, self.connection, timeout)
        self._dialect = dialect
        self._init = Init(rid, init_text)

    @classmethod
    def accept(
        cls, listener: Listener, dialect: Dialect = "classic", *, timeout: float = 60.0, init_text: bytes = b" ", shared: str = ""
    ) -> Self:
        """Return an engine for the next driver that dials in.

        Raises:
            TimeoutError: nobody came.
        """
        return cls(accept(listener, timeout), dialect, timeout=timeout, init_text=init_text, shared=shared)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def forces(self, positions: ArrayLike, cell: ArrayLike | None = None) -> Forces:
        """Return energy, forces, virial and extras of one frame.

        Args:
            positions: shape (N, 3), Bohr.
            cell: lattice vectors as rows, shape (3, 3), Bohr; None sends zeros, as ASE does without a cell.

        Raises:
            ConnectionError: the driver is gone, or does not get ready.
            TimeoutError: no answer in time.
            RemoteProtocolError: the driver broke the rules.
        """
        frame = PosData(np.zeros((3, 3)) if cell is None else np.asarray(cell, np.float64), np.asarray(positions, np.float64))
        result = self._ask(frame)
        assert isinstance(result, ForceReady)
        return _plain(result)

    def batch(self, frames: Sequence[PosData]) -> list[Forces]:
        """Return what `forces` does, for up to as many frames as INIT announced, in one message padded as i-PI pads it, or one by one.

        Raises:
            ConnectionError, TimeoutError, RemoteProtocolError: as `forces`.
        """
        if self._batch_size == 1:
            return [self.forces(frame.positions, frame.cell) for frame in frames]
        result = self._ask(PosBatch.of(frames, self._batch_size))
        assert isinstance(result, ForceBatch)
        return [_plain(result.result(index)) for index in range(len(frames))]

    def _ask(self, frame: PosData | PosBatch) -> Event:
        self._get_ready()
        if self._dialect == "pipelined":
            self._write(frame, GetForce(), Status())
            result = self._read(ForceReady, ForceBatch)
            self._read(Ready, NeedInit)
            return result
        self._write(frame)
        self._write(Status())
        self._read(HaveData)
        self._write(GetForce())
        return self._read(ForceReady, ForceBatch)

    def close(self) -> None:
        """Say EXIT and close. Can be called twice."""
        if self._talk.stream.closed:
            return
        if self.connection.state is not State.CLOSED:
            self._talk.stream.send(self.connection.send(Exit()))
        self.connection.close()
        self._talk.stream.close()

    def _get_ready(self) -> None:
        """Lead the driver to READY: ask, give INIT as often as it is asked for, but not for ever."""
        for _ in range(3):
            if self.connection.state is State.READY and self._dialect == "pipelined":
                return
            if self.connection.state is State.NEEDINIT:
                self._write(self._init, Status())
                self.inits_sent += 1
            else:
                self._write(Status())
            if isinstance(self._read(Ready, NeedInit), Ready):
                return
        raise ConnectionError("the driver asks for INIT again and again")

    def _write(self, *events: Event) -> None:
        self._talk.write(b"".join(self.connection.send(event) for event in events))

    def _read(self, *expected: type[Event]) -> Event:
        event = self._talk.next()
        if not isinstance(event, expected):
            raise ConnectionError(f"the driver sent {event.word} where {' or '.join(kind.word for kind in expected)} was expected")
        return event


def _plain(result: ForceReady) -> Forces:
    return Forces(result.energy, result.forces, result.virial, result.extras)


class BlockingDriver:
    """A minimal driver in all dialects: answers an engine, one message at a time, until the engine leaves.

    Args:
        stream: connected to an engine on this machine (it may use shared memory).
        compute: makes the answer to a frame; called once for frames that only pad a batch.
        timeout: seconds of silence from the engine.
        limits: the most to accept.
    """

    def __init__(
        self, stream: Stream, compute: Callable[[PosData], ForceReady], *, timeout: float = 60.0, limits: Limits | None = None
    ) -> None:
        self.connection = Connection(Role.DRIVER, limits or Limits(), shared=True)
        self.inits: list[Init] = []
        self.frames = 0
        self._compute = compute
        self._talk = _Talk(stream, self.connection, timeout)

    def serve(self) -> None:
        """Answer until the engine leaves, then close.

        Raises:
            TimeoutError: the engine said nothing for too long.
            RemoteProtocolError: the engine broke the rules.
        """
        answer: ForceReady | ForceBatch | None = None
        with self._talk.stream, contextlib.closing(self.connection):
            while not isinstance(event := self._talk.next(), Exit):
                if isinstance(event, Status):
                    self._talk.write(self.connection.answer_status())
                elif isinstance(event, (PosData, PosBatch)):
                    answer = self._answer(event)
                    self.connection.complete()
                elif isinstance(event, Init):
                    self.inits.append(event)
                elif answer is not None:
                    self._talk.write(self.connection.send(answer))

    def _answer(self, event: PosData | PosBatch) -> ForceReady | ForceBatch:
        if isinstance(event, PosData):
            self.frames += 1
            return self._compute(event)
        self.frames += event.distinct
        return ForceBatch.of([self._compute(event.frame(index)) for index in range(event.distinct)], len(event))


def accept(listener: Listener, timeout: float = 60.0) -> Stream:
    """Return the next peer that comes to `listener`.

    Raises:
        TimeoutError: nobody came.
    """
    while (stream := listener.accept()) is None:
        _wait(listener, timeout)
    return stream


def connect(address: Address, timeout: float = 60.0) -> Stream:
    """Return a stream to somebody who listens already.

    Raises:
        NotYetError: nobody listens.
        TimeoutError: the connection is not made in time.
    """
    made = dial(address)
    while isinstance(made, Dialling):
        _wait(made, timeout, write=True)
        made = made.finish()
    return made


def _wait(waitable: Stream | Listener | Dialling, timeout: float, *, write: bool = False) -> None:
    """Wait until `waitable` can be read, or written to."""
    if not _poll(waitable, select.POLLOUT if write else select.POLLIN).poll(1000 * timeout):
        raise TimeoutError(f"nothing came within {timeout} s at {waitable!r}")


def _poll(waitable: Stream | Listener | Dialling, events: int) -> select.poll:
    poller = select.poll()  # not select.select: it knows no descriptor above 1023
    poller.register(waitable.fileno(), events)
    return poller
