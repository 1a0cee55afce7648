"""Errors of a potential on the held-out sets of the data set: forces, and energies per atom.

python examples/cuau_water_model/evaluate.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import dataset
import numpy as np
import numpy.typing as npt
import torch

from tumbaga.driver.backends.painn import PaiNN, load

BATCH = 16


def errors(potential: PaiNN, data: dataset.DataSet, rows: npt.NDArray[np.int64]) -> dict[str, float]:
    """Force RMSE and MAE (meV/Å, over components), rms force of the labels, energy RMSE and MAE (meV/atom)."""
    forces, labels, energies = [], [], []
    for chunk in np.array_split(rows, max(1, len(rows) // BATCH)):
        for k, said in zip(chunk, potential.predict([data.frames[k] for k in chunk]), strict=True):
            forces.append((said.forces - data.forces[k]).ravel())
            labels.append(data.forces[k].ravel())
            energies.append((said.energy - data.energies[k]) / len(data.frames[k]))
    force, label, energy = 1e3 * np.concatenate(forces), 1e3 * np.concatenate(labels), 1e3 * np.array(energies)
    return {
        "frames": len(rows),
        "force_rmse": float(np.sqrt((force**2).mean())),
        "force_mae": float(np.abs(force).mean()),
        "label_rms": float(np.sqrt((label**2).mean())),
        "energy_rmse": float(np.sqrt((energy**2).mean())),
        "energy_mae": float(np.abs(energy).mean()),
    }


def groups(data: dataset.DataSet) -> dict[str, npt.NDArray[np.int64]]:
    """The held-out sets, MD and distorted frames apart, and the running cluster of the main job by itself."""
    sets = dataset.splits(data)
    visited = np.char.startswith(data.kinds, "md") | (data.kinds == "model")
    home = np.array([name.startswith("CuAu(H2O)2/") for name in data.trajectories])
    block, random, unseen = sets["block"], sets["random"], sets["unseen"]
    return {
        "random, MD frames": random[visited[random]],
        "random, distorted frames": random[~visited[random]],
        "last tenth of every trajectory": block,
        "... of which CuAu(H2O)2 at 300 K": block[home[block] & (data.kinds[block] == "md300")],
        "... of which MD under the first round": block[data.kinds[block] == "model"],
        f"unseen composition {dataset.UNSEEN}, 300 K": unseen[data.kinds[unseen] == "md300"],
        f"unseen composition {dataset.UNSEEN}, 600 K": unseen[data.kinds[unseen] == "md600"],
    }


def by_composition(data: dataset.DataSet) -> dict[str, npt.NDArray[np.int64]]:
    """The last tenths of the trajectories, each composition by itself."""
    block = dataset.splits(data)["block"]
    formulas = np.array([name.partition("/")[0] for name in data.trajectories[block]])
    return {str(formula): block[formulas == formula] for formula in np.unique(formulas)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="painn:cuau-water")
    parser.add_argument("--data", type=Path, default=dataset.DATA)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compositions", action="store_true", help="the last tenths of the trajectories, by composition")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, potential = dataset.read(args.data), load(args.model, device="cpu", dtype=args.dtype)
    sets = by_composition(data) if args.compositions else groups(data)
    found = {name: errors(potential, data, rows) for name, rows in sets.items() if len(rows)}
    print(f"{'set':45s} frames  force RMSE / MAE (label rms), meV/Å   energy RMSE / MAE, meV/atom")
    for name, one in found.items():
        force = f"{one['force_rmse']:8.0f} / {one['force_mae']:3.0f} ({one['label_rms']:5.0f})"
        print(f"{name:45s} {one['frames']:6.0f} {force:>32s} {one['energy_rmse']:15.1f} / {one['energy_mae']:.1f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
