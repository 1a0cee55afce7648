"""The exact toy passes the conformance checks and fails softly; labels are made of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tumbaga.online.conformance import check_trainable
from tumbaga.online.errors import BadFrameError
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Frame
from tumbaga.online.testing import ToyTrainable, label_from


def crystal(rng: np.random.Generator) -> Frame:
    cell = np.array([[5.0, 0, 0], [1.0, 5.0, 0], [-1.0, 0.5, 6.0]])
    return Frame(np.array([8, 1, 1, 8]), rng.uniform(-3, 9, (4, 3)), cell, True)


def test_the_toy_is_a_conforming_trainable(toy: ToyTrainable, cluster: Callable[..., Frame], rng: np.random.Generator) -> None:
    """Clusters of several sizes, a single atom and a slanted crystal with unwrapped positions."""
    frames = [cluster(1), cluster(3), Frame(np.array([1]), np.zeros((1, 3))), crystal(rng)]

    assert isinstance(toy, Trainable)
    check_trainable(toy, frames)


def test_the_toy_fails_softly(toy: ToyTrainable) -> None:
    """Atoms on top of each other give a prediction that says it is not finite; unknown elements are refused."""
    assert not toy.predict([Frame(np.array([1, 1]), np.zeros((2, 3)))])[0].finite
    with pytest.raises(BadFrameError, match="29"):
        toy.predict([Frame(np.array([29]), np.zeros((1, 3)))])


def test_labels_carry_their_offsets(toy: ToyTrainable, cluster: Callable[..., Frame]) -> None:
    """Offsets move the energy and no force."""
    frame = cluster(1)
    said, label = toy.predict([frame])[0], label_from(toy, frame, {8: -2000.0, 1: -13.0})

    assert label.energy == pytest.approx(said.energy - 2026.0)
    np.testing.assert_array_equal(label.forces, said.forces)
