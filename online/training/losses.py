"""What a training descends: errors of energies, forces and virials, and the two losses of consistent work. Torch, no files, no state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from tumbaga.online.ports import Trial, Tuning
from tumbaga.online.records import Array
from tumbaga.online.training.dataset import Sample, Targets
from tumbaga.online.training.settings import Settings


@dataclass
class Sums:
    """Squared errors added up over batches.

    Attributes:
        loss: of the batches, times their frames.
        forces: of force components, (eV/Å)².
        components: their number.
        energies: of energies per atom, eV².
        frames: their number.
    """

    loss: float = 0.0
    forces: float = 0.0
    components: int = 0
    energies: float = 0.0
    frames: int = 0

    def add(self, loss: float, said: Trial, wanted: Targets) -> None:
        """Take in a batch."""
        count = len(wanted.energies)
        self.loss += loss * count
        self.frames += count
        self.energies += float((((said.energies - wanted.energies) / wanted.atoms).detach().double() ** 2).sum())
        if said.forces is not None:
            self.forces += float(((said.forces - wanted.forces).detach().double() ** 2).sum())
            self.components += wanted.forces.numel()

    def means(self) -> dict[str, float]:
        """Return "loss", "force_rmse" (components, eV/Å) and "energy_rmse" (eV per atom)."""
        return {
            "loss": self.loss / self.frames if self.frames else math.nan,
            "force_rmse": math.sqrt(self.forces / self.components) if self.components else math.nan,
            "energy_rmse": math.sqrt(self.energies / self.frames) if self.frames else math.nan,
        }


def supervised(said: Trial, wanted: Targets, settings: Settings) -> Tensor:
    """Return the loss of a batch against its labels; see `Settings` for what is in it."""
    per_atom = (said.energies - wanted.energies) / wanted.atoms
    loss = settings.energy_weight * (wanted.weights * _huber(per_atom, settings.huber)).mean()
    if said.forces is not None:
        terms = wanted.weights[wanted.frame_of, None] * _huber(said.forces - wanted.forces, settings.huber)
        loss = loss + settings.force_weight * terms.mean()
    if said.virials is not None:
        errors = _huber((said.virials - wanted.virials) / wanted.atoms[:, None, None], settings.huber).mean(dim=(1, 2))
        loss = loss + settings.virial_weight * (wanted.weights * wanted.with_virial * errors).sum() / wanted.with_virial.sum().clamp(min=1)
    return loss


def consistency(tuning: Tuning, batch: Sequence[Sample], said: Trial, settings: Settings, seed: Sequence[int]) -> Tensor:
    """Return the weighted losses of consistent work of a batch; they need no labels.

    Args:
        tuning: the potential.
        batch: its frames.
        said: energies and forces of these frames, differentiable.
        settings: their weights and the size of displacements.
        seed: of the displacements.

    Source:
        M. Takamoto, V. Zaverkin, M. Niepert, Physics-informed weakly supervised learning for interatomic potentials, ICML 2025,
        arXiv 2408.05215; summed per frame, with displacements of both signs.
    """
    rng = np.random.default_rng(list(seed))
    first = [_displacement(rng, one, settings.work_step) for one in batch]
    moved = tuning.evaluate([_moved(tuning, one, by) for one, by in zip(batch, first, strict=True)], forces=False)
    loss = torch.zeros_like(said.energies[0])
    if settings.pitc:
        loss = loss + settings.pitc * pitc(moved.energies, said.energies, work(said.forces, first))
    if settings.pisc:
        second = [_displacement(rng, one, settings.work_step) for one in batch]
        there = tuning.evaluate([_moved(tuning, one, by) for one, by in zip(batch, second, strict=True)])
        third = [one - other for one, other in zip(first, second, strict=True)]
        loss = loss + settings.pisc * pitc(moved.energies, there.energies, work(there.forces, third))
    return loss


def pitc(energies_there: Tensor, energies_here: Tensor, work_done: Tensor) -> Tensor:
    """Mean over frames of (E(R + d) - [E(R) - F(R) · d])², eV²; with R + d2 for R and d1 - d2 for d it is the PISC of the source.

    Args:
        energies_there: E(R + d), shape (n_frames,), eV.
        energies_here: E(R), shape (n_frames,), eV.
        work_done: F(R) · d of each frame, shape (n_frames,), eV.
    """
    return torch.mean((energies_there - (energies_here - work_done)) ** 2)


def work(forces: Any, displacements: Sequence[Array]) -> Tensor:
    """Return the sum of F · d over the atoms of each frame, shape (n_frames,), eV; displacements (n_atoms, 3), Å, are constants."""
    each: Tensor = (forces * torch.tensor(np.concatenate(displacements), dtype=forces.dtype, device=forces.device)).sum(dim=1)
    frame_of = np.repeat(np.arange(len(displacements)), [len(one) for one in displacements])
    return each.new_zeros(len(displacements)).index_add(0, torch.tensor(frame_of, device=forces.device), each)


def _displacement(rng: np.random.Generator, one: Sample, size: float) -> Array:
    return rng.uniform(-size, size, (len(one.frame), 3))


def _moved(tuning: Tuning, one: Sample, by: Array) -> Any:
    return tuning.prepare(replace(one.frame, positions=one.frame.positions + by))


def _huber(error: Tensor, delta: float) -> Tensor:
    """Squares up to delta, linear beyond; 0 is no limit."""
    return 2.0 * huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta) if delta else error * error
