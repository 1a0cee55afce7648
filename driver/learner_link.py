"""The gateway's end of the line to the learner: keeps the frames that go there while it is away, and hears of labels and new versions."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import zmq

from tumbaga.driver.firewall import Served
from tumbaga.driver.journal import Journal
from tumbaga.online.records import Array, Reason
from tumbaga.socket_protocol import bus

_MAX_UNSENT = 256  # candidates kept while the learner is away


class LearnerLink:
    """Talks to the learner without ever waiting for it.

    Args:
        context: zmq.
        clock: seconds, monotonic.
        journal: of what the sessions were served.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], clock: Callable[[], float], journal: Journal) -> None:
        self.journal = journal
        self._alarm: bus.Alarm | None = None
        self._socket = bus.Endpoint(context, zmq.ROUTER, bus.LEARNER, bind=True)
        self._clock = clock
        self.heard_at = clock()
        """When it last said anything, or might have begun to, s."""
        self._unsent: deque[tuple[bus.Candidate, list[Array]]] = deque(maxlen=_MAX_UNSENT)
        self.flags = 0
        self.stirred = True
        """Whether the learner may have sent something: call `heard`.

        The descriptor of a zmq socket tells of changes only, and every use of the socket may swallow one: so the socket is asked each time
        that its descriptor has told, and after each use. To ask before every wait would be felt in every force call.
        """

    def fileno(self) -> int:
        """Readable when something changes; see `stirred`."""
        number = self._socket.socket.getsockopt(zmq.FD)
        assert isinstance(number, int)
        return number

    @property
    def waiting(self) -> int:
        """Candidates that the learner has not taken yet."""
        return len(self._unsent)

    def flag(self, session: str, served: Served, reason: Reason, ticket: int = 0, *, again: bool = False) -> None:
        """A frame is worth a label: it goes to the learner.

        Args:
            session: name of its session.
            served: the frame.
            reason: why.
            ticket: of the request, if its engine waits for the label.
            again: whether that was said before, perhaps to a learner that is dead by now.
        """
        self.flags += not again
        frame, said, version, sure = served.outcome.job.frame, served.outcome.prediction, served.outcome.job.mix[1], served.sure
        # what was not fit to be served is nothing to hold a label against
        energy, forces = (said.energy, said.forces) if said is not None and said.finite else (0.0, np.zeros((len(frame), 3)))
        lpr = sure.lpr if math.isfinite(sure.lpr) else 0.0
        message = bus.Candidate(session, served.step, reason.value, sure.score or 0.0, lpr, version, frame.periodic, energy, ticket)
        self._unsent.append((message, [frame.numbers, frame.positions, frame.cell, forces]))  # type: ignore[list-item]
        self.send_candidates()

    def alarm(self, alarm: bus.Alarm) -> bool:
        """A version has to go: said until something else is to serve. Return whether it was not said before."""
        new = self._alarm is None or alarm.version != self._alarm.version
        self._alarm = alarm
        self.stirred = True
        self._socket.send(alarm, to=bus.LEARNER)
        return new

    def report(self) -> None:
        """Send what the learner may have missed, and what waits; to be called a few times a second."""
        self.send_journal()
        if self._alarm is not None:
            self.alarm(self._alarm)
        self.send_candidates()

    def send_journal(self) -> None:
        """Send what the sessions were served; by itself where a conversation is over, after which the learner may soon be gone."""
        message = self.journal.message()
        self.stirred = True
        if message is not None and self._socket.send(message, to=bus.LEARNER):
            self.journal.sent(message)

    def send_candidates(self) -> None:
        """Send what waits, as far as the learner takes it; before a frame it hears of the conversation that the frame is of."""
        self.stirred = True
        if self.journal.fresh and self._unsent:
            self.send_journal()
        while self._unsent and self._socket.send(*self._unsent[0], to=bus.LEARNER):
            self._unsent.popleft()

    def tell(self, message: bus.NowServing) -> None:
        """Tell it what serves."""
        self.stirred = True
        self._socket.send(message, to=bus.LEARNER)

    def heard(self) -> Iterator[bus.Serve | bus.Settled | str]:
        """Yield all that it has sent: versions to serve, what became of labels, and a sentence for each message that could not be read."""
        while self._socket.waiting:
            try:
                received = self._socket.receive()
            except msgspec.DecodeError as error:
                yield f"a message of the learner could not be read: {error}"
                continue
            if received is not None and isinstance(message := received[1], (bus.Serve, bus.Settled)):
                self.heard_at = self._clock()
                if isinstance(message, bus.Serve) and self._alarm is not None and message.version != self._alarm.version:
                    self._alarm = None
                yield message
            elif received is not None and isinstance(message, bus.Noted):
                self.journal.noted(message.upto)
        self.stirred = False
