"""Write the sets of the data set as extended XYZ: train, random, block, unseen.

python examples/cuau_water_model/export.py FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import dataset
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from tumbaga.driver.structures import to_atoms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    data = dataset.read()
    for name, rows in dataset.splits(data).items():
        frames = []
        for k in rows:
            atoms = to_atoms(data.frames[k])
            atoms.info.update(kind=str(data.kinds[k]), trajectory=str(data.trajectories[k]))
            atoms.calc = SinglePointCalculator(atoms, energy=data.energies[k], forces=data.forces[k])
            frames.append(atoms)
        write(folder / f"{name}.extxyz", frames)
        print(f"{folder / name}.extxyz: {len(frames)} frames")


if __name__ == "__main__":
    main()
