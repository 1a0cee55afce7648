"""What each part of the learning is for: runs that lack one of them, beside one that has all, on the home problem.

    python benchmarks/ablations.py [--quick] [--json FILE] [--seeds N]      needs the extra xtb

The packaged CuAu(H2O)2 cluster at 500 K, the embedded potential painn:cuau-water, GFN1-xTB as the teacher (the network was trained on
GFN2-xTB). A label after every 40 steps of 0.5 fs, of the most uncertain frame or, one in four, of one picked at random; an update after each.
All in one process, by the classes that a run is made of (`_ablation_parts.py`); what an arm lacks is in its name:

  rows     forces are left out of the fit: it learns energies alone             judged by the force error on the teacher's own dynamics
  audits   no label of a frame picked at random                                 by the multiplier q of the uncertainty: only audits lower it
  anchors  no force rows of pressed pairs                                       by pairs of elements that are no longer pushed apart
  replay   a fine-tune without frames that the serving version has labelled     by the force error on water and metal alone, for a run that
                                                                                stays with GFN2-xTB, the network's own teacher
  ramp     a version that serves from one call to the next, at constant energy  by the largest change of the forces in a call over the usual one
  gate     one label has its forces turned round; labels are not held           by the force error; the arm "poisoned" has the same label and all
           against each other, nor updates against held-out labels, and         checks, "all" has no such label
           what the potential misses by far counts like everything else

Figures are geometric means over seeds (means where they may be 0). Pass: each arm that lacks a part is worse, by its own measure, than the arm
that has it: rows and gate by a fifth, the others at all; the poisoned label costs at most a tenth where all checks are there; and the ledger: at constant energy with a swap over a ramp, the conserved energy less the work of the swap ends within 1 meV an atom
of where it ends without a swap.
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
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _ablation_parts import KNOWN, STEP_FS, TEACHER, Arm, Ground, Loop, force_error, frame_of, lost, pushes, start
from _machine import described
from ase import units
from ase.md.verlet import VelocityVerlet

from tumbaga.driver import trainer, transferring
from tumbaga.online import last_layer
from tumbaga.online.ramp import RampState, swap_work, weight_step
from tumbaga.online.records import Array
from tumbaga.online.training import finetune
from tumbaga.online.training.loop import Sets
from tumbaga.online.versions import write_whole

POISONED = 10  # number of the label: later ones than it takes to judge one
NO_FORCES = 1e3  # eV/Å of noise
UNLIMITED = 1e6
ARMS = (
    Arm("all"),
    Arm("rows", last_layer.Settings(sigma_force=NO_FORCES)),
    Arm("audits", audits=False),
    Arm("anchors", last_layer.Settings(anchor_weight=0.0)),
    Arm("poisoned", poisoned=POISONED),
    Arm("gate", last_layer.Settings(trust_floor=UNLIMITED, tolerance=UNLIMITED, far=math.inf), guarded=False, poisoned=POISONED),
)
RAMP, BEFORE, AFTER = 200, 400, 600  # calls
LEDGER_MEV = 1.0  # an atom
Row = dict[str, Any]


@dataclass(frozen=True)
class Length:
    """How much is done: labels of an arm, frames that judge, steps of a fine-tune, seeds."""

    labels: int
    frames: int
    steps: int
    seeds: int


FULL, QUICK = Length(40, 100, 1000, 5), Length(20, 40, 300, 2)


# -- arms ------------------------------------------------------------------------------------------------------------------------------


def learnt(folder: Path, ground: Ground, arm: Arm, labels: int) -> tuple[Row, Loop]:
    """One arm of one seed."""
    folder.mkdir()
    loop = Loop(folder, ground, arm)
    loop.run(labels)
    row = {"arm": arm.name, "seed": ground.seed, "error": loop.error(), "q": loop.learner.quantile.q, "covered": loop.covered()}
    row |= {"walls_lost": loop.walls_lost(), "versions": len(loop.readouts), "refused": loop.refused, "restarts": loop.restarts}
    return row | {"aside": loop.aside}, loop


def fine_tuned(folder: Path, ground: Ground, loop: Loop, steps: int, teacher: str) -> list[Row]:
    """A fine-tune of the first network on the labels of an arm, as a run would do it, and without replay or with all of it."""
    train, rows, walls = loop.train(), [], pushes(ground.potential, ground.potential.readout())
    worth = trainer.replay_weight((ground.potential, ground.potential), train)
    kept = finetune.replayed(ground.potential, train, [], max(20, len(train)), 1)
    for name, weight in (("all", worth), ("replay", 0.0), ("full", trainer.REPLAY_WEIGHT)):
        sets = Sets(train, (), kept if weight else ())
        chosen = {"seed": ground.seed, "replay": float(bool(weight)), "replay_weight": weight or 1.0, "patience": 0}
        settings = transferring.settings_for(ground.potential, sets, False, chosen, steps)
        tuned = finetune.fine_tuned(ground.potential, sets, settings, folder / f"{teacher}-{name}")
        told = {"weight": weight, "error": force_error(tuned, ground.apart), "elsewhere": force_error(tuned, ground.elsewhere)}
        told["walls_lost"] = lost(walls, pushes(tuned, tuned.readout()))
        rows.append({"arm": name, "teacher": teacher, "seed": ground.seed, **told})
    before = {
        "weight": 0.0,
        "error": force_error(ground.potential, ground.apart),
        "elsewhere": force_error(ground.potential, ground.elsewhere),
    }
    before["walls_lost"] = 0
    return [{"arm": "untuned", "teacher": teacher, "seed": ground.seed, **before}, *rows]


def swapped(ground: Ground, old: Array, new: Array, calls: int) -> Row:
    """Constant energy with a swap of readouts over so many calls, in the middle; 0 for none."""
    atoms, state = start(ground.seed), RampState(0, idle=0, n=max(calls, 1), rest=0)
    served = Ramped(ground.potential, (old, new), state)
    atoms.calc = served
    energies = []
    for step, _ in enumerate(VelocityVerlet(atoms, STEP_FS * units.fs).irun(BEFORE + AFTER)):
        energies.append(atoms.get_total_energy() - served.work)
        if step == BEFORE and calls:
            served.state = served.state.publish(1)
    changes = np.array(served.changes)
    usual = float(np.median(changes[: BEFORE - 1]))
    drift = float(np.mean(energies[-200:]) - np.mean(energies[:200])) / len(atoms)
    return {"largest": float(changes[BEFORE:].max()) / usual, "drift_mev": 1e3 * drift, "work_mev": 1e3 * served.work / len(atoms)}


class Ramped:
    """A calculator whose readout moves from one to the other, with the work that does and the change of forces at each call.

    Args:
        potential: the network.
        readouts: old and new.
        state: of the ramp.
    """

    def __init__(self, potential: Any, readouts: tuple[Array, Array], state: RampState) -> None:
        self._potential, self._readouts, self.state = potential, readouts, state
        self._mix = state.advance()[1]
        self._at, self._told = b"", (0.0, np.zeros(0))
        self.work, self.changes = 0.0, [0.0]

    def _look(self, atoms: Any) -> tuple[float, Array]:
        if atoms.positions.tobytes() != self._at:
            self._at = atoms.positions.tobytes()
            self.state, mix = self.state.advance()
            old, new = self._potential.predict([frame_of(atoms)] * 2, np.stack([self._readouts[mix.old], self._readouts[mix.new]]))
            self.work += swap_work(weight_step(self._mix, mix), new.energy, old.energy)
            self._mix = mix
            forces = (1.0 - mix.weight) * old.forces + mix.weight * new.forces
            if self._told[1].size:
                self.changes.append(float(np.linalg.norm(forces - self._told[1])))
            self._told = ((1.0 - mix.weight) * old.energy + mix.weight * new.energy, forces)
        return self._told

    def get_potential_energy(self, atoms: Any = None, force_consistent: bool = False) -> float:
        return self._look(atoms)[0]

    def get_forces(self, atoms: Any = None) -> Array:
        return self._look(atoms)[1].copy()


def of_seed(folder: Path, seed: int, length: Length) -> dict[str, list[Row]]:
    """All rows of one seed."""
    ground, rows, ramps, tuned = Ground(seed, length.frames), [], [], []
    for arm in ARMS:
        row, loop = learnt(folder / arm.name, ground, arm, length.labels)
        rows.append(row)
        with closing(loop):
            if arm.name == "all":
                first, last = loop.readouts[0], loop.readouts[-1]
                ramps = [
                    {"arm": name, "seed": seed, **swapped(ground, first, last, n)} for name, n in (("all", RAMP), ("ramp", 1), ("none", 0))
                ]
                tuned = fine_tuned(folder, ground, loop, length.steps, TEACHER)
    known = Ground(seed, length.frames, KNOWN)
    with closing(learnt(folder / KNOWN, known, ARMS[0], length.labels)[1]) as loop:
        tuned += fine_tuned(folder, known, loop, length.steps, KNOWN)
    return {"updates": rows, "fine-tunes": tuned, "swaps": ramps}


# -- what is told ----------------------------------------------------------------------------------------------------------------------


def mean(rows: list[Row], arm: str, key: str, *, of_logs: bool = False) -> float:
    values = np.array([row[key] for row in rows if row["arm"] == arm], dtype=np.float64)
    return float(np.exp(np.log(values).mean()) if of_logs else values.mean())


def shown(found: dict[str, list[Row]]) -> list[str]:
    """The tables."""
    updates, tuned, swaps = found["updates"], found["fine-tunes"], found["swaps"]
    lines = [
        f"{'without':10} {'error':>8} {'q':>6} {'covered':>8} {'walls lost':>11} {'versions':>9} {'refused':>8} {'aside':>6} {'restarts':>9}"
    ]
    for arm in ARMS:
        error = 1e3 * mean(updates, arm.name, "error", of_logs=True)
        others = [mean(updates, arm.name, key) for key in ("q", "covered", "walls_lost", "versions", "refused", "aside", "restarts")]
        name = {"all": "nothing", "poisoned": "(poisoned)"}.get(arm.name, arm.name)
        lines.append("{:10} {:8.0f} {:6.2f} {:8.2f} {:11.1f} {:9.1f} {:8.1f} {:6.1f} {:9.1f}".format(name, error, *others))
    for teacher in (TEACHER, KNOWN):
        lines.append(f"{'fine-tune':10} {'error':>8} {'elsewhere':>10} {'walls lost':>11} {'weight':>8}   {teacher}")
        of_it = [row for row in tuned if row["teacher"] == teacher]
        for arm, name in (("untuned", "(untuned)"), ("all", "nothing"), ("replay", "replay"), ("full", "(full)")):
            errors = [1e3 * mean(of_it, arm, key, of_logs=True) for key in ("error", "elsewhere")]
            lines.append(
                "{:10} {:8.0f} {:10.0f} {:11.1f} {:8.3f}".format(name, *errors, mean(of_it, arm, "walls_lost"), mean(of_it, arm, "weight"))
            )
    lines.append(f"{'swap':10} {'largest change':>15} {'ledger meV/atom':>16} {'work meV/atom':>14}")
    for arm in ("all", "ramp", "none"):
        told = [mean(swaps, arm, key) for key in ("largest", "drift_mev", "work_mev")]
        lines.append("{:10} {:15.1f} {:16.3f} {:14.2f}".format({"all": "nothing", "none": "(no swap)"}.get(arm, arm), *told))
    return lines


def missed(found: dict[str, list[Row]]) -> list[str]:
    """The pass lines that do not hold."""
    updates, tuned, swaps = found["updates"], found["fine-tunes"], found["swaps"]
    error = {arm.name: mean(updates, arm.name, "error", of_logs=True) for arm in ARMS}
    known = [row for row in tuned if row["teacher"] == KNOWN]
    elsewhere = {arm: mean(known, arm, "elsewhere", of_logs=True) for arm in ("all", "replay")}
    largest = {arm: mean(swaps, arm, "largest") for arm in ("all", "ramp")}
    lines = {
        "rows": error["rows"] >= 1.2 * error["all"],
        "audits": mean(updates, "audits", "q") > mean(updates, "all", "q"),
        "anchors": mean(updates, "anchors", "walls_lost") > mean(updates, "all", "walls_lost"),
        "replay": elsewhere["replay"] > elsewhere["all"],
        "ramp": largest["ramp"] > largest["all"],
        "gate": error["gate"] >= 1.2 * error["poisoned"],
    }
    faults = [f"a run without {part} is not worse" for part, holds in lines.items() if not holds]
    if error["poisoned"] > 1.1 * error["all"]:
        faults.append(f"a poisoned label costs {error['poisoned'] / error['all'] - 1:.0%} with all checks")
    seeds = {row["seed"] for row in swaps}
    for seed in sorted(seeds):
        drift = {row["arm"]: row["drift_mev"] for row in swaps if row["seed"] == seed}
        if abs(drift["all"] - drift["none"]) > LEDGER_MEV:
            faults.append(f"seed {seed}: the ledger ends {drift['all'] - drift['none']:+.2f} meV an atom off")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer labels, frames and seeds, shorter fine-tunes; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--seeds", metavar="N", type=int, help="how many seeds")
    options = parser.parse_args()
    length = QUICK if options.quick else FULL
    found: dict[str, list[Row]] = {"updates": [], "fine-tunes": [], "swaps": []}
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as name:
        for seed in range(options.seeds or length.seeds):
            folder = Path(name) / str(seed)
            folder.mkdir()
            for part, rows in of_seed(folder, seed, length).items():
                found[part] += rows
            print(f"seed {seed}", flush=True)
    print("\n".join(shown(found)))
    print("errors in meV/Å, elsewhere: on water and metal alone; q 2 is where it starts; covered: 0.9 is promised")
    faults = missed(found)
    if options.json:
        command = " ".join(["python", "benchmarks/ablations.py", *sys.argv[1:]])
        told = {"machine": described(), "command": command, "missed": faults, "rows": found}
        write_whole(options.json, (json.dumps(told, indent=1) + "\n").encode())
    if faults:
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    print("passed: a run is worse without any of them, and the ledger is flat")
    return 0


if __name__ == "__main__":
    sys.exit(main())
