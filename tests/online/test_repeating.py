"""Labels that are computed twice: the second time of the frame moved, with the difference in the details."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels.factory import make_labeller
from tumbaga.online.labels.repeating import REPEAT, Repeating
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Store

WATER = np.array([[0.0, 0.0, 0.0], [0.96, 0.1, 0.0], [-0.24, 0.93, 0.05]])


def water(seed: int = 0, *, periodic: bool = False) -> Frame:
    places = WATER + 0.02 * np.random.default_rng(seed).standard_normal((3, 3))
    return Frame(np.array([8, 1, 1]), places, 6.0 * np.eye(3), periodic)


class Springs:
    """Every pair of atoms on a spring, and, as a grid would add, a field of the space they are in.

    Args:
        field: eV/Å, along z; it does not turn with the atoms.
    """

    method = "springs"

    def __init__(self, field: float = 0.0, fails_after: int = 99) -> None:
        self._field, self._left = field, fails_after
        self.seen: list[Frame] = []

    def label(self, frame: Frame) -> Label:
        self.seen.append(frame)
        self._left -= 1
        if self._left < 0:
            raise LabelFailedError("it does not converge")
        away = frame.positions[:, None] - frame.positions[None]
        forces = -away.sum(axis=1)
        energy = 0.25 * float((away**2).sum()) - self._field * float(frame.positions[:, 2].sum())
        forces[:, 2] += self._field
        return Label(energy, forces, self.method, 1.5, {"cycles": 7})


def test_forces_are_turned_back() -> None:
    """A method without noise differs by rounding alone, though its second frame is another one; both took their time."""
    springs = Springs()
    label = Repeating(springs, 1).label(water())
    first, second = springs.seen
    assert not np.allclose(first.positions, second.positions, atol=0.1)
    assert second.key != first.key
    told = label.details[REPEAT]
    assert told["force_max"] < 1e-12
    assert abs(told["energy"]) < 1e-12
    assert label.seconds == 3.0
    assert label.details["cycles"] == 7
    np.testing.assert_array_equal(label.forces, Springs().label(water()).forces)


def test_what_does_not_turn_with_the_atoms_is_noise() -> None:
    """A field of 0.01 eV/Å: forces differ by as much as two directions can, and the rmse is over components."""
    told = Repeating(Springs(0.01), 1).label(water()).details[REPEAT]
    assert 0.001 < told["force_max"] <= 0.02
    assert told["force_rmse"] == pytest.approx(told["force_max"] / math.sqrt(3))  # the same for every atom


def test_cells_are_shifted() -> None:
    """Distances and the cell stay, the place in it does not."""
    springs = Springs()
    Repeating(springs, 1).label(water(periodic=True))
    first, second = springs.seen
    moved = second.positions - first.positions
    np.testing.assert_allclose(moved, np.broadcast_to(moved[0], (3, 3)), atol=1e-12)
    assert np.abs(moved).max() > 0.1
    np.testing.assert_array_equal(first.cell, second.cell)
    assert second.periodic


def test_one_frame_in_so_many(tmp_path: Path) -> None:
    """Which ones does not depend on the process that labels them; none at 0."""
    frames = [water(seed) for seed in range(400)]
    often = [frame for frame in frames if Repeating(Springs(), 4).due(frame)]
    assert 70 < len(often) < 130
    assert not any(Repeating(Springs(), 0).due(frame) for frame in frames)
    assert REPEAT not in Repeating(Springs(), 0).label(water()).details


def test_a_second_label_that_fails_is_told_and_the_first_one_kept() -> None:
    """It is a sign, and no reason to lose a label."""
    label = Repeating(Springs(fails_after=1), 1).label(water())
    assert label.details[REPEAT] == {"failure": "it does not converge"}
    assert label.seconds == 1.5
    with pytest.raises(LabelFailedError):
        Repeating(Springs(fails_after=0), 1).label(water())


def test_the_noise_of_pyscf_is_that_of_its_grid() -> None:
    """Turned water: millielectronvolts, and not zero."""
    engine = Repeating(make_labeller("pyscf?basis=def2-svp&grid=1"), 1)
    engine.prepare()
    label = engine.label(replace(water(), cell=np.zeros((3, 3))))
    assert label.method == engine.method
    assert 1e-6 < label.details[REPEAT]["force_max"] < 0.05
    assert abs(label.details[REPEAT]["energy"]) < 0.01


def test_the_store_knows_the_noise(tmp_path: Path) -> None:
    """Over all labels that were computed twice; failures are counted apart."""
    repeats: list[object] = [
        None,
        "thrice",
        {"of": 3},
        {"energy": -0.002, "force_rmse": 0.003, "force_max": 0.01, "seconds": 1.0},
        {"failure": "no"},
    ]
    repeats.append({"energy": 0.001, "force_rmse": 0.004, "force_max": 0.02, "seconds": 1.0})
    with Store(tmp_path / FILE) as store:
        assert store.noise() is None
        for seed, repeat in enumerate(repeats):
            frame, label = water(seed), Springs().label(water(seed))
            frame_id = store.add_flag(
                frame, session="s", step=seed, reason=Reason.AUDIT, score=0.1, version=0, energy=0.0, forces=label.forces
            )
            store.enqueue(frame_id, Reason.AUDIT, Role.TRAIN, 0.1)
            task = store.start_task(frame_id, "label-0", 1)
            details = {} if repeat is None else {REPEAT: repeat}
            store.add_label(task, replace(label, details=details))
        assert store.noise() == (2, 1, pytest.approx(math.sqrt((0.003**2 + 0.004**2) / 2)), 0.02, 0.002)
