"""A pool of clients that supply forces: the server role for any number of programs at once, in one thread, around one selector.

Jobs wait in a queue; each goes to the next free client, and nobody waits for anybody else. A client that is lost, breaks the rules or takes
too long ends with a sentence in the log; its job goes once more to another client, and then is reported as failed with what both did.

Everything is in atomic units. The clients are foreign programs that somebody else starts and stops: nothing here starts or kills one. Some
(LAMMPS, Quantum ESPRESSO) end with an error code after the EXIT that tells them to leave; that is their custom, and no failure.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Final, Self

from tumbaga.socket_protocol.addresses import Address
from tumbaga.socket_protocol.client_extras import NOTHING, read_extras
from tumbaga.socket_protocol.client_session import Client, ClientGoneError, ClientLimits
from tumbaga.socket_protocol.connection import Connection, Role, State
from tumbaga.socket_protocol.door import Door, listen_everywhere
from tumbaga.socket_protocol.errors import RemoteProtocolError
from tumbaga.socket_protocol.events import Exit, PosData
from tumbaga.socket_protocol.jobs import Answered, Finished, Job, JobFailedError
from tumbaga.socket_protocol.peers import peer_of, place
from tumbaga.socket_protocol.streams import Listener

_log = logging.getLogger(__name__)

__all__ = ["ClientLimits", "Clients", "Finished", "JobFailedError"]

_ATTEMPTS: Final = 2  # clients that a job is given to
DEFAULT_LIMITS: Final = ClientLimits()


class Clients:
    """Listens, lets clients in, and has them compute.

    Args:
        addresses: where to listen; a port of 0 lets the system choose, see `addresses`.
        kind: of all clients that come, a row of `peers.PEERS`.
        box: side of the cube for frames without a cell, Bohr; None leaves the choice to the kind.
        limits: what clients may take.
        clock: seconds, never going back.

    Raises:
        TransportError: an address is in use or cannot be listened at.
        UnknownKindError: no such kind.
    """

    def __init__(
        self,
        addresses: Iterable[Address],
        kind: str = "generic",
        *,
        box: float | None = None,
        limits: ClientLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peer, self._box, self._limits, self._clock = peer_of(kind), box, limits, clock
        self._door = Door(listen_everywhere(addresses), limits.clients, limits.newcomers, clock())
        self._selector = selectors.DefaultSelector()
        self._clients: dict[Client, int] = {}  # → what the selector is asked for; the order is that of the last use
        self._queue: deque[Job] = deque()
        self._finished: list[Finished] = []
        self._tickets = 0
        self._lost = 0
        self._door_open = False
        self._tend_door(clock())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Clients connected={self.connected} free={self.free} waiting={self.waiting} refused={self.refused}>"

    def fileno(self) -> int:
        """For another selector or poller: readable when a `turn` has something to do (Linux)."""
        return int(self._selector.fileno())

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens, ports as they are."""
        return tuple(listener.address for listener in self._door.listeners)

    @property
    def connected(self) -> int:
        """How many clients are there."""
        return len(self._clients)

    @property
    def free(self) -> int:
        """How many of them wait for a job."""
        return sum(client.free for client in self._clients)

    @property
    def waiting(self) -> int:
        """How many jobs wait for a client."""
        return len(self._queue)

    @property
    def refused(self) -> int:
        """How many connections were one too many."""
        return self._door.refused

    @property
    def lost(self) -> int:
        """How many clients have ended, whichever way."""
        return self._lost

    @property
    def obstacle(self) -> str:
        """Why the first job waits, as a sentence; empty if none does."""
        if not self._queue:
            return ""
        where = " and ".join(str(address) for address in self.addresses)
        if not self._clients:
            return f"no client is connected at {where}; start one there, kind {self._peer.kind}"
        atoms = {client.atoms for client in self._clients}
        if None not in atoms and self._queue[0].atoms not in atoms:
            return f"the frame has {self._queue[0].atoms} atoms and the clients at {where} compute {sorted(filter(None, atoms))}"
        return f"{len(self._clients)} clients at {where} are busy or not ready"

    # --- jobs ---------------------------------------------------------------------------------------------------------------------------

    def submit(self, frame: PosData, rid: int = 0) -> int:
        """Put a frame into the queue, hand it to a client if one is free, and return its ticket.

        Args:
            frame: cell and positions, Bohr; its atoms in the order of the client's own input.
            rid: names the trajectory (int32): keep it the same for frames that follow one another.

        Raises:
            NeedsCellError: it has no cell, and this kind of client cannot do without.
        """
        placed = place(frame, self._peer, self._box)
        self._tickets += 1
        self._queue.append(Job(self._tickets, placed, rid))
        self._hand_out(self._clock())
        return self._tickets

    def withdraw(self, ticket: int) -> None:
        """Forget a job: its result, should it come, is thrown away. A client at work on it goes on."""
        self._queue = deque(job for job in self._queue if job.ticket != ticket)
        for client in self._clients:
            if client.job is not None and client.job.ticket == ticket:
                client.job.withdrawn = True

    def turn(self, timeout: float = 0.0) -> list[Finished]:
        """Do what is to be done now, after waiting for something for at most `timeout` seconds, and return the jobs that ended."""
        now = self._clock()
        self._tend_door(now)
        # clients at work before those who want to come in
        ready = self._selector.select(0.0 if self._finished else self._patience(timeout, now))
        ready.sort(key=lambda item: isinstance(item[0].data, Listener))
        now = self._clock()
        for key, mask in ready:
            if isinstance(key.data, Listener):
                self._let_in(key.data, now)
            elif key.data in self._clients:
                self._serve(key.data, mask, now)
        for client in list(self._clients):
            if (until := client.deadline()) is not None and now >= until:
                self._act(client, partial(client.check, now))
        self._hand_out(now)
        finished, self._finished = self._finished, []
        return finished

    def forces(self, frame: PosData, rid: int = 0, timeout: float | None = None) -> Finished:
        """Have one frame computed and wait for it; the jobs of `submit` that end meanwhile are kept for the next `turn`.

        Args:
            frame: as for `submit`.
            rid: as for `submit`.
            timeout: seconds in all, the wait for a client included; None for no limit.

        Raises:
            JobFailedError: two clients failed at it, one reported an error, or the time is up; says which.
            NeedsCellError: as for `submit`.
        """
        ticket, others = self.submit(frame, rid), []
        until = None if timeout is None else self._clock() + timeout
        try:
            while True:
                for done in self.turn(60.0 if until is None else max(0.0, min(60.0, until - self._clock()))):
                    if done.ticket != ticket:
                        others.append(done)
                    elif done.result is None:
                        raise JobFailedError(done.problem)
                    else:
                        return done
                if until is not None and self._clock() >= until:
                    obstacle = self.obstacle or "a client is at work on it"
                    raise JobFailedError(f"there were no forces within {timeout:g} s: {obstacle}")
        finally:
            self.withdraw(ticket)
            self._finished = others + self._finished

    def close(self) -> None:
        """Tell every client to leave, give them a moment, and close. Jobs that are left are dropped. Can be called twice."""
        self._door.close()
        leaving = list(self._clients)
        for client in leaving:
            self._say_exit(client)
        _wait_for_the_end(leaving, self._limits.farewell)
        for client in leaving:
            client.stream.close()
        self._clients.clear()
        self._queue.clear()
        self._selector.close()

    # --- one turn -----------------------------------------------------------------------------------------------------------------------

    def _patience(self, timeout: float, now: float) -> float:
        deadlines = [until for client in self._clients if (until := client.deadline()) is not None]
        if not self._door_open:
            deadlines.append(self._door.rests_until)  # somebody may be waiting in front of it
        return max(0.0, min([timeout, *(until - now for until in deadlines)]))

    def _tend_door(self, now: float) -> None:
        """Listen, or not for a moment."""
        open_now = not self._door.resting(now)
        if open_now is self._door_open:
            return
        for listener in self._door.listeners:
            if open_now:
                self._selector.register(listener, selectors.EVENT_READ, listener)
            else:
                self._selector.unregister(listener)
        self._door_open = open_now

    def _let_in(self, listener: Listener, now: float) -> None:
        for stream in self._door.enter(listener, len(self._clients), now):
            client = Client(stream, self._peer, self._limits, now)
            self._clients[client] = selectors.EVENT_READ
            self._selector.register(stream, selectors.EVENT_READ, client)
            _log.info("client %s came in, %d are connected", stream.peer, len(self._clients))
            self._watch(client)

    def _serve(self, client: Client, mask: int, now: float) -> None:
        def step() -> None:
            if mask & selectors.EVENT_WRITE:
                client.flush(now)
            if mask & selectors.EVENT_READ and (answered := client.receive(now)) is not None:
                self._conclude(client, answered)

        self._act(client, step)

    def _act(self, client: Client, step: Callable[[], None]) -> None:
        """Take a step with a client; if that ends it, see to its job."""
        try:
            step()
        except (ClientGoneError, RemoteProtocolError) as problem:
            self._lose(client, problem)
        else:
            self._watch(client)

    def _watch(self, client: Client) -> None:
        mask = client.stream.interest(client.connection) or selectors.EVENT_READ
        if mask != self._clients[client]:
            self._selector.modify(client.stream, mask, client)
            self._clients[client] = mask

    def _hand_out(self, now: float) -> None:
        """Give jobs to free clients: the one that knows the trajectory, else the one that has been idle longest."""
        if not self._queue:
            return
        free = [client for client in self._clients if client.free]
        for job in list(self._queue) if free else ():
            fitting = [client for client in free if client.atoms in (None, job.atoms)]
            if not fitting:
                continue
            chosen = next((client for client in fitting if client.rid == job.rid), fitting[0])
            free.remove(chosen)
            self._queue.remove(job)
            self._clients[chosen] = self._clients.pop(chosen)
            self._act(chosen, partial(chosen.take, job, now))
            if not free:
                return

    def _conclude(self, client: Client, answered: Answered) -> None:
        job, extras = answered.job, read_extras(answered.answer.extras)
        if job.withdrawn:
            return
        if extras.error is not None:
            problem = f"the client {client.stream.peer} reports an error: {extras.error}"
            self._finished.append(Finished(job.ticket, None, extras, problem, client.stream.peer))
            return
        result = job.placed.result(answered.answer)
        self._finished.append(Finished(job.ticket, result, extras, "", client.stream.peer, answered.seconds))

    def _lose(self, client: Client, problem: ClientGoneError | RemoteProtocolError) -> None:
        """End a client; its job goes back to the head of the queue, once."""
        job, peer = client.job, client.stream.peer
        in_peace = isinstance(problem, ClientGoneError) and problem.in_peace
        _log.log(logging.INFO if in_peace else logging.WARNING, "client %s ended: %s", peer, problem)
        self._lost += 1
        del self._clients[client]
        self._selector.unregister(client.stream)
        self._say_exit(client)
        client.stream.close()
        if job is None or job.withdrawn:
            return
        if client.has_frame:
            job.problems.append(f"client {peer}: {problem}")
        if len(job.problems) < _ATTEMPTS:
            self._queue.appendleft(job)
        else:
            summary = f"{_ATTEMPTS} clients failed at this frame: {'; '.join(job.problems)}"
            self._finished.append(Finished(job.ticket, None, NOTHING, summary, peer))

    def _say_exit(self, client: Client) -> None:
        if client.connection.state is not State.CLOSED:
            client.stream.send(client.connection.send(Exit()))


def _wait_for_the_end(leaving: list[Client], seconds: float) -> None:
    """Read away what clients still send until each has closed its side, so that none sees a reset connection. In real time."""
    until = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for client in leaving:
            selector.register(client.stream, selectors.EVENT_READ, (client, Connection(Role.ENGINE)))
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                client, sink = key.data
                client.stream.flush()
                client.stream.receive(sink)
                if sink.eof or not sink.wants_data:
                    selector.unregister(key.fileobj)
