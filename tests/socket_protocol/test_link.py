"""Gateway and evaluators on real sockets: whole messages of any size, names, successors, and peers that are gone."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.link import Hub, Line, pack

TIMEOUT = 20.0


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    bus.make_folder(tmp_path)
    made = Hub("e")
    yield made
    made.close()
    assert not (tmp_path / bus.FOLDER / "e").exists()


@pytest.fixture
def line(hub: Hub) -> Iterator[Line]:
    made = Line("e", "first")
    assert made.connect()
    yield made
    made.close()


def heard(hub: Hub, count: int) -> list[tuple[str, bus.AnyMessage, list[bytes]]]:
    got: list[tuple[str, bus.AnyMessage, list[bytes]]] = []
    while len(got) < count:
        assert select.select([hub.fileno()], [], [], TIMEOUT)[0], f"only {got}"
        got += hub.receive()
    return got


def told(line: Line) -> list[tuple[bus.AnyMessage, list[bytes]]]:
    assert select.select([line.fileno()], [], [], TIMEOUT)[0]
    return list(line.receive())


READY = bus.EvaluatorReady("first", 1, 0, None, (1, 8), "toy")


def test_messages_arrive_whole_and_under_the_name_of_their_sender(hub: Hub, line: Line) -> None:
    array = np.arange(6.0)
    assert line.send(READY)
    assert line.send(bus.Evaluated(3, [1.0], [0.0], 0.1), [array, array[::2]])

    (first, ready, _), (_, answer, buffers) = heard(hub, 2)
    assert (first, ready) == ("first", READY)
    assert answer == bus.Evaluated(3, [1.0], [0.0], 0.1)
    assert [np.frombuffer(buffer).tolist() for buffer in buffers] == [array.tolist(), array[::2].tolist()]
    assert hub.send(bus.Load(1, "path", (0,)), to="first")
    assert told(line) == [(bus.Load(1, "path", (0,)), [])]


def test_nobody_of_that_name_takes_nothing(hub: Hub, line: Line) -> None:
    assert not hub.send(bus.Load(1, "path", (0,)), to="first")  # not heard yet
    line.send(READY)
    heard(hub, 1)
    assert hub.send(bus.Load(1, "path", (0,)), to="first")
    assert not hub.send(bus.Load(1, "path", (0,)), to="second")


def test_a_message_larger_than_any_socket_buffer_waits_until_it_is_read(hub: Hub, line: Line) -> None:
    line.send(READY)
    heard(hub, 1)
    large = np.random.default_rng(0).random(1_000_000)
    message = bus.Evaluate(1, [1], [False], [(0, 0, 1.0)])
    for _ in range(2):
        assert hub.send(message, [large], to="first")
    got: list[tuple[bus.AnyMessage, list[bytes]]] = []
    while len(got) < 2:
        readable, _, _ = select.select([line.fileno(), hub.fileno()], [], [], TIMEOUT)
        assert readable
        if hub.fileno() in readable:
            assert list(hub.receive()) == []  # goes on writing
        if line.fileno() in readable:
            got += line.receive()

    assert [message for message, _ in got] == [message] * 2
    assert all(np.array_equal(np.frombuffer(buffers[0]), large) for _, buffers in got)


def test_a_successor_takes_the_name_and_the_old_one_is_cut_off(hub: Hub, line: Line) -> None:
    line.send(READY)
    heard(hub, 1)
    successor = Line("e", "first")
    assert successor.connect()
    successor.send(bus.EvaluatorReady("first", 2, 0, None))
    heard(hub, 1)

    assert hub.send(bus.Load(1, "path", (0,)), to="first")
    assert len(told(successor)) == 1
    assert told(line) == []
    assert line.fileno() == -1
    successor.close()


def test_a_dead_evaluator_takes_nothing_more(hub: Hub, line: Line) -> None:
    line.send(READY)
    heard(hub, 1)
    line.close()
    select.select([hub.fileno()], [], [], TIMEOUT)
    assert list(hub.receive()) == []

    assert not hub.send(bus.Load(1, "path", (0,)), to="first")


def test_a_gateway_that_left_is_noticed_and_its_successor_is_found(hub: Hub, line: Line) -> None:
    line.send(READY)
    heard(hub, 1)
    hub.close()
    assert told(line) == []
    assert not line.connect()
    assert not line.send(READY)
    second = Hub("e")
    assert line.connect()
    assert line.send(READY)
    assert heard(second, 1)[0][0] == "first"
    second.close()


@pytest.mark.parametrize(
    "junk",
    [
        b"".join(pack([b"x"] * 17)),
        b"\0\0\0\0",
        b"\1\0\0\0\xff\xff\xff\xff",
        b"".join(pack([b"name"])) + b"".join(pack([b"no msgpack"])),
    ],
)
def test_junk_ends_its_own_connection_and_no_other(hub: Hub, line: Line, junk: bytes) -> None:
    line.send(READY)
    heard(hub, 1)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect("bus/e")
        stranger.sendall(junk)
        stranger.settimeout(TIMEOUT)
        while select.select([hub.fileno()], [], [], 0)[0]:
            assert list(hub.receive()) == []
        assert stranger.recv(1) == b""
    assert hub.send(bus.Load(1, "path", (0,)), to="first")


def test_a_file_left_by_a_killed_gateway_is_no_obstacle(hub: Hub, tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind("bus/other")
    left.close()
    Hub("other").close()


def test_who_hangs_up_is_told_once_unless_there_is_a_successor(hub: Hub, line: Line) -> None:
    line.send(READY)
    heard(hub, 1)
    assert hub.left() == []
    line.close()
    assert select.select([hub.fileno()], [], [], TIMEOUT)[0]
    assert list(hub.receive()) == []
    assert hub.left() == ["first"]
    assert hub.left() == []

    successors = [Line("e", "first") for _ in range(2)]
    for successor in successors:  # the second one takes the place of the first
        assert successor.connect()
        successor.send(READY)
        heard(hub, 1)
    assert hub.left() == []
    for successor in successors:
        successor.close()
