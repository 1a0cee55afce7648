"""The main job with real DFT labels: the force error before and after, and by the number of labels, on frames kept apart.

    python benchmarks/pyscf_run.py [--quick] [--json FILE] [--steps N] [--labels N] [--seed N]
    python benchmarks/pyscf_run.py --label          makes the frames again, about 4 minutes on a free core; needs the extra xtb

`tumbaga run cuau-water`: real i-PI, the packaged CuAu(H2O)2 at 300 K, the embedded potential, labels by PySCF with the defaults of a run
(PBE/def2-SVP). Apart are APART frames of the same cluster from MD by GFN1-xTB at that temperature, which neither potential nor run has to do
with; they and their labels by the same labeller lie in pyscf-apart.extxyz beside this script. Every version that served is judged on them.

Pass: the last version's force RMSE is below FALL of the first one's, no label failed, and no number of the output is other than finite.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy, torch and PySCF are imported

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from _learning_tumbaga import served, spread
from _machine import described
from ase.calculators.singlepoint import SinglePointCalculator

from tumbaga.driver import datasets, evaluating
from tumbaga.driver.backends import registry
from tumbaga.online import accuracy
from tumbaga.online.labels.factory import make_labeller
from tumbaga.online.records import LabelledFrame
from tumbaga.online.versions import write_whole

FRAMES = Path(__file__).with_name("pyscf-apart.extxyz")
MODEL, KELVIN = "painn:cuau-water", 300.0
APART = 12
TRAJECTORIES = 3  # that the frames are of
FALL = 0.6


def label(path: Path) -> None:
    """Make the frames and their labels; one line a frame to the terminal."""
    from _water_run import teachers_own

    labeller, found = make_labeller("pyscf"), []
    for seed in range(TRAJECTORIES):
        for one in teachers_own(KELVIN, 500 + seed, APART // TRAJECTORIES):
            said = labeller.label(one.frame)
            atoms = ase.Atoms(one.frame.numbers, one.frame.positions)
            atoms.calc = SinglePointCalculator(atoms, energy=said.energy, forces=said.forces)
            atoms.info["method"] = said.method
            found.append(atoms)
            ase.io.write(path, found, format="extxyz")
            print(f"{len(found):2d} {said.seconds:6.1f} s  largest force {np.abs(said.forces).max():.2f} eV/Å", flush=True)


def rmse(model: str, file: Path | None, apart: list[LabelledFrame]) -> float:
    """Force RMSE of a potential, or of a version file of it, eV/Å."""
    potential = registry.load(model, "cpu") if file is None else registry.of_version(model, file, "cpu")
    return accuracy.force_error(evaluating.judge(potential, apart)[0]).rmse


def measured(steps: int, labels: int, seed: int) -> dict[str, Any]:
    """The run and what its versions are worth."""
    apart = datasets.read(FRAMES)
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "tumbaga.driver.cli", "run", "cuau-water", "--run-dir", str(run), "--quiet"]
        command += ["--steps", str(steps), "--labels", str(labels), "--seed", str(seed), "--temperature", f"{KELVIN:g}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=7200)
        status = json.loads((run / "status.json").read_text())
        curve = [{"labels": 0, "rmse": rmse(MODEL, None, apart)}]
        curve += [{"labels": one.labels, "rmse": rmse(MODEL, run / one.file, apart)} for one in spread(served(run)) if one.labels]
    keys = ("steps", "seconds", "labels", "swaps", "call_ms", "force_rmse", "errors")
    return {"apart": len(apart), "curve": curve, "finite": status["engine"]["finite"], **{key: status[key] for key in keys}}


def missed(told: dict[str, Any]) -> list[str]:
    """The pass lines that do not hold."""
    before, after, faults = told["curve"][0]["rmse"], told["curve"][-1]["rmse"], []
    if not after < FALL * before:
        faults.append(f"the error went from {1000.0 * before:.0f} to {1000.0 * after:.0f} meV/Å, not below {FALL:g} of it")
    if told["labels"]["failed"]:
        faults.append(f"{told['labels']['failed']} labels failed")
    if not told["finite"]:
        faults.append("a number of i-PI's output is not finite")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and labels; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--steps", metavar="N", type=int, help="of i-PI")
    parser.add_argument("--labels", metavar="N", type=int, help="at most")
    parser.add_argument("--seed", metavar="N", type=int, default=1)
    parser.add_argument("--label", action="store_true", help="make the frames kept apart and their labels again, and measure nothing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    if options.label:
        label(FRAMES)
        return 0
    told = measured(options.steps or (20_000 if options.quick else 80_000), options.labels or (6 if options.quick else 30), options.seed)
    print(f"{'labels':>7} {'force RMSE, meV/Å':>18}")
    for point in told["curve"]:
        print(f"{point['labels']:7d} {1000.0 * point['rmse']:18.0f}")
    counts = ", ".join(f"{count} {kind}" for kind, count in told["labels"].items() if count)
    print(
        f"{told['steps']} steps in {told['seconds']:.0f} s; labels: {counts}; {told['swaps']} swaps; longest call {told['call_ms']['max']:.0f} ms"
    )
    faults = missed(told)
    if options.json:
        command = " ".join(["python", "benchmarks/pyscf_run.py", *sys.argv[1:]])
        plain = {"machine": described(), "command": command, "missed": faults, **told}
        write_whole(options.json, (json.dumps(evaluating.finite(plain), indent=1) + "\n").encode())
    if faults:
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    print(f"passed: the force error on {told['apart']} frames kept apart fell below {FALL:g} of what it was")
    return 0


if __name__ == "__main__":
    sys.exit(main())
