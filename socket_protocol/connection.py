"""One conversation, in either role, without any I/O: bytes in, events out, events in, bytes out.

The pattern is that of all sans-I/O protocol codes: `receive_data(bytes)`, then `next_event()` until it returns `NEED_DATA` or `PAUSED`,
and `send(event) -> bytes` for what is to be written. One message at a time ("classic") and several in one write ("pipelined") are the same
to it: requests are answered in the order in which they came. The batched and the shared-memory dialect are noticed as they are announced;
frames of several configurations are `PosBatch`, to be answered by `ForceBatch`.

This file applies the table in `states.py`; it does not know the layout of a message, nor time, nor sockets.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final, Literal

import numpy as np

from tumbaga.socket_protocol.batched import Batched
from tumbaga.socket_protocol.codec import HEADER, INIT_TEXT, SINGLE, Layout, Limits, check_length, decode, encode, header_of
from tumbaga.socket_protocol.errors import (
    AnswerAtomCountError,
    AtomCountError,
    ExtrasKeysError,
    InitError,
    LayoutError,
    NotOurTurnError,
    OutOfTurnError,
    ReadAheadError,
    RemoteProtocolError,
    SharedMemoryError,
)
from tumbaga.socket_protocol.events import Event, Exit, ForceBatch, ForceReady, GetForce, Init, PosBatch, PosData, Status
from tumbaga.socket_protocol.extras import check_extras
from tumbaga.socket_protocol.inbox import SPARE, Inbox
from tumbaga.socket_protocol.init_text import parse_init
from tumbaga.socket_protocol.shm import MARK, MARK_AT, Shared
from tumbaga.socket_protocol.states import ANSWER_IN, REQUEST_OF, START, TRANSITIONS, ResultReady, Role, Row, State, Word

__all__ = ["NEED_DATA", "PAUSED", "Connection", "Limits", "Role", "State", "Wait"]


class Wait(enum.Enum):
    """Why `Connection.next_event` has no event to give."""

    NEED_DATA = "need data"  # the next message is not whole yet
    PAUSED = "paused"  # DRIVER: we owe the peer something first, a force or an answer


NEED_DATA: Final[Literal[Wait.NEED_DATA]] = Wait.NEED_DATA
PAUSED: Final[Literal[Wait.PAUSED]] = Wait.PAUSED

DEFAULT_LIMITS: Final = Limits()

_HELD_FRAMES = 2  # the one being computed or waiting to be, and one behind it
_HELD_MESSAGES = 16  # of any kind; i-PI sends an extra STATUS now and then
_SLACK = 1 << 21  # what a stream may deliver in one turn, beyond whole messages
_POSDATA = header_of(PosData)
_FRAMES = (PosData, PosBatch)  # tuples: a union would be built anew at every test of a type
_RESULTS = (ForceReady, ForceBatch)
_ARRAYS = ("cell", "cells", "positions")
_NOTHING = np.zeros(0)


class Connection:
    """The protocol state of one session.

    As DRIVER, a session runs like this: `next_event` returns `Status`, write `answer_status()`; it returns `PosData`, the state is
    COMPUTING and it returns `PAUSED` from then on, whatever arrives; when the force is there call `complete()` and go on with
    `next_event`, which returns the requests held meanwhile; to `GetForce` write `send(ForceReady(...))`. What the peer must be told before
    it can be heard again is likewise `PAUSED`. EXIT and the end of the stream are returned as `Exit` at once, in any state, ahead of
    everything that is held: nobody is left to answer. (Only an EXIT behind an INIT that is held waits for it: what follows an INIT cannot be
    read before it is taken. The end of the stream, which follows an EXIT, does not wait.)

    As ENGINE: `send` the requests, several in one write if you like, and take the answers from `next_event`. A driver that knows neither
    its own state nor ours is led by STATUS, which must precede the first frame and every later one (it may stand behind GETFORCE in the
    same write). For the first frame ask with STATUS whether the driver has data, before GETFORCE: that proves the driver. Answers that
    came before the end of the stream are still returned before `Exit`.

    The number of atoms stays as it is until the peer sends another INIT (DRIVER) or the connection ends.

    Args:
        role: ours.
        limits: the most to accept.
        expected_atoms: the atom count to insist on; None takes that of the first frame, up to the limit.
        shared: as DRIVER, whether the peer may use shared memory (it must be on this machine: never allow it over tcp); the mode is then
            recognised by itself. As ENGINE, what the names of our segments begin with, `ipi_shm_` and something unique; empty for none.
    """

    def __init__(
        self,
        role: Role,
        limits: Limits = DEFAULT_LIMITS,
        expected_atoms: int | None = None,
        *,
        shared: bool | str = False,
    ) -> None:
        self._role = role
        self._driver = role is Role.DRIVER
        self._limits = limits
        self._expected_atoms = expected_atoms
        self._shared = shared
        self._layout: Layout = SINGLE  # of the messages that are cut next (DRIVER), or of the frames that are sent next (ENGINE)
        if role is Role.ENGINE and shared:
            self._layout = Shared(1, str(shared))
        self._answers: Layout = self._layout  # DRIVER: of the frame under way; INIT may have changed the other one since
        self._framed = False  # DRIVER: whether a frame was cut, so that the layout is settled
        self._table = TRANSITIONS[role]
        self._state: State
        self._row: Row
        self._enter(START[role])
        self._eof = False
        self._error: RemoteProtocolError | None = None
        self._inbox = Inbox()
        self._needed = HEADER  # bytes that must wait before the first message can be whole
        self._most = 0
        self._largest_message()
        self._held: deque[tuple[Event, Layout]] = deque()  # DRIVER: cut, not yet returned
        self._gone = False  # DRIVER: EXIT was cut, wherever it stood
        self._unanswered: deque[Word] = deque()  # DRIVER: what we owe, at most one; ENGINE: what we wait for
        self._frame: tuple[int, int] | None = None  # configurations (0 for a single one) and atoms of the frame under way
        self._atoms: int | None = expected_atoms  # what the next frame must have
        self._extras_keys: frozenset[str] | None = None

    def __repr__(self) -> str:
        owed = "+".join(word.word for word in self._unanswered)
        return (
            f"<Connection {self._role.name} {self._state.name} unanswered={owed or '-'} held={len(self._held)} "
            f"buffered={len(self._inbox)}{' eof' if self._eof else ''}>"
        )

    @property
    def role(self) -> Role:
        """Our role."""
        return self._role

    @property
    def state(self) -> State:
        """What the connection is doing now."""
        return self._state

    @property
    def eof(self) -> bool:
        """Whether the end of the stream was received."""
        return self._eof

    @property
    def closed(self) -> bool:
        """Whether the conversation is over, in peace or not."""
        return self._state in (State.CLOSED, State.ERROR)

    @property
    def unanswered(self) -> int:
        """How many requests have no answer yet: ours to give as DRIVER (0 or 1, held ones not counted), the peer's as ENGINE."""
        return len(self._unanswered)

    @property
    def wants_data(self) -> bool:
        """Whether reading on makes sense: false at the end, and while as much as may be read ahead is waiting.

        One unanswered request and one message behind it may wait. Until then read even while computing: an engine takes a socket that
        died with unread bytes for a broken one, and hangs.
        """
        return not self._eof and self._inbox.waiting < self._largest and not self.closed and (not self._held or self._has_room())

    @property
    def partial(self) -> int:
        """Bytes of a message that has begun and is not whole, 0 if none has: what a limit on the time to finish it is about."""
        return len(self._inbox) if not self.closed and len(self._inbox) < self._needed else 0

    @property
    def dialect(self) -> str:
        """For the log: `single`, `batched B` or `shared memory B`. Classic and pipelined are told apart by nothing but habit."""
        if isinstance(self._layout, Shared):
            return f"shared memory {self._layout.size}"
        return f"batched {self._layout.size}" if isinstance(self._layout, Batched) else "single"

    @property
    def memory(self) -> int:
        """Bytes of memory that received data takes now; never more than `memory_bound`."""
        held = sum(sum(getattr(event, name, _NOTHING).nbytes for name in _ARRAYS) for event, _ in self._held)
        texts = sum(len(event.text) for event, _ in self._held if isinstance(event, Init))
        return int(self._inbox.capacity + held + texts)

    @property
    def memory_bound(self) -> int:
        """The most that `memory` can be: what may wait in the buffer, frames that were read ahead, and texts of INIT."""
        # twice what may wait, since the buffer grows by doubling
        return (4 + _HELD_FRAMES) * self._most + _HELD_MESSAGES * self._limits.max_init + 2 * _SLACK + SPARE

    def expect(self, atoms: int | None) -> None:
        """Insist on another number of atoms from the next frame on: what INIT has announced. None takes that of the next frame."""
        self._expected_atoms = self._atoms = atoms
        self._largest_message()

    def close(self) -> None:
        """We end the conversation: let go of everything that is held for it. Can be called twice."""
        if not self.closed:
            self._enter(State.CLOSED)
        self._forget()

    # --- receiving ------------------------------------------------------------------------------------------------------------------

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take received bytes; `b""` is the end of the stream.

        Raises:
            ReadAheadError: far more than `wants_data` allows is waiting.
        """
        if self.closed:
            return
        if not len(data):
            self._eof = True
            return
        most = 2 * self._largest + _SLACK
        if len(self._inbox) + len(data) > most:
            raise self._fail(ReadAheadError(len(self._inbox) + len(data), most))
        self._inbox.feed(data)

    def space(self) -> memoryview:
        """Return memory for a socket to receive into; then say with `received` how much it was. Ask only while `wants_data` is true."""
        return self._inbox.space(self._needed)

    def received(self, count: int) -> None:
        """Take the first `count` bytes of the last `space`; 0 is the end of the stream."""
        if count:
            self._inbox.filled(count)
        elif not self.closed:
            self._eof = True

    def next_event(self) -> Event | Wait:
        """Return the next message, `NEED_DATA` if it is not whole yet, `PAUSED` if we owe the peer something first.

        After the end it returns `Exit` again and again.

        Raises:
            RemoteProtocolError: the peer broke the rules. Close the connection; it raises the same error from now on.
        """
        if self._error is not None:
            raise self._error
        if self._state is State.CLOSED:
            return Exit()
        return self._next_request() if self._driver else self._next_answer()

    def _next_request(self) -> Event | Wait:
        """DRIVER: look for the end everywhere first, then take one request if it is its turn."""
        while self._inbox.waiting >= self._needed and (not self._held or self._may_cut()):
            event = self._cut()
            if event is None:
                break
            if type(event) is Exit:
                self._gone = True
                break
            if not (self._held or self._unanswered or self._row.hold or self._inbox.waiting or self._eof):
                return self._take_request(event, self._layout)  # as usual nothing else is there that could go ahead of it
            self._held.append((event, self._layout))
        if self._gone or self._eof:
            return self._take(Exit())
        if self._row.hold or self._unanswered:
            return PAUSED
        if not self._held:
            return NEED_DATA
        return self._take_request(*self._held.popleft())

    def _take_request(self, event: Event, layout: Layout) -> Event:
        """DRIVER: take a request that was cut when `layout` was in force."""
        if type(event) in _FRAMES:
            self._answers = layout
        return self._take(event)

    def _next_answer(self) -> Event | Wait:
        """ENGINE: take one answer, to the oldest of our requests."""
        event = self._cut()
        if event is None:
            return self._take(Exit()) if self._eof else NEED_DATA
        if not self._unanswered or REQUEST_OF[type(event)] is not self._unanswered[0]:
            raise self._fail(self._out_of_turn(event))
        return self._take(event)

    def _cut(self) -> Event | None:
        """Cut the first whole message off the buffer."""
        if self._inbox.waiting < self._needed:
            return None
        view = self._inbox.view
        try:
            if self._driver and not self._framed and not self._settle(view):
                return None
            found = decode(self._role, view, self._limits, self._atoms if self._driver else self._asked_atoms(), self._layout)
            if type(found) is int:
                self._needed = found
                return None
            event, size = found  # type: ignore[misc]
            self._inbox.drop(size)
            self._needed = HEADER
            if type(event) is Init:
                self._announced(event)
        except RemoteProtocolError as error:
            raise self._fail(error) from None
        return event

    def _asked_atoms(self) -> int | None:
        """ENGINE: the atom count to insist on while cutting."""
        return self._frame[1] if self._frame else None

    def _settle(self, view: memoryview) -> bool:
        """DRIVER: find out from the first frame whether the engine uses shared memory; false if more of it is needed for that."""
        if bytes(view[:HEADER]) != _POSDATA:
            return True
        if len(view) < MARK_AT + len(MARK):
            self._needed = MARK_AT + len(MARK)
            return False
        if bytes(view[MARK_AT : MARK_AT + len(MARK)]) == MARK:
            if not self._shared:
                raise SharedMemoryError("the engine offers it over a connection where it cannot be used; use mode unix or inet there")
            self._layout = Shared(self._layout.size if isinstance(self._layout, Batched) else 1)
        self._framed = True
        self._largest_message()
        return True

    def _announced(self, init: Init) -> None:
        """Set the layout that INIT announces: it counts when it is cut or sent, not when it is its turn."""
        size = parse_init(init.text).batch_size
        check_length("batch_size of INIT", size, 1, self._limits.max_batch)
        if isinstance(self._layout, Shared):
            self._layout = self._layout.resized(size)
        else:
            self._layout = Batched(size) if size > 1 else SINGLE
        self._largest_message()

    def _largest_message(self) -> None:
        """Set the size of the largest message that may come now, and of the largest thing that was ever allowed."""
        atoms = self._expected_atoms or self._limits.max_atoms
        most = min(self._layout.largest(self._role, self._limits, atoms), self._limits.max_message)
        self._largest = max(most, INIT_TEXT + self._limits.max_init, MARK_AT + len(MARK))
        frame = self._layout.size * (atoms + 6) * 24 if isinstance(self._layout, Shared) else 0
        self._most = max(self._most, self._largest, min(frame, self._limits.max_message))

    def _take(self, event: Event) -> Event:
        """Make the step of the table that belongs to a received message."""
        kind = type(event)
        state = self._row.receive.get(kind)
        if state is None:
            raise self._fail(self._out_of_turn(event))
        if state is not self._state:
            self._enter(state)
        if kind is Status or kind is GetForce:
            self._unanswered.append(kind)
        elif isinstance(event, _FRAMES):
            self._begin(event)
        elif kind is Init:
            self._atoms = self._expected_atoms
        elif kind is Exit:
            self._forget()
        elif not self._driver:
            self._unanswered.popleft()
            if isinstance(event, _RESULTS):
                self._frame = None
        return event

    def _begin(self, event: PosData | PosBatch) -> None:
        """Note what the answer must look like."""
        self._frame = _measures(event)
        if self._driver:
            if self._atoms not in (None, self._frame[1]):
                raise self._fail(AtomCountError(self._atoms or 0, self._frame[1]))
            self._atoms = self._frame[1]

    def _has_room(self) -> bool:
        """Whether more may be cut ahead of its turn."""
        if not self._held:
            return True
        frames = 1 if self._state is State.COMPUTING else 0
        for event, _ in self._held:
            if type(event) in _FRAMES:
                frames += 1
        return frames < _HELD_FRAMES and len(self._held) < _HELD_MESSAGES

    def _may_cut(self) -> bool:
        """Whether the next message may be cut ahead of its turn: not behind an INIT, which may change what it must look like."""
        return type(self._held[-1][0]) is not Init and self._has_room()

    def _out_of_turn(self, event: Event) -> OutOfTurnError:
        allowed = (word.word for word in self._row.receive if word is not Exit)
        if self._role is Role.ENGINE:
            due = self._unanswered[0] if self._unanswered else None
            allowed = (word.word for word in self._row.receive if due and REQUEST_OF.get(word) is due)
        return OutOfTurnError(self._state.name, event.word, tuple(dict.fromkeys(allowed)))

    def _fail(self, error: RemoteProtocolError) -> RemoteProtocolError:
        """Enter ERROR for good and return the error to be raised."""
        self._enter(State.ERROR)
        self._error = error
        self._forget()
        return error

    def _enter(self, state: State) -> None:
        self._state = state
        self._row = self._table[state]

    def _forget(self) -> None:
        """Drop everything that waits: the conversation is over."""
        self._inbox.clear()
        self._held.clear()
        self._unanswered.clear()
        if isinstance(self._layout, Shared):
            self._layout.close()

    # --- sending --------------------------------------------------------------------------------------------------------------------

    def send(self, event: Event) -> bytes:
        """Return the bytes of `event`, to be written in **one** write, and make the step that belongs to it.

        Raises:
            LocalProtocolError: it is not the turn of this message, or it would break the peer (a wrong number of atoms, a number that is
                not finite, extras that are no JSON object or have other keys than before). Nothing changes then.
        """
        kind = type(event)
        state = self._row.send.get(kind)
        if state is None or not self._is_due(kind):
            unanswered = "+".join(word.word for word in self._unanswered)
            raise NotOurTurnError(f"sending {event.word}", self._state.name, unanswered)
        if isinstance(event, _RESULTS):
            keys = self._check_answer(event)
            data = self._answers.pack_forceready(event)
            self._extras_keys = keys
            self._unanswered.popleft()
            self._frame = None
        else:
            data = self._encoded(event)
            self._note_sent(event)
        self._enter(state)
        return data

    def answer_status(self) -> bytes:
        """DRIVER: return the 12 bytes that answer the STATUS returned last: NEEDINIT, READY or HAVEDATA, as the state has it.

        Raises:
            NotOurTurnError: no STATUS is waiting for an answer.
        """
        answer = ANSWER_IN.get(self._state)
        if answer is None or not self._unanswered or self._unanswered[0] is not Status:
            raise NotOurTurnError("answering STATUS", self._state.name)
        self._enter(self._row.send[type(answer)])
        self._unanswered.popleft()
        return encode(answer)

    def complete(self) -> None:
        """DRIVER: the force of the frame under way is there; COMPUTING becomes HAVEDATA and held requests get their turn.

        Raises:
            NotOurTurnError: no force is being computed, for example because the peer left meanwhile.
        """
        state = self._row.send.get(ResultReady)
        if state is None:
            raise NotOurTurnError("completing a force", self._state.name)
        self._enter(state)

    def _is_due(self, kind: type[Event]) -> bool:
        """Whether answers keep the order of the requests if such a message goes now."""
        request = REQUEST_OF.get(kind)
        if request is not None:
            return bool(self._unanswered) and self._unanswered[0] is request
        # as ENGINE: an answer under way would be about the time before this message
        return not (self._unanswered and kind in (Init, PosData, PosBatch))

    def _encoded(self, event: Event) -> bytes:
        """Return the bytes of a message that is no result, after refusing what is well formed and would still break the peer."""
        if isinstance(event, _FRAMES):
            atoms = _measures(event)[1]
            if self._expected_atoms not in (None, atoms):
                raise AnswerAtomCountError(self._expected_atoms or 0, atoms)
        if isinstance(event, Init) and (size := parse_init(event.text).batch_size) > self._limits.max_batch:
            raise InitError(f"announces batches of {size}, at most {self._limits.max_batch} are allowed (Limits.max_batch)")
        return encode(event, self._layout)

    def _check_answer(self, event: ForceReady | ForceBatch) -> frozenset[str]:
        """Return the keys of the extras of an answer that fits to its frame; they must be those of the first answer."""
        measures = size, atoms = _measures(event)
        if self._frame is not None and measures != self._frame:
            if size != self._frame[0]:
                raise LayoutError(event.word, f"{self._frame[0] or 'one'} configuration{'s' * (self._frame[0] > 1)}")
            raise AnswerAtomCountError(self._frame[1], atoms)
        first = self._extras_keys
        for extras in event.extras if isinstance(event, ForceBatch) else (event.extras,):
            keys = check_extras(extras)
            if first is None:
                first = keys
            elif keys != first:
                raise ExtrasKeysError(tuple(sorted(first)), tuple(sorted(keys)))
        return first or frozenset()

    def _note_sent(self, event: Event) -> None:
        """Make the step that belongs to a message that is no result."""
        kind = type(event)
        if kind is Status or kind is GetForce:
            self._unanswered.append(kind)
        elif isinstance(event, Init):
            self._announced(event)
        elif isinstance(event, _FRAMES):
            self._begin(event)
        elif kind is Exit:
            self._forget()
        elif kind in REQUEST_OF:
            self._unanswered.popleft()


def _measures(event: PosData | PosBatch | ForceReady | ForceBatch) -> tuple[int, int]:
    """Return configurations (0 for a single one) and atoms of a frame or a result."""
    rows = event.positions if isinstance(event, (PosData, PosBatch)) else event.forces
    return (0 if rows.ndim == 2 else len(rows)), rows.shape[-2]
