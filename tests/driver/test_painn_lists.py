"""Neighbour lists that outlast a step are the fresh ones to the last bit, and the fresh ones are those of ASE."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ase.neighborlist import primitive_neighbor_list

from tumbaga.driver.backends import painn_lists, painn_pairs
from tumbaga.driver.backends.painn_lists import Lists
from tumbaga.driver.backends.painn_pairs import Pairs, pairs
from tumbaga.online.records import Frame

CUTOFF = 4.0
SEEDS = range(12)


def crystal(seed: int, n_atoms: int | None = None) -> Frame:
    """Atoms scattered over several cells around a slanted one, often shorter than the cutoff."""
    rng = np.random.default_rng(seed)
    n_atoms = int(rng.integers(1, 9)) if n_atoms is None else n_atoms
    cell = np.diag(rng.uniform(2.0, 9.0, 3)) + rng.uniform(-1.5, 1.5, (3, 3)) * (1 - np.eye(3))
    return Frame(np.full(n_atoms, 29), rng.uniform(-2.0, 3.0, (n_atoms, 3)) @ cell, cell, periodic=True)


def cloud(n_atoms: int, seed: int = 0) -> Frame:
    rng = np.random.default_rng(seed)
    return Frame(np.full(n_atoms, 8), rng.uniform(0.0, 2.3 * n_atoms ** (1 / 3), (n_atoms, 3)))


def moved(frame: Frame, positions: np.ndarray, cell: np.ndarray | None = None) -> Frame:
    return Frame(frame.numbers, positions, frame.cell if cell is None else cell, frame.periodic)


def same(one: Pairs, other: Pairs) -> None:
    """Equal to the last bit and in order."""
    assert len(one.first) == len(other.first)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small clusters are used here for what else only large ones do."""
    monkeypatch.setattr(painn_lists, "PLAIN_LIMIT", 0)


@pytest.mark.parametrize("frame", [*map(crystal, SEEDS), crystal(1, 1), cloud(1), cloud(40)])
def test_the_pairs_are_those_of_ase(frame: Frame) -> None:
    """Same atoms, same vectors, each pair once; ASE's list is an independent implementation."""
    first, second, vectors = primitive_neighbor_list(
        "ijD", [frame.periodic] * 3, frame.cell if frame.periodic else np.eye(3) * 50.0, frame.positions, CUTOFF
    )
    found = pairs(frame, CUTOFF)
    mine = np.lexsort((*np.round(found.vectors, 6).T, found.second, found.first))
    theirs = np.lexsort((*np.round(vectors, 6).T, second, first))

    np.testing.assert_array_equal(found.first[mine], first[theirs])
    np.testing.assert_array_equal(found.second[mine], second[theirs])
    np.testing.assert_allclose(found.vectors[mine], vectors[theirs], atol=1e-9)
    assert (np.diff(found.first) >= 0).all()


@pytest.mark.parametrize("frame", [*map(crystal, SEEDS), cloud(40)])
def test_a_kept_list_is_a_fresh_one_to_the_last_bit(frame: Frame) -> None:
    """Along a random walk through cell faces: the list of an earlier step, and one made at this step, with and without a skin."""
    rng, kept = np.random.default_rng(5), Lists(CUTOFF, skin=1.0)
    for _ in range(120):
        frame = moved(frame, frame.positions + rng.normal(size=frame.positions.shape) * 0.03)
        said = kept.pairs(frame)
        same(said, pairs(frame, CUTOFF))
        same(said, Lists(CUTOFF, skin=1.0).pairs(frame))
    assert kept.searches > 1 or len(frame) == 1
    assert kept.searches < 60


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kept_list_follows_a_cell_that_changes(seed: int) -> None:
    """Cells that breathe and shear, atoms that move along and beside: still the fresh list, and not searched at each step."""
    rng, frame, kept = np.random.default_rng(seed), crystal(seed), Lists(CUTOFF, skin=1.0)
    for _ in range(120):
        strain = np.eye(3) + rng.normal(size=(3, 3)) * 0.003
        beside = rng.normal(size=frame.positions.shape) * 0.04
        frame = moved(frame, frame.positions @ strain + beside, frame.cell @ strain)
        same(kept.pairs(frame), pairs(frame, CUTOFF))
    assert kept.searches > 1 or len(frame) == 1
    assert kept.searches < 90


def test_a_wrapped_atom_is_searched_anew() -> None:
    """An engine that wraps its atoms moves one by a whole cell; the kept list does not serve then, and the pairs are right."""
    frame, kept = crystal(3), Lists(CUTOFF)
    kept.pairs(frame)
    positions = frame.positions.copy()
    positions[0] += frame.cell[1] - frame.cell[2]
    wrapped = moved(frame, positions)

    same(kept.pairs(wrapped), pairs(wrapped, CUTOFF))
    assert kept.searches == 2


def test_beads_and_sessions_have_a_list_each() -> None:
    """Many walkers with equal atoms in turn: one search each; other species or another boundary are never confused."""
    rng, kept = np.random.default_rng(6), Lists(CUTOFF, skin=1.0)
    walkers = [crystal(seed, 6) for seed in SEEDS]
    walkers += [Frame(np.full(6, 79), walkers[0].positions, walkers[0].cell, True), Frame(walkers[0].numbers, walkers[0].positions)]
    for _ in range(10):
        walkers = [moved(frame, frame.positions + rng.normal(size=(6, 3)) * 0.005) for frame in walkers]
        for frame in walkers:
            same(kept.pairs(frame), pairs(frame, CUTOFF))
    assert kept.searches == len(walkers)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unused lists go first, by number and by size; a walker that searches again replaces its own list."""
    monkeypatch.setattr(painn_lists, "ENTRIES", 3)
    kept, frames = Lists(CUTOFF), [cloud(30, seed) for seed in range(5)]
    for frame in frames:
        kept.pairs(frame)
    assert len(kept._held) == 3
    kept.pairs(frames[4])
    assert kept.searches == 5
    kept.pairs(moved(frames[4], frames[4].positions + 0.4))
    kept.pairs(frames[3])
    assert kept.searches == 6

    monkeypatch.setattr(painn_lists, "CAPACITY", 10)
    same(kept.pairs(frames[0]), pairs(frames[0], CUTOFF))
    assert not kept._held


def test_kept_lists_do_not_look_into_memory_that_changed() -> None:
    """The positions of a frame may lie in a buffer that the next message overwrites."""
    frame, kept = cloud(30), Lists(CUTOFF)
    kept.pairs(frame)
    frame.positions[:] += np.random.default_rng(7).normal(size=(30, 3))

    same(kept.pairs(frame), painn_pairs.pairs(frame, CUTOFF))


def test_threads_may_share_the_lists() -> None:
    """Images of a band, each in a thread, with one potential: every answer is the fresh list."""
    kept = Lists(CUTOFF)

    def walk(seed: int) -> None:
        rng, frame = np.random.default_rng(seed), cloud(40, seed % 3)
        for _ in range(60):
            frame = moved(frame, frame.positions + rng.normal(size=frame.positions.shape) * 0.03)
            same(kept.pairs(frame), pairs(frame, CUTOFF))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(walk, range(6)))
