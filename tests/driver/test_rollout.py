"""How sessions come to a new version: over a ramp while they run, or with their next conversation."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver.pool import Pool
from tumbaga.driver.rollout import Rollout
from tumbaga.driver.session import Session
from tumbaga.driver.species import Species
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.streams import Address, Backoff, Stream

SERVING = bus.Serve(0, "", None, 2.0)
NEXT = bus.Serve(1, "versions/000001-abcd.safetensors", 0.5, 2.0)


class Channel:
    """Takes everything, as a gateway with its evaluators there does."""

    def send(self, message: bus.AnyMessage, buffers: Sequence[np.ndarray] = (), to: str = "") -> bool:
        return True


@pytest.fixture
def told() -> list[bus.NowServing]:
    return []


@pytest.fixture
def ends() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for one in opened:
        one.close()


def rollout(swap: str, told: list[bus.NowServing], *, held: bool = True) -> Rollout:
    """With one evaluator that has loaded the next version, unless it is said not to."""
    pool = Pool(Channel(), lambda: 0.0)
    pool.ready("e", bus.EvaluatorReady("e", 1, 0, None))
    if held:
        pool.loaded("e", bus.Loaded(1))
    learn = configs.changed(configs.Config(), [f"learn.swap={swap}", "learn.ramp_steps=2"]).learn
    return Rollout(learn, pool, SERVING, told.append, lambda *_, **__: None)


def session(versions: Rollout, ends: list[socket.socket], *, running: bool) -> Session:
    species = Species(np.array([29, 29]), False, "test")
    made = Session(Address.parse("unix:test", "/tmp/"), species, Backoff(Random(0)), versions.fresh_ramp())
    if running:
        ours, theirs = socket.socketpair()
        ends.extend((ours, theirs))
        made.connected(Stream(ours, "test"))
    versions.sessions = [made]
    return made


def serves(one: Session, calls: int) -> int:
    for _ in range(calls):
        one.ramp, mix = one.ramp.advance()
    return mix.new


def test_an_engine_moves_while_it_runs(told: list[bus.NowServing], ends: list[socket.socket]) -> None:
    """By default the ramp begins at once."""
    versions = rollout("ramp", told)
    one = session(versions, ends, running=True)
    versions.wanted(NEXT)
    assert serves(one, 3) == 1
    assert told == [bus.NowServing(1)]


def test_an_engine_keeps_its_version_until_it_comes_again(told: list[bus.NowServing], ends: list[socket.socket]) -> None:
    """At constant energy nothing changes in the middle; the next conversation begins with the newest."""
    versions = rollout("between", told)
    one = session(versions, ends, running=True)
    versions.wanted(NEXT)
    assert serves(one, 50) == 0
    assert told == [bus.NowServing(1)]
    versions.begun(one)
    assert serves(one, 1) == 1


def test_going_back_does_not_wait_for_the_next_conversation(told: list[bus.NowServing], ends: list[socket.socket]) -> None:
    """A version that is no good leaves a running engine too, whatever the setting."""
    versions = rollout("between", told)
    versions.wanted(NEXT)
    one = session(versions, ends, running=True)
    assert serves(one, 1) == 1
    versions.wanted(bus.Serve(0, "", None, 2.0, hurry=2))
    assert serves(one, 2) == 0


def test_who_has_no_engine_has_nothing_to_be_smooth_for(told: list[bus.NowServing], ends: list[socket.socket]) -> None:
    """A session that waits for its engine takes the version at once."""
    versions = rollout("between", told)
    one = session(versions, ends, running=False)
    versions.wanted(NEXT)
    assert serves(one, 1) == 1


def test_a_version_that_no_evaluator_holds_yet_is_awaited(told: list[bus.NowServing], ends: list[socket.socket]) -> None:
    """Nobody moves before the weights are there."""
    versions = rollout("ramp", told, held=False)
    one = session(versions, ends, running=True)
    versions.wanted(NEXT)
    awaited = versions.awaited(1)
    assert awaited
    assert serves(one, 50) == 0
    assert told == []
