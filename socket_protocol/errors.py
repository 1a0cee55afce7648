"""Everything that can go wrong on the wire, sorted by blame, then by cause.

`LocalProtocolError` is our own bug: the caller asked for something the protocol or the invariants forbid, and nothing was written.
`RemoteProtocolError` is the peer's: end that connection with the sentence. `TransportError` is about addresses and sockets, not messages.
Constructors take facts and keep them in `args`, so that every error survives pickling; the class makes the sentence.
"""

from __future__ import annotations

import os


class ProtocolError(Exception):
    """Anything wrong with a message of the i-PI protocol."""


class LocalProtocolError(ProtocolError):
    """Our side tried to say something wrong; nothing was written and the connection is as it was before."""


class RemoteProtocolError(ProtocolError):
    """The peer said something wrong; the connection is in ERROR and stays there."""


class TransportError(Exception):
    """An address or a socket cannot be used."""


# --- ours ---------------------------------------------------------------------------------------------------------------------------


class NotOurTurnError(LocalProtocolError):
    """The state of the connection does not allow what the caller wants to do."""

    def __init__(self, doing: str, state: str, unanswered: str = "") -> None:
        super().__init__(doing, state, unanswered)
        self.doing, self.state, self.unanswered = doing, state, unanswered

    def __str__(self) -> str:
        owed = f" with {self.unanswered} unanswered" if self.unanswered else ""
        return f"{self.doing} is not allowed in state {self.state}{owed}; follow the table in states.py"


class EventShapeError(LocalProtocolError):
    """An array given to an event has the wrong shape or is no array of numbers."""

    def __init__(self, field: str, expected: str, received: str) -> None:
        super().__init__(field, expected, received)
        self.field, self.expected, self.received = field, expected, received

    def __str__(self) -> str:
        return f"{self.field} must be {self.expected}, got {self.received}"


class EventNotFiniteError(LocalProtocolError):
    """A number given to an event is NaN or infinite; nothing of the kind may leave on the wire."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field

    def __str__(self) -> str:
        return f"{self.field} holds a NaN or an infinite number, which must not travel; compute it again or close the session"


class AnswerAtomCountError(LocalProtocolError):
    """Our message is about another number of atoms than the connection is."""

    def __init__(self, expected: int, given: int) -> None:
        super().__init__(expected, given)
        self.expected, self.given = expected, given

    def __str__(self) -> str:
        return f"the message holds {self.given} atoms, this connection is about {self.expected}; a wrong count hangs the engine for ever"


class ExtrasError(LocalProtocolError):
    """The extras of our answer would break the engine that reads them."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"extras {self.problem}; send nothing or one JSON object without the key 'raw'"


class ExtrasKeysError(LocalProtocolError):
    """The extras of our answer have other keys than those of the first answer of the session."""

    def __init__(self, first: tuple[str, ...], now: tuple[str, ...]) -> None:
        super().__init__(first, now)
        self.first, self.now = first, now

    def __str__(self) -> str:
        return f"extras have the keys {list(self.now)}, the first answer had {list(self.first)}; keep the keys the same in every answer"


class LayoutError(LocalProtocolError):
    """Our message does not fit into the dialect of the connection."""

    def __init__(self, word: str, expected: str) -> None:
        super().__init__(word, expected)
        self.word, self.expected = word, expected

    def __str__(self) -> str:
        return f"{self.word} must hold {self.expected} in the dialect of this connection"


class InitError(LocalProtocolError):
    """An INIT of ours cannot be sent."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"INIT {self.problem}"


# --- the peer's ---------------------------------------------------------------------------------------------------------------------


class UnknownHeaderError(RemoteProtocolError):
    """The first 12 bytes of a message are no word that this role may receive."""

    def __init__(self, received: bytes, expected: tuple[str, ...]) -> None:
        super().__init__(received, expected)
        self.received, self.expected = received, expected

    def __str__(self) -> str:
        hint = "check that the peer speaks the i-PI protocol"
        if self.received[:1] in (b"\x01", b"\x02") and self.received[1:4] == b"\0\0\0":
            hint = "this looks like an MDI handshake: start the peer in its i-PI mode (MDI: -ipi)"
        elif self.received.rstrip() in (b"STATUS", b"INIT", b"POSDATA", b"GETFORCE", b"EXIT"):
            hint = "this is a word of an engine: two engines seem to be connected to one another"
        elif self.received.rstrip() in (b"NEEDINIT", b"READY", b"HAVEDATA", b"FORCEREADY"):
            hint = "this is a word of a driver: two drivers seem to be connected to one another"
        return f"received the header {self.received!r} where {', '.join(self.expected)} was expected; {hint}"


class MessageTooLargeError(RemoteProtocolError):
    """The peer announced more than this connection accepts; nothing was allocated for it."""

    def __init__(self, field: str, announced: int, limit: int) -> None:
        super().__init__(field, announced, limit)
        self.field, self.announced, self.limit = field, announced, limit

    def __str__(self) -> str:
        return f"the peer announced {self.announced} for the {self.field}, at most {self.limit} is accepted (a field of Limits)"


class BadLengthError(RemoteProtocolError):
    """The peer announced a negative length, or zero atoms."""

    def __init__(self, field: str, announced: int, least: int) -> None:
        super().__init__(field, announced, least)
        self.field, self.announced, self.least = field, announced, least

    def __str__(self) -> str:
        return f"the peer announced {self.announced} for the {self.field}, at least {self.least} was expected: the stream is out of step"


class AtomCountError(RemoteProtocolError):
    """The peer's atom count is not the one that this connection is about."""

    def __init__(self, expected: int, received: int) -> None:
        super().__init__(expected, received)
        self.expected, self.received = expected, received

    def __str__(self) -> str:
        return (
            f"the peer sent {self.received} atoms, {self.expected} were expected; give both sides the same structure "
            "(the number may change only with a new INIT or a new connection)"
        )


class NotFiniteError(RemoteProtocolError):
    """The peer sent a NaN or an infinite number."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field

    def __str__(self) -> str:
        return f"the peer sent {self.field} with a NaN or an infinite number, finite numbers were expected; its run has gone astray"


class OutOfTurnError(RemoteProtocolError):
    """The peer sent a good message at a time when the protocol has no place for it."""

    def __init__(self, state: str, message: str, expected: tuple[str, ...] = ()) -> None:
        super().__init__(state, message, expected)
        self.state, self.message, self.expected = state, message, expected

    def __str__(self) -> str:
        wanted = " or ".join(self.expected) if self.expected else "nothing"
        return f"received {self.message} in state {self.state}, where {wanted} was expected; the peer is out of step, start it again"


class SharedMemoryError(RemoteProtocolError):
    """The shared memory that the peer named cannot be used."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"shared memory: {self.problem}"


class ReadAheadError(RemoteProtocolError):
    """More bytes are waiting than any peer that waits for its answers can have sent."""

    def __init__(self, waiting: int, limit: int) -> None:
        super().__init__(waiting, limit)
        self.waiting, self.limit = waiting, limit

    def __str__(self) -> str:
        return f"{self.waiting} bytes are waiting, at most {self.limit} are kept; read only while Connection.wants_data is true"


# --- addresses and sockets ----------------------------------------------------------------------------------------------------------


class AddressError(TransportError, ValueError):
    """An address that cannot be meant."""

    def __init__(self, address: str, problem: str) -> None:
        super().__init__(address, problem)
        self.address, self.problem = address, problem

    def __str__(self) -> str:
        return f"address {self.address!r}: {self.problem}"


class AddressInUseError(TransportError):
    """Somebody else listens at the address."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"another program listens at {self.address}; stop it or choose another address"


class NotYetError(TransportError):
    """Nobody answers at the address yet; try again after a pause."""

    def __init__(self, address: str, errno: int) -> None:
        super().__init__(address, errno)
        self.address, self.errno = address, errno

    def __str__(self) -> str:
        return f"nobody answers at {self.address} yet ({os.strerror(self.errno)}); start the engine, or wait for it"


class DialError(TransportError):
    """The address cannot be reached, and waiting will not help."""

    def __init__(self, address: str, errno: int) -> None:
        super().__init__(address, errno)
        self.address, self.errno = address, errno

    def __str__(self) -> str:
        return f"cannot connect to {self.address}: {os.strerror(self.errno)}"


class TooManyFilesError(TransportError):
    """A peer cannot be taken: this process has as many files open as it may."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address

    def __str__(self) -> str:
        return f"no more peers can be taken at {self.address}: too many open files; raise the limit (ulimit -n) or allow fewer connections"
