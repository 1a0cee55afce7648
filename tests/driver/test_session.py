"""One conversation over a real socket pair: units, frames, and every way in which it can end."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from random import Random

import numpy as np
import pytest
from ase import units as ase_units

from tumbaga.driver.errors import ConfigError
from tumbaga.driver.session import Asked, Ended, More, Patience, Session
from tumbaga.driver.species import Species, from_formula
from tumbaga.online.ramp import RampState
from tumbaga.online.records import Prediction
from tumbaga.socket_protocol.codec import encode
from tumbaga.socket_protocol.connection import Connection, Role, Wait
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
from tumbaga.socket_protocol.streams import Address, Backoff, Stream

NUMBERS = np.array([8, 1, 1])
EXTRAS = b'{"tumbaga_version": 0}'
RTOL = 1e-12
NO_CELL = np.zeros((3, 3))


class Engine:
    """The other end, by hand: what it sends is there at once, and so is what comes back."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.connection = Connection(Role.ENGINE)

    def say(self, *events: Event) -> None:
        self.stream.send(b"".join(self.connection.send(event) for event in events))

    def hear(self) -> list[Event]:
        heard = []
        self.stream.receive(self.connection)
        while not isinstance(event := self.connection.next_event(), Wait):
            heard.append(event)
            if isinstance(event, Exit):
                break
        return heard


class Talk:
    """A session that is connected to an engine."""

    def __init__(self, session: Session, engine: Engine) -> None:
        self.session, self.engine = session, engine

    def turn(self, *events: Event) -> Asked | Ended | More | None:
        """The engine says something and the session reacts."""
        self.engine.say(*events)
        self.session.receive()
        return self.session.turn()

    def get_ready(self, text: bytes = b" ") -> None:
        assert self.turn(Status()) is None
        assert self.engine.hear() == [NeedInit()]
        assert self.turn(Init(0, text), Status()) is None
        assert self.engine.hear() == [Ready()]


MakeTalk = Callable[..., Talk]


def template(periodic: bool | None) -> Species | None:
    """None is no template at all."""
    return None if periodic is None else Species(NUMBERS, periodic, "init.xyz")


@pytest.fixture
def make_talk() -> Iterator[MakeTalk]:
    made: list[Talk] = []

    def make(periodic: bool | None = False) -> Talk:
        session = Session(Address.unix("/tmp/nobody"), template(periodic), Backoff(Random(0)), RampState(0))
        ours, theirs = socket.socketpair()
        session.connected(Stream(ours, "engine"))
        made.append(Talk(session, Engine(Stream(theirs, "session"))))
        return made[-1]

    yield make
    for talk in made:
        talk.session.hang_up()
        talk.engine.stream.close()


@pytest.fixture
def talk(make_talk: MakeTalk) -> Talk:
    return make_talk()


def positions(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1.0, 3.0, (3, 3))


def prediction() -> Prediction:
    rng = np.random.default_rng(9)
    strain = rng.standard_normal((3, 3))
    return Prediction(-17.25, rng.standard_normal((3, 3)), strain + strain.T)


def test_a_conversation_one_message_at_a_time(talk: Talk) -> None:
    """STATUS, INIT, STATUS, POSDATA, STATUS, GETFORCE, as ASE sends them, are answered at once or when the force is there."""
    talk.get_ready()
    asked = talk.turn(PosData(NO_CELL, positions()))
    assert isinstance(asked, Asked)
    assert (talk.session.computing, talk.session.state, talk.session.ticket) == (True, "computing", 1)
    assert talk.turn(Status()) is None
    assert talk.engine.hear() == []
    assert talk.session.answer([(prediction(), EXTRAS)]) is None
    assert talk.engine.hear() == [HaveData()]
    assert talk.turn(GetForce()) is None
    (force,) = talk.engine.hear()

    assert isinstance(force, ForceReady)
    assert json.loads(force.extras) == {"tumbaga_version": 0}
    assert (talk.session.computing, talk.session.state, talk.session.forces) == (False, "connected", 1)
    assert talk.turn(Status()) is None
    assert talk.engine.hear() == [Ready()]


def test_a_conversation_in_one_write(talk: Talk) -> None:
    """POSDATA, GETFORCE and STATUS in one write, as i-PI sends them, are one question and two answers in order."""
    talk.get_ready()
    for seed in range(3):
        assert isinstance(talk.turn(PosData(NO_CELL, positions(seed)), GetForce(), Status()), Asked)
        assert talk.engine.hear() == []
        assert talk.session.answer([(prediction(), EXTRAS)]) is None
        force, ready = talk.engine.hear()
        assert isinstance(force, ForceReady)
        assert ready == Ready()

    assert (talk.session.ticket, talk.session.forces) == (3, 3)


def test_units_change_as_ase_has_them(make_talk: MakeTalk) -> None:
    """Positions and cell in Bohr become Å; eV, eV/Å and virials in eV become atomic units: to 1e-12, signs and rows included."""
    talk = make_talk(periodic=True)
    talk.get_ready()
    cell = np.array([[9.0, 0.1, 0.2], [0.3, 10.0, 0.4], [0.5, 0.6, 11.0]])
    asked = talk.turn(PosData(cell, positions()), GetForce(), Status())
    told = prediction()
    talk.session.answer([(told, EXTRAS)])
    force = talk.engine.hear()[0]

    assert isinstance(asked, Asked)
    assert asked.frames[0].periodic
    assert asked.frames[0].numbers.tolist() == [8, 1, 1]
    np.testing.assert_allclose(asked.frames[0].positions, positions() * ase_units.Bohr, rtol=RTOL)
    np.testing.assert_allclose(asked.frames[0].cell, cell * ase_units.Bohr, rtol=RTOL)
    assert isinstance(force, ForceReady)
    assert force.energy == pytest.approx(told.energy / ase_units.Hartree, rel=RTOL)
    np.testing.assert_allclose(force.forces, told.forces / ase_units.Hartree * ase_units.Bohr, rtol=RTOL)
    np.testing.assert_allclose(force.virial, told.virial / ase_units.Hartree, rtol=RTOL)


@pytest.mark.parametrize(
    "cell",
    [
        NO_CELL,
        -1.8897261 * np.eye(3),
        120.0 * np.eye(3),
        np.diag([10.0, 10.0, 0.0]),
    ],
    ids=["ASE without a cell", "i-PI without a cell", "a vacuum box", "a slab's cell"],
)
def test_a_cluster_has_no_lattice(talk: Talk, cell: np.ndarray) -> None:
    """Whatever cell the engine sends with a cluster, the frame is not periodic, has a zero cell, and its positions to the last bit."""
    talk.get_ready()
    asked = talk.turn(PosData(cell, positions()))

    assert isinstance(asked, Asked)
    assert not asked.frames[0].periodic
    assert not asked.frames[0].cell.any()
    np.testing.assert_array_equal(asked.frames[0].positions, positions() * (ase_units.Bohr * 1.0))


def test_a_folded_cluster_is_made_whole(talk: Talk) -> None:
    """A cluster that the engine folded into its vacuum box keeps all its distances."""
    talk.get_ready()
    box = 40.0 * np.eye(3)
    whole = positions() + np.array([38.0, 0.0, 20.0])
    asked = talk.turn(PosData(box, whole % 40.0))

    assert isinstance(asked, Asked)
    distances = np.linalg.norm(asked.frames[0].positions[:, None] - asked.frames[0].positions, axis=-1)
    expected = np.linalg.norm(whole[:, None] - whole, axis=-1) * ase_units.Bohr
    assert (whole % 40.0 != whole).any()
    np.testing.assert_allclose(distances, expected, atol=1e-12)


@pytest.mark.parametrize("cell", [NO_CELL, np.diag([10.0, 10.0, 0.0]), np.diag([10.0, 10.0, 1e-9])])
def test_a_periodic_template_needs_a_cell(make_talk: MakeTalk, cell: np.ndarray) -> None:
    """A periodic template and a frame whose cell has no volume end the conversation with a sentence, not the process."""
    talk = make_talk(periodic=True)
    talk.get_ready()
    ended = talk.turn(PosData(cell, positions()))

    assert isinstance(ended, Ended)
    assert "cell" in ended.fault


def test_another_number_of_atoms_ends_it(talk: Talk) -> None:
    """A frame with more atoms than the template ends the conversation, with both numbers."""
    talk.get_ready()
    ended = talk.turn(PosData(NO_CELL, np.ones((5, 3))))

    assert isinstance(ended, Ended)
    assert "5 atoms, 3 were expected" in ended.fault


@pytest.mark.parametrize(("numbers", "fine"), [([8, 1, 1], True), ([1, 8, 1], False), ([8, 1], False)])
def test_species_are_compared_where_they_are_told(talk: Talk, numbers: list[int], fine: bool) -> None:
    """An INIT that lists the template's species in order is taken; any other list ends the conversation."""
    talk.turn(Status())
    assert talk.engine.hear() == [NeedInit()]
    ended = talk.turn(Init(0, json.dumps({"numbers": numbers}).encode()), Status())

    assert (ended is None) is fine
    if not fine:
        assert isinstance(ended, Ended)
        assert "init.xyz" in ended.fault


def test_junk_ends_it(talk: Talk) -> None:
    """Bytes that are no message end the conversation with a sentence."""
    talk.engine.stream.send(b"GET / HTTP/1.1\r\n\r\n")
    talk.session.receive()
    ended = talk.session.turn()

    assert isinstance(ended, Ended)
    assert "header" in ended.fault


@pytest.mark.parametrize("goodbye", [True, False])
def test_an_engine_that_leaves_while_its_force_is_computed(talk: Talk, goodbye: bool) -> None:
    """EXIT, or the end of the stream, in the middle of a computation ends the conversation without a fault, and nobody waits."""
    talk.get_ready()
    assert isinstance(talk.turn(PosData(NO_CELL, positions()), GetForce(), Status()), Asked)
    if goodbye:
        talk.engine.say(Exit())
    talk.engine.stream.close()
    talk.session.receive()

    assert talk.session.turn() == Ended()
    talk.session.hang_up()
    assert not talk.session.computing
    assert talk.session.fileno() == -1
    assert talk.session.interest() == 0


def test_an_engine_that_left_unseen_is_answered_into_the_void(talk: Talk) -> None:
    """An answer to an engine whose end has not been read yet is no error, and the end is seen after it."""
    talk.get_ready()
    assert isinstance(talk.turn(PosData(NO_CELL, positions()), GetForce(), Status()), Asked)
    talk.engine.stream.close()
    assert talk.session.answer([(prediction(), EXTRAS)]) is None
    talk.session.receive()

    assert talk.session.turn() == Ended()


def test_an_unanswered_frame_does_not_reach_the_next_conversation(talk: Talk) -> None:
    """After a new connection the ticket of the old frame is stale, nothing is computed, and counts begin again."""
    talk.get_ready()
    assert isinstance(talk.turn(PosData(NO_CELL, positions())), Asked)
    talk.session.hang_up()
    old = talk.session.ticket
    ours, theirs = socket.socketpair()
    talk.session.connected(Stream(ours, "engine"))
    engine = Engine(Stream(theirs, "session"))
    again = Talk(talk.session, engine)
    assert not talk.session.computing
    again.get_ready()
    assert isinstance(again.turn(PosData(NO_CELL, positions())), Asked)

    assert talk.session.ticket == old + 1
    assert talk.session.forces == 0
    talk.session.hang_up()
    engine.stream.close()


def test_only_an_answer_resets_what_counts_failures(talk: Talk) -> None:
    """Refusals in a row are forgotten with the first force that is given, not with a connection."""
    talk.session.refusals = 2
    talk.get_ready()
    talk.turn(PosData(NO_CELL, positions()), GetForce())
    assert talk.session.refusals == 2
    talk.session.answer([(prediction(), EXTRAS)])

    assert talk.session.refusals == 0


# --- species ------------------------------------------------------------------------------------------------------------------------


def initialised(talk: Talk, text: bytes) -> Asked | Ended | More | None:
    assert talk.turn(Status()) is None
    assert talk.engine.hear() == [NeedInit()]
    result = talk.turn(Init(0, text), Status())
    if result is None:
        assert talk.engine.hear() == [Ready()]
    return result


@pytest.mark.parametrize("text", [b" species : OH2 , ", b'{"numbers": [8, 1, 1], "pbc": false}', b" species:O(H)2, pbc: no"])
def test_species_from_init_do_for_a_template(make_talk: MakeTalk, text: bytes) -> None:
    talk = make_talk(periodic=None)
    assert initialised(talk, text) is None
    asked = talk.turn(PosData(120.0 * np.eye(3), positions()), GetForce())

    assert isinstance(asked, Asked)
    assert asked.frames[0].numbers.tolist() == [8, 1, 1]
    assert asked.frames[0].periodic is (b"pbc" not in text)  # told by nobody else, the engine's cell is taken as it is


def test_without_species_nothing_is_evaluated_and_the_sentence_says_how_to_give_them(make_talk: MakeTalk) -> None:
    talk = make_talk(periodic=None)
    assert initialised(talk, b" ") is None
    ended = talk.turn(PosData(NO_CELL, positions()), GetForce())

    assert isinstance(ended, Ended)
    assert "3 atoms" in ended.fault
    assert "species" in ended.fault
    assert "--template" in ended.fault


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b" species : Xx3 , ", "unknown element 'Xx'"),
        (b" species : O(H2 , ", "no whole formula"),
        (b" species : OH)2 , ", "not opened"),
        (b" species : H9999999 , ", "more than"),
        (b" species : (((((((((H99)99)99)99)99)99)99)99)99) , ", "more than"),
        (b" species : 3H , ", "no formula"),
        (b" species : OH3 , ", "INIT lists 4 atoms, init.xyz has 3"),
        (b" species : HOH , ", "atom 0 is H in INIT and O in init.xyz"),
    ],
)
def test_species_that_cannot_be_are_refused_with_a_sentence(talk: Talk, text: bytes, problem: str) -> None:
    ended = initialised(talk, text)

    assert isinstance(ended, Ended)
    assert problem in ended.fault


def test_an_element_that_the_potential_does_not_know_is_refused_at_the_start(make_talk: MakeTalk) -> None:
    talk = make_talk(periodic=None)
    talk.session.elements, talk.session.potential = (1, 8), "toy"
    ended = initialised(talk, b" species : AuH , ")

    assert isinstance(ended, Ended)
    assert "INIT has Au, which toy does not know; it knows H, O" in ended.fault


def test_an_element_of_the_template_is_checked_although_the_engine_never_asked_for_init(talk: Talk) -> None:
    talk.session.elements, talk.session.potential = (8,), "toy"
    talk.engine.stream.send(encode(PosData(NO_CELL, positions())))
    talk.session.receive()
    ended = talk.session.turn()

    assert isinstance(ended, Ended)
    assert "init.xyz has H" in ended.fault


def test_a_new_init_may_bring_other_atoms(make_talk: MakeTalk) -> None:
    talk = make_talk(periodic=None)
    assert initialised(talk, b" species : OH2 , ") is None
    assert isinstance(talk.turn(PosData(NO_CELL, positions()), GetForce(), Status()), Asked)
    talk.session.answer([(prediction(), EXTRAS)])
    talk.engine.stream.send(encode(Init(1, b" species : CuAu , ")) + encode(PosData(NO_CELL, positions()[:2])))
    talk.session.receive()
    asked = talk.session.turn()

    assert isinstance(asked, Asked)
    assert asked.frames[0].numbers.tolist() == [29, 79]


# --- batches ------------------------------------------------------------------------------------------------------------------------


def test_the_padding_of_a_batch_is_neither_evaluated_nor_missing_from_the_answer(talk: Talk) -> None:
    talk.get_ready(b" batch_size:4")
    frames = [PosData(NO_CELL, positions(seed)) for seed in (0, 1)]
    asked = talk.turn(PosBatch.of(frames, 4), GetForce(), Status())
    assert isinstance(asked, Asked)
    assert len(asked.frames) == 2
    told = [Prediction(float(index), np.full((3, 3), index + 1.0), np.eye(3)) for index in range(2)]
    talk.session.answer([(one, EXTRAS) for one in told])
    force, ready = talk.engine.hear()

    assert isinstance(force, ForceBatch)
    assert ready == Ready()
    np.testing.assert_allclose(force.energies * ase_units.Hartree, [0.0, 1.0, 1.0, 1.0], rtol=RTOL)
    assert (force.forces[1] == force.forces[3]).all()
    assert len(force.extras) == 4
    assert talk.session.dialect == "batched 4"


# --- limits -------------------------------------------------------------------------------------------------------------------------


def test_a_message_that_is_not_finished_in_time_is_overdue(make_talk: MakeTalk) -> None:
    talk = make_talk()
    talk.get_ready()
    whole = encode(PosData(NO_CELL, positions()))
    talk.engine.stream.send(whole[:50])
    talk.session.receive()
    assert talk.session.turn() is None
    limit = Patience().message

    assert talk.session.overdue(100.0) == ""
    assert talk.session.overdue(100.0 + 0.9 * limit) == ""
    assert "50 bytes of a message" in talk.session.overdue(100.0 + 1.1 * limit)
    talk.engine.stream.send(whole[50:])
    talk.session.receive()
    assert isinstance(talk.session.turn(), Asked)
    assert talk.session.overdue(1e6) == ""  # the engine waits for us now


def test_a_silent_engine_is_never_overdue(talk: Talk) -> None:
    talk.get_ready()

    assert [talk.session.overdue(now) for now in (1.0, 1e3, 1e6)] == [""] * 3


def test_an_engine_that_reads_nothing_is_overdue(make_talk: MakeTalk) -> None:
    talk = make_talk()
    talk.get_ready()
    assert isinstance(talk.turn(PosData(NO_CELL, positions()), GetForce()), Asked)
    talk.session.answer([(prediction(), b'{"a": "' + b"x" * 4_000_000 + b'"}')])
    limit = Patience().unread

    assert talk.session.overdue(100.0) == ""
    assert "has not read" in talk.session.overdue(100.0 + 1.1 * limit)


def test_an_engine_that_talks_without_end_leaves_turns_to_the_others_and_is_ended(talk: Talk) -> None:
    for _ in range(1000):
        talk.engine.stream.send(encode(Status()) * 10)
        talk.session.receive()
        while isinstance(result := talk.session.turn(now=5.0), More):
            pass
        talk.engine.stream.receive(talk.engine.connection)
        if isinstance(result, Ended):
            break

    assert isinstance(result, Ended)
    assert "2000 messages" in result.fault


@pytest.mark.parametrize("text", [b"," * 60_000, b'{"numbers": [' + b"1," * 29_000 + b"1]}"], ids=["commas", "numbers"])
def test_long_inits_without_end_are_few_and_one_a_turn(talk: Talk, text: bytes) -> None:
    """Reading one takes its time: the others have their turn before the next, and after some of them within a second it is enough."""
    talk.session._template = talk.session.species = None
    turns = 0
    result: Asked | Ended | More | None = More()
    while not isinstance(result, Ended) and turns < 100:
        talk.engine.stream.send(encode(Init(0, text)))
        talk.session.receive()
        result = talk.session.turn(now=5.0)
        turns += isinstance(result, More)

    assert isinstance(result, Ended)
    assert "no frame among them, which was expected" in result.fault
    assert turns < 12


@pytest.mark.parametrize("formula", ["(H99999)0" * 6000, "((((H99)99)99)99)9", "H100001"])
def test_a_formula_that_takes_long_to_read_is_refused_at_once(formula: str) -> None:
    """Nobody in the gateway waits for atoms that are made to be thrown away."""
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"formula|more than 100000 atoms"):
        from_formula(formula)

    assert time.process_time() - began < 0.1


def test_what_an_engine_did_when_it_left_is_told(talk: Talk) -> None:
    """Where the conversation was when the connection closed, and what was expected then, is for the log."""
    talk.get_ready()
    talk.engine.stream.send(encode(PosData(NO_CELL, positions()))[:100])
    assert talk.turn() is None
    talk.engine.stream.close()
    talk.session.receive()
    result = talk.session.turn()

    assert result == Ended()
    assert isinstance(result, Ended)
    assert result.left == "it closed the connection after 100 bytes of a message, where the rest was expected"


@pytest.mark.parametrize(
    ("events", "left"),
    [
        ((), "where STATUS, INIT or POSDATA was expected"),
        ((PosData(NO_CELL, np.diag([1.0, 2.0, 3.0])),), "while its forces were computed, where GETFORCE was expected"),
    ],
)
def test_an_engine_that_leaves_between_messages(talk: Talk, events: tuple[Event, ...], left: str) -> None:
    talk.get_ready()
    talk.turn(*events)
    talk.engine.stream.close()
    talk.session.receive()
    result = talk.session.turn()

    assert isinstance(result, Ended)
    assert result.left == f"it closed the connection {left}"


def test_a_busy_engine_with_large_frames_is_not_taken_for_one_that_stalls(talk: Talk) -> None:
    """Looked at in the middle of a message each time, and each time it is another one."""
    talk.get_ready()
    limit = Patience().message
    whole = encode(PosData(NO_CELL, positions()))
    talk.engine.stream.send(whole[:50])
    talk.session.receive()
    assert talk.session.overdue(100.0) == ""
    talk.engine.stream.send(whole[50:] + encode(GetForce()) + encode(Status())[:4])
    talk.session.receive()
    assert isinstance(talk.session.turn(), Asked)
    talk.session.answer([(prediction(), EXTRAS)])

    assert talk.session.overdue(100.0 + 1.5 * limit) == ""
    assert "4 bytes of a message" in talk.session.overdue(100.0 + 3.0 * limit)
