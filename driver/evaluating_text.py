"""An evaluation for people: one table, and what stands below it. Text only; knows the report and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ase.data import chemical_symbols
from rich import box
from rich.table import Table

from tumbaga.driver.evaluating import Report, Uncertainty
from tumbaga.online.accuracy import Coverage, EnergyError, ForceError, Interval


def table(report: Report, title: str) -> Table:
    """Errors in meV/Å and meV/atom, by element and by the size of the labelled force."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE)
    made.add_column("", no_wrap=True)
    for name in ("count", "RMSE", "MAE", "rms of labels", "RMSE / rms"):
        made.add_column(name, justify="right")
    made.add_row("forces, meV/Å", "atoms")
    _add_force(made, "  all", report.forces)
    for symbol, error in report.by_element.items():
        _add_force(made, f"  {symbol}", error)
    made.add_section()
    made.add_row("forces by size, meV/Å", "atoms")
    for low, high, error in report.by_magnitude:
        if error.atoms:
            _add_force(made, f"  {low:g} to {high:g} eV/Å" if math.isfinite(high) else f"  above {low:g} eV/Å", error)
    made.add_section()
    made.add_row("energies, meV/atom", "frames")
    if report.energies is not None:
        _add_energy(made, "  with offsets", report.energies)
    _add_energy(made, "  raw", report.energies_raw)
    return made


def sentences(report: Report) -> list[str]:
    """Slope, offsets and uncertainties, a line each."""
    slope = report.slope
    line = f"{_interval(slope.line)} with an intercept of {round(1000 * slope.intercept, 1) + 0.0:.1f} meV/Å"
    found = [
        f"slope of predicted against labelled forces (95 % intervals over frames; below 1 is soft): {_interval(slope.origin)} through the origin, {line}",
        _offsets(report),
    ]
    if report.not_finite:
        found.append(f"{report.not_finite} further frames got numbers that are not finite; they are not in the figures")
    if report.uncertainty is not None:
        found += _uncertainty(report.uncertainty)
    return found


def _add_force(made: Table, name: str, error: ForceError) -> None:
    share = f"{error.rmse / error.rms:.1%}" if error.rms > 0 else ""
    made.add_row(name, str(error.atoms), *(f"{1000 * value:.1f}" for value in (error.rmse, error.mae, error.rms)), share)


def _add_energy(made: Table, name: str, error: EnergyError) -> None:
    made.add_row(name, str(error.frames), f"{1000 * error.rmse:.2f}", f"{1000 * error.mae:.2f}")


def _interval(one: Interval) -> str:
    return f"{one.value:.3f}" + (f" ({one.low:.3f} to {one.high:.3f})" if math.isfinite(one.low) else "")


def _offsets(report: Report) -> str:
    added = report.offsets
    listed = ", ".join(f"{chemical_symbols[z]} {energy:+.4f}" for z, energy in zip(added.elements, added.energies, strict=True))
    told = f"offsets added to the predictions, by least squares, eV an atom: {listed}"
    if report.energies is None:
        return f"{told}; {report.frames} frames with {added.rank} free offsets leave no error to report"
    if added.rank < len(added.elements):
        told += f" ({added.rank} independent composition{'s' * (added.rank > 1)} for {len(added.elements)} elements: only their sums mean something)"
    return told


def _uncertainty(one: Uncertainty) -> list[str]:
    covered = f"{one.frame_coverage.found:.1%} for {one.frame_coverage.promised:.0%}"
    found = [
        f"uncertainty ({one.told}), {one.frames} frames:",
        f"  force components within the interval that is to hold a share of them: {_shares(one.components)}",
        f"  standard deviations {_too(one.factor)}",
    ]
    if one.energies:
        found.append(f"  energies, offsets added, within theirs: {_shares(one.energies)}; standard deviations {_too(one.energy_factor)}")
    return [*found, f"  frames whose largest force error is within {one.multiplier:.2f} of them: {covered}"]


def _shares(covers: Sequence[Coverage]) -> str:
    return ", ".join(f"{cover.found:.1%} for {cover.promised:.1%}" for cover in covers)


def _too(factor: float) -> str:
    return f"are too {'small' if factor > 1 else 'large'}: {factor:.2f} of them would fit the errors"
