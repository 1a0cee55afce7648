"""Labels by programs that connect to us: CP2K, LAMMPS, Quantum ESPRESSO, i-PI's drivers, an ASE `SocketClient`. Å and eV outside, atomic
units towards `socket_protocol`.

The programs are foreign: the user starts them, with an input of their own that has the atoms of the frames in the same order. We only
listen. So nothing here has to be killed when a label takes too long, and no child process is needed: the label worker itself waits at the
sockets. The protocol does not say whether a self-consistent calculation converged: let the program stop where it does not, or send a JSON
object with the key `error` as extras. CP2K 2023.1, for one, only writes a warning to its own output and goes on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import numpy as np

from tumbaga.driver import units
from tumbaga.driver.errors import ConfigError
from tumbaga.online.errors import LabelFailedError, OnlineError
from tumbaga.online.labels.factory import UnknownMethodError, split_options
from tumbaga.online.labels.factory import make_labeller as _make_other
from tumbaga.online.ports import Labeller
from tumbaga.online.records import Frame, Label
from tumbaga.socket_protocol.clients import ClientLimits, Clients, Finished
from tumbaga.socket_protocol.errors import ProtocolError, TransportError
from tumbaga.socket_protocol.events import PosData
from tumbaga.socket_protocol.peers import UnknownKindError, peer_of, place
from tumbaga.socket_protocol.streams import DEFAULT_PREFIX, Address

_REMIND_S: Final = 60.0  # between two log lines that say why a label waits
_MOST_EXTRAS: Final = 10_000  # characters of a client's JSON that are kept with a label
_OPTIONS: Final = ("kind", "box", "level", "prefix")

Log = Callable[..., None]


def make_labeller(method: str, /, **options: Any) -> Labeller:
    """Return the labeller of any method: `ipi:ADDRESS` from here, all others from `tumbaga.online.labels.factory`.

    ====================  =============================================================================================================
    method                options
    ====================  =============================================================================================================
    ``ipi:unix:NAME``     kind (generic, ase, ipi, lammps, cp2k, qe), box (Å, side of the cube for frames without a cell), level (text:
    ``ipi:tcp:HOST:PORT``  the level of theory, which only the user knows), prefix; also as ``ipi:unix:NAME?kind=cp2k&box=12``
    ====================  =============================================================================================================

    Raises:
        UnknownMethodError: no such method or option, or an option's value does not fit.

    >>> make_labeller("ipi:unix:water?kind=cp2k&level=PBE").method
    'ipi:unix:water(kind=cp2k, level=PBE)'
    """
    if not method.startswith("ipi:"):
        return _make_other(method, **options)
    called, written = split_options(method)
    address, options = called.removeprefix("ipi:"), written | options
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise UnknownMethodError(method, f"has no option {unknown[0]!r}; there are {', '.join(_OPTIONS)}")
    try:
        box = float(options["box"]) if options.get("box") is not None else None
        return ClientLabeller(address, **(options | {"box": box}))
    except (TransportError, UnknownKindError) as problem:
        raise UnknownMethodError(method, f"cannot be used: {problem}") from problem
    except (TypeError, ValueError) as problem:
        raise UnknownMethodError(method, f"cannot read box = {options['box']!r} as a length in Å, a positive number") from problem


class ClientLabeller:
    """Labels by whoever connects at an address. Opens it at the first label, or at `open`.

    Args:
        address: `unix:NAME` or `tcp:HOST:PORT`.
        kind: of the programs, a row of `socket_protocol.peers.PEERS`.
        box: side of the cube for frames without a cell, Å; None leaves the choice to the kind.
        level: what the programs compute, for people and for telling labels apart; part of the method.
        prefix: what a unix NAME is prefixed with.
        time_limit: seconds from handing a frame to a program to its forces; None for no limit.

    Raises:
        AddressError: no address.
        UnknownKindError: no such kind.
        ValueError: the box is no positive length.
    """

    def __init__(
        self,
        address: str,
        kind: str = "generic",
        *,
        box: float | None = None,
        level: str = "",
        prefix: str = DEFAULT_PREFIX,
        time_limit: float | None = None,
    ) -> None:
        if box is not None and not 0.0 < box < float("inf"):
            raise ValueError(f"box is {box}, a positive length was expected")
        peer_of(kind)
        self.address = Address.parse(address, prefix)
        said = f"kind={kind}" + (f", level={level}" if level else "")
        self.method = f"ipi:{address}({said})"
        self._kind, self._box, self._time_limit = kind, box, time_limit
        self._clients: Clients | None = None
        self._futures: dict[int, Future[Label]] = {}  # by ticket
        self._begun = 0

    def __repr__(self) -> str:
        return f"<ClientLabeller {self.method} {self._clients or 'closed'}>"

    def for_worker(self, index: int, time_limit: float | None = None) -> ClientLabeller:
        """Return the same for one of several workers: the first (0) listens at the address, the others at NAME-1, NAME-2 or PORT+1, PORT+2.

        Raises:
            ConfigError: there is no such port.
        """
        made = object.__new__(ClientLabeller)
        made.__dict__.update(self.__dict__ | {"_clients": None, "_futures": {}, "_time_limit": time_limit})
        try:
            if index and self.address.path:
                made.address = Address.unix(f"{self.address.path}-{index}")
            elif index:
                made.address = dataclasses.replace(self.address, port=Address.tcp(self.address.host, self.address.port + index).port)
        except TransportError as problem:
            raise ConfigError("label.workers", f"worker {index} cannot have an address of its own: {problem}") from problem
        return made

    def check(self, template: Frame) -> None:
        """Find out before anything starts that frames like `template` cannot be labelled.

        Raises:
            ConfigError: the kind of client needs a cell or a box.
        """
        try:
            place(self._on_the_wire(template), peer_of(self._kind), self._wire_box)
        except ProtocolError as problem:
            raise ConfigError("label.method", str(problem)) from problem

    def open(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address is in use or cannot be listened at.
        """
        if self._clients is None:
            try:
                self._clients = Clients([self.address], self._kind, box=self._wire_box, limits=ClientLimits(job=self._time_limit))
            except TransportError as problem:
                raise ConfigError("label.method", str(problem)) from problem

    def label(self, frame: Frame) -> Label:
        """Label one frame; waits for a client for as long as it takes.

        Raises:
            LabelFailedError: two clients failed at it, one reported an error, or the frame cannot be sent to this kind.
            ConfigError: the address cannot be listened at.
        """
        future = self.begin(frame)
        while not future.done():
            self.turn(60.0)
        return future.result()

    def begin(self, frame: Frame) -> Future[Label]:
        """Put a frame into the queue; the result is there after some `turn`.

        Raises:
            ConfigError: the address cannot be listened at.
        """
        self.open()
        assert self._clients is not None
        future: Future[Label] = Future()
        self._begun += 1
        try:
            # flagged frames do not follow one another: with a rid of its own none is begun from the density of another one
            ticket = self._clients.submit(self._on_the_wire(frame), rid=self._begun)
        except ProtocolError as problem:
            future.set_exception(LabelFailedError(str(problem)))
        else:
            self._futures[ticket] = future
        return future

    def turn(self, timeout: float = 0.0) -> None:
        """Talk to the clients, after waiting for at most `timeout` seconds."""
        for done in self._clients.turn(timeout) if self._clients is not None else ():
            future = self._futures.pop(done.ticket)
            try:
                future.set_result(self._label(done))
            except OnlineError as problem:
                future.set_exception(problem)

    @property
    def obstacle(self) -> str:
        """Why a label waits, as a sentence; empty if none does."""
        return self._clients.obstacle if self._clients is not None else ""

    def fileno(self) -> int:
        """For a poller: readable when `turn` has something to do; -1 while closed."""
        return self._clients.fileno() if self._clients is not None else -1

    def close(self) -> None:
        """Tell the clients to leave, and close. Labels under way are dropped. Can be called twice."""
        if self._clients is not None:
            self._clients.close()
            self._clients = None

    @property
    def _wire_box(self) -> float | None:
        return None if self._box is None else float(units.length_to_wire(np.array(self._box)))

    @staticmethod
    def _on_the_wire(frame: Frame) -> PosData:
        cell = frame.cell if frame.periodic else np.zeros((3, 3))
        return PosData(units.length_to_wire(cell), units.length_to_wire(frame.positions))

    def _label(self, done: Finished) -> Label:
        if done.result is None:
            raise LabelFailedError(done.problem)
        details: dict[str, Any] = {"address": str(self.address), "kind": self._kind, "client": done.client}
        if done.result.has_stress:
            details["virial_eV"] = units.virial_from_wire(done.result.virial).tolist()
        if done.extras.values and len(done.extras.text) <= _MOST_EXTRAS:
            details["extras"] = dict(done.extras.values)
        energy, forces = units.energy_from_wire(done.result.energy), units.forces_from_wire(done.result.forces)
        return Label(energy, forces, self.method, done.seconds, details)


class ClientPool:
    """Stands where a label worker has its pool of processes, and needs none: `turn` does the work, in the worker's own loop.

    Args:
        labeller: listens from here on.
        log: of the worker, called as log(level, event, **detail).
        clock: seconds.
    """

    def __init__(self, labeller: ClientLabeller, log: Log, clock: Callable[[], float]) -> None:
        self._labeller, self._log, self._clock = labeller, log, clock
        self._remind_at = 0.0
        labeller.open()
        self._handler = _Forward(log)
        logging.getLogger(_WIRE).addHandler(self._handler)
        logging.getLogger(_WIRE).setLevel(logging.INFO)

    def schedule(self, frame: Frame) -> Future[Label]:
        """Begin a label; the time limit is the labeller's."""
        future = self._labeller.begin(frame)
        self._remind_at = self._clock()
        self.turn()
        return future

    def saved(self, frame: Frame) -> None:
        """Nothing is kept here."""

    def fileno(self) -> int:
        """For a poller: readable when `turn` has something to do."""
        return self._labeller.fileno()

    def turn(self) -> None:
        """Talk to the clients without waiting; while a label waits, say now and then what for."""
        self._labeller.turn()
        if self._labeller.obstacle and self._clock() >= self._remind_at:
            self._log("warning", "label waits", why=self._labeller.obstacle)
            self._remind_at = self._clock() + _REMIND_S

    def stop(self) -> None:
        """Tell the clients to leave, and close. Can be called twice."""
        self._labeller.close()
        logging.getLogger(_WIRE).removeHandler(self._handler)
        logging.getLogger(_WIRE).setLevel(logging.NOTSET)


_WIRE: Final = "tumbaga.socket_protocol"


class _Forward(logging.Handler):
    """Sends what the wire's loggers say to the log of the worker."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.INFO)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log(record.levelname.lower(), "clients", said=record.getMessage())
