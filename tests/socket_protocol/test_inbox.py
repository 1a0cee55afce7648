"""The buffer between socket and parser: whatever is written, dropped and asked for, it holds the right bytes and not much more memory."""

from __future__ import annotations

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tumbaga.socket_protocol.inbox import SPARE, Inbox

# a busy machine is no reason to fail
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
LEAST = 1 << 12  # free bytes that a read is offered when nothing is known of the message


class AgainstBytes(RuleBasedStateMachine):
    """An inbox beside a plain `bytes` that is written to and cut in the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.inbox, self.model = Inbox(), b""
        self.most = 0  # that ever waited, or was asked for
        self.last = 0  # last byte written, so that bytes differ

    def fresh(self, count: int) -> bytes:
        data = bytes((self.last + index) % 251 for index in range(count))
        self.last += count
        return data

    @rule(count=st.integers(0, 9000))
    def feed(self, count: int) -> None:
        data = self.fresh(count)
        self.inbox.feed(data)
        self.model += data

    @rule(message=st.integers(0, 40_000), count=st.integers(0, 9000))
    def receive_in_place(self, message: int, count: int) -> None:
        space = self.inbox.space(message)
        assert len(space) >= 1
        assert len(self.model) + len(space) >= message
        self.most = max(self.most, message)
        data = self.fresh(min(count, len(space)))
        space[: len(data)] = data
        self.inbox.filled(len(data))
        self.model += data

    @rule(share=st.floats(0, 1))
    def drop(self, share: float) -> None:
        count = int(share * len(self.model))
        self.inbox.drop(count)
        self.model = self.model[count:]

    @rule()
    def drop_all(self) -> None:
        self.inbox.drop(len(self.model))
        self.model = b""

    @rule()
    def clear(self) -> None:
        self.inbox.clear()
        self.model, self.most = b"", 0
        assert self.inbox.capacity == 0

    @invariant()
    def the_bytes_are_right(self) -> None:
        assert len(self.inbox) == len(self.model)
        assert self.inbox.view == self.model

    @invariant()
    def memory_follows_what_waits_and_what_was_asked_for(self) -> None:
        self.most = max(self.most, len(self.model))
        assert len(self.model) <= self.inbox.capacity <= max(2 * self.most, self.most + SPARE)


AgainstBytes.TestCase.settings = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
TestAgainstBytes = AgainstBytes.TestCase


@PATIENT
@given(st.integers(0, 50_000), st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_space_is_enough_for_the_message_however_much_of_it_came(message: int, pieces: list[int]) -> None:
    inbox = Inbox()
    for piece in pieces:
        space = inbox.space(message)
        assert len(inbox) + len(space) >= message
        inbox.filled(min(piece, len(space)))


@pytest.mark.parametrize("size", [1, SPARE - 1, SPARE, SPARE + 1, 3 * SPARE])
def test_a_dropped_message_leaves_the_next_one_as_it_was(size: int) -> None:
    inbox, following = Inbox(), bytes(range(200))
    inbox.feed(b"x" * size + following)
    inbox.drop(size)

    assert inbox.view == following
    inbox.space(2 * SPARE)  # moves what waits
    assert inbox.view == following


def test_a_copy_was_fed_and_the_source_may_change() -> None:
    inbox, source = Inbox(), bytearray(b"abc")
    inbox.feed(memoryview(source))
    source[:] = b"xyz"

    assert bytes(inbox.view) == b"abc"


def test_the_memory_of_an_inbox_that_is_always_emptied_does_not_grow() -> None:
    inbox = Inbox()
    for size in (12, 880, 7360, 4000, 12) * 200:
        inbox.space(size)[:size] = bytes(size)
        inbox.filled(size)
        inbox.drop(size)

    assert inbox.capacity == SPARE


def test_the_cost_of_a_message_that_comes_byte_by_byte_does_not_depend_on_its_size() -> None:
    """A peer that dribbles may not cost more than the bytes it sends: no copy of all that waits for each of them."""
    moved = {}
    for size in (1 << 16, 1 << 22):
        inbox = Inbox()
        inbox.space(size)
        inbox.filled(size - 3000)
        start = time.process_time()
        for _ in range(3000):
            inbox.space(size)
            inbox.filled(1)
        moved[size] = time.process_time() - start

    assert moved[1 << 22] < 0.1 + 10 * moved[1 << 16]  # copying 4 MB 3000 times takes seconds
