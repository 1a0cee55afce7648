"""Learning while serving on the home problem: Cu-Au with water, GFN1-xTB as the teacher, at 300 and 500 K, five seeds.

    python benchmarks/water.py [--quick] [--json FILE] [--plot FILE] [--model MODEL] [--processes N] [--go-on FILE | --again FILE]

Needs the extras xtb and plots; with `--model 'sevennet:7net-0?elements=H,O,Cu,Au'` an environment with the extra sevennet.

For each temperature and seed an ASE script moves the packaged CuAu(H2O)2 in a soft wall (Langevin, 1 fs) with a server of its own, which
flags, has GFN1-xTB label, updates, fine-tunes and swaps until nothing is new. Where a frame is unphysical, a water has come apart or an atom
is far away (the rules of `_survival.py`, which never ask the potential how sure it is), the script goes on from the start. Then, on frames of
MD by the teacher itself at that temperature, and by MD of several runs side by side, four potentials are judged:

  tumbaga    the version that serves in the end
  one-shot   `tumbaga transfer` on as many labels of frames drawn at random from MD under the potential as it was
  scratch    the same network from new weights on the same random labels
  untuned    the potential as it was

Shown: force errors (geometric mean over seeds with the 95 % t-interval of its logarithm), the share of MD runs that nothing has ended at the
horizon of the table's head (Wilson's interval; tumbaga's own runs go on behind it), how many of them failed in all, which is to say became
unphysical, how many ended else, and picoseconds in all; for the runs that learn the error against the
number of labels, and the share of frames whose largest error is within what the uncertainty promises for 0.9 of them: of frames drawn at
random from MD under the last version, which is what is promised, and of the teacher's own.

Pass, over both temperatures: tumbaga's error is below that of the untuned potential and of scratch; none of its MD fails; no less of it
survives than of any of the others; the coverage is at least LEAST; and, with the embedded potential, its MD is at least NS in all
(not with --quick). How it compares with one-shot is what is to be found out.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy, torch and tblite are imported

import argparse
import concurrent.futures
import json
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _survival
import numpy as np
from _bands import Band, over_seeds, saved, share
from _machine import described
from _water_run import ONE_SHOT, SCRATCH, TUMBAGA, UNTUNED, Length, job

from tumbaga.driver import evaluating
from tumbaga.online.versions import write_whole

EMBEDDED = "painn:cuau-water"
KELVINS = (300.0, 500.0)
SEEDS = 5
LEAST = 0.8  # of the frames, where 0.9 are promised
NS = 1.0
ARMS = (TUMBAGA, ONE_SHOT, SCRATCH, UNTUNED)
COLOURS = {TUMBAGA: "C0", ONE_SHOT: "C1", SCRATCH: "C2", UNTUNED: "0.5"}
FULL = Length(6000, 240.0, 40, 0.1, 8, 600, 60, 6, 5000.0, 17_000.0)
QUICK = Length(1500, 60.0, 16, 0.1, 8, 150, 30, 2, 500.0, 500.0)
FULL_LARGE = Length(600, 240.0, 16, 0.15, 8, 30, 16, 2, 250.0, 250.0)
QUICK_LARGE = Length(150, 60.0, 6, 0.15, 4, 10, 6, 1, 50.0, 50.0)
Job = dict[str, Any]


# -- figures ---------------------------------------------------------------------------------------------------------------------------


def of(jobs: Sequence[Job], arm: str) -> list[dict[str, Any]]:
    """What the jobs say of an arm."""
    return [row for one in jobs for row in one["arms"] if row["arm"] == arm]


def figures(jobs: Sequence[Job], arm: str) -> dict[str, Any]:
    """One line of the table; what survived is told at the horizon that all potentials have."""
    horizon = jobs[0]["length"]["horizon"]
    rows = of(jobs, arm)
    ends = [tuple(end) for row in rows for end in row["ends"]]
    ended = [end for end, _ in ends if end != _survival.SURVIVED]
    alive, failed = sum(at >= horizon for _, at in ends), sum(end.startswith("failed") for end in ended)
    errors = [np.inf if row["rmse"] is None else row["rmse"] for row in rows]
    told = {"rmse": over_seeds(errors), "survived": share(alive, len(ends)), "runs": len(ends), "failed": failed}
    return told | {"other_ends": len(ended) - failed, "ps": sum(at for _, at in ends) / 1000.0}


def at_labels(one: Job, labels: int) -> float:
    """Force RMSE of the newest version of a run that knew no more than so many labels, eV/Å."""
    known = [point["rmse"] for point in one["curve"] if point["labels"] <= labels]
    return float(known[-1] if known else of([one], UNTUNED)[0]["rmse"])


def grid(jobs: Sequence[Job]) -> list[int]:
    """Numbers of labels at which the curve is shown: up to what all runs had, closer together at the start."""
    most = max(point["labels"] for one in jobs for point in one["curve"])
    return sorted({0, *(n for n in (1, 2, 5, 10, 20, 30, 40, 60) if n < most), most})


def learning(jobs: Sequence[Job]) -> dict[str, Any]:
    """What the runs that learn did."""
    labels = grid(jobs)
    ends: dict[str, int] = {}
    for one in jobs:
        for end, times in one["ends"].items():
            ends[end] = ends.get(end, 0) + times
    keys = ("labels_converged", "labels_quarantined", "labels_failed", "swaps", "steps")
    means = {key: float(np.mean([one[key] for one in jobs])) for key in keys}
    return {
        "curve": [(n, *over_seeds([at_labels(one, n) for one in jobs])) for n in labels],
        "coverage": float(np.mean([one["promise"]["found"] for one in jobs])),
        "coverage_apart": float(np.mean([one["promise_apart"]["found"] for one in jobs])),
        "q": float(np.mean([one["promise"]["q"] for one in jobs])),
        "ends": ends,
        "problems": [one["problem"] for one in jobs if one["problem"]],
        "longest_ms": max(one["server_ms"]["max"] for one in jobs),
        "fine_tunes": float(np.mean([len(one["fine_tunes"]) for one in jobs])),
        **means,
    }


def summary(jobs: Sequence[Job]) -> dict[str, Any]:
    """All figures, by temperature."""
    found: dict[str, Any] = {}
    for kelvin in sorted({one["kelvin"] for one in jobs}):
        mine = [one for one in jobs if one["kelvin"] == kelvin]
        # a run without labels has nothing to compare with
        found[f"{kelvin:.0f}"] = {arm: figures(mine, arm) for arm in ARMS if of(mine, arm)} | {"learning": learning(mine)}
    return found


def missed(found: dict[str, Any], least_ns: float) -> list[str]:
    """The pass lines that do not hold."""
    faults, ps = [], 0.0
    for kelvin, told in found.items():
        own = told[TUMBAGA]
        ps += own["ps"]
        faults += [
            f"at {kelvin} K the error of {TUMBAGA} is not below that of {arm}"
            for arm in (UNTUNED, SCRATCH)
            if arm in told and not own["rmse"][0] < told[arm]["rmse"][0]
        ]
        faults += [
            f"at {kelvin} K less MD survives under {TUMBAGA} than under {arm}"
            for arm in ARMS
            if arm in told and own["survived"][0] < told[arm]["survived"][0]
        ]
        if own["failed"]:
            faults.append(f"at {kelvin} K {own['failed']} of {own['runs']} MD runs under {TUMBAGA} became unphysical")
        if told["learning"]["coverage"] < LEAST:
            faults.append(f"at {kelvin} K {told['learning']['coverage']:.2f} of the frames are within what is promised for 0.9 of them")
        faults += [f"at {kelvin} K a run ended: {problem}" for problem in told["learning"]["problems"]]
    if ps < 1000.0 * least_ns:
        faults.append(f"the MD under {TUMBAGA} is {ps / 1000.0:.2f} ns in all, not {least_ns:g}")
    return faults


# -- what is told ----------------------------------------------------------------------------------------------------------------------


def band(values: Band, scale: float = 1.0, digits: int = 0) -> str:
    return f"{scale * values[0]:.{digits}f} ({scale * values[1]:.{digits}f} to {scale * values[2]:.{digits}f})"


def shown(found: dict[str, Any], horizon: float) -> list[str]:
    """The table."""
    lines = [
        f"{'K':>4} {'potential':10} {'error, meV/Å':>18} {f'MD alive at {horizon / 1000.0:g} ps':>22} {'failed':>7} {'else':>5} {'ps':>7}"
    ]
    for kelvin, told in found.items():
        for arm in ARMS:
            if arm in told:
                row = told[arm]
                rmse, alive = band(row["rmse"], 1000.0), band(row["survived"], 1.0, 2)
                lines.append(
                    f"{kelvin:>4} {arm:10} {rmse:>18} {alive:>22} {row['failed']:4d}/{row['runs']:<3d} {row['other_ends']:4d} {row['ps']:7.1f}"
                )
    for kelvin, told in found.items():
        own = told["learning"]
        curve = ", ".join(f"{1000.0 * rmse:.0f} after {n}" for n, rmse, *_ in own["curve"])
        lines.append(f"at {kelvin} K, error by labels: {curve} meV/Å")
        lines.append(
            f"  {own['labels_converged']:.1f} labels ({own['labels_quarantined']:.1f} set aside, {own['labels_failed']:.1f} failed), "
            f"{own['swaps']:.1f} swaps, {own['fine_tunes']:.1f} fine-tunes in {own['steps']:.0f} steps; "
            f"covered {own['coverage']:.2f} where 0.9 are promised, of the teacher's own frames {own['coverage_apart']:.2f} (q {own['q']:.2f}); ends while learning: {own['ends'] or 'none'}"
        )
    return lines


def plot(path: Path, found: dict[str, Any], model: str) -> None:
    """Error against labels and survival, a column for each temperature."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(found), 6.4), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False)
    for column, (kelvin, told) in enumerate(found.items()):
        curve = np.array(told["learning"]["curve"])
        above, below = panels[:, column]
        above.plot(curve[:, 0], 1000.0 * curve[:, 1], color=COLOURS[TUMBAGA], marker="o", label=f"{TUMBAGA}, while it serves")
        above.fill_between(curve[:, 0], 1000.0 * curve[:, 2], 1000.0 * curve[:, 3], color=COLOURS[TUMBAGA], alpha=0.2, lw=0)
        for arm in ARMS[1:]:
            if arm in told:
                above.axhline(1000.0 * told[arm]["rmse"][0], color=COLOURS[arm], ls="--", label=arm)
        above.set(yscale="log", title=f"{model} at {kelvin} K", xlabel="labels", ylabel="force RMSE, meV/Å")
        above.legend(fontsize="small")
        there = [arm for arm in ARMS if arm in told]
        bands = np.array([told[arm]["survived"] for arm in there])
        below.bar(there, bands[:, 0], color=[COLOURS[arm] for arm in there])
        low, high = np.maximum(bands[:, 0] - bands[:, 1], 0.0), np.maximum(bands[:, 2] - bands[:, 0], 0.0)
        below.errorbar(there, bands[:, 0], yerr=[low, high], fmt="none", ecolor="k", capsize=3)
        below.set(ylim=(0.0, 1.05), ylabel="share of MD runs that nothing ended")
    saved(figure, path)


def measure(model: str, length: Length, seeds: int, known: list[Job], processes: int, after: Callable[[list[Job]], None]) -> list[Job]:
    """All jobs that are not known; `after` is called with all that are done after each."""
    over = {(one["kelvin"], one["seed"]) for one in known}
    todo = [(kelvin, seed) for seed in range(seeds) for kelvin in KELVINS if (kelvin, seed) not in over]
    done = list(known)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        for future in concurrent.futures.as_completed([pool.submit(job, model, kelvin, seed, length) for kelvin, seed in todo]):
            one = future.result()
            done.append(one)
            errors = ", ".join(f"{row['arm']} {1000.0 * (row['rmse'] or np.nan):.0f}" for row in one["arms"])
            name = f"{one['kelvin']:.0f} K, seed {one['seed']}"
            print(f"{name}: {one['labels_converged']} labels, {errors} meV/Å; {one['seconds']:.0f} s", flush=True)
            after(done)
    return sorted(done, key=lambda one: (one["kelvin"], one["seed"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps and labels, two seeds, shorter MD; the same checks but for the length"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, anew after each seed and temperature")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the curves there, a PNG, likewise")
    parser.add_argument("--model", metavar="MODEL", default=EMBEDDED, help="another potential that learns and knows Cu, Au, O and H")
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="seeds and temperatures at a time")
    parser.add_argument(
        "--again", metavar="FILE", type=Path, help="measure nothing: table, plot and JSON from the figures of an earlier --json"
    )
    parser.add_argument(
        "--go-on", metavar="FILE", type=Path, help="measure only what an earlier --json, of a run that was cut short, lacks"
    )
    options = parser.parse_args()
    large = options.model != EMBEDDED
    length = (QUICK_LARGE if large else QUICK) if options.quick else (FULL_LARGE if large else FULL)
    least_ns = 0.0 if large or options.quick else NS
    earlier = json.loads((options.again or options.go_on).read_text()) if options.again or options.go_on else {"jobs": []}
    facts = {key: earlier[key] for key in ("machine", "command")} if options.again else {"machine": described()}
    if not options.again:
        facts["command"] = " ".join(["python", "benchmarks/water.py", *map(shlex.quote, sys.argv[1:])])
    if earlier["jobs"]:
        length = Length(**earlier["length"])

    def after(jobs: list[Job]) -> None:
        found = summary(jobs)
        told = {
            **facts,
            "model": options.model,
            "length": asdict(length),
            "missed": missed(found, least_ns),
            "summary": found,
            "jobs": jobs,
        }
        if options.plot:
            plot(options.plot, found, options.model)
        if options.json:
            write_whole(options.json, (json.dumps(evaluating.finite(told), indent=1) + "\n").encode())

    jobs: list[Job] = earlier["jobs"]
    if not options.again:
        jobs = measure(options.model, length, 2 if options.quick else SEEDS, jobs, options.processes, after)
    after(jobs)
    found = summary(jobs)
    print("\n".join(shown(found, length.horizon)))
    if faults := missed(found, least_ns):
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    print(f"passed: {TUMBAGA} is below the untuned potential and scratch, its MD stays physical, and what it promises holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
