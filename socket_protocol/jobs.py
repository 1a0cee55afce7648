"""What is asked of clients, and what comes of it: records, and nothing that acts."""

from __future__ import annotations

from dataclasses import dataclass, field

from tumbaga.socket_protocol.client_extras import NOTHING, ClientExtras
from tumbaga.socket_protocol.errors import ProtocolError
from tumbaga.socket_protocol.events import ForceReady
from tumbaga.socket_protocol.peers import Placed, Result


@dataclass(eq=False)
class Job:
    """A frame that waits for its forces.

    Attributes:
        ticket: its number.
        placed: the frame as the client gets it.
        rid: names its trajectory in INIT; clients that ask keep what they know of a trajectory, such as its density.
        problems: what went wrong with each client that had the frame.
        withdrawn: nobody wants the result any more.
    """

    ticket: int
    placed: Placed
    rid: int
    problems: list[str] = field(default_factory=list)
    withdrawn: bool = False

    @property
    def atoms(self) -> int:
        """How many atoms it has."""
        return len(self.placed.sent.positions)


@dataclass(frozen=True, eq=False)
class Answered:
    """A job and what the client answered, `seconds` after it got the frame."""

    job: Job
    answer: ForceReady
    seconds: float


class JobFailedError(ProtocolError):
    """No client could compute the forces of a frame."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return self.problem


@dataclass(frozen=True, eq=False)
class Finished:
    """How a job ended.

    Attributes:
        ticket: its number.
        result: energy, forces and virial in the frame that was submitted; None if it failed.
        extras: what else the client said.
        problem: why it failed, one sentence; empty if it did not.
        client: who computed it, or failed last.
        seconds: from handing out the frame to its forces; 0 if it failed.
    """

    ticket: int
    result: Result | None
    extras: ClientExtras = NOTHING
    problem: str = ""
    client: str = ""
    seconds: float = 0.0
