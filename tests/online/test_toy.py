"""The exact toy passes the conformance checks, and the checks catch what is broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from tumbaga.online.errors import BadFrameError
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Array, Frame, Prediction
from tumbaga.online.testing import ConformanceError, ToyTrainable, check_potential, check_trainable, label_from


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


class Spoilt:
    """A potential whose predictions go through a function on the way out."""

    def __init__(self, toy: Potential, spoil: Callable[[int, Prediction], Prediction]) -> None:
        self.spec, self._toy, self._spoil = toy.spec, toy, spoil

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        return [self._spoil(len(frames), said) for said in self._toy.predict(frames, readouts)]


@pytest.mark.parametrize(
    ("claim", "spoil"),
    [
        ("batch", lambda n, said: replace(said, energy=said.energy + n)),
        ("dE/dR", lambda n, said: replace(said, forces=1.001 * said.forces)),
        ("dE/dstrain", lambda n, said: replace(said, virial=-said.virial)),
        ("finite", lambda n, said: replace(said, energy=float("nan"))),
        ("float64", lambda n, said: replace(said, forces=said.forces.astype(np.float32))),
        ("rotation", lambda n, said: replace(said, forces=np.abs(said.forces))),
        ("order", lambda n, said: replace(said, forces=said.forces * np.linspace(1, 2, len(said.forces))[:, None])),
    ],
)
def test_each_claim_can_fail(
    toy: ToyTrainable, cluster: Callable[..., Frame], claim: str, spoil: Callable[[int, Prediction], Prediction]
) -> None:
    """The check that names the broken claim is the one that raises."""
    with pytest.raises(ConformanceError, match=claim):
        check_potential(Spoilt(toy, spoil), [cluster(2), cluster(1)])
