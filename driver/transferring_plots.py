"""Plots of a transfer as PNG: how errors fell, and forces against labels. With matplotlib and without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tumbaga.driver import plots
from tumbaga.driver.transferring import SCRATCH, TUNED, UNTUNED, Arm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {TUNED: "C0", SCRATCH: "C1", UNTUNED: "0.5"}


def write(folder: Path, arms: Sequence[Arm]) -> list[Path]:
    """Write learning.png and, with test frames, forces.png; return their paths.

    Raises:
        ConfigError: a file cannot be written.
    """
    figures = {"learning.png": _learning(arms)}
    if any(arm.judged for arm in arms):
        figures["forces.png"] = _forces(arms)
    return plots.write(folder, figures, "--run-dir")


def _learning(arms: Sequence[Arm]) -> Figure:
    figure, (axes,) = _figure(1)
    for arm in (arm for arm in arms if arm.outcome is not None):
        lines = arm.outcome.history if arm.outcome is not None else []
        for key, style in (("train_force_rmse", ":"), ("valid_force_rmse", "-")):
            points = [(line["epoch"] + 1, 1000 * line[key]) for line in lines if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=_COLOURS[arm.name], label=f"{arm.name}, {key.partition('_')[0]}")
    for arm in (arm for arm in arms if arm.forces is not None):
        level = 1000 * arm.forces.rmse if arm.forces is not None else 0.0
        axes.axhline(level, color=_COLOURS[arm.name], linewidth=1, linestyle="--", label=f"{arm.name}, test")
    axes.set(xlabel="epoch", ylabel="force RMSE (meV/Å)", yscale="log")
    axes.legend(fontsize="small")
    return figure


def _forces(arms: Sequence[Arm]) -> Figure:
    shown = [arm for arm in arms if arm.judged]
    figure, places = _figure(len(shown))
    true = np.concatenate([one.label.forces.ravel() for one in shown[0].judged])
    reach = 1.05 * float(np.abs(true).max()) or 1.0
    for axes, arm in zip(places, shown, strict=True):
        labels = np.concatenate([one.label.forces.ravel() for one in arm.judged])
        said = np.concatenate([one.forces.ravel() for one in arm.judged])
        axes.plot([-reach, reach], [-reach, reach], color="0.6", linewidth=1)
        axes.plot(labels, said, ".", markersize=2, color=_COLOURS[arm.name], alpha=0.5)
        error = 1000 * float(np.sqrt(np.mean((said - labels) ** 2)))
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="labelled force component (eV/Å)", ylabel="predicted (eV/Å)")
        axes.set_title(f"{arm.name}: {error:.0f} meV/Å", fontsize="medium")
        axes.set_aspect("equal")
    return figure


def _figure(many: int) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * many, 4.0), layout="constrained")
    return figure, [figure.add_subplot(1, many, 1 + k) for k in range(many)]
