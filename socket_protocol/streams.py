"""Unix and tcp sockets that never block, for a loop around a selector. The only file here that knows `socket`.

A `Stream` moves bytes between a socket and a `Connection` and knows nothing of messages. `dial` and `listen` make streams. No function
here waits: what cannot be done now is told by `NotYetError`, `None` or `pending_out`, and the caller's selector and clock decide when to
try again. A peer that went away, whichever way, is one thing: the end of the stream.

Source: socket(7), tcp(7), unix(7), and what i-PI and ASE were seen to do.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Final, Self

from tumbaga.socket_protocol.addresses import DEFAULT_PREFIX, Address
from tumbaga.socket_protocol.connection import Connection
from tumbaga.socket_protocol.errors import AddressError, AddressInUseError, DialError, NotYetError, TooManyFilesError

_log = logging.getLogger(__name__)

__all__ = ["DEFAULT_PREFIX", "Address", "Backoff", "Dialling", "Listener", "Stream", "dial", "listen"]

_CHUNK = 1 << 16
_MAX_TURN = 1 << 20  # bytes read from one peer before the loop looks at the others
_MAX_UNSENT = 1 << 20  # bytes that may wait for a slow reader before its requests are no longer read
_NOT_YET = frozenset(
    (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET)
)
_GONE = (ConnectionError, TimeoutError)
_QUICKACK: Final[int | None] = getattr(socket, "TCP_QUICKACK", None)  # Linux only


@dataclass(frozen=True, slots=True)
class _Target:
    """One thing that `socket.socket` and `connect` or `bind` understand; a tcp name may have several."""

    family: int
    where: str | tuple[str | int | bytes, ...]


def _targets(address: Address) -> list[_Target]:
    if address.path:
        return [_Target(socket.AF_UNIX, address.path)]
    if address.host == "localhost":
        # i-PI and ASE listen in IPv4 only, and some resolvers know localhost in one family only
        return [_Target(socket.AF_INET, ("127.0.0.1", address.port)), _Target(socket.AF_INET6, ("::1", address.port))]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except socket.gaierror as problem:
        raise AddressError(str(address), f"the host is not known ({problem.strerror}); check its spelling, or give its number") from problem
    except UnicodeError as problem:
        raise AddressError(str(address), "this is no name of a host") from problem
    return [_Target(family, where) for family, _, _, _, where in found]


# --- streams ------------------------------------------------------------------------------------------------------------------------


class Stream:
    """A connected socket. Register it with a selector; it has a `fileno`.

    Args:
        sock: connected; the stream owns it from now on and makes it non-blocking.
        peer: who is at the other end, for the log.
    """

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._socket = sock
        self._peer = peer
        self._out = bytearray()
        self._sent = 0
        self._broken = False
        sock.setblocking(False)
        self._tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        if self._tcp:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._acknowledge_quickly()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "broken" if self._broken else "open"
        return f"<Stream {self._peer} {state} pending_out={len(self._out)}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the file descriptor, -1 once closed."""
        return self._socket.fileno()

    @property
    def peer(self) -> str:
        """Who is at the other end."""
        return self._peer

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._socket.fileno() < 0

    @property
    def pending_out(self) -> bool:
        """Whether bytes wait until the socket can be written to: call `flush` then."""
        return bool(self._out)

    @property
    def sent(self) -> int:
        """How many bytes have left for the peer: one that reads nothing soon stops that count."""
        return self._sent

    @property
    def unsent(self) -> int:
        """How many bytes wait until the peer reads."""
        return len(self._out)

    def interest(self, connection: Connection) -> int:
        """Return what to ask the selector for: EVENT_READ, EVENT_WRITE, both or 0 (then unregister; a selector takes no 0)."""
        mask = selectors.EVENT_WRITE if self._out else 0
        if (connection.wants_data and len(self._out) < _MAX_UNSENT) or (self._broken and not connection.eof):
            mask |= selectors.EVENT_READ
        return mask

    def receive(self, connection: Connection) -> int:
        """Read what is there into `connection`, at most about 1 MiB and not more than it wants, and return how many bytes that was.

        A peer that ended, reset or lost the connection is given on as the end of the stream.
        """
        total = 0
        while total < _MAX_TURN and connection.wants_data:
            space = connection.space()
            try:
                count = self._socket.recv_into(space)
            except BlockingIOError:
                break
            except _GONE:
                count = 0
            if self._tcp:  # the flag is not sticky, and a delayed ACK costs a peer with Nagle's algorithm 40 ms a message
                self._acknowledge_quickly()
            connection.received(count)
            total += count
            if count < len(space):
                break  # the socket was empty for a moment; the selector tells when there is more
        if self._broken and not total and not connection.eof:
            connection.received(0)
        return total

    def send(self, data: bytes) -> None:
        """Write `data` in one go; what the socket does not take now goes out with `flush`. To a peer that is gone: nothing.

        That the peer is gone is seen by the next `receive`, which the selector will ask for.
        """
        if self._out:
            self._out += data
            self.flush()
        elif (sent := self._write(data)) < len(data):
            self._out += memoryview(data)[sent:]

    def flush(self) -> None:
        """Write what is pending, as far as the socket takes it now."""
        while self._out:
            sent = self._write(self._out)
            del self._out[:sent]
            if not sent:
                return

    def close(self) -> None:
        """Say that nothing more will come, read away what is there, close. Can be called twice.

        A socket that is closed with unread bytes is reset, and the peer may lose our last answer, or, as i-PI does, hang.
        """
        if self.closed:
            return
        self.flush()
        self._out.clear()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            for _ in range(_MAX_TURN // _CHUNK):
                if not self._socket.recv(_CHUNK):
                    break
        self._socket.close()

    def _write(self, data: bytes | bytearray) -> int:
        """Return how much of `data` the socket, or the void behind a broken one, took."""
        if self._broken:
            return len(data)
        try:
            count = self._socket.send(data)
        except BlockingIOError:
            return 0
        except _GONE:
            self._broken = True
            return len(data)
        self._sent += count
        return count

    def _acknowledge_quickly(self) -> None:
        if _QUICKACK is not None:
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


# --- dialling -----------------------------------------------------------------------------------------------------------------------


class Dialling:
    """A tcp connection that is being made. Wait until `fileno` can be *written*, then call `finish`."""

    def __init__(self, address: Address, sock: socket.socket, others: Sequence[_Target]) -> None:
        self.address = address
        self._socket = sock
        self._others = others

    def __repr__(self) -> str:
        return f"<Dialling {self.address}>"

    def fileno(self) -> int:
        """Return the file descriptor to wait for."""
        return self._socket.fileno()

    def finish(self) -> Stream | Dialling:
        """Return the stream, or another `Dialling` (with another descriptor) if the next of several addresses is to be tried.

        Raises:
            NotYetError: nobody answers at any of the addresses.
            DialError: the addresses cannot be reached at all.
        """
        code = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.close()
            return _try(self.address, self._others, code)
        if (itself := _connected_to_itself(self._socket)) is not None:
            self.close()
            raise NotYetError(str(self.address), itself)
        return Stream(self._socket, str(self.address))

    def close(self) -> None:
        """Give up. Can be called twice."""
        self._socket.close()


def dial(address: Address) -> Stream | Dialling:
    """Connect without waiting: a `Stream` for unix, mostly a `Dialling` for tcp.

    A host name goes through the system's resolver, which can block; numbers and localhost do not.

    Raises:
        NotYetError: nobody listens yet, or the listener's queue is full; try again after a pause (`Backoff`).
        DialError: waiting will not help, for example without the permission to use the path.
        AddressError: the host is not known, or the port is 0.
    """
    if not address.path and not address.port:
        raise AddressError(str(address), "the port is missing; write tcp:HOST:PORT with a port from 1 to 65535")
    return _try(address, _targets(address), errno.ECONNREFUSED)


def _try(address: Address, targets: Sequence[_Target], code: int) -> Stream | Dialling:
    """Connect to the first target that does not fail at once; `code` is the error of the one before."""
    for index, target in enumerate(targets):
        try:
            sock = socket.socket(target.family, socket.SOCK_STREAM)
        except OSError as problem:  # a machine without IPv6
            code = code or problem.errno or errno.EAFNOSUPPORT
            continue
        sock.setblocking(False)
        code = sock.connect_ex(target.where)
        if code == errno.EINPROGRESS:
            return Dialling(address, sock, targets[index + 1 :])
        if not code and (itself := _connected_to_itself(sock)) is None:
            return Stream(sock, str(address))
        sock.close()
        code = code or itself or errno.ECONNREFUSED
    raise (NotYetError if code in _NOT_YET else DialError)(str(address), code)


def _connected_to_itself(sock: socket.socket) -> int | None:
    """Return an error code if a tcp socket got its own port as the peer: it happens on loopback when nobody listens on a high port."""
    if sock.family == socket.AF_UNIX:
        return None
    try:
        return errno.ECONNREFUSED if sock.getsockname() == sock.getpeername() else None
    except OSError as problem:
        return problem.errno or errno.ECONNREFUSED


class Backoff:
    """How long to wait before the next attempt: 20 ms at first, doubling to 2 s, each a quarter more or less by chance.

    Args:
        random: where chance comes from.
        first: seconds.
        most: seconds.

    >>> backoff = Backoff(Random(0), first=0.02, most=2.0)
    >>> [0.7 < backoff.next_delay() / expected < 1.3 for expected in (0.02, 0.04, 0.08)]
    [True, True, True]
    """

    def __init__(self, random: Random, first: float = 0.02, most: float = 2.0) -> None:
        self._random = random
        self._first = first
        self._most = most
        self._next = first

    def next_delay(self) -> float:
        """Return the seconds to wait now; the next wait will be twice as long."""
        delay = self._next
        self._next = min(2 * delay, self._most)
        return delay * self._random.uniform(0.75, 1.25)

    def reset(self) -> None:
        """Start again from the first delay: the last attempt went well."""
        self._next = self._first


# --- listening ----------------------------------------------------------------------------------------------------------------------


class Listener:
    """A listening socket. Register it for reading; `accept` what comes, `close` at the end."""

    def __init__(self, sock: socket.socket, address: Address) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.address = address
        self._file = os.stat(address.path) if address.path else None

    def __repr__(self) -> str:
        return f"<Listener {self.address} {'closed' if self.fileno() < 0 else 'open'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the file descriptor, -1 once closed."""
        return self._socket.fileno()

    def accept(self) -> Stream | None:
        """Return the next peer, or None if none is waiting or it left again.

        Raises:
            TooManyFilesError: this process may not have another descriptor; the peer waits on.
        """
        try:
            sock, where = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return None
        except OSError as problem:
            if problem.errno in (errno.EMFILE, errno.ENFILE):
                raise TooManyFilesError(str(self.address)) from problem
            raise
        return Stream(sock, str(self.address) if self.address.path else f"tcp:{where[0]}:{where[1]}")

    def close(self) -> None:
        """Close and remove the file of a unix socket, if it is still ours. Can be called twice."""
        self._socket.close()
        if self._file is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(self._file, os.stat(self.address.path)):
                os.unlink(self.address.path)
        self._file = None


def listen(address: Address, backlog: int = 128) -> Listener:
    """Listen at `address` and at no other: the protocol knows no password, so a tcp host that others can reach is warned about.

    `localhost` is `127.0.0.1`; listen at `::1` as well for peers that look there first. A file left behind by a listener that was
    killed is replaced. A unix socket is for the same user only.

    Raises:
        AddressInUseError: another program listens there.
        AddressError: the path is there and is no socket, its folder is missing, or the host is not one of this machine.
    """
    target = _targets(address)[0]
    if address.path:
        _remove_stale(address)
    try:
        sock = socket.socket(target.family, socket.SOCK_STREAM)
    except OSError as problem:
        raise AddressError(str(address), f"this machine does not speak its protocol ({problem.strerror})") from problem
    try:
        if target.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target.where)
        if address.path:
            os.chmod(address.path, stat.S_IRUSR | stat.S_IWUSR)
        sock.listen(backlog)
    except OSError as problem:
        sock.close()
        if problem.errno == errno.EADDRINUSE:
            raise AddressInUseError(str(address)) from problem
        raise AddressError(str(address), f"cannot listen there ({problem.strerror})") from problem
    if address.path:
        return Listener(sock, address)
    host, port = sock.getsockname()[:2]
    if not (host.startswith("127.") or host == "::1"):
        _log.warning("listening at %s, which other machines can reach; the i-PI protocol has no password", address)
    return Listener(sock, Address(host=host, port=port))


def _remove_stale(address: Address) -> None:
    """Remove the file of a unix socket that nobody listens at."""
    path = Path(address.path)
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AddressError(str(address), "a file that is no socket is in the way; remove it or choose another name")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full queue would block, and means that somebody is there
        code = probe.connect_ex(address.path)
    if code == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif code != errno.ENOENT:
        raise AddressInUseError(str(address))
