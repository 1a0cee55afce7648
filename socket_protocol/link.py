"""The line between gateway and evaluators: messages of the bus over unix sockets of our own, for the one path where a hop is felt.

zmq hands every message to a thread of its own on both sides; here the loop that waits for engines waits for evaluators too. A message is
the sizes of its parts and the parts: a msgpack header and the raw buffers that it describes. The first one of each connection is the name
of the evaluator; a new connection of the same name takes the place of the old one.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy.typing as npt

from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.inbox import Inbox

_COUNT = struct.Struct("=I")
_MOST_PARTS = 16
_MOST_UNSENT = 1 << 28
_READ = 1 << 20  # bytes read at once from an evaluator with a large answer
_GONE = (ConnectionError, TimeoutError)

Message = tuple[bus.AnyMessage, list[bytes]]


def pack(parts: Sequence[bytes]) -> list[bytes]:
    """Return what travels: the number of parts and their sizes, then the parts."""
    return [struct.pack(f"={len(parts) + 1}I", len(parts), *map(len, parts)), *parts]


def cut(inbox: Inbox) -> list[bytes] | int:
    """Take the first message off `inbox`; returns its parts, or the bytes that must wait there before it is whole.

    Raises:
        ValueError: that is no message.
    """
    view = inbox.view
    if len(view) < _COUNT.size:
        return _COUNT.size
    count = int(_COUNT.unpack_from(view)[0])
    if not 1 <= count <= _MOST_PARTS:
        raise ValueError(f"a message of {count} parts")
    start = _COUNT.size * (count + 1)
    if len(view) < start:
        return start
    sizes: tuple[int, ...] = struct.unpack_from(f"={count}I", view, _COUNT.size)
    end = start + sum(sizes)
    if end > bus.MAX_MESSAGE:
        raise ValueError(f"a message of {end} bytes")
    if len(view) < end:
        return end
    parts = []
    for size in sizes:
        parts.append(bytes(view[start : start + size]))
        start += size
    inbox.drop(end)
    return parts


class _Peer:
    """One connected evaluator."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket, self.name = sock, ""
        self.inbox, self.needed, self.out = Inbox(), _COUNT.size, bytearray()
        self.mask = selectors.EVENT_READ  # what the selector waits for

    def receive(self) -> bool:
        """Read what is there; false at the end of the stream."""
        try:
            count = self.socket.recv_into(self.inbox.space(max(self.needed, len(self.inbox) + 1))[:_READ])
        except BlockingIOError:
            return True
        except _GONE:
            return False
        self.inbox.filled(count)
        return bool(count)

    def messages(self) -> Iterator[list[bytes]]:
        """All whole messages that wait."""
        while len(self.inbox) >= self.needed:
            found = cut(self.inbox)
            if isinstance(found, int):
                self.needed = found
                return
            self.needed = _COUNT.size
            yield found

    def send(self, parts: list[bytes]) -> bool:
        """Write as much as the socket takes, and keep the rest; false if the peer is gone."""
        if not self.out:
            try:
                sent = self.socket.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            except _GONE:
                return False
            if sent < sum(map(len, parts)):
                self.out += memoryview(b"".join(parts))[sent:]
            return True
        self.out += b"".join(parts)
        return self.flush()

    def flush(self) -> bool:
        """Write what is pending; false if the peer is gone or reads nothing."""
        try:
            while self.out:
                del self.out[: self.socket.send(self.out)]
        except BlockingIOError:
            return len(self.out) <= _MOST_UNSENT
        except _GONE:
            return False
        return True


class Hub:
    """The gateway's end: takes evaluators as they come. It has a `fileno` for a selector; when that is readable, call `receive`.

    Args:
        name: of the socket in the bus folder of the working directory.
    """

    def __init__(self, name: str) -> None:
        self._path = f"{bus.FOLDER}/{name}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)  # of a gateway that was killed; the run directory is ours alone
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self._path)
        self._listener.listen()
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._peers: dict[str, _Peer] = {}
        self._left: set[str] = set()  # names that nobody has any more, and that were not told yet

    def fileno(self) -> int:
        """What to wait for, to be readable."""
        return self._selector.fileno()

    def receive(self) -> Iterator[tuple[str, bus.AnyMessage, list[bytes]]]:
        """Yield (sender, message, buffers) of everything that has come. What cannot be read ends the connection that it came from."""
        for key, mask in self._selector.select(0):
            if key.data is None:
                self._accept()
                continue
            peer: _Peer = key.data
            if peer.socket.fileno() < 0:
                continue  # its successor was among those before it
            if mask & selectors.EVENT_WRITE:
                self._keep(peer, peer.flush())
            if mask & selectors.EVENT_READ and peer.socket.fileno() >= 0:
                yield from self._from(peer)

    def _from(self, peer: _Peer) -> Iterator[tuple[str, bus.AnyMessage, list[bytes]]]:
        there = peer.receive()
        try:
            for parts in peer.messages():
                if peer.name:
                    yield (peer.name, *bus.decode(parts))
                else:
                    self._named(peer, parts[0].decode(errors="replace"))
        except (ValueError, msgspec.DecodeError):
            there = False
        self._keep(peer, there)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            peer = _Peer(self._listener.accept()[0])
            self._selector.register(peer.socket, selectors.EVENT_READ, peer)

    def _named(self, peer: _Peer, name: str) -> None:
        if (old := self._peers.get(name)) is not None:
            self._drop(old)
        peer.name = name
        self._peers[name] = peer
        self._left.discard(name)

    def _keep(self, peer: _Peer, good: bool) -> bool:
        if peer.socket.fileno() < 0:
            return False
        if not good:
            self._drop(peer)
            return False
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.out else 0)
        if peer.mask != mask:
            self._selector.modify(peer.socket, mask, peer)
            peer.mask = mask
        return True

    def _drop(self, peer: _Peer) -> None:
        if self._peers.get(peer.name) is peer:
            del self._peers[peer.name]
            self._left.add(peer.name)
        self._selector.unregister(peer.socket)
        peer.socket.close()

    def left(self) -> list[str]:
        """Return the names of evaluators that have hung up since the last call, and have no successor yet."""
        told = list(self._left)
        self._left.clear()
        return told

    def send(self, message: bus.AnyMessage, buffers: Sequence[npt.NDArray[Any]] = (), to: str = "") -> bool:
        """Send without waiting; return whether there is somebody of that name to take it."""
        peer = self._peers.get(to)
        return peer is not None and self._keep(peer, peer.send(pack(bus.encode(message, buffers))))

    def close(self) -> None:
        """Hang up and remove the socket."""
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._selector.close()
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


class Line:
    """An evaluator's end: one connection, made again when the gateway was started again. Sends wait until the gateway has read.

    Args:
        name: of the socket in the bus folder of the working directory.
        identity: under which the gateway knows this process.
    """

    def __init__(self, name: str, identity: str) -> None:
        self._path, self._identity = f"{bus.FOLDER}/{name}", identity
        self._socket: socket.socket | None = None
        self._inbox, self._needed = Inbox(), _COUNT.size

    def fileno(self) -> int:
        """What to wait for, to be readable; -1 while there is no gateway."""
        return -1 if self._socket is None else self._socket.fileno()

    def connect(self) -> bool:
        """Try to reach the gateway; return whether it is there."""
        if self._socket is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(self._path)
                sock.sendall(b"".join(pack([self._identity.encode()])))
            except OSError:
                sock.close()
                return False
            self._socket, self._inbox, self._needed = sock, Inbox(), _COUNT.size
        return True

    def send(self, message: bus.AnyMessage, buffers: Sequence[npt.NDArray[Any]] = ()) -> bool:
        """Send; return whether the gateway is there."""
        if self._socket is None:
            return False
        parts = pack(bus.encode(message, buffers))
        try:
            sent = self._socket.sendmsg(parts)
            if sent < sum(map(len, parts)):
                self._socket.sendall(memoryview(b"".join(parts))[sent:])
        except OSError:
            self.close()
            return False
        return True

    def receive(self) -> Iterator[Message]:
        """Wait until something has come, and yield (message, buffers) of what is whole; nothing if the gateway has left.

        Raises:
            msgspec.DecodeError: a header is none of ours.
        """
        if self._socket is None:
            return
        try:
            count = self._socket.recv_into(self._inbox.space(max(self._needed, len(self._inbox) + 1))[:_READ])
        except OSError:
            count = 0
        if not count:
            self.close()
            return
        self._inbox.filled(count)
        while len(self._inbox) >= self._needed:
            found = cut(self._inbox)
            if isinstance(found, int):
                self._needed = found
                return
            self._needed = _COUNT.size
            yield bus.decode(found)

    def close(self) -> None:
        """Hang up. Can be called twice."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
