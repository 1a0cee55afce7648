"""The network by hand in numpy is the network of torch and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tumbaga.driver.backends import painn_blocks
from tumbaga.driver.backends.painn_net import Hyper, Network
from tumbaga.driver.backends.painn_pairs import pairs
from tumbaga.driver.backends.painn_step import Step
from tumbaga.online.records import Frame

CELL = np.array([[4.6, 0.0, 0.0], [0.7, 4.9, 0.0], [-0.4, 0.9, 5.1]])


def network(layers: int) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(layers)
        made = Network(Hyper((1, 8, 29), cutoff=4.0, channels=16, layers=layers, n_radial=8, n_hidden=8))
    return made.double()


def frame(n_atoms: int, periodic: bool = False, seed: int = 1) -> Frame:
    rng = np.random.default_rng(seed)
    positions = rng.uniform(0.0, 1.0, (n_atoms, 3)) @ (CELL if periodic else 2.0 * n_atoms ** (1 / 3) * np.eye(3))
    return Frame(rng.choice([1, 8, 29], n_atoms), positions, CELL if periodic else np.zeros((3, 3)), periodic)


def summed(
    first: np.ndarray, second: np.ndarray, vectors: np.ndarray, gradients: np.ndarray, n_atoms: int
) -> tuple[np.ndarray, np.ndarray]:
    """Forces and virial: what is asked of the gradients of single pairs, which are shared between both directions in any way."""
    forces = np.zeros((n_atoms, 3))
    np.add.at(forces, first, gradients)
    np.subtract.at(forces, second, gradients)
    return forces, vectors.T @ gradients


@pytest.mark.parametrize("block", [1, 40, 1024])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("one", [frame(1), frame(2), frame(30), frame(7, periodic=True)], ids=["atom", "two", "cluster", "crystal"])
def test_features_and_slopes_are_those_of_autograd(one: Frame, layers: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding in float64, however many pairs are treated at once, and with atoms that have no neighbour."""
    monkeypatch.setattr(painn_blocks, "BLOCK", block)
    net, found = network(layers), pairs(one, 4.0)
    species = np.searchsorted([1, 8, 29], one.numbers)
    weights = np.random.default_rng(2).normal(size=(len(one), 8))
    vectors = torch.tensor(found.vectors, requires_grad=True)
    features = net(vectors, torch.tensor(found.first), torch.tensor(found.second), torch.tensor(species))
    (slopes,) = torch.autograd.grad(features, vectors, torch.tensor(weights), allow_unused=True)

    mine, gradients = Step(net)(found.vectors, found.first, found.second, species, weights)
    np.testing.assert_allclose(mine, features.detach().numpy(), atol=1e-12)
    assert gradients.shape == found.vectors.shape
    theirs = np.zeros_like(found.vectors) if slopes is None else slopes.numpy()
    expected = summed(*found, theirs, len(one))
    for said, true in zip(summed(*found, gradients, len(one)), expected, strict=True):
        np.testing.assert_allclose(said, true, atol=1e-11 * (1.0 + np.abs(true).max()))


def test_other_frames_of_a_batch_do_not_see_a_broken_one() -> None:
    """Two atoms in one place give numbers that are not finite, for their own frame alone, and no warning."""
    good = frame(30)
    net, found = network(2), pairs(good, 4.0)
    first, second = np.append(found.first, [30, 31]), np.append(found.second, [31, 30])
    vectors = np.concatenate([found.vectors, np.zeros((2, 3))])
    species = np.append(np.searchsorted([1, 8, 29], good.numbers), [0, 0])
    features, gradients = Step(net)(vectors, first, second, species, np.ones((32, 8)))
    alone = Step(net)(found.vectors, found.first, found.second, species[:30], np.ones((30, 8)))

    np.testing.assert_allclose(features[:30], alone[0], atol=1e-12)
    np.testing.assert_allclose(gradients[:-2], alone[1], atol=1e-12)
    assert not np.isfinite(features[30:]).any()
    assert not np.isfinite(gradients[-2:]).any()
