"""Frames of siblings leave together, and nobody waits for those who do not come."""

from __future__ import annotations

from tumbaga.driver.window import Window


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def round_of(window: Window, clock: Clock, count: int, gap: float = 0.0001) -> list[int]:
    """So many frames come one after the other; return how many were there each time that the group was let go."""
    left: list[int] = []
    here = 0
    for _ in range(count):
        window.arrived("g")
        here += 1
        if window.open("g"):
            window.left("g")
            left.append(here)
            here = 0
        until = clock.now + gap
        if (remaining := window.remaining()) is not None and clock.now + remaining < until:
            clock.now += remaining
            assert window.open("g")
            window.left("g")
            left.append(here)
            here = 0
        clock.now = until
    while here:
        remaining = window.remaining()
        assert remaining is not None
        clock.now += remaining
        assert window.open("g")
        window.left("g")
        left.append(here)
        here = 0
    for _ in range(count):
        window.finished("g")
    return left


def test_as_many_are_waited_for_as_came_the_last_time() -> None:
    clock = Clock()
    window = Window(0.002, clock)

    assert round_of(window, clock, 4) == [1, 1, 1, 1]  # nobody was expected; all were under way at once
    assert [round_of(window, clock, 4) for _ in range(3)] == [[4]] * 3


def test_who_comes_alone_waits_once_for_the_others_and_not_again() -> None:
    clock = Clock()
    window = Window(0.002, clock)
    round_of(window, clock, 4)
    before = clock.now
    assert round_of(window, clock, 1) == [1]
    assert clock.now - before > 0.0019
    before = clock.now
    assert round_of(window, clock, 1, gap=0.0) == [1]
    assert clock.now == before


def test_a_late_sibling_delays_the_others_by_the_window_at_most() -> None:
    clock = Clock()
    window = Window(0.002, clock)
    round_of(window, clock, 3)
    before = clock.now

    assert round_of(window, clock, 3, gap=0.0015) == [2, 1]
    assert clock.now - before < 3 * 0.0015 + 0.002


def test_who_has_no_siblings_never_waits() -> None:
    clock = Clock()
    window = Window(0.002, clock)
    for _ in range(5):
        window.arrived("")
        assert window.open("")
        window.left("")
    assert window.remaining() is None


def test_a_session_that_left_is_not_waited_for() -> None:
    clock = Clock()
    window = Window(0.002, clock)
    round_of(window, clock, 2)
    window.arrived("g")
    assert not window.open("g")
    window.finished("g", waiting=True)
    assert window.remaining() is None
    assert round_of(window, clock, 1, gap=0.0) == [1]


def test_without_a_window_everything_leaves_at_once() -> None:
    clock = Clock()
    window = Window(0.0, clock)
    for _ in range(4):
        window.arrived("g")
        assert window.open("g")
