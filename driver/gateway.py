"""The gateway process: owns every engine connection, gathers waiting frames, hands them to evaluators, guards and answers. No torch.

One thread, one loop, no disk: nothing here waits for a label, a fit or a file. It outlives the evaluators and the learner.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import process
from tumbaga.driver.pool import Job, Outcome, Pool
from tumbaga.driver.session import Asked, Ended, Session
from tumbaga.driver.stats import CallTimes
from tumbaga.online import flagging, guards, versions
from tumbaga.online.ramp import Mix, RampState, swap_work, weight_step
from tumbaga.online.records import Array, Reason
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.errors import NotYetError, ProtocolError, TransportError
from tumbaga.socket_protocol.streams import Address, Backoff, Dialling, Stream, dial

_REPORT_S = 0.5
_MAX_UNSENT = 256  # candidates kept while the learner is away
_UNKNOWN_STD = 1e6  # eV/Å: said where an uncertainty is not finite, since JSON and engines know no infinity
TEMPLATE = "template.json"  # what the gateway needs of the template: it cannot read structure files without slow imports


class Gateway:
    """The gateway's state and what it does with everything that arrives.

    Args:
        settings: of the run.
        numbers: the template's atomic numbers, shape (n_atoms,).
        periodic: whether the template is periodic.
        context: zmq.
        reporter: to the supervisor.
        serving: the version to start with and its path; version 0 needs none.
    """

    def __init__(
        self,
        settings: configs.Config,
        numbers: list[int],
        periodic: bool,
        context: zmq.Context[zmq.Socket[bytes]],
        reporter: process.Reporter,
        serving: bus.Serve,
    ) -> None:
        self._settings, self._reporter = settings, reporter
        self._evaluators = bus.Endpoint(context, zmq.ROUTER, bus.EVALUATORS, bind=True)
        self._learner = bus.Endpoint(context, zmq.ROUTER, bus.LEARNER, bind=True)
        self._pool = Pool(self._evaluators, process.monotonic)
        self._random = Random(settings.seed)
        self._flag = flagging.Settings(settings.flag.force_error, settings.flag.audit_every, settings.flag.spacing)
        ramp = self._fresh_ramp(serving.version)
        species = np.asarray(numbers, dtype=np.int64)
        self.sessions = {
            str(address): Session(address, species, periodic, Backoff(Random(settings.seed + i)), ramp)
            for i, address in enumerate(Address.parse(text, settings.serve.prefix) for text in settings.serve.connect)
        }
        self._mixes: dict[str, Mix] = {}
        self._target = serving  # what the learner wants served
        self._serving = serving.version  # what sessions move to
        if serving.path:
            self._pool.require(serving.version, serving.path, {0, serving.version})
        self._scales: dict[int, tuple[float, float]] = {}
        self._base_scale: float | None = None
        if serving.lpr_scale is not None:
            self._scales[serving.version] = (serving.lpr_scale, serving.quantile)
        self._hashes = {0: "base", serving.version: _hash_of(serving)}
        self._unsent: deque[tuple[bus.Candidate, list[Array]]] = deque(maxlen=_MAX_UNSENT)
        self.times = CallTimes()
        self._counts = {"flags": 0, "swaps": 0, "refused": 0, "conversations": 0, "steps": 0}
        self._score_max = self._score_last = 0.0
        self._errors: deque[str] = deque(maxlen=20)
        self._next_report = 0.0

    # -- the loop --------------------------------------------------------------------------------------------------------------------

    def run(self, lifeline: process.Lifeline) -> None:
        """Serve until told to leave; then hang up on every engine."""
        poller = zmq.Poller()
        for fixed in (self._evaluators.socket, self._learner.socket, lifeline.fileno()):
            poller.register(fixed, zmq.POLLIN)
        while not lifeline.cut_off:
            watched = self._watch(poller)
            events = dict(poller.poll(self._patience_ms()))
            for descriptor in watched:
                poller.unregister(descriptor)
            for descriptor, session in watched.items():
                if descriptor in events:
                    self._engine_event(session)
            self._bus_events()
            self._dial_due()
            self._pool.dispatch()
            self._send_candidates()
            self._report()
        for session in self.sessions.values():
            session.hang_up()
        self._report(now=True)

    def _watch(self, poller: zmq.Poller) -> dict[int, Session]:
        watched = {}
        for session in self.sessions.values():
            interest = session.interest()
            if interest:
                descriptor = session.fileno()
                poller.register(descriptor, interest)
                watched[descriptor] = session
        return watched

    def _patience_ms(self) -> int:
        now = process.monotonic()
        due = []
        if self._pool.ready_to_serve:
            due = [s.dial_at for s in self.sessions.values() if s.stream is None and s.dialling is None and not s.given_up]
        return max(1, int(1000 * (min([self._next_report, *due]) - now)))

    # -- engines ---------------------------------------------------------------------------------------------------------------------

    def _dial_due(self) -> None:
        if not self._pool.ready_to_serve:
            return  # a connection that cannot be answered at once makes an engine wait, and other drivers with it
        now = process.monotonic()
        for session in self.sessions.values():
            if session.stream is None and session.dialling is None and not session.given_up and now >= session.dial_at:
                self._dial(session, now)

    def _dial(self, session: Session, now: float) -> None:
        try:
            made = dial(session.address)
        except NotYetError:
            session.dial_at = now + session.backoff.next_delay()
        except TransportError as error:
            self._give_up(session, str(error))
        else:
            self._connected(session, made)

    def _connected(self, session: Session, made: Stream | Dialling) -> None:
        if isinstance(made, Dialling):
            session.dialling = made
            return
        session.connected(made)
        self._counts["conversations"] += 1
        self._reporter.log("info", "connected", session=session.name)

    def _engine_event(self, session: Session) -> None:
        if session.dialling is not None:
            try:
                self._connected(session, session.dialling.finish())
            except NotYetError:
                session.dialling = None
                session.dial_at = process.monotonic() + session.backoff.next_delay()
            except TransportError as error:
                self._give_up(session, str(error))
            return
        session.receive()
        self._follow(session, session.turn())

    def _follow(self, session: Session, result: Asked | Ended | None) -> None:
        """Act on what a session's turn gave."""
        if isinstance(result, Asked):
            session.asked_at = process.monotonic()
            finding = guards.check_frame(result.frame)
            if finding.verdict is guards.Verdict.DEAD:
                self._refuse(session, f"the engine sent a frame that cannot be evaluated: {finding.sentence}")
                return
            session.ramp, mix = session.ramp.advance()
            self._pool.add(Job(session.name, session.ticket, result.frame, mix))
        elif isinstance(result, Ended):
            self._end(session, result.fault)

    def _end(self, session: Session, fault: str) -> None:
        session.hang_up()
        self._pool.forget(session.name)
        session.dial_at = process.monotonic() + session.backoff.next_delay()
        if fault:
            self._error(f"{session.name}: {fault}")
        self._reporter.log("error" if fault else "info", "session ended", session=session.name, forces=session.forces, fault=fault)

    def _refuse(self, session: Session, why: str) -> None:
        """Fail closed: no number leaves; the connection ends with a sentence. After so many in a row the session is given up."""
        self._counts["refused"] += 1
        session.refusals += 1
        self._end(session, f"{why}; the connection was closed rather than answered")
        if session.refusals >= self._settings.serve.max_refusals:
            self._give_up(session, f"{session.refusals} conversations in a row had to be ended ({why})")

    def _give_up(self, session: Session, why: str) -> None:
        session.hang_up()
        session.given_up = why
        self._error(f"{session.name}: given up: {why}")
        self._reporter.log("error", "session given up", session=session.name, why=why)

    def _error(self, sentence: str) -> None:
        self._errors.append(sentence)

    # -- answers ---------------------------------------------------------------------------------------------------------------------

    def _bus_events(self) -> None:
        for endpoint, handle in ((self._evaluators, self._evaluator_message), (self._learner, self._learner_message)):
            while True:
                try:
                    received = endpoint.receive()
                except msgspec.DecodeError as error:
                    self._error(f"a message on the bus could not be read: {error}")
                    continue
                if received is None:
                    break
                handle(*received)

    def _evaluator_message(self, sender: str, message: bus.AnyMessage, buffers: list[bytes]) -> None:
        if isinstance(message, bus.Evaluated):
            for outcome in self._pool.done(sender, message, buffers):
                self._outcome(outcome)
        elif isinstance(message, bus.EvaluatorReady):
            self._base_scale = message.lpr_scale
            for outcome in self._pool.ready(sender, message):
                self._outcome(outcome)
        elif isinstance(message, bus.Loaded):
            self._pool.loaded(sender, message)
            self._version_loaded(message)

    def _outcome(self, outcome: Outcome) -> None:
        job = outcome.job
        session = self.sessions[job.session]
        if not session.computing or session.ticket != job.ticket:
            return  # the engine left while its frame was computed
        problem = outcome.error
        if outcome.prediction is not None:
            finding = guards.check_prediction(outcome.prediction)
            problem = finding.sentence if finding.verdict is not guards.Verdict.OK else ""
        if problem:
            self._second_try(session, job, problem)
        else:
            self._serve(session, outcome)

    def _second_try(self, session: Session, job: Job, problem: str) -> None:
        """The last good version may do better; if that was it, refuse."""
        old, new, _ = job.mix
        good = 0 if old == new else old
        if job.second or old == new == good:
            self._refuse(session, problem)
            return
        fallback = Mix(good, good, 1.0)
        self._reporter.log("warning", "evaluated again", session=session.name, problem=problem, version=fallback.new)
        self._error(f"{session.name}: {problem}; evaluated again with version {fallback.new}")
        self._pool.add(Job(job.session, job.ticket, job.frame, fallback, job.crashes, second=True))

    def _serve(self, session: Session, outcome: Outcome) -> None:
        job, prediction = outcome.job, outcome.prediction
        assert prediction is not None
        mix = Mix(*job.mix)
        work = swap_work(weight_step(self._mixes.get(session.name, mix), mix), outcome.step, 0.0)
        session.swap_work += work
        self._mixes[session.name] = mix
        std, atom, score, lpr = self._uncertainty(mix.new, outcome.lpr)
        extras = _extras(self._version_name(mix.new), mix, std, atom, session.swap_work)
        steps = session.forces
        try:
            after = session.answer(prediction, extras)
        except ProtocolError as error:  # our own bug: this session ends, the others go on
            self._refuse(session, str(error))
            return
        self.times.add(process.monotonic() - session.asked_at)
        self._counts["steps"] += steps > 0
        # the answer is out; everything below may take its time
        self._score_last = session.last_score = score if score is not None else 0.0
        self._score_max = max(self._score_max, self._score_last)
        self._consider(session, steps, score, lpr, outcome)
        self._follow(session, after)

    def _uncertainty(self, version: int, lpr: Array) -> tuple[float, int, float | None, float]:
        """Return largest force std (eV/Å), its atom, the calibrated score (eV/Å, None if unknown), and the largest raw score."""
        largest = float(lpr.max()) if lpr.size else float("nan")
        if not np.isfinite(largest):
            return _UNKNOWN_STD, -1, None, largest
        atom = int(lpr.argmax())
        scale, quantile = self._scales.get(version, (self._base_scale, 2.0))
        if scale is None:
            return _UNKNOWN_STD, atom, None, largest
        return scale * largest, atom, quantile * scale * largest, largest

    def _version_name(self, version: int) -> str:
        return f"{version}-{self._hashes.get(version, '')}"

    # -- learning --------------------------------------------------------------------------------------------------------------------

    def _consider(self, session: Session, step: int, score: float | None, lpr: float, outcome: Outcome) -> None:
        if not self._settings.learn.enabled:
            return
        session.flagger, reason = flagging.step(session.flagger, step, score, self._flag, self._random.random())
        if reason is None:
            return
        self._flagged(session, step, reason, score, lpr, outcome)

    def _flagged(self, session: Session, step: int, reason: Reason, score: float | None, lpr: float, outcome: Outcome) -> None:
        frame, prediction = outcome.job.frame, outcome.prediction
        assert prediction is not None
        self._counts["flags"] += 1
        message = bus.Candidate(session.name, step, reason.value, score or 0.0, lpr, outcome.job.mix[1], frame.periodic, prediction.energy)
        self._unsent.append((message, [frame.numbers, frame.positions, frame.cell, prediction.forces]))  # type: ignore[list-item]

    def _send_candidates(self) -> None:
        while self._unsent and self._learner.send(*self._unsent[0], to=bus.LEARNER):
            self._unsent.popleft()

    def _learner_message(self, sender: str, message: bus.AnyMessage, buffers: list[bytes]) -> None:
        if not isinstance(message, bus.Serve):
            return
        if message.lpr_scale is not None:
            self._scales[message.version] = (message.lpr_scale, message.quantile)
        if message.version != self._target.version:
            self._target = message
            self._hashes[message.version] = _hash_of(message)
            if message.version and not self._pool.holds(message.version):
                self._pool.require(message.version, message.path, self._in_use() | {message.version})
            else:
                self._publish(message.version)

    def _version_loaded(self, message: bus.Loaded) -> None:
        if message.error:
            self._error(f"version {message.version} was refused: {message.error}")
            self._withdraw(message.version)
            self._learner.send(bus.NowServing(message.version, message.error), to=bus.LEARNER)
        elif message.version == self._target.version and message.version != self._serving and self._pool.holds(message.version):
            self._publish(message.version)

    def _withdraw(self, version: int) -> None:
        """A version cannot be served (any more, if an evaluator was restarted): sessions that use it go back to what they came from."""
        for session in self.sessions.values():
            ramp = session.ramp
            if version in (ramp.serving, ramp.waiting) or (ramp.ramp and version in (ramp.ramp.from_version, ramp.ramp.to_version)):
                session.ramp = self._fresh_ramp(0 if ramp.serving == version else ramp.serving)
        if self._serving == version:
            self._serving = max((session.ramp.serving for session in self.sessions.values()), default=0)

    def _fresh_ramp(self, version: int) -> RampState:
        learn = self._settings.learn
        return RampState(version, idle=learn.ramp_pause, n=learn.ramp_steps, rest=learn.ramp_pause)

    def _publish(self, version: int) -> None:
        """Every evaluator holds it: sessions begin to move to it, each over its own ramp."""
        self._serving = version
        self._counts["swaps"] += 1
        for session in self.sessions.values():
            # a session without an engine has nothing to be smooth for
            session.ramp = session.ramp.publish(version) if session.stream is not None else self._fresh_ramp(version)
        self._learner.send(bus.NowServing(version), to=bus.LEARNER)
        self._reporter.log("info", "swap", version=version)

    def _in_use(self) -> set[int]:
        used = {0, self._target.version}
        for session in self.sessions.values():
            ramp = session.ramp
            used |= {ramp.serving, ramp.waiting or 0} | ({ramp.ramp.from_version, ramp.ramp.to_version} if ramp.ramp else set())
        return used

    # -- report ----------------------------------------------------------------------------------------------------------------------

    def _report(self, *, now: bool = False) -> None:
        if not now and process.monotonic() < self._next_report:
            return
        self._next_report = process.monotonic() + _REPORT_S
        self._reporter.state(
            **self._counts,
            ready=self._pool.ready_to_serve,
            force_calls=self.times.count,
            call_ms=self.times.summary(),
            uncertainty={"last": self._score_last, "max": self._score_max},
            serving_version=self._serving,
            evaluator_restarts=self._pool.restarts,
            busy={str(pid): seconds for pid, seconds in self._pool.busy_since().items()},
            batches=self._pool.batches_done,
            errors=list(self._errors),
            candidates_waiting=len(self._unsent),
            sessions=[self._session_state(session) for session in self.sessions.values()],
        )

    def _session_state(self, session: Session) -> dict[str, Any]:
        return {
            "name": session.name,
            "state": session.state,
            "forces": session.forces,
            "version": session.ramp.serving,
            "ramping_to": session.ramp.ramp.to_version if session.ramp.ramp else None,
            "swap_work": session.swap_work,
            "uncertainty": session.last_score,
        }


def _hash_of(serve: bus.Serve) -> str:
    """The hash in a version file's name."""
    return Path(serve.path).stem.rpartition("-")[2] or "base"


def _extras(version: str, mix: Mix, std: float, atom: int, work: float) -> bytes:
    """The extras of one answer: the same keys in every answer, since an engine may ask for them by name."""
    weight = 1.0 if mix.old == mix.new else mix.weight
    told = {
        "tumbaga": {
            "version": version,
            "force_std": std,
            "force_std_atom": atom,
            "policy": "continue",
            "ramp": weight,
            "swap_work": work,
        },
        "tumbaga_force_std": std,
        "tumbaga_version": mix.new,
        "tumbaga_swap_work": work,
    }
    return msgspec.json.encode(told)


def read_serving(run_dir: Path) -> bus.Serve:
    """What served last in this run directory; version 0 where nothing did."""
    try:
        told = json.loads((run_dir / versions.FOLDER / versions.SERVING).read_text())
        return bus.Serve(int(told["version"]), str(told["path"]), told.get("lpr_scale"), float(told.get("quantile", 2.0)))
    except (OSError, ValueError, KeyError):
        return bus.Serve(0, "", None, 2.0)


def main(run_dir: Path, lifeline: process.Lifeline) -> None:
    """Read the run's settings, then serve."""
    settings = configs.load(run_dir)
    template = json.loads((run_dir / TEMPLATE).read_text())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reporter = process.Reporter(context, "gateway")
    gateway = Gateway(settings, template["numbers"], template["periodic"], context, reporter, read_serving(run_dir))
    reporter.log("info", "started", addresses=list(gateway.sessions))
    gateway.run(lifeline)
    reporter.close()


if __name__ == "__main__":
    process.run("gateway", main)
