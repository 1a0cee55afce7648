"""The evaluators as the gateway sees them: who is free, who holds which version, and which frames are out. No frame is ever forgotten.

A frame given to an evaluator comes back as an answer, or, when that evaluator dies, as work for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from tumbaga.driver import batching
from tumbaga.driver.window import Window
from tumbaga.online.records import Array, Frame, Members, Prediction
from tumbaga.socket_protocol import bus

Mix = tuple[int, int, float]
MAX_CRASHES = 3  # evaluators that one frame may take down before it is given back


@dataclass(eq=False)
class Job:
    """One frame that waits for its force.

    Attributes:
        session: name of the session that asked.
        ticket: number that the session gave it; answers to an old ticket are for nobody.
        frame: the frame.
        mix: versions to serve it with.
        crashes: evaluators that died with it.
        second: whether it is tried again, with another version, because the first answer was not fit to serve.
        alone: whether it is under suspicion, because a batch with it went wrong: then it goes in a batch of its own.
        index: of the frame in its request.
        group: of sessions whose frames come together, such as the beads of one engine; empty for a session without siblings.
        start: its place in the queue.
        problem: what was not fit to serve about the first answer.
    """

    session: str
    ticket: int
    frame: Frame
    mix: Mix
    crashes: int = 0
    second: bool = False
    alone: bool = False
    index: int = 0
    group: str = ""
    start: float = 0.0
    problem: str = ""

    @property
    def atoms(self) -> int:
        """Atoms of the frame: what it costs."""
        return len(self.frame)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The answer to one job, or the reason why there is none; `seconds` is what the evaluator took for its batch, `energy_std` the standard
    deviation of the total energy, eV, NaN where it is not known.
    """

    job: Job
    prediction: Prediction | None
    step: float = 0.0
    lpr: Array = field(default_factory=lambda: np.zeros(0))
    error: str = ""
    members: Members | None = None
    seconds: float = 0.0
    energy_std: float = math.nan


class Channel(Protocol):
    """What the pool needs of the bus endpoint."""

    def send(self, message: bus.AnyMessage, buffers: Sequence[np.ndarray] = (), to: str = "") -> bool:
        """Send at once or not at all."""


@dataclass(eq=False)
class _Evaluator:
    pid: int
    held: set[int] = field(default_factory=lambda: {0})
    batch: int = 0
    jobs: list[Job] = field(default_factory=list)
    since: float = 0.0
    finished: float = 0.0  # when its last batch was done
    took: float = 0.0  # what that took, s
    gone: bool = False  # its process has died, and is being started again


def joined(arrays: list[Any]) -> Any:
    """Return arrays one behind the other, without a copy where there is only one."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class Pool:
    """Hands batches to evaluators.

    Args:
        channel: ROUTER to the evaluators.
        clock: seconds, monotonic.
        members: of the committee that is evaluated beside each frame; 0 for none.
        window: seconds that a frame may wait for those of its siblings.
    """

    def __init__(self, channel: Channel, clock: Callable[[], float], members: int = 0, window: float = 0.0) -> None:
        self._channel, self._clock, self._members = channel, clock, members
        self._window, self._turns, self._returns = Window(window, clock), batching.Turns(), batching.Returns()
        self.cap = batching.Cap()
        self._evaluators: dict[str, _Evaluator] = {}
        self.answered: dict[str, int] = {}
        """Process id of the last evaluator of each name that has given forces."""
        self._waiting: list[Job] = []
        self._batches = 0
        self._paths: dict[int, str] = {}
        self.restarts = 0
        self.batches_done = 0
        self.exhausted = 0  # batches that did not fit into an evaluator's memory

    # -- versions --------------------------------------------------------------------------------------------------------------------

    def require(self, version: int, path: str, in_use: set[int]) -> None:
        """See to it that every evaluator, now and later, holds this version; versions that neither `in_use` nor a frame names may go."""
        jobs = [*self._waiting, *(job for evaluator in self._evaluators.values() for job in evaluator.jobs)]
        kept = in_use | {v for job in jobs for v in job.mix[:2]}
        self._paths = {v: p for v, p in self._paths.items() if v in kept} | {version: path}
        for name, evaluator in self._evaluators.items():
            self._load(name, evaluator, version)

    def _load(self, name: str, evaluator: _Evaluator, version: int) -> None:
        self._channel.send(bus.Load(version, self._paths[version], tuple(self._paths)), to=name)

    def loaded(self, name: str, message: bus.Loaded) -> None:
        """An evaluator has answered to a Load."""
        if message.error:
            self._paths.pop(message.version, None)
        elif name in self._evaluators:
            self._evaluators[name].held.add(message.version)

    def holds(self, version: int) -> bool:
        """Whether all evaluators that are there hold a version."""
        there = [evaluator for evaluator in self._evaluators.values() if not evaluator.gone]
        return bool(there) and all(version in evaluator.held for evaluator in there)

    @property
    def ready_to_serve(self) -> bool:
        """Whether an evaluator has ever been here."""
        return bool(self._evaluators)

    # -- work ------------------------------------------------------------------------------------------------------------------------

    def ready(self, name: str, message: bus.EvaluatorReady) -> list[Outcome]:
        """An evaluator says that it is there. If it is a new process of a known name, its predecessor's frames wait again.

        Returns:
            Outcomes with an error for frames that took down too many evaluators.
        """
        known = self._evaluators.get(name)
        lost: list[Job] = []
        if known is not None and known.pid == message.pid:
            known.gone = False
            # the same process: it speaks in order, so an answer to what it has seen has already been here
            if known.jobs and message.seen >= known.batch:
                lost, known.jobs = known.jobs, []
        else:
            if known is not None:
                self.restarts += 1
                lost = known.jobs
            self._evaluators[name] = fresh = _Evaluator(message.pid)
            for version in self._paths:
                self._load(name, fresh, version)
        return self._again(lost)

    def lost(self, name: str) -> list[Outcome]:
        """An evaluator has hung up: its frames need not wait until there is another one of that name.

        Returns:
            Outcomes with an error for frames that took down too many evaluators.
        """
        evaluator = self._evaluators.get(name)
        if evaluator is None:
            return []
        evaluator.gone = True
        jobs, evaluator.jobs = evaluator.jobs, []
        return self._again(jobs)

    def _again(self, lost: list[Job]) -> list[Outcome]:
        for job in lost:
            job.crashes += 1
            job.alone = True  # one of them may be the cause: the others must not be there when it happens again
            if job.crashes < MAX_CRASHES:
                self._window.returned(job.group)
        self._waiting[:0] = [job for job in lost if job.crashes < MAX_CRASHES]
        for job in lost:
            if job.crashes >= MAX_CRASHES:
                self._window.finished(job.group)
        sentence = f"the evaluator died {MAX_CRASHES} times on this frame"
        return [Outcome(job, None, error=sentence) for job in lost if job.crashes >= MAX_CRASHES]

    def add(self, job: Job) -> None:
        """Take one frame; `dispatch` sends it off."""
        self._window.arrived(job.group)
        self._returns.came(job.session, self._clock())
        self._turns.queue(job)
        self._waiting.append(job)

    def forget(self, session: str) -> None:
        """A session is gone: nothing of it needs to be computed any more."""
        for job in self._waiting:
            if job.session == session:
                self._window.finished(job.group, waiting=True)
        self._waiting = [job for job in self._waiting if job.session != session]
        self._turns.forget(session)
        self._returns.forget(session)

    def dispatch(self) -> float | None:
        """Give what waits to the evaluators that are free, each a ragged batch; frames under suspicion go one by one.

        Returns:
            Seconds after which to call again because frames wait for their siblings, or None.
        """
        if not self._waiting:
            return None
        free = [(name, evaluator) for name, evaluator in self._evaluators.items() if not (evaluator.jobs or evaluator.gone)]
        for index, (name, evaluator) in enumerate(free):
            # where another one is free, whoever comes in a moment finds that
            if len(free) == 1 and (hold := self._returns.hold(self._clock(), evaluator.finished, evaluator.took)):
                return hold
            jobs = self._next_batch(len(free) - index)
            if not jobs:
                break
            if self._send(name, evaluator, jobs):
                self._left(jobs)
        return self._window.remaining() if self._waiting else None

    def _next_batch(self, evaluators: int) -> list[Job]:
        """The frames for the first of so many free evaluators: its share of what may leave, within the cap, in the order of their turns."""
        able = [job for job in self._waiting if job.alone or self._window.open(job.group)]
        if not able:
            return []
        first = min(able, key=lambda job: job.start)
        if first.alone:
            return [first]
        able = [job for job in able if not job.alone]
        if evaluators > 1:
            able.sort(key=lambda job: job.atoms)
            able = able[: batching.split([job.atoms for job in able], evaluators)]
        if sum(job.atoms for job in able) <= self.cap.atoms:
            return able
        return [able[place] for place in batching.chosen(able, self.cap.atoms)]

    def _left(self, jobs: list[Job]) -> None:
        """These frames are with an evaluator now."""
        self._turns.gone(jobs)
        for job in jobs:
            self._window.left(job.group)
        sent = {id(job) for job in jobs}
        self._waiting = [job for job in self._waiting if id(job) not in sent] if len(jobs) < len(self._waiting) else []

    def _send(self, name: str, evaluator: _Evaluator, jobs: list[Job]) -> bool:
        self._batches += 1
        # a version that this evaluator does not hold yet (it was just restarted) is queued for it ahead of this batch
        frames = [job.frame for job in jobs]
        counts, periodic = [len(f) for f in frames], [f.periodic for f in frames]
        message = bus.Evaluate(self._batches, counts, periodic, [job.mix for job in jobs], self._members)
        buffers = [joined([f.numbers for f in frames]), joined([f.positions for f in frames]), joined([f.cell[None] for f in frames])]
        if not self._channel.send(message, buffers, to=name):
            return False
        evaluator.batch, evaluator.jobs, evaluator.since = self._batches, jobs, self._clock()
        return True

    def done(self, name: str, message: bus.Evaluated, buffers: list[bytes]) -> list[Outcome]:
        """Take an evaluator's answer; returns one outcome a frame, none for an answer that nobody waits for.

        A batch that ended in an error says nothing about which of its frames was the cause: they wait again, each alone. If it was too
        large for the evaluator's memory they wait for smaller ones.
        """
        evaluator = self._evaluators.get(name)
        if evaluator is None or message.batch != evaluator.batch or not evaluator.jobs:
            return []
        jobs, evaluator.jobs = evaluator.jobs, []
        self.batches_done += 1
        evaluator.finished, evaluator.took = self._clock(), message.seconds
        total = sum(job.atoms for job in jobs)
        if message.error and len(jobs) > 1:
            if message.exhausted:
                self.exhausted += 1
                self.cap.exhausted(total)
            for job in jobs:
                job.alone = not message.exhausted
                self._window.returned(job.group)
            self._waiting[:0] = jobs
            return []
        for job in jobs:
            self._window.finished(job.group)
        if message.error:
            return [Outcome(job, None, error=message.error) for job in jobs]
        self.answered[name] = evaluator.pid
        self.cap.took(len(jobs), total, message.seconds)
        self._returns.took(message.seconds)
        for job in jobs:
            self._returns.answered(job.session, evaluator.finished)
        forces = bus.array(buffers[0], np.float64, (total, 3))
        virials = bus.array(buffers[1], np.float64, (len(jobs), 3, 3))
        lpr = bus.array(buffers[2], np.float64, (total,))
        committee = self._committee(buffers[3:], len(jobs), total)
        energy_stds = message.energy_stds or [math.nan] * len(jobs)
        outcomes = []
        end = 0
        for i, job in enumerate(jobs):
            rows = slice(end, end := end + len(job.frame))
            prediction = Prediction(message.energies[i], forces[rows], virials[i])
            members = None if committee is None else Members(committee.energies[i], committee.forces[:, rows], committee.virials[i])
            std = energy_stds[i]
            outcomes.append(Outcome(job, prediction, message.steps[i], lpr[rows], members=members, seconds=message.seconds, energy_std=std))
        return outcomes

    def _committee(self, buffers: list[bytes], frames: int, atoms: int) -> Members | None:
        """What the committee says of a whole batch, its forces one behind the other."""
        if not self._members:
            return None
        return Members(
            bus.array(buffers[0], np.float64, (frames, self._members)),
            bus.array(buffers[1], np.float64, (self._members, atoms, 3)),
            bus.array(buffers[2], np.float64, (frames, self._members, 3, 3)),
        )

    def busy_since(self) -> dict[int, float]:
        """Seconds that each busy evaluator has been at its batch, by process id: how the supervisor finds a hung one."""
        now = self._clock()
        return {evaluator.pid: now - evaluator.since for evaluator in self._evaluators.values() if evaluator.jobs}
