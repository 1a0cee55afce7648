"""The gateway process: owns every engine connection, gathers waiting frames, hands them to evaluators, guards and answers. No torch.

One thread, one loop, no disk: nothing here waits for a label, a fit or a file. It outlives the evaluators and the learner.
"""

from __future__ import annotations

import json
import selectors
from collections import deque
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import process
from tumbaga.driver.journal import Journal
from tumbaga.driver.learner_link import LearnerLink
from tumbaga.driver.pool import Pool
from tumbaga.driver.requests import Requests, told_at
from tumbaga.driver.rollout import Rollout, read_serving, shown
from tumbaga.driver.session import Asked, Ended, More, Patience, Result, Session
from tumbaga.driver.species import Species
from tumbaga.online import guards
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.errors import NotYetError, TransportError
from tumbaga.socket_protocol.link import Hub
from tumbaga.socket_protocol.streams import Address, Backoff, Dialling, Stream, dial

_REPORT_S = 0.5
_EVALUATORS = "evaluators"  # in the selector; sessions have a colon in their names
_AFTER_FAULT_S = 0.25
_BRIEF_S = 2.0  # a conversation that is over sooner may be one of very many
_OFTEN = 1000  # in a row, which are told of one by one; then in thousands
TEMPLATE = "template.json"  # what the gateway needs of the templates: it cannot read structure files without slow imports

Templates = dict[str, Species]


class Gateway:
    """The gateway's state and what it does with everything that arrives.

    Args:
        settings: of the run.
        templates: species by address as in `serve.connect`; that of "" holds where there is no other.
        context: zmq.
        reporter: to the supervisor.
        serving: the version to start with and its path; version 0 needs none.
    """

    def __init__(
        self,
        settings: configs.Config,
        templates: Templates,
        context: zmq.Context[zmq.Socket[bytes]],
        reporter: process.Reporter,
        serving: bus.Serve,
    ) -> None:
        self._settings, self._reporter = settings, reporter
        self._evaluators = Hub(bus.EVALUATORS)
        self._learner = LearnerLink(context, process.monotonic, Journal(settings.flag.force_error))
        serve = settings.serve
        self._pool = Pool(self._evaluators, process.monotonic, serve.committee, serve.window_ms / 1000.0)
        self._rollout = Rollout(settings.learn, self._pool, serving, self._learner.tell, reporter.log)
        self.sessions = {session.name: session for session in self._made(templates)}
        self._rollout.sessions = self.sessions.values()
        self._errors: deque[str] = deque(maxlen=20)
        self._requests = Requests(
            settings,
            self.sessions,
            self._pool,
            self._rollout,
            self._learner,
            reporter,
            follow=self._follow,
            refuse=self._refuse,
            note=self._note,
        )
        self._selector = selectors.DefaultSelector()
        self._watched: dict[str, tuple[int, int]] = {}  # session → descriptor and what is waited for
        self._restless: set[str] = set()  # sessions that have more to say than fitted into their turn
        self._counts = {"refused": 0, "conversations": 0}
        self._next_report = self._next_chore = 0.0

    def _made(self, templates: Templates) -> list[Session]:
        serve = self._settings.serve
        patience = Patience(serve.message_seconds, serve.unread_seconds)
        made: list[Session] = []
        for text in serve.connect:
            address, template = Address.parse(text, serve.prefix), templates.get(text, templates.get(""))
            for number in range(1, serve.connections + 1):
                backoff = Backoff(Random(self._settings.seed + len(made)))
                made.append(Session(address, template, backoff, self._rollout.fresh_ramp(), number, patience))
        return made

    # -- the loop --------------------------------------------------------------------------------------------------------------------

    def run(self, lifeline: process.Lifeline) -> None:
        """Serve until told to leave; then close."""
        for fixed, name in ((self._evaluators.fileno(), _EVALUATORS), (self._learner.fileno(), ""), (lifeline.fileno(), "")):
            self._selector.register(fixed, selectors.EVENT_READ, name)
        held: float | None = None
        while not lifeline.cut_off:
            for key, _ in self._selector.select(self._patience(held)):
                if key.data == _EVALUATORS:
                    for received in self._evaluators.receive():
                        self._evaluator_message(*received)
                    for name in self._evaluators.left():
                        for outcome in self._pool.lost(name):
                            self._requests.outcome(outcome)
                elif not key.data:
                    self._learner.stirred = True
                elif key.data not in self._restless:
                    self._engine_event(self.sessions[key.data])
            for name in tuple(self._restless):
                self._engine_event(self.sessions[name])
            if self._learner.stirred:
                self._hear_learner()
            held = self._pool.dispatch()
            if process.monotonic() >= self._next_chore:
                self._chores()
        self.close()

    def close(self) -> None:
        """Hang up on every engine, and report for the last time."""
        for session in self.sessions.values():
            session.hang_up()
        self._report(now=True)
        self._selector.close()
        self._evaluators.close()

    def _patience(self, held: float | None) -> float:
        if self._restless or self._learner.stirred:
            return 0.0
        patience = max(0.0, self._next_chore - process.monotonic())
        return patience if held is None else min(patience, held)

    def _chores(self) -> None:
        """What is due at certain times: calls, limits, reports."""
        now = process.monotonic()
        self._next_chore = now + _REPORT_S
        self._learner.stirred = True
        for session in self.sessions.values():
            if late := session.overdue(now):
                self._end(session, late)
            if self._pool.ready_to_serve:  # a connection that cannot be answered at once makes an engine wait, and other drivers with it
                self._dial_if_due(session, now)
        self._learner.report()
        self._requests.look_after_stalls(now)
        self._rollout.look(now)
        self._report()

    def _watch(self, session: Session) -> None:
        """Have the selector wait for what the session waits for now."""
        interest = session.interest()
        wanted = (session.fileno(), interest) if interest else None
        had = self._watched.get(session.name)
        if wanted == had:
            return
        if had is not None and (wanted is None or wanted[0] != had[0]):
            self._selector.unregister(had[0])
            del self._watched[session.name]
            had = None
        if wanted is not None:
            (self._selector.register if had is None else self._selector.modify)(*wanted, session.name)
            self._watched[session.name] = wanted

    def _unwatch(self, session: Session) -> None:
        """The session's descriptor is about to be closed."""
        if (had := self._watched.pop(session.name, None)) is not None:
            self._selector.unregister(had[0])

    # -- engines ---------------------------------------------------------------------------------------------------------------------

    def _dial_if_due(self, session: Session, now: float) -> None:
        if session.stream is not None or session.dialling is not None or session.given_up:
            return
        if now >= session.dial_at:
            try:
                self._connected(session, dial(session.address))
            except NotYetError:
                session.dial_at = now + session.backoff.next_delay()
            except TransportError as error:
                self._give_up(session, str(error))
                return
        self._next_chore = min(self._next_chore, session.dial_at if session.stream is None else self._next_chore)

    def _connected(self, session: Session, made: Stream | Dialling) -> None:
        self._unwatch(session)
        if isinstance(made, Dialling):
            session.dialling = made
        else:
            self._rollout.begun(session)
            session.connected(made)
            session.connected_at = process.monotonic()
            self._counts["conversations"] += 1
            if not session.faults and told_at(session.brief // _OFTEN):
                self._reporter.log("info", "connected", session=session.name)
        self._watch(session)

    def _engine_event(self, session: Session) -> None:
        if session.dialling is not None:
            self._finish_dialling(session, session.dialling)
            return
        if session.stream is None:  # an answer of the same round has ended the conversation
            return
        session.receive()
        self._follow(session, session.turn(process.monotonic()))

    def _finish_dialling(self, session: Session, dialling: Dialling) -> None:
        self._unwatch(session)
        try:
            self._connected(session, dialling.finish())
        except NotYetError:
            session.dialling = None
            session.dial_at = process.monotonic() + session.backoff.next_delay()
            self._next_chore = min(self._next_chore, session.dial_at)
        except TransportError as error:
            self._give_up(session, str(error))

    def _follow(self, session: Session, result: Result) -> None:
        """Act on what a session's turn gave."""
        if isinstance(result, Asked):
            self._restless.discard(session.name)
            self._asked(session, result)
        elif isinstance(result, Ended):
            self._end(session, result.fault, result.left)
        elif isinstance(result, More):
            self._restless.add(session.name)
        else:
            self._restless.discard(session.name)
        self._watch(session)

    def _asked(self, session: Session, asked: Asked) -> None:
        session.asked_at = process.monotonic()
        finding = session.check(asked.frames)
        if finding.verdict is guards.Verdict.DEAD:
            self._refuse(session, f"the engine sent a frame that cannot be evaluated: {finding.sentence}")
            return
        if not session.forces and told_at(session.brief // _OFTEN):
            told = {"dialect": session.dialect, "atoms": len(asked.frames[0]), "periodic": asked.frames[0].periodic}
            self._reporter.log("info", "first frame", session=session.name, **told)
        self._requests.ask(session, asked.frames)

    def _note(self, sentence: str) -> None:
        """For the status; what is there already is not said again."""
        if sentence not in self._errors:
            self._errors.append(sentence)

    def _end(self, session: Session, fault: str, left: str = "") -> None:
        self._unwatch(session)
        self._restless.discard(session.name)
        forces = session.forces
        if self._learner.journal.ended(session.name):
            self._learner.send_journal()
        session.hang_up()
        now = process.monotonic()
        self._requests.forget(session.name, now)
        # an engine that breaks the rules has cost the others time: not at once again, although it may have had an answer before
        session.dial_at = now + max(session.backoff.next_delay(), _AFTER_FAULT_S if fault else 0.0)
        self._next_chore = min(self._next_chore, session.dial_at)
        session.faults = session.faults + 1 if fault and fault == session.last_fault else int(bool(fault))
        session.last_fault = fault
        session.brief = 0 if fault or now - session.connected_at > _BRIEF_S else session.brief + 1
        if not told_at(session.faults if fault else session.brief // _OFTEN):
            return
        if fault:
            self._next_report = self._next_chore = 0.0  # a script whose connection this was waits for the reason
            self._note(f"{session.name}: {fault}{f' ({session.faults} times in a row)' if session.faults > 1 else ''}")
        told = {"forces": forces, "fault": fault, "left": left, "times": session.faults}
        self._reporter.log("error" if fault else "info", "session ended", session=session.name, **told)

    def _refuse(self, session: Session, why: str) -> None:
        """Fail closed: no number leaves; the connection ends with a sentence. After so many in a row the session is given up."""
        self._counts["refused"] += 1
        session.refusals += 1
        self._end(session, f"{why}; the connection was closed rather than answered")
        if session.refusals >= self._settings.serve.max_refusals:
            self._give_up(session, f"{session.refusals} conversations in a row had to be ended ({why})")

    def _give_up(self, session: Session, why: str) -> None:
        self._unwatch(session)
        session.hang_up()
        session.given_up = why
        self._note(f"{session.name}: given up: {why}")
        self._reporter.log("error", "session given up", session=session.name, why=why)

    # -- answers ---------------------------------------------------------------------------------------------------------------------

    def _evaluator_message(self, sender: str, message: bus.AnyMessage, buffers: list[bytes]) -> None:
        if isinstance(message, bus.Evaluated):
            for outcome in self._pool.done(sender, message, buffers):
                self._requests.outcome(outcome)
        elif isinstance(message, bus.EvaluatorReady):
            if not self._pool.ready_to_serve:
                self._next_chore = 0.0  # engines may be dialled now
            self._rollout.base_scale = message.lpr_scale
            for session in self.sessions.values():
                session.elements, session.potential = message.elements, message.potential
            for outcome in self._pool.ready(sender, message):
                self._requests.outcome(outcome)
        elif isinstance(message, bus.Loaded):
            self._pool.loaded(sender, message)
            if message.error:
                self._note(f"version {message.version} was refused: {message.error}")
            self._rollout.loaded(message)
            self._requests.settle()

    # -- learning --------------------------------------------------------------------------------------------------------------------

    def _hear_learner(self) -> None:
        for message in self._learner.heard():
            if isinstance(message, str):
                self._errors.append(message)
            elif isinstance(message, bus.Settled):
                self._requests.settled(message)
            else:
                self._rollout.wanted(message)
        self._requests.settle()

    # -- report ----------------------------------------------------------------------------------------------------------------------

    def _report(self, *, now: bool = False) -> None:
        if not now and process.monotonic() < self._next_report:
            return
        self._next_report = process.monotonic() + _REPORT_S
        requests = self._requests
        stalled = {stall.session for stall in requests.stalls}
        self._reporter.state(
            **self._counts,
            steps=requests.steps,
            frames=requests.frames,
            evaluated_again=requests.evaluated_again,
            stalls=requests.stalls.summary(),
            swaps=self._rollout.swaps,
            ready=self._pool.ready_to_serve,
            force_calls=requests.times.count,
            call_ms=requests.times.summary(),
            uncertainty={"last": requests.score_last, "max": requests.score_max},
            serving_version=self._rollout.serving,
            canary=shown(self._rollout.canary),
            evaluator_restarts=self._pool.restarts,
            busy={str(pid): seconds for pid, seconds in self._pool.busy_since().items()},
            answered=self._pool.answered,
            batches=self._pool.batches_done,
            batch_atoms=self._pool.cap.atoms,
            out_of_memory=self._pool.exhausted,
            errors=list(self._errors),
            flags=self._learner.flags,
            candidates_waiting=self._learner.waiting,
            sessions=[_session_state(session, session.name in stalled) for session in self.sessions.values()],
        )


def _session_state(session: Session, stalled: bool) -> dict[str, Any]:
    return {
        "name": session.name,
        "state": "waiting for a label" if stalled else session.state,
        "forces": session.forces,
        "dialect": session.dialect,
        "version": session.ramp.serving,
        "ramping_to": session.ramp.ramp.to_version if session.ramp.ramp else None,
        "swap_work": session.swap_work,
        "uncertainty": session.last_score,
    }


def read_templates(run_dir: Path) -> Templates:
    """The species that the supervisor has read from structure files, by address."""
    told: dict[str, Any] = json.loads((run_dir / TEMPLATE).read_text())
    return {
        address: Species(np.asarray(one["numbers"], dtype=np.int64), bool(one["periodic"]), one["source"]) for address, one in told.items()
    }


def main(run_dir: Path, lifeline: process.Lifeline) -> None:
    """Read the run's settings, then serve."""
    settings = configs.load(run_dir)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reporter = process.Reporter(context, "gateway")
    gateway = Gateway(settings, read_templates(run_dir), context, reporter, read_serving(run_dir))
    reporter.log("info", "started", addresses=list(gateway.sessions))
    process.settle()
    gateway.run(lifeline)
    reporter.close()


if __name__ == "__main__":
    process.run("gateway", main)
