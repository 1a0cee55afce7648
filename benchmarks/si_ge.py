"""Silicon to germanium: does a potential that knows silicon learn germanium from fewer labels than one that knows nothing?

    python benchmarks/si_ge.py [--quick] [--json FILE] [--plot FILE]      needs the extras teachers and plots

Labels are Stillinger-Weber's, computed by matscipy: Si with the parameters of its table (Stillinger, Weber, Phys. Rev. B 31, 5262 (1985)),
Ge with those of Ding and Andersen (Phys. Rev. B 34, 6987 (1986)): epsilon 1.93 eV, sigma 2.181 Å, lambda 31, the rest as for Si. Frames are
diamond cells of 8, 16 and 64 atoms, strained at random by up to 4 % and rattled by 0.03, 0.08 or 0.15 Å.

A PaiNN of the shape of the embedded potential is trained from nothing on Si, once. Then, at 10 and at 50 labels of Ge:
  transfer   starts from it, Ge as Si: what `tumbaga transfer --map Ge=Si` does
  scratch    new weights of the same shape
(An ænet potential of 32-32 nodes was tried first: after as much time its error on Si was three times as large.)
Both see the same labels (a tenth of them choose the best epoch) for the same number of steps, each at the rate that `tumbaga transfer` would
choose. A seed draws the labels, the weights and the order. "untuned" is the Si potential asked for Ge as it is.
The question is that of Röcken and Zavadlav, J. Chem. Inf. Model. (2025), arXiv 2502.13522, who found 10 labels with transfer better than 50 without.

RMSE is over force components of test frames that nobody learns from, the geometric mean over seeds with the 95 % t-interval of its logarithm. Pass: both arms' errors fall
from the fewest labels to the most. Which arm wins is what is to be found out.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy and torch are imported

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ase.build
import numpy as np
import torch
from _bands import Band, over_seeds, saved
from _machine import described
from matscipy.calculators.manybody import Manybody
from matscipy.calculators.manybody.explicit_forms.stillinger_weber import Stillinger_Weber_PRB_31_5262_Si, StillingerWeber

from tumbaga.driver import evaluating, structures, transferring
from tumbaga.driver.backends import registry
from tumbaga.online import accuracy
from tumbaga.online.ports import Tunable
from tumbaga.online.records import Label, LabelledFrame
from tumbaga.online.training.dataset import held_out
from tumbaga.online.training.loop import Sets, Training

SI, GE = 14, 32
TEACHERS = {
    SI: Stillinger_Weber_PRB_31_5262_Si,
    GE: {**Stillinger_Weber_PRB_31_5262_Si, "el": "Ge", "epsilon": 1.93, "sigma": 2.181, "lambda1": 31.0},
}
LATTICE = {SI: 5.431, GE: 5.654}  # Å; where the teachers have no stress
CELLS = ((1, 1, 1), (2, 1, 1), (2, 2, 2))
STRAIN, RATTLES = 0.04, (0.03, 0.08, 0.15)
SHAPE = "painn:cuau-water"
TRANSFER, SCRATCH = "transfer", "scratch"
COUNTS = (10, 50)
BATCH_ATOMS = 32


@dataclass(frozen=True)
class Length:
    """How much is measured: frames of Si to pretrain on, of Ge to test on, steps of each training, seeds."""

    silicon: int
    test: int
    pretraining: int
    steps: int
    seeds: int


@dataclass(frozen=True)
class Trained:
    """One training; eV/Å, seconds."""

    arm: str
    labels: int
    seed: int
    rmse: float
    seconds: float


def frames(element: int, count: int, seed: int) -> list[LabelledFrame]:
    """Labelled frames; cells and amplitudes take turns."""
    rng, found = np.random.default_rng([element, seed]), []
    for k in range(count):
        atoms = ase.build.bulk("Si", "diamond", LATTICE[element], cubic=True) * CELLS[k % 3]
        atoms.numbers[:] = element
        strain = rng.uniform(-STRAIN, STRAIN, (3, 3))
        atoms.set_cell(atoms.cell @ (np.eye(3) + 0.5 * (strain + strain.T)), scale_atoms=True)
        atoms.positions += RATTLES[k // 3 % 3] * rng.standard_normal(atoms.positions.shape)
        atoms.calc = Manybody(**StillingerWeber(TEACHERS[element]))
        label = Label(atoms.get_potential_energy(), atoms.get_forces(), f"Stillinger-Weber {TEACHERS[element]['el']}", 0.0)
        found.append(LabelledFrame(structures.from_atoms(atoms), label))
    return found


def new(element: int) -> Tunable:
    """A potential of the right shape for the element; its weights mean nothing and are not used."""
    return registry.load(SHAPE, "cpu").with_elements({element: 29})


def trained(start: Tunable, learnt: Sequence[LabelledFrame], from_scratch: bool, steps: int, seed: int) -> Tunable:
    """What `tumbaga transfer` would make of the labels in so many steps, about."""
    train, valid = held_out(learnt, 0.1, seed)
    batches = math.ceil(sum(len(one.frame) for one in train) / BATCH_ATOMS)
    chosen = {"epochs": max(1, steps // batches), "batch_atoms": BATCH_ATOMS, "seed": seed, "patience": 0}
    sets = Sets(train, valid)
    settings = transferring.settings_for(start, sets, from_scratch, chosen)
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as folder:
        return Training(start, sets, settings, Path(folder), scratch=from_scratch).run().potential


def rmse(potential: Tunable, test: Sequence[LabelledFrame]) -> float:
    """Over all force components, eV/Å."""
    return accuracy.force_error(evaluating.judge(potential, test)[0]).rmse


def measured(silicon: Tunable, pool: Sequence[LabelledFrame], test: Sequence[LabelledFrame], length: Length) -> list[Trained]:
    """All trainings on Ge, a line each."""
    found = []
    for seed in range(length.seeds):
        order = np.random.default_rng(seed).permutation(len(pool))
        for count in COUNTS:
            learnt = [pool[k] for k in order[:count]]
            for arm in (TRANSFER, SCRATCH):
                began = time.monotonic()
                start = silicon.with_elements({GE: SI}) if arm == TRANSFER else new(GE)
                made = trained(start, learnt, arm == SCRATCH, length.steps, seed)
                found.append(Trained(arm, count, seed, rmse(made, test), round(time.monotonic() - began, 1)))
                print(f"  {arm:9} {count:3d} labels, seed {seed}: {found[-1].rmse:.3f} eV/Å in {found[-1].seconds:.0f} s", flush=True)
    return found


def band(runs: Sequence[Trained], arm: str, count: int) -> Band:
    return over_seeds([one.rmse for one in runs if (one.arm, one.labels) == (arm, count)])


def ratio(runs: Sequence[Trained], count: int) -> Band:
    """The error with transfer over that from scratch, pair by pair: both arms of a seed see the same labels."""
    errors = {(one.arm, one.seed): one.rmse for one in runs if one.labels == count}
    return over_seeds([errors[TRANSFER, seed] / errors[SCRATCH, seed] for arm, seed in errors if arm == SCRATCH])


def missed(runs: Sequence[Trained]) -> list[str]:
    """The pass lines that were not reached, each in words."""
    ends = {arm: [band(runs, arm, count)[0] for count in (COUNTS[0], COUNTS[-1])] for arm in (TRANSFER, SCRATCH)}
    told = "the error of {} goes from {:.3f} at {} labels to {:.3f} eV/Å at {}; it was to fall"
    return [told.format(arm, few, COUNTS[0], many, COUNTS[-1]) for arm, (few, many) in ends.items() if not many < few]


def plot(path: Path, runs: Sequence[Trained], untuned: float, rms: float) -> None:
    """Error against labels, each seed a point, the means with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6))
    axes = figure.subplots()
    for arm, colour, shift in ((TRANSFER, "C0", 0.97), (SCRATCH, "C1", 1.03)):
        bands = np.array([band(runs, arm, count) for count in COUNTS])
        x = shift * np.array(COUNTS)
        axes.errorbar(x, bands[:, 0], np.abs(bands[:, 1:] - bands[:, :1]).T, color=colour, marker="o", capsize=4, label=arm)
        axes.scatter(
            [shift * one.labels for one in runs if one.arm == arm],
            [one.rmse for one in runs if one.arm == arm],
            s=8,
            color=colour,
            alpha=0.5,
        )
    axes.axhline(untuned, color="0.5", ls="--", label="the Si potential untuned")
    axes.axhline(rms, color="0.8", ls=":", label="rms of the labels")
    axes.set(xscale="log", yscale="log", xlabel="labels of Ge", ylabel="force RMSE on test frames, eV/Å", xticks=COUNTS, xticklabels=COUNTS)
    ticks = [0.1, 0.2, 0.3, 0.5, 1, 2]
    axes.set_yticks(ticks, ticks)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    axes.set_title(f"Si to Ge, Stillinger-Weber; {len({one.seed for one in runs})} seeds, 95 % t-intervals", fontsize=9)
    saved(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three seeds, fewer steps and frames; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the curves there, a PNG")
    options = parser.parse_args()
    length = Length(120, 30, 300, 300, 1) if options.quick else Length(150, 60, 800, 300, 3)
    torch.set_num_threads(1)
    began = time.monotonic()
    known, pool, test = frames(SI, length.silicon, 0), frames(GE, COUNTS[-1] + 40, 1), frames(GE, length.test, 2)
    silicon = trained(new(SI), known, True, length.pretraining, 0)
    on_silicon = rmse(silicon, frames(SI, length.test, 3))
    judged = evaluating.judge(silicon.with_elements({GE: SI}), test)[0]
    error = accuracy.force_error(judged)
    print(
        f"Si potential: {on_silicon:.3f} eV/Å on Si, {error.rmse:.3f} on Ge untuned (rms of the Ge labels {error.rms:.3f}), {time.monotonic() - began:.0f} s",
        flush=True,
    )
    runs = measured(silicon, pool, test, length)
    print(f"{'':10} {'labels':>6} {'force RMSE, eV/Å':>18}  95 % interval over {length.seeds} seeds")
    bands = [(arm, count, *band(runs, arm, count)) for count in COUNTS for arm in (TRANSFER, SCRATCH)]
    for arm, count, mean, low, high in bands:
        print(f"{arm:10} {count:6d} {mean:18.3f}  {low:.3f} to {high:.3f}")
    ratios = {count: ratio(runs, count) for count in COUNTS}
    for count, (mean, low, high) in ratios.items():
        print(f"at {count} labels the error with transfer is {mean:.2f} ({low:.2f} to {high:.2f}) times that from scratch, seed by seed")
    faults = missed(runs)
    if options.plot:
        plot(options.plot, runs, error.rmse, error.rms)
    if options.json:
        told = {
            "machine": described(),
            "command": " ".join(["python", "benchmarks/si_ge.py", *sys.argv[1:]]),
            "seconds": round(time.monotonic() - began),
            "length": asdict(length),
            "passed": not faults,
            "missed": faults,
            "silicon_rmse": on_silicon,
            "untuned_rmse": error.rmse,
            "rms_of_labels": error.rms,
            "bands": [dict(zip(("arm", "labels", "rmse", "low", "high"), one, strict=True)) for one in bands],
            "ratios": {str(count): one for count, one in ratios.items()},
            "runs": [asdict(one) for one in runs],
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if faults:
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    few, many = band(runs, TRANSFER, COUNTS[0])[0], band(runs, SCRATCH, COUNTS[-1])[0]
    print(f"passed: both errors fall; {COUNTS[0]} labels with transfer give {few:.3f}, {COUNTS[-1]} from scratch {many:.3f} eV/Å")
    return 0


if __name__ == "__main__":
    sys.exit(main())
