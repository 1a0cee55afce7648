"""An ENGINE and a DRIVER that do random legal things to one another, their bytes cut at random: they always understand one another.

Checked all the time: requests arrive in the order in which they were sent, answers in the order of their requests, numbers bit for bit, the
two states agree whenever nothing is under way, and neither takes more memory than it says.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tumbaga.socket_protocol.connection import NEED_DATA, PAUSED, Connection, Role, State, Wait
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

SHM = Path("/dev/shm")
MOST_UNANSWERED = 4
AGREES = {
    State.NEEDINIT: {State.NEEDINIT},
    State.INIT_SENT: {State.READY},
    State.READY: {State.READY},
    State.COMPUTING: {State.COMPUTING, State.HAVEDATA},
    State.HAVEDATA: {State.HAVEDATA},
    State.ASKED: {State.COMPUTING, State.HAVEDATA},
    State.UNKNOWN: {State.NEEDINIT, State.READY},
}
"""What the driver can be doing when the engine believes something and nothing is on its way."""
runs = itertools.count()


def numbers_of(event: Event) -> list[Any]:
    """Return what must come out as it went in."""
    if isinstance(event, PosData):
        return [event.cell.tolist(), event.positions.tolist()]
    if isinstance(event, PosBatch):
        return [event.cells.tolist(), event.positions.tolist()]
    if isinstance(event, ForceReady):
        return [event.energy, event.forces.tolist(), event.virial.tolist(), event.extras]
    if isinstance(event, ForceBatch):
        return [event.energies.tolist(), event.forces.tolist(), event.virials.tolist(), event.extras]
    return [event]


def result_of(frame: PosData) -> ForceReady:
    return ForceReady(float(frame.positions.sum()), -frame.positions, frame.cell * 0.5, b'{"sum": %.3f}' % frame.positions.sum())


class Talk(RuleBasedStateMachine):
    """The two connections, a pipe each way, and the order of things."""

    @initialize(dialect=st.sampled_from(["single", "batched", "shared"]), size=st.integers(2, 4), atoms=st.integers(1, 5))
    def connect(self, dialect: str, size: int, atoms: int) -> None:
        self.prefix = f"ipi_shm_talk{os.getpid()}_{next(runs)}_"
        shared = dialect == "shared"
        self.engine = Connection(Role.ENGINE, shared=self.prefix if shared else False)
        self.driver = Connection(Role.DRIVER, shared=shared)
        self.batch, self.atoms = (0 if dialect == "single" else size), atoms
        self.size = 1  # of a frame
        self.pipes = {Role.DRIVER: bytearray(), Role.ENGINE: bytearray()}
        self.requested: deque[list[Any]] = deque()  # sent by the engine, not yet seen by the driver
        self.answered: deque[list[Any]] = deque()  # sent by the driver, not yet seen by the engine
        self.todo: Event | None = None  # what the driver owes
        self.result: ForceReady | ForceBatch | None = None

    def write(self, sender: Connection, event: Event) -> None:
        receiver = self.driver if sender is self.engine else self.engine
        self.pipes[receiver.role] += sender.send(event)
        (self.requested if sender is self.engine else self.answered).append(numbers_of(event))

    # --- what the engine does

    @precondition(lambda self: self.engine.unanswered < MOST_UNANSWERED)
    @rule()
    def ask_status(self) -> None:
        self.write(self.engine, Status())

    @precondition(lambda self: self.engine.state is State.NEEDINIT and not self.engine.unanswered)
    @rule(rid=st.integers(-1, 5))
    def give_init(self, rid: int) -> None:
        self.write(self.engine, Init(rid, b"batch_size:%d" % self.batch if self.batch else b" "))
        self.size = self.batch or 1

    @precondition(lambda self: self.engine.state is State.READY and not self.engine.unanswered)
    @rule(seed=st.integers(0, 9), more=st.sampled_from([(), (GetForce(),), (GetForce(), Status()), (Status(), GetForce())]))
    def give_frame(self, seed: int, more: tuple[Event, ...]) -> None:
        rng = np.random.default_rng(seed)
        frames = [PosData(rng.normal(size=(3, 3)), rng.normal(size=(self.atoms, 3))) for _ in range(rng.integers(1, self.size + 1))]
        self.write(self.engine, PosBatch.of(frames, self.size) if self.size > 1 else frames[0])
        for event in more:
            self.write(self.engine, event)

    @precondition(lambda self: self.engine.state in (State.COMPUTING, State.HAVEDATA))
    @rule()
    def ask_force(self) -> None:
        self.write(self.engine, GetForce())

    @rule()
    def hear_answer(self) -> None:
        event = self.engine.next_event()
        if event is NEED_DATA:
            return
        assert not isinstance(event, Wait)
        assert numbers_of(event) == self.answered.popleft()

    # --- what the driver does

    @precondition(lambda self: self.todo is None)
    @rule()
    def hear_request(self) -> None:
        event = self.driver.next_event()
        assert event is not PAUSED
        if event is NEED_DATA:
            return
        assert numbers_of(event) == self.requested.popleft()
        if isinstance(event, PosData):
            self.result = result_of(event)
        elif isinstance(event, PosBatch):
            self.result = ForceBatch.of([result_of(event.frame(index)) for index in range(event.distinct)], len(event))
        self.todo = event if not isinstance(event, Init) else None

    @precondition(lambda self: self.todo is not None)
    @rule()
    def do_what_is_owed(self) -> None:
        assert self.driver.next_event() is PAUSED
        todo, self.todo = self.todo, None
        if isinstance(todo, Status):
            truth: dict[State, Event] = {State.NEEDINIT: NeedInit(), State.READY: Ready(), State.HAVEDATA: HaveData()}
            self.write(self.driver, truth[self.driver.state])
        elif isinstance(todo, GetForce):
            assert self.result is not None
            self.write(self.driver, self.result)
        else:
            self.driver.complete()

    # --- the pipes

    @rule(role=st.sampled_from(Role), count=st.one_of(st.integers(1, 30), st.just(10**6)), in_place=st.booleans())
    def deliver(self, role: Role, count: int, in_place: bool) -> None:
        receiver, pipe = (self.driver if role is Role.DRIVER else self.engine), self.pipes[role]
        if not receiver.wants_data or not pipe:
            return
        if in_place:
            space = receiver.space()
            count = min(count, len(pipe), len(space))
            space[:count] = pipe[:count]
            receiver.received(count)
        else:
            receiver.receive_data(bytes(pipe[:count]))
        del pipe[:count]

    @invariant()
    def memory_is_bounded(self) -> None:
        for connection in (self.engine, self.driver):
            assert connection.memory <= connection.memory_bound

    @invariant()
    def states_agree_when_nothing_is_on_its_way(self) -> None:
        if not self.requested and not self.answered and not (self.engine.state is State.UNKNOWN and self.driver.state is State.NEEDINIT):
            assert self.driver.state in AGREES[self.engine.state]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(200):  # let all that is under way arrive
            self.deliver(Role.DRIVER, 10**6, False)
            self.deliver(Role.ENGINE, 10**6, True)
            (self.hear_request if self.todo is None else self.do_what_is_owed)()
            self.hear_answer()
        assert not self.requested
        assert not self.answered
        assert not self.engine.unanswered
        self.driver.receive_data(self.engine.send(Exit()))
        assert self.driver.next_event() == Exit()
        assert self.engine.state is self.driver.state is State.CLOSED
        assert not list(SHM.glob(f"{self.prefix}*"))


Talk.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck))
TestTalk = Talk.TestCase
