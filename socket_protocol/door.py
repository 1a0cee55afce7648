"""Where clients come in: listening sockets that let in so many at a time and so many a second, whoever knocks.

One more than allowed is told EXIT and closed at once: some drivers spin for ever at a connection that is merely closed. At most a few are
looked at in one turn, and after so many refusals in a second nobody is looked at for a moment: so a flood of connections costs the clients
at work a few per cent of their time, and no more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tumbaga.socket_protocol.addresses import Address
from tumbaga.socket_protocol.codec import encode
from tumbaga.socket_protocol.errors import AddressError, TooManyFilesError
from tumbaga.socket_protocol.events import Exit
from tumbaga.socket_protocol.streams import Listener, Stream, listen

_log = logging.getLogger(__name__)

_A_TURN = 4  # connections looked at before the clients at work have their turn again
_REST = 1.0  # seconds without accepting when the system has no descriptors left
_REFUSALS = 200  # in a second: telling them costs about a per cent of that
_BREATH = 0.1  # seconds without accepting once there were more
_SILENCE = 10.0  # seconds between two log lines about refusals


def listen_everywhere(addresses: Iterable[Address]) -> list[Listener]:
    """Listen at each address; `localhost` means 127.0.0.1 and ::1 both, since peers differ in where they look first.

    Raises:
        AddressInUseError: another program listens at one of them.
        AddressError: one of them cannot be listened at. In both cases none is left open.
    """
    made: list[Listener] = []
    try:
        for address in addresses:
            made.append(listen(address))
            if address.host == "localhost":
                made += _second_family(made[-1].address.port)
    except BaseException:
        for listener in made:
            listener.close()
        raise
    return made


def _second_family(port: int) -> list[Listener]:
    try:
        return [listen(Address.tcp("::1", port))]
    except AddressError as problem:  # no IPv6 here
        _log.info("localhost is only 127.0.0.1 here: %s", problem)
        return []


class Door:
    """Accepts, or refuses.

    Args:
        listeners: open; the door closes them.
        room: connections at a time.
        newcomers: new connections in a second, on average and at once.
        now: the time, seconds.
    """

    def __init__(self, listeners: list[Listener], room: int, newcomers: int, now: float) -> None:
        self.listeners = listeners
        self.refused = 0
        self._room, self._newcomers = room, newcomers
        self._allowance, self._since = float(newcomers), now
        self._refusals = float(_REFUSALS)  # that may be made now
        self._unsaid, self._said = 0, float("-inf")
        self._rests_until = float("-inf")

    def resting(self, now: float) -> bool:
        """Whether nothing is to be accepted for a moment, because the system has no descriptors left or too many knock."""
        return now < self._rests_until

    @property
    def rests_until(self) -> float:
        """When the last such moment ends, or ended."""
        return self._rests_until

    def enter(self, listener: Listener, inside: int, now: float) -> list[Stream]:
        """Return those who may come in, a few at most.

        Args:
            listener: that has somebody waiting.
            inside: connections that there are.
            now: the time, seconds.
        """
        passed = now - self._since
        self._allowance = min(self._allowance + passed * self._newcomers, float(self._newcomers))
        self._refusals = min(self._refusals + passed * _REFUSALS, float(_REFUSALS))
        self._since = now
        let_in: list[Stream] = []
        for _ in range(_A_TURN):
            try:
                stream = listener.accept()
            except (OSError, TooManyFilesError) as problem:
                _log.error("no client can come in at %s: %s", listener.address, problem)
                self._rests_until = now + _REST
                break
            if stream is None:
                break
            if inside + len(let_in) < self._room and self._allowance >= 1.0:
                self._allowance -= 1.0
                let_in.append(stream)
            else:
                self._refuse(stream, now)
        if self._refusals < 1.0:
            self._rests_until = max(self._rests_until, now + _BREATH)
        return let_in

    def close(self) -> None:
        """Close the listeners and remove their files. Can be called twice."""
        for listener in self.listeners:
            listener.close()

    def _refuse(self, stream: Stream, now: float) -> None:
        stream.send(encode(Exit()))
        stream.close()
        self.refused += 1
        self._refusals -= 1.0
        self._unsaid += 1
        if now - self._said >= _SILENCE:
            _log.warning(
                "refused %d clients, the last from %s: at most %d may be connected and %d come in a second",
                self._unsaid,
                stream.peer,
                self._room,
                self._newcomers,
            )
            self._unsaid, self._said = 0, now
