"""The overlap guard for frames in a row says what the guard of single frames says."""

from __future__ import annotations

import numpy as np
import pytest

from tumbaga.online import overlap
from tumbaga.online.guards import Finding, Verdict, check_frame
from tumbaga.online.overlap import OverlapWatch
from tumbaga.online.records import Frame

NUMBERS = np.array([29, 79, 8, 1, 1, 29])


def walk(rng: np.random.Generator, cell: np.ndarray | None, steps: int, stride: float) -> list[Frame]:
    """A random walk from a loose start: atoms come near each other again and again."""
    positions = rng.uniform(0.0, 4.0, size=(len(NUMBERS), 3))
    frames = []
    for _ in range(steps):
        positions = positions + rng.normal(scale=stride, size=positions.shape)
        frames.append(Frame(NUMBERS, positions) if cell is None else Frame(NUMBERS, positions, cell, True))
    return frames


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("stride", [0.002, 0.03, 0.5])
def test_the_verdicts_are_those_of_single_frames(periodic: bool, stride: float) -> None:
    verdicts = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        watch = OverlapWatch()
        cell = np.diag([6.0, 7.0, 8.0]) + 0.3 * rng.normal(size=(3, 3)) if periodic else None
        for frame in walk(rng, cell, 150, stride):
            found = watch.check(frame)
            assert found == check_frame(frame)
            verdicts.add(found.verdict)
    assert Verdict.OK in verdicts
    assert stride < 0.01 or Verdict.DEAD in verdicts  # the walks do meet overlaps


def test_a_calm_run_is_looked_at_whole_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counted(frame: Frame, extra: float) -> bool:
        looks.append(frame)
        return False

    monkeypatch.setattr(overlap, "any_pair_within", counted)
    watch, numbers = OverlapWatch(), np.full(4, 29)
    start = 2.5 * np.eye(4, 3)
    for step in range(1000):
        watch.check(Frame(numbers, start + 1e-4 * step))

    assert 1 <= len(looks) <= 3  # 0.1 Å along each axis, 0.17 Å in all


def test_another_cell_or_other_species_are_looked_at_anew() -> None:
    watch = OverlapWatch()
    near = Frame(NUMBERS[:2], np.array([[0.2, 0.0, 0.0], [3.0, 0.0, 0.0]]), np.diag([9.0, 9.0, 9.0]), True)
    squeezed = Frame(NUMBERS[:2], near.positions, np.diag([3.0, 9.0, 9.0]), True)
    other = Frame(np.array([55, 55]), np.array([[0.2, 0.0, 0.0], [1.5, 0.0, 0.0]]))

    assert watch.check(near) == Finding(Verdict.OK)
    assert watch.check(squeezed).verdict is Verdict.DEAD
    assert watch.check(other).verdict is Verdict.DEAD
