"""The learner's side of the journal: writes down which versions served which calls of every session, so that each force can be traced.

Calls of a session are numbered through all of its conversations, from 0; that number is what ramps and flags have in the store. The event
"conversation" says for each of them which number its first call has and which step of its engine that was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tumbaga.driver.engines import STARTED
from tumbaga.online.convergence import Standing
from tumbaga.online.store import Ramp, Store
from tumbaga.socket_protocol import bus

CONVERSATION: Final = "conversation"  # event
RAMP: Final = "ramp"  # event: the weight with which a ramp begins, which is another one where the ramp before was turned round
JOURNAL: Final = "journal"  # note: the next number, and the calls of the conversations
_KEPT_S: Final = 10.0  # between two notes of how many calls there were; moves are noted at once


@dataclass(eq=False)
class Place:
    """Where a session stands.

    Attributes:
        conversation: which one of the session, from 1.
        first_call: number of its first call.
        step: of the engine at that call; None where it is not known.
        engine: which start of an engine of this run, by its time; None for engines that come by themselves.
        calls: answered so far, as far as is known.
        over: whether that is all.
        ramp: id of the ramp under way.
        ramped: whether there was a ramp.
    """

    conversation: int
    first_call: int
    step: int | None
    engine: float | None
    calls: int = 0
    over: bool = False
    ramp: int | None = None
    ramped: bool = False


class Recorder:
    """Keeps the record of one run.

    Args:
        store: of the run.
        run_dir: the run directory.
        ramp_steps: force calls of a whole ramp.
        clock: seconds.
    """

    def __init__(self, store: Store, run_dir: Path, ramp_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._run_dir, self._ramp_steps, self._clock = store, run_dir, ramp_steps, clock
        noted: dict[str, Any] = json.loads(store.get_meta(JOURNAL) or "{}")
        self._next = int(noted.get("next", 0))
        self._places: dict[str, Place] = {}
        for kind in (CONVERSATION, RAMP):  # a kill may have come between these and the note
            self._next = max([self._next, *(event["move"] + 1 for event in store.events(kind))])
        for event in store.events(CONVERSATION):
            self._places[event["session"]] = Place(event["conversation"], event["first_call"], event["step"], event["engine"])
        for ramp in store.ramps():
            if (place := self._places.get(ramp.session)) is not None and ramp.first_step >= place.first_call:
                place.calls = max(place.calls, 1 + (ramp.first_step if ramp.last_step is None else ramp.last_step) - place.first_call)
                place.ramp = ramp.id if ramp.last_step is None else None
                place.ramped |= ramp.from_version != ramp.to_version
        for session, (calls, over) in noted.get("calls", {}).items():
            if (place := self._places.get(session)) is not None:
                place.calls, place.over = max(place.calls, calls), over
        self._keep_at = clock() + _KEPT_S
        self.standings: list[Standing] = []
        """Of the conversations that go on, as the gateway told last."""

    def number(self, session: str, call: int) -> int:
        """The number of a call among all of its session.

        Args:
            session: its name.
            call: number in the conversation.
        """
        place = self._places.get(session)
        return call if place is None else place.first_call + call

    def note(self, journal: bus.Journal) -> int:
        """Write down what is new; return the number up to which all stands in the store."""
        for number, move in enumerate(journal.moves, journal.first):
            if number >= self._next:
                self._moved(number, move)
        told = max(self._next, journal.first + len(journal.moves))
        for session, (calls, *_) in journal.calls.items():
            if (place := self._places.get(session)) is not None and not place.over:
                place.calls = max(place.calls, calls)
        if told > self._next or self._clock() > self._keep_at:
            self._next = told
            self.keep()
        self.standings = [self._standing(session, *told_of) for session, told_of in journal.calls.items() if session in self._places]
        return self._next

    def keep(self) -> None:
        """Note how many calls there were."""
        self._keep_at = self._clock() + _KEPT_S
        calls = {session: (place.calls, place.over) for session, place in self._places.items()}
        self._store.set_meta(JOURNAL, json.dumps({"next": self._next, "calls": calls}))

    def _standing(self, session: str, calls: int, alone: int, above: int, version: int) -> Standing:
        place = self._places[session]
        step = (place.first_call if place.step is None else place.step) + calls - 1
        return Standing(session, version, step, alone, above, place.ramped)

    def _moved(self, number: int, move: bus.Move) -> None:
        place = self._places.get(move.session)
        if place is None or place.over or move.what == "begins":
            if move.what == "ends":
                return
            place = self._begun(number, move, place)
        if move.what == "ramps":
            place.ramp = self._store.add_ramp(Ramp(move.session, move.old, move.new, place.first_call + move.call))
            place.ramped = True
            self._store.add_event(RAMP, move=number, ramp=place.ramp, weight=move.weight)
        elif move.what == "came" and place.ramp is not None:
            self._store.end_ramp(place.ramp, place.first_call + move.call, move.work)
            place.ramp = None
        if move.what == "ends":
            place.calls, place.over = move.call, True
        else:
            place.calls = max(place.calls, move.call + 1)

    def _begun(self, number: int, move: bus.Move, last: Place | None) -> Place:
        """A conversation; that this is not its first call happens where the learner was away for very long."""
        engine, step = self._engine()
        if engine is not None and last is not None and last.engine == engine:
            step = None if last.step is None or not last.over else last.step + last.calls  # the same engine asks on for what it lacks
        first = 0 if last is None else last.first_call + last.calls
        made = Place(1 if last is None else last.conversation + 1, first, step, engine)
        version = move.old if move.what == "ramps" else move.new
        self._store.add_ramp(Ramp(move.session, version, version, first, first, 0.0))
        told = {"session": move.session, "conversation": made.conversation, "first_call": first, "step": step, "engine": engine}
        known = {"version": version, "at": move.at, "exact": last is None or last.over, "ramp_steps": self._ramp_steps}
        self._store.add_event(CONVERSATION, move=number, **told, **known)
        self._places[move.session] = made
        return made

    def _engine(self) -> tuple[float | None, int | None]:
        """Which start of an engine of this run it is, and from which step it goes on."""
        try:
            told = json.loads((self._run_dir / STARTED).read_text())
            return float(told["at"]), int(told["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None, 0
