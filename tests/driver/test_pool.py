"""No frame is forgotten: transcripts between the pool and evaluators that answer, restart, die and come back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tumbaga.driver.pool import MAX_CRASHES, Job, Outcome, Pool
from tumbaga.online.records import Frame
from tumbaga.socket_protocol import bus

BASE = (0, 0, 1.0)


class Line:
    """A channel that writes down what goes out; names in `gone` take nothing."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bus.AnyMessage, list[np.ndarray]]] = []
        self.gone: set[str] = set()

    def send(self, message: bus.AnyMessage, buffers: Sequence[np.ndarray] = (), to: str = "") -> bool:
        if to in self.gone:
            return False
        self.sent.append((to, message, list(buffers)))
        return True

    def take(self) -> list[tuple[str, bus.AnyMessage]]:
        taken = [(to, message) for to, message, _ in self.sent]
        self.sent.clear()
        return taken


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pool(line: Line, clock: Clock) -> Pool:
    return Pool(line, clock)


def ready(pid: int, seen: int = 0, name: str = "e") -> bus.EvaluatorReady:
    return bus.EvaluatorReady(name, pid, seen, None)


def job(session: str = "s", ticket: int = 1, atoms: int = 2, mix: tuple[int, int, float] = BASE) -> Job:
    return Job(session, ticket, Frame(np.full(atoms, 29), 3.0 * np.arange(3 * atoms, dtype=float).reshape(-1, 3)), mix)


def answer(batch: int, *atoms: int, error: str = "") -> tuple[bus.Evaluated, list[bytes]]:
    """Frame i has energy i, forces i + 0.5, virial i, lpr i; the step is 10 i, the std of the energy 0.1 i."""
    if error:
        return bus.Evaluated(batch, [], [], 0.0, error), []
    places = range(len(atoms))
    forces = np.concatenate([np.full((n, 3), i + 0.5) for i, n in enumerate(atoms)])
    virials = np.stack([np.full((3, 3), float(i)) for i in places])
    lpr = np.concatenate([np.full(n, float(i)) for i, n in enumerate(atoms)])
    stds = [0.1 * i for i in places]
    message = bus.Evaluated(batch, [float(i) for i in places], [10.0 * i for i in places], 0.0, energy_stds=stds)
    return message, [array.tobytes() for array in (forces, virials, lpr)]


def evaluate(line: Line) -> bus.Evaluate:
    """The one thing that was sent is a batch."""
    ((_, message),) = line.take()
    assert isinstance(message, bus.Evaluate)
    return message


def sessions(outcomes: list[Outcome]) -> list[str]:
    return [outcome.job.session for outcome in outcomes]


def test_frames_of_any_size_travel_as_one_batch(pool: Pool, line: Line) -> None:
    """Everything that waits goes out in one message, and each job gets its own numbers back, in order."""
    assert not pool.ready_to_serve
    assert pool.ready("e", ready(1)) == []
    jobs = [job("a", atoms=3), job("b", atoms=1, mix=(1, 2, 0.25)), job("c", atoms=2)]
    for one in jobs:
        pool.add(one)
    pool.dispatch()
    buffers = line.sent[0][2]
    message = evaluate(line)

    assert message == bus.Evaluate(1, [3, 1, 2], [False] * 3, [BASE, (1, 2, 0.25), BASE])
    np.testing.assert_array_equal(buffers[1], np.concatenate([one.frame.positions for one in jobs]))
    assert [buffer.shape for buffer in buffers] == [(6,), (6, 3), (3, 3, 3)]
    outcomes = pool.done("e", *answer(1, 3, 1, 2))
    assert [outcome.job for outcome in outcomes] == jobs
    for i, outcome in enumerate(outcomes):
        assert outcome.prediction is not None
        assert (outcome.prediction.energy, outcome.step, outcome.error) == (i, 10.0 * i, "")
        assert outcome.prediction.forces.tolist() == np.full((len(jobs[i].frame), 3), i + 0.5).tolist()
        assert outcome.prediction.virial.tolist() == np.full((3, 3), float(i)).tolist()
        assert outcome.lpr.tolist() == [i] * len(jobs[i].frame)
        assert outcome.energy_std == 0.1 * i


def test_nobody_to_work_is_no_loss(pool: Pool, line: Line) -> None:
    """Frames that come before the first evaluator, or while it is busy or unreachable, wait for their turn."""
    pool.add(job("a"))
    pool.dispatch()
    assert line.take() == []
    pool.ready("e", ready(1))
    line.gone = {"e"}
    pool.dispatch()
    assert line.take() == []
    line.gone = set()
    pool.dispatch()
    assert evaluate(line).counts == [2]
    pool.add(job("b", atoms=1))
    pool.dispatch()
    assert line.take() == []
    batch = 2  # the first number was spent on the message that was not taken
    assert sessions(pool.done("e", *answer(batch, 2))) == ["a"]
    pool.dispatch()

    assert evaluate(line).counts == [1]


def test_two_evaluators_share_the_work(pool: Pool, line: Line) -> None:
    """A frame that comes while one evaluator is busy goes to the other."""
    pool.ready("e", ready(1))
    pool.ready("f", ready(2, name="f"))
    pool.add(job("a"))
    pool.dispatch()
    pool.add(job("b"))
    pool.dispatch()

    assert [to for to, _ in line.take()] == ["e", "f"]
    assert sessions(pool.done("f", *answer(2, 2))) == ["b"]
    assert sessions(pool.done("e", *answer(1, 2))) == ["a"]


def test_a_heartbeat_duplicates_no_work(pool: Pool, line: Line) -> None:
    """The same process that says it is there, before it has seen the batch, changes nothing."""
    pool.ready("e", ready(1))
    pool.add(job())
    pool.dispatch()
    line.take()
    for _ in range(3):
        assert pool.ready("e", ready(1)) == []
    pool.dispatch()

    assert line.take() == []
    assert sessions(pool.done("e", *answer(1, 2))) == ["s"]
    assert pool.restarts == 0


def test_an_answer_that_got_lost_is_computed_again(pool: Pool, line: Line) -> None:
    """A process that is idle after it saw the batch has answered it; if the answer never came the frames wait again."""
    pool.ready("e", ready(1))
    pool.add(job())
    pool.dispatch()
    line.take()
    assert pool.ready("e", ready(1, seen=1)) == []
    pool.dispatch()

    assert evaluate(line).batch == 2
    assert sessions(pool.done("e", *answer(2, 2))) == ["s"]


def test_frames_of_a_dead_evaluator_are_first_in_line(pool: Pool, line: Line) -> None:
    """Invariant 3: a new process of the name gets the frames that its predecessor took along, before those that came later."""
    pool.ready("e", ready(1))
    pool.add(job("a"))
    pool.dispatch()
    pool.add(job("b", atoms=1))
    line.take()
    assert pool.ready("e", ready(2)) == []
    assert pool.restarts == 1
    served = []
    for _ in range(2):
        pool.dispatch()
        message = evaluate(line)
        served += sessions(pool.done("e", *answer(message.batch, *message.counts)))

    assert served == ["a", "b"]


def test_a_late_answer_is_for_nobody(pool: Pool, line: Line) -> None:
    """The answer of a batch that was given up, or that never was, changes nothing; nor does a second answer."""
    pool.ready("e", ready(1))
    pool.add(job())
    pool.dispatch()
    pool.ready("e", ready(2))
    line.take()

    assert pool.done("e", *answer(1, 2)) == []
    pool.dispatch()
    assert pool.done("e", *answer(1, 2)) == []
    assert pool.done("x", *answer(2, 2)) == []
    assert sessions(pool.done("e", *answer(2, 2))) == ["s"]
    assert pool.done("e", *answer(2, 2)) == []


def test_a_frame_that_kills_is_given_back(pool: Pool, line: Line) -> None:
    """A frame that took down three evaluators comes back with a reason, and the next one is served."""
    pool.ready("e", ready(0))
    pool.add(job("bad"))
    for pid in range(1, MAX_CRASHES):
        pool.dispatch()
        assert pool.ready("e", ready(pid)) == []
    pool.dispatch()
    (outcome,) = pool.ready("e", ready(MAX_CRASHES))

    assert (outcome.job.session, outcome.prediction) == ("bad", None)
    assert outcome.error == "the evaluator died 3 times on this frame"
    pool.add(job("good"))
    line.take()
    pool.dispatch()
    assert len(evaluate(line).counts) == 1


def test_a_frame_that_kills_takes_no_other_along(pool: Pool, line: Line) -> None:
    """Of ten sessions whose frames were in one batch with a frame that kills the evaluator, nine get their forces."""
    pool.ready("e", ready(0))
    for k in range(10):
        pool.add(job(f"s{k}", atoms=5 if k == 3 else 2))
    served: list[str] = []
    failed: list[str] = []
    for pid in range(1, 30):
        pool.dispatch()
        sent = line.take()
        if not sent:
            break
        ((_, message),) = sent
        assert isinstance(message, bus.Evaluate)
        if 5 in message.counts:
            failed += sessions(pool.ready("e", ready(pid)))
        else:
            served += sessions(pool.done("e", *answer(message.batch, *message.counts)))

    assert failed == ["s3"]
    assert sorted(served) == [f"s{k}" for k in range(10) if k != 3]


def test_a_frame_that_raises_takes_no_other_along(pool: Pool, line: Line) -> None:
    """When a batch ends in an error its frames are tried one by one, and only the one at fault gets the error."""
    pool.ready("e", ready(0))
    for k in range(4):
        pool.add(job(f"s{k}", atoms=5 if k == 1 else 2))
    served: list[str] = []
    failed: list[Outcome] = []
    for _ in range(6):
        pool.dispatch()
        sent = line.take()
        if not sent:
            break
        ((_, message),) = sent
        assert isinstance(message, bus.Evaluate)
        error = "RuntimeError: out of memory" if 5 in message.counts else ""
        for outcome in pool.done("e", *answer(message.batch, *message.counts, error=error)):
            if outcome.error:
                failed.append(outcome)
            else:
                served.append(outcome.job.session)

    assert [(outcome.job.session, outcome.error) for outcome in failed] == [("s1", "RuntimeError: out of memory")]
    assert sorted(served) == ["s0", "s2", "s3"]


def test_a_session_that_left_is_forgotten(pool: Pool, line: Line) -> None:
    """Frames of a session that is gone are not sent off any more; those of others are."""
    pool.ready("e", ready(1))
    pool.add(job("a"))
    pool.add(job("b", atoms=1))
    pool.forget("a")
    pool.dispatch()

    assert evaluate(line).counts == [1]


def test_versions_are_loaded_before_the_work_that_needs_them(pool: Pool, line: Line) -> None:
    """A new process of the name is sent every version in use, then the frames of its predecessor."""
    pool.ready("e", ready(1))
    pool.require(1, "v/1", {0, 1})
    pool.require(2, "v/2", {0, 1, 2})
    assert line.take() == [("e", bus.Load(1, "v/1", (1,))), ("e", bus.Load(2, "v/2", (1, 2)))]
    pool.add(job(mix=(1, 2, 0.5)))
    pool.dispatch()
    line.take()
    pool.ready("e", ready(2))
    pool.dispatch()
    sent = [message for _, message in line.take()]

    assert sent[:2] == [bus.Load(1, "v/1", (1, 2)), bus.Load(2, "v/2", (1, 2))]
    assert [type(message) for message in sent[2:]] == [bus.Evaluate]


def test_a_version_is_held_when_every_evaluator_said_so(pool: Pool) -> None:
    """A version counts as held only when all evaluators that are there have loaded it, and not after one of them was replaced."""
    assert not pool.holds(0)
    pool.ready("e", ready(1))
    pool.ready("f", ready(2, name="f"))
    pool.require(1, "v/1", {0, 1})
    assert pool.holds(0)
    pool.loaded("e", bus.Loaded(1))
    assert not pool.holds(1)
    pool.loaded("f", bus.Loaded(1))
    assert pool.holds(1)
    pool.ready("f", ready(3, name="f"))

    assert not pool.holds(1)


def test_a_refused_version_is_not_asked_for_again(pool: Pool, line: Line) -> None:
    """A version that an evaluator refused is not held, and its successor is not sent it."""
    pool.ready("e", ready(1))
    pool.require(1, "v/1", {0, 1})
    pool.loaded("e", bus.Loaded(1, "has changed since it was written"))
    line.take()
    pool.ready("e", ready(2))

    assert line.take() == []
    assert not pool.holds(1)


def test_versions_out_of_use_are_let_go(pool: Pool, line: Line) -> None:
    """Requiring a version names to the evaluator only those still in use."""
    pool.ready("e", ready(1))
    for version in (1, 2, 3):
        pool.require(version, f"v/{version}", {0, version})

    assert line.take()[-1] == ("e", bus.Load(3, "v/3", (3,)))


def test_a_frame_that_waits_keeps_its_versions(pool: Pool, line: Line) -> None:
    """A version that a waiting or travelling frame is to be served with is not let go, even if no session uses it any more."""
    pool.ready("e", ready(1))
    pool.require(1, "v/1", {0, 1})
    pool.require(2, "v/2", {0, 1, 2})
    pool.add(job("a", mix=(0, 1, 1.0)))
    pool.dispatch()
    pool.add(job("b", mix=(2, 2, 1.0)))
    line.take()
    pool.require(3, "v/3", {0, 3})

    assert line.take() == [("e", bus.Load(3, "v/3", (1, 2, 3)))]


def test_the_time_at_a_batch_is_told(pool: Pool, clock: Clock) -> None:
    """A busy evaluator is known by its process and the seconds since it got its batch; an idle one is not mentioned."""
    pool.ready("e", ready(41))
    assert pool.busy_since() == {}
    pool.add(job())
    pool.dispatch()
    clock.now += 7.5

    assert pool.busy_since() == {41: 7.5}
    pool.done("e", *answer(1, 2))
    assert pool.busy_since() == {}


def test_a_batch_that_does_not_fit_into_memory_comes_back_in_smaller_ones(pool: Pool, line: Line) -> None:
    """Out of memory is nobody's fault: the same frames go again, in batches of half the atoms at most."""
    pool.ready("e", ready(1))
    for name in "abcd":
        pool.add(job(name, atoms=10))
    pool.dispatch()
    assert evaluate(line).counts == [10] * 4

    assert pool.done("e", bus.Evaluated(1, [], [], 0.0, "OutOfMemoryError: CUDA out of memory", exhausted=True), []) == []
    served = []
    for batch in (2, 3):
        pool.dispatch()
        assert evaluate(line).counts == [10, 10]
        served += sessions(pool.done("e", *answer(batch, 10, 10)))
    assert sorted(served) == list("abcd")
    assert pool.exhausted == 1


def test_a_single_frame_that_does_not_fit_into_memory_is_told(pool: Pool, line: Line) -> None:
    pool.ready("e", ready(1))
    pool.add(job("a", atoms=10))
    pool.dispatch()
    (outcome,) = pool.done("e", bus.Evaluated(1, [], [], 0.0, "MemoryError: ", exhausted=True), [])

    assert outcome.prediction is None
    assert "MemoryError" in outcome.error


def test_free_evaluators_share_what_waits(pool: Pool, line: Line) -> None:
    """Two devices get half of the atoms each, not one all of them."""
    pool.ready("e", ready(1))
    pool.ready("f", ready(2, name="f"))
    for name in "abcd":
        pool.add(job(name, atoms=10))
    pool.dispatch()

    assert [(to, message.counts) for to, message in line.take() if isinstance(message, bus.Evaluate)] == [("e", [10, 10]), ("f", [10, 10])]
    assert sessions(pool.done("f", *answer(2, 10, 10))) == ["c", "d"]


def test_a_large_frame_waits_for_its_turn_and_then_goes_alone(pool: Pool, line: Line) -> None:
    """Small frames do not wait in one batch with a frame that is larger than a batch should be; it is not starved either."""
    pool.ready("e", ready(1))
    pool.cap.exhausted(200)  # 100 atoms a batch from now on
    batches = []
    pool.add(job("large", atoms=1000))
    pool.add(job("small", atoms=10))
    for batch in range(1, 400):
        pool.dispatch()
        counts = evaluate(line).counts
        batches.append(counts)
        for name in sessions(pool.done("e", *answer(batch, *counts))):
            pool.add(job(name, atoms=1000 if name == "large" else 10))

    assert {tuple(counts) for counts in batches} == {(1000,), (10,)}
    assert batches.count([1000]) == pytest.approx(399 * 26 / (1016 + 26), abs=1)  # each frame costs as 16 atoms more


def test_small_frames_do_not_wait_for_large_ones(pool: Pool, line: Line) -> None:
    """Two free evaluators take frames of like size each, whatever the order in which they came."""
    pool.ready("e", ready(1))
    pool.ready("f", ready(2, name="f"))
    for name, atoms in (("a", 55), ("b", 13), ("c", 38), ("d", 20)):
        pool.add(job(name, atoms=atoms))
    pool.dispatch()

    took = {to: set(message.counts) for to, message in line.take() if isinstance(message, bus.Evaluate)}
    assert took == {"e": {13, 20}, "f": {38, 55}}


def test_what_a_dead_evaluator_had_goes_to_another_at_once(pool: Pool, line: Line) -> None:
    """Nobody waits until it is started again; alone, since the frame may be the cause. Its successor gets new work."""
    pool.ready("e", ready(1))
    pool.ready("f", ready(2, name="f"))
    pool.add(job("a"))
    pool.dispatch()
    line.take()

    assert pool.lost("e") == []
    pool.add(job("b"))
    pool.dispatch()
    assert [(to, message.counts) for to, message in line.take() if isinstance(message, bus.Evaluate)] == [("f", [2])]
    pool.dispatch()
    assert line.take() == []  # a dead one is not asked
    assert not pool.busy_since().keys() - {2}

    assert pool.ready("e", ready(3)) == []
    pool.dispatch()
    assert [to for to, message in line.take() if isinstance(message, bus.Evaluate)] == ["e"]
    assert pool.restarts == 1
    assert pool.lost("nobody") == []


def test_a_frame_that_kills_one_evaluator_after_the_other_is_given_back(pool: Pool, line: Line) -> None:
    """Three deaths with the same frame, of whichever evaluators, and the session is told."""
    pids = {"e": 1, "f": 2}
    for name, pid in pids.items():
        pool.ready(name, ready(pid, name=name))
    pool.add(job("a"))
    told: list[Outcome] = []
    for death in range(3):
        pool.dispatch()
        ((to, _),) = [sent for sent in line.take() if isinstance(sent[1], bus.Evaluate)]
        told = pool.lost(to)
        assert bool(told) == (death == 2)
        pids[to] += 10
        pool.ready(to, ready(pids[to], name=to))

    assert told[0].error == "the evaluator died 3 times on this frame"
