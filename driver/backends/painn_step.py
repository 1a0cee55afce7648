"""What a force call asks of the network of ``painn_net`` on a CPU: features, and the gradient of their weighted sum, by hand in numpy.

The numbers are those of ``Network.forward`` and autograd to rounding; a test compares them. Twenty atoms cost the overhead of operators, which
numpy has least of, and a hundred cost passes over memory. So no filters of pairs are ever made: they are W b(r), linear in the radial
basis b, and

    sum_j (W b_ij)_c x_jc = sum_k W_ck (sum_j b_ijk x_jc)

where the inner sum is a matrix product for each atom, and the outer one runs over atoms. In the first layer x is a matter of species. A list
holds each pair in both directions, so an atom finds what its neighbours ask of it along its own pairs, and nothing is scattered. Atoms go
through in blocks that stay in the cache of a core, padded to equal numbers of neighbours.
"""

from __future__ import annotations

import numpy as np

from tumbaga.driver.backends.painn_blocks import Block, Found, Numbers, Radial, along_vectors, blocks
from tumbaga.driver.backends.painn_layers import First, Message, Update, array, silu
from tumbaga.driver.backends.painn_net import Network
from tumbaga.online.records import Array, Ints


class Step:
    """A network with its weights as they are now, ready for force calls.

    Args:
        network: its weights give the dtype; later changes to them are not seen.
    """

    def __init__(self, network: Network) -> None:
        hyper = network.hyper
        self._radial = Radial(hyper.cutoff, array(network.frequencies))
        self._dtype = self._radial.frequencies.dtype
        self._first = First(network)
        self._messages = [Message(network, layer) for layer in range(1, hyper.layers)]
        self._updates = [Update(network, layer) for layer in range(hyper.layers)]
        self._weight, self._bias = array(network.hidden.weight), array(network.hidden.bias)

    def __call__(self, vectors: Array, first: Ints, second: Ints, species: Ints, weights: Array) -> tuple[Numbers, Numbers]:
        """Return the features of all atoms, (n_atoms, n_hidden), and a gradient for each pair vector, (n_pairs, 3).

        The gradient is that of sum(features * weights), shared between the two directions of a pair in a way of its own: sums over the
        pairs of an atom or a frame, in both directions, are what counts.

        Args:
            vectors, first, second, species: as in ``Network.forward``, but in numpy; `first` ascending, each pair in both directions.
            weights: of the features of each atom, shape (n_atoms, n_hidden).
        """
        with np.errstate(all="ignore"):  # a broken frame is answered with numbers that are not finite, and the gateway sees them
            counts = np.bincount(first, minlength=len(species))
            order = np.argsort(counts, kind="stable")
            parts = blocks(vectors, second, species, counts, order, self._radial)
            features, found = self._run(parts, species[order], weights[order].astype(self._dtype))
            gradients = np.empty((len(first) + 1, 3), self._dtype)
            for block, one in zip(parts, found, strict=True):
                gradients[block.rows] = along_vectors(block, one)
            unsorted = np.empty_like(features)
            unsorted[order] = features
        return unsorted, gradients[:-1]

    def _run(self, parts: list[Block], species: Ints, weights: Numbers) -> tuple[Numbers, list[Found]]:
        state = self._first.forward(parts, species)
        state, kept = self._updates[0].forward(state)
        tape = []
        for message, update in zip(self._messages, self._updates[1:], strict=True):
            state, passed = message.forward(parts, state)
            tape.append((message, passed, kept))
            state, kept = update.forward(state)
        features, slope = silu(state[0] @ self._weight.T + self._bias)
        gradient = self._updates[-1].back_last((weights * slope) @ self._weight, kept)
        found = [Found(np.zeros_like(block.basis), np.zeros_like(block.bent)) for block in parts]
        for (message, passed, kept), update in zip(tape[::-1], self._updates[-2::-1], strict=True):
            gradient = update.back(message.back(parts, gradient, passed, found), kept)
        self._first.back(parts, gradient, found)
        return features, found
