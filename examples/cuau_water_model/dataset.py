"""Read the data set of painn:cuau-water and split it, always in the same way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tumbaga.online.records import Array, Frame

DATA = Path(__file__).parent / "data" / "cuau-water.npz"
UNSEEN = "Cu4Au2(H2O)3"  # the composition that is never trained on
_SPLIT_SEED = 20261121


@dataclass(frozen=True, eq=False)
class DataSet:
    """Labelled frames; energies are GFN2-xTB totals in eV, forces eV/Å, float64.

    Attributes:
        kinds: how each frame was made: md300, md600, rattle, scale, push, atom, dimer, model.
        trajectories: the job each frame comes from; distorted frames of a start form one of their own.
        steps: where in its trajectory a frame stands.
    """

    frames: list[Frame]
    energies: Array
    forces: list[Array]
    kinds: npt.NDArray[np.str_]
    trajectories: npt.NDArray[np.str_]
    steps: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.frames)


def read(path: Path = DATA) -> DataSet:
    """Read the ragged arrays: `counts` atoms a frame; numbers, positions and forces of all atoms in order."""
    with np.load(path) as arrays:
        held = {key: arrays[key] for key in arrays.files}
    ends = np.cumsum(held["counts"])[:-1]
    positions = np.split(held["positions"].astype(np.float64), ends)
    frames = [Frame(z, r) for z, r in zip(np.split(held["numbers"], ends), positions, strict=True)]
    forces = np.split(held["forces"].astype(np.float64), ends)
    return DataSet(frames, held["energy"], forces, held["kind"], held["trajectory"], held["step"])


def splits(data: DataSet) -> dict[str, npt.NDArray[np.int64]]:
    """Indices of four disjoint sets.

    "unseen": all frames of one composition; "block": the last tenth of every MD trajectory; "random": one in twenty of the rest;
    "train": what is left.
    """
    unseen = np.array([name.startswith(UNSEEN) for name in data.trajectories])
    is_md = np.char.startswith(data.kinds, "md") | (data.kinds == "model")
    block = np.zeros(len(data), dtype=bool)
    for name in np.unique(data.trajectories[is_md]):
        rows = np.flatnonzero(is_md & (data.trajectories == name))
        rows = rows[np.argsort(data.steps[rows], kind="stable")]
        block[rows[len(rows) - len(rows) // 10 :]] = True
    # a frame's lot depends on its own content, so it stays where it is when the data set grows
    lots = np.array([np.random.default_rng([_SPLIT_SEED, int(frame.key, 16) % 2**32]).random() for frame in data.frames])
    random = (lots < 0.05) & ~np.isin(data.kinds, ("dimer", "atom"))
    return {
        "train": np.flatnonzero(~unseen & ~block & ~random),
        "random": np.flatnonzero(~unseen & ~block & random),
        "block": np.flatnonzero(~unseen & block),
        "unseen": np.flatnonzero(unseen),
    }


def content_hash(path: Path = DATA) -> str:
    """SHA-256 of the data set file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
