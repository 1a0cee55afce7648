"""Time of the back end mace over that of the model's own call, on the same frames and one thread; with random weights, which cost what others do.

The model's own call is `model(batch, compute_force=True)` on a batch that is ready: no neighbour list, no conversion. The back end's is
`predict([frame])` of a frame whose atoms have just moved: neighbour list, energy, forces, virial, features. They take turns, and time is that
of the processor. Runs in an environment with mace-torch (`make mace` makes one).

    .venv-mace/bin/python benchmarks/adapter_mace.py
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy and torch are imported

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from embedded import random_cluster

from tumbaga.driver.backends import registry
from tumbaga.online.records import Frame

SYSTEMS = {20: (2, 3, 5), 38: (4, 4, 10), 100: (2, 5, 31)}  # copper, gold, waters
# the first is of the size that the tests use, the second of that of MACE-MP-0 small
MODELS: dict[str, dict[str, Any]] = {
    "16x0e+16x1o": {"hidden": "16x0e+16x1o", "max_ell": 2, "correlation": 3, "r_max": 5.0, "elements": (1, 8, 29, 79)},
    "128x0e": {"hidden": "128x0e", "max_ell": 3, "correlation": 3, "r_max": 6.0, "elements": tuple(range(1, 90))},
}


def write(path: Path, hidden: str, elements: tuple[int, ...], **settings: Any) -> None:
    """Save a model with random weights."""
    from mace import modules
    from e3nn.o3 import Irreps  # isort: skip - torch loads its tables only after mace has been imported

    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = modules.ScaleShiftMACE(
        num_bessel=8,
        num_polynomial_cutoff=5,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(elements),
        hidden_irreps=Irreps(hidden),
        MLP_irreps=Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(len(elements)),
        avg_num_neighbors=30.0,
        atomic_numbers=list(elements),
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
        **settings,
    )
    torch.save(model, path)


def measure(path: Path, copper: int, gold: int, waters: int, rounds: int) -> tuple[float, float, float]:
    """Median times of the model's own call, its calculator and the back end, ms."""
    from mace.calculators import MACECalculator

    rng = np.random.default_rng(0)
    numbers, positions = random_cluster(copper, gold, waters, rng)
    potential = registry.load(f"mace:{path}?elements=Cu,Au,O,H", "cpu")
    calculator = MACECalculator(str(path), device="cpu", default_dtype="float32")
    atoms = Atoms(numbers, positions, calculator=calculator)

    def own(batch: Any) -> None:
        calculator.models[0](batch, compute_force=True)

    times: list[list[float]] = []
    for _ in range(rounds + 2):
        moved = positions + rng.normal(0.0, 0.01, positions.shape)
        atoms.positions[:] = moved
        batch, frame = calculator._atoms_to_batch(atoms).to_dict(), Frame(numbers, moved)
        calls: list[Callable[[], Any]] = [
            lambda batch=batch: own(batch),  # type: ignore[misc]
            atoms.get_forces,
            lambda frame=frame: potential.predict([frame]),  # type: ignore[misc]
        ]
        times.append([_seconds(call) for call in calls])
    one, two, three = 1e3 * np.median(times[2:], axis=0)
    return float(one), float(two), float(three)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()  # of this process alone: others on the machine do not count
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.model" for name in MODELS}
        for name, path in paths.items():
            write(path, **MODELS[name])
        print("model        atoms  model's own call  its calculator  mace:…  over own call   (median ms of processor time, one thread)")
        for name, path in paths.items():
            for size, system in SYSTEMS.items():
                own, calculator, back_end = measure(path, *system, args.rounds)
                print(
                    f"{name:12s} {size:5d} {own:17.1f} {calculator:15.1f} {back_end:7.1f} {100 * (back_end / own - 1):13.0f} %", flush=True
                )


if __name__ == "__main__":
    main()
