"""Frames and labels as the trainer takes them: reference energies taken off, prepared once, put together by atoms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tumbaga.online.ports import Tuning
from tumbaga.online.records import Array, Frame, Ints, LabelledFrame


@dataclass(frozen=True, eq=False)
class Sample:
    """One labelled frame, ready.

    Attributes:
        frame: the frame.
        prepared: what the potential made of it.
        energy: of the label less the reference energies of its data set, eV: small enough for float32.
        forces: shape (n_atoms, 3), eV/Å.
        virial: shape (3, 3), eV; zeros where the label has none.
        has_virial: whether it has one.
        weight: in the loss.
    """

    frame: Frame
    prepared: Any
    energy: float
    forces: Array
    virial: Array
    has_virial: bool
    weight: float = 1.0


class Targets(NamedTuple):
    """The labels of a batch, as tensors.

    Attributes:
        energies: shape (n_frames,). forces: shape (n_atoms, 3). virials: shape (n_frames, 3, 3).
        with_virial: 1 or 0, shape (n_frames,).
        atoms: of each frame, shape (n_frames,), floating.
        weights: of each frame, shape (n_frames,).
        frame_of: frame of each atom, shape (n_atoms,), int64.
    """

    energies: Tensor
    forces: Tensor
    virials: Tensor
    with_virial: Tensor
    atoms: Tensor
    weights: Tensor
    frame_of: Tensor


def samples(tuning: Tuning, elements: Sequence[int], data: Iterable[LabelledFrame], reference: Array, weight: float = 1.0) -> list[Sample]:
    """Prepare labelled frames.

    Args:
        tuning: prepares them.
        elements: atomic numbers in the order of `reference`.
        data: frames of known elements.
        reference: energies that are taken off, shape (n_elements,), float64, eV.
        weight: of each in the loss.
    """
    found = []
    for one in data:
        energy = one.label.energy - float(composition(one.frame, elements) @ reference)
        virial = np.zeros((3, 3)) if one.label.virial is None else one.label.virial
        known = one.label.virial is not None
        found.append(Sample(one.frame, tuning.prepare(one.frame), energy, one.label.forces, virial, known, weight))
    return found


def composition(frame: Frame, elements: Sequence[int]) -> Array:
    """Return how many atoms of each element a frame has, shape (n_elements,), float64."""
    return np.array([(frame.numbers == z).sum() for z in elements], dtype=np.float64)


def targets(batch: Sequence[Sample], like: Tensor) -> Targets:
    """Return the labels of a batch in the dtype and on the device of a tensor."""
    sizes = np.array([len(one.frame) for one in batch])

    def floats(value: Any) -> Tensor:
        return torch.tensor(np.asarray(value), dtype=like.dtype, device=like.device)

    return Targets(
        floats([one.energy for one in batch]),
        floats(np.concatenate([one.forces for one in batch])),
        floats(np.stack([one.virial for one in batch])),
        floats([float(one.has_virial) for one in batch]),
        floats(sizes),
        floats([one.weight for one in batch]),
        torch.tensor(np.repeat(np.arange(len(batch)), sizes), device=like.device),
    )


def in_batches(given: Sequence[Sample], atoms: int) -> list[list[Sample]]:
    """Cut a sequence of frames into batches of so many atoms at most; a frame that has more is a batch by itself."""
    found: list[list[Sample]] = []
    room = 0
    for one in given:
        if len(one.frame) > room or not found:
            found.append([])
            room = atoms
        found[-1].append(one)
        room -= len(one.frame)
    return found


def epoch_order(new: Sequence[Sample], replay: Sequence[Sample], ratio: float, seed: int, epoch: int) -> list[Sample]:
    """Return the frames of one epoch: all new ones and a draw of the replay, mixed; known from the seed and the epoch alone.

    Args:
        new: frames to learn.
        replay: frames not to forget.
        ratio: replay frames for each new one; at most all of them, without repetition.
        seed, epoch: of the draw.
    """
    rng = np.random.default_rng([seed, epoch])
    count = min(len(replay), round(ratio * len(new)))
    drawn: Ints = rng.choice(len(replay), count, replace=False) if count else np.zeros(0, dtype=np.int64)
    mixed = [*new, *(replay[k] for k in drawn)]
    return [mixed[k] for k in rng.permutation(len(mixed))]


def held_out(data: Sequence[LabelledFrame], fraction: float, seed: int) -> tuple[list[LabelledFrame], list[LabelledFrame]]:
    """Split into frames to learn from and a random part to validate on, each in the order given; fewer than ten frames are not split."""
    count = max(1, round(fraction * len(data))) if fraction > 0 and len(data) >= 10 else 0
    kept = set(np.random.default_rng([seed, len(data)]).permutation(len(data))[:count].tolist())
    return [one for k, one in enumerate(data) if k not in kept], [one for k, one in enumerate(data) if k in kept]
