"""Tumbaga's side of suite L: an ASE script with a server of its own, as a user has it; reads a JSON file, writes lines of JSON.

The script does nothing that a user could not: `serve` starts the program, the labels come from `ase:_learning_teacher:Teacher`. After the
run every version that served is judged on the frames kept apart, by what `tumbaga evaluate` is made of.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy and torch are imported

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import _learning_teacher as teacher
import numpy as np
from ase import Atoms

from tumbaga.driver import config as configs
from tumbaga.driver import datasets, evaluating, finetuning, importing
from tumbaga.driver.backends import registry
from tumbaga.driver.serving import ServedCalculator, ServingError, serve
from tumbaga.online.records import LabelledFrame
from tumbaga.online.store import FILE, Store, StoredVersion

UNSURE_FRAMES = 40
MOST_VERSIONS = 16  # of one run that are judged
QUIET_STEPS = 3000  # without a new label: nothing is uncertain any more
SETTLED_S = 20.0
LOOK = 50  # steps between two looks at the status


def main(task: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """One run; `task` has size, seed, delay, steps, seconds, apart, model, begun, known, first, run, force_error, spacing, budget."""
    run = Path(task["run"])
    prepare(run, task)
    atoms = teacher.start(task["size"], task["seed"])
    with serve(atoms, run_dir=run) as calculator:
        atoms.calc, watch = calculator, teacher.Watch(calculator, atoms)
        step, seconds, problem = walked(atoms, calculator, watch, task)
        told = watch.told()
    judged = curve(run, task, datasets.read(task["apart"]))
    for one in judged:
        say(one)
    say({"steps": step, "seconds": seconds, **told, **counted(run, task), **unsure(run, task), "ended": problem})


def prepare(run: Path, task: dict[str, Any]) -> None:
    """Write the settings; `serve` takes those that it finds."""
    settings = configs.Config(
        potential=configs.Potential(model=task["model"], device="cpu"),
        flag=configs.Flag(force_error=task["force_error"], spacing=task["spacing"]),
        label=configs.Label(method="ase:_learning_teacher:Teacher", options={"delay": float(task["delay"])}, budget=task["budget"]),
        seed=task["seed"],
    )
    run.mkdir(parents=True)
    (run / configs.FILE).write_text(configs.dumps(settings))
    if task["first"]:
        # the run shall not forget what its potential was trained on
        said = ["import", str(run), task["first"], "--method", importing.method_of(settings), "--role", "train", "--quiet"]
        subprocess.run([sys.executable, "-m", "tumbaga.driver.cli", *said], check=True, stdout=subprocess.DEVNULL)


def walked(atoms: Atoms, calculator: ServedCalculator, watch: teacher.Watch, task: dict[str, Any]) -> tuple[int, float, str]:
    """Move until the steps are done and nothing is learnt any more; steps, seconds, and why it ended early."""
    begun, step, enough = time.perf_counter(), 0, Enough(calculator, task)
    try:
        for step in teacher.walk(atoms, task["seed"], 10_000_000, watch.restarted):
            watch.note(step)
            if step % LOOK or step < task["steps"]:
                continue
            if time.perf_counter() - begun > task["seconds"] or enough(step):
                break
    except ServingError as problem:
        return step, time.perf_counter() - begun, str(problem)
    return step, time.perf_counter() - begun, ""


class Enough:
    """Whether learning has come to an end: no label, fine-tune or version is new for a while, and none is to be expected.

    Args:
        calculator: with the server.
        task: with the budget.
    """

    def __init__(self, calculator: ServedCalculator, task: dict[str, Any]) -> None:
        self._calculator = calculator
        self._budget = task["budget"] + task["begun"] - task["known"]  # imported labels are counted, and cost nothing of it
        self._labels, self._labelled_at = 0, 0
        self._seen: tuple[int, ...] = ()
        self._since = time.perf_counter()

    def __call__(self, step: int) -> bool:
        """Look; `step` is the one now."""
        status, run = self._calculator.status(), self._calculator.run_dir
        labels = ended(status)
        if labels != self._labels:
            self._labels, self._labelled_at = labels, step
        orders = len(list((run / finetuning.FOLDER).glob("*")))
        seen = (labels, orders, status["versions"], status["serving_version"])
        if seen != self._seen or finetuning.under_way(run):
            self._seen, self._since = seen, time.perf_counter()
        waiting = status["labels"]["pending"] + status["labels"]["running"]
        expected = labels < self._budget and (waiting or step - self._labelled_at < QUIET_STEPS)
        # what a fine-tune brought is taken, and the next one ordered, within seconds
        return not expected and time.perf_counter() - self._since > SETTLED_S


def ended(status: dict[str, Any]) -> int:
    """Labels that were paid for, those that failed, were set aside or were imported included."""
    return sum(count for kind, count in status["labels"].items() if kind not in ("pending", "running"))


def counted(run: Path, task: dict[str, Any]) -> dict[str, Any]:
    """What the status says in the end, and what became of fine-tunes."""
    status = json.loads((run / "status.json").read_text())
    labels = {f"labels_{key}": count for key, count in status["labels"].items()}
    tuned = [json.loads(path.read_text()) for path in sorted((run / finetuning.FOLDER).glob("*/result.json"))]
    told = [{"passed": one["passed"], "reason": one["reason"], **(one["metrics"] or {})} for one in tuned]
    return {"paid": ended(status) + task["known"], "fine_tunes": told, **labels, "swaps": status["swaps"], "server_ms": status["call_ms"]}


def curve(run: Path, task: dict[str, Any], apart: list[LabelledFrame]) -> list[dict[str, Any]]:
    """Labels so far and force RMSE, eV/Å, of some of the versions, the last one that served included."""
    found = []
    for version in spread(served(run)):
        potential = registry.of_version(task["model"], run / version.file, "cpu")
        judged, lost = evaluating.judge(potential, apart)
        errors = [np.ravel(one.forces - one.label.forces) for one in judged]
        rmse = float(np.sqrt(np.mean(np.square(np.concatenate(errors)))))
        found.append(
            {"labels": max(task["begun"], task["known"] + version.labels), "version": version.number, "rmse": rmse, "not_finite": lost}
        )
    return found


def served(run: Path) -> list[StoredVersion]:
    """The versions that were served, in order, up to the one that serves."""
    last = json.loads((run / "status.json").read_text())["serving_version"]
    with closing(Store(run / FILE, read_only=True)) as store:
        return [version for version in store.versions() if version.state == "served" and version.number <= last]


def spread(versions: list[StoredVersion]) -> Iterable[StoredVersion]:
    """At most so many, closer together where labels were few; first and last stay."""
    places = np.unique(np.rint(np.geomspace(1, len(versions), min(MOST_VERSIONS, len(versions)))).astype(int))
    return [versions[place - 1] for place in places]


def unsure(run: Path, task: dict[str, Any]) -> dict[str, Any]:
    """How the uncertainties of the last version fit the errors, as `tumbaga evaluate` has it."""
    file = run / served(run)[-1].file
    potential = registry.load(f"painn:{file}", "cpu", "float64")
    layer = evaluating.last_layer_of(potential, file)
    report, judged = evaluating.evaluate(potential, datasets.read(task["apart"]), layer, UNSURE_FRAMES)
    ratios = [np.abs(one.forces - one.label.forces) / one.stds for one in judged if one.stds is not None]
    promise = report.uncertainty and report.uncertainty.frame_coverage
    return {
        **teacher.covered(np.concatenate(ratios)),
        "frames_within": promise and promise.found,
        "frames_promised": promise and promise.promised,
        "multiplier": report.uncertainty and report.uncertainty.multiplier,
    }


if __name__ == "__main__":
    with open(sys.argv[2], "w", buffering=1) as lines:
        main(json.loads(Path(sys.argv[1]).read_text()), lambda told: print(json.dumps(evaluating.finite(told)), file=lines))
