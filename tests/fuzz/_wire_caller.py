"""The caller of a `Connection` in `fuzz_wire.py`: answers in time or late, tries what is not allowed, and checks the invariant all the time."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from _wire_inputs import EXTRAS, LIMITS, MOST, PREFIX, TEXTS, Case, answer, frame, spoil, talk

from tumbaga.socket_protocol.connection import NEED_DATA, PAUSED, Connection, Role, State
from tumbaga.socket_protocol.errors import ExtrasError, LocalProtocolError, RemoteProtocolError, SharedMemoryError
from tumbaga.socket_protocol.events import (
    Event,
    Exit,
    ForceReady,
    GetForce,
    HaveData,
    Init,
    NeedInit,
    PosBatch,
    PosData,
    Ready,
    Status,
)
from tumbaga.socket_protocol.extras import check_extras
from tumbaga.socket_protocol.init_text import InitInfo, parse_init

SHM: Final = Path("/dev/shm")


class BrokenError(Exception):
    """The invariant does not hold."""


def check(holds: object, sentence: str) -> None:
    """Raise BrokenError unless it holds."""
    if not holds:
        raise BrokenError(sentence)


class Dice:
    """A generator that is cheap to start: its whole state is the number in the case."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def __call__(self, sides: int) -> int:
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        return (self._state >> 33) % sides


def _spoilt() -> tuple[Event, ...]:
    broken = ForceReady(0.0, np.zeros((2, 3)), np.eye(3))
    broken.forces[0, 0] = np.nan
    return (broken, *(answer(size, 2, extras) for size in (0, 2) for extras in (*EXTRAS[5:13], *EXTRAS[14:21])), answer(0, 9), answer(3, 9))


NEVER_GOOD: Final = (Exit(), PosData(np.eye(3), np.ones((9, 3))), *_spoilt())
"""What no DRIVER may say at any time."""
SAYINGS: Final = (
    *(Status(), Init(0, b""), Init(0, b"batch_size:3"), Init(0, b"batch_size:2000"), GetForce(), NeedInit(), Ready(), HaveData()),
    *(frame(0, 1), frame(0, 4), frame(0, 9), frame(2, 2), frame(3, 1), answer(0, 2)),
)


class Caller:
    """Plays one case against a fresh connection, and checks the invariant all the time."""

    def __init__(self, case: Case, prefix: str, told: Counter[str]) -> None:
        self.case, self.prefix, self.told = case, prefix, told
        self.dice = Dice(case["caller"])
        self.driver = case["role"] == "driver"
        shared: bool | str = case["dialect"] == "shared"
        if shared and not self.driver:
            shared = f"{prefix}{self.dice(1 << 30):x}_"
        expected = case["expected"] if self.driver else None
        self.connection = Connection(Role(case["role"]), LIMITS[case["limits"]], expected, shared=shared)
        self.todo: Callable[[], object] | None = None  # DRIVER: what we owe
        self.measures = (0, 0)
        self.strayed = False  # ENGINE: whether we said something that the script did not have
        self.heard = 0

    def play(self) -> None:
        """Feed all, then the end of the stream."""
        try:
            if not self.driver:
                self.say(Status())
            self.feed_all()
            if self.case["kind"] == "valid":
                self.hear(final=True)
                check(
                    self.heard == len(talk(*(self.case[key] for key in ("role", "dialect", "size", "atoms", "classic")))),
                    "a message is lost",
                )
            self.connection.receive_data(b"")
            self.hear(final=True)
            check(self.connection.next_event() == Exit() and self.connection.state is State.CLOSED, "the end is not the end")
        except RemoteProtocolError as error:
            self.told[type(error).__name__] += 1
            self.check_error(error)
        finally:
            self.connection.close()

    def feed_all(self) -> None:
        data = self.case["data"].replace(PREFIX.encode(), self.prefix.encode())
        chunks = deque(self.case["chunks"])
        place, reckless = 0, self.case["kind"] == "flood" and self.dice(2)
        while place < len(data) and not self.connection.closed:
            if not self.connection.wants_data and not reckless:
                before = self.told.total()
                self.hear(final=True)
                check(
                    self.connection.wants_data or self.connection.closed or self.told.total() > before, "no data wanted and nothing to do"
                )
                continue
            self.give(piece := data[place : place + (chunks.popleft() if len(chunks) > 1 else chunks[0])])
            place += len(piece)
            self.hear()
            self.check_memory()

    def give(self, piece: bytes) -> None:
        """Hand over received bytes in one of the two ways."""
        space = self.connection.space() if self.dice(2) and len(piece) < 4096 else memoryview(b"")
        if len(space) >= len(piece):
            space[: len(piece)] = piece
            self.connection.received(len(piece))
        else:
            self.connection.receive_data(piece)

    def hear(self, *, final: bool = False) -> None:
        """Take events until there are none; do what they ask for, sometimes later."""
        connection = self.connection
        while True:
            event = connection.next_event()
            if event is PAUSED:
                if self.todo is None:
                    raise BrokenError(f"PAUSED, and nothing is owed: {connection!r}")
                if not final and not self.dice(4):
                    return
                self.work()
            elif event is NEED_DATA:
                if self.todo is not None or not connection.wants_data:
                    raise BrokenError(f"NEED_DATA, and no data is wanted, or something is owed: {connection!r}")
                return
            elif isinstance(event, Exit):
                check(connection.closed, "EXIT, and not closed")
                return
            else:
                self.heard += 1
                self.told[event.word] += 1
                (self.note_request if self.driver else self.note_answer)(event)

    def check_memory(self) -> None:
        if self.connection.memory > self.connection.memory_bound:
            raise BrokenError(f"{self.connection.memory} bytes of memory, bound {self.connection.memory_bound}")

    def check_error(self, error: RemoteProtocolError) -> None:
        """A broken connection stays broken, holds nothing, and says why."""
        connection = self.connection
        check(self.case["kind"] != "valid", f"a good conversation is refused: {error}")
        check(connection.state is State.ERROR and not connection.wants_data and not connection.partial, "not in ERROR")
        check(connection.memory == 0 and len(str(error)) > 20, "an ended connection holds memory, or does not say why it ended")
        connection.receive_data(b"STATUS      ")
        try:
            connection.next_event()
        except RemoteProtocolError as again:
            check(again is error, "another error the second time")
        else:
            raise BrokenError("no error the second time")

    # DRIVER

    def note_request(self, event: Event) -> None:
        if isinstance(event, Status):
            self.todo = self.connection.answer_status
        elif isinstance(event, PosData | PosBatch):
            self.measures = (0, len(event.positions)) if isinstance(event, PosData) else (len(event), event.atoms)
            self.todo = self.connection.complete
        elif isinstance(event, Init) and not self.dice(3):
            self.connection.expect(self.case["atoms"] if self.case["kind"] == "valid" else (None, 1, 4, 100)[self.dice(4)])
        elif isinstance(event, GetForce):
            self.todo = partial(self.say, answer(*self.measures))

    def work(self) -> None:
        """Do what we owe; sometimes try something wrong first."""
        if not self.dice(8):
            self.blunder(NEVER_GOOD[self.dice(len(NEVER_GOOD))])
        if not self.dice(200) and self.case["dialect"] == "shared":
            os.truncate(SHM / f"{self.prefix}cut_pos", 8 * self.dice(40))
        if self.todo is not None:
            todo, self.todo = self.todo, None
            todo()

    # ENGINE

    def note_answer(self, event: Event) -> None:
        """Go on as an engine does; STATUS whenever nothing else is under way."""
        case, connection = self.case, self.connection
        if not self.dice(12):
            self.blunder(SAYINGS[self.dice(len(SAYINGS))] if case["kind"] != "valid" else Ready())
        if isinstance(event, NeedInit) and connection.state is State.NEEDINIT:
            self.say(Init(1, b" batch_size:%d" % case["size"] if case["dialect"] != "single" and case["size"] > 1 else b" "))
            self.say(Status())
        elif connection.state is State.READY and not connection.unanswered:
            if self.say(frame(0 if case["dialect"] == "single" else case["size"], case["atoms"])):
                if not case["classic"]:
                    self.say(GetForce())
                self.say(Status())
        elif isinstance(event, HaveData) and connection.state is State.HAVEDATA:
            self.say(GetForce())
        if not connection.unanswered and not connection.closed:
            self.say(Status())

    # both

    def say(self, event: Event) -> bool:
        """Send what is right: it must not be refused. Return whether it was sent, which an ENGINE that strayed cannot know before."""
        try:
            self.connection.send(event)
        except LocalProtocolError as error:
            out_of_script = self.strayed or self.case["limits"] != "small" or self.case["kind"] != "valid"
            if self.driver or not out_of_script:
                raise BrokenError(f"{event.word} is right and was refused: {error}") from error
            return False
        except SharedMemoryError:
            raise
        except RemoteProtocolError as error:
            raise BrokenError(f"sending {event.word} put the blame on the peer: {error!r}") from error
        return True

    def blunder(self, event: Event) -> None:
        """Try what is mostly not allowed: it changes nothing, or it was allowed."""
        before = (self.connection.state, self.connection.unanswered, self.connection.dialect)
        try:
            self.connection.send(event)
        except LocalProtocolError:
            if before != (self.connection.state, self.connection.unanswered, self.connection.dialect):
                raise BrokenError(f"{event.word} was refused, and yet something has changed") from None
        except RemoteProtocolError as error:
            raise BrokenError(f"sending {event.word} put the blame on the peer: {error!r}") from error
        else:
            check(not self.driver, "a driver may say that")
            self.strayed = True


# --- texts ---


def try_texts(rng: random.Random) -> bytes:
    """Try one text with `parse_init` and with `check_extras`; return it."""
    text = rng.choice(TEXTS + EXTRAS)
    for _ in range(rng.randrange(3)):
        text = spoil(rng, text)
    with naming(text):
        info = parse_init(text)
        check(isinstance(info, InitInfo) and 1 <= info.batch_size <= MOST, "parse_init gave nonsense")
        try:
            keys = check_extras(text)
        except ExtrasError:
            return text
        if not text.strip(b" \t\r\n"):
            check(not keys, "blank extras with keys")
            return text
        described = json.loads(text.decode("utf-8"))
        check(isinstance(described, dict) and set(described) == keys and "raw" not in keys, "extras are read otherwise")
    return text


@contextlib.contextmanager
def naming(text: bytes) -> Iterator[None]:
    """Add the text to whatever goes wrong with it."""
    try:
        yield
    except Exception as error:
        raise BrokenError(f"{error!r} for the text {text!r}") from error
