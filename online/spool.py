"""Finished labels on their way to the store: a file each, so that a result survives the death of its worker and of the learner.

A worker writes the file whole, then says so; the learner stores it, then removes the file. Whoever dies in between, nothing that was
computed is lost, and storing twice is harmless: the store takes one label a task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tumbaga.online.errors import BadFrameError
from tumbaga.online.records import Label
from tumbaga.online.versions import write_whole

FOLDER = "spool"


@dataclass(frozen=True)
class Result:
    """What became of a task: a label, or the reason of a failure."""

    task: int
    frame: int
    label: Label | None
    failure: str = ""


def put(run_dir: Path, result: Result) -> None:
    """Write a result, whole or not at all."""
    told: dict[str, object] = {"task": result.task, "frame": result.frame, "failure": result.failure}
    if result.label is not None:
        label = result.label
        told["label"] = {
            "energy": label.energy,
            "forces": label.forces.tolist(),  # JSON keeps every bit of a float64: Python writes the shortest text that reads back equal
            "method": label.method,
            "seconds": label.seconds,
            "details": label.details,
            "virial": None if label.virial is None else label.virial.tolist(),
        }
    write_whole(run_dir / FOLDER / f"{result.task:08d}.json", json.dumps(told).encode())


def waiting(run_dir: Path) -> Iterator[tuple[Path, Result | None]]:
    """All results that wait, oldest task first, with their files; None for a file that cannot be read."""
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        try:
            yield path, _read(path)
        except (OSError, ValueError, KeyError, TypeError, BadFrameError):
            yield path, None


def has(run_dir: Path, task: int) -> bool:
    """Whether the result of a task waits."""
    return (run_dir / FOLDER / f"{task:08d}.json").exists()


def _read(path: Path) -> Result:
    told = json.loads(path.read_text())
    label = None
    if "label" in told:
        made = told["label"]
        forces = np.array(made["forces"], dtype=np.float64)
        label = Label(made["energy"], forces, made["method"], made["seconds"], made["details"], made.get("virial"))
    return Result(int(told["task"]), int(told["frame"]), label, str(told["failure"]))
