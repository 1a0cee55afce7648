"""The trainer: waits for fine-tunes that the learner orders and carries them out, at the lowest priority, with a process and memory of its own.

It may be killed at any time: it goes on from its checkpoint. Until the first order it is small, since torch is not yet imported.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import finetuning, process
from tumbaga.driver.errors import DriverError
from tumbaga.driver.finetuning import Order, Result
from tumbaga.online.errors import OnlineError, StoreFullError, TrainingStoppedError, is_full

_LOOK_S = 0.5
_REPORT_S = 0.5
_ROOM_S = 10.0  # between two tries on a full disk


class Trainer:
    """Carries out one order after the other.

    Args:
        run_dir: the run directory.
        settings: of the run.
        reporter: to the supervisor.
        lifeline: tells when to leave.
    """

    def __init__(self, run_dir: Path, settings: configs.Config, reporter: process.Reporter, lifeline: process.Lifeline) -> None:
        self._run_dir, self._settings, self._reporter, self._lifeline = run_dir, settings, reporter, lifeline
        self._due = 0.0
        self._answered: dict[str, int] = {}

    def turn(self) -> None:
        """Carry out the order that waits, if there is one."""
        order = finetuning.open_order(self._run_dir)
        if order is None:
            self._lifeline.wait(_LOOK_S)
            return
        self._reporter.log("info", "fine-tune started", number=order.number, parent=order.parent, labels=len(order.train))
        try:
            result = self._carried_out(order)
            finetuning.put_result(self._run_dir, result)
        except TrainingStoppedError:
            return
        except (OSError, StoreFullError) as error:
            if not is_full(error):
                raise
            self._reporter.log("error", "fine-tune waits: the disk is full", number=order.number)
            self._lifeline.wait(_ROOM_S)  # then the same order again, from its newest checkpoint
            return
        self._reporter.log(
            "info", "fine-tune ended", number=order.number, passed=result.passed, reason=result.reason, **(result.metrics or {})
        )
        self._reporter.state(doing="")

    def _carried_out(self, order: Order) -> Result:
        from tumbaga.driver import trainer

        trainer.one_thread()
        try:
            return trainer.carry_out(self._run_dir, order, self._settings, self._observe, lambda: self._lifeline.cut_off)
        except TrainingStoppedError:
            raise
        except (DriverError, OnlineError) as error:
            if is_full(error):
                raise
            return Result(order, False, f"no candidate: {error}")
        except Exception as error:
            if is_full(error):
                raise
            return Result(order, False, f"no candidate: {type(error).__name__}: {error}")

    def _observe(self, told: dict[str, Any]) -> None:
        if "epoch" in told:
            self._answered = {"trainer": os.getpid()}  # whoever dies after that was no failed start
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + _REPORT_S
            self._reporter.state(pid=os.getpid(), answered=self._answered, **told)


def main(run_dir: Path, lifeline: process.Lifeline) -> None:
    """Fine-tune until told to leave."""
    os.nice(15)  # everything else comes first
    # torch makes a folder there as soon as there is an optimiser, although nothing is compiled
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(run_dir / finetuning.FOLDER / "torch")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reporter = process.Reporter(context, "trainer")
    trainer = Trainer(run_dir, configs.load(run_dir), reporter, lifeline)
    reporter.log("info", "ready", pid=os.getpid())
    while not lifeline.cut_off:
        trainer.turn()
    reporter.close()


if __name__ == "__main__":
    process.run("trainer", main)
