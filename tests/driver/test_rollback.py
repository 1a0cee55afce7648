"""Going back: a person's request and an alarm, in a run that goes on and in one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from typer.testing import CliRunner

from tumbaga.driver import cli, learner_process, rolling_back
from tumbaga.driver import config as configs
from tumbaga.driver.alarms import TIMES, WITHIN, Alarms
from tumbaga.driver.errors import DriverError
from tumbaga.driver.learner_process import LearnerProcess
from tumbaga.driver.rolling_back import Outcome, Request, RollbackError
from tumbaga.driver.rollout import read_serving
from tumbaga.driver.rundir import RunDir
from tumbaga.online import auditing, spool
from tumbaga.online.ramp import Mix, RampState, weight_step
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Audit, Store, StoredVersion
from tumbaga.online.testing import ToyTrainable
from tumbaga.online.versions import LastLayer, VersionFile, write
from tumbaga.socket_protocol import bus

METHOD = "test:lj/epsilon0.2/offset-1000"
SETTINGS = configs.Config(flag=configs.Flag(force_error=0.1), label=configs.Label(method="test:lj"), learn=configs.Learn(finetune_every=0))
WATER = Frame(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]))


class Reporter:
    """Takes log lines and states."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}

    def log(self, level: str, event: str, **detail: Any) -> None:
        pass

    def state(self, **state: Any) -> None:
        self.last = state


def version(run_dir: Path, number: int, parent: int | None) -> VersionFile:
    """A sound version whose weights are its number."""
    layer = LastLayer(np.full(8, float(number)), np.eye(8))
    return write(run_dir, number, {"readout": layer.readout}, layer, {})


class Bench:
    """A run directory whose learner is a part of the test, and the gateway's end of the line to it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.context, self.reporter = run_dir, zmq.Context(), Reporter()
        bus.make_folder(run_dir)
        self.gateway = bus.Endpoint(self.context, zmq.ROUTER, bus.LEARNER, bind=True)
        with Store(run_dir / FILE) as store:
            for number, (parent, state) in enumerate(((None, "served"), (0, "served"), (1, "refused"), (1, "served"), (3, "served"))):
                file = version(run_dir, number, parent)
                store.add_version(StoredVersion(number, file.hash, parent, file.path, state, 1, {}))
        self.learner = self._started()

    def _started(self) -> LearnerProcess:
        return LearnerProcess(self.run_dir, SETTINGS, self.context, self.reporter)  # type: ignore[arg-type]

    def restart(self) -> None:
        """The learner is killed, and another one takes its place."""
        self.close_learner()
        self.learner = self._started()

    def close_learner(self) -> None:
        self.learner._store.close()
        self.learner.gateway.close()
        self.learner.workers.close()

    def beat(self) -> None:
        self.learner._due = 0.0
        self.learner.turn()

    def ask(self, number: int | None = None, *, release: bool = False) -> Outcome:
        request = rolling_back.ask(self.run_dir, number, release=release)
        self.beat()
        return rolling_back.wait(self.run_dir, request, 1.0)

    def told(self) -> bus.Serve:
        """What the gateway has heard last."""
        for _ in range(20):
            self.beat()
            while self.gateway.socket.poll(250) and (received := self.gateway.receive()):
                if isinstance(received[1], bus.Serve) and received[1].version == self.learner._lineage.number:
                    return received[1]
        raise AssertionError("the gateway has heard nothing of what serves")

    @property
    def states(self) -> list[str]:
        return [v.state for v in self.learner._store.versions()]

    def labelled(self, place: int, reason: Reason = Reason.UNCERTAIN, *, version: int = 4, score: float = 0.05) -> None:
        """A frame was flagged, and its label comes."""
        store, frame = (
            self.learner._store,
            Frame(WATER.numbers, WATER.positions + 0.02 * place * np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])),
        )
        frame_id = store.add_flag(
            frame, session="s", step=place, reason=reason, score=score, version=version, energy=0.0, forces=np.zeros((3, 3))
        )
        role = Role.HOLDOUT if reason is Reason.AUDIT else Role.TRAIN
        store.enqueue(frame_id, reason, role, 1.0)
        task = store.start_task(frame_id, "label-0", 1, role)
        self.learner._sent.add(task)
        forces = ToyTrainable((1, 8), np.ones(8), n_gaussians=2).predict([frame])[0].forces
        spool.put(self.run_dir, spool.Result(task, frame_id, Label(-1.0, forces, METHOD, 0.1, {})))
        self.beat()

    def close(self) -> None:
        self.close_learner()
        self.gateway.close()
        self.context.term()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.chdir(tmp_path)
    weights = np.zeros(8)
    monkeypatch.setattr(learner_process, "_trainable", lambda _: ToyTrainable((1, 8), weights, n_gaussians=2))
    made = Bench(tmp_path)
    yield made
    made.close()


# -- a person's request --------------------------------------------------------------------------------------------------------------------


def test_the_parent_of_what_serves_is_gone_back_to(bench: Bench) -> None:
    """Without a number it is the parent; the newer one is withdrawn, the gateway is told not to wait, and a restart changes nothing."""
    outcome = bench.ask()
    assert (outcome.before, outcome.after, outcome.problem) == (4, 3, "")
    assert bench.states == ["served", "served", "refused", "served", "withdrawn"]
    told = bench.told()
    assert (told.version, told.hurry) == (3, 1)
    assert bench.learner._learner.readout.tolist() == [3.0] * 8
    assert read_serving(bench.run_dir).version == 3
    bench.restart()
    bench.beat()
    assert (bench.learner._lineage.number, bench.reporter.last["pinned"]) == (3, 3)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_any_earlier_version_may_be_named(bench: Bench, number: int) -> None:
    """Version 0 among them; and one that was withdrawn may be asked for again."""
    assert bench.ask(number).after == number
    assert bench.told().version == number
    assert bench.learner._lineage.number == number
    assert bench.ask(4).after == 4
    assert bench.told().version == 4


def test_what_must_not_serve_is_not_gone_back_to(bench: Bench) -> None:
    """Each mistake is one sentence, and what serves goes on serving."""
    assert bench.ask(2).problem == "version 2 was refused and must not serve, see: tumbaga versions"
    assert bench.ask(9).problem == "there is no version 9; there are 0 to 4, see: tumbaga versions"
    assert bench.ask(release=True).problem == "no version is pinned here, so there is nothing to release"
    (bench.run_dir / bench.learner._store.versions()[3].file).write_bytes(b"torn")
    assert "cannot be read" in bench.ask(3).problem
    assert bench.ask(0).problem == ""
    assert bench.ask().problem == "version 0 serves, and there is none before it"
    assert bench.told().version == 0


def test_nothing_new_is_made_while_a_version_is_pinned(bench: Bench) -> None:
    """Labels are collected meanwhile, over a restart too; on release the next version is made of all of them at once."""
    bench.ask(1)
    for place in range(1, 4):
        bench.labelled(place, version=1)
    bench.restart()
    bench.beat()
    assert len(bench.states) == 5
    assert bench.learner._lineage.number == 1

    outcome = bench.ask(release=True)
    assert "no longer pinned" in outcome.note
    bench.beat()
    made = bench.learner._store.versions()[5:]
    assert [(v.parent, len(bench.learner._store.version_labels(v.number))) for v in made] == [(1, 3)]
    assert bench.learner._lineage.number == 5
    assert bench.told().hurry == 0


def test_a_stopped_run_is_rolled_back_by_the_command(bench: Bench) -> None:
    """The store and what the next start serves are changed under the run's lock; then versions tells of it."""
    bench.close_learner()
    held = RunDir(bench.run_dir)
    held.hold()
    with pytest.raises(DriverError, match="cannot be read"):  # somebody holds it: the learner would be asked, and there is no tumbaga.toml
        cli.app(["rollback", str(bench.run_dir)], standalone_mode=False)
    held.release()
    run = CliRunner()
    said = run.invoke(cli.app, ["rollback", str(bench.run_dir), "1"])
    assert said.exit_code == 0, said.output
    assert "from version 0 back to version 1" in said.output or "back to version 1" in said.output
    assert read_serving(bench.run_dir).version == 1
    table = run.invoke(cli.app, ["versions", str(bench.run_dir)]).output
    assert "version 1 is pinned" in table
    assert table.count("withdrawn") == 2
    with pytest.raises(DriverError, match="rollback: there is no version 7; there are 0 to 4"):
        cli.app(["rollback", str(bench.run_dir), "7"], standalone_mode=False)
    assert "no longer pinned" in run.invoke(cli.app, ["rollback", str(bench.run_dir), "--release"]).output
    bench.learner = bench._started()
    assert bench.learner._lineage.number == 1


def test_a_request_that_nobody_answers_is_taken_back(tmp_path: Path) -> None:
    """The command does not wait for ever, and what it asked for is not done behind its back later."""
    request = rolling_back.ask(tmp_path, 3)
    assert rolling_back.asked(tmp_path) == request
    with pytest.raises(RollbackError, match=r"has not answered within 0.1 s; nothing was done"):
        rolling_back.wait(tmp_path, request, 0.1)
    assert rolling_back.asked(tmp_path) is None
    (tmp_path / "requests" / "rollback.json").write_bytes(b"{")
    assert rolling_back.asked(tmp_path) is None


# -- alarms --------------------------------------------------------------------------------------------------------------------------------


def test_a_version_that_fails_often_raises_an_alarm() -> None:
    """A few failures far apart are none, version 0 has nobody before it, and a new version starts anew."""
    alarms = Alarms()
    assert [alarms.failed(3, frame, "x") for frame in range(0, 5 * WITHIN, WITHIN)] == [None] * 5
    assert [alarms.failed(0, 2000 + frame, "x") for frame in range(10)] == [None] * 10
    assert [alarms.failed(4, 3000 + frame, "x") for frame in range(TIMES - 1)] == [None] * (TIMES - 1)
    assert alarms.failed(5, 3100, "x") is None
    assert [alarms.failed(5, 3101 + frame, "x") is not None for frame in range(TIMES - 1)] == [False] * (TIMES - 2) + [True]


def test_an_alarm_withdraws_a_version_and_all_that_came_of_it(bench: Bench) -> None:
    """What the gateway says once or again; nothing is pinned, and the same is not made again before another label has come."""
    bench.gateway.socket.poll(500)
    bench.learner._gateway_message(bus.Alarm(3, "it was unfit"), [])
    told = bench.told()
    assert (told.version, told.hurry) == (1, 2)
    assert bench.states == ["served", "served", "refused", "withdrawn", "withdrawn"]
    bench.learner._gateway_message(bus.Alarm(3, "it was unfit"), [])
    bench.learner._gateway_message(bus.NowServing(4), [])  # was on its way
    assert bench.states[3:] == ["withdrawn", "withdrawn"]
    events = bench.learner._store.events(rolling_back.EVENT)
    assert [(event["before"], event["after"], event["by"], event["reason"]) for event in events] == [(3, 1, "alarm", "it was unfit")]
    bench.restart()
    bench.beat()
    assert (len(bench.states), bench.learner._lineage.number, bench.reporter.last["pinned"]) == (5, 1, None)
    bench.labelled(1, version=1)
    assert len(bench.states) == 6


def test_an_alarm_about_the_pinned_version_pins_the_one_before(bench: Bench) -> None:
    """A person's choice does not keep what must not serve."""
    bench.ask(3)
    bench.learner._gateway_message(bus.Alarm(3, "it was unfit"), [])
    assert (bench.learner._lineage.number, bench.learner._lineage.pinned) == (1, 1)


def test_two_bad_audits_in_a_row_withdraw_a_version_that_made_things_worse(bench: Bench) -> None:
    """One is noise; the version before is nearer to the labels (weights 3 and 4, where the truth has 1)."""
    bench.labelled(1, Reason.AUDIT, score=0.01)
    assert bench.learner._lineage.number == 4
    bench.labelled(2, Reason.AUDIT, score=0.01)
    assert bench.learner._lineage.number == 3
    assert bench.states[4] == "withdrawn"
    audits = bench.learner._store.audits()
    assert [(audit.version, audit.promised) for audit in audits] == [(4, 0.01)] * 2
    assert all(audit.force_max > audit.force_rmse > 0 for audit in audits)
    assert bench.learner._watch.coverage(0.9) == {"audits": 2, "within": 0, "promised": 0.9}
    (event,) = bench.learner._store.events(rolling_back.EVENT)
    assert "far beyond what it said of itself, and version 3 is nearer to the labels" in event["reason"]


def test_few_audits_are_labelled_where_all_of_them_are_good(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """After seven good ones a quarter of the frames that are picked at random is taken, the same at each start, and nothing is kept of the others;
    frames picked for other reasons are taken as ever.
    """
    monkeypatch.setattr(bench.learner._watch, "_target", 1e9)
    for place in range(7):
        bench.labelled(place, Reason.AUDIT, score=1e9)
    asked, store = range(2000, 2060), bench.learner._store

    def flagged(step: int, reason: Reason) -> bool:
        before = store.counts()["flags"]
        frame = Frame(WATER.numbers, WATER.positions * (1.0 + 1e-4 * step + 1e-5 * (reason is Reason.AUDIT)))
        message = bus.Candidate("s", step, reason.value, 1e9, 1.0, 4, False, 0.0, 0)
        bench.learner._gateway_message(message, [a.tobytes() for a in (frame.numbers, frame.positions, frame.cell, np.zeros((3, 3)))])
        return bool(store.counts()["flags"] > before)

    taken = [step for step in asked if flagged(step, Reason.AUDIT)]
    assert 5 <= len(taken) <= 25
    assert taken == [step for step in asked if bench.learner._watch.wants("s", step, 4)]
    assert flagged(max(asked), Reason.UNCERTAIN)
    assert sum(bench.learner._watch.wants("s", step, 4) for step in range(20_000)) == pytest.approx(5000, abs=250)
    assert all(bench.learner._watch.wants("s", step, 3) for step in asked)  # of another version nothing is known


def audit(promised: float, error: float, version: int = 4) -> Audit:
    return Audit(1, 1, version, error / 3, error, 1.0, promised)


def test_audits_speak_against_a_version_when_two_in_a_row_do() -> None:
    """Far beyond the promise and beyond the target, both times, and of this version."""
    bad, good = audit(0.1, 0.4), audit(0.1, 0.2)
    assert auditing.beyond([bad], 4, 0.15) == []
    assert auditing.beyond([bad, good], 4, 0.15) == []
    assert auditing.beyond([good, bad, bad], 4, 0.15) == [bad, bad]
    assert auditing.beyond([bad, audit(0.1, 0.4, 3)], 4, 0.15) == []
    assert auditing.beyond([bad, audit(0.1, 0.4, 3), bad], 4, 0.15) == [bad, bad]
    assert auditing.beyond([bad, bad], 4, 0.5) == []  # worse than it said, and still what the user allows


# -- ramps ---------------------------------------------------------------------------------------------------------------------------------


def test_a_version_gone_back_to_does_not_wait() -> None:
    """Between two ramps it begins with the next call; an update of the same number waits for its rest."""
    state = RampState(5, n=10, rest=50, idle=0)
    assert state.publish(3).advance()[1] == Mix(5, 5, 1.0)
    state, mix = state.recall(3).advance()
    assert mix[:2] == (5, 3)
    assert 0.0 < mix.weight < 0.1
    assert RampState(5, n=10).recall(5).advance()[1] == Mix(5, 5, 1.0)


def test_a_ramp_that_leads_away_turns_round() -> None:
    """The weights go on from where they are, in both senses the work adds up to nothing, and another version waits for the end only."""
    state, mix = RampState(3, n=10).publish(5), Mix(3, 3, 1.0)
    sums, befores = 0.0, []
    for call in range(14):
        if call == 4:
            state = state.recall(3)
        state, now = state.advance()
        sums += weight_step(mix, now) * (1.0 if now.new == 5 else -1.0)
        befores.append(now)
        mix = now
    assert befores[3][:2] == (3, 5)
    assert befores[4][:2] == (5, 3)
    assert 1.0 - befores[4].weight == pytest.approx(befores[2].weight)  # one call on, one call back
    assert state.advance()[1] == Mix(3, 3, 1.0)
    assert sums == pytest.approx(0.0)

    state = RampState(3, n=10, rest=50).publish(5)
    for _ in range(4):
        state, _ = state.advance()
    state, mixes = state.recall(1), []
    for _ in range(17):
        state, mix = state.advance()
        mixes.append(mix[:2])
    assert mixes == [(3, 5)] * 6 + [(5, 1)] * 10 + [(1, 1)]


def test_what_must_not_even_take_a_part_leaves_at_once() -> None:
    """From the next call on the other one serves alone, from the middle of a ramp too, and its work is accounted for."""
    state, before = RampState(3, n=10).publish(5).advance()
    state, now = state.recall(3, at_once=True).advance()
    assert now == Mix(5, 3, 1.0)
    assert weight_step(before, now) == pytest.approx(before.weight)
    assert state.advance()[1] == Mix(3, 3, 1.0)
    state, now = RampState(5, n=10).recall(1, at_once=True).advance()
    assert (now, weight_step(Mix(5, 5, 1.0), now)) == (Mix(5, 1, 1.0), 1.0)


def test_requests_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Both ways through the files."""
    request = rolling_back.ask(tmp_path, None, release=True)
    assert rolling_back.asked(tmp_path) == Request(request.id, None, True)
    outcome = Outcome(request.id, 4, 3, "", "so")
    rolling_back.answer(tmp_path, outcome)
    assert rolling_back.wait(tmp_path, request, 0.1) == outcome
    assert list((tmp_path / "requests").iterdir()) == []
