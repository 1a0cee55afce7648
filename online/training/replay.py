"""Frames that keep a potential from forgetting: labelled by the potential as it was, on old frames or on generated ones.

Replay of a model's own labels works where its data are not at hand, and keeps robustness and short-range repulsion
(arXiv 2606.12704: only replay, real or pseudo-labelled, does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from ase.data import covalent_radii

from tumbaga.online.ports import Potential
from tumbaga.online.records import Frame, Label, LabelledFrame

STRAIN: Final = 0.03  # a frame is scaled by 1 ± as much
RATTLE: Final = 0.1  # Å, standard deviation of a coordinate
REACH: Final = (0.6, 1.6)  # of the sum of covalent radii: distances of generated pairs
_EVERY: Final = 5  # one generated frame in so many is a pair
_ATOMS: Final = 512  # in one batch


def generated(frames: Sequence[Frame], count: int, seed: int) -> list[Frame]:
    """Return distorted copies of frames: scaled and rattled; one in five is a pair of two of their elements, close or apart.

    Args:
        frames: to start from.
        count: how many to make.
        seed: of the choice and the distortions.
    """
    rng = np.random.default_rng([seed, count])
    elements = np.unique(np.concatenate([frame.numbers for frame in frames]))
    found = []
    for k in range(count):
        if k % _EVERY == _EVERY - 1:
            pair = rng.choice(elements, 2)
            distance = rng.uniform(*REACH) * covalent_radii[pair].sum()
            found.append(Frame(pair, np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])))
            continue
        frame, scale = frames[int(rng.integers(len(frames)))], 1.0 + rng.uniform(-STRAIN, STRAIN)
        moved = frame.positions * scale + RATTLE * rng.standard_normal(frame.positions.shape)
        found.append(replace(frame, positions=moved, cell=frame.cell * scale))
    return found


def pseudo_labelled(potential: Potential, frames: Sequence[Frame]) -> list[LabelledFrame]:
    """Label frames by a potential itself; frames of which it says no finite number are left out."""
    found: list[LabelledFrame] = []
    batch: list[Frame] = []
    for k, frame in enumerate(frames):
        batch.append(frame)
        if sum(len(one) for one in batch) >= _ATOMS or k == len(frames) - 1:
            for one, said in zip(batch, potential.predict(batch), strict=True):
                if said.finite:
                    label = Label(
                        said.energy, said.forces, f"pseudo:{potential.spec.name}", 0.0, virial=said.virial if one.periodic else None
                    )
                    found.append(LabelledFrame(one, label, f"replay#{len(found)}"))
            batch = []
    return found
