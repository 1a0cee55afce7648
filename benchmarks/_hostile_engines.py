"""Engines that misbehave once a driver has dialled them, in every way that the protocol leaves room for."""

from __future__ import annotations

import contextlib
import os
import struct
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Self

import numpy as np
from _hostile_peers import Deeds, Misdeed, Wire, closing, listening

from tumbaga.socket_protocol.events import Exit, GetForce, Init, PosData, Ready, Status
from tumbaga.socket_protocol.shm import KINDS
from tumbaga.socket_protocol.streams import Address

ATOMS = 38
HUGE = 2**31 - 1  # the largest count there is: 2 GiB of bytes, 48 GiB of positions
BOHR = 1.8897261246
_CELL = np.zeros((3, 3))


def positions(seed: int = 0) -> np.ndarray:
    """A loose cluster, Bohr: a grid of 2.8 Å, shaken."""
    grid = np.stack(np.meshgrid(*[np.arange(4.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:ATOMS]
    return (2.8 * grid + np.random.default_rng(seed).normal(scale=0.05, size=grid.shape)) * BOHR


def posdata(count: int = ATOMS, numbers: np.ndarray | None = None, cell: float = 0.0) -> bytes:
    """A POSDATA that says what no event would: any count, any numbers."""
    rows = positions() if numbers is None else numbers
    return b"POSDATA".ljust(12) + np.full(18, cell).tobytes() + struct.pack("=i", count) + rows.tobytes()


def init(text: bytes, length: int | None = None) -> bytes:
    """An INIT whose length may be a lie."""
    return b"INIT".ljust(12) + struct.pack("=ii", 0, len(text) if length is None else length) + text


_FRAME = posdata()
_ASKED = _FRAME + b"GETFORCE".ljust(12)


def ready(wire: Wire, text: bytes = b" ") -> None:
    """Lead the driver to READY."""
    wire.say(Status())
    wire.expect("NEEDINIT")
    wire.say(Init(0, text), Status())
    wire.expect("READY")


def ask(wire: Wire) -> None:
    """Ask for one frame and take the answer, as a good engine does."""
    ready(wire)
    wire.say(PosData(_CELL, positions()), GetForce(), Status())
    wire.hear(12 + 8 + 4 + 24 * ATOMS + 72)
    wire.hear(struct.unpack("=i", wire.hear(4))[0])
    wire.expect("READY")


# --- misdeeds -----------------------------------------------------------------------------------------------------------------------


def _say(*messages: bytes) -> Callable[[Wire], None]:
    return lambda wire: wire.say(*messages)


def _ready_and(*messages: bytes) -> Callable[[Wire], None]:
    def act(wire: Wire) -> None:
        ready(wire)
        wire.say(*messages)

    return act


def _ready_and_flood(data: bytes) -> Callable[[Wire], None]:
    def act(wire: Wire) -> None:
        ready(wire)
        wire.flood(data)

    return act


def _read_nothing(wire: Wire) -> None:
    """So many answers that no unix socket holds them: 500 of more than 1 kB."""
    ready(wire)
    wire.say(*[_ASKED] * 500)


def _drip(wire: Wire) -> None:
    ready(wire)
    wire.drip(_FRAME)


def _spoilt(value: float) -> np.ndarray:
    rows = positions()
    rows[7, 1] = value
    return rows


def _leave(state: str, wire: Wire, *, reset: bool) -> None:
    """Close in the state of that name."""
    if state == "asked":
        wire.say(Status())
        wire.expect("NEEDINIT")
    elif state != "new":
        ready(wire)
    if state == "half a frame":
        wire.say(_FRAME[: len(_FRAME) // 2])
    elif state in ("computing", "unread"):
        wire.say(_ASKED * (20 if state == "unread" else 1))
    if state == "unread":
        wire.hear(12)  # the answer is there, and most of it stays unread
    wire.leave(reset=reset)


_LEFT = "it closed the connection"
_STATES = {
    "new": f"{_LEFT} where STATUS, INIT or POSDATA was expected",
    "asked": f"{_LEFT} where STATUS, INIT or POSDATA was expected",
    "ready": f"{_LEFT} where STATUS, INIT or POSDATA was expected",
    "half a frame": f"{_LEFT} after [0-9]+ bytes of a message, where the rest was expected",
    "computing": f"{_LEFT} while its forces were computed|{_LEFT} where STATUS",
    "unread": f"{_LEFT} ",
}


def _shared(deed: Callable[[list[str]], None], wire: Wire) -> None:
    """Name shared memory, in order, after something was done to it."""
    prefix = f"ipi_shm_hostile-{uuid.uuid4().hex[:12]}_"
    paths = [f"/dev/shm/{prefix}{kind}" for kind in KINDS]
    sizes = {"pos": 24 * ATOMS, "force": 24 * ATOMS, "pot": 8}
    names = b"".join(struct.pack("=i", len(prefix + kind)) + (prefix + kind).encode() for kind in KINDS)
    try:
        for path, kind in zip(paths, KINDS, strict=True):
            with open(path, "wb") as file:
                file.truncate(sizes.get(kind, 72))
        deed(paths)
        ready(wire)
        wire.say(b"POSDATA".ljust(12), struct.pack("=i", ATOMS), names, b"GETFORCE".ljust(12))
        wire.closed()
    finally:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _pipe(paths: list[str]) -> None:
    os.unlink(paths[0])
    os.mkfifo(paths[0])


_FINITE = "with a NaN or an infinite number, finite numbers were expected"
_REST = "and not the rest within [0-9.]+ s"
_WORDS = "where STATUS, GETFORCE, EXIT, INIT, POSDATA was expected"
_CHATTER = "messages, or [0-9]+ INITs, or fewer long ones, within 1 s and no frame among them, which was expected"
_BRACKETS = b"species:" + b"(H999999)0" * 6000  # each is a million atoms to make and to throw away
_LONG_INIT = init(b"," * 65000) + b"STATUS".ljust(12)

MISDEEDS = (
    Misdeed("NaN positions", _ready_and(posdata(numbers=_spoilt(np.nan))), f"positions {_FINITE}", core=True),
    Misdeed("infinite cell", _ready_and(posdata(cell=np.inf)), f"cell {_FINITE}"),
    Misdeed("another number of atoms", _ready_and(posdata(5, positions()[:5])), "sent 5 atoms, 38 were expected"),
    Misdeed("2 GiB atom count", _ready_and(posdata(HUGE)), f"announced {HUGE} for the number of atoms, at most", core=True),
    Misdeed("negative atom count", _ready_and(posdata(-1)), "announced -1 for the number of atoms, at least 1 was expected"),
    Misdeed("2 GiB of INIT text", _say(init(b"x", HUGE)), f"announced {HUGE} for the length of the INIT text, at most", core=True),
    Misdeed("negative INIT length", _say(init(b"x", -5)), "announced -5 for the length of the INIT text, at least 0 was expected"),
    Misdeed("batches of 2e9", _say(init(b"batch_size:2000000000")), "announced 2000000000 for the batch_size of INIT, at most", core=True),
    Misdeed("a formula of brackets", _say(init(_BRACKETS)), "has more than 100000 atoms"),
    Misdeed("other species", _say(init(b"species:H38")), "INIT lists|atom 0 is H in INIT"),
    Misdeed("a wrong header", _say(b"HELLO WORLD!"), f"received the header b'HELLO WORLD!' {_WORDS}", core=True),
    Misdeed("HTTP", _say(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), f"received the header b'GET / HTTP/1' {_WORDS}"),
    Misdeed("an MDI handshake", _say(struct.pack("=iii", 1, 4, 0)), f"received the header .* {_WORDS}; this looks like an MDI handshake"),
    Misdeed(
        "a driver's words", lambda wire: wire.say(Ready()), f"received the header b'READY       ' {_WORDS}; this is a word of a driver"
    ),
    Misdeed("GETFORCE without a frame", _ready_and(b"GETFORCE".ljust(12)), "received GETFORCE in state READY, where .* was expected"),
    Misdeed("atoms upon one another", _ready_and(posdata(numbers=np.zeros((ATOMS, 3)))), "cannot be evaluated: atoms .* apart, less than"),
    Misdeed("half a header, then nothing", _say(b"STAT"), f"sent 4 bytes of a message {_REST}", "message", core=True),
    Misdeed("half a message, then nothing", _ready_and(_FRAME[:500]), f"sent 500 bytes of a message {_REST}", "message", core=True),
    Misdeed("one byte at a time", _drip, f"sent [0-9]+ bytes of a message {_REST}", "message"),
    Misdeed("STATUS without end", _ready_and_flood(b"STATUS".ljust(12) * 100), _CHATTER),
    Misdeed("INIT without end", _ready_and_flood(init(b" ") * 100), _CHATTER),
    Misdeed("long INITs without end", _ready_and_flood(_LONG_INIT), _CHATTER),
    Misdeed("frames, and reads nothing", _read_nothing, "has not read [0-9]+ bytes of its answers within", "unread", unix=True, core=True),
    Misdeed("names memory that is not there", partial(_shared, lambda paths: os.unlink(paths[0])), "there is no segment", unix=True),
    Misdeed("names memory cut short", partial(_shared, lambda paths: os.truncate(paths[0], 16)), "has 16 bytes where", unix=True),
    Misdeed("names a pipe as memory", partial(_shared, _pipe), "there is no segment|bytes where", unix=True),
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
)
SILENCE = "says nothing"  # not ended: an engine that is busy elsewhere accepts late, and a silent one costs nothing


class Host:
    """Listens at two addresses that a driver dials again and again, and has whoever comes in misused.

    Between two misdeeds it asks for one frame and takes the answer, as a good engine does: so the address is not given up, and dialled again
    at once. Between two orders it keeps a connection on which nothing is said.

    Args:
        tcp: for most misdeeds.
        unix: for those with shared memory.
    """

    def __init__(self, tcp: Address, unix: Address) -> None:
        self._listeners = {False: listening(tcp), True: listening(unix)}
        self._idle: dict[bool, Wire] = {}
        self._closing = closing(list(self._listeners.values()))

    def __enter__(self) -> Self:
        self._closing.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for wire in self._idle.values():
            wire.leave()
        self._closing.__exit__(None, None, None)

    def _next(self, unix: bool) -> Wire:
        return Wire(self._listeners[unix].accept()[0])

    def rest(self) -> None:
        """Take one connection at each address, ask for one frame, and say nothing more."""
        for unix in self._listeners:
            if unix not in self._idle:
                self._idle[unix] = self._next(unix)
                ask(self._idle[unix])

    def commit(self, name: str, seconds: float) -> Deeds:
        """Commit a misdeed, once at least, for so long."""
        done, until = Deeds(), time.monotonic() + seconds
        if name == SILENCE:
            for wire in self._idle.values():
                wire.leave()
            self._idle = {unix: self._next(unix) for unix in self._listeners}
            time.sleep(seconds)
            done.times = 1
            for wire in self._idle.values():
                ask(wire)
            return done
        misdeed = next(one for one in MISDEEDS if one.name == name)
        if misdeed.unix in self._idle:
            self._idle.pop(misdeed.unix).leave()
        while not done.times or time.monotonic() < until:
            done.commit(misdeed, self._next(misdeed.unix))
            began = time.monotonic()
            with self._next(misdeed.unix) as good:
                done.ended(began)
                ask(good)
                good.say(Exit())
        self.rest()
        return done
