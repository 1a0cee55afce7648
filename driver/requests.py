"""What becomes of a request between its frames and its answer: evaluated, judged, answered, or kept until its label is there.

Decides nothing by itself: `Firewall` judges and `tumbaga.online.policy` decides. Owns no connection: what a session is to be told goes through
the session, what becomes of its connection is the gateway's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tumbaga.driver import config as configs
from tumbaga.driver import process
from tumbaga.driver.alarms import Alarms
from tumbaga.driver.answers import Certainty, certainty, extras
from tumbaga.driver.firewall import Firewall, Judgement, Served
from tumbaga.driver.learner_link import LearnerLink
from tumbaga.driver.pool import Job, Outcome, Pool
from tumbaga.driver.rollout import Rollout
from tumbaga.driver.session import Result, Session
from tumbaga.driver.stalls import Stall, Stalls
from tumbaga.driver.stats import CallTimes
from tumbaga.online import guards, policy
from tumbaga.online.policy import Act, Level, Waited
from tumbaga.online.ramp import Mix, swap_work, weight_step
from tumbaga.online.records import Frame, Prediction, Reason
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.errors import ProtocolError

_SLOW_S = 0.1  # a call that takes longer is told of in the log


class Requests:
    """All requests under way, at most one a session.

    Args:
        settings: of the run.
        sessions: by name.
        pool: of evaluators.
        rollout: of versions.
        learner: gets what is worth a label.
        reporter: to the supervisor.
        follow: called with what a session does after an answer.
        refuse: called to end a session that gets no number, and why.
        note: takes sentences for the status.
    """

    def __init__(
        self,
        settings: configs.Config,
        sessions: Mapping[str, Session],
        pool: Pool,
        rollout: Rollout,
        learner: LearnerLink,
        reporter: process.Reporter,
        *,
        follow: Callable[[Session, Result], None],
        refuse: Callable[[Session, str], None],
        note: Callable[[str], None],
    ) -> None:
        self._sessions, self._pool, self._rollout, self._learner, self._reporter = sessions, pool, rollout, learner, reporter
        self._follow, self._refuse, self._note = follow, refuse, note
        self._siblings = settings.serve.connections > 1
        self._firewall, self.stalls = Firewall(settings), Stalls(settings.policy.max_stall)
        self._outcomes: dict[str, list[Outcome | None]] = {}  # of the request under way
        self._unfit: dict[str, tuple[Outcome, str]] = {}  # an answer to it that must not leave, and why
        self._mixes: dict[str, Mix] = {}
        self._alarms = Alarms()
        self.times = CallTimes()
        self.steps = self.frames = self.evaluated_again = self.slow = 0
        self.score_max = self.score_last = 0.0

    def ask(self, session: Session, frames: Sequence[Frame]) -> None:
        """Have the frames of a request evaluated."""
        session.ramp, mix = session.ramp.advance()
        if not session.forces:
            self._learner.journal.begins(session.name, mix, session.swap_work)
        self._outcomes[session.name] = [None] * len(frames)
        self._unfit.pop(session.name, None)
        group = session.group if self._siblings else ""
        for index, frame in enumerate(frames):
            self._pool.add(Job(session.name, session.ticket, frame, mix, index=index, group=group))

    def forget(self, session: str, now: float) -> None:
        """A session is gone."""
        self._pool.forget(session)
        self.stalls.forget(session, now)

    def outcome(self, outcome: Outcome) -> None:
        """A frame has been evaluated."""
        job = outcome.job
        session = self._sessions[job.session]
        if not session.computing or session.ticket != job.ticket:
            return  # the engine left while its frame was computed
        problem = outcome.error
        if outcome.prediction is not None:
            finding = guards.check_prediction(outcome.prediction)
            problem = finding.sentence if finding.verdict is not guards.Verdict.OK else ""
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
        if policy.decide(Level.UNFIT, rules, waited=self.stalls.waited(session.name)).act is Act.STALL:
            served = Served(session.forces, outcome, self._certainty(outcome))
            self._stall(session, self.stalls.begin(session.name, session.ticket, outcomes, served, process.monotonic(), None, problem))
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
        self.evaluated_again += 1
        if told_at(self.evaluated_again):
            self._reporter.log("warning", "evaluated again", session=session.name, problem=problem, version=good)
            self._note(f"{session.name}: {problem}; evaluated again with version {good}")
        mix = Mix(good, good, 1.0)
        again = Job(job.session, job.ticket, job.frame, mix, job.crashes, second=True, index=job.index, group=job.group, problem=problem)
        self._pool.add(again)
        return True

    def _certainty(self, outcome: Outcome) -> Certainty:
        return certainty(outcome.lpr, *self._rollout.scale(outcome.job.mix[1]))

    def _judge(self, session: Session, outcomes: list[Outcome]) -> None:
        """All answers to a request are there and are physical: have the policy decide whether they leave now."""
        work = self._swap_work(session, outcomes)
        waited = self.stalls.waited(session.name)
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
            self._stall(session, self.stalls.begin(session.name, session.ticket, outcomes, seen.worst, process.monotonic(), seen))
        elif decision.act is Act.REJECT:
            if not seen.sentence:  # a frame that a guard objects to may be unphysical
                self._learner.flag(session.name, seen.worst, Reason.PRECURSOR)
            why = seen.sentence or f"the force uncertainty is {seen.worst.sure.score or 0.0:.2f} eV/Å"
            self._reject(session, f"{why}, and the policy is to end the session")
        else:
            self._serve(session, outcomes, certainties, seen, decision.mark, work)

    def _swap_work(self, session: Session, outcomes: list[Outcome]) -> float:
        """What the change of versions does at this request, eV."""
        stall = self.stalls.get(session.name)
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
        steps, stall = session.forces, self.stalls.get(session.name)
        try:
            after = session.answer(answers, process.monotonic())
        except ProtocolError as error:  # our own bug, or memory that an engine took away: this session ends, the others go on
            self._refuse(session, str(error))
            return
        now = process.monotonic()
        # the answer is out; everything below may take its time
        if stall is None:
            self._timed(session, now - session.asked_at, outcomes)
        else:
            self._reporter.log("info", "stall over", session=session.name, seconds=round(now - stall.since, 1), policy=mark)
            self.stalls.forget(session.name, now)
        if mix.old == mix.new and not outcomes[0].job.second:
            session.answered_by(mix.new)
        self._account(session, steps, outcomes, seen)
        self.steps += steps > 0
        self.frames += len(outcomes)
        self.score_last = session.last_score = seen.worst.sure.score or 0.0
        self.score_max = max(self.score_max, self.score_last)
        if seen.reason is not None and stall is None:
            self._learner.flag(session.name, seen.worst, seen.reason)
        self._firewall.remember(session.memory, seen.worst)
        self._follow(session, after)

    def _timed(self, session: Session, seconds: float, outcomes: list[Outcome]) -> None:
        """Count a call by what it took; of a slow one the log tells where the time went: what is not the evaluator's was spent waiting."""
        self.times.add(seconds)
        if seconds > _SLOW_S:
            self.slow += 1
            if told_at(self.slow):
                told = {"call": session.forces - 1, "seconds": round(seconds, 4), "evaluating": round(outcomes[-1].seconds, 4)}
                self._reporter.log("info", "slow call", session=session.name, times=self.slow, **told)

    def _account(self, session: Session, call: int, outcomes: list[Outcome], seen: Judgement) -> None:
        """Keep account of what has served a call."""
        others = [outcome for outcome in outcomes if outcome.job.second]
        mix = Mix(*(others or outcomes)[0].job.mix)
        self._learner.journal.served(session.name, call, mix, session.swap_work, seen.worst.sure.score)
        wanted = session.ramp.ramp.to_version if session.ramp.ramp else session.ramp.serving
        for outcome in others:
            alarm = self._alarms.failed(wanted, self.frames, outcome.job.problem)
            if alarm is not None and self._learner.alarm(alarm):
                self._reporter.log("error", "alarm", version=alarm.version, reason=alarm.reason)

    def _extras(self, outcome: Outcome, sure: Certainty, work: float, mark: str) -> bytes:
        mix = Mix(*outcome.job.mix)
        committee = None if outcome.members is None else (outcome.members, _prediction(outcome))
        return extras(self._rollout.name(mix.new), mix, sure.std, sure.atom, work, committee, mark, outcome.energy_std)

    # -- policies --------------------------------------------------------------------------------------------------------------------

    def _stall(self, session: Session, stall: Stall) -> None:
        """An engine waits for a label from now on."""
        why = stall.problem or (stall.judgement.sentence if stall.judgement else "")
        self._reporter.log("info", "stalled", session=session.name, uncertainty=stall.served.sure.std, seen=why)
        self.look_after_stalls(process.monotonic())

    def look_after_stalls(self, now: float) -> None:
        """End the waits whose time is up, and ask the learner again; to be called a few times a second."""
        over, again = self.stalls.due(now, self._learner.heard_at)
        for stall in again:
            self._learner.flag(stall.session, stall.served, Reason.STALLED, stall.ticket, again=stall.asked > 1)
        for stall in over:
            self.stalls.end(stall, Waited.IN_VAIN)
            limit = "policy.max_stall" if now >= stall.until else "nothing was heard of the learner"
            self._answer_as_it_is(stall, f"it has waited for a label in vain ({limit})")

    def settled(self, message: bus.Settled) -> None:
        """The learner says what became of a label that an engine waits for."""
        stall = self.stalls.settled(message.session, message.ticket, message.version, message.problem)
        if stall is not None and not stall.waits:
            self._answer_as_it_is(stall, f"it has waited for a label that will not come: {message.problem}")
        self.settle()

    def settle(self) -> None:
        """Evaluate those again whose labels are learnt, now that the version that knows them serves, or was refused."""
        for stall in self.stalls:
            if not stall.waits or stall.version is None or self._rollout.awaited(stall.version):
                continue
            session, tried = self._sessions[stall.session], {outcome.job.mix[1] for outcome in stall.outcomes}
            newest = self._rollout.newest
            if newest in tried:
                self.stalls.end(stall, Waited.IN_VAIN)
                self._answer_as_it_is(stall, "its label has come and did not change what serves")
                continue
            self.stalls.end(stall, Waited.LEARNT)
            old = session.ramp.serving
            session.ramp = self._rollout.fresh_ramp(newest)
            mix = Mix(old, newest, 1.0)  # at once: a ramp would begin with what was not to be served
            for index, outcome in enumerate(stall.outcomes):
                self._outcomes[session.name][index] = None
                self._pool.add(Job(session.name, session.ticket, outcome.job.frame, mix, index=index, group=outcome.job.group))

    def _answer_as_it_is(self, stall: Stall, why: str) -> None:
        """A wait was in vain: what was there before it is served, if it may be, and says so of itself."""
        session = self._sessions[stall.session]
        self._note(f"{session.name}: {why}")
        if stall.problem:
            self._reject(session, f"{stall.problem}; {why}")
        else:
            self._judge(session, stall.outcomes)

    def _reject(self, session: Session, why: str) -> None:
        """End the session; the frames that led to this one are worth a label."""
        for served in self._firewall.precursors(session.memory):
            self._learner.flag(session.name, served, Reason.PRECURSOR)
        self._refuse(session, why)


def told_at(times: int) -> bool:
    """Whether what happens again and again is told this time: at 1, 2, 4, 8 … times, so that weeks of it do not fill the log."""
    return not times & (times - 1)


def _prediction(outcome: Outcome) -> Prediction:
    assert outcome.prediction is not None
    return outcome.prediction
