"""One conversation, in either role, without any I/O: bytes in, events out, events in, bytes out.

The pattern is that of all sans-I/O protocol codes: `receive_data(bytes)`, then `next_event()` until it returns `NEED_DATA` or `PAUSED`,
and `send(event) -> bytes` for what is to be written. Both dialects, one message at a time ("classic") and several in one write
("pipelined"), are the same to it: requests are answered in the order in which they came.

This file applies the table in `states.py`; it does not know the layout of a message, nor time, nor sockets.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final, Literal

from tumbaga.socket_protocol.codec import HEADER, Limits, decode, encode, largest_message
from tumbaga.socket_protocol.errors import (
    AnswerAtomCountError,
    BatchedDialectError,
    ExtrasKeysError,
    NotOurTurnError,
    OutOfTurnError,
    ReadAheadError,
    RemoteProtocolError,
)
from tumbaga.socket_protocol.events import Event, Exit, ForceReady, GetForce, Init, PosData, Status
from tumbaga.socket_protocol.extras import check_extras
from tumbaga.socket_protocol.init_text import parse_init
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


class Connection:
    """The protocol state of one session.

    As DRIVER, a session runs like this: `next_event` returns `Status`, write `answer_status()`; it returns `PosData`, the state is
    COMPUTING and it returns `PAUSED` from then on, whatever arrives; when the force is there call `complete()` and go on with
    `next_event`, which returns the requests held meanwhile; to `GetForce` write `send(ForceReady(...))`. What the peer must be told before
    it can be heard again is likewise `PAUSED`. EXIT and the end of the stream are returned as `Exit` at once, in any state, ahead of
    everything that is held: nobody is left to answer.

    As ENGINE: `send` the requests, several in one write if you like, and take the answers from `next_event`. A driver that knows neither
    its own state nor ours is led by STATUS, which must precede the first frame and every later one (it may stand behind GETFORCE in the
    same write). For the first frame ask with STATUS whether the driver has data, before GETFORCE: that proves the driver. Answers that
    came before the end of the stream are still returned before `Exit`.

    Args:
        role: ours.
        limits: the most to accept.
        expected_atoms: the atom count to insist on; None takes any up to the limit.
    """

    def __init__(self, role: Role, limits: Limits = DEFAULT_LIMITS, expected_atoms: int | None = None) -> None:
        self._role = role
        self._limits = limits
        self._expected_atoms = expected_atoms
        self._table = TRANSITIONS[role]
        self._state: State
        self._row: Row
        self._enter(START[role])
        self._eof = False
        self._error: RemoteProtocolError | None = None
        self._buffer = bytearray()
        self._largest = largest_message(role, limits, expected_atoms)
        self._held: deque[Event] = deque()  # DRIVER: cut, not yet returned
        self._gone = False  # DRIVER: EXIT was cut, wherever it stood
        self._unanswered: deque[Word] = deque()  # DRIVER: what we owe, at most one; ENGINE: what we wait for
        self._atoms: int | None = None  # in the frame under way
        self._extras_keys: frozenset[str] | None = None

    def __repr__(self) -> str:
        owed = "+".join(word.word for word in self._unanswered)
        return (
            f"<Connection {self._role.name} {self._state.name} unanswered={owed or '-'} held={len(self._held)} "
            f"buffered={len(self._buffer)}{' eof' if self._eof else ''}>"
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
        return not self._eof and not self.closed and self._has_room() and len(self._buffer) < self._largest

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
        self._buffer += data
        most = 2 * self._largest + _SLACK
        if len(self._buffer) > most:
            raise self._fail(ReadAheadError(len(self._buffer), most))

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
        return self._next_request() if self._role is Role.DRIVER else self._next_answer()

    def _next_request(self) -> Event | Wait:
        """DRIVER: look for the end everywhere first, then take one request if it is its turn."""
        while len(self._buffer) >= HEADER and self._has_room():
            event = self._cut()
            if event is None:
                break
            if isinstance(event, Exit):
                self._gone = True
                break
            self._held.append(event)
        if self._gone or self._eof:
            return self._take(Exit())
        if self._row.hold or self._unanswered:
            return PAUSED
        return self._take(self._held.popleft()) if self._held else NEED_DATA

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
        if len(self._buffer) < HEADER:
            return None
        atoms = self._expected_atoms if self._role is Role.DRIVER else self._atoms
        try:
            piece = decode(self._role, self._buffer, self._limits, atoms)
        except RemoteProtocolError as error:
            raise self._fail(error) from None
        if piece is None:
            return None
        del self._buffer[: piece.size]
        # the layout of what follows depends on INIT, so it counts when it is cut, not when it is its turn
        if isinstance(piece.event, Init) and (size := parse_init(piece.event.text).batch_size) > 1:
            raise self._fail(BatchedDialectError(size))
        return piece.event

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
        elif isinstance(event, PosData):
            self._atoms = len(event.positions)
        elif isinstance(event, Exit):
            self._forget()
        elif self._role is Role.ENGINE:
            self._unanswered.popleft()
            if isinstance(event, ForceReady):
                self._atoms = None
        return event

    def _has_room(self) -> bool:
        """Whether more may be cut ahead of its turn."""
        if not self._held:
            return True
        frames = (self._state is State.COMPUTING) + sum(isinstance(event, PosData) for event in self._held)
        return len(self._held) < _HELD_MESSAGES and frames < _HELD_FRAMES

    def _out_of_turn(self, event: Event) -> OutOfTurnError:
        allowed = (word.word for word in self._row.receive if word is not Exit)
        if self._role is Role.ENGINE:
            due = self._unanswered[0] if self._unanswered else None
            allowed = (word.word for word in self._row.receive if due and REQUEST_OF.get(word) is due)
        return OutOfTurnError(self._state.name, event.word, tuple(allowed))

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
        self._buffer.clear()
        self._held.clear()
        self._unanswered.clear()

    # --- sending --------------------------------------------------------------------------------------------------------------------

    def send(self, event: Event) -> bytes:
        """Return the bytes of `event`, to be written in **one** write, and make the step that belongs to it.

        Raises:
            LocalProtocolError: it is not the turn of this message, or it would break the peer (a wrong number of atoms, a number that is
                not finite, extras that are no JSON object or have other keys than before). Nothing changes then.
        """
        state = self._row.send.get(type(event))
        if state is None or not self._is_due(event):
            unanswered = "+".join(word.word for word in self._unanswered)
            raise NotOurTurnError(f"sending {event.word}", self._state.name, unanswered)
        data = encode(event)
        self._check(event)
        self._enter(state)
        self._note_sent(event)
        return data

    def answer_status(self) -> bytes:
        """DRIVER: return the 12 bytes that answer the STATUS returned last: NEEDINIT, READY or HAVEDATA, as the state has it.

        Raises:
            NotOurTurnError: no STATUS is waiting for an answer.
        """
        answer = ANSWER_IN.get(self._state)
        if answer is None:
            raise NotOurTurnError("answering STATUS", self._state.name)
        return self.send(answer)

    def complete(self) -> None:
        """DRIVER: the force of the frame under way is there; COMPUTING becomes HAVEDATA and held requests get their turn.

        Raises:
            NotOurTurnError: no force is being computed, for example because the peer left meanwhile.
        """
        state = self._row.send.get(ResultReady)
        if state is None:
            raise NotOurTurnError("completing a force", self._state.name)
        self._enter(state)

    def _is_due(self, event: Event) -> bool:
        """Whether answers keep the order of the requests if `event` goes now."""
        request = REQUEST_OF.get(type(event))
        if request is not None:
            return bool(self._unanswered) and self._unanswered[0] is request
        # as ENGINE: an answer under way would be about the time before this message
        return not (self._unanswered and isinstance(event, Init | PosData))

    def _check(self, event: Event) -> None:
        """Refuse what is well formed and would still break the peer."""
        if isinstance(event, ForceReady):
            if self._atoms is not None and len(event.forces) != self._atoms:
                raise AnswerAtomCountError(self._atoms, len(event.forces))
            keys = check_extras(event.extras)
            if self._extras_keys is None:
                self._extras_keys = keys
            elif keys != self._extras_keys:
                raise ExtrasKeysError(tuple(sorted(self._extras_keys)), tuple(sorted(keys)))
        elif isinstance(event, PosData) and self._expected_atoms is not None and len(event.positions) != self._expected_atoms:
            raise AnswerAtomCountError(self._expected_atoms, len(event.positions))

    def _note_sent(self, event: Event) -> None:
        kind = type(event)
        if kind is Status or kind is GetForce:
            self._unanswered.append(kind)
        elif isinstance(event, PosData):
            self._atoms = len(event.positions)
        elif kind is Exit:
            self._forget()
        elif kind in REQUEST_OF:
            self._unanswered.popleft()
            if isinstance(event, ForceReady):
                self._atoms = None
