"""Who may say what when: transcripts of both roles and both dialects, and what happens when somebody breaks the rules."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tumbaga.socket_protocol import errors
from tumbaga.socket_protocol.codec import encode
from tumbaga.socket_protocol.connection import NEED_DATA, PAUSED, Connection, Limits, Role, State, Wait
from tumbaga.socket_protocol.events import Event, Exit, ForceReady, GetForce, HaveData, Init, NeedInit, PosData, Ready, Status
from tumbaga.socket_protocol.states import REQUEST_OF, START, TRANSITIONS
from tumbaga.socket_protocol.testing import connection_pair, events_of, pump

# a busy machine is no reason to fail
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
FRAME = PosData(np.diag([20.0, 21.0, 22.0]), np.arange(6.0).reshape(2, 3))
RESULT = ForceReady(-1.0, np.ones((2, 3)), np.eye(3), b'{"a": 1}')
REQUESTS = b"".join(
    encode(event) for event in (Status(), Init(0, b" "), Status(), FRAME, GetForce(), Status(), FRAME, Status(), GetForce())
)


def words(events: list[Event]) -> list[str]:
    return [event.word for event in events]


def wire(*events: Event) -> bytes:
    return b"".join(encode(event) for event in events)


def driver_in(state: State) -> Connection:
    driver = Connection(Role.DRIVER)
    if state is not State.NEEDINIT:
        events_of(driver, wire(Init(0, b" ")))
    if state in (State.COMPUTING, State.HAVEDATA):
        events_of(driver, wire(FRAME))
    if state is State.HAVEDATA:
        driver.complete()
    if state is State.CLOSED:
        events_of(driver, wire(Exit()))
    assert driver.state is state
    return driver


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_the_classic_cycle_word_by_word(chunk: int | None) -> None:
    engine, driver = connection_pair()

    assert pump(engine, driver, Status(), chunk=chunk) == [Status()]
    assert pump(driver, engine, NeedInit(), chunk=chunk) == [NeedInit()]
    assert pump(engine, driver, Init(3, b"\0"), chunk=chunk) == [Init(3, b"\0")]
    for _ in range(2):
        assert pump(engine, driver, Status(), chunk=chunk) == [Status()]
        assert events_of(engine, driver.answer_status(), chunk) == [Ready()]
        assert words(pump(engine, driver, FRAME, chunk=chunk)) == ["POSDATA"]
        assert driver.state.name == "COMPUTING"
        assert pump(engine, driver, Status(), chunk=chunk) == []
        assert driver.next_event() is PAUSED
        driver.complete()
        assert driver.next_event() == Status()
        assert events_of(engine, driver.answer_status(), chunk) == [HaveData()]
        assert pump(engine, driver, GetForce(), chunk=chunk) == [GetForce()]
        assert words(pump(driver, engine, RESULT, chunk=chunk)) == ["FORCEREADY"]
        assert driver.state is State.READY
    assert pump(engine, driver, Exit(), chunk=chunk) == [Exit()]
    assert driver.state is engine.state is State.CLOSED


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_the_pipelined_cycle_answers_in_the_order_of_the_requests(chunk: int | None) -> None:
    engine, driver = connection_pair(atoms=2)
    pump(engine, driver, Status())
    pump(driver, engine, NeedInit())

    assert words(pump(engine, driver, Init(0, b" "), Status(), chunk=chunk)) == ["INIT", "STATUS"]
    assert pump(driver, engine, Ready()) == [Ready()]
    for _ in range(2):
        assert words(pump(engine, driver, FRAME, GetForce(), Status(), chunk=chunk)) == ["POSDATA"]
        assert driver.next_event() is PAUSED
        driver.complete()
        assert driver.next_event() == GetForce()
        assert driver.next_event() is PAUSED  # the answer to GETFORCE comes first
        assert words(pump(driver, engine, RESULT, chunk=chunk)) == ["FORCEREADY"]
        assert driver.next_event() == Status()
        assert events_of(engine, driver.answer_status()) == [Ready()]
        assert engine.state is State.READY


def drive(driver: Connection) -> list[str]:
    """Answer everything that the driver gives out, and tell the conversation."""
    told = []
    while not isinstance(event := driver.next_event(), Wait):
        told.append(event.word)
        if isinstance(event, Exit):
            break
        if isinstance(event, Status):
            told.append(driver.answer_status().decode().strip())
        elif isinstance(event, PosData):
            driver.complete()
        elif isinstance(event, GetForce):
            told.append(driver.send(RESULT)[:10].decode())
    return told


WHOLE_TALK = [
    *("STATUS", "NEEDINIT", "INIT", "STATUS", "READY", "POSDATA", "GETFORCE", "FORCEREADY"),
    *("STATUS", "READY", "POSDATA", "STATUS", "HAVEDATA", "GETFORCE", "FORCEREADY"),
]


@PATIENT
@given(st.lists(st.integers(1, len(REQUESTS) - 1), max_size=12))
def test_the_conversation_is_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    driver = Connection(Role.DRIVER)
    edges = [0, *sorted(set(cuts)), len(REQUESTS)]
    told = []
    for start, end in pairwise(edges):
        driver.receive_data(REQUESTS[start:end])
        told += drive(driver)

    assert told == WHOLE_TALK
    assert driver.next_event() is NEED_DATA


@PATIENT
@given(st.lists(st.integers(1, 400), max_size=12))
def test_answers_are_the_same_however_the_bytes_are_cut(cuts: list[int]) -> None:
    engine = Connection(Role.ENGINE)
    engine.send(Status())
    answers = wire(Ready(), HaveData(), RESULT, NeedInit())
    events_of(engine, answers[:12])
    for event in (FRAME, Status(), GetForce(), Status()):
        engine.send(event)
    edges = [12, *sorted({12 + cut for cut in cuts if 12 + cut < len(answers)}), len(answers)]
    told = [event.word for a, b in pairwise(edges) for event in events_of(engine, answers[a:b])]

    assert told == ["HAVEDATA", "FORCEREADY", "NEEDINIT"]
    assert engine.state is State.NEEDINIT


@pytest.mark.parametrize("state", [State.NEEDINIT, State.READY, State.COMPUTING, State.HAVEDATA])
@pytest.mark.parametrize("end", [b"EXIT        ", b"", b"GETFO"], ids=["EXIT", "end of stream", "end within a message"])
def test_the_end_acts_at_once_in_every_state_ahead_of_held_requests(state: State, end: bytes) -> None:
    driver = driver_in(state)
    driver.receive_data(wire(Status(), Status()) + end)
    if not end.startswith(b"EXIT"):
        driver.receive_data(b"")

    assert driver.next_event() == Exit()
    assert driver.state is State.CLOSED
    assert driver.next_event() == Exit()
    assert not driver.wants_data
    with pytest.raises(errors.NotOurTurnError):
        driver.complete()


@pytest.mark.parametrize(
    ("state", "message"),
    [(State.NEEDINIT, GetForce()), (State.READY, GetForce()), (State.HAVEDATA, FRAME)],
    ids=lambda value: getattr(value, "word", getattr(value, "name", "")),
)
def test_a_request_out_of_turn_ends_the_connection_for_good(state: State, message: Event) -> None:
    driver = driver_in(state)
    driver.receive_data(wire(message))
    with pytest.raises(errors.OutOfTurnError, match=f"{message.word} in state {state.name}, where STATUS"):
        driver.next_event()

    driver.receive_data(wire(Status()))
    assert driver.state is State.ERROR
    assert not driver.wants_data
    with pytest.raises(errors.OutOfTurnError):
        driver.next_event()
    with pytest.raises(errors.NotOurTurnError):
        driver.answer_status()


def test_a_frame_without_init_is_taken_and_leaves_the_driver_ready() -> None:
    driver = Connection(Role.DRIVER)

    assert words(events_of(driver, wire(FRAME, GetForce()))) == ["POSDATA"]
    assert drive_after_completion(driver) == ["GETFORCE", "FORCEREADY"]
    assert driver.state is State.READY


def drive_after_completion(driver: Connection) -> list[str]:
    driver.complete()
    return drive(driver)


def test_init_is_taken_again_in_every_state_and_changes_none() -> None:
    for state in (State.READY, State.HAVEDATA):
        driver = driver_in(state)

        assert events_of(driver, wire(Init(5, b"x"))) == [Init(5, b"x")]
        assert driver.state is state


def test_reading_ahead_stops_at_the_second_unanswered_frame_and_goes_on_later() -> None:
    driver = driver_in(State.COMPUTING)
    driver.receive_data(wire(GetForce(), Status()))
    assert driver.next_event() is PAUSED
    assert driver.wants_data
    driver.receive_data(wire(FRAME, GetForce(), FRAME))
    assert driver.next_event() is PAUSED
    assert not driver.wants_data

    assert drive_after_completion(driver) == ["GETFORCE", "FORCEREADY", "STATUS", "READY", "POSDATA", "GETFORCE", "FORCEREADY", "POSDATA"]
    assert driver.wants_data


def test_headers_without_end_do_not_fill_the_memory() -> None:
    driver = driver_in(State.COMPUTING)
    for _ in range(100):
        if driver.wants_data:
            driver.receive_data(wire(Status()) * 1000)
        assert driver.next_event() is PAUSED

    assert not driver.wants_data
    assert "held=16 buffered=11808" in repr(driver)


def test_a_caller_that_reads_on_regardless_is_stopped_by_a_hard_limit() -> None:
    driver = Connection(Role.DRIVER, Limits(max_atoms=10, max_init=100))
    most = 2 * driver._largest + (1 << 21)
    driver.receive_data(b"S" * most)
    with pytest.raises(errors.ReadAheadError):
        driver.receive_data(b"S")

    assert driver.state is State.ERROR


@pytest.mark.parametrize("state", [State.NEEDINIT, State.READY, State.COMPUTING, State.HAVEDATA, State.CLOSED])
@pytest.mark.parametrize("answer", [NeedInit(), Ready(), HaveData(), RESULT, Status(), FRAME, Exit()], ids=lambda event: event.word)
def test_a_driver_says_nothing_unasked(state: State, answer: Event) -> None:
    driver = driver_in(state)
    with pytest.raises(errors.NotOurTurnError, match=f"{answer.word} is not allowed in state {state.name}"):
        driver.send(answer)

    assert driver.state is state


def test_a_driver_tells_the_truth_about_its_state() -> None:
    for state, truth in ((State.NEEDINIT, NeedInit()), (State.READY, Ready()), (State.HAVEDATA, HaveData())):
        for answer in (NeedInit(), Ready(), HaveData()):
            driver = driver_in(state)
            events_of(driver, wire(Status()))
            if answer == truth:
                assert driver.send(answer) == wire(truth)
            else:
                with pytest.raises(errors.NotOurTurnError):
                    driver.send(answer)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (ForceReady(0.0, np.zeros((3, 3)), np.eye(3)), errors.AnswerAtomCountError),
        (ForceReady(0.0, np.zeros((2, 3)), np.eye(3), b"123"), errors.ExtrasError),
    ],
)
def test_an_answer_that_would_break_the_engine_is_refused_and_a_good_one_still_goes(answer: ForceReady, error: type[Exception]) -> None:
    driver = driver_in(State.HAVEDATA)
    events_of(driver, wire(GetForce()))
    with pytest.raises(error):
        driver.send(answer)

    assert driver.state.name == "HAVEDATA"
    assert driver.send(RESULT) == encode(RESULT)
    assert driver.state is State.READY


def test_nothing_that_is_not_finite_leaves_on_the_wire() -> None:
    driver = driver_in(State.HAVEDATA)
    events_of(driver, wire(GetForce()))
    answer = ForceReady(0.0, np.zeros((2, 3)), np.eye(3))
    answer.virial[0, 0] = np.inf
    with pytest.raises(errors.LocalProtocolError, match="NaN"):
        driver.send(answer)

    assert driver.state is State.HAVEDATA


def test_extras_keep_their_keys_during_a_session() -> None:
    driver = driver_in(State.HAVEDATA)
    events_of(driver, wire(GetForce()))
    driver.send(RESULT)
    events_of(driver, wire(FRAME, GetForce()))
    driver.complete()
    driver.next_event()
    with pytest.raises(errors.ExtrasKeysError, match=r"\['b'\].*\['a'\]"):
        driver.send(ForceReady(0.0, np.zeros((2, 3)), np.eye(3), b'{"b": 1}'))

    assert driver.send(RESULT)


def asked_engine() -> Connection:
    engine = Connection(Role.ENGINE)
    engine.send(Status())
    events_of(engine, wire(Ready()))
    engine.send(FRAME)
    engine.send(GetForce())
    return engine


@pytest.mark.parametrize("answer", [NeedInit(), Ready(), HaveData(), RESULT], ids=lambda event: event.word)
def test_an_answer_to_no_question_is_out_of_turn(answer: Event) -> None:
    engine = Connection(Role.ENGINE)
    engine.receive_data(wire(answer))

    with pytest.raises(errors.OutOfTurnError, match="where nothing was expected"):
        engine.next_event()


def test_a_driver_that_ignored_the_frame_is_found_out() -> None:
    engine = Connection(Role.ENGINE)
    engine.send(Status())
    events_of(engine, wire(Ready()))
    engine.send(FRAME)
    engine.send(Status())
    engine.receive_data(wire(Ready()))

    with pytest.raises(errors.OutOfTurnError, match="READY in state COMPUTING, where HAVEDATA"):
        engine.next_event()


def test_a_reply_about_another_number_of_atoms_is_refused() -> None:
    engine = asked_engine()
    engine.receive_data(wire(ForceReady(0.0, np.zeros((3, 3)), np.eye(3))))

    with pytest.raises(errors.AtomCountError, match=r"sent 3 atoms, 2 were expected"):
        engine.next_event()


def test_an_engine_still_gets_the_answer_that_came_before_the_end() -> None:
    engine = asked_engine()
    engine.receive_data(wire(RESULT))
    engine.receive_data(b"")

    assert words([engine.next_event(), engine.next_event()]) == ["FORCEREADY", "EXIT"]  # type: ignore[list-item]


def test_a_driver_may_ask_for_init_after_every_force() -> None:
    engine = asked_engine()
    engine.send(Status())
    assert words(events_of(engine, wire(RESULT, NeedInit()))) == ["FORCEREADY", "NEEDINIT"]

    engine.send(Init(4, b" "))
    engine.send(Status())
    assert events_of(engine, wire(Ready())) == [Ready()]
    assert engine.send(FRAME)


@pytest.mark.parametrize("event", [Init(0, b" "), FRAME, GetForce(), Ready(), RESULT], ids=lambda event: event.word)
def test_an_engine_asks_for_the_status_first(event: Event) -> None:
    with pytest.raises(errors.NotOurTurnError):
        Connection(Role.ENGINE).send(event)


def test_an_engine_sends_no_frame_while_an_answer_is_under_way() -> None:
    engine = Connection(Role.ENGINE)
    engine.send(Status())
    events_of(engine, wire(Ready()))
    engine.send(Status())

    with pytest.raises(errors.NotOurTurnError, match="with STATUS unanswered"):
        engine.send(FRAME)


def test_an_engine_may_say_exit_to_a_driver_that_broke_the_rules() -> None:
    engine = asked_engine()
    engine.receive_data(b"BUSY        ")
    with pytest.raises(errors.UnknownHeaderError):
        engine.next_event()

    assert engine.send(Exit()) == b"EXIT        "


@pytest.mark.parametrize("role", list(Role))
def test_every_state_that_the_table_names_has_a_row_and_can_be_reached(role: Role) -> None:
    table = TRANSITIONS[role]
    reached = {START[role], State.ERROR} | {state for row in table.values() for state in (*row.receive.values(), *row.send.values())}

    assert reached == set(table)
    assert all(word in (Status, GetForce) for word in REQUEST_OF.values())


GRAINS = st.one_of(
    st.sampled_from(
        [wire(event) for event in (Status(), Init(0, b" "), FRAME, GetForce(), Exit(), Ready(), NeedInit(), HaveData(), RESULT)]
    ),
    st.binary(max_size=40),
    st.sampled_from([b"POSDATA     ", b"INIT        ", b"FORCEREADY  ", b"\xff\xff\xff\x7f", b"\0" * 36]),
)


@settings(PATIENT, max_examples=300)
@given(st.sampled_from(Role), st.lists(GRAINS, max_size=15), st.integers(1, 200))
def test_any_bytes_give_events_or_a_pause_or_a_remote_error_and_nothing_else(role: Role, grains: list[bytes], chunk: int) -> None:
    limits = Limits(max_atoms=5, max_init=50, max_extras=50)
    connection = Connection(role, limits)
    if role is Role.ENGINE:
        connection.send(Status())
    data = b"".join(grains)
    for start in range(0, len(data), chunk):
        try:
            connection.receive_data(data[start : start + chunk])
            for _ in range(1000):
                event = connection.next_event()
                if isinstance(event, Wait | Exit):
                    break
                if isinstance(event, Status):
                    connection.answer_status()
                elif isinstance(event, PosData):
                    connection.complete()
                elif isinstance(event, GetForce):
                    connection.send(RESULT)
                elif isinstance(event, Ready) and connection.state is State.READY:
                    for request in (FRAME, GetForce(), Status()):
                        connection.send(request)
        except errors.RemoteProtocolError:
            assert connection.state is State.ERROR
        if connection.closed:
            return
        assert isinstance(event, Wait)
        assert connection.memory <= connection.memory_bound
