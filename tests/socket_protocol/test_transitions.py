"""The whole product of role, state and message: what `TRANSITIONS` has leads where it says, and all the rest is refused as it should be.

Every message is fed whole, byte by byte, and with a following message in the same packet; in the single, the batched and the shared-memory
dialect. What is sent is tried with each request that may be due, and with none.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.socket_protocol import errors
from tumbaga.socket_protocol.batched import Batched
from tumbaga.socket_protocol.codec import SINGLE, Layout, encode
from tumbaga.socket_protocol.connection import NEED_DATA, PAUSED, Connection, Role, State
from tumbaga.socket_protocol.events import (
    Event,
    Exit,
    ForceBatch,
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
from tumbaga.socket_protocol.shm import Shared
from tumbaga.socket_protocol.states import ANSWER_IN, REQUEST_OF, TRANSITIONS, Word
from tumbaga.socket_protocol.testing import events_of

DIALECTS = ("single", "batched", "shared")
SIZE, ATOMS = 2, 3
WORDS: tuple[type[Event], ...] = (Status, Init, PosData, GetForce, Exit, NeedInit, Ready, HaveData, ForceReady)
REQUESTS, ANSWERS = WORDS[:5], (*WORDS[5:], Exit)
SINGLE_FRAME = PosData(9 * np.eye(3), np.ones((ATOMS, 3)))
SINGLE_RESULT = ForceReady(-1.0, np.ones((ATOMS, 3)), np.eye(3))
names = itertools.count()


def named(value: object) -> str:
    return getattr(value, "word", None) or getattr(value, "name", None) or str(value)


def product(role: Role, words: tuple[type[Event], ...]) -> pytest.MarkDecorator:
    rows = itertools.product(DIALECTS, TRANSITIONS[role], words)
    return pytest.mark.parametrize(("dialect", "state", "word"), list(rows), ids=named)


class Bench:
    """Makes messages of one dialect and connections in a given state, and clears up after them."""

    def __init__(self, dialect: str) -> None:
        self.dialect = dialect
        self.prefix = f"ipi_shm_bench{os.getpid()}_{next(names)}_"
        self.layout: Layout = SINGLE
        self.size = 0
        self.left = contextlib.ExitStack()

    def begin(self, size: int) -> None:
        """From now on messages are of this size, as if INIT had said so."""
        self.size = size
        if self.dialect == "shared":
            if isinstance(self.layout, Shared):
                self.layout.close()
            self.layout = Shared(size, f"{self.prefix}{next(names)}_")
            self.left.callback(self.layout.close)
        elif self.dialect == "batched" and size > 1:
            self.layout = Batched(size)
        else:
            self.layout, self.size = SINGLE, 0

    def event(self, word: Word) -> Event:
        """Return a message as it is in this dialect now."""
        made = {Init: self.init(), PosData: SINGLE_FRAME, ForceReady: SINGLE_RESULT}
        if self.size > 1:
            made[PosData] = PosBatch.of([SINGLE_FRAME], self.size)
            made[ForceReady] = ForceBatch.of([SINGLE_RESULT], self.size)
        return made[word] if word in made else word()  # type: ignore[return-value, call-arg]

    def init(self) -> Init:
        return Init(0, b" batch_size:%d" % SIZE if self.dialect != "single" else b" ")

    def wire(self, word: type[Event]) -> bytes:
        """Return the bytes of a message of the peer, whether it is its turn or not."""
        if word is ForceReady and self.dialect == "shared":
            return b"FORCEREADY  " + bytes(4 * self.size)  # extras of length 0; the numbers are in the memory
        return encode(self.event(word), self.layout)

    def kind(self, word: type[Event]) -> type[Event]:
        return type(self.event(word))

    def driver(self, state: State) -> Connection:
        """Return a DRIVER in `state` that owes nothing."""
        driver = Connection(Role.DRIVER, shared=self.dialect == "shared")
        self.left.callback(driver.close)
        self.begin(1)
        if state is not State.NEEDINIT:
            events_of(driver, self.wire(Init))
            self.begin(SIZE)
        if state in (State.COMPUTING, State.HAVEDATA):
            events_of(driver, self.wire(PosData))
        if state is State.HAVEDATA:
            driver.complete()
        self.end(driver, state)
        assert driver.state is state
        return driver

    def engine(self, state: State, *, status_first: bool = False) -> Connection:
        """Return an ENGINE in `state` that waits for nothing, or only for GETFORCE; `status_first`: and before it for STATUS."""
        engine = Connection(Role.ENGINE, shared=f"{self.prefix}e{next(names)}_" if self.dialect == "shared" else False)
        self.left.callback(engine.close)
        self.begin(1)
        self.lead(engine, NeedInit)
        engine.send(self.init())
        self.begin(SIZE)
        self.lead(engine, Ready)
        self.ask(engine)
        events_of(engine, self.wire(ForceReady))  # the state is UNKNOWN again, the dialect is settled
        if state in (State.NEEDINIT, State.INIT_SENT):
            self.lead(engine, NeedInit)
        if state is State.INIT_SENT:
            engine.send(self.init())
        if state in (State.READY, State.COMPUTING, State.HAVEDATA, State.ASKED):
            self.lead(engine, Ready)
        if state in (State.COMPUTING, State.HAVEDATA, State.ASKED):
            engine.send(self.event(PosData))
        if state is State.HAVEDATA:
            self.lead(engine, HaveData)
        if state is State.ASKED:
            if status_first:
                engine.send(Status())
            engine.send(GetForce())
        self.end(engine, state)
        assert engine.state is state
        return engine

    def lead(self, engine: Connection, answer: type[Event]) -> None:
        engine.send(Status())
        events_of(engine, self.wire(answer))

    def ask(self, engine: Connection) -> None:
        engine.send(self.event(PosData))
        engine.send(GetForce())

    def end(self, connection: Connection, state: State) -> None:
        if state is State.CLOSED:
            connection.receive_data(b"")
            assert connection.next_event() == Exit()
        if state is State.ERROR:
            connection.receive_data(b"NONSENSE    ")
            with pytest.raises(errors.UnknownHeaderError):
                connection.next_event()


@contextlib.contextmanager
def bench(dialect: str) -> Iterator[Bench]:
    made = Bench(dialect)
    with made.left:
        yield made
    assert not list(Path("/dev/shm").glob(f"{made.prefix}*"))


def feed(connection: Connection, data: bytes, way: str) -> None:
    """Feed in one of the three ways; before the last byte there must be nothing to be had."""
    if way != "bytewise":
        connection.receive_data(data)
        return
    for index in range(len(data)):
        if index and not connection.closed:
            assert connection.next_event() in (NEED_DATA, PAUSED)
        connection.receive_data(data[index : index + 1])


def settle(driver: Connection, bench: Bench, word: type[Event]) -> None:
    """Do what a DRIVER owes after the message."""
    if word is Status:
        assert driver.answer_status() == encode(ANSWER_IN[driver.state])
    elif word is PosData:
        driver.complete()
    elif word is GetForce:
        driver.send(bench.event(ForceReady))


# --- received -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["whole", "bytewise", "followed"])
@product(Role.DRIVER, REQUESTS)
def test_a_driver_takes_each_request_as_the_table_says(dialect: str, state: State, word: type[Event], way: str) -> None:
    with bench(dialect) as b:
        driver, row = b.driver(state), TRANSITIONS[Role.DRIVER][state]
        kind, data = b.kind(word), b.wire(word)
        feed(driver, data + encode(Status()) * (way == "followed"), way)

        if state is State.ERROR:
            with pytest.raises(errors.UnknownHeaderError):
                driver.next_event()
        elif state is State.CLOSED or word is Exit:
            assert driver.next_event() == Exit()
            assert driver.state is State.CLOSED
        elif row.hold:
            assert driver.next_event() is PAUSED
            assert driver.state is state
            driver.complete()
            take(driver, b, word, kind, State.HAVEDATA, followed=way == "followed")
        else:
            take(driver, b, word, kind, state, followed=way == "followed")


def take(driver: Connection, b: Bench, word: type[Event], kind: type[Event], state: State, *, followed: bool) -> None:
    """The next event is the message that was fed, if the table has it, and behind it comes the STATUS that followed."""
    after = TRANSITIONS[Role.DRIVER][state].receive.get(kind)
    if after is None:
        with pytest.raises(errors.OutOfTurnError, match=f"{word.word} in state {state.name}"):
            driver.next_event()
        assert driver.state is State.ERROR
        return
    assert isinstance(driver.next_event(), kind)
    assert driver.state is after
    if word is not Init:
        assert driver.next_event() is PAUSED
        assert driver.state is after
        settle(driver, b, word)
    assert driver.next_event() == (Status() if followed else NEED_DATA)


@pytest.mark.parametrize("way", ["whole", "bytewise", "followed"])
@product(Role.ENGINE, ANSWERS)
def test_an_engine_takes_each_answer_that_is_due_as_the_table_says(dialect: str, state: State, word: type[Event], way: str) -> None:
    with bench(dialect) as b:
        over = state in (State.CLOSED, State.ERROR)
        engine = b.engine(state, status_first=REQUEST_OF.get(word) is Status)
        if REQUEST_OF.get(word) is Status and state is not State.ASKED and not over:
            engine.send(Status())
        after = TRANSITIONS[Role.ENGINE][state].receive.get(b.kind(word))
        if after is State.UNKNOWN:
            engine.send(Status())  # so that something may follow
        following = {State.ASKED: ForceReady, State.UNKNOWN: Ready}.get(after or State.CLOSED)
        if word is Exit:
            engine.receive_data(b"")
        else:
            feed(engine, b.wire(word) + (b.wire(following) if following and way == "followed" else b""), way)

        if state is State.ERROR:
            with pytest.raises(errors.UnknownHeaderError):
                engine.next_event()
        elif state is State.CLOSED or word is Exit:
            assert engine.next_event() == Exit()
            assert engine.state is State.CLOSED
        elif after is None:
            with pytest.raises(errors.OutOfTurnError, match=f"{word.word} in state {state.name}"):
                engine.next_event()
            assert engine.state is State.ERROR
        else:
            assert isinstance(engine.next_event(), b.kind(word))
            assert engine.state is after
            behind = engine.next_event()
            assert isinstance(behind, b.kind(following)) if following and way == "followed" else behind is NEED_DATA


@product(Role.ENGINE, ANSWERS[:-1])
def test_an_answer_to_no_request_is_out_of_turn_in_every_state(dialect: str, state: State, word: type[Event]) -> None:
    with bench(dialect) as b:
        engine = b.engine(state)
        if state in (State.CLOSED, State.ERROR) or (state is State.ASKED and word is ForceReady):
            return
        engine.receive_data(b.wire(word))
        with pytest.raises(errors.OutOfTurnError, match=word.word):
            engine.next_event()
        assert engine.state is State.ERROR


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_words_of_ones_own_role_are_unknown_in_every_state(dialect: str, role: Role) -> None:
    with bench(dialect) as b:
        for state in TRANSITIONS[role]:
            if state in (State.CLOSED, State.ERROR):
                continue
            for word in WORDS[5:] if role is Role.DRIVER else WORDS[:5]:
                connection = b.driver(state) if role is Role.DRIVER else b.engine(state)
                connection.receive_data(b.wire(word))
                with pytest.raises(errors.UnknownHeaderError, match=word.word):
                    connection.next_event()
                assert connection.state is State.ERROR


# --- sent ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("due", [None, Status, GetForce], ids=named)
@product(Role.DRIVER, WORDS)
def test_a_driver_sends_only_the_answer_that_is_due(dialect: str, state: State, word: type[Event], due: type[Event] | None) -> None:
    with bench(dialect) as b:
        driver, row = b.driver(state), TRANSITIONS[Role.DRIVER][state]
        if due is not None and (due not in row.receive or row.hold):
            return  # cannot be due in this state
        if due is not None:
            events_of(driver, b.wire(due))
        event, before = b.event(word), repr(driver)
        after = row.send.get(type(event))

        if after is None or REQUEST_OF.get(word) is not due:
            with pytest.raises(errors.NotOurTurnError, match=f"{word.word} is not allowed in state {state.name}"):
                driver.send(event)
            assert repr(driver) == before
        else:
            assert driver.send(event)[:12] == encode(event, b.layout)[:12] if word is not ForceReady else driver.send(event)
            assert driver.state is after
            assert driver.unanswered == 0


@pytest.mark.parametrize("state", TRANSITIONS[Role.DRIVER], ids=named)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_force_can_be_complete_only_while_it_is_computed(dialect: str, state: State) -> None:
    with bench(dialect) as b:
        driver = b.driver(state)
        if state is State.COMPUTING:
            driver.complete()
            assert driver.state is State.HAVEDATA
        else:
            with pytest.raises(errors.NotOurTurnError):
                driver.complete()
            assert driver.state is state


@pytest.mark.parametrize("waiting", [False, True], ids=["idle", "waiting"])
@product(Role.ENGINE, WORDS)
def test_an_engine_sends_what_the_table_says_and_no_frame_into_the_unknown(
    dialect: str, state: State, word: type[Event], waiting: bool
) -> None:
    with bench(dialect) as b:
        engine = b.engine(state)
        if waiting and state not in (State.CLOSED, State.ERROR):
            engine.send(Status())
        event, before, unanswered = b.event(word), repr(engine), engine.unanswered
        after = TRANSITIONS[Role.ENGINE][state].send.get(type(event))

        if after is None or (unanswered and word in (Init, PosData)):
            with pytest.raises(errors.NotOurTurnError, match=f"{word.word} is not allowed in state {state.name}"):
                engine.send(event)
            assert repr(engine) == before
        else:
            assert engine.send(event).startswith(word.word.encode())
            assert engine.state is after
            assert engine.unanswered == (0 if word is Exit else unanswered + (word in (Status, GetForce)))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_frame_or_a_result_of_another_dialect_is_refused_and_changes_nothing(dialect: str) -> None:
    wrong_frame, wrong_result = (PosBatch.of([SINGLE_FRAME], 3), ForceBatch.of([SINGLE_RESULT], 3))
    with bench(dialect) as b:
        engine, driver = b.engine(State.READY), b.driver(State.HAVEDATA)
        events_of(driver, b.wire(GetForce))
        for connection, wrong in ((engine, wrong_frame), (driver, wrong_result)):
            before = repr(connection)
            with pytest.raises(errors.LayoutError):
                connection.send(wrong)
            assert repr(connection) == before
