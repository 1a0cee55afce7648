"""The server role with one client: what it is asked next, what it owes, and until when. No sockets are opened and no clock is read here.

A client is led by its own answers to STATUS. Its first force is asked for in the full classic cycle, which proves that it keeps the rules;
from then on POSDATA, GETFORCE and STATUS leave in one write. INIT is sent if, and only if, the client asks for it, and not before there is
a job, so that it can name the trajectory of that job.

Source: "Communication protocol" in the i-PI documentation; and what ASE, i-PI's drivers, LAMMPS and CP2K were seen to do.
"""

from __future__ import annotations

from dataclasses import dataclass

from tumbaga.socket_protocol.connection import Connection, Limits, Role, State, Wait
from tumbaga.socket_protocol.errors import OutOfTurnError
from tumbaga.socket_protocol.events import Event, Exit, ForceReady, GetForce, HaveData, Init, NeedInit, Ready, Status
from tumbaga.socket_protocol.jobs import Answered, Job
from tumbaga.socket_protocol.peers import Peer
from tumbaga.socket_protocol.streams import Stream

_MOST_INITS = 2  # for one job; who asks again does not listen
_MOST_STALE = 1  # old results to fetch and throw away in a row


@dataclass(frozen=True)
class ClientLimits:
    """The most that clients may take; seconds, None for no limit.

    Attributes:
        ready: from a question of ours to READY or NEEDINIT, at the start and after each force.
        job: from the frame to its forces; a DFT step may take hours.
        message: from the first byte of a message to its last.
        reading: for a client to read what was sent to it.
        farewell: for a client to leave after EXIT.
        clients: connections at a time.
        newcomers: new connections in a second, on average and at once.
        max_atoms: in a message.
        max_extras: bytes of extras in a message.
    """

    ready: float | None = 60.0
    job: float | None = None
    message: float | None = 60.0
    reading: float | None = 60.0
    farewell: float = 1.0
    clients: int = 64
    newcomers: int = 20
    max_atoms: int = 100_000
    max_extras: int = 1 << 20


class ClientGoneError(Exception):
    """The client left, or its time is up: the sentence says what came and what was expected.

    Args:
        sentence: that.
        in_peace: whether nothing was expected of it.
    """

    def __init__(self, sentence: str, *, in_peace: bool = False) -> None:
        super().__init__(sentence)
        self.in_peace = in_peace


class Client:
    """One connected client.

    Args:
        stream: to it; its owner closes it.
        peer: its kind.
        limits: what it may take.
        now: the time, seconds on any clock that the other methods are given too.
    """

    def __init__(self, stream: Stream, peer: Peer, limits: ClientLimits, now: float) -> None:
        self.stream = stream
        self.connection = Connection(Role.ENGINE, Limits(max_atoms=limits.max_atoms, max_extras=limits.max_extras))
        self.job: Job | None = None
        self.has_frame = False  # whether the job's frame was sent
        self.rid: int | None = None  # of the last job
        self.atoms: int | None = None  # of the first frame; a client has its own input with so many
        self.forces = 0
        self._idle = False  # whether nothing was expected of it when the last message came
        self._peer, self._limits = peer, limits
        self._inits = self._stale = 0
        self._partial = 0
        self._before = self.connection.state  # the last message
        self._asked_at = self._job_at = now
        self._partial_since: float | None = None
        self._writing_since: float | None = None
        self._write(now, Status())

    def __repr__(self) -> str:
        job = f" job={self.job.ticket}" if self.job else ""
        return f"<Client {self.stream.peer} {self.connection.state.name}{job} forces={self.forces}>"

    @property
    def free(self) -> bool:
        """Whether it can be given a job now."""
        return self.job is None and not self.connection.unanswered and self.connection.state in (State.READY, State.NEEDINIT)

    def take(self, job: Job, now: float) -> None:
        """Give a free client a job."""
        self.job, self.has_frame, self.rid, self.atoms = job, False, job.rid, job.atoms
        if self.connection.state is State.NEEDINIT:
            self._send_init(job, now)
        else:
            self._send_frame(job, now)

    def receive(self, now: float) -> Answered | None:
        """Read what came, react to it, and return the answer to the job if that is there.

        Raises:
            ClientGoneError: it left, or does not listen.
            RemoteProtocolError: it broke the rules.
        """
        self.stream.receive(self.connection)
        answered = None
        while not isinstance(event := self._next_event(), Wait):
            if isinstance(event, ForceReady):
                answered = self._take_force(event, now) or answered
            else:
                self._react(event, now)
        self._note(now)
        return answered

    def flush(self, now: float) -> None:
        """Write what is pending, as far as the socket takes it."""
        self.stream.flush()
        self._note(now)

    def deadline(self) -> float | None:
        """When its time is up if nothing happens before; None for never."""
        return min((until for until, _, _ in self._deadlines()), default=None)

    def check(self, now: float) -> None:
        """See whether its time is up.

        Raises:
            ClientGoneError: it is.
        """
        for until, seconds, what in self._deadlines():
            if now >= until:
                raise ClientGoneError(f"{self._overdue(what)} within {seconds:g} s")

    def _deadlines(self) -> list[tuple[float, float, str]]:
        """What is awaited now: when its time is up, the seconds it has, and which limit that is."""
        limits = self._limits
        awaited = (
            (self._writing_since, limits.reading, "reading"),
            (self._partial_since, limits.message, "message"),
            (self._job_at if self.has_frame else None, limits.job, "job"),
            (None if self.has_frame or self.free else self._asked_at, limits.ready, "ready"),
        )
        return [(since + seconds, seconds, what) for since, seconds, what in awaited if since is not None and seconds is not None]

    def _overdue(self, what: str) -> str:
        if what == "reading":
            return "it did not read what was sent to it"
        if what == "message":
            return f"it sent {self._partial} bytes of a message, and the rest was expected"
        return f"it sent nothing where {self._expected()} was expected"

    def _expected(self) -> str:
        state = self._before if self.connection.closed else self.connection.state
        if self.has_frame and self.job is not None:
            what = "HAVEDATA" if state is State.COMPUTING else "FORCEREADY"
            return f"{what} for {self.job.atoms} atoms"
        return "FORCEREADY (an old result)" if state is State.ASKED else "READY or NEEDINIT"

    # --- one step of the conversation ---------------------------------------------------------------------------------------------------

    def _next_event(self) -> Event | Wait:
        self._idle, self._before = self.free, self.connection.state
        try:
            return self.connection.next_event()
        except OutOfTurnError as problem:
            if self.has_frame and problem.message == Ready.word:
                raise ClientGoneError(f"it sent READY where {self._expected()} was expected: it ignored the frame") from problem
            raise

    def _react(self, event: Event, now: float) -> None:
        if isinstance(event, Exit):
            came = f" after {self._partial} bytes of a message" if self._partial else ""
            wanted = "" if self._idle else f" where {self._expected()} was expected"
            raise ClientGoneError(f"it closed the connection{came}{wanted}", in_peace=self._idle)
        if isinstance(event, NeedInit) and self.job is not None:
            self._send_init(self.job, now)
        elif isinstance(event, HaveData):
            self._fetch(now)
        elif isinstance(event, Ready):
            self._inits = self._stale = 0
            if self.job is not None and not self.has_frame:
                self._send_frame(self.job, now)

    def _send_init(self, job: Job, now: float) -> None:
        if self._inits == _MOST_INITS:
            raise ClientGoneError(f"it sent NEEDINIT after INIT was sent {_MOST_INITS} times, where READY was expected")
        self._inits += 1
        self._write(now, Init(job.rid, self._peer.init_text), Status())

    def _send_frame(self, job: Job, now: float) -> None:
        self.has_frame, self._job_at = True, now
        self._write(now, job.placed.sent, *((GetForce(), Status()) if self.forces else (Status(),)))

    def _fetch(self, now: float) -> None:
        """Ask for the forces that it says to have; without a frame of ours they are left over from another server."""
        if not self.has_frame:
            self._stale += 1
            if self._stale > _MOST_STALE:
                raise ClientGoneError("it sent HAVEDATA again after its old result was fetched, where READY or NEEDINIT was expected")
        self._write(now, GetForce())

    def _take_force(self, answer: ForceReady, now: float) -> Answered | None:
        job, self.job = (self.job, None) if self.has_frame else (None, self.job)
        self.has_frame = False
        if not self.connection.unanswered:
            self._write(now, Status())
        self._asked_at = now
        if job is None:
            return None
        self.forces += 1
        return Answered(job, answer, now - self._job_at)

    def _write(self, now: float, *events: Event) -> None:
        self._asked_at = now
        self.stream.send(b"".join(self.connection.send(event) for event in events))
        self._note(now)

    def _note(self, now: float) -> None:
        """Keep since when a message has been incomplete, in either direction."""
        self._partial = self.connection.partial
        self._partial_since = _since(self._partial_since, now, bool(self._partial))
        self._writing_since = _since(self._writing_since, now, self.stream.pending_out)


def _since(before: float | None, now: float, goes_on: bool) -> float | None:
    return None if not goes_on else now if before is None else before
