"""A transfer for people: a bar while it goes on, one table at its end. Text only."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import typer
from rich import box
from rich.table import Table

from tumbaga.driver.transferring import UNTUNED, Arm
from tumbaga.online.accuracy import EnergyError, ForceError

if TYPE_CHECKING:
    from rich.progress import TaskID

_PLAIN = 10  # lines for a training where nobody watches a terminal


class Watch:
    """Shows how trainings go: bars with the time left on a terminal, some lines elsewhere; on standard error.

    Args:
        epochs: of each, at most.
        quiet: show nothing.
    """

    def __init__(self, epochs: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[told]}"),
        )
        self._live = sys.stderr.isatty() and not quiet
        self._bars = Progress(*columns, console=Console(stderr=True), disable=not self._live)
        self._quiet, self._epochs = quiet, epochs
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, name: str, line: dict[str, Any]) -> None:
        """An epoch of this arm is done."""
        done, told = int(line["epoch"]) + 1, self.text(line)
        if self._live:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(f"training, {name}", total=self._epochs, completed=done - 1, told="")
            self._bars.update(self._tasks[name], completed=self._epochs if line["ended"] else done, told=told)
        elif not self._quiet and (line["ended"] or done % max(1, self._epochs // _PLAIN) == 0):
            left = (self._epochs - done) * line["seconds"] / done
            state = f"at most {left:.0f} s left"
            if line["ended"]:
                state = "done" if done == self._epochs else "stopped early"
            typer.echo(f"{name}: epoch {done}/{self._epochs}  {told}  {state}", err=True)

    @staticmethod
    def text(line: dict[str, Any]) -> str:
        """Errors of an epoch: forces in meV/Å, energies in meV/atom."""
        sets = [(name, line.get(f"{name}_force_rmse"), line.get(f"{name}_energy_rmse")) for name in ("train", "valid")]
        shown = [
            f"{name} {1000 * force:.0f} meV/Å {1000 * energy:.1f} meV"
            for name, force, energy in sets
            if force is not None and energy is not None
        ]
        return ", ".join(shown)


def table(arms: Sequence[Arm]) -> Table:
    """Errors of the arms on the test frames, and on the replay frames where there are any; forces in meV/Å, energies in meV/atom."""
    replay = any(arm.replay is not None for arm in arms)
    made = Table(box=box.SIMPLE)
    made.add_column("", no_wrap=True)
    for name in ("force RMSE", "MAE", "slope", "energy RMSE", "MAE", *(["replay force RMSE"] if replay else []), "epochs (best)"):
        made.add_column(name, justify="right")
    for arm in arms:
        slope = "" if math.isnan(arm.slope) else f"{arm.slope:.3f}"
        old = [_errors(arm.replay)[0]] if replay else []
        epochs = "" if arm.outcome is None else f"{arm.outcome.epochs} ({arm.outcome.best + 1})"
        made.add_row(arm.name, *_errors(arm.forces), slope, *_errors(arm.energies), *old, epochs)
    return made


def verdict(arms: Sequence[Arm]) -> str:
    """One sentence on what the training was good for; empty where there is nothing to compare."""
    rmse = {arm.name: arm.forces.rmse for arm in arms if arm.forces is not None}
    if len(rmse) < 2:
        return ""
    first, rest = arms[0].name, {name: value for name, value in rmse.items() if name != arms[0].name}
    said = [
        f"{rmse[first] / value:.2f} times that of the {'untuned potential' if name == UNTUNED else 'one from scratch'}"
        for name, value in rest.items()
    ]
    return f"the force error is {' and '.join(said)}"


def _errors(one: ForceError | EnergyError | None) -> tuple[str, str]:
    """RMSE and MAE in meV."""
    return ("", "") if one is None else (f"{1000 * one.rmse:.1f}", f"{1000 * one.mae:.1f}")
