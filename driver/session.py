"""One engine connection as the gateway holds it: the wire on one side, frames in eV and Å on the other. Decides nothing about physics."""

from __future__ import annotations

from dataclasses import dataclass
from selectors import EVENT_WRITE

import numpy as np

from tumbaga.driver import units
from tumbaga.online.errors import BadFrameError
from tumbaga.online.flagging import Flagger
from tumbaga.online.ramp import RampState
from tumbaga.online.records import Array, Frame, Ints, Prediction
from tumbaga.socket_protocol.connection import NEED_DATA, PAUSED, Connection, Role
from tumbaga.socket_protocol.errors import RemoteProtocolError
from tumbaga.socket_protocol.events import Exit, ForceReady, GetForce, Init, PosData, Status
from tumbaga.socket_protocol.init_text import parse_init
from tumbaga.socket_protocol.streams import Address, Backoff, Dialling, Stream

_FLAT = 1e-6  # Å^3: a cell of less is none


@dataclass(frozen=True)
class Ended:
    """A conversation is over. `fault` is empty when the engine said goodbye or hung up, else the sentence for the log."""

    fault: str = ""


@dataclass(frozen=True, eq=False)
class Asked:
    """The engine asks for the force of a frame."""

    frame: Frame


class Session:
    """One address that we dial, and the conversation on it.

    Args:
        name: for the log and the extras, e.g. "unix:/tmp/ipi_cuau".
        address: where the engine listens.
        numbers: atomic numbers in the engine's order, shape (n_atoms,).
        periodic: whether the template is; a cluster's box (i-PI insists on one) is not taken for a lattice.
        backoff: delays between attempts to connect.
        ramp: where this session stands between versions.
    """

    def __init__(self, address: Address, numbers: Ints, periodic: bool, backoff: Backoff, ramp: RampState) -> None:
        self.name = str(address)
        self.address, self._numbers, self._periodic, self.backoff = address, numbers, periodic, backoff
        self.ramp = ramp
        self.flagger = Flagger()
        self.stream: Stream | None = None
        self.dialling: Dialling | None = None
        self._connection = Connection(Role.DRIVER, expected_atoms=len(numbers))
        self._result: ForceReady | None = None
        self.ticket = 0  # of the frame under way; answers to older ones are for nobody
        self.asked_at = 0.0
        self.waiting = False
        self.dial_at = 0.0
        self.forces = 0  # in this conversation
        self.refusals = 0  # conversations in a row that we ended
        self.given_up = ""
        self.swap_work = 0.0  # eV
        self.last_score = 0.0

    @property
    def state(self) -> str:
        """For `status`: dialling, connected, computing or given up."""
        if self.given_up:
            return "given up"
        return "dialling" if self.stream is None else "computing" if self.waiting else "connected"

    def connected(self, stream: Stream) -> None:
        """Begin a new conversation."""
        self.stream, self.dialling = stream, None
        self._connection = Connection(Role.DRIVER, expected_atoms=len(self._numbers))
        self._result, self.waiting, self.forces = None, False, 0
        self.flagger = Flagger()

    def fileno(self) -> int:
        """What to wait for."""
        waited_for = self.dialling if self.stream is None else self.stream
        return -1 if waited_for is None else waited_for.fileno()

    def interest(self) -> int:
        """What to wait for it to become, in the terms of `selectors` and of zmq (1 readable, 2 writable); 0 for nothing."""
        if self.stream is None:
            return 0 if self.dialling is None else EVENT_WRITE
        return self.stream.interest(self._connection)

    def receive(self) -> None:
        """Read what is there and write what is pending."""
        if self.stream is not None:
            self.stream.flush()
            self.stream.receive(self._connection)

    def turn(self) -> Asked | Ended | None:
        """Answer everything that can be answered now.

        Returns:
            A frame to evaluate, the end, or None when there is nothing more to do before something arrives.
        """
        try:
            return self._turn()
        except RemoteProtocolError as error:
            return Ended(str(error))
        except BadFrameError as error:  # well formed on the wire, and still no structure
            return Ended(f"the engine sent a frame that cannot be evaluated: {error}")

    def _turn(self) -> Asked | Ended | None:
        assert self.stream is not None
        while True:
            event = self._connection.next_event()
            if event is NEED_DATA or event is PAUSED:
                return None
            if isinstance(event, Status):
                self.stream.send(self._connection.answer_status())
            elif isinstance(event, Init):
                fault = self._check_init(event)
                if fault:
                    return Ended(fault)
            elif isinstance(event, PosData):
                if self._periodic and not event.periodic:
                    return Ended("the template is periodic, but the engine sends no cell; give one of the two what it lacks")
                self.ticket += 1
                self.waiting = True
                return Asked(self._frame(event))
            elif isinstance(event, GetForce) and self._result is not None:
                self.stream.send(self._connection.send(self._result))
                self._result = None
            elif isinstance(event, Exit):
                return Ended()

    def _check_init(self, event: Init) -> str:
        told = parse_init(event.text).numbers
        if told is not None and not np.array_equal(np.asarray(told), self._numbers):
            return f"{self.name}: the engine's INIT lists other species than the template; give the template of this engine"
        return ""

    def _frame(self, event: PosData) -> Frame:
        positions = units.length_from_wire(event.positions)
        if not event.periodic:
            return Frame(self._numbers, positions)
        cell = units.length_from_wire(event.cell)
        if not self._periodic:
            return Frame(self._numbers, _made_whole(positions, cell))
        return Frame(self._numbers, positions, cell, True)

    def answer(self, prediction: Prediction, extras: bytes) -> Asked | Ended | None:
        """Give the force of the frame under way; returns what `turn` returns."""
        self._result = ForceReady(
            units.energy_to_wire(prediction.energy),
            units.forces_to_wire(prediction.forces),
            units.virial_to_wire(prediction.virial),
            extras,
        )
        self.waiting = False
        self.forces += 1
        self.refusals = 0
        self.backoff.reset()
        self._connection.complete()
        return self.turn()

    @property
    def computing(self) -> bool:
        """Whether the engine still waits for the frame under way (it may have left)."""
        return self.waiting and self.stream is not None

    def hang_up(self) -> None:
        """Close the connection, if there is one."""
        if self.stream is not None:
            self.stream.close()
        if self.dialling is not None:
            self.dialling.close()
        self.stream = self.dialling = None
        self.waiting = False


def _made_whole(positions: Array, cell: Array) -> Array:
    """Positions of a cluster in a vacuum box, shape (n_atoms, 3), Å, put together again if the engine folded atoms into the box.

    A cluster wider than half the box is taken to be folded; each atom then goes to its image nearest to the first one.
    """
    if abs(np.linalg.det(cell)) < _FLAT:
        return positions  # a cell without a volume, as ASE has it for a slab, folds nothing
    fractional = positions @ np.linalg.inv(cell)
    if np.ptp(fractional, axis=0).max() <= 0.5:
        return positions
    away = fractional - fractional[0]
    whole: Array = (fractional - np.round(away)) @ cell
    return whole
