"""Rows of suite L: what one run of one side came to, the table of them, what was missed, and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FALCON, SCRATCH, BIASED = "falcon", "scratch", "biased"
LONGEST_MS, FACTOR = 100.0, 2.0
ACCURACY = 0.1  # eV; of FALCON, the one that is judged


@dataclass(frozen=True)
class Length:
    """How much is measured.

    Attributes:
        sizes, delays: of the clusters, atoms; of the labels, s.
        accuracies: of FALCON, eV; the first is the one that is judged.
        steps: of a row. seconds: that it may take. training: steps of the first training.
        apart: frames to judge by.
    """

    sizes: tuple[int, ...]
    delays: tuple[float, ...]
    accuracies: tuple[float, ...]
    steps: int
    seconds: float
    training: int
    apart: int


@dataclass(frozen=True)
class Row:
    """One run of one side.

    Attributes:
        side: FALCON, SCRATCH or BIASED. size, delay, accuracy: see `Length`; accuracy is 0 for tumbaga.
        steps, seconds: done. labels: in the end, the first ten included.
        rmse: on the frames kept apart, eV/Å. own: of the forces that moved the atoms, eV/Å.
        p50, p99, longest: of the force calls, ms.
        within_68, within_90: shares of force errors within the intervals that promise so many per cent.
        ended: why it ended early; empty if it did not. load: of the machine at its end.
        curve: (labels, force RMSE). more: what the side tells beside it.
    """

    side: str
    size: int
    delay: float
    accuracy: float
    steps: int
    seconds: float
    labels: int
    rmse: float
    own: float
    p50: float
    p99: float
    longest: float
    within_68: float
    within_90: float
    ended: str
    load: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As --only knows it."""
        return name_of(self.side, self.size, self.delay, self.accuracy)


def name_of(side: str, size: int, delay: float, accuracy: float) -> str:
    """Return e.g. "falcon-13-0-0.1" or "scratch-38-60"."""
    return f"{side}-{size}-{delay:g}" + (f"-{accuracy:g}" if accuracy else "")


HEAD = "side     atoms  label s   steps    wall s  labels   RMSE    own   p50 ms   p99 ms   max ms  68 %  90 %   load"


def line(row: Row) -> str:
    side = row.side + (f" {row.accuracy:g}" if row.accuracy and row.accuracy != ACCURACY else "")
    return (
        f"{side:11s} {row.size:2d} {row.delay:8.0f} {row.steps:7d} {row.seconds:9.0f} {row.labels:7d} {1000 * row.rmse:6.0f} {1000 * row.own:6.0f}"
        f" {row.p50:8.1f} {row.p99:8.1f} {row.longest:8.1f} {100 * row.within_68:5.0f} {100 * row.within_90:5.0f} {row.load:6.1f}"
        + (f"  ended: {row.ended[:120]}" if row.ended else "")
    )


def missed(rows: Sequence[Row], length: Length) -> list[str]:
    """What was to be shown and was not, rows that are not there included."""
    by_name, faults = {row.name: row for row in rows}, []
    for size in length.sizes:
        ours, theirs = (by_name.get(name_of(*job)) for job in ((SCRATCH, size, 0.0, 0.0), (FALCON, size, 0.0, length.accuracies[0])))
        if ours is None or theirs is None:
            faults.append(f"{size} atoms not measured")
        elif not (ours.rmse < theirs.rmse and ours.labels <= theirs.labels):
            numbers = f"{1000 * ours.rmse:.0f} meV/Å of {ours.labels} labels against {1000 * theirs.rmse:.0f} of {theirs.labels}"
            faults.append(f"{size} atoms: {numbers}")
    mine = [row for row in rows if row.side != FALCON]
    if slow := [row for row in mine if row.longest >= LONGEST_MS]:
        worst = max(slow, key=lambda row: row.longest)
        faults.append(
            f"{len(slow)} of {len(mine)} rows with a call of {LONGEST_MS:.0f} ms or more, the longest {worst.longest:.0f} ms in {worst.name}"
        )
    for row in mine:
        quick = by_name.get(name_of(row.side, row.size, 0.0, 0.0))
        if quick and row.longest > max(LONGEST_MS, FACTOR * quick.longest):
            faults.append(f"{row.name}: longest call {row.longest:.0f} ms, {quick.longest:.0f} ms without a delay")
    faults += [f"{row.name} ended early: {row.ended[:120]}" for row in mine if row.ended]
    return faults


def plot(rows: Sequence[Row], length: Length) -> Any:
    """Error against labels where labels cost nothing, a panel a size; and the longest call against the delay."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (len(length.sizes) + 1), 3.8), layout="constrained")
    *panels, calls = figure.subplots(1, len(length.sizes) + 1)
    for size, panel in zip(length.sizes, panels, strict=True):
        for row in (row for row in rows if row.size == size and not row.delay):
            name = f"FALCON, {row.accuracy:g} eV" if row.side == FALCON else f"tumbaga, {row.side}"
            panel.plot(
                *zip(*((n, 1000 * e) for n, e in row.curve), strict=True), marker=".", ls="--" if row.side == FALCON else "-", label=name
            )
        panel.set(title=f"{size} atoms", xlabel="labels", ylabel="force RMSE, meV/Å", yscale="log")
        if panel.lines:
            panel.legend(fontsize="small")
    for side in (FALCON, SCRATCH, BIASED):
        for size in length.sizes:
            some = [
                (row.delay, row.longest)
                for row in rows
                if (row.side, row.size) == (side, size) and row.accuracy in (0.0, length.accuracies[0])
            ]
            if some:
                calls.plot(*zip(*some, strict=True), marker=".", ls="--" if side == FALCON else "-", label=f"{side}, {size}")
    calls.axhline(LONGEST_MS, color="0.7", lw=0.8)
    calls.set(title="longest force call", xlabel="label, s", ylabel="ms", yscale="log")
    calls.set_xscale("symlog", linthresh=1.0)
    if calls.lines[1:]:
        calls.legend(fontsize="small")
    return figure
