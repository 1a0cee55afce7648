"""Requests whose engines wait for a label: what was asked, since when, and how it ends. No sockets, no clock of its own.

A wait ends when the learner has said what became of the label and the version that knows it serves, when it says that there will be none,
when the learner has not been heard of for a while, or when the user's limit is reached. It never outlives its conversation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tumbaga.driver.firewall import Judgement, Served
from tumbaga.driver.pool import Outcome
from tumbaga.online.policy import Waited

ASK_AGAIN_S = 5.0
UNHEARD_S = 60.0  # of a learner that says something twice a second; a long fit takes some seconds


@dataclass(eq=False)
class Stall:
    """One request that waits.

    Attributes:
        session: name of its session.
        ticket: of the request.
        outcomes: its answers as they are now, of which some may be unfit to be served.
        served: the frame that is labelled.
        since: when the wait began, s.
        until: when it is in vain at last, s.
        judgement: of the answers, or None where one of them is unfit.
        problem: what is unfit about it then.
        ask_at: when the learner is asked again, s.
        asked: how often it was.
        version: that knows the label, once it is learnt.
        waited: how it ended.
    """

    session: str
    ticket: int
    outcomes: list[Outcome]
    served: Served
    since: float
    until: float
    judgement: Judgement | None = None
    problem: str = ""
    ask_at: float = 0.0
    asked: int = 0
    version: int | None = None
    waited: Waited = Waited.NOT

    @property
    def waits(self) -> bool:
        """Whether it still does."""
        return self.waited is Waited.NOT


class Stalls:
    """All requests that wait, at most one a session.

    Args:
        longest: seconds that a request may wait.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._by_session: dict[str, Stall] = {}
        self.begun = self.in_vain = 0
        self.longest_s = 0.0

    def __len__(self) -> int:
        return len(self._by_session)

    def __iter__(self) -> Iterator[Stall]:
        return iter(tuple(self._by_session.values()))

    def get(self, session: str) -> Stall | None:
        """The request of a session that waits or has waited and is not answered yet."""
        return self._by_session.get(session)

    def waited(self, session: str) -> Waited:
        """How the wait of a session's request ended; NOT if it has not, or if there was none."""
        found = self._by_session.get(session)
        return Waited.NOT if found is None else found.waited

    def begin(
        self, session: str, ticket: int, outcomes: list[Outcome], served: Served, now: float, judgement: Judgement | None, problem: str = ""
    ) -> Stall:
        """A request begins to wait."""
        self.begun += 1
        made = Stall(session, ticket, outcomes, served, now, now + self._longest, judgement, problem)
        self._by_session[session] = made
        return made

    def settled(self, session: str, ticket: int, version: int, problem: str) -> Stall | None:
        """The learner has said what became of a label; return the stall if it concerns one that waits."""
        found = self._by_session.get(session)
        if found is None or found.ticket != ticket or not found.waits:
            return None
        if problem:
            self.end(found, Waited.IN_VAIN)
        else:
            found.version = version
        return found

    def end(self, stall: Stall, waited: Waited) -> None:
        """The wait is over; the request is still to be answered."""
        stall.waited = waited
        self.in_vain += waited is Waited.IN_VAIN

    def summary(self) -> dict[str, float]:
        """For `status`."""
        return {"now": len(self), "all": self.begun, "in_vain": self.in_vain, "longest_s": self.longest_s}

    def forget(self, session: str, now: float) -> None:
        """The request was answered, or its engine has left."""
        if (found := self._by_session.pop(session, None)) is not None:
            self.longest_s = max(self.longest_s, now - found.since)

    def due(self, now: float, heard_at: float) -> tuple[list[Stall], list[Stall]]:
        """Return those whose time is up, now that the learner was last heard of at `heard_at`, and those it is to be asked for again."""
        waiting = [stall for stall in self if stall.waits]
        over = [stall for stall in waiting if now >= stall.until or now - heard_at > UNHEARD_S]
        again = [stall for stall in waiting if stall not in over and stall.version is None and now >= stall.ask_at]
        for stall in again:
            stall.ask_at = now + ASK_AGAIN_S
            stall.asked += 1
        return over, again
