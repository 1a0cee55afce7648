"""The network of a CHGNet model up to its last linear layer, and the graph it works on, made of our pairs.

CHGNet passes messages along directed pairs, each with the features of its bond, which both directions share; bonds learn from the angles
between short pairs at one atom. The layers are those of the package chgnet. What is here is their order of work and the graph: the package's
own is made of crystals in Python, and knows no free clusters.

Source:
    B. Deng, P. Zhong, K. Jun, J. Riebesell, K. Han, C. J. Bartel, G. Ceder, Nat. Mach. Intell. 5, 1031 (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tumbaga.driver.backends.flat import Graph
from tumbaga.online.records import Ints


class Lines(NamedTuple):
    """Bonds and angles of a batch of pairs; a bond is a pair and its reverse, an angle an ordered couple of short pairs of one atom.

    Attributes:
        bond_of: bond of each pair, shape (n_pairs,).
        leads: a pair of each bond, shape (n_bonds,).
        centre: atom of each angle, shape (n_angles,).
        left, right: its pairs, shape (n_angles,).
        angled: whether the frame of a bond has an angle at all, shape (n_bonds,).
    """

    bond_of: Ints
    leads: Ints
    centre: Ints
    left: Ints
    right: Ints
    angled: npt.NDArray[np.bool_]


def reverses(graph: Graph) -> Ints:
    """Return the pair that leads back, for each pair, shape (n_pairs,).

    Pairs ascend in (first, second, image), so in the order of (second, first, image from large to small) each stands in its reverse's place.
    """
    n_pairs = len(graph.first)
    keys = graph.second * len(graph.species) + graph.first
    return n_pairs - 1 - np.argsort(keys[::-1], kind="stable")


def lines(graph: Graph, reach: float) -> Lines:
    """Find the bonds, and the angles between pairs shorter than the reach, Å."""
    back = reverses(graph)
    leads = np.flatnonzero(np.arange(len(back)) < back)
    bond_of = np.empty(len(back), dtype=np.int64)
    bond_of[leads] = bond_of[back[leads]] = np.arange(len(leads))
    left, right = _couples(graph, reach)
    angled = np.zeros(len(graph.atoms) - 1, dtype=bool)
    angled[graph.frame_of[graph.first[left]]] = True
    return Lines(bond_of, leads, graph.first[left], left, right, angled[graph.frame_of[graph.first[leads]]])


def _couples(graph: Graph, reach: float) -> tuple[Ints, Ints]:
    """All ordered couples of different short pairs with the same first atom."""
    short = np.flatnonzero(np.einsum("pc,pc->p", graph.vectors, graph.vectors) < reach * reach)
    atoms = graph.first[short]
    counts = np.bincount(atoms, minlength=len(graph.species))
    starts = np.cumsum(counts) - counts
    many = counts[atoms]
    left = np.repeat(np.arange(len(short)), many)
    right = np.arange(len(left)) - np.repeat(np.cumsum(many) - many, many) + np.repeat(starts[atoms], many)
    apart = left != right
    return short[left[apart]], short[right[apart]]


class Indices(NamedTuple):
    """`Lines` and what else the network needs beside the vectors, as tensors."""

    kinds: Tensor
    pairs: Tensor
    bond_of: Tensor
    leads: Tensor
    angles: Tensor
    left: Tensor
    right: Tensor
    angled: Tensor | None


def joined(several: Sequence[Indices]) -> Indices:
    """The graphs of several frames as one batch; atoms, pairs and bonds are counted on."""
    atoms, pairs, bonds = (np.cumsum([0, *(len(getattr(one, part)) for one in several)]).tolist() for part in ("kinds", "bond_of", "leads"))

    def chained(part: str, starts: Sequence[int]) -> Tensor:
        return torch.cat([getattr(one, part) + start for one, start in zip(several, starts, strict=False)])

    angles = [one.angles + one.angles.new_tensor([atom, bond, bond]) for one, atom, bond in zip(several, atoms, bonds, strict=False)]
    angled = [torch.ones_like(one.leads[:, None], dtype=torch.bool) if one.angled is None else one.angled for one in several]
    return Indices(
        kinds=torch.cat([one.kinds for one in several]),
        pairs=chained("pairs", atoms),
        bond_of=chained("bond_of", bonds),
        leads=chained("leads", pairs),
        angles=torch.cat(angles),
        left=chained("left", pairs),
        right=chained("right", pairs),
        angled=None if all(one.angled is None for one in several) else torch.cat(angled),
    )


class Network(nn.Module):
    """From pairs to features of atoms.

    Args:
        model: of the package, a CHGNet whose energies are sums over atoms; its layers are taken over.

    Attributes:
        cutoff: up to which length there are pairs, Å.
        reach: up to which length pairs make angles, Å.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.cutoff, self.reach = (float(model.model_args[f"{graph}_graph_cutoff"]) for graph in ("atom", "bond"))
        # all but its magnetic moments, under its own names
        self.atom_embedding: Any = model.atom_embedding
        self.bond_basis_expansion: Any = model.bond_basis_expansion
        self.bond_embedding: Any = model.bond_embedding
        self.bond_weights_ag: Any = model.bond_weights_ag
        self.bond_weights_bg: Any = model.bond_weights_bg
        self.angle_basis_expansion: Any = model.angle_basis_expansion
        self.angle_embedding: Any = model.angle_embedding
        self.atom_conv_layers: Any = model.atom_conv_layers
        self.bond_conv_layers: Any = model.bond_conv_layers
        self.angle_layers: Any = model.angle_layers
        self.readout_norm: Any = model.readout_norm
        self.mlp: Any = model.mlp
        layers = getattr(self.mlp, "layers", self.mlp)
        layers[-1] = nn.Identity()

    def indices(self, graph: Graph, numbers: Ints, device: torch.device) -> Indices:
        """Return the graph as the network takes it.

        Args:
            graph: its species are not looked at.
            numbers: atomic number of each atom, shape (n_atoms,).
            device: where the tensors go.
        """
        found = lines(graph, self.reach)

        def there(array: npt.NDArray[Any]) -> Tensor:
            return torch.tensor(array, device=device)

        return Indices(
            kinds=there(numbers - 1),
            pairs=there(np.stack([graph.first, graph.second], axis=1)),
            bond_of=there(found.bond_of),
            leads=there(found.leads),
            angles=there(np.stack([found.centre, found.bond_of[found.left], found.bond_of[found.right]], axis=1)),
            left=there(found.left),
            right=there(found.right),
            angled=None if found.angled.all() else there(found.angled[:, None]),
        )

    def forward(self, vectors: Tensor, at: Indices) -> Tensor:
        """Return the features of all atoms, shape (n_atoms, n_hidden).

        Args:
            vectors: of all pairs, shape (n_pairs, 3), Å; the only thing that energies depend on continuously.
            at: of the same pairs.
        """
        lengths = torch.linalg.vector_norm(vectors, dim=1)
        bonds_far, bonds_near, angles = self._bases(vectors, lengths, at)
        atoms, bonds = self.atom_embedding(at.kinds), self.bond_embedding(bonds_far)
        far, near = self.bond_weights_ag(bonds_far), self.bond_weights_bg(bonds_near)
        *early, last = self.atom_conv_layers
        for atom_layer, bond_layer, angle_layer in zip(early, self.bond_conv_layers, self.angle_layers, strict=False):
            atoms = atom_layer(atoms, bonds, far, at.pairs, at.bond_of)
            if angles is None or bond_layer is None:
                continue
            turned = bond_layer(atoms, bonds, near, angles, at.angles)
            # the package does not come here with a frame that has no angle, and with a bias it makes a difference
            bonds = turned if at.angled is None else torch.where(at.angled, turned, bonds)
            if angle_layer is not None:
                angles = angle_layer(atoms, bonds, angles, at.angles)
        atoms = last(atoms, bonds, far, at.pairs, at.bond_of)
        if self.readout_norm is not None:
            atoms = self.readout_norm(atoms)
        features: Tensor = self.mlp(atoms)
        return features

    def _bases(self, vectors: Tensor, lengths: Tensor, at: Indices) -> tuple[Tensor, Tensor, Tensor | None]:
        """Radial functions of all bonds for atoms and for angles, and features of the angles, None where there are none."""
        short = lengths[at.leads]
        expansion = self.bond_basis_expansion
        radial, close = expansion.rbf_expansion_ag(short), expansion.rbf_expansion_bg(short)
        if not len(at.left):
            return radial, close, None
        units = vectors / lengths[:, None]
        return radial, close, self.angle_embedding(self.angle_basis_expansion(units[at.left], units[at.right]))
