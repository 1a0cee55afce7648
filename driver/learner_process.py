"""The learner process: joins the learner to the bus, the label workers and the version files. It may lag or die: the simulation goes on.

On SIGUSR1 it drains: no new label is started, running ones are waited for by the supervisor.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import learner_finetune, process, rolling_back
from tumbaga.driver.backends import registry
from tumbaga.driver.client_labels import make_labeller
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.finetuning import Result
from tumbaga.driver.full_disk import FullDisk
from tumbaga.driver.importing import check_elements
from tumbaga.driver.label_work import Work, told
from tumbaga.driver.learner_finetune import Candidate, FineTunes
from tumbaga.driver.recording import Recorder
from tumbaga.driver.rolling_back import RollingBack
from tumbaga.driver.rollout import read_serving
from tumbaga.driver.watching import Watch
from tumbaga.online import quality, selection, spool, versions
from tumbaga.online.errors import StoreFullError, VersionError, is_full
from tumbaga.online.learner import Learner, Proposal, rmse_text
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Frame, Reason, Role
from tumbaga.online.store import FILE, Store, StoredVersion
from tumbaga.online.versions import LastLayer
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
        self._potential = _trainable(settings.potential)
        self._store = Store(run_dir / FILE)
        limits = selection.Limits(settings.flag.force_error, settings.label.budget, settings.label.core_hours)
        method = make_labeller(settings.label.method, **settings.label.options).method
        check_elements(self._store, method, self._potential.spec, run_dir)
        self._first, self._limits, self._method = self._potential, limits, method
        self._origin = self._network = learner_finetune.network_of(self._first)
        self._learner = self._made(self._first)
        self._before = learner_finetune.Before(self._first, self._store, method)
        self._fine_tunes = FineTunes(run_dir, settings, self._store, learner_finetune.can_be_tuned(self._first))
        self._recorder = Recorder(self._store, run_dir, settings.learn.ramp_steps)
        self._rolling = RollingBack(self._store, run_dir)
        self._watch = Watch(run_dir, settings, self._store, method, lambda event, **detail: reporter.log("info", event, **detail))
        self._version, self._path, self._hurry = 0, "", 0
        self._unlearnt = False
        self._noted: dict[str, Any] = {}  # of what serves, as it stands on disk
        self._resume()
        self._busy: dict[str, bus.WorkerBusy] = {}
        self._awaited: dict[int, bus.Candidate] = {}  # frames whose engines wait for the label
        self._found = self._store.counts()["converged"]  # labels that were there when this process began
        self._sent: set[int] = set()  # tasks that this process gave out; what an earlier one had on its way went down with it
        self.draining = False
        self._due = 0.0
        self.gateway, self.workers = ends or make_ends(context)

    def _resume(self) -> None:
        """Serve what served last, and learn what arrived since."""
        names = {f"label-{index}" for index in range(self._settings.label.workers)}
        for task in self._store.running():
            if task.worker not in names:  # of an earlier start, which was killed and had more of them: nobody else will ask for it
                self._store.task_lost(task.task, self._settings.label.attempts, self._settings.label.time_limit)
        known = self._store.versions()
        if not known:
            self._add_base()
            self._unlearnt = self._learner.n_labels > 0  # labels that were imported before the first start
            return
        self._serve_newest()
        self._learner.quantile = replace(self._learner.quantile, q=read_serving(self._run_dir).quantile)
        # labels that were stored when an earlier process died, or released since, and labels that were set aside
        self._unlearnt = self._store.label_ids(self._method, Role.TRAIN) != self._store.version_labels(known[-1].number)

    def _serve_newest(self) -> None:
        """Serve the newest version that is whole and was not refused, else the base."""
        self._version, self._path = 0, ""
        for version in reversed([v for v in self._store.versions() if v.may_serve and v.number > 0]):
            try:
                layer = versions.read(self._run_dir / version.file)
                self._stand_behind(layer.metadata.get(versions.NETWORK, self._origin), version.number)
            except (VersionError, PotentialError) as error:
                self._store.set_version_state(version.number, "refused")
                self._reporter.log("error", "version refused", version=version.number, error=str(error))
                continue
            self._version, self._path = version.number, version.file
            self._learner.serve(layer.readout, layer.covariance)
            return
        self._stand_behind(self._origin, 0)
        self._learner.serve_base()

    def _made(self, potential: Trainable) -> Learner:
        """A learner for a network, taught all labels there are."""
        bounds = quality.Bounds(self._settings.label.max_force, self._settings.label.net_force)
        return Learner(potential, self._store, self._limits, self._method, bounds=bounds, tell=self._told)

    def _told(self, event: str, **detail: Any) -> None:
        self._reporter.log("warning", event, **detail)
        self._store.add_event(event, **detail)

    def _stand_behind(self, network: str, number: int) -> None:
        """Learn behind the network of a version, whichever fine-tune brought it.

        Raises:
            VersionError: the store knows of no such fine-tune.
            PotentialError: its file cannot be loaded.
        """
        if network == self._network:
            return
        potential = self._first
        if network != self._origin:
            brought = learner_finetune.brought_by(self._store, network, number)
            if brought is None:
                raise VersionError(f"version {number}", "was learnt behind a network that no fine-tune of this run has brought")
            wanted = self._settings.potential
            loaded = registry.of_version(wanted.model, self._run_dir / brought.file, "cpu", wanted.dtype)
            assert isinstance(loaded, Trainable)
            potential = loaded
        quantile = self._learner.quantile
        self._potential, self._network, self._learner = potential, network, self._made(potential)
        self._learner.quantile = quantile

    def _add_base(self) -> None:
        """Version 0: what the run started with, whole, so that the run directory can be copied elsewhere."""
        layer = LastLayer(self._learner.readout, self._learner.covariance, {"parent": None, "labels": 0})
        file = versions.write(self._run_dir, 0, self._potential.state(), layer, self._potential.metadata)
        self._store.add_version(StoredVersion(0, file.hash, None, file.path, "served", 0, {}, network=self._origin))

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
            self._look_for_requests()
            self._watch.look(self._recorder.standings, self._version)
            self._tell_gateway()
            if self._learner.scale.known:
                self._note_serving()  # what is known of a version's uncertainty must not be lost with this process
            self._report()

    def _gateway_message(self, message: bus.AnyMessage, buffers: list[bytes]) -> None:
        if isinstance(message, bus.Candidate):
            self._candidate(message, buffers)
        elif isinstance(message, bus.NowServing):
            self._now_serving(message)
        elif isinstance(message, bus.Journal):
            self.gateway.send(bus.Noted(self._recorder.note(message)))
        elif isinstance(message, bus.Alarm):
            self._alarmed(message.version, message.reason, hurry=2)

    def _candidate(self, message: bus.Candidate, buffers: list[bytes]) -> None:
        numbers = bus.array(buffers[0], np.int64, (-1,))
        positions, forces = bus.array(buffers[1], np.float64, (-1, 3)), bus.array(buffers[3], np.float64, (-1, 3))
        frame = Frame(numbers, positions, bus.array(buffers[2], np.float64, (3, 3)), message.periodic)
        known = self._learner.scale.known
        found = self._store.label_state(frame.key) if message.ticket else None
        if found is None or found[1] == "dropped":  # else an engine that waits for it asks once more
            self._learner.candidate(
                frame,
                session=message.session,
                step=self._recorder.number(message.session, message.step),
                reason=Reason(message.reason),
                score=message.score,
                version=message.version,
                energy=message.energy,
                forces=forces,
            )
        if not known:
            self._tell_gateway()
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
        self.gateway.send(bus.Settled(message.session, message.ticket, self._version, problem))

    def _now_serving(self, message: bus.NowServing) -> None:
        if message.error:
            self._store.set_version_state(message.version, "refused")
            self._reporter.log("error", "version refused", version=message.version, error=message.error)
            if message.version == self._version:
                self._serve_newest()
                self._note_serving()
                self._tell_gateway()
        elif message.version and any(v.may_serve for v in self._store.versions() if v.number == message.version):
            self._store.set_version_state(message.version, "served")
            self._store.add_event("swap", version=message.version)

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
        if self._rolling.pinned is not None:
            self._unlearnt = learnt  # nothing new is made while a version is pinned
        elif learnt:
            self._update()
            self._order_fine_tune()
        candidate = self._fine_tunes.came() if self._rolling.pinned is None else None
        if candidate is not None:
            self._take_fine_tune(candidate)
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
        doubt = self._watch.label(result.frame, self._learner.ratio, self._version, self._potential)
        if doubt:
            self._alarmed(self._version, doubt, hurry=1)
        return self._store.role(result.frame) is Role.TRAIN

    def _update(self) -> None:
        started = process.monotonic()
        proposal = self._learner.update()
        if not isinstance(proposal, Proposal):
            self._reporter.log("warning", "update refused", reason=proposal.reason, **proposal.metrics)
            self._store.add_event("update refused", reason=proposal.reason, **proposal.metrics)
            return
        number = max(v.number for v in self._store.versions()) + 1
        layer = LastLayer(proposal.readout, proposal.covariance, {"parent": self._version, **proposal.metrics})
        state = self._potential.state(proposal.readout)
        file = versions.write(self._run_dir, number, state, layer, self._potential.metadata, self._origin)
        self._store.add_version(
            StoredVersion(
                number, file.hash, self._version, file.path, "accepted", self._learner.n_labels, proposal.metrics, network=self._network
            ),
            self._store.label_ids(self._method, Role.TRAIN),
        )
        self._learner.serve(proposal.readout, proposal.covariance)
        self._publish(number, file.path)
        ms = round(1000 * (process.monotonic() - started), 1)
        self._reporter.log("info", "update", version=number, ms=ms, **proposal.metrics)

    def _publish(self, number: int, path: str) -> None:
        self._version, self._path, self._hurry = number, path, 0
        self._note_serving()
        self._tell_gateway()

    # -- going back --------------------------------------------------------------------------------------------------------------------

    def _look_for_requests(self) -> None:
        """Carry out what a person has asked for by a file."""
        request = rolling_back.asked(self._run_dir)
        if request is None:
            return
        outcome = self._rolling.carry_out(request, self._version)
        if outcome.after != self._version:
            self._go_back(hurry=1)
        rolling_back.answer(self._run_dir, outcome)
        self._reporter.log("info", "rollback", before=outcome.before, after=outcome.after, problem=outcome.problem, note=outcome.note)

    def _alarmed(self, version: int, reason: str, hurry: int) -> None:
        """A version must not serve any longer. The labels that made it are kept; it is not made again before another one has come."""
        gone = self._rolling.withdraw(version, reason)
        if self._version in gone:
            self._go_back(hurry)
        if gone:
            self._reporter.log("error", "version withdrawn", version=version, reason=reason, withdrawn=gone, serving=self._version)

    def _go_back(self, hurry: int) -> None:
        self._serve_newest()
        self._hurry = hurry
        self._note_serving()
        self._tell_gateway()

    # -- fine-tunes -----------------------------------------------------------------------------------------------------------------

    def _order_fine_tune(self) -> None:
        order = self._fine_tunes.order(self._version, self._path, self._method)
        if order is not None:
            self._reporter.log("info", "fine-tune ordered", number=order.number, parent=order.parent, labels=len(order.train))

    def _take_fine_tune(self, candidate: Candidate) -> None:
        """Keep what came of a fine-tune; if the gate passed it, learn and serve from its network on."""
        result, potential = candidate.result, candidate.potential
        if potential is None:
            self._fine_tunes.failed(result)
            self._reporter.log("warning", "fine-tune failed", number=result.order.number, reason=result.reason)
            return
        network, learner = learner_finetune.network_of(potential), self._made(potential)
        learner.quantile = self._learner.quantile
        learner.settle()
        result = self._judged_now(result, learner)
        number = max(v.number for v in self._store.versions()) + 1
        layer = LastLayer(learner.readout, learner.covariance, {"parent": result.order.parent, **(result.metrics or {})})
        file = versions.write(self._run_dir, number, potential.state(), layer, potential.metadata, self._origin)
        state = "accepted" if result.passed else "refused"
        version = StoredVersion(number, file.hash, result.order.parent, file.path, state, learner.n_labels, {}, network=network)
        self._fine_tunes.recorded(version, result)
        self._reporter.log(
            "info" if result.passed else "warning", "fine-tune " + state, version=number, reason=result.reason, **(result.metrics or {})
        )
        if result.passed:
            self._potential, self._network, self._learner = potential, network, learner
            self._publish(number, file.path)
            if len(self._store.label_ids(self._method, Role.TRAIN)) > len(result.order.train):
                self._update()  # labels that came while it was trained
        self._order_fine_tune()

    def _judged_now(self, result: Result, learner: Learner) -> Result:
        """The gate held the candidate against the version that it started from; by now another may serve, and more labels are in hand."""
        since = len(self._store.label_ids(self._method, Role.TRAIN)) - len(result.order.train)
        proposal = learner.update() if since else None
        readout = proposal.readout if isinstance(proposal, Proposal) else learner.readout
        before, after = (
            one.errors(weights)["holdout_rmse"] for one, weights in ((self._learner, self._learner.readout), (learner, readout))
        )
        check = learner_finetune.no_worse(before, after, since)
        reason = result.reason if check.passed else f"{check.name}: {check.reason}"
        return replace(result, passed=result.passed and check.passed, reason=reason, checks=(*result.checks, check))

    def _note_serving(self) -> None:
        """On disk for a gateway that starts later, without the learner, and for whoever evaluates the version in another process."""
        told = {"version": self._version, "path": self._path, "lpr_scale": self._scale(), "quantile": self._learner.quantile.q}
        if told != self._noted:
            versions.write_whole(self._run_dir / versions.FOLDER / versions.SERVING, json.dumps(told).encode())
            self._noted = told

    def _scale(self) -> float | None:
        return self._learner.scale.sigma(1.0) if self._learner.scale.known else None

    def _tell_gateway(self) -> None:
        self.gateway.send(bus.Serve(self._version, self._path, self._scale(), self._learner.quantile.q, self._hurry))

    def _notes(self) -> list[str]:
        """What a person should know of the budget; each is kept as an event, once."""
        notes = self._learner.notes()
        for note in set(notes) - {said["said"] for said in self._store.events("budget")}:
            self._told("budget", said=note)
        return notes

    def _report(self) -> None:
        counts = self._store.counts()
        errors = self._learner.errors(self._learner.readout) | self._before.errors(self._learner.n_labels)
        state: dict[str, Any] = {
            "labels": {key: counts[key] for key in ("pending", "running", "converged", "failed", "quarantined")},
            "notes": self._notes(),
            "begun": len(self._sent),
            "waiting": 0 if self._learner.exhausted else sum(q.strategy == self._work.strategy for q in self._store.pending()),
            "dropped": counts["dropped"],
            "flags": counts["flags"],
            "versions": len(self._store.versions()),
            "version": self._version,
            "quantile": self._learner.quantile.q,
            "errors": errors,
            "errors_text": rmse_text(errors, ["holdout_rmse_base", "holdout_rmse"]),
            "workers": {name: {"task": busy.task, "seconds": round(busy.seconds, 1)} for name, busy in self._busy.items()},
            "draining": self.draining,
            "pinned": self._rolling.pinned,
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
