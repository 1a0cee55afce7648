"""Received bytes that are not cut into messages yet: one buffer, written to by the socket itself and read in place."""

from __future__ import annotations

from typing import Final

SPARE: Final = 1 << 14
"""What is there at first, and the most that is kept free beyond what was asked for."""
_LEAST: Final = 1 << 12  # free bytes to offer to a read


class Inbox:
    """A buffer that is filled at its end and emptied at its beginning. It grows to what is asked for and never shrinks.

    Views of it are for the moment: the next `space`, `feed` or `drop` may change what they show.
    """

    def __init__(self) -> None:
        self._data = memoryview(bytearray(SPARE))
        self._start = self._end = 0
        self.waiting = 0  # what `len` gives; an attribute because it is asked for several times a message

    def __len__(self) -> int:
        return self.waiting

    @property
    def capacity(self) -> int:
        """Bytes of memory that are held."""
        return len(self._data)

    @property
    def view(self) -> memoryview:
        """The waiting bytes, to be read in place."""
        return self._data[self._start : self._end]

    def space(self, message: int = 0) -> memoryview:
        """Return free bytes to write to, enough for a message of that size that begins with the first waiting byte; then call `filled`."""
        rest = max(message - self.waiting, 1)
        free = len(self._data) - self._end
        if free >= rest and free >= _LEAST:
            return self._data[self._end :]
        # moving costs as much as waits: it must have been paid for by as much that was dropped
        if free < max(rest, _LEAST) and self._start >= max(self.waiting, 1):
            self._move(self._data)
            free = len(self._data) - self._end
        if free < rest:
            known = message > self.waiting
            size = self.waiting + rest + _LEAST if known else max(2 * len(self._data), SPARE)
            self._move(self._data if self.waiting + rest <= len(self._data) else memoryview(bytearray(size)))
        return self._data[self._end :]

    def _move(self, place: memoryview) -> None:
        """Move what waits to the beginning of `place`."""
        place[: self.waiting] = self._data[self._start : self._end]
        self._data, self._start, self._end = place, 0, self.waiting

    def filled(self, count: int) -> None:
        """Take the first `count` bytes of the last `space` as received."""
        self._end += count
        self.waiting += count

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take a copy of `data` as received."""
        count = len(data)
        if len(self._data) - self._end < count:
            enough = self.waiting + count <= len(self._data)
            self._move(self._data if enough else memoryview(bytearray(max(2 * len(self._data), self.waiting + count))))
        self._data[self._end : self._end + count] = data
        self.filled(count)

    def drop(self, count: int) -> None:
        """Forget the first `count` waiting bytes."""
        self._start += count
        self.waiting -= count
        if self.waiting <= 0:
            self._start = self._end = self.waiting = 0

    def clear(self) -> None:
        """Forget everything, and the memory with it."""
        self._data = memoryview(bytearray(0))
        self._start = self._end = self.waiting = 0
