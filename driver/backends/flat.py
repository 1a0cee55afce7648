"""What the networks of pairs share: frames as one flat batch, forces from the slopes of pairs, a device by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols

from tumbaga.driver.backends.painn_lists import Lists
from tumbaga.driver.errors import PotentialError
from tumbaga.online.records import Array, Frame, Ints

DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}


class UnknownElementError(PotentialError):
    """A frame holds an element that the potential was never trained on."""

    def __init__(self, name: str, number: int, known: tuple[int, ...]) -> None:
        super().__init__(name, f"it does not know {chemical_symbols[number]}; it knows {', '.join(chemical_symbols[z] for z in known)}")
        self.args = (name, number, known)  # facts, so that the error stays picklable


class Graph(NamedTuple):
    """Frames as one flat batch; pairs of a frame stand together, frames in order.

    Attributes:
        species: of all atoms, shape (n_atoms,).
        frame_of: frame of each atom, shape (n_atoms,).
        first, second: rows of `species`, shape (n_pairs,).
        vectors: shape (n_pairs, 3), float64, Å.
        atoms: where the atoms of each frame start, and their end; shape (n_frames + 1,).
        edges: the same for pairs.
    """

    species: Ints
    frame_of: Ints
    first: Ints
    second: Ints
    vectors: Array
    atoms: Ints
    edges: Ints


def species_table(elements: Sequence[int]) -> Ints:
    """Return the index of each atomic number in `elements`, -1 where it is not among them; shape (119,), int64."""
    table = np.full(119, -1, dtype=np.int64)
    table[list(elements)] = np.arange(len(elements))
    return table


def flattened(name: str, elements: tuple[int, ...], table: Ints, lists: Lists, frames: Sequence[Frame]) -> Graph:
    """Return frames of any sizes as one batch.

    Args:
        name: of the potential, for the error.
        elements: atomic numbers it knows; a species is an index into them.
        table: their `species_table`.
        lists: finds the pairs.
        frames: at least one.

    Raises:
        UnknownElementError: a frame holds an element outside `elements`.
    """
    found = [lists.pairs(frame) for frame in frames]
    atoms = np.cumsum([0] + [len(frame) for frame in frames])
    numbers = np.concatenate([frame.numbers for frame in frames])
    species = table[numbers]
    if species.min() < 0:
        raise UnknownElementError(name, int(numbers[species < 0][0]), elements)
    return Graph(
        species=species,
        frame_of=np.repeat(np.arange(len(frames)), np.diff(atoms)),
        first=np.concatenate([p.first + start for p, start in zip(found, atoms[:-1], strict=True)]),
        second=np.concatenate([p.second + start for p, start in zip(found, atoms[:-1], strict=True)]),
        vectors=np.concatenate([p.vectors for p in found]),
        atoms=atoms,
        edges=np.cumsum([0] + [len(p.first) for p in found]),
    )


def scattered(graph: Graph, gradients: Array) -> Array:
    """Return the forces of all atoms, shape (n_atoms, 3), from dE/dvectors, shape (n_pairs, 3).

    What `first` gains `second` loses, so the net force is zero to rounding.
    """

    def summed(atoms: Ints) -> Array:
        places = (3 * atoms[:, None] + np.arange(3)).ravel()
        return np.asarray(np.bincount(places, gradients.ravel(), 3 * len(graph.species)), dtype=np.float64).reshape(-1, 3)

    return summed(graph.first) - summed(graph.second)


def chosen_device(name: str, device: str) -> torch.device:
    """Return the device of that name; "auto" is a GPU where there is one.

    Raises:
        PotentialError: this machine has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        told = str(error).splitlines()[0]
        raise PotentialError(
            name, f"cannot run on device {device!r} ({told:.120}); choose auto, cpu, or cuda on a machine that has it"
        ) from error
    return found
