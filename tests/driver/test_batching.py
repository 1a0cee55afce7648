"""Whose turn it is and how much goes into one batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from tumbaga.driver.batching import TARGET_S, Cap, Returns, Turns, chosen, split
from tumbaga.driver.evaluator import out_of_memory


@dataclass(eq=False)
class Item:
    session: str
    atoms: int
    start: float = 0.0


def run(sizes: dict[str, int], rounds: int, most: int) -> dict[str, int]:
    """Serve sessions that ask again as soon as they are answered; return what was done for each: its atoms, and 16 a frame."""
    turns, waiting, done = Turns(), [Item(name, atoms) for name, atoms in sizes.items()], dict.fromkeys(sizes, 0)
    for item in waiting:
        turns.queue(item)
    for _ in range(rounds):
        batch = [waiting[place] for place in chosen(waiting, most)]
        turns.gone(batch)
        for item in batch:
            waiting.remove(item)
            done[item.session] += 16 + item.atoms
            waiting.append(Item(item.session, item.atoms))
            turns.queue(waiting[-1])
    return done


def test_a_large_frame_and_small_ones_get_equal_shares() -> None:
    done = run({"large": 1000, "small": 13}, 2000, most=100)

    assert done["large"] == pytest.approx(done["small"], rel=0.1)


def test_nobody_starves_among_many() -> None:
    sizes = {f"s{i}": atoms for i, atoms in enumerate([13, 20, 38, 55] * 4)} | {"large": 1000}
    done = run(sizes, 3000, most=200)

    assert min(done.values()) > 0.8 * np.mean(list(done.values()))


def test_frames_of_mixed_size_that_go_one_by_one_leave_nobody_far_behind() -> None:
    """With a potential so slow that a batch is one frame, the largest of usual clusters still makes half the mean number of steps."""
    sizes = {f"s{atoms}": atoms for atoms in (13, 20, 38, 55)}
    done = run(sizes, 2000, most=1)
    steps = [done[name] / (16 + atoms) for name, atoms in sizes.items()]

    assert min(steps) > 0.5 * np.mean(steps)


def test_all_go_at_once_where_they_fit() -> None:
    waiting = [Item("a", 10), Item("b", 20), Item("c", 30)]

    assert sorted(chosen(waiting, 60)) == [0, 1, 2]


def test_one_that_does_not_fit_goes_by_itself_when_it_is_its_turn() -> None:
    assert chosen([Item("large", 1000), Item("small", 10, start=1.0)], 100) == [0]


def test_who_was_away_has_no_credit() -> None:
    turns = Turns()
    for _ in range(100):
        item = Item("busy", 10)
        turns.queue(item)
        turns.gone([item])
    late = Item("late", 10)
    turns.queue(late)

    assert late.start == pytest.approx(item.start)


def test_the_cap_follows_the_time_that_batches_take() -> None:
    cap = Cap()
    for seconds_per_atom in (1e-3, 1e-5):
        for _ in range(200):
            cap.took(8, cap.atoms, cap.atoms * seconds_per_atom)
        assert 0.6 * TARGET_S < cap.atoms * seconds_per_atom < 1.9 * TARGET_S


def test_a_single_slow_frame_says_nothing_about_batches() -> None:
    cap = Cap()
    before = cap.atoms
    cap.took(1, 1000, 60.0)

    assert cap.atoms == before


def test_what_did_not_fit_into_memory_is_not_tried_again_soon() -> None:
    cap = Cap()
    cap.exhausted(1000)
    for _ in range(100):
        cap.took(8, cap.atoms, 0.001)

    assert cap.atoms == 500
    for _ in range(2000):
        cap.took(8, cap.atoms, 0.001)
    assert 500 < cap.atoms < 1000


def test_the_cap_never_reaches_nothing() -> None:
    cap = Cap()
    for _ in range(50):
        cap.exhausted(cap.atoms)

    assert cap.atoms == 1


def test_a_frame_waits_for_sessions_that_come_back_at_once() -> None:
    returns = Returns()
    for step in range(20):
        for name in "abc":
            returns.answered(name, step)
            returns.came(name, step + 0.001)
    for name in "abc":
        returns.answered(name, 100.0)
    returns.came("a", 100.001)

    assert returns.hold(100.001, 100.0, seconds=0.03) == pytest.approx(0.001)
    returns.came("b", 100.0012)
    returns.came("c", 100.0013)
    assert returns.hold(100.0013, 100.0, seconds=0.03) == 0.0


def test_a_frame_waits_no_longer_than_a_tenth_of_a_batch_and_never_for_the_slow() -> None:
    returns = Returns()
    for name, think in (("quick", 0.002), ("slow", 0.5)):
        returns.answered(name, 0.0)
        returns.came(name, think)
        returns.answered(name, 100.0)

    assert returns.hold(100.0, 100.0, seconds=0.1) == pytest.approx(0.004)  # twice what the quick one takes
    assert returns.hold(100.0, 100.0, seconds=0.03) == pytest.approx(0.003)  # a tenth, at most
    assert returns.hold(100.0, 100.0, seconds=0.015) == 0.0  # it would be later than that
    assert returns.hold(100.005, 100.0, seconds=0.1) == 0.0  # it is late
    returns.forget("quick")
    assert returns.hold(100.0, 100.0, seconds=0.1) == 0.0


def test_a_frame_waits_as_long_as_another_batch_would_take() -> None:
    """What the shortest batch takes is saved by going together; it is forgotten once there are no such batches any more."""
    returns = Returns()
    for name, think in (("a", 0.0015), ("b", 0.0015)):
        returns.answered(name, 0.0)
        returns.came(name, think)
        returns.answered(name, 100.0)
    returns.came("a", 100.001)
    assert returns.hold(100.001, 100.0, seconds=0.003) == 0.0

    returns.took(0.01)
    returns.took(0.002)
    assert returns.hold(100.001, 100.0, seconds=0.003) == pytest.approx(0.001)  # until 100.002, while b may take until 100.003

    for _ in range(2000):
        returns.took(0.01)
    assert returns.hold(100.001, 100.0, seconds=0.003) == pytest.approx(0.002)


def test_nobody_waits_for_a_session_that_was_never_seen_to_come_back() -> None:
    returns = Returns()
    returns.answered("new", 0.0)

    assert returns.hold(0.0, 0.0, seconds=10.0) == 0.0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (ValueError("no such axis"), False),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("atoms", "evaluators", "count"),
    [
        ([13, 13, 20, 20, 38, 38, 55, 55], 2, 4),
        ([38] * 8, 2, 4),
        ([38] * 9, 3, 3),
        ([38], 2, 1),
        ([38, 38], 3, 1),
        ([13] * 7 + [1000], 2, 7),
        ([1, 1, 1000, 1000], 2, 3),
    ],
)
def test_evaluators_share_frames_by_size(atoms: list[int], evaluators: int, count: int) -> None:
    """Equal numbers of frames, small ones together; where a large one would hold up many, those share the time instead."""
    assert split(atoms, evaluators) == count
