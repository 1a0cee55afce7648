"""Fine-tunes on disk: what the learner orders and what the trainer gives back, a folder each, so that either may die at any time.

finetune/000003/order.json        written by the learner: from which version, on which labels
finetune/000003/checkpoint.pt     the trainer goes on from here
finetune/000003/candidate.safetensors, result.json    written by the trainer at the end, taken by the learner

Imports no torch: both processes look here often.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tumbaga.online.gate_records import Check
from tumbaga.online.versions import write_whole

FOLDER: Final = "finetune"
CANDIDATE: Final = "candidate.safetensors"
_ORDER, _RESULT = "order.json", "result.json"
_LEFT_OVER = ("checkpoint.pt", CANDIDATE)  # of no use once the learner has taken the result


@dataclass(frozen=True)
class Order:
    """A fine-tune to be made.

    Attributes:
        number: from 1.
        parent: number of the version to start from.
        path: its file, relative to the run directory.
        base: the file of version 0, what the run began with.
        train, held_out: ids of the labels to learn from, and of those to judge by.
        method: of the labels.
    """

    number: int
    parent: int
    path: str
    base: str
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    method: str

    def folder(self, run_dir: Path) -> Path:
        """Where everything of it lies."""
        return run_dir / FOLDER / f"{self.number:06d}"


@dataclass(frozen=True)
class Result:
    """What came of an order.

    Attributes:
        order: the order.
        passed: whether the candidate passed the gate.
        reason: why not, or what the gate said, for people; where there is no candidate, what went wrong.
        checks: of the gate; none where there is no candidate.
        metrics: JSON-compatible: epochs, errors, seconds.
    """

    order: Order
    passed: bool
    reason: str
    checks: tuple[Check, ...] = ()
    metrics: dict[str, Any] | None = None

    def candidate(self, run_dir: Path) -> Path | None:
        """The candidate's weights file, if there is one."""
        path = self.order.folder(run_dir) / CANDIDATE
        return path if path.exists() else None


def put_order(run_dir: Path, order: Order) -> None:
    """Write an order, whole or not at all."""
    write_whole(order.folder(run_dir) / _ORDER, (json.dumps(asdict(order)) + "\n").encode())


def put_result(run_dir: Path, result: Result) -> None:
    """Write a result, whole or not at all; the candidate is there before."""
    told = {"passed": result.passed, "reason": result.reason, "metrics": result.metrics, "checks": [_told(one) for one in result.checks]}
    write_whole(result.order.folder(run_dir) / _RESULT, (json.dumps(told, indent=1) + "\n").encode())


def newest(run_dir: Path) -> Order | None:
    """The last order of a run; None if there was none."""
    orders = _orders(run_dir)
    return orders[-1] if orders else None


def open_order(run_dir: Path) -> Order | None:
    """The order that waits for its result; there is one at most."""
    last = newest(run_dir)
    return None if last is None or (last.folder(run_dir) / _RESULT).exists() else last


def under_way(run_dir: Path) -> bool:
    """Whether an order waits for its result, or what came of it for the learner, who loads it and fits its readout: seconds with a large one."""
    last = newest(run_dir)
    return last is not None and (open_order(run_dir) is not None or (last.folder(run_dir) / CANDIDATE).exists())


def result(run_dir: Path, order: Order) -> Result | None:
    """What came of an order; None while it is under way."""
    path = order.folder(run_dir) / _RESULT
    if not path.exists():
        return None
    told = json.loads(path.read_text(encoding="utf-8"))
    checks = tuple(Check(one["name"], one["passed"], one["numbers"], one["reason"]) for one in told["checks"])
    return Result(order, told["passed"], told["reason"], checks, told["metrics"])


def clear(run_dir: Path, order: Order) -> None:
    """The learner has taken the result: only order, result and log are kept."""
    for name in _LEFT_OVER:
        (order.folder(run_dir) / name).unlink(missing_ok=True)


def due(train: int, last: int, every: int, refused: int) -> bool:
    """Whether a fine-tune is due: so many new training labels since the last order, twice as many for each refusal in a row.

    Args:
        train: training labels in hand.
        last: how many there were at the last order.
        every: the distance that the user wants; 0 for never.
        refused: fine-tunes that the gate refused since the last that it passed.
    """
    return every > 0 and train - last >= every * 2**refused


def _orders(run_dir: Path) -> list[Order]:
    found = []
    for path in sorted((run_dir / FOLDER).glob(f"*/{_ORDER}")):
        told = json.loads(path.read_text(encoding="utf-8"))
        ids: dict[str, Sequence[int]] = {key: tuple(told[key]) for key in ("train", "held_out")}
        found.append(Order(**{**told, **ids}))
    return found


def _told(check: Check) -> dict[str, Any]:
    return {"name": check.name, "passed": check.passed, "numbers": dict(check.numbers), "reason": check.reason}
