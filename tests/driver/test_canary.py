"""Of several engines one tries a new version first, and the others have it when that went well."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from random import Random

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver.canary import PATIENCE_S
from tumbaga.driver.pool import Pool
from tumbaga.driver.rollout import Rollout, shown
from tumbaga.driver.session import Session
from tumbaga.driver.species import Species
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.streams import Address, Backoff, Stream

BASE = bus.Serve(0, "", None, 2.0)
CALLS, RAMP, REST = 5, 2, 3


def version(number: int, hurry: int = 0) -> bus.Serve:
    return bus.Serve(number, f"versions/{number:06}-abcd.safetensors" if number else "", None, 2.0, hurry)


class Channel:
    """Takes everything, as a gateway with its evaluators there does."""

    def send(self, message: bus.AnyMessage, buffers: Sequence[np.ndarray] = (), to: str = "") -> bool:
        return True


class Bench:
    """A rollout with an evaluator that loads what it is to, and engines that ask.

    Args:
        settings: of learning, as `--set` has them.
    """

    def __init__(self, *settings: str) -> None:
        self._pool = Pool(Channel(), lambda: 0.0)
        self._pool.ready("e", bus.EvaluatorReady("e", 1, 0, None))
        told = [f"learn.canary_calls={CALLS}", f"learn.ramp_steps={RAMP}", f"learn.ramp_pause={REST}", *settings]
        self.told: list[bus.NowServing] = []
        self.logged: list[tuple[str, int]] = []
        learn = configs.changed(configs.Config(), told).learn
        self.rollout = Rollout(learn, self._pool, BASE, self.told.append, self._log)
        self.sessions: list[Session] = []
        self.ends: list[socket.socket] = []
        self.rollout.sessions = self.sessions

    def _log(self, level: str, event: str, **detail: object) -> None:
        self.logged.append((event, detail["version"]))  # type: ignore[arg-type]

    def engine(self, name: str, number: int = 1) -> Session:
        """An engine that is connected."""
        species = Species(np.array([29, 29]), False, "test")
        made = Session(Address.parse(f"unix:{name}", "/tmp/"), species, Backoff(Random(0)), self.rollout.fresh_ramp(), number)
        ours, theirs = socket.socketpair()
        self.ends.extend((ours, theirs))
        made.connected(Stream(ours, name))
        self.sessions.append(made)
        return made

    def publish(self, message: bus.Serve) -> None:
        """The learner wants it, and the evaluator loads it."""
        self.rollout.wanted(message)
        if message.version:
            loaded = bus.Loaded(message.version)
            self._pool.loaded("e", loaded)
            self.rollout.loaded(loaded)


@pytest.fixture
def make() -> Iterator[type[Bench]]:
    made: list[Bench] = []

    class Kept(Bench):
        def __init__(self, *settings: str) -> None:
            super().__init__(*settings)
            made.append(self)

    yield Kept
    for bench in made:
        for end in bench.ends:
            end.close()


def calls(one: Session, number: int) -> list[int]:
    """Let it ask so often; return the newest version that each answer was of."""
    versions = []
    for _ in range(number):
        one.ramp, mix = one.ramp.advance()
        one.forces += 1
        if mix.old == mix.new:
            one.answered_by(mix.new)
        versions.append(mix.new)
    return versions


def test_one_engine_goes_first(make: type[Bench]) -> None:
    """The one that has asked most moves at once, the other when the version has answered so many calls alone."""
    bench = make()
    slow, fast = bench.engine("slow"), bench.engine("fast")
    calls(slow, 3), calls(fast, 9)
    bench.publish(version(1))
    assert shown(bench.rollout.canary) == {"version": 1, "session": "unix:/tmp/fast"}
    assert calls(fast, RAMP + CALLS - 1)[-1] == 1
    bench.rollout.look(1.0)
    assert calls(slow, 10) == [0] * 10
    assert bench.rollout.serving == 0

    calls(fast, 1)
    bench.rollout.look(2.0)
    assert bench.rollout.canary is None
    assert calls(slow, RAMP + 1)[-1] == 1
    assert bench.rollout.serving == 1
    assert bench.logged == [("canary", 1), ("swap", 1)]
    assert bench.told == [bus.NowServing(1), bus.NowServing(1)]
    assert bench.rollout.swaps == 1


@pytest.mark.parametrize("settings", [("learn.canary_calls=0",), ("learn.swap=between",)])
def test_nobody_goes_first_if_that_is_not_wanted(make: type[Bench], settings: tuple[str, ...]) -> None:
    """Without calls to wait for, and where engines change between two conversations, every one at its own time."""
    bench = make(*settings)
    bench.engine("a"), bench.engine("b")
    bench.publish(version(1))
    assert bench.rollout.canary is None
    assert bench.rollout.serving == 1


def test_a_single_engine_waits_for_nobody(make: type[Bench]) -> None:
    """An address without an engine does not count."""
    bench = make()
    one = bench.engine("a")
    bench.engine("b").hang_up()
    bench.publish(version(1))
    assert calls(one, RAMP)[-1] == 1
    assert bench.rollout.serving == 1


def test_the_beads_of_one_engine_stay_together(make: type[Bench]) -> None:
    """All connections of an address are one run."""
    bench = make()
    beads = [bench.engine("pimd", number) for number in (1, 2)]
    other = bench.engine("other")
    calls(beads[0], 1)
    bench.publish(version(1))
    assert [calls(bead, RAMP)[-1] for bead in beads] == [1, 1]
    assert calls(other, RAMP)[-1] == 0

    alone = make()
    for number in (1, 2):
        alone.engine("pimd", number)
    alone.publish(version(1))
    assert alone.rollout.serving == 1


def test_a_bad_version_reaches_nobody_else(make: type[Bench]) -> None:
    """What is gone back from while one engine tries it: that engine goes back, the other never had it."""
    bench = make()
    first, other = bench.engine("first"), bench.engine("other")
    calls(first, 1)
    bench.publish(version(1))
    assert calls(first, RAMP + 1)[-1] == 1
    bench.publish(version(0, hurry=2))
    assert bench.rollout.canary is None
    assert calls(first, 2)[-1] == 0
    assert calls(other, 50) == [0] * 50
    bench.rollout.look(1.0)
    assert bench.rollout.serving == 0


def test_a_version_waits_for_the_judgement_on_the_one_before(make: type[Bench]) -> None:
    """Versions that come faster than they are tried: the others get each that was tried, and the newest is next."""
    bench = make()
    first, other = bench.engine("first"), bench.engine("other")
    calls(first, 1)
    for number in (1, 2, 3):
        bench.publish(version(number))
    assert set(calls(first, 50)) == {1}
    bench.rollout.look(1.0)
    assert bench.rollout.serving == 1
    assert shown(bench.rollout.canary) == {"version": 3, "session": "unix:/tmp/first"}
    assert calls(other, 50)[-1] == 1
    calls(first, RAMP + CALLS)
    bench.rollout.look(2.0)
    assert calls(other, 50)[-1] == 3


def test_another_goes_first_where_one_does_not_go_on(make: type[Bench]) -> None:
    """An engine that is paused does not keep the others from what is new, nor does one that has left."""
    bench = make()
    paused, other = bench.engine("paused"), bench.engine("other")
    third = bench.engine("third")
    calls(paused, 9), calls(third, 3)
    bench.publish(version(1))
    bench.rollout.look(100.0)
    bench.rollout.look(100.0 + PATIENCE_S - 0.1)
    assert shown(bench.rollout.canary) == {"version": 1, "session": "unix:/tmp/paused"}
    bench.rollout.look(100.0 + PATIENCE_S)
    assert shown(bench.rollout.canary) == {"version": 1, "session": "unix:/tmp/third"}
    third.hang_up()
    bench.rollout.look(101.0 + PATIENCE_S)
    assert shown(bench.rollout.canary) == {"version": 1, "session": "unix:/tmp/other"}
    assert calls(other, RAMP + CALLS)[-1] == 1
    bench.rollout.look(102.0 + PATIENCE_S)
    assert bench.rollout.serving == 1


def test_the_last_engine_gets_what_was_tried(make: type[Bench]) -> None:
    """When only one is left, there is nobody to be careful for."""
    bench = make()
    first, other = bench.engine("first"), bench.engine("other")
    calls(first, 1)
    bench.publish(version(1))
    first.hang_up()
    bench.rollout.look(1.0)
    assert calls(other, RAMP)[-1] == 1


def test_a_version_that_cannot_be_loaded_is_tried_by_nobody(make: type[Bench]) -> None:
    """An evaluator that was started again may find a broken file: who tries the version goes back."""
    bench = make()
    first = bench.engine("first")
    bench.engine("other")
    calls(first, 1)
    bench.publish(version(1))
    assert calls(first, RAMP + 1)[-1] == 1
    bench.rollout.loaded(bus.Loaded(1, "broken"))
    assert bench.rollout.canary is None
    assert calls(first, 1) == [0]
    assert bench.told[-1] == bus.NowServing(1, "broken")


def test_who_waits_for_a_label_gets_its_version_at_once(make: type[Bench]) -> None:
    """The newest that can be served, whoever else tries which."""
    bench = make()
    bench.engine("first"), bench.engine("other")
    bench.publish(version(1))
    assert (bench.rollout.serving, bench.rollout.newest, bench.rollout.awaited(1)) == (0, 1, False)
    bench.rollout.wanted(version(2))
    assert (bench.rollout.newest, bench.rollout.awaited(2)) == (0, True)
