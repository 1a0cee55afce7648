"""The side of falcon-md in suite L: runs in its own environment, reads what to do from a JSON file and says in lines of JSON what came of it.

FALCON is a calculator of ASE. A step predicts; where the predicted standard deviation of the energy is above `accuracy_e`, in the first
`train_start` steps, and at step numbers that are powers of two, it waits for the teacher and trains again before the forces are there.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _learning_teacher as teacher
import numpy as np
from agox.models.descriptors import Fingerprint
from agox.models.GPR import GPR
from agox.models.GPR.kernels import RBF, Constant, Noise
from agox.models.GPR.priors import Repulsive
from agox.utils.ray import pool_user
from ase import Atoms
from ase.io import read
from falcon_md.otf_calculator import FALCON

GROWTH = 1.5  # labels between two looks at the error on frames kept apart
UNSURE_FRAMES = 40


def main(task: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """One run; `task` has size, seed, delay, steps, seconds, apart, accuracy_e, train_start."""
    known = teacher.labels_of(teacher.rattled(task["size"], task["seed"]))
    atoms, apart = teacher.start(task["size"], task["seed"]), read(task["apart"], index=":")
    made = FALCON(
        model(atoms),
        teacher.Teacher(task["delay"]),
        known,
        accuracy_e=task["accuracy_e"],
        train_start=task["train_start"],
    )
    atoms.calc, watch = made, teacher.Watch(made, atoms)
    looked, look_at, begun, step = 0.0, 0.0, time.perf_counter(), 0
    for step in teacher.walk(atoms, task["seed"], task["steps"], watch.restarted):
        watch.note(step)
        if len(known) >= look_at:
            look_at, before = GROWTH * len(known), time.perf_counter()
            say({"labels": len(known), "step": step, "rmse": error(made, apart[::4])})
            looked += time.perf_counter() - before
        if time.perf_counter() - begun - looked > task["seconds"]:
            break
    seconds = time.perf_counter() - begun - looked
    say({"labels": len(known), "step": step, "rmse": error(made, apart)})
    say({"steps": step, "seconds": seconds, "trainings": made.training_steps, **watch.told(), **unsure(made, apart), "ended": ""})


def model(atoms: Atoms) -> GPR:
    """The Gaussian process that falcon-md calls GPR; its two searches for hyperparameters run in this process, not in two of ray's.

    Ray gives up after 30 s of starting on a busy machine.
    """
    pool_user.get_ray_pool = lambda: (None, {"CPU": 2})  # agox starts it even where it is not used
    beta = 0.01
    wide, narrow = Constant(beta, (beta, beta)) * RBF(), Constant(1 - beta, (1 - beta, 1 - beta)) * RBF()
    kernel = Constant(5000, (1, 1e5)) * (wide + narrow) + Noise(0.01, (0.01, 0.01))
    return GPR(descriptor=Fingerprint.from_atoms(atoms), kernel=kernel, prior=Repulsive(), n_optimize=2, use_ray=False)


def error(made: FALCON, apart: Sequence[Atoms]) -> float:
    """Of the model as it is now: force RMSE over components, eV/Å."""
    return teacher.force_rmse([made.active_models[0].predict_forces(atoms) for atoms in apart], apart)


def unsure(made: FALCON, apart: Sequence[Atoms]) -> dict[str, float]:
    """Which shares of force components lie within the predicted intervals of 68.3 and 90 %."""
    judged, ratios = made.active_models[0], []
    for atoms in apart[:: max(1, len(apart) // UNSURE_FRAMES)]:
        errors = np.abs(judged.predict_forces(atoms) - atoms.get_forces())
        ratios.append(errors / np.maximum(judged.predict_uncertainty_forces(atoms), 1e-12))
    return teacher.covered(np.concatenate(ratios))


if __name__ == "__main__":
    with open(sys.argv[2], "w", buffering=1) as lines, open("falcon.out", "w") as noise, contextlib.redirect_stdout(noise):
        main(json.loads(Path(sys.argv[1]).read_text()), lambda told: print(json.dumps(told), file=lines))
