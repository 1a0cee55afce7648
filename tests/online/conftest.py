"""Fixtures of the learning tests: small clusters, and labels made by the exact toy with other weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tumbaga.online.last_layer import Labelled, labelled
from tumbaga.online.records import Array, Frame, Label
from tumbaga.online.testing import ToyTrainable, label_from

WATER = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture
def toy(rng: np.random.Generator) -> ToyTrainable:
    """A toy of two elements: 8 weights, so that a few labels determine them all."""
    return ToyTrainable(elements=(1, 8), weights=rng.standard_normal(8), n_gaussians=2)


@pytest.fixture
def cluster(rng: np.random.Generator) -> Callable[..., Frame]:
    """Makes clusters of waters on a grid, rattled by 0.25 Å."""

    def make(waters: int = 2) -> Frame:
        places = np.array([[x, y, z] for x in range(2) for y in range(2) for z in range(2)][:waters]) * 2.9
        positions = (places[:, None, :] + WATER).reshape(-1, 3)
        return Frame(np.array([8, 1, 1] * waters), positions + 0.25 * rng.standard_normal(positions.shape))

    return make


@pytest.fixture
def truth(toy: ToyTrainable, rng: np.random.Generator) -> ToyTrainable:
    """What the labels follow: the toy with other weights."""
    return toy.with_readout(toy.readout() + 0.3 * rng.standard_normal(8))


@pytest.fixture
def make_labels(
    toy: ToyTrainable, truth: ToyTrainable, cluster: Callable[..., Frame], rng: np.random.Generator
) -> Callable[..., list[Labelled]]:
    """Labels n frames: exactly, or with force noise in eV/Å; offsets by atomic number in eV."""

    def make(n: int, noise: float = 0.0, offsets: dict[int, float] | None = None, waters: tuple[int, ...] = (2,)) -> list[Labelled]:
        made = []
        for k in range(n):
            frame = cluster(waters[k % len(waters)])
            label = label_from(truth, frame, offsets)
            forces: Array = label.forces + noise * rng.standard_normal(label.forces.shape)
            label = Label(label.energy, forces, label.method, 0.0)
            made.append(labelled(toy.force_rows(frame), frame, label, toy.readout(), toy.elements))
        return made

    return make
