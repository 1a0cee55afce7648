"""Clients that keep the rules, and every way in which they may not, over real sockets; the time is a clock of the test's where it matters."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tumbaga.socket_protocol.clients import ClientLimits, Clients, Finished, JobFailedError
from tumbaga.socket_protocol.codec import encode
from tumbaga.socket_protocol.errors import AddressInUseError
from tumbaga.socket_protocol.events import Event, Exit, ForceReady, GetForce, HaveData, Init, NeedInit, PosData, Ready, Status
from tumbaga.socket_protocol.peers import NeedsCellError
from tumbaga.socket_protocol.streams import Address
from tumbaga.socket_protocol.testing import BlockingDriver, connect

TIMEOUT = 20.0
ATOMS = 4
LIMITS = ClientLimits(ready=10.0, job=100.0, message=5.0, reading=7.0, clients=8, newcomers=8)
CELL = np.diag([20.0, 21.0, 22.0])


class Clock:
    """Stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """A unix socket in a folder of its own; nothing is left there."""
    monkeypatch.chdir(tmp_path)
    yield Address.unix("./s")
    assert not os.path.lexists("s")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def frame(seed: int = 0, atoms: int = ATOMS) -> PosData:
    return PosData(CELL, np.random.default_rng(seed).normal(size=(atoms, 3)))


def answer_to(asked: PosData, extras: bytes = b"") -> ForceReady:
    """Forces that belong to these positions and to no others."""
    return ForceReady(float(asked.positions.sum()), -asked.positions, np.diag(asked.cell.diagonal()), extras)


class Working:
    """BlockingDrivers in threads; they end when the pool closes."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def start(self, address: Address, compute: Callable[[PosData], ForceReady] = answer_to) -> BlockingDriver:
        driver = BlockingDriver(connect(address, TIMEOUT), compute, timeout=TIMEOUT)
        self.threads.append(threading.Thread(target=driver.serve, name="client"))
        self.threads[-1].start()
        return driver


@pytest.fixture
def working() -> Iterator[Working]:
    made = Working()
    yield made
    for thread in made.threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()


@pytest.fixture
def clients(address: Address, clock: Clock, working: Working) -> Iterator[Clients]:
    """A pool that ends before the clients at work are waited for."""
    with Clients([address], limits=LIMITS, clock=clock) as made:
        yield made


def until(clients: Clients, reached: Callable[[], bool]) -> list[Finished]:
    """Take turns until something is so, and return the jobs that ended meanwhile."""
    finished: list[Finished] = []
    end = time.monotonic() + TIMEOUT
    while not reached():
        assert time.monotonic() < end, clients
        finished += clients.turn(0.05)
    return finished


def has_lost(clients: Clients, count: int) -> bool:
    return clients.lost == count


def holds(clients: Clients, connected: int, refused: int) -> bool:
    return (clients.connected, clients.refused) == (connected, refused)


def finished(clients: Clients, count: int = 1) -> list[Finished]:
    """Take turns until so many jobs have ended."""
    ended: list[Finished] = []
    end = time.monotonic() + TIMEOUT
    while len(ended) < count:
        assert time.monotonic() < end, clients
        ended += clients.turn(0.05)
    return ended


class Raw:
    """A client that says what the test wants."""

    def __init__(self, clients: Clients, address: Address) -> None:
        self.clients = clients
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(address.path)
        self.socket.setblocking(False)
        self.heard = b""
        self.gone = False

    def listen(self) -> bytes:
        """Everything heard so far."""
        try:
            while data := self.socket.recv(1 << 16):
                self.heard += data
            self.gone = True
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self.gone = True
        return self.heard

    def expect(self, *events: Event) -> None:
        """Wait for exactly these messages."""
        wanted = b"".join(encode(event) for event in events)
        until(self.clients, lambda: len(self.listen()) >= len(wanted))
        assert self.heard == wanted
        self.heard = b""

    def say(self, *events: Event | bytes) -> None:
        self.socket.sendall(b"".join(event if isinstance(event, bytes) else encode(event) for event in events))

    def expect_the_end(self) -> list[Finished]:
        """Wait until told EXIT and closed."""
        ended = until(self.clients, lambda: bool(self.listen()) and self.gone)
        assert self.heard.endswith(encode(Exit()))
        return ended

    def get_ready(self) -> None:
        self.expect(Status())
        self.say(Ready())
        until(self.clients, lambda: self.clients.free > 0)


@pytest.fixture
def raw(clients: Clients, address: Address) -> Iterator[Callable[[], Raw]]:
    made: list[Raw] = []

    def make() -> Raw:
        made.append(Raw(clients, address))
        return made[-1]

    yield make
    for one in made:
        one.socket.close()


# --- the normal course --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["unix", "tcp4", "tcp6"])
def test_forces_come_back_for_the_frames_they_belong_to(where: str, address: Address, working: Working) -> None:
    """Several clients, more frames than clients: every ticket gets the forces of its own frame, and every client has work."""
    if where != "unix":
        address = Address.tcp("127.0.0.1" if where == "tcp4" else "::1", 0)
    with Clients([address]) as clients:
        drivers = [working.start(clients.addresses[0]) for _ in range(3)]
        until(clients, lambda: clients.free == 3)
        tickets = {clients.submit(frame(seed)): seed for seed in range(30)}
        ended = finished(clients, 30)

        assert {done.ticket for done in ended} == set(tickets)
        for done in ended:
            asked = frame(tickets[done.ticket])
            assert done.result is not None
            assert np.array_equal(done.result.forces, -asked.positions)
            assert done.result.energy == asked.positions.sum()
            assert np.array_equal(done.result.virial, CELL)
            assert done.result.has_stress
        until(clients, lambda: clients.free == 3)
        assert (clients.connected, clients.waiting, clients.refused, clients.lost) == (3, 0, 0, 0)
    assert sum(driver.frames for driver in drivers) == 30
    assert min(driver.frames for driver in drivers) > 0
    assert [len(driver.inits) for driver in drivers] == [1, 1, 1]


def test_a_client_is_proven_by_the_classic_cycle_and_then_asked_in_one_write(clients: Clients, raw: Callable[[], Raw]) -> None:
    """The bytes, message by message: what is written together stands together."""
    client = raw()
    client.get_ready()
    first, second = frame(1), frame(2)
    clients.submit(first)
    client.expect(first, Status())
    client.say(HaveData())
    client.expect(GetForce())
    client.say(answer_to(first))
    client.expect(Status())
    client.say(Ready())
    until(clients, lambda: clients.free == 1)
    clients.submit(second)
    client.expect(second, GetForce(), Status())
    client.say(answer_to(second), Ready())
    until(clients, lambda: clients.free == 1)


def test_init_is_sent_when_asked_and_each_time_with_the_rid_of_the_job(clients: Clients, raw: Callable[[], Raw]) -> None:
    """QE asks after every force, and keeps its density as long as the rid stays the same; before there is a job nobody knows the rid."""
    client = raw()
    client.expect(Status())
    client.say(NeedInit())
    until(clients, lambda: clients.free == 1)
    for forces, rid in enumerate((7, 7, -3)):
        asked = frame(forces)
        clients.submit(asked, rid)
        client.expect(Init(rid, b" "), Status())
        client.say(Ready())
        if not forces:
            client.expect(asked, Status())
            client.say(HaveData())
            client.expect(GetForce())
            client.say(answer_to(asked))
            client.expect(Status())
            client.say(NeedInit())
        else:
            client.expect(asked, GetForce(), Status())
            client.say(answer_to(asked), NeedInit())
        until(clients, lambda: clients.free == 1)


def test_an_old_result_is_fetched_and_thrown_away(clients: Clients, raw: Callable[[], Raw]) -> None:
    """A client whose server left it with a result says HAVEDATA first; its forces belong to no frame of ours."""
    client = raw()
    client.expect(Status())
    ticket = clients.submit(frame(5))
    client.say(HaveData())
    client.expect(GetForce())
    client.say(answer_to(frame(1)))
    client.expect(Status())
    client.say(Ready())
    client.expect(frame(5), Status())
    client.say(HaveData())
    client.expect(GetForce())
    client.say(answer_to(frame(5)))
    (done,) = finished(clients)

    assert done.ticket == ticket
    assert done.result is not None
    assert np.array_equal(done.result.forces, -frame(5).positions)


def test_nobody_waits_for_a_slow_client(clients: Clients, raw: Callable[[], Raw], address: Address, working: Working) -> None:
    """No barrier: while one client computes, another one works off the rest of the queue."""
    slow = raw()
    slow.get_ready()
    held = clients.submit(frame(0))
    slow.expect(frame(0), Status())
    working.start(address)
    tickets = [clients.submit(frame(seed)) for seed in range(1, 20)]
    ended = finished(clients, 19)

    assert [done.ticket for done in ended] == tickets
    slow.say(HaveData())
    slow.expect(GetForce())
    slow.say(answer_to(frame(0)))
    assert [done.ticket for done in finished(clients)] == [held]


def test_a_trajectory_stays_with_its_client_where_that_is_free(clients: Clients, address: Address, working: Working) -> None:
    """A client that has the density of the last step of a trajectory gets the next one."""
    working.start(address)
    working.start(address)
    until(clients, lambda: clients.free == 2)
    for seed in range(3):
        clients.submit(frame(seed), rid=1)
        clients.submit(frame(seed), rid=2)
        pair = finished(clients, 2)
        until(clients, lambda: clients.free == 2)
        assert len(pair) == 2
    by_rid = {client.rid: client.forces for client in clients._clients}
    assert by_rid == {1: 3, 2: 3}


def test_forces_wait_for_a_client_that_is_not_there_yet(clients: Clients, address: Address, working: Working) -> None:
    ready = threading.Timer(0.0, lambda: working.start(address))
    ready.start()
    done = clients.forces(frame(3))
    ready.join()

    assert done.result is not None
    assert np.array_equal(done.result.forces, -frame(3).positions)


def test_no_client_within_the_time_is_a_sentence(address: Address) -> None:
    with (
        Clients([address], "cp2k") as clients,
        pytest.raises(JobFailedError, match=r"within 0\.05 s: no client is connected at unix:.*/s; start one there, kind cp2k"),
    ):
        clients.forces(frame(), timeout=0.05)
    assert clients.waiting == 0


def test_a_frame_of_another_size_waits_and_the_reason_is_told(clients: Clients, address: Address, working: Working) -> None:
    """A client has its own input with so many atoms: it never gets a frame with more or fewer."""
    working.start(address)
    clients.forces(frame(), timeout=TIMEOUT)
    until(clients, lambda: clients.free == 1)
    ticket = clients.submit(frame(atoms=ATOMS + 1))
    clients.turn()

    assert clients.free == 1
    assert f"the frame has {ATOMS + 1} atoms and the clients at unix:" in clients.obstacle
    assert clients.obstacle.endswith(f"compute [{ATOMS}]")
    clients.withdraw(ticket)
    assert (clients.obstacle, clients.waiting) == ("", 0)


def test_a_client_that_needs_a_cell_is_not_asked_without_one(address: Address) -> None:
    with Clients([address], "qe") as clients, pytest.raises(NeedsCellError):
        clients.submit(PosData(np.zeros((3, 3)), np.zeros((1, 3))))


def test_localhost_is_both_families(working: Working) -> None:
    """LAMMPS takes the first address that localhost has, others the IPv4 one only."""
    with Clients([Address.tcp("localhost", 0)]) as clients:
        hosts = {address.host: address for address in clients.addresses}
        if "::1" not in hosts:
            pytest.skip("no IPv6 here")
        assert set(hosts) == {"127.0.0.1", "::1"}
        assert len({address.port for address in clients.addresses}) == 1
        for address in clients.addresses:
            working.start(address)
        until(clients, lambda: clients.free == 2)


def test_several_addresses_are_listened_at_or_none(address: Address) -> None:
    other = Address.unix("./t")
    with Clients([address, other]) as clients:
        assert clients.addresses == (address, other)
        with pytest.raises(AddressInUseError):
            Clients([Address.unix("./u"), other])
        assert not os.path.lexists("u")
    assert not os.path.lexists("t")


def test_what_a_client_says_beside_its_forces_is_read(clients: Clients, address: Address, working: Working) -> None:
    working.start(address, lambda asked: answer_to(asked, b'{"dipole": [0.0, 0.0, 1.0]}'))
    done = clients.forces(frame(), timeout=TIMEOUT)

    assert done.extras.values == {"dipole": [0.0, 0.0, 1.0]}


def test_an_error_that_a_client_reports_in_its_extras_fails_the_job_and_keeps_the_client(
    clients: Clients, address: Address, working: Working
) -> None:
    """It answered by the rules and will not do better next time: the job is not given to another."""
    working.start(address, lambda asked: answer_to(asked, b'{"error": "SCF did not converge"}'))
    with pytest.raises(JobFailedError, match=r"client unix:.* reports an error: SCF did not converge"):
        clients.forces(frame(), timeout=TIMEOUT)

    assert (clients.connected, clients.lost) == (1, 0)


def test_at_the_end_clients_are_told_exit(address: Address) -> None:
    """i-PI's Python driver spins for ever at a connection that is merely closed."""
    clients = Clients([address])
    client = Raw(clients, address)
    client.get_ready()
    closing = threading.Thread(target=clients.close, name="closing")
    closing.start()
    client.socket.settimeout(TIMEOUT)
    heard = client.socket.recv(12)
    client.socket.close()
    closing.join(LIMITS.farewell / 2)

    assert heard == encode(Exit())
    assert not closing.is_alive()  # it did not wait longer than the client took
    clients.close()


# --- clients that break the rules, or leave -------------------------------------------------------------------------------------------


def lead(client: Raw, state: str, asked: PosData) -> None:
    """Bring a client that has said nothing yet to a state; from READY on, `asked` is the job."""
    if state == "connected":
        return
    client.expect(Status())
    if state == "greeted":
        return
    client.say(NeedInit() if state == "init" else Ready())
    if state == "init":
        client.expect(Init(0, b" "), Status())
        return
    client.expect(asked, Status())
    if state == "computing":
        return
    client.say(HaveData())
    client.expect(GetForce())
    if state == "asked":
        return
    client.say(encode(answer_to(asked))[:50])


STATES = ["connected", "greeted", "init", "computing", "asked", "halfway"]


@pytest.mark.parametrize("state", STATES)
def test_a_client_may_die_in_any_state_and_another_one_does_its_work(
    state: str, clients: Clients, raw: Callable[[], Raw], address: Address, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    ticket = clients.submit(frame(9))
    client = raw()
    lead(client, state, frame(9))
    client.socket.close()
    until(clients, lambda: clients.lost == 1)
    working.start(address)
    (done,) = finished(clients)

    assert done.ticket == ticket
    assert done.result is not None
    assert np.array_equal(done.result.forces, -frame(9).positions)
    (line,) = [record.getMessage() for record in caplog.records if "ended:" in record.getMessage()]
    assert "it closed the connection" in line
    assert ("READY or NEEDINIT was expected" in line) == (state in ("connected", "greeted", "init"))
    assert (f"for {ATOMS} atoms was expected" in line) == (state in ("computing", "asked", "halfway"))
    assert ("after 50 bytes of a message" in line) == (state == "halfway")


BAD_FORCES = {
    "NaN": (ForceReady(1.0, np.zeros((ATOMS, 3)), np.zeros((3, 3))), "FORCEREADY forces with a NaN"),
    "atoms": (answer_to(frame(0, ATOMS + 2)), f"sent {ATOMS + 2} atoms, {ATOMS} were expected"),
    "extras": (ForceReady(0.0, np.zeros((ATOMS, 3)), np.zeros((3, 3)), bytes(LIMITS.max_extras + 1)), "for the length of the extras"),
}


@pytest.mark.parametrize("what", BAD_FORCES)
def test_bad_forces_end_the_client_and_never_become_a_result(
    what: str, clients: Clients, raw: Callable[[], Raw], address: Address, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    answer, sentence = BAD_FORCES[what]
    data = bytearray(encode(answer))
    if what == "NaN":
        data[24:32] = np.array([np.nan]).tobytes()
    clients.submit(frame(2))
    client = raw()
    lead(client, "asked", frame(2))
    client.say(bytes(data[:200]))
    client.expect_the_end() if what == "extras" else until(clients, lambda: clients.lost == 1)
    working.start(address)
    (done,) = finished(clients)

    assert done.result is not None
    assert np.array_equal(done.result.forces, -frame(2).positions)
    assert sentence in caplog.text


OUT_OF_STEP = {
    "garbage": (
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        "received the header b'HTTP/1.1 400' where NEEDINIT, READY, HAVEDATA, FORCEREADY was expected",
    ),
    "an MDI handshake": (b"\x01\0\0\0\x04\0\0\0\x1b\0\0\0", "MDI handshake: start the peer in its i-PI mode"),
    "an engine": (encode(Status()), "two engines seem to be connected"),
    "forces": (encode(answer_to(frame())), "received FORCEREADY in state UNKNOWN, where NEEDINIT or READY or HAVEDATA was expected"),
}


@pytest.mark.parametrize("what", OUT_OF_STEP)
def test_what_is_no_answer_to_status_ends_the_client_with_a_sentence(
    what: str, clients: Clients, raw: Callable[[], Raw], caplog: pytest.LogCaptureFixture
) -> None:
    said, sentence = OUT_OF_STEP[what]
    client = raw()
    client.expect(Status())
    client.say(said)
    client.expect_the_end()

    assert sentence in caplog.text
    assert clients.connected == 0


def test_ready_after_the_frame_means_that_it_was_ignored(
    clients: Clients, raw: Callable[[], Raw], caplog: pytest.LogCaptureFixture
) -> None:
    clients.submit(frame())
    client = raw()
    lead(client, "computing", frame())
    client.say(Ready())
    client.expect_the_end()

    assert f"it sent READY where HAVEDATA for {ATOMS} atoms was expected: it ignored the frame" in caplog.text
    assert clients.waiting == 1


def test_a_client_that_speaks_unasked_ends(clients: Clients, raw: Callable[[], Raw], caplog: pytest.LogCaptureFixture) -> None:
    client = raw()
    client.get_ready()
    client.say(Ready())
    client.expect_the_end()

    assert "received READY in state READY, where nothing was expected" in caplog.text


def test_asking_for_init_for_ever_ends_the_client(clients: Clients, raw: Callable[[], Raw], caplog: pytest.LogCaptureFixture) -> None:
    clients.submit(frame())
    client = raw()
    client.expect(Status())
    for _ in range(2):
        client.say(NeedInit())
        client.expect(Init(0, b" "), Status())
    client.say(NeedInit())
    client.expect_the_end()

    assert "it sent NEEDINIT after INIT was sent 2 times, where READY was expected" in caplog.text
    assert clients.waiting == 1


def test_having_old_data_for_ever_ends_the_client(clients: Clients, raw: Callable[[], Raw], caplog: pytest.LogCaptureFixture) -> None:
    client = raw()
    client.expect(Status())
    client.say(HaveData())
    client.expect(GetForce())
    client.say(answer_to(frame()))
    client.expect(Status())
    client.say(HaveData())
    client.expect_the_end()

    assert "it sent HAVEDATA again after its old result was fetched" in caplog.text


def test_a_job_that_two_clients_failed_at_is_reported_with_what_both_did(clients: Clients, raw: Callable[[], Raw]) -> None:
    """The second failure may be the frame's own; a third client is not risked."""
    ticket = clients.submit(frame())
    for _ in range(2):
        client = raw()
        lead(client, "computing", frame())
        client.socket.close()
        ended = until(clients, lambda: clients.connected == 0)

    (done,) = ended or clients.turn()
    assert (done.ticket, done.result) == (ticket, None)
    assert done.problem.startswith("2 clients failed at this frame: client unix:")
    assert done.problem.count("it closed the connection where HAVEDATA") == 2
    assert clients.waiting == 0


def test_a_client_that_never_got_the_frame_has_not_failed_at_it(clients: Clients, raw: Callable[[], Raw]) -> None:
    """However many leave before they are ready, the job is still there."""
    clients.submit(frame())
    for lost in range(1, 5):
        client = raw()
        lead(client, "init", frame())
        client.socket.close()
        assert until(clients, partial(has_lost, clients, lost)) == []
    assert clients.waiting == 1


# --- limits of time and number ----------------------------------------------------------------------------------------------------------

OVERDUE = {
    "connected": (10.0, "it sent nothing where READY or NEEDINIT was expected within 10 s"),
    "init": (10.0, "it sent nothing where READY or NEEDINIT was expected within 10 s"),
    "computing": (100.0, f"it sent nothing where HAVEDATA for {ATOMS} atoms was expected within 100 s"),
    "asked": (100.0, f"it sent nothing where FORCEREADY for {ATOMS} atoms was expected within 100 s"),
    "halfway": (5.0, "it sent 50 bytes of a message, and the rest was expected within 5 s"),
}


@pytest.mark.parametrize("state", OVERDUE)
def test_silence_ends_a_client_when_its_time_is_up_and_not_before(
    state: str, clients: Clients, raw: Callable[[], Raw], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A silent client costs nothing but its place; its job goes to another one."""
    seconds, sentence = OVERDUE[state]
    clients.submit(frame())
    client = raw()
    lead(client, state, frame())
    until(clients, lambda: clients.connected == 1)
    if state == "halfway":
        until(clients, lambda: any(one.connection.partial for one in clients._clients))
    clock.now = seconds - 0.01
    clients.turn()
    assert clients.connected == 1
    clock.now = seconds
    client.expect_the_end()

    assert sentence in caplog.text
    assert clients.waiting == 1


def test_a_job_may_take_for_ever_where_there_is_no_limit(address: Address, clock: Clock) -> None:
    with Clients([address], limits=ClientLimits(job=None), clock=clock) as clients:
        client = Raw(clients, address)
        clients.submit(frame())
        lead(client, "computing", frame())
        clock.now = 1e7
        clients.turn()
        client.say(HaveData())
        client.expect(GetForce())
        client.say(answer_to(frame()))
        (done,) = finished(clients)
        client.socket.close()

    assert done.seconds == 1e7


def test_a_client_that_does_not_read_ends_when_its_time_is_up(
    clients: Clients, raw: Callable[[], Raw], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The frame is larger than what the system keeps for it, so the rest waits on our side."""
    client = raw()
    client.get_ready()
    clients.submit(frame(atoms=90_000))
    clients.turn()
    clock.now = LIMITS.reading or 0.0
    clients.turn()

    assert clients.connected == 0
    assert "it did not read what was sent to it within 7 s" in caplog.text


def test_a_withdrawn_job_is_not_reported_and_its_client_goes_on(clients: Clients, raw: Callable[[], Raw]) -> None:
    ticket = clients.submit(frame())
    client = raw()
    lead(client, "computing", frame())
    clients.withdraw(ticket)
    client.say(HaveData())
    client.expect(GetForce())
    client.say(answer_to(frame()))
    client.expect(Status())
    client.say(Ready())

    assert until(clients, lambda: clients.free == 1) == []


def test_a_flood_of_connections_is_refused_and_the_client_at_work_goes_on(
    address: Address, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    """Hundreds knock while a client works: it computes all its frames; they are told EXIT, and the log has one line about them."""
    limits = ClientLimits(clients=4, newcomers=4)
    with Clients([address], limits=limits) as clients:
        working.start(address)
        until(clients, lambda: clients.free == 1)
        tickets = [clients.submit(frame(seed)) for seed in range(200)]
        knocking: list[socket.socket] = []
        ended: list[Finished] = []
        while len(ended) < len(tickets) or clients.refused < 300:
            if len(knocking) < 400:
                one = socket.socket(socket.AF_UNIX)
                one.setblocking(False)
                if one.connect_ex(address.path) == 0:
                    knocking.append(one)
                else:
                    one.close()
            ended += clients.turn(0.05)
            assert clients.connected <= 4
        heard = [one.recv(100) for one in knocking[10:100]]
        for one in knocking:
            one.close()

    assert [done.ticket for done in ended if done.result is not None] == tickets
    assert set(heard) == {encode(Exit())}
    lines = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(lines) == 1
    assert "at most 4 may be connected and 4 come in a second" in lines[0]


def test_after_so_many_refusals_nobody_is_looked_at_for_a_moment(address: Address, clock: Clock) -> None:
    """A flood does not get more of our time by being larger; whoever still knocks is answered when the moment is over."""
    with Clients([address], limits=ClientLimits(clients=1, newcomers=1), clock=clock) as clients:
        knocking: list[Raw] = []
        for _ in range(220):
            knocking.append(Raw(clients, address))
            clients.turn()
        refused = clients.refused
        assert 200 <= refused < 210
        started = time.monotonic()
        clients.turn(0.05)
        assert time.monotonic() - started >= 0.04  # asleep, although somebody knocks
        started = time.monotonic()
        clients.turn(TIMEOUT)
        assert time.monotonic() - started < 1.0  # not longer than the door rests
        clock.now += 1.0
        until(clients, lambda: clients.refused + clients.connected + clients.lost >= 220)
        for one in knocking:
            one.socket.close()


def test_more_may_come_in_as_time_goes_on(address: Address, clock: Clock) -> None:
    """Two in a second, four in all; a place that became free is given again."""
    limits = ClientLimits(clients=4, newcomers=2)
    with Clients([address], limits=limits, clock=clock) as clients:
        knocking: list[Raw] = []
        for now, connected, refused in ((0.0, 2, 1), (0.5, 3, 3), (1.0, 4, 5), (5.0, 4, 8)):
            clock.now = now
            knocking += [Raw(clients, address) for _ in range(3)]
            until(clients, partial(holds, clients, connected, refused))
        knocking[0].socket.close()
        until(clients, lambda: clients.connected == 3)
        knocking.append(Raw(clients, address))
        until(clients, lambda: clients.connected == 4)
        for one in knocking:
            one.socket.close()


def test_without_descriptors_nobody_comes_in_and_nothing_spins(
    address: Address, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system has no descriptor left for a moment: the door rests for a second, and then the same client comes in."""
    with Clients([address], clock=clock) as clients:
        (listener,) = clients._door.listeners
        whole = listener.accept

        def none_left() -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(listener, "accept", none_left)
        client = Raw(clients, address)
        clients.turn()
        assert "no client can come in at unix" in caplog.text
        monkeypatch.setattr(listener, "accept", whole)
        started = time.monotonic()
        clients.turn(0.1)
        assert time.monotonic() - started >= 0.09  # asleep, although somebody knocks
        assert clients.connected == 0
        clock.now = 1.0
        client.get_ready()
        client.socket.close()


def test_the_pool_can_be_waited_for_with_other_things(clients: Clients, raw: Callable[[], Raw]) -> None:
    """Its descriptor is readable when a turn has something to do."""
    import select

    poller = select.poll()
    poller.register(clients.fileno(), select.POLLIN)
    assert poller.poll(0) == []
    client = raw()
    assert poller.poll(1000 * TIMEOUT)
    client.get_ready()
    assert poller.poll(0) == []


def test_a_client_that_leaves_in_peace_is_no_warning(clients: Clients, raw: Callable[[], Raw], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client = raw()
    client.get_ready()
    client.socket.close()
    until(clients, lambda: clients.connected == 0)

    (line,) = [record for record in caplog.records if "ended" in record.getMessage()]
    assert line.levelno == logging.INFO
    assert line.getMessage().endswith("it closed the connection")
