"""From the journal of the gateway over the store to a trace: what was served is what is told, call by call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from typer.testing import CliRunner

from tumbaga.driver import cli, engines, provenance
from tumbaga.driver.errors import DriverError
from tumbaga.driver.journal import MOST, Journal
from tumbaga.driver.provenance import TraceError, conversations, find, served
from tumbaga.driver.recording import Recorder
from tumbaga.online.ramp import Mix, RampState
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Audit, Gate, Store, StoredVersion
from tumbaga.online.versions import write_whole
from tumbaga.socket_protocol import bus

N, REST, TARGET = 10, 12, 0.15
NAME = "unix:/x"


class Bench:
    """A gateway's journal and a learner's recorder, with sessions that move as those of a run do."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.now = run_dir, 1000.0
        self.store = Store(run_dir / FILE)
        self.journal, self.recorder = self.fresh_gateway(), Recorder(self.store, run_dir, N)
        self.served: dict[str, list[Mix]] = {}  # of all calls of a session

    def fresh_gateway(self) -> Journal:
        self.now += 1.0
        return Journal(TARGET, lambda: self.now)

    def kill_learner(self) -> None:
        """The next one knows what stands in the store."""
        self.store.close()
        self.store = Store(self.run_dir / FILE)
        self.recorder = Recorder(self.store, self.run_dir, N)

    def tell(self, *, arrives: bool = True, heard: bool = True) -> None:
        """The gateway tells what is new; it may be lost on the way, or the answer may."""
        message = self.journal.message()
        if message is None:
            return
        self.journal.sent(message)
        if arrives:
            upto = self.recorder.note(message)
            if heard:
                self.journal.noted(upto)

    def call(self, session: str, call: int, mix: Mix, score: float | None = 0.1, work: float = 0.0) -> None:
        if call == 0:
            self.journal.begins(session, mix, 0.0)
        self.journal.served(session, call, mix, work, score)
        self.served.setdefault(session, []).append(mix)

    def converse(self, session: str, state: RampState, calls: int, random: Random) -> RampState:
        """A conversation in which versions are published, gone back from and fallen back from at any call."""
        for call in range(calls):
            chance = random.random()
            if chance < 0.03:
                state = state.publish(random.randrange(6))
            elif chance < 0.05:
                state = state.recall(random.randrange(6), at_once=random.random() < 0.3)
            state, mix = state.advance()
            if random.random() < 0.02 and mix.new:
                mix = Mix(0, 0, 1.0)  # this version was not fit for the frame
            self.call(session, call, mix)
            if random.random() < 0.1:
                self.tell(arrives=random.random() < 0.7, heard=random.random() < 0.7)
            if random.random() < 0.02:
                self.kill_learner()
        self.journal.ended(session)
        return state


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


@pytest.mark.parametrize("seed", range(4))
def test_every_call_is_told_as_it_was_served(bench: Bench, seed: int) -> None:
    """Versions and weights of every call, through lost messages, lost answers and killed learners."""
    random = Random(seed)
    names, states = ("unix:/a", "tcp:b:1"), {}
    for name in names:
        states[name] = RampState(0, n=N, rest=REST, idle=REST)
    for _ in range(3):
        for name in names:
            states[name] = bench.converse(name, states[name], random.randrange(30, 120), random)
    bench.tell()

    for name in names:
        for number, mix in enumerate(bench.served[name]):
            told = served(bench.store, *find(bench.store, None, session=name, call=number))
            old = mix.new if mix.weight == 1.0 else mix.old
            assert (told.old, told.new) == (old, mix.new), (number, mix, told)
            assert told.weight == pytest.approx(mix.weight), (number, mix, told)


def test_what_is_dropped_on_the_way_is_told_of_when_it_is_too_much(bench: Bench) -> None:
    """A learner that is away for days: the newest moves are kept, and its store goes on from there."""
    for call in range(MOST):
        bench.call(NAME, call, Mix(call % 7, call % 7, 1.0))
    moves = []
    while (message := bench.journal.message()) is not None and message.moves:
        moves += message.moves
        bench.journal.sent(message)
        bench.journal.noted(message.first + len(message.moves))
    assert len(moves) == MOST
    last = bus.Journal(message.first if message else 0, moves[-3:], {})
    bench.recorder.note(last)
    held, call = find(bench.store, None, call=bench.recorder.number(NAME, MOST - 1))
    assert (held.first_call, served(bench.store, held, call).new) == (0, (MOST - 1) % 7)


def engine_starts(run_dir: Path, at: float, step: int) -> None:
    write_whole(run_dir / engines.STARTED, f'{{"at": {at}, "step": {step}}}'.encode())


def test_a_step_is_that_of_the_engine(bench: Bench) -> None:
    """An engine of the run that went on from a checkpoint, and one whose connection broke: what was done twice counts the last time, but the
    step of the checkpoint was written the first time."""
    engine_starts(bench.run_dir, 1.0, 0)
    for call in range(10):  # steps 0 to 9
        bench.call(NAME, call, Mix(1, 1, 1.0))
    bench.journal.ended(NAME)
    bench.tell()
    for call in range(5):  # the same engine asks on: steps 10 to 14
        bench.call(NAME, call, Mix(2, 2, 1.0))
    bench.journal.ended(NAME)
    bench.tell()
    engine_starts(bench.run_dir, 2.0, 8)
    for call in range(4):  # from the checkpoint: steps 8 to 11
        bench.call(NAME, call, Mix(3, 3, 1.0))
    bench.journal.ended(NAME)
    bench.tell()

    told = {step: served(bench.store, *find(bench.store, step)).new for step in range(15)}
    assert [told[step] for step in range(15)] == [1] * 9 + [3] * 3 + [2] * 3
    assert [one.first_call for one in conversations(bench.store)] == [0, 10, 15]
    assert served(bench.store, *find(bench.store, None, call=9)).new == 1
    with pytest.raises(TraceError, match="there is no step 15; the steps that the store knows of: 0 to 14"):
        find(bench.store, 15)
    with pytest.raises(TraceError, match="there is no force call 19; the store knows of 0 to 18"):
        find(bench.store, None, call=19)


def test_an_engine_that_came_by_itself_counts_anew_each_time(bench: Bench) -> None:
    """Nobody knows its steps: with several conversations one must be named, and with several sessions one of those."""
    for version in (1, 2):
        for call in range(3):
            bench.call(NAME, call, Mix(version, version, 1.0))
        bench.journal.ended(NAME)
        bench.tell()
    with pytest.raises(TraceError, match=r"has had 2 conversations.*--conversation 1 to 2"):
        find(bench.store, 1)
    assert served(bench.store, *find(bench.store, 1, conversation=1)).new == 1
    assert served(bench.store, *find(bench.store, 1, conversation=2)).new == 2
    with pytest.raises(TraceError, match="there is no conversation 3"):
        find(bench.store, 1, conversation=3)
    bench.call("unix:/other", 0, Mix(0, 0, 1.0))
    bench.tell()
    with pytest.raises(TraceError, match="there are 2 sessions; add --session and one of: unix:/x, unix:/other"):
        find(bench.store, 0)
    with pytest.raises(TraceError, match="no session 'unix:/y'; there is unix:/x, unix:/other"):
        find(bench.store, 0, session="unix:/y")


def test_a_store_without_calls_is_told_of(bench: Bench) -> None:
    """One sentence, and no traceback."""
    with pytest.raises(TraceError, match="the store knows of no force call"):
        find(bench.store, 0)


def test_a_trace_leads_back_to_version_0(bench: Bench) -> None:
    """Lineage with labels, gate, flags of the frame and audits next to it; text and JSON say the same versions."""
    store, water = bench.store, Frame(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]))
    store.add_version(StoredVersion(0, "00" * 32, None, "versions/0", "served", 0, {}))
    for call in range(30):
        mix = Mix(0, 0, 1.0) if call < 5 else Mix(0, 1, 1.0) if call == 5 else Mix(1, 1, 1.0)
        bench.call(NAME, call, mix, work=0.004 if call >= 5 else 0.0)
    bench.tell()
    labels = []
    for number, (step, reason) in enumerate(((3, Reason.UNCERTAIN), (20, Reason.AUDIT))):
        frame = Frame(water.numbers, water.positions + 0.01 * number)
        role = Role.HOLDOUT if reason is Reason.AUDIT else Role.TRAIN
        flag = {"session": NAME, "step": bench.recorder.number(NAME, step), "reason": reason, "score": 0.2, "version": number}
        frame_id = store.add_flag(frame, energy=0.0, forces=np.zeros((3, 3)), **flag)  # type: ignore[arg-type]
        store.enqueue(frame_id, reason, role, 1.0)
        task = store.start_task(frame_id, "label-0", 1, role)
        store.add_label(task, Label(-1.0, np.full((3, 3), 0.1), "test", 1.0))
        labels.append(store.label_of(frame_id, "test"))
    taught, audited = labels
    assert taught is not None
    assert audited is not None
    gate = Gate(1, "replay", True, "all was well", {"rmse": 0.1})
    store.add_version(StoredVersion(1, "ab" * 32, 0, "versions/1", "served", 1, {}), [taught.id], [gate])
    store.add_audit(Audit(audited.frame_id, audited.id, 1, 0.1, 0.17, 1.0, 0.2))

    told = provenance.trace(store, *find(store, 20))
    assert (told["version"], told["from"], told["weight"], told["ramp"]) == ("1-abababab", "1-abababab", 1.0, None)
    assert [one["number"] for one in told["lineage"]] == [1, 0]
    assert [(one["label"], one["frame"], one["new"]) for one in told["lineage"][0]["labels"]] == [(taught.id, taught.frame_id, True)]
    assert told["lineage"][0]["gates"] == [{"check": "replay", "passed": True, "reason": "all was well", "numbers": {"rmse": 0.1}}]
    assert [flag["reason"] for flag in told["flags"]] == ["audit"]
    assert [(audit["call"], audit["version"]) for audit in told["audits"]] == [(20, 1)]
    shown = provenance.text(told)
    for part in ("step 20", "version 1-abababab", "replay: passed", "version 0-base", f"label {taught.id} of frame {taught.frame_id}"):
        assert part in shown
    on_ramp = provenance.trace(store, *find(store, 5))
    assert (on_ramp["from"], on_ramp["version"], on_ramp["weight"]) == ("1-abababab", "1-abababab", 1.0)
    assert on_ramp["ramp"] == {"first_call": 5, "last_call": 5, "work_ev": pytest.approx(0.004)}
    assert provenance.trace(store, *find(store, 3))["flags"][0]["reason"] == "uncertain"


def test_the_command_wants_one_of_step_and_call(bench: Bench) -> None:
    """A mistake is one sentence; what is asked for is told, in JSON too."""
    for call in range(4):
        bench.call(NAME, call, Mix(0, 0, 1.0))
    bench.tell()
    bench.store.add_version(StoredVersion(0, "00" * 32, None, "versions/0", "served", 0, {}))
    run = CliRunner()
    for wrong in ([], ["3", "--call", "3"]):
        with pytest.raises(DriverError, match="trace: give a STEP, or --call N instead of it"):
            cli.app(["trace", str(bench.run_dir), *wrong], standalone_mode=False)
    assert run.invoke(cli.app, ["trace", str(bench.run_dir), "3"]).output.startswith("step 3, force call 3 of unix:/x (conversation 1)")
    assert json.loads(run.invoke(cli.app, ["trace", str(bench.run_dir), "--call", "2", "--json"]).output)["version"] == "0-base"
    with pytest.raises(DriverError, match=r"has no store\.sqlite; is it a run directory, and was learning on\?"):
        cli.app(["versions", str(bench.run_dir / "nowhere")], standalone_mode=False)


def test_a_message_that_comes_twice_counts_once(bench: Bench) -> None:
    """A gateway that was not told of what stands in the store sends it again."""
    for call in range(8):
        bench.call(NAME, call, Mix(int(call > 3), int(call > 3), 1.0))
    message = bench.journal.message()
    assert message is not None
    first = bench.recorder.note(message)
    assert bench.recorder.note(message) == first
    bench.kill_learner()
    assert bench.recorder.note(message) == first
    assert len(bench.store.ramps()) == 2
    assert [one.number for one in conversations(bench.store)] == [1]


def test_numbers_of_an_earlier_gateway_do_not_count(bench: Bench) -> None:
    """What an earlier gateway was told has arrived says nothing of the next one's."""
    bench.call(NAME, 0, Mix(0, 0, 1.0))
    earlier = bench.journal.message()
    assert earlier is not None
    upto = bench.recorder.note(earlier)
    bench.journal = bench.fresh_gateway()
    bench.call(NAME, 0, Mix(1, 1, 1.0))
    bench.journal.noted(upto)
    again = bench.journal.message()
    assert again is not None
    assert isinstance(again.moves[0], bus.Move)
    bench.recorder.note(again)
    assert [served(bench.store, one, 0).new for one in conversations(bench.store)] == [0, 1]
