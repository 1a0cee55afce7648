"""The gateway's end of the line to the learner: picks the frames that go there, keeps them while it is away, and hears of new versions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from random import Random

import msgspec
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver.answers import Certainty
from tumbaga.driver.pool import Outcome
from tumbaga.driver.session import Session
from tumbaga.online import flagging
from tumbaga.online.records import Array
from tumbaga.socket_protocol import bus

_MAX_UNSENT = 256  # candidates kept while the learner is away


class LearnerLink:
    """Talks to the learner without ever waiting for it.

    Args:
        context: zmq.
        settings: of the run.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], settings: configs.Config) -> None:
        self._socket = bus.Endpoint(context, zmq.ROUTER, bus.LEARNER, bind=True)
        self._enabled = settings.learn.enabled
        self._random = Random(settings.seed)
        self._flag = flagging.Settings(settings.flag.force_error, settings.flag.audit_every, settings.flag.spacing)
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

    def consider(self, session: Session, step: int, sure: Certainty, outcome: Outcome) -> None:
        """Look whether a frame that was served is worth a label; if so it goes to the learner."""
        if not self._enabled or outcome.prediction is None:
            return
        session.flagger, reason = flagging.step(session.flagger, step, sure.score, self._flag, self._random.random())
        if reason is None:
            return
        self.flags += 1
        frame, served, version = outcome.job.frame, outcome.prediction, outcome.job.mix[1]
        message = bus.Candidate(session.name, step, reason.value, sure.score or 0.0, sure.lpr, version, frame.periodic, served.energy)
        self._unsent.append((message, [frame.numbers, frame.positions, frame.cell, served.forces]))  # type: ignore[list-item]
        self.send_candidates()

    def send_candidates(self) -> None:
        """Send what waits, as far as the learner takes it."""
        self.stirred = True
        while self._unsent and self._socket.send(*self._unsent[0], to=bus.LEARNER):
            self._unsent.popleft()

    def tell(self, message: bus.NowServing) -> None:
        """Tell it what serves."""
        self.stirred = True
        self._socket.send(message, to=bus.LEARNER)

    def heard(self) -> Iterator[bus.Serve | str]:
        """Yield all that it has sent: versions to serve, and a sentence for each message that could not be read."""
        while self._socket.waiting:
            try:
                received = self._socket.receive()
            except msgspec.DecodeError as error:
                yield f"a message of the learner could not be read: {error}"
                continue
            if received is not None and isinstance(message := received[1], bus.Serve):
                yield message
        self.stirred = False
