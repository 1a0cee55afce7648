"""Working off a run's queue of labels without an engine: the learner and its label workers alone, as in the run itself.

Whatever holds for labels of a run holds here: limits, kills, the spool, checks, updates. So a stop at any instant leaves the queue whole, and
the next start of the run serves what was learnt.
"""

from __future__ import annotations

from typing import Any

from tumbaga.driver import config as configs
from tumbaga.driver import process
from tumbaga.driver.children import Child
from tumbaga.driver.errors import RunDirError
from tumbaga.driver.label_work import Work
from tumbaga.driver.rundir import RunDir
from tumbaga.driver.supervisor import Observer, Supervisor
from tumbaga.online.versions import write_whole

_LEARNT = ("state", "versions", "labels", "notes", "quantile", "force_rmse", "workers", "restarts", "errors", "pids")


class Labelling(Supervisor):
    """One pass over the queue of a run.

    Args:
        run_dir: held by this process.
        settings: of the run, as they are kept.
        work: which frames, and how.
        observe: called with the status about twice a second.
    """

    def __init__(self, run_dir: RunDir, settings: configs.Config, work: Work, observe: Observer) -> None:
        super().__init__(run_dir, settings, None, observe)
        self._work = work
        self._before = _earlier(run_dir)
        self._children = _children(run_dir, settings, work)

    def _prepare(self) -> None:
        write_whole(self._path / configs.FILE, configs.dumps(self._settings).encode())

    def _ready(self) -> bool:
        return "learner" in self._reports

    def _start_engine(self) -> None:
        self._state = "labelling"

    def _engine_ended(self) -> bool:
        """Whether all is labelled that was asked for."""
        learner = self._reports.get("learner")
        if learner is None or learner["labels"]["running"]:
            return False
        return not learner["waiting"] or 0 < self._work.most <= learner["begun"]

    def _serves_no_more(self, lost: Child) -> bool:
        return lost.name == "learner" or all(child.given_up for child in self._children if child.name != "learner")

    def _drain(self) -> None:
        """Nothing is under way."""

    def _stop(self) -> None:
        if self._state == "labelling":
            self._state = "stopping"
        super()._stop()

    def status(self) -> dict[str, Any]:
        """The last status of the run, with what labelling changes."""
        now = super().status()
        return {**now, **self._before, **{key: now[key] for key in _LEARNT}}


def _earlier(run_dir: RunDir) -> dict[str, Any]:
    try:
        return run_dir.read_status()
    except RunDirError:
        return {}


def _children(run_dir: RunDir, settings: configs.Config, work: Work) -> list[Child]:
    workers = 1 if settings.label.cluster else work.workers or max(1, settings.label.workers)
    made = [Child("learner", "tumbaga.driver.learner_process", run_dir.path, process.monotonic, (work.argument,))]
    for index in range(workers):
        name = f"label-{index}"
        made.append(Child(name, "tumbaga.driver.label_worker", run_dir.path, process.monotonic, (name, work.argument)))
    return made
