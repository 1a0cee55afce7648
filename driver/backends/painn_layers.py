"""The layers of ``painn_net`` in numpy, forwards and backwards, over the blocks of ``painn_blocks``; ``painn_step`` says why.

Layout of the state and its gradient: (4, atom, channel), the scalars first, then the three components of the vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from tumbaga.driver.backends.painn_blocks import Block, Found, Numbers
from tumbaga.driver.backends.painn_net import SOFT, Network
from tumbaga.online.records import Ints


def array(tensor: object) -> Numbers:
    """A copy of a parameter."""
    assert isinstance(tensor, Tensor)  # a parameter of a module; narrows torch's type, checks no input
    return tensor.detach().cpu().numpy().copy()


def silu(x: Numbers) -> tuple[Numbers, Numbers]:
    """x / (1 + exp(-x)) and its slope."""
    gate = 1.0 / (1.0 + np.exp(-x))
    value = x * gate
    return value, gate + value * (1.0 - gate)


class Dense:
    """Two linear layers with a silu between them; the second has several outputs of one width, (outputs, atoms, width)."""

    def __init__(self, inner: Any, outer: Any, width: int) -> None:
        self._inner, self._inner_bias = array(inner.weight).T.copy(), array(inner.bias)
        self._inner_back = self._inner.T.copy()
        self._outer_back = array(outer.weight).reshape(-1, width, len(self._inner_bias))
        self._outer, self._outer_bias = self._outer_back.swapaxes(1, 2).copy(), array(outer.bias).reshape(-1, 1, width)

    def forward(self, x: Numbers) -> tuple[Numbers, Numbers]:
        """Return the outputs, and what `back` needs."""
        value, slope = silu(x @ self._inner + self._inner_bias)
        return value @ self._outer + self._outer_bias, slope

    def back(self, gradients: Numbers, slope: Numbers) -> Numbers:
        """Return the gradient with respect to the input."""
        found: Numbers = ((gradients @ self._outer_back).sum(axis=0) * slope) @ self._inner_back
        return found


class First:
    """The first message: all vectors are still zero and all scalars a matter of species."""

    def __init__(self, network: Network) -> None:
        self._embedding, self._width = array(network.embedding), network.hyper.channels
        outputs, _ = Dense(network.message_in[0], network.message_out[0], self._width).forward(self._embedding)
        filters = array(network.filters)[: 2 * self._width].reshape(2, 1, self._width, -1).swapaxes(2, 3)
        # for scalars and directions: (species and radial function, channel)
        self._table = (outputs[:, :, None] * filters).reshape(2, -1, self._width)
        self._table_back = self._table.swapaxes(1, 2).copy()
        self._one_of = np.eye(len(self._embedding), dtype=self._embedding.dtype)

    def forward(self, blocks: list[Block], species: Ints) -> Numbers:
        """Return the state after the message."""
        kinds, radial = len(self._embedding), self._table.shape[1] // len(self._embedding)
        sums = np.empty((4, len(species), kinds, radial), self._table.dtype)
        for block in blocks:
            which = self._one_of[block.species].swapaxes(1, 2)
            sums[0, block.atoms] = which @ block.basis
            bent = which @ block.bent.reshape(*block.second.shape, -1)
            sums[1:, block.atoms] = bent.reshape(-1, kinds, 3, radial).transpose(2, 0, 1, 3)
        flat = sums.reshape(4, len(species), -1)
        state = np.empty((4, len(species), self._width), flat.dtype)
        state[0] = flat[0] @ self._table[0] + self._embedding[species]
        np.matmul(flat[1:], self._table[1], out=state[1:])
        return state

    def back(self, blocks: list[Block], gradient: Numbers, found: list[Found]) -> None:
        """Add to the gradients with respect to basis and bent."""
        atoms, kinds = gradient.shape[1], len(self._embedding)
        scalar = (gradient[0] @ self._table_back[0]).reshape(atoms, kinds, -1)
        vector = (gradient[1:] @ self._table_back[1]).reshape(3, atoms, kinds, -1).transpose(1, 2, 0, 3).copy()
        for block, into in zip(blocks, found, strict=True):
            own = np.arange(block.atoms.start, block.atoms.stop)[:, None]
            into.basis[:] += scalar[own, block.species]
            into.bent[:] += vector[own, block.species]


class Message:
    """The message of a later layer."""

    def __init__(self, network: Network, layer: int) -> None:
        self._width = width = network.hyper.channels
        start = (3 * layer - 1) * width
        scalar, self._direction, carried = array(network.filters)[start : start + 3 * width].reshape(3, width, -1).swapaxes(1, 2).copy()
        self._filters = np.concatenate((scalar, carried, carried, carried), axis=1)  # (n_radial, 4 channels)
        self._dense = Dense(network.message_in[layer], network.message_out[layer], width)

    def forward(self, blocks: list[Block], state: Numbers) -> tuple[Numbers, tuple[Numbers, ...]]:
        """Return the state, and what `back` needs."""
        context, slope = self._dense.forward(state[0])
        source, after, split = self._shown(context, state), state.copy(), 4 * self._width
        for block in blocks:
            seen = source.take(block.second, axis=0)
            flow = _filtered(block.basis.swapaxes(1, 2) @ seen[..., :split], self._filters)
            bent = block.bent.reshape(*block.second.shape, -1).swapaxes(1, 2) @ seen[..., split:]
            along = _filtered(bent.reshape(len(bent), 3, -1, self._width), self._direction)
            after[:, block.atoms] += flow.reshape(len(flow), 4, -1).swapaxes(0, 1)
            after[1:, block.atoms] += along.swapaxes(0, 1)
        return after, (state, context, slope, source)

    def _shown(self, context: Numbers, state: Numbers) -> Numbers:
        """What an atom shows to all its neighbours: scalar, its vectors behind their gate, direction; (atoms, 5 channels)."""
        source = np.empty((state.shape[1], 5, self._width), state.dtype)
        source[:, 0], source[:, 4] = context[0], context[1]
        np.multiply(context[2], state[1:], out=source[:, 1:4].swapaxes(0, 1))
        return source.reshape(len(source), -1)

    def back(self, blocks: list[Block], gradient: Numbers, kept: tuple[Numbers, ...], found: list[Found]) -> Numbers:
        """Return the gradient with respect to the state before, and add to those with respect to basis and bent."""
        state, context, slope, source = kept
        asked, vectors = np.empty_like(source), gradient[1:].swapaxes(0, 1).reshape(len(source), -1)
        for block, into in zip(blocks, found, strict=True):
            self._back(block, gradient[0].take(block.second, axis=0), vectors.take(block.second, axis=0), source, asked, into)
        asked = asked.reshape(len(source), 5, -1).swapaxes(0, 1)
        after = gradient.copy()
        gates = np.stack((asked[0], asked[4], (asked[1:4] * state[1:]).sum(axis=0)))
        after[0] += self._dense.back(gates, slope)
        after[1:] += asked[1:4] * context[2]
        return after

    def _back(self, block: Block, scalar: Numbers, vector: Numbers, source: Numbers, asked: Numbers, into: Found) -> None:
        """The messages that the atoms of the block send, along their own pairs; the unit vector points the other way for them.

        `scalar` and `vector` are the gradients at the neighbours, (atoms, neighbours, 1 or 3 times channels).
        """
        c, own = self._width, source[block.atoms, None]
        basis = block.basis.swapaxes(1, 2)
        asked[block.atoms, :c] = _filtered(basis @ scalar, self._filters[:, :c])
        asked[block.atoms, c : 4 * c] = _filtered(basis @ vector, self._filters[:, c:])
        # each component by itself: (atoms, neighbours and components, channels)
        parts = vector.reshape(len(vector), -1, c)
        bent = block.bent.reshape(len(vector), -1, basis.shape[1]).swapaxes(1, 2) @ parts
        asked[block.atoms, 4 * c :] = -_filtered(bent, self._direction)
        gates = (own[..., 4 * c :] * self._direction).swapaxes(1, 2)
        into.bent[:] -= (parts @ gates).reshape(into.bent.shape)
        scalar *= own[..., :c]
        vector *= own[..., c : 4 * c]
        into.basis[:] += scalar @ self._filters[:, :c].T + vector @ self._filters[:, c:].T


def _filtered(sums: Numbers, filters: Numbers) -> Numbers:
    """Sum over the radial functions, the last axis but one."""
    found: Numbers = np.einsum("...kc,kc->...c", sums, filters)
    return found


class Update:
    """What an atom does with its own state, after each message."""

    def __init__(self, network: Network, layer: int) -> None:
        self._width, self._last = network.hyper.channels, layer == network.hyper.layers - 1
        self._mix_back = array(network.mix[layer].weight).reshape(2, self._width, self._width)
        self._mix = self._mix_back.swapaxes(1, 2).copy()
        self._dense = Dense(network.update_in[layer], network.update_out[layer], self._width)

    def forward(self, state: Numbers) -> tuple[Numbers, tuple[Numbers, ...]]:
        """Return the state, and what `back` needs."""
        vector = state[1:]
        left, right = (vector.reshape(-1, self._width) @ self._mix).reshape(2, *vector.shape)
        dot, norm = (left * right).sum(axis=0), np.sqrt((right * right).sum(axis=0) + SOFT)
        gates, slope = self._dense.forward(np.concatenate((state[0], norm), axis=1))
        after = state.copy()
        after[0] += gates[0] + gates[1] * dot
        if not self._last:  # vectors are read no more
            after[1:] += gates[2] * left
        return after, (left, right, dot, norm, gates, slope)

    def back_last(self, gradient: Numbers, kept: tuple[Numbers, ...]) -> Numbers:
        """As `back`, after the last layer, where the scalars alone have a gradient."""
        return self._back(gradient, None, kept)

    def back(self, gradient: Numbers, kept: tuple[Numbers, ...]) -> Numbers:
        """Return the gradient with respect to the state before, under that with respect to the state behind."""
        return self._back(gradient[0], gradient[1:], kept)

    def _back(self, scalars: Numbers, vector: Numbers | None, kept: tuple[Numbers, ...]) -> Numbers:
        left, right, dot, norm, gates, slope = kept
        parts = [scalars, scalars * dot] if vector is None else [scalars, scalars * dot, (vector * left).sum(axis=0)]
        inner = self._dense.back(np.stack(parts), slope)
        both = np.empty((2, *left.shape), left.dtype)
        dotted = scalars * gates[1]
        np.multiply(right, dotted, out=both[0])
        np.multiply(left, dotted, out=both[1])
        both[1] += right * (inner[:, self._width :] / norm)
        if vector is not None:
            both[0] += gates[2] * vector
        found = np.empty((4, *scalars.shape), scalars.dtype)
        np.add(scalars, inner[:, : self._width], out=found[0])
        mixed = (both.reshape(2, -1, self._width) @ self._mix_back).sum(axis=0).reshape(left.shape)
        found[1:] = mixed if vector is None else mixed + vector
        return found
