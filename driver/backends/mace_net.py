"""A MACE model cut off before the last linear layers of its readouts, as a torch module; and those layers, as numbers.

    E_i = s (sum_l w_l · f_l,i + b_l + ZBL_i) + t + e[z_i]

with l over the readouts: f_l are the scalar features that a linear readout reads, or the hidden activations of a readout that is not linear;
s, t scale and shift; e the energies of isolated atoms. Knows no files and no frames; the package mace is imported by the caller.

Source:
    I. Batatia, D. P. Kovács, G. N. C. Simm, C. Ortner, G. Csányi, Adv. Neural Inf. Process. Syst. 35 (2022).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tumbaga.online.records import Array

# class of a readout -> the name of its last layer
_LAST: Final = {"LinearReadoutBlock": "linear", "NonLinearReadoutBlock": "linear_2", "NonLinearBiasReadoutBlock": "linear_2"}


class UnfitError(ValueError):
    """The model has no linear readout of scalars; the message says what it has."""


class Readout(NamedTuple):
    """The last linear layers of a model, all readouts beside one another.

    Attributes:
        slope: s w, shape (n_hidden,), float64, eV.
        constant: s b + t, eV, of every atom.
        scale: s, of the pair repulsion.
    """

    slope: Array
    constant: float
    scale: float


class Network(nn.Module):
    """From species and pairs to features, and to the energies of the pair repulsion.

    Args:
        model: a ScaleShiftMACE; it is cut up and kept.
        head: index of the level of theory that is to speak.
        keep: the hidden columns of each readout that this head reads.
    """

    def __init__(self, model: Any, head: int, keep: list[list[int]]) -> None:
        super().__init__()
        self._head, self._alone = head, len(model.readouts) == 1
        for readout in model.readouts:
            setattr(readout, _LAST[type(readout).__name__], nn.Identity())
        del model.atomic_energies_fn, model.scale_shift
        self.model = model
        for k, columns in enumerate(keep):
            self.register_buffer(f"keep_{k}", torch.tensor(columns, dtype=torch.int64), persistent=False)

    def forward(self, species: Tensor, pairs: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """Evaluate one or several frames at once.

        Args:
            species: one-hot, shape (n_atoms, n_types), in the dtype of the module.
            pairs: rows of `species`, shape (2, n_pairs), int64; each pair from both ends.
            vectors: from the first of a pair to the second, shape (n_pairs, 3), Å.

        Returns:
            Features, shape (n_atoms, n_hidden), and pair repulsion of each atom, unscaled, shape (n_atoms,), eV; None where it has none.
        """
        model = self.model
        lengths = torch.linalg.norm(vectors, dim=-1, keepdim=True)
        nodes, angles = model.node_embedding(species), model.spherical_harmonics(vectors)
        radial, cutoff = model.radial_embedding(lengths, species, pairs, model.atomic_numbers)
        layers = []
        for k, (interaction, product) in enumerate(zip(model.interactions, model.products, strict=True)):
            nodes, residual = interaction(
                node_attrs=species,
                node_feats=nodes,
                edge_attrs=angles,
                edge_feats=radial,
                edge_index=pairs,
                cutoff=cutoff,
                first_layer=k == 0,
            )
            nodes = product(node_feats=nodes, sc=residual, node_attrs=species)
            layers.append(nodes)
        heads = torch.full((len(species),), self._head, device=species.device)
        read = layers[-1:] if self._alone else layers
        hidden = [readout(layer, heads) for readout, layer in zip(model.readouts, read, strict=True)]
        features = torch.cat([one.index_select(1, self.get_buffer(f"keep_{k}")) for k, one in enumerate(hidden)], dim=1)
        if not hasattr(model, "pair_repulsion_fn"):
            return features, None
        return features, model.pair_repulsion_fn(lengths, species, pairs, model.atomic_numbers)


def cut(model: Any, head: int) -> tuple[Network, Readout]:
    """Cut a ScaleShiftMACE in float64 off before its last linear layers.

    Raises:
        UnfitError: a readout is of another kind.
    """
    keep, slopes, constant = [], [], 0.0
    for readout in model.readouts:
        kind = type(readout).__name__
        if kind not in _LAST:
            raise UnfitError(f"has a {kind}, which is no linear readout of scalars")
        layer = getattr(readout, _LAST[kind])
        columns = _columns(readout, layer, head, len(model.heads))
        slope, bias = _asked(layer, head)
        keep.append(columns)
        slopes.append(slope[columns])
        constant += bias
    scale, shift = (float(np.atleast_1d(_numpy(one))[head]) for one in (model.scale_shift.scale, model.scale_shift.shift))
    return Network(model, head, keep), Readout(scale * np.concatenate(slopes), scale * constant + shift, scale)


def _columns(readout: Any, layer: Any, head: int, n_heads: int) -> list[int]:
    """The columns that the last layer reads for this head: scalars, and of a hidden layer the head's own part (see mace's `mask_head`)."""
    irreps = layer.irreps_in
    scalars = [
        k for (_, kind), part in zip(irreps, irreps.slices(), strict=True) if str(kind) == "0e" for k in range(part.start, part.stop)
    ]
    if hasattr(readout, "linear_1") and n_heads > 1:
        width = len(scalars) // n_heads
        return scalars[head * width : (head + 1) * width]
    return scalars


def _asked(layer: Any, head: int) -> tuple[Array, float]:
    """Slope (n_inputs,) and bias of one output of a linear layer, asked, not read: the norm of its weights is its own affair."""
    size = layer.irreps_in.dim
    with torch.no_grad():
        said = _numpy(layer(torch.cat([torch.zeros(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)])))[:, head]
    return said[1:] - said[0], float(said[0])


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
