"""Where a socket is: the path of a unix socket, or a host and a port. Nothing here is opened or looked up.

Source: unix(7) for the length of a path; i-PI and ASE for the prefix.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from tumbaga.socket_protocol.errors import AddressError

DEFAULT_PREFIX: Final = "/tmp/ipi_"
"""What i-PI and ASE put before the name of a unix socket."""

_MAX_PATH = 107  # bytes in sockaddr_un on Linux, less the closing NUL


@dataclass(frozen=True, slots=True)
class Address:
    """Where a socket is: a path, or a host and a port. Make it with `unix`, `tcp` or `parse`.

    Attributes:
        path: of the unix socket, prefix included; empty for tcp.
        host: name or number; empty for unix.
        port: 1 to 65535, or 0 to let `listen` choose one.
    """

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def unix(cls, name: str, prefix: str = DEFAULT_PREFIX) -> Address:
        """Return the address of a unix socket: `prefix + name`, or `name` itself if it is a path, that is, has a slash.

        Raises:
            AddressError: no name, or a path of more than 107 bytes.
        """
        shown = f"unix:{name}"
        if not name:
            raise AddressError(shown, "the name of the socket is missing; write unix:NAME, with the NAME given to the engine")
        path = name if "/" in name else prefix + name
        if "\0" in path:
            raise AddressError(shown, "a path cannot hold a NUL")
        length = len(os.fsencode(path))
        if length > _MAX_PATH:
            raise AddressError(shown, f"the path {path} has {length} bytes, the system allows {_MAX_PATH}; use a shorter name or prefix")
        return cls(path=path)

    @classmethod
    def tcp(cls, host: str, port: int) -> Address:
        """Return the address of a tcp socket. Port 0 is for `listen` only.

        Raises:
            AddressError: no host, or a port out of range.
        """
        shown = f"tcp:{host}:{port}"
        if not host:
            raise AddressError(shown, "the host is missing; write tcp:HOST:PORT, for this machine tcp:127.0.0.1:PORT")
        if not 0 <= port <= 65535:
            raise AddressError(shown, f"port {port} is out of range, 1 to 65535")
        return cls(host=host, port=port)

    @classmethod
    def parse(cls, text: str, prefix: str = DEFAULT_PREFIX) -> Address:
        """Return the address written as `unix:NAME`, `unix:/a/path`, `unix:./a/path`, `tcp:HOST:PORT` or `tcp:[::1]:PORT`.

        Raises:
            AddressError: `text` is none of these.

        >>> str(Address.parse("unix:cuau")), str(Address.parse("tcp:localhost:31415"))
        ('unix:/tmp/ipi_cuau', 'tcp:localhost:31415')
        """
        kind, _, rest = text.partition(":")
        if kind == "unix":
            return cls.unix(rest, prefix)
        if kind != "tcp":
            raise AddressError(text, "write unix:NAME, unix:/a/path or tcp:HOST:PORT")
        host, colon, port = rest.rpartition(":")
        if not colon or not (port.isascii() and port.isdecimal()) or not 1 <= int(port[:6]) <= 65535:
            raise AddressError(text, "the port is missing or out of range; write tcp:HOST:PORT with a port from 1 to 65535")
        return cls.tcp(host.removeprefix("[").removesuffix("]"), int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{os.path.abspath(self.path)}"
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
