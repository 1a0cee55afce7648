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
from tumbaga.driver.answers import Certainty, certainty, extras
from tumbaga.driver.firewall import Firewall, Judgement, Served
from tumbaga.driver.learner_link import LearnerLink
from tumbaga.driver.pool import Job, Outcome, Pool
from tumbaga.driver.rollout import Rollout, read_serving
from tumbaga.driver.session import Asked, Ended, More, Patience, Result, Session
from tumbaga.driver.species import Species
from tumbaga.driver.stalls import Stall, Stalls
from tumbaga.driver.stats import CallTimes
from tumbaga.online import guards, policy
from tumbaga.online.policy import Act, Level, Waited
from tumbaga.online.ramp import Mix, swap_work, weight_step
from tumbaga.online.records import Prediction, Reason
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.errors import NotYetError, ProtocolError, TransportError
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
        self._learner = LearnerLink(context, process.monotonic)
        self._firewall, self._stalls = Firewall(settings), Stalls(settings.policy.max_stall)
        serve = settings.serve
        self._pool = Pool(self._evaluators, process.monotonic, serve.committee, serve.window_ms / 1000.0)
        self._rollout = Rollout(settings.learn, self._pool, serving, self._learner.tell)
        self.sessions = {session.name: session for session in self._made(templates)}
        self._rollout.sessions = self.sessions.values()
        self._selector = selectors.DefaultSelector()
        self._watched: dict[str, tuple[int, int]] = {}  # session → descriptor and what is waited for
        self._restless: set[str] = set()  # sessions that have more to say than fitted into their turn
        self._outcomes: dict[str, list[Outcome | None]] = {}  # of the request under way
        self._unfit: dict[str, tuple[Outcome, str]] = {}  # an answer to it that must not leave, and why
        self._mixes: dict[str, Mix] = {}
        self.times = CallTimes()
        self._counts = {"refused": 0, "conversations": 0, "steps": 0, "frames": 0, "evaluated_again": 0}
        self._score_max = self._score_last = 0.0
        self._errors: deque[str] = deque(maxlen=20)
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
        """Serve until told to leave; then hang up on every engine."""
        for fixed, name in ((self._evaluators.fileno(), _EVALUATORS), (self._learner.fileno(), ""), (lifeline.fileno(), "")):
            self._selector.register(fixed, selectors.EVENT_READ, name)
        held: float | None = None
        while not lifeline.cut_off:
            for key, _ in self._selector.select(self._patience(held)):
                if key.data == _EVALUATORS:
                    for received in self._evaluators.receive():
                        self._evaluator_message(*received)
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
        self._learner.send_candidates()
        self._look_after_stalls(now)
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
            session.connected(made)
            session.connected_at = process.monotonic()
            self._counts["conversations"] += 1
            if not session.faults and _told(session.brief // _OFTEN):
                self._reporter.log("info", "connected", session=session.name)
        self._watch(session)

    def _engine_event(self, session: Session) -> None:
        if session.dialling is not None:
            self._finish_dialling(session, session.dialling)
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
        if not session.forces and _told(session.brief // _OFTEN):
            told = {"dialect": session.dialect, "atoms": len(asked.frames[0]), "periodic": asked.frames[0].periodic}
            self._reporter.log("info", "first frame", session=session.name, **told)
        session.ramp, mix = session.ramp.advance()
        self._outcomes[session.name] = [None] * len(asked.frames)
        self._unfit.pop(session.name, None)
        group = session.group if self._settings.serve.connections > 1 else ""
        for index, frame in enumerate(asked.frames):
            self._pool.add(Job(session.name, session.ticket, frame, mix, index=index, group=group))

    def _end(self, session: Session, fault: str, left: str = "") -> None:
        self._unwatch(session)
        self._restless.discard(session.name)
        forces = session.forces
        session.hang_up()
        self._pool.forget(session.name)
        now = process.monotonic()
        self._stalls.forget(session.name, now)
        # an engine that breaks the rules has cost the others time: not at once again, although it may have had an answer before
        session.dial_at = now + max(session.backoff.next_delay(), _AFTER_FAULT_S if fault else 0.0)
        self._next_chore = min(self._next_chore, session.dial_at)
        session.faults = session.faults + 1 if fault and fault == session.last_fault else int(bool(fault))
        session.last_fault = fault
        session.brief = 0 if fault or now - session.connected_at > _BRIEF_S else session.brief + 1
        if not _told(session.faults if fault else session.brief // _OFTEN):
            return
        if fault:
            self._error(f"{session.name}: {fault}{f' ({session.faults} times in a row)' if session.faults > 1 else ''}")
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
        self._error(f"{session.name}: given up: {why}")
        self._reporter.log("error", "session given up", session=session.name, why=why)

    def _error(self, sentence: str) -> None:
        self._errors.append(sentence)

    # -- answers ---------------------------------------------------------------------------------------------------------------------

    def _evaluator_message(self, sender: str, message: bus.AnyMessage, buffers: list[bytes]) -> None:
        if isinstance(message, bus.Evaluated):
            for outcome in self._pool.done(sender, message, buffers):
                self._outcome(outcome)
        elif isinstance(message, bus.EvaluatorReady):
            if not self._pool.ready_to_serve:
                self._next_chore = 0.0  # engines may be dialled now
            self._rollout.base_scale = message.lpr_scale
            for session in self.sessions.values():
                session.elements, session.potential = message.elements, message.potential
            for outcome in self._pool.ready(sender, message):
                self._outcome(outcome)
        elif isinstance(message, bus.Loaded):
            self._pool.loaded(sender, message)
            if message.error:
                self._error(f"version {message.version} was refused: {message.error}")
            if self._rollout.loaded(message):
                self._reporter.log("info", "swap", version=message.version)
            self._settle()

    def _outcome(self, outcome: Outcome) -> None:
        job = outcome.job
        session = self.sessions[job.session]
        if not session.computing or session.ticket != job.ticket:
            return  # the engine left while its frame was computed
        problem = outcome.error
        if outcome.prediction is not None:
            finding = guards.check_prediction(outcome.prediction)
            problem = finding.sentence if finding.verdict is not guards.Verdict.OK else ""
        outcomes = self._outcomes[session.name]
        outcomes[job.index] = outcome
        if problem and self._evaluated_again(session, job, problem):
            return
        outcomes = self._outcomes[session.name]
        outcomes[job.index] = outcome
        if problem:
            self._unfit[session.name] = (outcome, problem)
        if None not in outcomes:
            self._complete(session, [one for one in outcomes if one is not None])

    def _complete(self, session: Session, outcomes: list[Outcome]) -> None:
        """All answers to a request are there."""
        if session.name not in self._unfit:
            self._judge(session, outcomes)
            return
        outcome, problem = self._unfit.pop(session.name)
        # an evaluator that fails at a frame fails at it again, whatever a label says
        rules = self._firewall.rules if outcome.prediction is not None else policy.Rules()
        if policy.decide(Level.UNFIT, rules, waited=self._stalls.waited(session.name)).act is Act.STALL:
            served = Served(session.forces, outcome, self._certainty(outcome))
            self._stall(session, self._stalls.begin(session.name, session.ticket, outcomes, served, process.monotonic(), None, problem))
        else:
            self._reject(session, problem)

    def _evaluated_again(self, session: Session, job: Job, problem: str) -> bool:
        """An answer is not fit to be served: the last good version may do better. False where there is none that has not been tried."""
        good = session.last_good(job.mix[1])
        if not self._pool.holds(good):
            good = 0
        other = not job.second and job.mix[:2] != (good, good)
        if policy.decide(Level.UNFIT, self._firewall.rules, other=other).act is not Act.AGAIN:
            return False
        self._counts["evaluated_again"] += 1
        if _told(self._counts["evaluated_again"]):
            self._reporter.log("warning", "evaluated again", session=session.name, problem=problem, version=good)
            self._error(f"{session.name}: {problem}; evaluated again with version {good}")
        mix = Mix(good, good, 1.0)
        self._pool.add(Job(job.session, job.ticket, job.frame, mix, job.crashes, second=True, index=job.index, group=job.group))
        return True

    def _certainty(self, outcome: Outcome) -> Certainty:
        return certainty(outcome.lpr, *self._rollout.scale(outcome.job.mix[1]))

    def _judge(self, session: Session, outcomes: list[Outcome]) -> None:
        """All answers to a request are there and are physical: have the policy decide whether they leave now."""
        work = self._swap_work(session, outcomes)
        waited = self._stalls.waited(session.name)
        certainties = [self._certainty(outcome) for outcome in outcomes]
        seen = self._firewall.judge(
            session.memory,
            session.forces,
            outcomes,
            certainties,
            geometry=session.geometry,
            swap_work=work,
            again=waited is not Waited.NOT,
        )
        decision = self._firewall.decide(seen, second=any(outcome.job.second for outcome in outcomes), waited=waited)
        if decision.act is Act.STALL:
            self._stall(session, self._stalls.begin(session.name, session.ticket, outcomes, seen.worst, process.monotonic(), seen))
        elif decision.act is Act.REJECT:
            if not seen.sentence:  # a frame that a guard objects to may be unphysical
                self._learner.flag(session.name, seen.worst, Reason.PRECURSOR)
            why = seen.sentence or f"the force uncertainty is {seen.worst.sure.score or 0.0:.2f} eV/Å"
            self._reject(session, f"{why}, and the policy is to end the session")
        else:
            self._serve(session, outcomes, certainties, seen, decision.mark, work)

    def _swap_work(self, session: Session, outcomes: list[Outcome]) -> float:
        """What the change of versions does at this request, eV."""
        stall = self._stalls.get(session.name)
        if stall is not None and stall.outcomes is not outcomes:  # evaluated again after a wait: the frames are the same
            if stall.problem:
                return 0.0  # there is nothing to compare with
            changes = (_prediction(now).energy - _prediction(then).energy for then, now in zip(stall.outcomes, outcomes, strict=True))
            return self._swap_work(session, stall.outcomes) + sum(changes)
        mix = Mix(*outcomes[0].job.mix)
        weight = weight_step(self._mixes.get(session.name, mix), mix)
        return sum(swap_work(weight, outcome.step, 0.0) for outcome in outcomes) if weight else 0.0

    def _serve(
        self, session: Session, outcomes: list[Outcome], certainties: list[Certainty], seen: Judgement, mark: str, work: float
    ) -> None:
        """Answer one request: a frame, or all frames of a batch."""
        session.swap_work += work
        mix = self._mixes[session.name] = Mix(*outcomes[0].job.mix)
        answers = [(_prediction(o), self._extras(o, sure, session.swap_work, mark)) for o, sure in zip(outcomes, certainties, strict=True)]
        steps, stall = session.forces, self._stalls.get(session.name)
        try:
            after = session.answer(answers, process.monotonic())
        except ProtocolError as error:  # our own bug, or memory that an engine took away: this session ends, the others go on
            self._refuse(session, str(error))
            return
        now = process.monotonic()
        # the answer is out; everything below may take its time
        if stall is None:
            self.times.add(now - session.asked_at)
        else:
            self._reporter.log("info", "stall over", session=session.name, seconds=round(now - stall.since, 1), policy=mark)
            self._stalls.forget(session.name, now)
        if mix.old == mix.new and not outcomes[0].job.second:
            session.answered_by(mix.new)
        self._counts["steps"] += steps > 0
        self._counts["frames"] += len(outcomes)
        self._score_last = session.last_score = seen.worst.sure.score or 0.0
        self._score_max = max(self._score_max, self._score_last)
        if seen.reason is not None and stall is None:
            self._learner.flag(session.name, seen.worst, seen.reason)
        self._firewall.remember(session.memory, seen.worst)
        self._follow(session, after)

    def _extras(self, outcome: Outcome, sure: Certainty, work: float, mark: str) -> bytes:
        mix = Mix(*outcome.job.mix)
        committee = None if outcome.members is None else (outcome.members, _prediction(outcome))
        return extras(self._rollout.name(mix.new), mix, sure.std, sure.atom, work, committee, mark)

    # -- policies --------------------------------------------------------------------------------------------------------------------

    def _stall(self, session: Session, stall: Stall) -> None:
        """An engine waits for a label from now on."""
        why = stall.problem or (stall.judgement.sentence if stall.judgement else "")
        self._reporter.log("info", "stalled", session=session.name, uncertainty=stall.served.sure.std, seen=why)
        self._look_after_stalls(process.monotonic())

    def _look_after_stalls(self, now: float) -> None:
        over, again = self._stalls.due(now, self._learner.heard_at)
        for stall in again:
            self._learner.flag(stall.session, stall.served, Reason.STALLED, stall.ticket)
        for stall in over:
            self._stalls.end(stall, Waited.IN_VAIN)
            limit = "policy.max_stall" if now >= stall.until else "nothing was heard of the learner"
            self._answer_as_it_is(stall, f"it has waited for a label in vain ({limit})")

    def _settled(self, message: bus.Settled) -> None:
        """The learner says what became of a label that an engine waits for."""
        stall = self._stalls.settled(message.session, message.ticket, message.version, message.problem)
        if stall is not None and not stall.waits:
            self._answer_as_it_is(stall, f"it has waited for a label that will not come: {message.problem}")
        self._settle()

    def _settle(self) -> None:
        """Evaluate those again whose labels are learnt, now that the version that knows them serves, or was refused."""
        for stall in self._stalls:
            if not stall.waits or stall.version is None or self._rollout.awaited(stall.version):
                continue
            session, tried = self.sessions[stall.session], {outcome.job.mix[1] for outcome in stall.outcomes}
            if self._rollout.serving in tried:
                self._stalls.end(stall, Waited.IN_VAIN)
                self._answer_as_it_is(stall, "its label has come and did not change what serves")
                continue
            self._stalls.end(stall, Waited.LEARNT)
            old = session.ramp.serving
            session.ramp = self._rollout.fresh_ramp()
            mix = Mix(old, self._rollout.serving, 1.0)  # at once: a ramp would begin with what was not to be served
            for index, outcome in enumerate(stall.outcomes):
                self._outcomes[session.name][index] = None
                self._pool.add(Job(session.name, session.ticket, outcome.job.frame, mix, index=index, group=outcome.job.group))

    def _answer_as_it_is(self, stall: Stall, why: str) -> None:
        """A wait was in vain: what was there before it is served, if it may be, and says so of itself."""
        session = self.sessions[stall.session]
        self._error(f"{session.name}: {why}")
        if stall.problem:
            self._reject(session, f"{stall.problem}; {why}")
        else:
            self._judge(session, stall.outcomes)

    def _reject(self, session: Session, why: str) -> None:
        """End the session; the frames that led to this one are worth a label."""
        for served in self._firewall.precursors(session.memory):
            self._learner.flag(session.name, served, Reason.PRECURSOR)
        self._refuse(session, why)

    # -- learning --------------------------------------------------------------------------------------------------------------------

    def _hear_learner(self) -> None:
        for message in self._learner.heard():
            if isinstance(message, str):
                self._error(message)
            elif isinstance(message, bus.Settled):
                self._settled(message)
            elif self._rollout.wanted(message):
                self._reporter.log("info", "swap", version=message.version)
        self._settle()

    # -- report ----------------------------------------------------------------------------------------------------------------------

    def _report(self, *, now: bool = False) -> None:
        if not now and process.monotonic() < self._next_report:
            return
        self._next_report = process.monotonic() + _REPORT_S
        stalled = {stall.session for stall in self._stalls}
        self._reporter.state(
            **self._counts,
            swaps=self._rollout.swaps,
            ready=self._pool.ready_to_serve,
            force_calls=self.times.count,
            call_ms=self.times.summary(),
            uncertainty={"last": self._score_last, "max": self._score_max},
            serving_version=self._rollout.serving,
            evaluator_restarts=self._pool.restarts,
            busy={str(pid): seconds for pid, seconds in self._pool.busy_since().items()},
            answered=self._pool.answered,
            batches=self._pool.batches_done,
            batch_atoms=self._pool.cap.atoms,
            out_of_memory=self._pool.exhausted,
            stalls={
                "now": len(self._stalls),
                "all": self._stalls.begun,
                "in_vain": self._stalls.in_vain,
                "longest_s": self._stalls.longest_s,
            },
            errors=list(self._errors),
            flags=self._learner.flags,
            candidates_waiting=self._learner.waiting,
            sessions=[_session_state(session, session.name in stalled) for session in self.sessions.values()],
        )


def _told(times: int) -> bool:
    """Whether what happens again and again is told this time: at 1, 2, 4, 8 … times, so that weeks of it do not fill the log."""
    return not times & (times - 1)


def _prediction(outcome: Outcome) -> Prediction:
    assert outcome.prediction is not None
    return outcome.prediction


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
