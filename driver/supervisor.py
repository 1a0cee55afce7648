"""The supervisor: starts, watches and restarts the processes of a run, keeps its status file and logs, and stops everything in order.

Order of starting: 1 gateway, 2 evaluators (before them what they are forked from), 3 learner, 4 label workers, 5 engine. Order of stopping:
engine, label workers, learner, evaluators, gateway: whoever may still send something goes before whoever receives it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import devices, process
from tumbaga.driver.children import Child, Zygote, reap
from tumbaga.driver.engines import FOLDER, STARTED, Engine
from tumbaga.driver.errors import ConfigError, DriverError
from tumbaga.driver.gateway import TEMPLATE
from tumbaga.driver.rundir import RunDir
from tumbaga.driver.structures import read_frame
from tumbaga.online.versions import write_whole
from tumbaga.socket_protocol import bus

_TICK_MS = 100
_REPORTING = ("gateway", "learner", "trainer")  # whose last reports the last status is made of
_LAST_WORDS_S = 1.0
_STATUS_S = 0.5
_HUNG_S = 600.0  # an evaluator that is at one batch for so long is killed
_CATCH_UP_S = 3.0
_DRAIN_S = 180.0  # how long the end of a run waits for labels that are under way
_PATIENCE = {"engine": 30.0, "label": 5.0, "other": 10.0}

Observer = Callable[[dict[str, Any]], None]


class Supervisor:
    """One run.

    Args:
        run_dir: held by this process.
        settings: of the run; a frozen copy is written.
        engine: to start as well, or None when engines come by themselves.
        observe: called with the status about twice a second.
    """

    def __init__(self, run_dir: RunDir, settings: configs.Config, engine: Engine | None = None, observe: Observer | None = None) -> None:
        self._run_dir, self._path, self._settings, self._engine = run_dir, run_dir.path, settings, engine
        self._observe = observe or (lambda status: None)
        self._children = _children(self._path, settings)
        self._engine_process: subprocess.Popen[bytes] | None = None
        self._reports: dict[str, dict[str, Any]] = {}
        self._loggers: dict[str, Any] = {}
        self._left: set[str] = set()  # processes that have said their last
        self._stops = 0
        self._state = "starting"
        self._errors: list[str] = []
        self._began = self._next_status = process.monotonic()
        self._engine_seconds = 0.0

    # -- life ------------------------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Run until the engine ends, a signal comes or nothing can be saved any more; returns the last status."""
        os.chdir(self._path)
        self._prepare()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox = bus.Endpoint(context, zmq.PULL, bus.SUPERVISOR, bind=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._asked_to_stop)
        with process.Signals() as self._signals:
            try:
                for child in self._children:
                    child.start()
                self._loop()
                self._drain()
            finally:
                self._stop()
                self._inbox.close()
                context.term()
        return self.status()

    def _prepare(self) -> None:
        write_whole(self._path / configs.FILE, configs.dumps(self._settings).encode())
        files = {"": self._settings.potential.template, **self._settings.serve.templates}
        read = {address: (file, read_frame(file)) for address, file in files.items() if file}
        told = {
            address: {"numbers": frame.numbers.tolist(), "periodic": frame.periodic, "source": Path(file).name}
            for address, (file, frame) in read.items()
        }
        write_whole(self._path / TEMPLATE, json.dumps(told).encode())

    def _asked_to_stop(self, *_: object) -> None:
        self._stops += 1

    def _loop(self) -> None:
        started = False
        while not self._stops:
            self._listen()
            if self._faults():
                return
            if not started and self._ready():
                started, self._state = True, "running"
                self._start_engine()
            if self._engine_ended() or self._given_up():
                return
            self._tick()

    def _faults(self) -> bool:
        """Look after all children; True if the run cannot go on. It can without a learner, a label worker or one of several evaluators."""
        reap({child.pid for child in self._children} | ({self._engine_process.pid} if self._engine_process is not None else set()))
        for child in self._children:
            fault = self._watch(child)
            if not fault:
                continue
            if self._state == "starting" or self._serves_no_more(child):
                self._fail(fault)
                return True
            if fault not in self._errors:
                self._errors.append(fault)
                self._log("supervisor", "error", "given up", child=child.name, fault=fault)
        return False

    def _serves_no_more(self, lost: Child) -> bool:
        """Whether without this child no engine gets an answer."""
        evaluators = [child for child in self._children if child.name.startswith("evaluator")]
        return lost.name == "gateway" or (lost in evaluators and all(child.given_up for child in evaluators))

    def _watch(self, child: Child) -> str:
        died = child.died_with()
        if died is not None:
            self._log(child.name, "warning", "process died", code=died)
        return child.watch()

    def _ready(self) -> bool:
        """Whether the gateway has an evaluator; engines that tumbaga starts need not wait for it then."""
        return bool(self._reports.get("gateway", {}).get("ready"))

    def _given_up(self) -> bool:
        """All sessions were given up: nothing more will happen."""
        sessions = self._reports.get("gateway", {}).get("sessions", [])
        if not sessions or any(session["state"] != "given up" for session in sessions):
            return False
        self._fail("every session was given up: " + "; ".join(self._reports["gateway"]["errors"][-2:]))
        return True

    def _fail(self, sentence: str) -> None:
        self._state = "failed"
        self._errors.append(sentence)

    # -- the engine ------------------------------------------------------------------------------------------------------------------

    def _start_engine(self) -> None:
        if self._engine is None:
            return
        # a supervisor that is killed takes its engine along
        command = [sys.executable, "-m", "tumbaga.driver.tether", str(os.getpid()), *self._engine.prepare(self._path)]
        write_whole(self._path / STARTED, json.dumps({"at": time.time(), "step": self._engine.done}).encode())
        with open(self._path / process.LOGS / "engine.log", "ab") as log:
            self._engine_process = subprocess.Popen(
                command, cwd=self._path / FOLDER, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._began = process.monotonic()
        self._log("supervisor", "info", "engine started", engine=self._engine.name, pid=self._engine_process.pid)

    def _engine_ended(self) -> bool:
        if self._engine is None or self._engine_process is None or self._engine_process.poll() is None:
            return False
        self._engine_seconds = process.monotonic() - self._began
        if self._engine_process.returncode:
            text = (self._path / process.LOGS / "engine.log").read_text(errors="replace").strip().splitlines()
            self._fail(
                f"{self._engine.name} ended with code {self._engine_process.returncode}; its last words: {text[-1] if text else '(none)'}"
            )
            return True
        dynamics, step = self._engine.dynamics, self._engine.progress(self._path).step
        if step + dynamics.stride <= dynamics.steps:
            # an engine that was asked to leave by somebody else says that all went well
            self._fail(f"{self._engine.name} left at step {step} of {dynamics.steps}; the same command goes on from there")
        return True

    # -- the end ---------------------------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """The engine is done: no new labels, but those under way were paid for and are waited for."""
        learner = next((child for child in self._children if child.name == "learner"), None)
        if learner is None or self._stops or self._state == "failed":
            return
        self._state = "finishing labels"
        learner.signal(signal.SIGUSR1)
        until = process.monotonic() + min(_DRAIN_S, self._settings.label.time_limit)
        drained = False
        while not self._stops and not drained and process.monotonic() < until:
            self._listen()
            if self._faults() or self._watch(learner):
                return
            report = self._reports.get("learner", {})
            drained = bool(report.get("draining")) and not report["labels"]["running"]
            self._tick()
        self._catch_up(process.monotonic() + _CATCH_UP_S)

    def _catch_up(self, until: float) -> None:
        """Let the newest version reach the gateway, so that what the status says is what a next start serves."""
        while not self._stops and process.monotonic() < until:
            served, newest = (
                self._reports.get(name, {}).get(key) for name, key in (("gateway", "serving_version"), ("learner", "version"))
            )
            if served == newest:
                return
            self._listen()

    def _stop(self) -> None:
        if self._state in ("running", "starting"):
            self._state = "stopping"
        self._tick(force=True)
        self._stop_engine()
        for child in reversed(self._children):
            patience = _PATIENCE["label" if child.name.startswith("label") else "other"] if self._stops < 2 else 0.1
            if child.stop(patience) and child.name in _REPORTING:
                self._hear_out(child.name)
        self._listen()
        self._state = self._last_state()
        self._tick(force=True)

    def _hear_out(self, name: str) -> None:
        """What a process said last is on its way when it has ended; without that the counts would be those of half a second before."""
        until = process.monotonic() + _LAST_WORDS_S
        while name not in self._left and process.monotonic() < until:
            self._listen()

    def _last_state(self) -> str:
        if self._state == "failed":
            return "failed"
        return "stopped" if self._stops else "finished"

    def _stop_engine(self) -> None:
        running = self._engine_process
        if running is None or running.poll() is not None:
            return
        running.send_signal(signal.SIGTERM)  # i-PI writes RESTART on this
        try:
            running.wait(_PATIENCE["engine"])
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
        self._engine_seconds = process.monotonic() - self._began

    # -- reports ---------------------------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        poller = zmq.Poller()
        poller.register(self._inbox.socket, zmq.POLLIN)
        poller.register(self._signals, zmq.POLLIN)  # a child has died, most often
        poller.poll(_TICK_MS)
        self._signals.clear()
        while True:
            try:
                received = self._inbox.receive()
            except msgspec.DecodeError as error:
                self._log("supervisor", "error", "unreadable message", error=str(error))
                continue
            if received is None:
                return
            message = received[1]
            if isinstance(message, bus.Report):
                self._reports[message.process] = message.state
                self._heard_of_work(message.state)
            elif isinstance(message, bus.LogLine):
                if message.event == process.LEFT:
                    self._left.add(message.process)
                self._log(message.process, message.level, message.event, **message.detail)

    def _heard_of_work(self, report: dict[str, Any]) -> None:
        """Evaluators at one batch for too long are killed; whoever has done work may die as often as it likes: each time some was done."""
        busy: dict[str, float] = report.get("busy", {})
        for child in self._children:
            child.worked(report.get("answered", {}).get(child.name, 0))
            if child.pid is not None and busy.get(str(child.pid), 0.0) > _HUNG_S:
                self._log(child.name, "error", "hung", seconds=busy[str(child.pid)])
                child.signal(signal.SIGKILL)

    def _log(self, name: str, level: str, event: str, **detail: Any) -> None:
        if name not in self._loggers:
            self._loggers[name] = process.log_to_file(self._path, name)
        detail.pop("level", None)
        getattr(self._loggers[name], level if level in ("info", "warning", "error") else "info")(event, **detail)

    def _tick(self, *, force: bool = False) -> None:
        if not force and process.monotonic() < self._next_status:
            return
        self._next_status = process.monotonic() + _STATUS_S
        status = self.status()
        try:
            self._run_dir.write_status(status)
        except OSError as error:  # a full disk must not end the run
            self._log("supervisor", "error", "status not written", error=str(error))
        self._observe(status)

    def status(self) -> dict[str, Any]:
        """The state of the run as one JSON-compatible object."""
        gateway, learner = self._reports.get("gateway", {}), self._reports.get("learner", {})
        restarts = {child.name: child.restarts for child in self._children}
        status: dict[str, Any] = {
            "state": self._state,
            "model": self._settings.potential.model,
            "seconds": round(process.monotonic() - self._began, 1) if not self._engine_seconds else round(self._engine_seconds, 1),
            "steps": gateway.get("steps", 0),
            "sessions": gateway.get("sessions", []),
            "serving_version": gateway.get("serving_version", 0),
            "canary": gateway.get("canary"),
            "versions": learner.get("versions", 1),
            "labels": learner.get("labels", {"pending": 0, "running": 0, "converged": 0, "failed": 0, "quarantined": 0}),
            "notes": learner.get("notes", []),
            "flags": gateway.get("flags", 0),
            "swaps": gateway.get("swaps", 0),
            "refused": gateway.get("refused", 0),
            "force_calls": gateway.get("force_calls", 0),
            "frames": gateway.get("frames", 0),
            "call_ms": gateway.get("call_ms", {"p50": 0.0, "p99": 0.0, "max": 0.0}),
            "uncertainty": gateway.get("uncertainty", {"last": 0.0, "max": 0.0}),
            "quantile": learner.get("quantile", 2.0),
            "force_rmse": learner.get("errors", {}),
            "fine_tune": self._reports.get("trainer", {}),
            "pinned": learner.get("pinned"),
            "coverage": learner.get("coverage", {}),
            "convergence": learner.get("convergence", {}),
            "workers": learner.get("workers", {}),
            "evaluator_restarts": sum(count for name, count in restarts.items() if name.startswith("evaluator-")),
            "batch_atoms": gateway.get("batch_atoms", 0),
            "out_of_memory": gateway.get("out_of_memory", 0),
            "evaluated_again": gateway.get("evaluated_again", 0),
            "stalls": gateway.get("stalls", {"now": 0, "all": 0, "in_vain": 0, "longest_s": 0.0}),
            "restarts": restarts,
            "errors": [*self._errors, *gateway.get("errors", []), *learner.get("problems", [])],
            "pids": {child.name: child.pid for child in self._children},
        }
        if self._engine is not None:
            progress = self._engine.progress(self._path)
            # the gateway counts from its own start; the output knows what was done before
            status["steps"] = max(status["steps"] + self._engine.done, progress.step)
            status["engine"] = {"name": self._engine.name, "step": progress.step, "temperature": _finite(progress.temperature)}
            status["engine"] |= {"mean_temperature": _finite(progress.mean_temperature), "finite": progress.finite}
            if self._engine_process is not None:
                status["pids"]["engine"] = self._engine_process.pid if self._engine_process.poll() is None else None
        return status


def _finite(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None


def _children(path: Path, settings: configs.Config) -> list[Child]:
    made = [
        Child("gateway", "tumbaga.driver.gateway", path, process.monotonic),
    ]
    evaluators, gpu = devices.of_run(settings), devices.has_gpu()
    zygote = Zygote(path, process.monotonic) if any(devices.forkable(device, gpu) for device in evaluators) else None
    if zygote is not None:
        made.append(zygote)
    for index, device in enumerate(evaluators):
        name, parent = f"evaluator-{index}", zygote if devices.forkable(device, gpu) else None
        made.append(Child(name, "tumbaga.driver.evaluator", path, process.monotonic, (name, device), parent))
    if settings.learn.enabled:
        made.append(Child("learner", "tumbaga.driver.learner_process", path, process.monotonic))
        # a cluster is the business of one process, however many labels it has under way there
        workers = min(1, settings.label.workers) if settings.label.cluster else settings.label.workers
        names = [f"label-{i}" for i in range(workers)]
        made += [Child(name, "tumbaga.driver.label_worker", path, process.monotonic, (name,)) for name in names]
        if settings.learn.finetune_every:
            made.append(Child("trainer", "tumbaga.driver.trainer_process", path, process.monotonic))
    return made


def check(settings: configs.Config) -> None:
    """Find a user's mistakes before anything is started.

    Raises:
        DriverError: a sentence about the first one.
    """
    from tumbaga.driver.backends import registry
    from tumbaga.driver.client_labels import ClientLabeller, make_labeller
    from tumbaga.driver.slot import Slot
    from tumbaga.online.errors import OnlineError
    from tumbaga.online.labels.pyscf_engine import PySCFLabeller
    from tumbaga.socket_protocol.errors import TransportError
    from tumbaga.socket_protocol.streams import Address

    settings.check()
    if registry.weights_file(settings.potential.model) is None and settings.serve.committee:
        # a toy: cheap to load here, while weights are left to the evaluator, which asks the same
        Slot(registry.load(settings.potential.model)).need_committee(settings.serve.committee)
    templates = [read_frame(file) for file in (settings.potential.template, *settings.serve.templates.values()) if file]
    try:
        for text in settings.serve.connect:
            Address.parse(text, settings.serve.prefix)
        if settings.learn.enabled:
            _check_cluster(settings.label)
            labeller = make_labeller(settings.label.method, **settings.label.options)
            for frame in templates:
                if isinstance(labeller, ClientLabeller):
                    labeller.check(frame)
                elif isinstance(labeller, PySCFLabeller) and (mismatch := labeller.mismatch(frame)):
                    raise ConfigError("label.method", f"{mismatch}; or use ase:MODULE:CLASS, or --no-learn")
    except (OnlineError, TransportError) as error:
        raise DriverError(str(error)) from error


def _check_cluster(label: configs.Label) -> None:
    if label.cluster and importlib.util.find_spec("distributed") is None:
        raise ConfigError("label.executor", "needs the package distributed, which is not installed here: pip install 'tumbaga[dask]'")
