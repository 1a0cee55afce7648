"""The least that a driver in Python can do: `python _floor_driver.py ADDRESS N` answers fused requests for N atoms without looking at them.

One buffer, one loop of recv_into, one sendall; no parser, no check, no state. It is what the wire can be measured against, and no driver:
a real engine would not understand it.
"""

from __future__ import annotations

import socket
import sys

from tumbaga.socket_protocol.streams import Address


def reached(address: Address) -> socket.socket:
    """A blocking socket to somebody who listens already."""
    sock = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET)
    sock.connect(address.path or (address.host, address.port))
    if not address.path:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def request_size(atoms: int) -> int:
    """POSDATA and GETFORCE in one write."""
    return 172 + 24 * atoms


def reply(atoms: int) -> bytes:
    """FORCEREADY with zeros and without extras."""
    return b"FORCEREADY  " + bytes(8) + atoms.to_bytes(4, "little") + bytes(24 * atoms + 72 + 4)


def serve(sock: socket.socket, atoms: int) -> None:
    """Answer until the peer leaves."""
    view, answer = memoryview(bytearray(request_size(atoms))), reply(atoms)
    while True:
        got = 0
        while got < len(view):
            count = sock.recv_into(view[got:])
            if not count:
                return
            got += count
        sock.sendall(answer)


if __name__ == "__main__":
    serve(reached(Address.parse(sys.argv[1])), int(sys.argv[2]))
