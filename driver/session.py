"""One engine connection as the gateway holds it: the wire on one side, frames in eV and Å on the other. Decides nothing about physics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from selectors import EVENT_WRITE

from tumbaga.driver import units
from tumbaga.driver.box import VacuumBox
from tumbaga.driver.errors import ConfigError
from tumbaga.driver.firewall import Memory
from tumbaga.driver.species import Species, agreed, check_known
from tumbaga.online.errors import BadFrameError
from tumbaga.online.guards import QUIET, Finding
from tumbaga.online.overlap import OverlapWatch
from tumbaga.online.ramp import RampState
from tumbaga.online.records import Frame, Prediction
from tumbaga.socket_protocol.connection import NEED_DATA, PAUSED, Connection, Role, State
from tumbaga.socket_protocol.errors import RemoteProtocolError
from tumbaga.socket_protocol.events import Exit, ForceBatch, ForceReady, GetForce, Init, PosBatch, PosData, Status
from tumbaga.socket_protocol.init_text import parse_init
from tumbaga.socket_protocol.streams import Address, Backoff, Dialling, Stream

_TURN = 8  # messages that one engine may have answered before the others get their turn
_TALKATIVE, _SHORT_TURN = 100, 2  # of so many messages without a frame, the next ones come by so few
_CHATTER = 2000  # messages without a frame within a second: no engine has a reason for more
_INIT = 20  # an INIT counts as so many: it is said once a conversation, or once a force
_LONG = 256  # bytes of its text that count as a message more
_CHATTER_S = 1.0


@dataclass(frozen=True)
class Ended:
    """A conversation is over.

    Attributes:
        fault: empty when the engine said goodbye or hung up, else the sentence for the log.
        left: how it went, where it did so by itself.
    """

    fault: str = ""
    left: str = field(default="", compare=False)


@dataclass(frozen=True)
class More:
    """The engine has sent more than fits into one turn: call `turn` again after the others."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The engine asks for the forces of one frame, or of a batch without its padding."""

    frames: list[Frame]


@dataclass(frozen=True)
class Patience:
    """How long an engine may take, seconds: to finish a message that has begun, and to read something of an answer."""

    message: float = 10.0
    unread: float = 30.0


Result = Asked | Ended | More | None


class Session:
    """One connection to an address that we dial, and the conversation on it.

    Args:
        address: where the engine listens.
        template: species and periodicity, or None if INIT will tell; a cluster's box (i-PI insists on one) is not taken for a lattice.
        backoff: delays between attempts to connect.
        ramp: where this session stands between versions.
        number: of this connection among those to the same address, from 1.
        patience: time limits.
    """

    def __init__(
        self,
        address: Address,
        template: Species | None,
        backoff: Backoff,
        ramp: RampState,
        number: int = 1,
        patience: Patience = Patience(),
    ) -> None:
        self.group = str(address)
        self.name = self.group if number == 1 else f"{self.group}#{number}"
        self.address, self._template, self.backoff, self._patience = address, template, backoff, patience
        self.elements: tuple[int, ...] = ()  # that the potential knows; empty for all
        self.potential = "the potential"
        self.ramp = ramp
        self.stream: Stream | None = None
        self.dialling: Dialling | None = None
        self.ticket = 0  # of the request under way; answers to older ones are for nobody
        self.asked_at = self.dial_at = 0.0
        self.refusals = 0  # conversations in a row that we ended
        self.faults = 0  # times in a row that a conversation ended with the same fault
        self.last_fault = self.given_up = ""
        self.connected_at = 0.0
        self.brief = 0  # conversations in a row that were over within a moment
        self.swap_work = self.last_score = 0.0  # eV, eV/Å
        self._begin()

    def _begin(self) -> None:
        self.species = self._template
        atoms = None if self._template is None else len(self._template)
        # a peer on another machine must not lead us to memory of this one
        self._connection = Connection(Role.DRIVER, expected_atoms=atoms, shared=bool(self.address.path))
        self._result: ForceReady | ForceBatch | None = None
        self._boxes: list[VacuumBox] = []  # by the place of a frame in its batch
        self._overlaps: list[OverlapWatch] = []
        self._size = 0  # configurations of the request under way, padding included; 0 for a single one
        self.waiting = False
        self.forces = 0  # requests answered in this conversation
        self.memory = Memory()
        self.geometry = QUIET  # what was found in the frames under way
        self.good: tuple[int, ...] = ()  # the last two versions that have answered alone, the later one behind
        self._alone = 0  # calls that the later one has answered
        self._chatter, self._chatter_since = 0, 0.0
        self._partial_since = self._unread_since = 0.0
        self._sent = 0  # bytes, when the clock of unread answers was set

    @property
    def state(self) -> str:
        """For `status`: dialling, connected, computing or given up."""
        if self.given_up:
            return "given up"
        return "dialling" if self.stream is None else "computing" if self.waiting else "connected"

    @property
    def dialect(self) -> str:
        """How the engine sends its frames: `single`, `batched B` or `shared memory B`."""
        return self._connection.dialect

    def connected(self, stream: Stream) -> None:
        """Begin a new conversation."""
        self.stream, self.dialling = stream, None
        self._begin()

    def fileno(self) -> int:
        """What to wait for."""
        waited_for = self.dialling if self.stream is None else self.stream
        return -1 if waited_for is None else waited_for.fileno()

    def interest(self) -> int:
        """What to wait for it to become, in the terms of `selectors` (1 readable, 2 writable); 0 for nothing."""
        if self.stream is None:
            return 0 if self.dialling is None else EVENT_WRITE
        return self.stream.interest(self._connection)

    def receive(self) -> None:
        """Read what is there and write what is pending."""
        if self.stream is not None:
            if self.stream.pending_out:
                self.stream.flush()
            self.stream.receive(self._connection)

    def overdue(self, now: float) -> str:
        """Return why the engine has taken too long, or nothing. To be asked a few times a second.

        Args:
            now: seconds, monotonic.
        """
        if self.stream is None:
            return ""
        partial, unread = self._connection.partial, self.stream.unsent
        self._partial_since = (self._partial_since or now) if partial else 0.0
        if not unread or self.stream.sent != self._sent:
            self._sent, self._unread_since = self.stream.sent, now
        if partial and now - self._partial_since > self._patience.message:
            limit = f"{self._patience.message:g} s"
            return f"the engine sent {partial} bytes of a message and not the rest within {limit} (serve.message_seconds)"
        if unread and now - self._unread_since > self._patience.unread:
            limit = f"{self._patience.unread:g} s"
            return f"the engine has not read {unread} bytes of its answers within {limit} (serve.unread_seconds)"
        return ""

    # -- turns -----------------------------------------------------------------------------------------------------------------------

    def turn(self, now: float = 0.0) -> Result:
        """Answer what can be answered now, a few messages at most.

        Args:
            now: seconds, monotonic.

        Returns:
            Frames to evaluate, the end, `More`, or None when there is nothing to do before something arrives.
        """
        try:
            return self._turn(now)
        except (RemoteProtocolError, ConfigError) as error:
            return Ended(str(error))
        except BadFrameError as error:  # well formed on the wire, and still no structure
            return Ended(f"the engine sent a frame that cannot be evaluated: {error}")

    def _turn(self, now: float) -> Result:
        assert self.stream is not None
        for _ in range(_TURN if self._chatter < _TALKATIVE else _SHORT_TURN):
            left = self._leaving() if self._connection.eof else "it said EXIT"
            event = self._connection.next_event()
            if event is NEED_DATA or event is PAUSED:
                return None
            self._partial_since = 0.0  # what is incomplete from here on is another message
            if isinstance(event, (PosData, PosBatch)):
                return self._asked(event)
            if isinstance(event, Exit):
                return Ended(left=left)
            if isinstance(event, Status):
                self.stream.send(self._connection.answer_status())
            elif isinstance(event, Init):
                self._initialise(event)
            elif isinstance(event, GetForce) and self._result is not None:
                self.stream.send(self._connection.send(self._result))
                self._result = None
            length = len(event.text) if isinstance(event, Init) else 0
            if self._babbles(now, _INIT + length // _LONG if isinstance(event, Init) else 1):
                most = f"{_CHATTER} messages, or {_CHATTER // _INIT} INITs, or fewer long ones,"
                return Ended(f"the engine sent {most} within {_CHATTER_S:g} s and no frame among them, which was expected")
            if length > _LONG:
                break  # reading it took as long as a turn may take
        return More()

    def _leaving(self) -> str:
        """How the engine closes the connection: where the conversation is, and what was expected next."""
        assert self.stream is not None
        state, partial = self._connection.state, self._connection.partial
        unread = f", {self.stream.unsent} bytes of answers unread," if self.stream.unsent else ""
        if partial:
            return f"it closed the connection{unread} after {partial} bytes of a message, where the rest was expected"
        if state is State.COMPUTING:
            return f"it closed the connection{unread} while its forces were computed, where GETFORCE was expected"
        expected = "STATUS or GETFORCE" if state is State.HAVEDATA else "STATUS, INIT or POSDATA"
        return f"it closed the connection{unread} where {expected} was expected"

    def _babbles(self, now: float, messages: int) -> bool:
        self._chatter += messages
        if now - self._chatter_since > _CHATTER_S:
            self._chatter, self._chatter_since = 0, now
        return self._chatter > _CHATTER

    def _initialise(self, event: Init) -> None:
        self.species = agreed(parse_init(event.text), self._template)
        if self.species is not None:
            check_known(self.species, self.elements, self.potential)
            self._connection.expect(len(self.species))

    def _asked(self, event: PosData | PosBatch) -> Asked:
        self._size = 0 if isinstance(event, PosData) else len(event)
        frames = [event] if isinstance(event, PosData) else [event.frame(index) for index in range(event.distinct)]
        if self.species is None:
            raise ConfigError(
                "species",
                f"the engine sent {len(frames[0].positions)} atoms and did not say which; give a structure (--template FILE, or "
                "--connect ADDRESS=FILE), or let i-PI tell: <parameters>{species: Cu3Au(H2O)2}</parameters>",
            )
        if not self.forces:
            check_known(self.species, self.elements, self.potential)
        self.ticket += 1
        self.waiting = True
        self._chatter = 0
        while len(self._boxes) < len(frames):
            self._boxes.append(VacuumBox())
            self._overlaps.append(OverlapWatch())
        return Asked([self._frame(frame, self.species, self._boxes[index]) for index, frame in enumerate(frames)])

    def check(self, frames: Sequence[Frame]) -> Finding:
        """Judge the geometry of what `Asked` had; returns the worst finding."""
        found = [watch.check(frame) for watch, frame in zip(self._overlaps, frames, strict=False)]
        self.geometry = found[0] if len(found) == 1 else max(found, key=lambda finding: finding.verdict, default=QUIET)
        return self.geometry

    def answered_by(self, version: int) -> None:
        """A version has answered alone, and its answer was fit to be served."""
        if not self.good or self.good[-1] != version:
            self.good = (*self.good[-1:], version)
            self._alone = 0
        self._alone += 1

    def alone(self, version: int) -> int:
        """How many calls a version has answered alone since another one last did."""
        return self._alone if self.good[-1:] == (version,) else 0

    def last_good(self, but: int) -> int:
        """The last version other than `but` that is known to do well here; the base where there is none."""
        return next((version for version in reversed(self.good) if version != but), 0)

    @staticmethod
    def _frame(event: PosData, species: Species, box: VacuumBox) -> Frame:
        positions = units.length_from_wire(event.positions)
        if not event.periodic:
            if species.periodic:
                raise ConfigError("cell", f"{species.source} is periodic, but the engine sends no cell; give one of the two what it lacks")
            return Frame.checked(species.numbers, positions)
        cell = units.length_from_wire(event.cell)
        if species.periodic is False:
            return Frame.checked(species.numbers, box.made_whole(positions, cell))
        return Frame(species.numbers, positions, cell, True)

    def answer(self, results: Sequence[tuple[Prediction, bytes]], now: float = 0.0) -> Result:
        """Give forces and extras of the frames under way, in their order; returns what `turn` returns.

        Args:
            results: of each frame that `Asked` had.
            now: seconds, monotonic.
        """
        made = [
            ForceReady.unchecked(
                units.energy_to_wire(prediction.energy),
                units.forces_to_wire(prediction.forces),
                units.virial_to_wire(prediction.virial),
                extras,
            )
            for prediction, extras in results
        ]
        self._result = ForceBatch.of(made, self._size) if self._size else made[0]
        self.waiting = False
        self.forces += 1
        self.refusals = self.faults = 0
        self.backoff.reset()
        self._connection.complete()
        return self.turn(now)

    @property
    def computing(self) -> bool:
        """Whether the engine still waits for the frames under way (it may have left)."""
        return self.waiting and self.stream is not None

    def hang_up(self) -> None:
        """Close the connection, if there is one."""
        if self.stream is not None:
            self.stream.close()
        if self.dialling is not None:
            self.dialling.close()
        self._connection.close()
        self.stream = self.dialling = None
        self.waiting = False
