"""Sockets that never block: addresses, dialling, listening, and every way in which a peer can go away."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from tumbaga.socket_protocol import errors
from tumbaga.socket_protocol.codec import encode
from tumbaga.socket_protocol.connection import NEED_DATA, Connection, Limits, Role
from tumbaga.socket_protocol.events import Exit, ForceReady, PosData, Status
from tumbaga.socket_protocol.streams import Address, Backoff, Dialling, Listener, Stream, dial, listen
from tumbaga.socket_protocol.testing import BlockingDriver, BlockingEngine, accept, connect

TIMEOUT = 20.0
KINDS = ["unix", "tcp4", "tcp6"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder of its own, where a relative path of a socket is always short enough."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loopback(kind: str) -> Address:
    if kind == "tcp6" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    return {"unix": Address.unix("./s"), "tcp4": Address.tcp("127.0.0.1", 0), "tcp6": Address.tcp("::1", 0)}[kind]


@pytest.fixture(params=KINDS)
def listener(request: pytest.FixtureRequest, here: Path) -> Iterator[Listener]:
    try:
        made = listen(loopback(request.param))
    except errors.AddressError:
        pytest.skip(f"no {request.param} here")
    with made:
        yield made


@pytest.fixture
def ends(listener: Listener) -> Iterator[tuple[Stream, Stream]]:
    """A dialled stream and the accepted one."""
    with connect(listener.address, TIMEOUT) as ours, accept(listener, TIMEOUT) as theirs:
        yield ours, theirs


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("unix:cuau", "unix:/tmp/ipi_cuau"),
        ("unix:/run/x/y", "unix:/run/x/y"),
        ("tcp:localhost:31415", "tcp:localhost:31415"),
        ("tcp:127.0.0.1:1", "tcp:127.0.0.1:1"),
        ("tcp:[::1]:65535", "tcp:[::1]:65535"),
        ("tcp:::1:80", "tcp:[::1]:80"),
    ],
)
def test_an_address_is_parsed_and_shown_in_full(text: str, full: str) -> None:
    assert str(Address.parse(text)) == full
    assert Address.parse(full) == Address.parse(text)


def test_the_prefix_is_put_before_names_and_not_before_paths(here: Path) -> None:
    assert Address.parse("unix:a", prefix="/run/b_").path == "/run/b_a"
    assert str(Address.parse("unix:./a", prefix="/run/b_")) == f"unix:{here}/a"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("unix:", "name of the socket is missing"),
        ("unix:" + "n" * 99, "has 108 bytes, the system allows 107"),
        ("unix:/" + "é" * 54, "has 109 bytes"),
        ("unix:a\0b", "NUL"),
        ("tcp:31415", "tcp:HOST:PORT"),
        ("tcp::31415", "host is missing"),
        ("tcp:localhost:", "port"),
        ("tcp:localhost:0", "port"),
        ("tcp:localhost:65536", "out of range"),
        ("tcp:localhost:-1", "port"),
        ("tcp:localhost:" + "9" * 5000, "port"),
        ("localhost:31415", "unix:NAME"),
        ("", "unix:NAME"),
    ],
)
def test_an_address_that_cannot_be_meant_is_refused_with_a_sentence(text: str, problem: str) -> None:
    with pytest.raises(errors.AddressError, match=problem):
        Address.parse(text)


def test_a_name_of_107_bytes_is_the_longest() -> None:
    assert len(Address.unix("n" * 98).path) == 107


def test_nobody_there_yet_is_told_apart_from_never(here: Path) -> None:
    with pytest.raises(errors.NotYetError) as missing:
        dial(Address.unix("./missing"))
    assert missing.value.errno == errno.ENOENT

    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind("stale")
    with pytest.raises(errors.NotYetError) as refused:
        dial(Address.unix("./stale"))
    assert refused.value.errno == errno.ECONNREFUSED
    with pytest.raises(errors.AddressError, match="port is missing"):
        dial(Address.tcp("localhost", 0))

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind("other")
        with pytest.raises(errors.DialError):
            dial(Address.unix("./other"))


def test_nobody_on_a_tcp_port_is_not_yet() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(errors.NotYetError):
            connect(Address.tcp("127.0.0.1", held.getsockname()[1]), TIMEOUT)


def test_a_full_queue_of_a_unix_listener_is_not_yet(here: Path) -> None:
    address = Address.unix("./s")
    waiting: list[Stream | Dialling] = []
    code = 0
    with listen(address, backlog=1):
        while not code and len(waiting) < 10:
            try:
                waiting.append(dial(address))
            except errors.NotYetError as full:
                code = full.errno
    for stream in waiting:
        stream.close()

    assert code == errno.EAGAIN


def test_localhost_is_found_in_whichever_family_it_listens() -> None:
    """Some resolvers know localhost in one family only, and i-PI listens in IPv4 only."""
    for host in ("127.0.0.1", "::1"):
        try:
            listener = listen(Address.tcp(host, 0))
        except errors.AddressError:
            continue
        with listener, connect(Address.tcp("localhost", listener.address.port), TIMEOUT), accept(listener, TIMEOUT):
            pass


def test_a_host_that_is_no_name_is_refused() -> None:
    with pytest.raises(errors.AddressError):
        dial(Address.tcp("a..b", 1))


def test_a_stale_file_is_replaced_a_used_one_is_not_and_a_plain_file_is_left_alone(here: Path) -> None:
    address = Address.unix("./s")
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind("s")
    with listen(address) as listener:
        with pytest.raises(errors.AddressInUseError, match="another program listens at unix:/"):
            listen(address)
        assert os.stat("s").st_mode & 0o777 == 0o600
        assert listener.fileno() >= 0
    assert not os.path.lexists("s")

    Path("s").write_text("precious")
    with pytest.raises(errors.AddressError, match="no socket"):
        listen(address)
    assert Path("s").read_text() == "precious"


def test_a_listener_removes_only_its_own_file(here: Path) -> None:
    first = listen(Address.unix("./s"))
    os.unlink("s")
    with listen(Address.unix("./s")):
        first.close()

        assert os.path.exists("s")


def test_listening_where_nobody_can_is_refused(here: Path) -> None:
    with pytest.raises(errors.AddressError):
        listen(Address.unix("./no/folder/s"))
    with listen(Address.tcp("127.0.0.1", 0)) as listener, pytest.raises(errors.AddressInUseError):
        listen(listener.address)


def test_listening_to_the_whole_net_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with listen(Address.tcp("127.0.0.1", 0)):
        assert not caplog.records
    with listen(Address.tcp("0.0.0.0", 0)):
        assert "other machines" in caplog.text


def test_nobody_to_accept_is_none(listener: Listener) -> None:
    assert listener.accept() is None


def test_a_tcp_stream_sends_small_messages_at_once_and_notices_dead_hosts(ends: tuple[Stream, Stream]) -> None:
    for stream in ends:
        with socket.socket(fileno=os.dup(stream.fileno())) as same:
            if same.family == socket.AF_UNIX:
                continue
            assert same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_a_frame_larger_than_any_socket_buffer_arrives_whole(ends: tuple[Stream, Stream]) -> None:
    ours, theirs = ends
    frame = PosData(np.eye(3), np.random.default_rng(0).normal(size=(100_000, 3)))
    driver, engine = Connection(Role.DRIVER), Connection(Role.ENGINE)
    theirs._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    theirs.send(encode(frame))
    assert theirs.pending_out
    with selectors.DefaultSelector() as selector:
        for stream, connection in ((ours, driver), (theirs, engine)):
            selector.register(stream, stream.interest(connection), connection)
        while (event := driver.next_event()) is NEED_DATA:
            ready = selector.select(TIMEOUT)
            assert ready
            for key, mask in ready:
                end = key.fileobj
                assert isinstance(end, Stream)
                if mask & selectors.EVENT_WRITE:
                    end.flush()
                if mask & selectors.EVENT_READ:
                    assert end.receive(key.data) <= (1 << 20) + (1 << 16)
                selector.modify(end, end.interest(key.data), key.data)

    assert isinstance(event, PosData)
    assert np.array_equal(event.positions, frame.positions)
    assert not theirs.pending_out


def wait_for(stream: Stream) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        assert selector.select(TIMEOUT)


def test_a_peer_that_closes_is_the_end_of_the_stream(ends: tuple[Stream, Stream]) -> None:
    ours, theirs = ends
    theirs.send(encode(Status()))
    theirs.close()
    driver = Connection(Role.DRIVER)
    while not driver.eof:
        wait_for(ours)
        ours.receive(driver)

    assert driver.next_event() == Exit()


def test_a_reset_is_the_end_of_the_stream(ends: tuple[Stream, Stream]) -> None:
    ours, theirs = ends
    with socket.socket(fileno=os.dup(theirs.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ours.send(b"unread")  # a unix socket closed with unread bytes is reset, a tcp socket because of its linger option
    theirs._socket.close()
    driver = Connection(Role.DRIVER)
    wait_for(ours)
    ours.receive(driver)

    assert driver.eof
    assert driver.next_event() == Exit()


def test_writing_to_a_peer_that_is_gone_raises_nothing_and_reads_as_the_end(ends: tuple[Stream, Stream]) -> None:
    ours, theirs = ends
    theirs.close()
    driver = Connection(Role.DRIVER)
    for _ in range(100):
        ours.send(b"x" * 10_000)
    while not driver.eof:
        wait_for(ours)
        ours.receive(driver)

    assert driver.next_event() == Exit()
    assert not ours.pending_out


def test_closing_with_unread_bytes_does_not_reset_the_peer(ends: tuple[Stream, Stream]) -> None:
    """An engine that gets a reset instead of the end of the stream hangs for ever."""
    ours, theirs = ends
    theirs.send(b"unread" * 1000)
    wait_for(ours)
    ours.send(b"EXIT        ")
    ours.close()
    ours.close()

    with socket.socket(fileno=os.dup(theirs.fileno())) as same:
        same.settimeout(TIMEOUT)
        heard = b""
        while piece := same.recv(100):
            heard += piece
    assert heard == b"EXIT        "


def test_a_peer_that_sends_without_end_is_read_only_as_far_as_wanted(ends: tuple[Stream, Stream]) -> None:
    ours, theirs = ends
    driver = Connection(Role.DRIVER, Limits(max_atoms=1, max_init=1))
    for _ in range(200):
        theirs.send(b"STATUS      " * 1000)
        theirs.flush()
        ours.receive(driver)

    assert not driver.wants_data
    assert ours.interest(driver) == 0
    assert driver.memory < driver.memory_bound


def zero(frame: PosData) -> ForceReady:
    return ForceReady(float(frame.positions.sum()), -frame.positions, frame.cell @ frame.cell.T, b'{"a": 1}')


@pytest.mark.parametrize("dialect", ["classic", "pipelined"])
def test_engine_and_driver_talk_over_a_real_socket(listener: Listener, dialect: str) -> None:
    driver = BlockingDriver(connect(listener.address, TIMEOUT), zero, timeout=TIMEOUT)
    thread = threading.Thread(target=driver.serve, name="driver")
    thread.start()
    cell = np.array([[9.0, 0.0, 0.0], [1.0, 8.0, 0.0], [2.0, 3.0, 7.0]])
    with BlockingEngine.accept(listener, dialect, timeout=TIMEOUT) as engine:  # type: ignore[arg-type]
        for n in (3, 3, 3):
            positions = np.random.default_rng(n).normal(size=(n, 3))
            result = engine.forces(positions, cell)

            assert np.array_equal(result.forces, -positions)
            assert np.array_equal(result.virial, cell @ cell.T)
            assert result.extras == b'{"a": 1}'
        assert engine.inits_sent == 1
    thread.join(TIMEOUT)

    assert not thread.is_alive()
    assert driver.frames == 3
    assert driver._talk.stream.closed


def test_waiting_for_a_silent_peer_ends(ends: tuple[Stream, Stream]) -> None:
    with pytest.raises(TimeoutError):
        BlockingEngine(ends[0], timeout=0.05).forces(np.zeros((1, 3)))


def test_back_off_doubles_up_to_its_most_and_starts_again() -> None:
    backoff = Backoff(Random(1))
    delays = [backoff.next_delay() for _ in range(12)]
    backoff.reset()

    expected = np.minimum(0.02 * 2.0 ** np.arange(12), 2.0)
    assert np.all(np.abs(np.array(delays) / expected - 1) <= 0.25)
    assert len({round(delay, 6) for delay in delays[-4:]}) == 4
    assert backoff.next_delay() < 0.026
