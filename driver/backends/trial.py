"""What a network of pairs says under training: energies, forces and virials of a batch, differentiable in its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tumbaga.online.ports import Trial


class Pairs(Protocol):
    """One frame: species of its atoms, and its pairs with their vectors, as in ``flat.Graph``."""

    @property
    def species(self) -> Tensor:
        """Shape (n_atoms,)."""

    @property
    def first(self) -> Tensor:
        """Shape (n_pairs,)."""

    @property
    def second(self) -> Tensor:
        """Shape (n_pairs,)."""

    @property
    def vectors(self) -> Tensor:
        """Shape (n_pairs, 3), Å."""


class Batch(NamedTuple):
    """Frames as one batch.

    Attributes:
        first, second: atoms of each pair, counted through all frames, shape (n_pairs,).
        vectors: shape (n_pairs, 3), Å.
        n_atoms, n_pairs: of each frame.
    """

    first: Tensor
    second: Tensor
    vectors: Tensor
    n_atoms: list[int]
    n_pairs: list[int]


def joined(frames: Sequence[Pairs]) -> tuple[Tensor, Batch]:
    """Return the species of all atoms, and the batch."""
    n_atoms = [len(one.species) for one in frames]
    starts = np.cumsum([0, *n_atoms[:-1]]).tolist()
    batch = Batch(
        first=torch.cat([one.first + start for one, start in zip(frames, starts, strict=True)]),
        second=torch.cat([one.second + start for one, start in zip(frames, starts, strict=True)]),
        vectors=torch.cat([one.vectors for one in frames]),
        n_atoms=n_atoms,
        n_pairs=[len(one.first) for one in frames],
    )
    return torch.cat([one.species for one in frames]), batch


def tried(energies_of: Callable[[Tensor], Tensor], batch: Batch, forces: bool, virials: bool, create_graph: bool) -> Trial:
    """Evaluate a batch; see ``Tuning.evaluate``.

    Args:
        energies_of: from the vectors of the batch to the energy of each atom, shape (n_atoms,), eV.
        batch: its vectors are leaves, and are made to ask for a gradient.
        forces, virials, create_graph: see ``Tuning.evaluate``.
    """
    sloped = forces or virials
    with torch.set_grad_enabled(sloped or create_graph):
        vectors = batch.vectors.requires_grad_(sloped)
        atoms = energies_of(vectors)
        energies = _summed(atoms, batch.n_atoms)
        if not sloped:
            return Trial(energies)
        (gradients,) = torch.autograd.grad(atoms.sum(), vectors, create_graph=create_graph)
    energies = energies if create_graph else energies.detach()
    pulls = None
    if forces:
        pulls = gradients.new_zeros((len(atoms), 3)).index_add(0, batch.first, gradients).index_add(0, batch.second, gradients, alpha=-1)
    if not virials:
        return Trial(energies, pulls)
    # the vectors are where the gradients were taken; only these depend on the parameters
    strain = _summed(-vectors.detach()[:, :, None] * gradients[:, None, :], batch.n_pairs)
    return Trial(energies, pulls, 0.5 * (strain + strain.transpose(1, 2)))


def grouped(module: nn.Module, part: Callable[[str], str]) -> dict[str, tuple[str, ...]]:
    """Return the names of all parameters by the part that each is of; see ``Tuning.groups``."""
    found: dict[str, tuple[str, ...]] = {}
    for name, _ in module.named_parameters():
        found[part(name)] = (*found.get(part(name), ()), name)
    return found


def _summed(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Sums over the rows of each frame, shape (n_frames, …)."""
    frame_of = torch.tensor(np.repeat(np.arange(len(sizes)), sizes), device=values.device)
    return values.new_zeros((len(sizes), *values.shape[1:])).index_add(0, frame_of, values)
