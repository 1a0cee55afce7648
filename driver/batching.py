"""How much goes into one batch, and whose turn it is. Pure: no sockets, no clocks.

A batch is evaluated as a whole, so the frame that is ready first waits for all others in it: batches are kept to what an evaluator does in
about `TARGET_S`, which is learned from what batches took, and to what fits into its memory, which is learned from those that did not.
Sessions take turns by the atoms that were evaluated for them (start-time fair queueing: Goyal, Vin, Cheng, IEEE/ACM Trans. Netw. 5, 690
(1997)), and by a little more for each frame: while one large frame is due, small sessions get about as many atoms evaluated among them as it
has, and no session is starved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final, Protocol

TARGET_S: Final = 0.1
_FIRST = 128  # atoms, until something is known
_MOST = 1 << 20
_SLOWER, _FASTER = 0.7, 1.25
_PATIENT = 500  # full batches that must have gone well before the limit of memory is tried a little further
_FURTHER = 1.1
_SHARE = 0.1  # of the time of a batch that the next one may wait
_FORGET = 1.001  # a batch: by so much the shortest one is forgotten, since engines of small systems leave
_LATE = 2.0  # a session that takes so many times as long as usual is not waited for any more
_LEARN = 0.2  # weight of what was seen last
_SLOWEST = 0.6  # of the mean rate, where evaluators share frames of different sizes
_EACH = 16  # atoms' worth of what a frame costs whatever its size: about as much with the embedded potential


class Cap:
    """The most atoms of a batch of several frames."""

    def __init__(self) -> None:
        self.atoms = _FIRST
        self._memory = _MOST  # atoms that fit
        self._well = 0

    def took(self, frames: int, atoms: int, seconds: float) -> None:
        """A batch was evaluated: learn from what it took."""
        if frames > 1 and seconds > 1.5 * TARGET_S:
            self._set(min(self.atoms, int(_SLOWER * atoms)))
        elif atoms > 0.8 * self.atoms and seconds < TARGET_S:
            self._well += 1
            if self._well >= _PATIENT:
                self._well, self._memory = 0, min(_MOST, int(_FURTHER * self._memory) + 1)
            self._set(int(_FASTER * self.atoms) + 1)

    def exhausted(self, atoms: int) -> None:
        """A batch of so many atoms did not fit into the evaluator's memory."""
        self._well = 0
        self._memory = max(1, atoms // 2)
        self._set(self.atoms)

    def _set(self, atoms: int) -> None:
        self.atoms = max(1, min(atoms, self._memory))


class Returns:
    """Who will be back in a moment: sessions that were answered together come back one by one, and go together again if the first waits.

    Without that the first one back goes alone, all others wait for it, and every second batch is one frame. A frame waits only for sessions
    that are expected within `_SHARE` of what the last batch took, or within what the shortest batch takes, since that is what a batch less
    saves; they are expected by the time they took so far from an answer to the next frame.
    """

    def __init__(self) -> None:
        self._thinks: dict[str, float] = {}  # seconds from an answer to the next frame, an average
        self._away: dict[str, float] = {}  # session → when it was answered
        self._least = math.inf  # s that the shortest batch takes

    def answered(self, session: str, now: float) -> None:
        """A session was answered, or is about to be."""
        self._away[session] = now

    def took(self, seconds: float) -> None:
        """A batch has been evaluated."""
        self._least = min(_FORGET * self._least, seconds)

    def came(self, session: str, now: float) -> None:
        """A session has sent a frame."""
        answered = self._away.pop(session, None)
        if answered is not None:
            took = now - answered
            known = self._thinks.get(session, took)
            self._thinks[session] = known + _LEARN * (took - known)

    def forget(self, session: str) -> None:
        """A session is gone."""
        self._away.pop(session, None)
        self._thinks.pop(session, None)

    def hold(self, now: float, finished: float, seconds: float) -> float:
        """Return for how many seconds to wait for sessions that will soon be back, 0 for not at all.

        Args:
            now: seconds, monotonic.
            finished: when the last batch of the evaluator that is free was done.
            seconds: what that batch took.
        """
        limit = finished + max(_SHARE * seconds, self._least if self._least < math.inf else 0.0)
        if now >= limit:
            return 0.0
        away = [(answered, self._thinks[name]) for name, answered in self._away.items() if name in self._thinks]
        due = [answered + _LATE * think for answered, think in away if answered + think <= limit]
        return max([min(moment, limit) - now for moment in due if now < moment], default=0.0)


def split(atoms: Sequence[int], evaluators: int) -> int:
    """Return how many of these frames the first of several free evaluators takes, so that small ones do not wait for large ones.

    All frames of a batch are answered together. So its frames are to be of like size, and small ones be back sooner: that makes more steps a
    second, and keeps itself up, since who was answered together comes back together. Each evaluator takes as many frames, unless the slowest
    sessions had less than `_SLOWEST` of the mean rate then: in that case the rates are made as equal as can be.

    Args:
        atoms: of each frame, ascending; at least one.
        evaluators: that are free, at least 2; the others share the rest.
    """
    sums = list(itertools.accumulate(_EACH + one for one in atoms))

    def slowest(count: int) -> float:
        """Over the mean rate."""
        fast, slow = 1.0 / sums[count - 1], (evaluators - 1) / (sums[-1] - sums[count - 1])
        return min(fast, slow) * len(sums) / (count * fast + (len(sums) - count) * slow)

    equal = -(-len(sums) // evaluators)
    if equal == len(sums) or slowest(equal) >= _SLOWEST:
        return equal
    return max(range(1, len(sums)), key=slowest)


class Item(Protocol):
    """What stands in the queue."""

    session: str
    start: float

    @property
    def atoms(self) -> int:
        """What it costs."""


class Turns:
    """Gives each frame its place in the queue: those with the least `start` first."""

    def __init__(self) -> None:
        self._now = 0.0  # the start of the last frame that went
        self._finish: dict[str, float] = {}  # by session: where its next frame may begin

    def queue(self, item: Item) -> None:
        """Set the `start` of a frame that has come."""
        item.start = max(self._now, self._finish.get(item.session, 0.0))
        self._finish[item.session] = item.start + _EACH + item.atoms

    def gone(self, items: Sequence[Item]) -> None:
        """These frames go out now."""
        self._now = max(self._now, max(item.start for item in items))

    def forget(self, session: str) -> None:
        """A session is gone."""
        self._finish.pop(session, None)


def chosen(waiting: Sequence[Item], most: int) -> list[int]:
    """Return the places in `waiting` of what goes into the next batch: the one whose turn it is, whatever its size, and what fits beside it."""
    order = sorted(range(len(waiting)), key=lambda place: waiting[place].start)
    taken: list[int] = []
    left = most
    for place in order:
        atoms = waiting[place].atoms
        if atoms <= left or not taken:
            taken.append(place)
            left -= atoms
    return taken
