"""The bus between tumbaga's own processes: zmq sockets, msgspec headers, raw array buffers. No pickle.

A message is one or more zmq parts: a msgpack header (a tagged struct of this file) and the buffers that the header describes.
All addresses are unix sockets in the ``bus`` folder of the run directory, reached by relative paths: every process runs with the run
directory as its working directory, so that the 107 bytes of a unix socket path never depend on where the run directory lies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

FOLDER = "bus"
EVALUATORS, LEARNER, LABELS, SUPERVISOR = "evaluators", "learner", "labels", "supervisor"
MAX_MESSAGE = 1 << 30  # bytes in one part; anything larger is refused by zmq itself

Array = npt.NDArray[np.float64]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages on the bus."""


# -- evaluator <-> gateway ---------------------------------------------------------------------------------------------------------------


class EvaluatorReady(Message, frozen=True, tag=True, array_like=True):
    """An evaluator has loaded the base potential and waits for work; `seen` is the last batch it took. Repeated about once a second."""

    name: str
    pid: int
    seen: int
    lpr_scale: float | None  # eV/Å force std per unit of last-layer score, estimated at start; None without a template or a readout
    elements: tuple[int, ...] = ()  # atomic numbers that the potential knows; empty for all
    potential: str = ""  # its name


class Load(Message, frozen=True, tag=True, array_like=True):
    """Read a version file and keep it ready beside the others; `keep` names all versions still in use."""

    version: int
    path: str
    keep: tuple[int, ...]


class Loaded(Message, frozen=True, tag=True, array_like=True):
    """The version can be served from the next batch on, or `error` says why not."""

    version: int
    error: str = ""


class Evaluate(Message, frozen=True, tag=True, array_like=True):
    """One ragged batch. Buffers: numbers int64 (n,), positions float64 (n, 3) Å, cells float64 (frames, 3, 3) Å; n counts all atoms.

    `mixes` gives for each frame (version, version, weight): served with (1 - weight) of the first and weight of the second. `members` asks
    for a committee of so many beside what is served.
    """

    batch: int
    counts: list[int]
    periodic: list[bool]
    mixes: list[tuple[int, int, float]]
    members: int = 0


class Evaluated(Message, frozen=True, tag=True, array_like=True):
    """The answer to one batch. Buffers: forces float64 (n, 3) eV/Å, virials float64 (frames, 3, 3) eV, lpr float64 (n,), NaN if none.

    With a committee three more: energies (frames, members) eV, forces (members, n, 3) eV/Å, virials (frames, members, 3, 3) eV.
    `steps` holds E(second version) - E(first version) of each frame's mix, eV: what a ramp needs for its work. `exhausted` says that the
    error was a lack of memory. `energy_stds` holds the standard deviation of each total energy, eV, NaN where it is not known.
    """

    batch: int
    energies: list[float]
    steps: list[float]
    seconds: float
    error: str = ""
    exhausted: bool = False
    energy_stds: list[float] = []


# -- gateway <-> learner -----------------------------------------------------------------------------------------------------------------


class Candidate(Message, frozen=True, tag=True, array_like=True):
    """A frame worth a look, with what was served. Buffers: numbers int64, positions float64 Å, cell float64 Å, forces float64 eV/Å.

    With a `ticket` its engine waits for the label: it is sent again every few seconds until `Settled` says what became of it.
    """

    session: str
    step: int
    reason: str
    score: float  # eV/Å
    lpr: float
    version: int
    periodic: bool
    energy: float  # eV
    ticket: int = 0


class Settled(Message, frozen=True, tag=True, array_like=True):
    """The frame that a session waits for has its label and `version` knows it; or `problem` says why there will be none."""

    session: str
    ticket: int
    version: int
    problem: str = ""


class Serve(Message, frozen=True, tag=True, array_like=True):
    """What should serve; sent at every change and about once a second, so that whoever restarts catches up.

    `hurry` is for a version that was gone back to: 1 without the rest between two ramps, 2 without a ramp.
    """

    version: int
    path: str
    lpr_scale: float | None
    quantile: float
    hurry: int = 0


class NowServing(Message, frozen=True, tag=True, array_like=True):
    """An evaluator holds the version and sessions began to move to it; or `error` says why it was refused."""

    version: int
    error: str = ""


class Move(msgspec.Struct, frozen=True, array_like=True):
    """What became of a session at a force call; `call` counts those of its conversation, from 0.

    `what` is "begins" (the conversation, with version `new`), "ramps" (from `old` to `new`, whose weight at this call is `weight`), "came"
    (this is the last call of the ramp, which has done `work`, eV) or "ends" (the conversation, after `call` calls).
    """

    session: str
    what: str
    call: int
    at: float  # seconds since the epoch
    old: int = 0
    new: int = 0
    weight: float = 1.0
    work: float = 0.0


class Journal(Message, frozen=True, tag=True, array_like=True):
    """Which versions served which calls: numbered moves, the first of which is number `first`. Sent again until `Noted` tells that they stand.

    `calls` gives for each conversation: calls answered, calls since `version` has served alone, those of them whose uncertainty was above
    the user's, and the version.
    """

    first: int
    moves: list[Move]
    calls: dict[str, tuple[int, int, int, int]]


class Noted(Message, frozen=True, tag=True, array_like=True):
    """All moves with a smaller number are in the store."""

    upto: int


class Alarm(Message, frozen=True, tag=True, array_like=True):
    """A version must not serve any longer. Sent again until something else does."""

    version: int
    reason: str


# -- learner <-> label workers -----------------------------------------------------------------------------------------------------------


class WorkerIdle(Message, frozen=True, tag=True, array_like=True):
    """A worker without work; `seen` is the last task it took. Repeated about twice a second."""

    name: str
    pid: int
    seen: int


class WorkerBusy(Message, frozen=True, tag=True, array_like=True):
    """A worker at work on a task, for `seconds` by now."""

    name: str
    pid: int
    task: int
    seconds: float


class Task(Message, frozen=True, tag=True, array_like=True):
    """Label one frame. Buffers: numbers int64, positions float64 Å, cell float64 Å."""

    task: int
    frame: int
    key: str
    periodic: bool


# -- everybody -> supervisor -------------------------------------------------------------------------------------------------------------


class LogLine(Message, frozen=True, tag=True, array_like=True):
    """A line for the log of a process that must not touch the disk itself."""

    process: str
    level: str
    event: str
    detail: dict[str, Any]


class Report(Message, frozen=True, tag=True, array_like=True):
    """The state of a process, a JSON-compatible object; repeated about twice a second."""

    process: str
    state: dict[str, Any]


AnyMessage = (
    EvaluatorReady
    | Load
    | Loaded
    | Evaluate
    | Evaluated
    | Candidate
    | Settled
    | Serve
    | NowServing
    | Journal
    | Noted
    | Alarm
    | WorkerIdle
    | WorkerBusy
    | Task
    | LogLine
    | Report
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)
Number = TypeVar("Number", bound=np.generic)


def make_folder(run_dir: Path) -> None:
    """Make the bus folder of a run directory, open to its owner only."""
    folder = run_dir / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    os.chmod(folder, 0o700)


def encode(message: AnyMessage, buffers: Sequence[npt.NDArray[Any]] = ()) -> list[bytes]:
    """Return the zmq parts of a message; buffers travel as raw C-ordered bytes."""
    return [_encoder.encode(message), *[b.tobytes() for b in buffers]]


def decode(parts: Sequence[bytes]) -> tuple[AnyMessage, list[bytes]]:
    """Return message and raw buffers.

    Raises:
        msgspec.DecodeError: the header is not one of ours (a ValidationError is one too).
    """
    return _decoder.decode(parts[0]), list(parts[1:])


def array(buffer: bytes, dtype: type[Number], shape: tuple[int, ...]) -> npt.NDArray[Number]:
    """Return a raw buffer as an array, read-only: it is not copied.

    Raises:
        ValueError: the buffer does not hold exactly that many numbers.
    """
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


class Endpoint:
    """One zmq socket of the bus: knows how to bind or connect by name, and sends and receives without ever blocking.

    Args:
        context: the process's zmq context.
        kind: zmq.ROUTER, zmq.DEALER, zmq.PUSH or zmq.PULL.
        name: one of the names of this file.
        bind: whether this process owns the name; the other side may come and go.
        identity: name under which a ROUTER sees this DEALER.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], kind: int, name: str, *, bind: bool, identity: str = "") -> None:
        self.socket = context.socket(kind)
        self.socket.linger = 0
        self.socket.maxmsgsize = MAX_MESSAGE
        self._routes = kind == zmq.ROUTER
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity.encode())
        if self._routes:
            # a peer of the same name is a restarted one and takes over; a vanished one is an error to see, not a message to drop
            self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
            self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.socket.reconnect_ivl, self.socket.reconnect_ivl_max = 20, 500  # ms
        address = f"ipc://{FOLDER}/{name}"
        if bind:
            self.socket.bind(address)
        else:
            self.socket.connect(address)

    def send(self, message: AnyMessage, buffers: Sequence[npt.NDArray[Any]] = (), to: str = "") -> bool:
        """Send at once or not at all; return whether it was taken (a full or absent peer takes nothing)."""
        parts = encode(message, buffers)
        if self._routes:
            parts.insert(0, to.encode())
        try:
            self.socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    @property
    def waiting(self) -> bool:
        """Whether a message waits to be received; costs less than to try."""
        events = self.socket.getsockopt(zmq.EVENTS)
        return bool(isinstance(events, int) and events & zmq.POLLIN)

    def receive(self) -> tuple[str, AnyMessage, list[bytes]] | None:
        """Return (sender, message, buffers), or None when nothing waits. The sender is empty except on a ROUTER."""
        try:
            parts = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        sender = parts.pop(0).decode(errors="replace") if self._routes else ""
        message, buffers = decode(parts)
        return sender, message, buffers

    def close(self) -> None:
        """Close at once; unsent messages are dropped."""
        self.socket.close()
