"""Clients that misbehave once they have come in, in every way that the protocol leaves room for, and crowds of them."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from _hostile_peers import Deeds, Misdeed, Wire, connected

from tumbaga.socket_protocol.events import ForceReady, PosData
from tumbaga.socket_protocol.streams import Address
from tumbaga.socket_protocol.testing import BlockingDriver, connect

ATOMS = 37
"""Of the frames that are bait: the good client computes others, and gets none of these."""
LARGE = 20_000  # atoms of a frame that no unix socket holds
FLOOD = "a flood of connections"
HUGE = 2**31 - 1
_LEAST_FLOOD = 300  # connections: far more than the door lets in
_PAUSE_S = 0.06  # between two connections, so that the door lets them in


def forceready(count: int = ATOMS, rows: int = ATOMS, number: float = 0.0, extras: bytes = b"", length: int | None = None) -> bytes:
    """A FORCEREADY that says what no event would."""
    forces = np.full((rows, 3), number).tobytes()
    told = struct.pack("=i", len(extras) if length is None else length) + extras
    return b"FORCEREADY".ljust(12) + struct.pack("=di", -1.0, count) + forces + np.zeros(9).tobytes() + told


def ready(wire: Wire) -> None:
    """Say READY when asked."""
    wire.expect("STATUS")
    wire.say(b"READY".ljust(12))


def take(wire: Wire) -> None:
    """Be given a frame, and the question whether it is done."""
    ready(wire)
    wire.expect("POSDATA")
    wire.hear(144)
    wire.hear(24 * struct.unpack("=i", wire.hear(4))[0])
    wire.expect("STATUS")


def _answer(data: bytes, wire: Wire) -> None:
    take(wire)
    wire.say(b"HAVEDATA".ljust(12))
    wire.expect("GETFORCE")
    wire.say(data)


def _taken_and(data: bytes) -> Callable[[Wire], None]:
    def act(wire: Wire) -> None:
        take(wire)
        wire.say(data)

    return act


def _say(data: bytes) -> Callable[[Wire], None]:
    return lambda wire: wire.say(data)


def _drip(wire: Wire) -> None:
    take(wire)
    wire.say(b"HAVEDATA".ljust(12))
    wire.expect("GETFORCE")
    wire.drip(forceready())


def _need_init(wire: Wire) -> None:
    while True:
        wire.hear(1)
        wire.say(b"NEEDINIT".ljust(12))


def _leave(state: str, wire: Wire, *, reset: bool) -> None:
    if state == "ready":
        wire.expect("STATUS")
        wire.say(b"NEEDINIT".ljust(12))
        wire.expect("INIT")  # it has a job now
    elif state == "half a force":
        _answer(forceready()[:500], wire)
    elif state != "new":
        take(wire)
        if state == "asked":
            wire.say(b"HAVEDATA".ljust(12))
            wire.expect("GETFORCE")
    wire.leave(reset=reset)


_LEFT = "it closed the connection"
_STATES = {
    "new": f"{_LEFT} where READY or NEEDINIT was expected",
    "ready": f"{_LEFT} where READY or NEEDINIT was expected",
    "computing": f"{_LEFT} where HAVEDATA for {ATOMS} atoms was expected",
    "asked": f"{_LEFT} where FORCEREADY for {ATOMS} atoms was expected",
    "half a force": f"{_LEFT} after 500 bytes of a message where FORCEREADY for {ATOMS} atoms was expected",
}
_FINITE = "with a NaN or an infinite number, finite numbers were expected"
_REST = "bytes of a message, and the rest was expected within"
_WORDS = "where NEEDINIT, READY, HAVEDATA, FORCEREADY was expected"

MISDEEDS = (
    Misdeed("NaN forces", partial(_answer, forceready(number=np.nan)), _FINITE, core=True),
    Misdeed("infinite forces", partial(_answer, forceready(number=np.inf)), _FINITE),
    Misdeed("forces of other atoms", partial(_answer, forceready(5, 5)), f"sent 5 atoms, {ATOMS} were expected", core=True),
    Misdeed("2 GiB of forces", partial(_answer, forceready(HUGE)), f"announced {HUGE} for the number of atoms, at most"),
    Misdeed("extras of 2 GiB", partial(_answer, forceready(length=HUGE)), f"announced {HUGE} for the length of the extras", core=True),
    Misdeed("extras of -1 bytes", partial(_answer, forceready(length=-1)), "announced -1 for the length of the extras, at least 0 was"),
    Misdeed("half of FORCEREADY", partial(_answer, forceready()[:500]), f"it sent 500 {_REST}", "message", core=True),
    Misdeed("one byte at a time", _drip, f"it sent [0-9]+ {_REST}", "message"),
    Misdeed("says nothing", lambda wire: None, "it sent nothing where READY or NEEDINIT was expected within", "ready", core=True),
    Misdeed("takes a frame and is silent", take, f"it sent nothing where HAVEDATA for {ATOMS} atoms was expected within", "job"),
    Misdeed("a wrong header", _say(b"HELLO WORLD!"), f"received the header b'HELLO WORLD!' {_WORDS}", core=True),
    Misdeed("HTTP", _say(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), f"received the header b'GET / HTTP/1' {_WORDS}"),
    Misdeed("an MDI handshake", _say(struct.pack("=iii", 1, 4, 0)), f"received the header .* {_WORDS}; this looks like an MDI handshake"),
    Misdeed("an engine's words", _say(b"STATUS".ljust(12)), f"received the header b'STATUS      ' {_WORDS}; this is a word of an engine"),
    Misdeed("READY after a frame", _taken_and(b"READY".ljust(12)), "it sent READY where HAVEDATA .* was expected: it ignored the frame"),
    Misdeed("NEEDINIT without end", _need_init, "it sent NEEDINIT after INIT was sent 2 times, where READY was expected|received NEEDINIT"),
    Misdeed("READY without end", lambda wire: wire.flood(b"READY".ljust(12) * 100), "received READY in state .*, where .* was expected"),
    Misdeed("large frame, and reads nothing", ready, "it did not read what was sent to it within", "reading", unix=True),
    *(
        Misdeed(
            f"{'resets' if reset else 'closes'}: {state}",
            partial(_leave, state, reset=reset),
            sentence,
            core=state == "computing" and reset,
        )
        for state, sentence in _STATES.items()
        for reset in (False, True)
    ),
    Misdeed(FLOOD, lambda wire: None, "refused [0-9]+ clients, the last from .*: at most .* come in a second", core=True),
)


def well(frame: PosData) -> ForceReady:
    """What the client that keeps the rules computes."""
    return ForceReady(float(frame.positions.sum()), -frame.positions, np.eye(3), b"{}")


def serve_well(address: Address) -> None:
    """Be a client that keeps the rules, until told to leave."""
    BlockingDriver(connect(address), well).serve()


class Crowd:
    """Connects to a pool of clients again and again, and misbehaves.

    Args:
        tcp: where the pool listens.
        unix: where it listens as well, for misdeeds that need small buffers.
    """

    def __init__(self, tcp: Address, unix: Address) -> None:
        self._where = {False: tcp, True: unix}

    def commit(self, name: str, seconds: float) -> Deeds:
        """Commit a misdeed, once at least, for so long."""
        done, until = Deeds(), time.monotonic() + seconds
        misdeed = next(one for one in MISDEEDS if one.name == name)
        least = _LEAST_FLOOD if name == FLOOD else 1
        while done.times < least or time.monotonic() < until:
            if name == FLOOD:
                done.times += self._knock()
                continue
            done.commit(misdeed, self._let_in(misdeed.unix))
            time.sleep(_PAUSE_S)
        return done

    def _let_in(self, unix: bool) -> Wire:
        """Connect until the door lets us in: after a flood it takes a moment."""
        while True:
            wire = connected(self._where[unix])
            if wire.greeting() == b"STATUS".ljust(12):
                return wire
            wire.leave()
            time.sleep(_PAUSE_S)

    def _knock(self) -> bool:
        """Connect and be gone, without waiting for anything."""
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.settimeout(0.05)
            sock.connect((self._where[False].host, self._where[False].port))
            return True
        return False
