"""The gateway's record of which versions served which force calls, kept until the learner has it in the store. No disk, no sockets."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from tumbaga.online.ramp import Mix
from tumbaga.socket_protocol import bus

MOST: Final = 4096  # moves that are kept while the learner is away; the oldest go first
_A_MESSAGE: Final = 256


@dataclass(eq=False)
class _Place:
    """Where a conversation stands."""

    mix: Mix
    calls: int = 0
    alone: int = 0  # calls since a version has served alone
    above: int = 0  # of those, with an uncertainty above the user's
    total: float = 0.0  # swap work after the last call, eV
    before: float = 0.0  # swap work before the ramp under way, eV
    ramps: bool = False


class Journal:
    """All moves of all sessions that the learner has not noted yet.

    Args:
        target: the user's force error, eV/Å.
        clock: seconds since the epoch. Moves are numbered from its microseconds on, so that no two gateways of a run use a number twice.
    """

    def __init__(self, target: float, clock: Callable[[], float] = time.time) -> None:
        self._target, self._clock = target, clock
        self._first = int(1e6 * clock())
        self._moves: deque[bus.Move] = deque()
        self._places: dict[str, _Place] = {}
        self._told: dict[str, tuple[int, int, int, int]] = {}
        self.fresh = False
        """Whether there are moves that were in no message yet."""

    def begins(self, session: str, mix: Mix, work: float) -> None:
        """The first call of a conversation was made.

        Args:
            session: its name.
            mix: of versions for this call.
            work: that swaps have done in this session so far, eV.
        """
        self._places[session] = _Place(Mix(mix.old, mix.old, 1.0), total=work)
        self._add(session, "begins", 0, new=mix.old)

    def served(self, session: str, call: int, mix: Mix, work: float, score: float | None) -> None:
        """A call was answered.

        Args:
            session: its name.
            call: number of the call in its conversation, from 0.
            mix: of versions that was served.
            work: that swaps have done in this session so far, this call included, eV.
            score: calibrated force uncertainty, eV/Å; None where it is not known.
        """
        place = self._places[session]
        place.calls = call + 1
        if mix.old != mix.new or mix.new != place.mix.new:
            self._moved(session, place, call, mix, work)
        else:
            place.alone += 1
            place.above += score is None or score > self._target
        place.mix, place.total = mix, work

    def _moved(self, session: str, place: _Place, call: int, mix: Mix, work: float) -> None:
        if mix.old == mix.new or mix[:2] != place.mix[:2]:
            old = mix.old if mix.old != mix.new else place.mix.new
            self._add(session, "ramps", call, old=old, new=mix.new, weight=mix.weight)
            if not place.ramps:  # one that is broken off leaves its work to the next
                place.before, place.ramps = place.total, True
        if place.ramps and mix.weight >= 1.0:
            self._add(session, "came", call, new=mix.new, work=work - place.before)
            place.alone, place.above, place.ramps = 0, 0, False

    def ended(self, session: str) -> bool:
        """A conversation is over; return whether there was one."""
        place = self._places.pop(session, None)
        if place is not None:
            self._add(session, "ends", place.calls)
        return place is not None

    def _add(self, session: str, what: str, call: int, *, old: int = 0, new: int = 0, weight: float = 1.0, work: float = 0.0) -> None:
        self._moves.append(bus.Move(session, what, call, self._clock(), old, new, weight, work))
        self.fresh = True
        if len(self._moves) > MOST:
            self._moves.popleft()
            self._first += 1

    def message(self) -> bus.Journal | None:
        """What is to be told now; None where there is nothing new and nothing that was not noted."""
        calls = {name: (place.calls, place.alone, place.above, place.mix.new) for name, place in self._places.items()}
        if not self._moves and calls == self._told:
            return None
        return bus.Journal(self._first, list(islice(self._moves, _A_MESSAGE)), calls)

    def sent(self, message: bus.Journal) -> None:
        """A message was taken by the line to the learner, which is not to say that it arrived."""
        self._told = message.calls
        self.fresh = len(self._moves) > len(message.moves)

    def noted(self, upto: int) -> None:
        """All moves with a smaller number are in the store."""
        while self._moves and self._first < upto:
            self._moves.popleft()
            self._first += 1
