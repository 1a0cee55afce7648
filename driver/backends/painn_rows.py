"""How the features of all atoms change with all positions: the network of ``painn_net`` carried along with its derivatives, by hand.

A last-layer update and its force uncertainty need d(features)/d(positions), one column for each of n_elements * n_hidden readout weights.
Backward passes cost one a column; forward derivatives cost one a coordinate and share most of their arithmetic, because a pair vector
changes with two atoms only. On one core it took 11, 67 and 310 ms at 8, 20 and 40 atoms, where batched backward passes took 250, 950 and
8,500 ms; torch.func was in between, but cost seconds at its first call, which a force call would feel.

Layout of every derivative: (moved atom, atom, direction of the move, ...). Silu and roots are the only nonlinear steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from tumbaga.driver.backends.painn_net import SOFT, Network


class _Edges(NamedTuple):
    """Pairs and what depends on one pair vector alone: unit vector, 1/r, all filters and their slopes d/dr."""

    first: Tensor
    second: Tensor
    unit: Tensor  # (n_pairs, 3)
    inverse: Tensor  # (n_pairs, 1)
    filters: Tensor  # (n_pairs, all widths)
    slopes: Tensor


class _State(NamedTuple):
    """Scalars (n, c), vectors (n, 3, c), and their derivatives (n, n, 3, c), (n, n, 3, 3, c)."""

    scalars: Tensor
    vector: Tensor
    d_scalars: Tensor
    d_vector: Tensor


@torch.no_grad()
def feature_jacobian(network: Network, vectors: Tensor, first: Tensor, second: Tensor, species: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of one frame and their derivatives with respect to the positions.

    Args:
        network: its weights give the dtype.
        vectors, first, second, species: as in ``Network.forward``.

    Returns:
        Features, shape (n_atoms, n_hidden), and d features[a] / d position[i], shape (n_atoms (i), n_atoms (a), 3, n_hidden), per Å.
    """
    edges, width = _edges(network, vectors, first, second), network.hyper.channels
    state = _first_message(network, edges, species)
    for layer in range(network.hyper.layers):
        if layer:
            start = (3 * layer - 1) * width
            state = _message(network, layer, edges, slice(start, start + 3 * width), state)
        state = _update(network, layer, state)
    return _nonlinear(network.hidden, state.scalars, state.d_scalars)


def _edges(network: Network, vectors: Tensor, first: Tensor, second: Tensor) -> _Edges:
    square = (vectors * vectors).sum(dim=1, keepdim=True)
    inverse, reach = square.rsqrt(), network.hyper.cutoff**-2
    distance, left = square * inverse, 1.0 - square * reach
    envelope = left**3 * inverse
    envelope_slope = -6.0 * reach * left**2 - left**3 * inverse**2
    phase = distance * network.frequencies
    basis = phase.sin() * envelope
    slope = phase.cos() * network.frequencies * envelope + phase.sin() * envelope_slope
    return _Edges(first, second, vectors * inverse, inverse, linear(basis, network.filters), linear(slope, network.filters))


def _nonlinear(module: nn.Module, value: Tensor, derivative: Tensor) -> tuple[Tensor, Tensor]:
    """Value and derivative of silu(weight x + bias)."""
    before, gate = module(value), torch.sigmoid(module(value))
    slope = gate * (1.0 + before * (1.0 - gate))
    return silu(before), slope.unsqueeze(1) * linear(derivative, _weight(module))


def _weight(module: nn.Module) -> Tensor:
    found = module.weight
    assert isinstance(found, Tensor)  # nn.Linear; narrows torch's type, checks no input
    return found


def _direct(edges: _Edges, columns: slice, context: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Messages of all pairs and their derivatives with respect to their own pair vector: (e, c), (e, 3, c), (e, 3, c), (e, 3, 3, c)."""
    parts = 2 if carried is None else 3
    gates = (edges.filters[:, columns] * context).chunk(parts, dim=1)
    slopes = (edges.slopes[:, columns] * context).chunk(parts, dim=1)
    unit, along = edges.unit[:, :, None], edges.unit[:, :, None, None]
    across = (torch.eye(3, dtype=unit.dtype, device=unit.device) - edges.unit[:, :, None] * edges.unit[:, None]) * edges.inverse[:, :, None]
    vector = gates[1][:, None] * unit
    d_vector = along * (slopes[1][:, None] * unit)[:, None] + across[..., None] * gates[1][:, None, None]
    if carried is not None:
        vector = vector + gates[2][:, None] * carried
        d_vector = d_vector + along * (slopes[2][:, None] * carried)[:, None]
    return gates[0], vector, unit * slopes[0][:, None], d_vector


def _spread(edges: _Edges, derivative: Tensor, into: Tensor) -> Tensor:
    """Add derivatives with respect to pair vectors as derivatives of `first` with respect to the two atoms of each pair."""
    n = into.shape[0]
    flat = into.view(n * n, *into.shape[2:])
    flat.index_add_(0, edges.second * n + edges.first, derivative)
    flat.index_add_(0, edges.first * n + edges.first, derivative, alpha=-1)
    return into


def _first_message(network: Network, edges: _Edges, species: Tensor) -> _State:
    n, width = len(species), network.hyper.channels
    context = network.message_out[0](silu(network.message_in[0](network.embedding)))[species[edges.second]]
    scalar, vector, d_scalar, d_vector = _direct(edges, slice(0, 2 * width), context, None)
    empty = scalar.new_zeros
    return _State(
        network.embedding[species].index_add(0, edges.first, scalar),
        empty((n, 3, width)).index_add_(0, edges.first, vector),
        _spread(edges, d_scalar, empty((n, n, 3, width))),
        _spread(edges, d_vector, empty((n, n, 3, 3, width))),
    )


def _message(network: Network, layer: int, edges: _Edges, columns: slice, state: _State) -> _State:
    inner, d_inner = _nonlinear(network.message_in[layer], state.scalars, state.d_scalars)
    context = network.message_out[layer](inner)[edges.second]
    d_context = linear(d_inner, _weight(network.message_out[layer]))
    carried = state.vector[edges.second]
    scalar, vector, d_scalar, d_vector = _direct(edges, columns, context, carried)
    d_scalars = _spread(edges, d_scalar, state.d_scalars.clone())
    d_vectors = _spread(edges, d_vector, state.d_vector.clone())
    filters = edges.filters[:, None, columns]
    kept = (edges.filters[:, columns] * context).chunk(3, dim=1)[2][:, None, None]
    for moved in range(len(state.scalars)):  # one atom at a time: the tensors of all pairs then stay in the cache
        gates = (filters * d_context[moved].index_select(0, edges.second)).chunk(3, dim=2)
        d_scalars[moved].index_add_(0, edges.first, gates[0])
        flow = kept * state.d_vector[moved].index_select(0, edges.second)
        flow.addcmul_(gates[1].unsqueeze(2), edges.unit[:, None, :, None]).addcmul_(gates[2].unsqueeze(2), carried.unsqueeze(1))
        d_vectors[moved].index_add_(0, edges.first, flow)
    return _State(
        state.scalars.index_add(0, edges.first, scalar),
        state.vector.index_add(0, edges.first, vector),
        d_scalars,
        d_vectors,
    )


def _update(network: Network, layer: int, state: _State) -> _State:
    mix = _weight(network.mix[layer])
    left, right = linear(state.vector, mix).chunk(2, dim=2)
    d_left, d_right = linear(state.d_vector, mix).chunk(2, dim=4)
    norm = ((right * right).sum(dim=1) + SOFT).sqrt()
    d_norm = (d_right * right[:, None]).sum(dim=3) / norm[:, None]
    dot = (left * right).sum(dim=1)
    d_dot = (d_left * right[:, None] + d_right * left[:, None]).sum(dim=3)
    inner, d_inner = _nonlinear(network.update_in[layer], torch.cat((state.scalars, norm), 1), torch.cat((state.d_scalars, d_norm), 3))
    last = network.update_out[layer]
    count = _weight(last).shape[0] // network.hyper.channels
    gates, d_gates = last(inner).chunk(count, dim=1), linear(d_inner, _weight(last)).chunk(count, dim=3)
    scalars = state.scalars + gates[0] + gates[1] * dot
    d_scalars = state.d_scalars + d_gates[0] + d_gates[1] * dot[:, None] + gates[1][:, None] * d_dot
    if count == 2:
        return state._replace(scalars=scalars, d_scalars=d_scalars)
    vector = state.vector + gates[2][:, None] * left
    d_vector = state.d_vector + d_gates[2].unsqueeze(3) * left[:, None] + gates[2][:, None, None] * d_left
    return _State(scalars, vector, d_scalars, d_vector)
