"""Parity plots and the coverage of uncertainties as PNG, with matplotlib and without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols

from tumbaga.driver import plots
from tumbaga.driver.errors import ConfigError
from tumbaga.online import accuracy
from tumbaga.online.accuracy import Judged, Offsets
from tumbaga.online.records import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 3
_GRID = 60  # hexagons across


def need_matplotlib() -> None:
    """Find out before anything long begins.

    Raises:
        ConfigError: it is not installed.
    """
    if not plots.available():
        raise ConfigError("--plots", "needs matplotlib, which is not installed: pip install 'tumbaga[plots]'")


def write(folder: Path, judged: Sequence[Judged], added: Offsets) -> list[Path]:
    """Write energies.png, forces.png and, where uncertainties are known, uncertainty.png; return their paths.

    Args:
        folder: made if it is not there.
        judged: frames with labels and predictions.
        added: offsets of the energies.

    Raises:
        ConfigError: a file cannot be written.
    """
    figures = {"energies.png": _energies(judged, added), "forces.png": _forces(judged)}
    if any(one.stds is not None for one in judged):
        figures["uncertainty.png"] = _coverage(judged)
    return plots.write(folder, figures, "--plots")


def _energies(judged: Sequence[Judged], added: Offsets) -> Figure:
    figure, (axes,) = _figure(1)
    # without what the elements alone make of the labels, all compositions would lie on the diagonal, whatever the potential says
    atoms = accuracy.per_element([one.frame for one in judged], [one.label.energy for one in judged])
    said = np.array([(one.energy + added.of(one.frame) - atoms.of(one.frame)) / len(one.frame) for one in judged])
    true = np.array([(one.label.energy - atoms.of(one.frame)) / len(one.frame) for one in judged])
    _parity(axes, true, said, "energy, less the elements' (eV/atom)")
    return figure


def _forces(judged: Sequence[Judged]) -> Figure:
    elements = sorted({int(z) for one in judged for z in one.frame.numbers})
    figure, axes = _figure(1 + len(elements))
    for place, z in zip(axes, [0, *elements], strict=True):
        masks = [one.frame.numbers == z if z else np.ones(len(one.frame), dtype=bool) for one in judged]
        true = np.concatenate([one.label.forces[mask].ravel() for one, mask in zip(judged, masks, strict=True)])
        said = np.concatenate([one.forces[mask].ravel() for one, mask in zip(judged, masks, strict=True)])
        _parity(place, true, said, f"force components{f' on {chemical_symbols[z]}' if z else ''} (eV/Å)")
    return figure


def _coverage(judged: Sequence[Judged]) -> Figure:
    figure, (axes,) = _figure(1)
    found = accuracy.coverage(judged, np.linspace(0.02, 0.98, 49).tolist())
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    axes.plot([one.promised for one in found], [one.found for one in found])
    axes.set_xlabel("share of force components promised")
    axes.set_ylabel("share found")
    axes.set_aspect("equal")
    return figure


def _figure(many: int) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    columns = min(many, _COLUMNS)
    rows = -(-many // columns)
    figure = Figure(figsize=(4.2 * columns, 4.0 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, 1 + k) for k in range(many)]


def _parity(axes: Any, true: Array, said: Array, what: str) -> None:
    """Predictions over labels, as a density whose colours are logarithmic."""
    low, high = float(min(true.min(), said.min())), float(max(true.max(), said.max()))
    margin = 0.02 * (high - low) or 1e-3
    low, high = low - margin, high + margin
    axes.hexbin(true, said, gridsize=_GRID, extent=(low, high, low, high), bins="log", mincnt=1, linewidths=0)
    axes.plot([low, high], [low, high], color="0.6", linewidth=1)
    axes.set(xlim=(low, high), ylim=(low, high), xlabel="label", ylabel="prediction", title=what)
    axes.title.set_fontsize("medium")
    axes.set_aspect("equal")
