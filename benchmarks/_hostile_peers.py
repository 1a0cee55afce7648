"""What hostile peers of both roles have in common: a bare socket, a list of misdeeds, and a process that commits them on request.

As a program it is the hostile side of `hostile.py`, in a process of its own so that what it costs is not charged to those who are measured:

    python benchmarks/_hostile_peers.py engines|clients|good TCP-ADDRESS UNIX-ADDRESS

`good` is a client that keeps the rules. The others take a JSON object a line on standard input, `{"misdeed": NAME, "seconds": S}`, and answer each with one on standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

from tumbaga.socket_protocol.codec import encode
from tumbaga.socket_protocol.events import Event
from tumbaga.socket_protocol.streams import Address

PATIENCE = 30.0
"""Seconds that any single wait may take; longer than every limit that is drilled."""
GONE = (BrokenPipeError, ConnectionError)
_CLOSED = select.POLLRDHUP | select.POLLHUP | select.POLLERR  # Linux
_AT_ONCE = struct.pack("ii", 1, 0)


class Wire:
    """A socket that sends what it is told to and takes its time.

    Args:
        sock: connected.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.settimeout(PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def say(self, *messages: Event | bytes) -> None:
        """Send messages, or bytes that are none, in one write."""
        self._socket.sendall(b"".join(message if isinstance(message, bytes) else encode(message) for message in messages))

    def hear(self, count: int) -> bytes:
        """Return exactly so many bytes.

        Raises:
            ConnectionError: the other side closed before.
        """
        heard = b""
        while len(heard) < count:
            if not (piece := self._socket.recv(count - len(heard))):
                raise ConnectionError("closed by the other side")
            heard += piece
        return heard

    def greeting(self) -> bytes:
        """Return the first 12 bytes, and leave them to be heard; fewer if there are none."""
        with contextlib.suppress(*GONE):
            return self._socket.recv(12, socket.MSG_PEEK | socket.MSG_WAITALL)
        return b""

    def expect(self, word: str) -> None:
        """Take a message that is only a header.

        Raises:
            ConnectionError: it is another one, or the end.
        """
        if (heard := self.hear(12).decode().rstrip()) != word:
            raise ConnectionError(f"heard {heard} where {word} was expected")

    def flood(self, data: bytes) -> None:
        """Send the same again and again, read nothing, until the other side closes."""
        with contextlib.suppress(*GONE):
            while True:
                self._socket.sendall(data)

    def drip(self, data: bytes, seconds: float = 0.02) -> None:
        """Send one byte at a time until the other side closes."""
        with contextlib.suppress(*GONE):
            for place in range(len(data)):
                self._socket.sendall(data[place : place + 1])
                if self.closed(seconds):
                    return

    def leave(self, *, reset: bool = False) -> None:
        """Close; with `reset`, a tcp connection is torn down rather than ended."""
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self._socket.close()

    def closed(self, seconds: float = PATIENCE) -> bool:
        """Wait so long for the other side to close, without reading, and return whether it did (or whether we have)."""
        if self._socket.fileno() < 0:
            return True
        poller = select.poll()
        poller.register(self._socket.fileno(), _CLOSED)
        return bool(poller.poll(1000 * seconds))


@dataclass(frozen=True)
class Misdeed:
    """One way to misbehave.

    Attributes:
        name: for people.
        act: commits it on a new connection and returns when it is committed, or when the other side has closed.
        sentence: a regular expression for what the log says then: what was received, and what was expected.
        limit: the time limit that ends it, "" if it is ended at once.
        unix: whether it is committed over a unix socket; tcp otherwise.
        core: whether it is among the few that every run of the tests goes through.
    """

    name: str
    act: Callable[[Wire], None]
    sentence: str
    limit: str = ""
    unix: bool = False
    core: bool = False


@dataclass
class Deeds:
    """What came of committing a misdeed for a while.

    Attributes:
        times: how often.
        slowest: seconds from the first byte of a deed to the other side's closing, or to its next call where the deed was to close, at most.
        unended: how often the other side had not closed within `PATIENCE`.
        trouble: what went wrong otherwise, empty if nothing did.
    """

    times: int = 0
    slowest: float = 0.0
    unended: int = 0
    trouble: str = ""

    def commit(self, misdeed: Misdeed, wire: Wire) -> None:
        """Commit it once, and wait for the end."""
        began = time.monotonic()
        with wire:
            with contextlib.suppress(*GONE):
                misdeed.act(wire)
            self.unended += not wire.closed()
            self.times += 1
        self.ended(began)

    def ended(self, began: float) -> None:
        """Note when it was over."""
        self.slowest = max(self.slowest, time.monotonic() - began)


def connected(address: Address) -> Wire:
    """Connect, as a client does."""
    sock = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET)
    sock.settimeout(PATIENCE)
    sock.connect(address.path or (address.host, address.port))
    return Wire(sock)


def listening(address: Address) -> socket.socket:
    """Listen, as an engine does."""
    sock = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET)
    sock.settimeout(PATIENCE)
    if not address.path:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address.path or (address.host, address.port))
    sock.listen(8)
    return sock


@contextlib.contextmanager
def closing(sockets: list[socket.socket]) -> Iterator[None]:
    """Close listening sockets at the end and remove their files."""
    try:
        yield
    finally:
        for sock in sockets:
            name = sock.getsockname()
            sock.close()
            if isinstance(name, str):
                os.unlink(name)


def obey(commit: Callable[[str, float], Deeds]) -> None:
    """Take orders from standard input until it ends."""
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        try:
            done = commit(order["misdeed"], order["seconds"])
        except OSError as error:
            done = Deeds(trouble=f"{type(error).__name__}: {error}")
        print(json.dumps(vars(done)), flush=True)


def main() -> None:
    """Be the hostile side of a benchmark."""
    import _hostile_clients
    import _hostile_engines

    role, *addresses = sys.argv[1:]
    where = [Address.parse(text, "") for text in addresses]
    if role == "good":
        _hostile_clients.serve_well(where[0])
        return
    if role == "clients":
        obey(_hostile_clients.Crowd(*where).commit)
        return
    with _hostile_engines.Host(*where) as host:
        obey(host.commit)


if __name__ == "__main__":
    main()
