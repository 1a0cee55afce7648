"""Transfer against scratch on a few labels: force errors, and whether MD of a larger cluster than trained on survives.

    python benchmarks/transfer.py [--quick] [--json FILE] [--plot FILE] [--processes N]      needs the extras xtb and plots

The home problem: `painn:cuau-water`, the embedded potential, is of GFN2-xTB quality on copper-gold clusters with water, and a user has a few
labels of another level of theory. That level is GFN1-xTB here, since it costs 10 to 40 ms a label and converges on all of these clusters; its
forces differ from the potential's by 0.25 eV/Å on CuAu(H2O)2, a quarter of their size, less than PBE's do (0.47). EMT, cheaper still, knows no
water, and the bare metal clusters it could label are outside of what the potential has seen. What helps here can be expected to help less
where the target is further from the origin. The origin knows the elements and clusters like these (it was trained on 7,021 frames,
CuAu(H2O)2 among them, partly taken from MD by GFN1-xTB, labelled by GFN2), so this is the best case of transfer, and the common one.

Labels: MD by GFN1-xTB at 300 and 500 K of CuAu(H2O)2, from random starts; frames to learn from and to test on are of different starts. The
larger cluster is CuAu(H2O)6, 20 atoms, which neither arm nor the origin was trained on. At each number of labels and seed:
  transfer   what `tumbaga transfer painn:cuau-water` makes of them
  scratch    the same network from new weights, as the same command trains it for comparison: same labels, same epochs, its own rate
A tenth of the labels chooses the best epoch. A seed draws labels, weights, order and noise of the MD. "untuned" is the origin as it is.

MD of the larger cluster: Langevin, 1 fs, at 300 and 500 K, without a wall, from frames of the teacher's MD; its rules, which never ask the
potential how sure it is, are those of `_survival.py`. A run survives if nothing ends it: neither a failure, nor a reaction, nor evaporation;
the counts of each stand in the JSON. The horizon is short (see the table's head): survival here says that a potential does not fail at once.

Errors are geometric means over seeds with the 95 % t-interval of their logarithm, shares have Wilson's interval. Pass: the held-out force errors of both arms fall from the fewest
labels to the most. Which arm is better, and where, is what is to be found out.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy, torch and tblite are imported

import argparse
import functools
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import _survival
import numpy as np
import torch
from _bands import Band, over_seeds, saved, share
from _machine import described

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "cuau_water_model"))
from moving import XTB, langevin
from sample import composition, random_start, relax

from tumbaga.driver import evaluating, transferring
from tumbaga.driver.backends import registry
from tumbaga.online import accuracy
from tumbaga.online.ports import Potential
from tumbaga.online.records import Frame, Label, LabelledFrame
from tumbaga.online.training.dataset import held_out
from tumbaga.online.training.loop import Sets
from tumbaga.online.versions import write_whole

MODEL, TEACHER = "painn:cuau-water", "GFN1-xTB"
SMALL, LARGE = "CuAu(H2O)2", "CuAu(H2O)6"
KELVINS = (300.0, 500.0)
SETTLE, STRIDE = 100, 20  # fs: dropped at the start of a trajectory, and between its frames
COUNTS = (10, 25, 50, 100, 200)
TRANSFER, SCRATCH, UNTUNED = "transfer", "scratch", "untuned"
ARMS = {transferring.TUNED: TRANSFER, transferring.SCRATCH: SCRATCH}
BATCH_ATOMS = 64


@dataclass(frozen=True)
class Length:
    """How much is measured.

    Attributes:
        counts: numbers of labels. seeds: of each.
        steps: of a training.
        starts: trajectories to learn from, to test on, of the larger cluster; half of each at either temperature.
        frames: of each trajectory of the three kinds.
        runs: of MD at each temperature under each potential. horizon: of each, fs.
    """

    counts: tuple[int, ...]
    seeds: int
    steps: int
    starts: tuple[int, int, int]
    frames: tuple[int, int, int]
    runs: int
    horizon: float


FULL = Length(COUNTS, 3, 300, (8, 4, 4), (30, 30, 20), 4, 1000.0)
QUICK = Length((10, 50, 200), 2, 120, (8, 2, 2), (28, 20, 10), 2, 300.0)


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled frames to learn from, to test on, and of the larger cluster; and where its MD starts, at either temperature."""

    pool: list[LabelledFrame]
    test: list[LabelledFrame]
    large: list[LabelledFrame]
    starts: dict[float, list[Frame]]


@dataclass(frozen=True)
class Measured:
    """One potential; eV/Å. `ends`: how its MD runs ended, (temperature in K, end, time in fs)."""

    arm: str
    labels: int
    seed: int
    rmse: float
    rmse_large: float
    ends: list[tuple[float, str, float]]
    seconds: float


# -- labels ----------------------------------------------------------------------------------------------------------------------------


def trajectory(formula: str, seed: int, kelvin: float, count: int) -> Iterator[LabelledFrame]:
    """Frames of MD by the teacher, from a random start."""
    numbers, rng = composition(formula), np.random.default_rng([seed, len(formula)])
    teacher = XTB(TEACHER, numbers)
    moving = langevin(numbers, relax(random_start(numbers, rng), teacher), teacher, kelvin, rng)
    for positions, _ in islice(moving, SETTLE, SETTLE + STRIDE * count, STRIDE):
        energy, forces = teacher(positions)
        yield LabelledFrame(Frame(numbers, positions), Label(energy, forces, TEACHER, 0.0), f"{formula}/{seed}")


def labelled(length: Length) -> Data:
    """All labels; the seeds of the three kinds of trajectories differ."""
    kinds = [
        {(seed, KELVINS[seed % 2]): list(trajectory(formula, seed, KELVINS[seed % 2], frames)) for seed in range(first, first + starts)}
        for formula, first, starts, frames in zip((SMALL, SMALL, LARGE), (0, 100, 200), length.starts, length.frames, strict=True)
    ]
    pool, test, large = ([one for frames in kind.values() for one in frames] for kind in kinds)
    # the runs start all over the trajectories of the larger cluster, each at the temperature of its trajectory
    starts = {kelvin: [one.frame for (_, at), frames in kinds[2].items() if at == kelvin for one in frames] for kelvin in KELVINS}
    picks = {kelvin: np.linspace(0, len(found) - 1, length.runs).round().astype(int) for kelvin, found in starts.items()}
    return Data(pool, test, large, {kelvin: [starts[kelvin][k] for k in picks[kelvin]] for kelvin in KELVINS})


# -- arms ------------------------------------------------------------------------------------------------------------------------------


def judged(potential: Potential, arm: str, labels: int, seed: int, data: Data, length: Length, began: float) -> Measured:
    """Errors and MD of one potential."""
    errors = [accuracy.force_error(evaluating.judge(potential, frames)[0]).rmse for frames in (data.test, data.large)]
    starts = [(kelvin, start) for kelvin in KELVINS for start in data.starts[kelvin]]
    found = _survival.runs(potential, [start for _, start in starts], [kelvin for kelvin, _ in starts], length.horizon, seed)
    ends = [(kelvin, *end) for (kelvin, _), end in zip(starts, found, strict=True)]
    return Measured(arm, labels, seed, *errors, ends, round(time.monotonic() - began, 1))


def pair(data: Data, length: Length, job: tuple[int, int]) -> list[Measured]:
    """Both arms at one number of labels with one seed, trained by the one call that stands behind `tumbaga transfer`."""
    seed, count = job
    torch.set_num_threads(1)
    began, start = time.monotonic(), transferring.opened(registry.load(MODEL, "cpu"), MODEL, {})
    learnt = [data.pool[k] for k in np.random.default_rng(seed).permutation(len(data.pool))[:count]]
    train, valid = held_out(learnt, 0.1, seed)
    batches = math.ceil(len(train) / (BATCH_ATOMS // len(train[0].frame)))
    chosen = {"epochs": max(1, length.steps // batches), "batch_atoms": BATCH_ATOMS, "patience": 0, "seed": seed}
    sets = Sets(train, valid)
    plan = transferring.Plan(start, sets, (), transferring.settings_for(start, sets, False, chosen))
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as folder:
        result = transferring.carry_out(plan, Path(folder))
    made = {ARMS[arm.name]: arm.outcome.potential for arm in result.arms if arm.outcome is not None}
    return [judged(potential, arm, count, seed, data, length, began) for arm, potential in made.items()]


# -- report ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: an arm at a number of labels, over its seeds."""

    arm: str
    labels: int
    rmse: Band
    rmse_large: Band
    survived: dict[str, Band]
    ends: dict[str, dict[str, int]]


def rows(measured: Sequence[Measured]) -> list[Row]:
    """All lines, by labels and arm."""
    found = []
    for labels, arm in sorted({(one.labels, one.arm) for one in measured}, key=lambda one: (one[0], one[1] != TRANSFER)):
        mine = [one for one in measured if (one.arm, one.labels) == (arm, labels)]
        ends = {f"{kelvin:.0f}": Counter(end for one in mine for at, end, _ in one.ends if at == kelvin) for kelvin in KELVINS}
        shares = {kelvin: share(counts[_survival.SURVIVED], counts.total()) for kelvin, counts in ends.items()}
        errors = (over_seeds([getattr(one, name) for one in mine]) for name in ("rmse", "rmse_large"))
        found.append(Row(arm, labels, *errors, shares, {kelvin: dict(counts) for kelvin, counts in ends.items()}))
    return found


def head(length: Length) -> str:
    survival = [f"survived {length.horizon / 1000:g} ps at {kelvin:.0f} K" for kelvin in KELVINS]
    return f"{'force RMSE, meV/Å':>49}\n{'labels':>6} {'arm':9} {SMALL:>20} {LARGE:>20}  " + "  ".join(f"{one:>24}" for one in survival)


def line(row: Row) -> str:
    errors = [
        f"{1000 * value:.0f}" + (f" ({1000 * low:.0f} to {1000 * high:.0f})" if math.isfinite(low) else "")
        for value, low, high in (row.rmse, row.rmse_large)
    ]
    lived = [
        f"{row.ends[kelvin].get(_survival.SURVIVED, 0)}/{sum(row.ends[kelvin].values())} ({low:.2f} to {high:.2f})"
        for kelvin, (_, low, high) in row.survived.items()
    ]
    return f"{row.labels:6d} {row.arm:9} {errors[0]:>20} {errors[1]:>20}  " + "  ".join(f"{one:>24}" for one in lived)


def missed(found: Sequence[Row]) -> list[str]:
    """The pass lines that were not reached, each in words."""
    faults = []
    for arm in (TRANSFER, SCRATCH):
        errors = [(row.labels, row.rmse[0]) for row in found if row.arm == arm]
        (few, high), (many, low) = errors[0], errors[-1]
        if not low < high:
            faults.append(
                f"the error of {arm} goes from {1000 * high:.0f} at {few} labels to {1000 * low:.0f} meV/Å at {many}; it was to fall"
            )
    return faults


def plot(path: Path, found: Sequence[Row], length: Length) -> None:
    """Four panels against the number of labels: two errors, two shares, each with its band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).ravel()
    values = {
        f"force RMSE on {SMALL}, meV/Å": lambda row: 1000 * np.array(row.rmse),
        f"force RMSE on {LARGE}, meV/Å": lambda row: 1000 * np.array(row.rmse_large),
        **{
            f"{LARGE} at {kelvin} K: share alive after {length.horizon / 1000:g} ps": functools.partial(_share, kelvin)
            for kelvin in found[0].survived
        },
    }
    for axes, (title, value) in zip(panels, values.items(), strict=True):
        for arm, colour in ((TRANSFER, "C0"), (SCRATCH, "C1")):
            mine = [row for row in found if row.arm == arm]
            labels, bands = [row.labels for row in mine], np.array([value(row) for row in mine])
            axes.plot(labels, bands[:, 0], color=colour, marker="o", label=arm)
            axes.fill_between(labels, bands[:, 1], bands[:, 2], color=colour, alpha=0.2, lw=0)
        for row in (row for row in found if row.arm == UNTUNED):
            axes.axhline(value(row)[0], color="0.5", ls="--", label=UNTUNED)
        axes.set(xscale="log", title=title)
        axes.set_xticks(labels, labels)
        axes.minorticks_off()
    for axes in panels[:2]:
        axes.set_yscale("log")
    for axes in panels[2:]:
        axes.set(ylim=(-0.03, 1.03), xlabel="labels")
    panels[0].legend()
    saved(figure, path)


def _share(kelvin: str, row: Row) -> np.ndarray:
    return np.array(row.survived[kelvin])


def told(measured: Sequence[Measured], length: Length, seconds: float) -> dict[str, object]:
    """What goes into the JSON; also of a run that is still under way."""
    found = rows(measured)
    jobs = length.seeds * len(length.counts)
    return {
        "machine": described(),
        "command": " ".join(["python", "benchmarks/transfer.py", *sys.argv[1:]]),
        "seconds": round(seconds),
        "length": asdict(length),
        "complete": len([one for one in measured if one.arm == TRANSFER]) == jobs,
        "passed": not missed(found),
        "missed": missed(found),
        "rows": [asdict(row) for row in found],
        "potentials": [asdict(one) for one in measured],
    }


def write(picture: Path | None, figures: Path | None, found: Sequence[Row], plain: dict[str, object], length: Length) -> None:
    """Plot and JSON, where they are wanted."""
    if picture:
        plot(picture, found, length)
    if figures:
        write_whole(figures, (json.dumps(evaluating.finite(plain), indent=1) + "\n").encode())


def measure(length: Length, processes: int, known: Sequence[Measured], after_seed: Callable[[Sequence[Measured]], None]) -> list[Measured]:
    """Labels, then all potentials that are not known, a seed after the other; a line each."""
    began, data = time.monotonic(), labelled(length)
    kinds = ((data.pool, "to learn"), (data.test, "to test"), (data.large, f"of {LARGE}"))
    print(
        f"labels by {TEACHER}: {', '.join(f'{len(frames)} {name}' for frames, name in kinds)}; {time.monotonic() - began:.0f} s", flush=True
    )
    measured = list(known) or [judged(registry.load(MODEL, "cpu"), UNTUNED, 0, 0, data, length, time.monotonic())]
    over = {(one.seed, one.labels) for one in known if one.arm == TRANSFER}
    jobs = [(seed, count) for seed in range(length.seeds) for count in length.counts if (seed, count) not in over]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for done, both in enumerate(pool.imap(functools.partial(pair, data, length), jobs), 1):
            measured += both
            print("\n".join(line(row) for row in rows(both)) + f"   seed {both[0].seed}, {both[0].seconds:.0f} s", flush=True)
            if done % len(length.counts) == 0:
                after_seed(measured)
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer numbers of labels, two seeds, shorter trainings and runs; the same checks"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, anew after each seed")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the curves there, a PNG, likewise")
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="trainings at a time, a core each")
    parser.add_argument(
        "--again",
        metavar="FILE",
        type=Path,
        help="measure nothing: table, plot and intervals once more from the figures of an earlier --json",
    )
    parser.add_argument(
        "--go-on", metavar="FILE", type=Path, help="measure only what an earlier --json, of a run that was cut short, lacks"
    )
    options = parser.parse_args()
    length, began = QUICK if options.quick else FULL, time.monotonic()
    measured: list[Measured] = []
    if earlier := options.again or options.go_on:
        kept = json.loads(earlier.read_text())
        length, measured = Length(**kept["length"]), [Measured(**one) for one in kept["potentials"]]
        began -= kept["seconds"]
    if options.again:
        plain = {**told(measured, length, kept["seconds"]), "machine": kept["machine"], "command": kept["command"]}
        write(options.plot, options.json, rows(measured), plain, length)
    else:

        def after_seed(some: Sequence[Measured]) -> None:
            write(options.plot, options.json, rows(some), told(some, length, time.monotonic() - began), length)

        measured = measure(length, options.processes, measured, after_seed)
    found = rows(measured)
    print("\n".join([head(length), *map(line, found)]))
    if faults := missed(found):
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    print(f"passed: the errors of both arms fall from {length.counts[0]} to {length.counts[-1]} labels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
