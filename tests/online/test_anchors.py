"""Pairs pressed together keep their walls while a run learns; on the exact toy, and on the embedded potential."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement

import numpy as np
import pytest

from tumbaga.driver.backends import registry
from tumbaga.online.anchors import RATIOS, pair_rows
from tumbaga.online.guards import COVALENT_RADII
from tumbaga.online.last_layer import Labelled, Settings, fit
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Frame
from tumbaga.online.testing import ToyTrainable

ELEMENTS = (1, 8)


def test_rows_are_the_pushes_between_two_atoms(toy: ToyTrainable) -> None:
    """Row times weights is the force along the line, less what no readout changes, for every pair and ratio."""
    rows = pair_rows(toy, ELEMENTS, seconds=1e9)
    assert len(rows) == 3 * len(RATIOS)
    found = sorted((rows @ toy.readout()).tolist())
    pushes = []
    for pair in combinations_with_replacement(ELEMENTS, 2):
        for ratio in RATIOS:
            numbers = np.array(pair)
            frame = Frame(numbers, np.array([[0.0, 0.0, 0.0], [ratio * COVALENT_RADII[numbers].sum(), 0.0, 0.0]]))
            pushes.append(toy.predict([frame])[0].forces[1, 0] - toy.force_rows(frame).forces_fixed[1, 0])
    np.testing.assert_allclose(found, sorted(pushes), atol=1e-10)


def test_time_is_bounded_and_the_middle_comes_first(toy: ToyTrainable) -> None:
    """A potential whose rows take long gives some of them, all pairs at one distance before the next."""
    ticks = iter(range(1000))
    rows = pair_rows(toy, ELEMENTS, seconds=4.0, clock=lambda: float(next(ticks)))
    assert 3 <= len(rows) <= 4
    np.testing.assert_allclose(rows, pair_rows(toy, ELEMENTS, seconds=1e9)[: len(rows)])


def test_anchors_hold_the_readout_where_they_are_and_nowhere_else(
    toy: ToyTrainable, truth: ToyTrainable, make_labels: Callable[..., list[Labelled]]
) -> None:
    """The more weight, the less changes along their rows; none changes nothing, and labels still count elsewhere."""
    labels, rows = make_labels(6), pair_rows(toy, ELEMENTS, seconds=1e9)
    moved, missed = [], []
    for weight in (0.0, 1e-3, 1e3):
        fitted = fit(labels, toy.readout(), Settings(anchor_weight=weight), anchors=rows)
        moved.append(float(np.abs(rows @ fitted.delta).max()))
        missed.append(sum(float((one.residual(fitted.delta) ** 2).sum()) for one in labels))
    free = fit(labels, toy.readout(), Settings())
    assert moved[0] == pytest.approx(float(np.abs(rows @ free.delta).max()), rel=1e-9)
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 0.05 * moved[0]
    assert missed[0] <= missed[1] <= missed[2]
    assert missed[1] < 0.5 * sum(float((one.residual() ** 2).sum()) for one in labels)


def test_no_anchor_changes_nothing(toy: ToyTrainable, make_labels: Callable[..., list[Labelled]]) -> None:
    """A potential of which no pair could be had is learnt as before."""
    labels = make_labels(4)
    one, other = (fit(labels, toy.readout(), anchors=anchors) for anchors in (None, np.zeros((0, toy.spec.n_columns))))
    np.testing.assert_array_equal(one.delta, other.delta)
    assert one.log_evidence == other.log_evidence


def test_the_embedded_potential_has_rows_for_all_its_pairs() -> None:
    """Ten pairs at all ratios within the time that they may take."""
    potential = registry.load("painn:cuau-water", "cpu")
    assert isinstance(potential, Trainable)
    rows = pair_rows(potential, potential.spec.elements, seconds=1e9)
    assert rows.shape == (10 * len(RATIOS), potential.spec.n_columns)
    assert np.isfinite(rows).all()
