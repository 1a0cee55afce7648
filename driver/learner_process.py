"""The learner process: joins the learner to the bus, the label workers and the version files. It may lag or die: the simulation goes on.

On SIGUSR1 it drains: no new label is started, running ones are waited for by the supervisor.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import process, rolling_back
from tumbaga.driver.backends import registry
from tumbaga.driver.client_labels import make_labeller
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.full_disk import FullDisk
from tumbaga.driver.importing import check_elements
from tumbaga.driver.label_work import Work, told
from tumbaga.driver.lineage import Lineage
from tumbaga.driver.recording import Recorder
from tumbaga.driver.watching import Watch
from tumbaga.online import spool
from tumbaga.online.errors import StoreFullError, is_full
from tumbaga.online.learner import Learner, rmse_text
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Frame, Reason, Role
from tumbaga.online.store import FILE, Store
from tumbaga.socket_protocol import bus

_BEAT_S = 0.5
Ends = tuple[bus.Endpoint, bus.Endpoint]
_PROBLEMS = {
    "labelled": "",
    "pending": "no label is begun any more: their core-hours are spent",
    "quarantined": "the label cannot be trusted and was set aside",
}
_CANDIDATES_A_TURN = 1  # each costs force rows: labels and workers must not wait behind many


class LearnerProcess:
    """Carries out what the learner decides.

    Args:
        run_dir: the run directory.
        settings: of the run.
        context: zmq.
        reporter: to the supervisor.
        work: which frames are given to workers.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: configs.Config,
        context: zmq.Context[zmq.Socket[bytes]],
        reporter: process.Reporter,
        work: Work | None = None,
        ends: Ends | None = None,
    ) -> None:
        self._run_dir, self._settings, self._reporter, self._work = run_dir, settings, reporter, work or Work()
        potential = _trainable(settings.potential)
        self._store = Store(run_dir / FILE)
        method = make_labeller(settings.label.method, **settings.label.options).method
        check_elements(self._store, method, potential.spec, run_dir)
        self.gateway, self.workers = ends or make_ends(context)
        self._lineage = Lineage(run_dir, settings, self._store, potential, method, reporter.log, self.gateway.send)
        self._recorder = Recorder(self._store, run_dir, settings.learn.ramp_steps)
        self._watch = Watch(run_dir, settings, self._store, method, lambda event, **detail: reporter.log("info", event, **detail))
        self._forget_lost_tasks()
        self._unlearnt = self._lineage.resume()
        self._busy: dict[str, bus.WorkerBusy] = {}
        self._awaited: dict[int, bus.Candidate] = {}  # frames whose engines wait for the label
        self._found = self._store.counts()["converged"]  # labels that were there when this process began
        self._sent: set[int] = set()  # tasks that this process gave out; what an earlier one had on its way went down with it
        self.draining = False
        self._due = 0.0

    def _forget_lost_tasks(self) -> None:
        """Tasks of workers of an earlier start, which was killed and had more of them: nobody else will ask for these."""
        names = {f"label-{index}" for index in range(self._settings.label.workers)}
        for task in self._store.running():
            if task.worker not in names:
                self._store.task_lost(task.task, self._settings.label.attempts, self._settings.label.time_limit)

    @property
    def _learner(self) -> Learner:
        """Behind the version that serves."""
        return self._lineage.learner

    # -- messages --------------------------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Handle what waits: results first, then workers, then a few candidates."""
        self._ingest()
        while (received := self.workers.receive()) is not None:
            self._worker_message(received[0], received[1])
        for _ in range(_CANDIDATES_A_TURN):
            received = self.gateway.receive()
            if received is not None:
                self._gateway_message(received[1], received[2])
        if process.monotonic() >= self._due:
            self._due = process.monotonic() + _BEAT_S
            request = rolling_back.asked(self._run_dir)
            if request is not None:
                rolling_back.answer(self._run_dir, self._lineage.carry_out(request))
            self._watch.look(self._recorder.standings, self._lineage.number)
            self._lineage.tell()
            if self._learner.scale.known:
                self._lineage.note_serving()  # what is known of a version's uncertainty must not be lost with this process
            self._report()

    def _gateway_message(self, message: bus.AnyMessage, buffers: list[bytes]) -> None:
        if isinstance(message, bus.Candidate):
            self._candidate(message, buffers)
        elif isinstance(message, bus.NowServing):
            if message.error:
                self._lineage.refused(message.version, message.error)
            else:
                self._lineage.served(message.version)
        elif isinstance(message, bus.Journal):
            self.gateway.send(bus.Noted(self._recorder.note(message)))
        elif isinstance(message, bus.Alarm):
            self._lineage.withdraw(message.version, message.reason, hurry=2)

    def _candidate(self, message: bus.Candidate, buffers: list[bytes]) -> None:
        numbers = bus.array(buffers[0], np.int64, (-1,))
        positions, forces = bus.array(buffers[1], np.float64, (-1, 3)), bus.array(buffers[3], np.float64, (-1, 3))
        frame = Frame(numbers, positions, bus.array(buffers[2], np.float64, (3, 3)), message.periodic)
        known, step = self._learner.scale.known, self._recorder.number(message.session, message.step)
        if message.reason == Reason.AUDIT.value and not self._watch.wants(message.session, step, self._lineage.number):
            return
        found = self._store.label_state(frame.key) if message.ticket else None
        if found is None or found[1] == "dropped":  # else an engine that waits for it asks once more
            self._learner.candidate(
                frame,
                session=message.session,
                step=step,
                reason=Reason(message.reason),
                score=message.score,
                version=message.version,
                energy=message.energy,
                forces=forces,
            )
        if not known:
            self._lineage.tell()
        if message.ticket:
            self._wait_for(message, frame)

    def _wait_for(self, message: bus.Candidate, frame: Frame) -> None:
        """An engine waits for this frame's label. It is asked for again and again, so that nothing needs to be remembered over a restart."""
        found = self._store.label_state(frame.key)
        if found is None or found[1] == "dropped":
            self._settle(message, "the frame was not taken for a label: the budget is spent, or nothing could be learnt from it")
            return
        if found[1] == "pending":
            self._store.hurry(found[0])
        self._awaited[found[0]] = message
        self._settle_what_came()

    def _settle_what_came(self) -> None:
        """Tell the gateway of frames that an engine waits for and whose labels have ended; the version that knows them was told before."""
        for frame_id, message in list(self._awaited.items()):
            state = self._store.label_state(self._store.frame(frame_id).key)
            if state is None or state[1] == "running" or (state[1] == "pending" and not self._learner.exhausted):
                continue
            del self._awaited[frame_id]
            self._settle(message, _PROBLEMS.get(state[1], f"the label {state[1]}"))

    def _settle(self, message: bus.Candidate, problem: str) -> None:
        self.gateway.send(bus.Settled(message.session, message.ticket, self._lineage.number, problem))

    def _worker_message(self, sender: str, message: bus.AnyMessage) -> None:
        if isinstance(message, bus.WorkerBusy):
            self._busy[message.name] = message
        elif isinstance(message, bus.WorkerIdle):
            self._busy.pop(message.name, None)
            self._idle(sender, message)

    def _idle(self, sender: str, worker: bus.WorkerIdle) -> None:
        """Find out what became of this worker's last task, then give it a new one."""
        self._ingest()
        for task in self._store.running():
            if task.worker != worker.name:
                continue
            if task.task in self._sent and task.pid == worker.pid and worker.seen < task.task:
                return  # it is on its way to the worker
            # a label that ended is in the spool, and thereby no longer running: this one died with its worker
            again = self._store.task_lost(task.task, self._settings.label.attempts, self._settings.label.time_limit)
            self._reporter.log("warning", "label lost", frame=task.frame, again=again)
        enough = self._work.most and len(self._sent) >= self._work.most
        chosen = None if self.draining or enough else self._learner.next_frame(self._work.strategy)
        if chosen is not None:
            frame = self._store.frame(chosen.frame)
            number = self._store.start_task(chosen.frame, worker.name, worker.pid, chosen.role, self._settings.label.cores)
            task_message = bus.Task(number, chosen.frame, frame.key, frame.periodic)
            if self.workers.send(task_message, [frame.numbers, frame.positions, frame.cell], to=sender):
                self._sent.add(number)

    def close(self) -> None:
        """Leave in order: what is in the spool is stored, what was not finished waits again and is no failure."""
        self._ingest()
        while (received := self.gateway.receive()) is not None:
            if isinstance(received[1], bus.Journal):
                self._recorder.note(received[1])
        self._recorder.keep()
        self._store.release_running()
        self._report()
        self._store.close()

    def drop(self) -> None:
        """Close the store as a kill would, if it is not closed: nothing is released, and the next learner goes on from what is in it."""
        self._store.close()

    # -- labels and versions ---------------------------------------------------------------------------------------------------------

    def _ingest(self) -> None:
        """Store every result in the spool, then learn from the new training labels."""
        learnt, self._unlearnt = self._unlearnt, False
        for path, result in list(spool.waiting(self._run_dir)):
            if result is None:
                path.rename(path.with_suffix(".unreadable"))
                self._reporter.log("error", "unreadable result", file=str(path))
                continue
            learnt |= self._take(result)
            path.unlink()
        if self._lineage.pinned is not None:
            self._unlearnt = learnt  # nothing new is made while a version is pinned
        else:
            if learnt:
                self._lineage.update()
                self._lineage.order_fine_tune()
            self._lineage.look_for_fine_tune()
        if self._awaited:
            self._settle_what_came()

    def _take(self, result: spool.Result) -> bool:
        """Store one result; True if there is something new to learn from."""
        if result.label is None:
            self._store.add_failure(result.task, result.failure)
            self._reporter.log("warning", "label failed", frame=result.frame, reason=result.failure)
            return False
        if not self._learner.label(result.task, result.frame, result.label):
            return False
        doubt = self._watch.label(result.frame, self._learner.ratio, self._lineage.number, self._lineage.potential)
        if doubt:
            self._lineage.withdraw(self._lineage.number, doubt, hurry=1)
        return self._store.role(result.frame) is Role.TRAIN

    def _notes(self) -> list[str]:
        """What a person should know of the budget; each is kept as an event, once."""
        notes = self._learner.notes()
        for note in set(notes) - {said["said"] for said in self._store.events("budget")}:
            self._lineage.note("budget", said=note)
        return notes

    def _report(self) -> None:
        counts = self._store.counts()
        errors = self._lineage.errors()
        state: dict[str, Any] = {
            "labels": {key: counts[key] for key in ("pending", "running", "converged", "failed", "quarantined")},
            "notes": self._notes(),
            "begun": len(self._sent),
            "waiting": 0 if self._learner.exhausted else sum(q.strategy == self._work.strategy for q in self._store.pending()),
            "dropped": counts["dropped"],
            "flags": counts["flags"],
            "versions": len(self._store.versions()),
            "version": self._lineage.number,
            "quantile": self._learner.quantile.q,
            "errors": errors,
            "errors_text": rmse_text(errors, ["holdout_rmse_base", "holdout_rmse"]),
            "workers": {name: {"task": busy.task, "seconds": round(busy.seconds, 1)} for name, busy in self._busy.items()},
            "draining": self.draining,
            "pinned": self._lineage.pinned,
            "coverage": self._watch.coverage(1.0 - self._learner.quantile.miscoverage),
            "convergence": self._watch.report(),
            "answered": {"learner": os.getpid()} if counts["converged"] > self._found else {},
        }
        self._reporter.state(**state)


def _trainable(settings: configs.Potential) -> Trainable:
    potential = registry.load(settings.model, "cpu", settings.dtype)
    if not (isinstance(potential, Trainable) and potential.spec.n_hidden):
        raise PotentialError(settings.model, "cannot learn, it has no linear readout; serve it with --no-learn (learn.enabled = false)")
    return potential


def make_ends(context: zmq.Context[zmq.Socket[bytes]]) -> Ends:
    """The learner's ends of the lines to the gateway and to the label workers."""
    return (
        bus.Endpoint(context, zmq.DEALER, bus.LEARNER, bind=False, identity=bus.LEARNER),
        bus.Endpoint(context, zmq.ROUTER, bus.LABELS, bind=True),
    )


def main(run_dir: Path, lifeline: process.Lifeline) -> None:
    """Learn until told to leave; while the disk is full, wait for room."""
    os.nice(5)  # the simulation comes first
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reporter = process.Reporter(context, "learner")
    settings, work = told(run_dir, sys.argv[2:])
    asked = threading.Event()
    signal.signal(signal.SIGUSR1, lambda *_: asked.set())
    gateway, workers = make_ends(context)
    poller = zmq.Poller()
    for watched in (gateway.socket, workers.socket, lifeline.fileno()):
        poller.register(watched, zmq.POLLIN)

    def going_on() -> bool:
        poller.poll(int(1000 * _BEAT_S))
        return not lifeline.cut_off

    def learn() -> None:
        learner = LearnerProcess(run_dir, settings, context, reporter, work, (gateway, workers))
        reporter.log("info", "ready", pid=os.getpid())
        try:
            while going_on():
                learner.draining = asked.is_set()
                learner.turn()
            learner.close()
        finally:
            learner.drop()

    while not lifeline.cut_off:
        try:
            learn()
            break
        except (OSError, StoreFullError) as error:
            if not is_full(error):
                raise
        full = FullDisk(run_dir, gateway, workers, reporter)
        while not full.turn(draining=asked.is_set()) and going_on():
            pass
    reporter.close()


if __name__ == "__main__":
    process.run("learner", main)
