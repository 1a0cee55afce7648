"""The evaluator process: one potential on one device, fed with ragged batches by the gateway; versions change only between batches.

It may die at any time: the gateway keeps every frame until its answer is there, and gives it to the next evaluator of that name.
"""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import numpy as np
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import process, structures
from tumbaga.driver.backends import registry
from tumbaga.driver.pool import joined
from tumbaga.driver.slot import BASE, Answer, Slot
from tumbaga.online.errors import VersionError
from tumbaga.online.ports import Trainable
from tumbaga.online.records import Array, Frame
from tumbaga.online.uncertainty import force_std
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.link import Line

_IDLE_S = 1.0
_SLOW_S, _KEPT_S = 0.1, 10.0  # what a batch takes that memory of its own would hardly make longer, and how often it gets that
_RETRY_S = 0.05  # between two attempts to reach a gateway that is being started


class Evaluator:
    """Answers the gateway's batches.

    Args:
        slot: the potential and its versions.
        line: to the gateway.
        name: under which the gateway knows it.
        lpr_scale: eV/Å of force std per unit of last-layer score, or None.
    """

    def __init__(self, slot: Slot, line: Line, name: str, lpr_scale: float | None) -> None:
        self._slot, self._line, self._name, self._lpr_scale = slot, line, name, lpr_scale
        self._seen = 0
        self._kept = False  # whether memory is kept for the next batch
        self._given_back = process.monotonic()

    def announce(self) -> None:
        """Tell the gateway that we are here."""
        spec = self._slot.potential.spec
        self._line.send(bus.EvaluatorReady(self._name, os.getpid(), self._seen, self._lpr_scale, tuple(spec.elements), spec.name))

    def turn(self) -> None:
        """Handle what has come; waits if nothing has."""
        for message, buffers in self._line.receive():
            if isinstance(message, bus.Evaluate):
                self._seen = message.batch
                told, arrays = self._evaluate(message, buffers)
                self._line.send(told, arrays)
                self._kept = True
                if told.seconds > _SLOW_S and process.monotonic() - self._given_back > _KEPT_S:
                    self.rest()
            elif isinstance(message, bus.Load):
                self._line.send(self._load(message))

    def rest(self) -> None:
        """Give back the memory that is kept for the next batch."""
        if self._kept:
            process.give_back_memory()
            self._kept, self._given_back = False, process.monotonic()

    def _load(self, message: bus.Load) -> bus.Loaded:
        try:
            self._slot.load(message.version, Path(message.path), message.keep)
        except VersionError as error:
            return bus.Loaded(message.version, str(error))
        return bus.Loaded(message.version)

    def _evaluate(self, message: bus.Evaluate, buffers: list[bytes]) -> tuple[bus.Evaluated, list[Array]]:
        started = process.monotonic()
        try:
            answers = self._slot.answer(_frames(message, buffers), message.mixes, message.members)
        except Exception as error:  # noqa: BLE001 - a process boundary: the gateway must get an answer, whatever a back end does
            seconds, told = process.monotonic() - started, f"{type(error).__name__}: {error}"
            return bus.Evaluated(message.batch, [], [], seconds, told, out_of_memory(error)), []
        return _packed(message.batch, answers, process.monotonic() - started)


def out_of_memory(error: BaseException) -> bool:
    """Whether a back end ran out of memory: torch says so in several ways, of which only one, on a GPU, is an exception of its own."""
    told = str(error).lower()
    by_name = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return by_name or "can't allocate memory" in told or "out of memory" in told or "not enough memory" in told


def _frames(message: bus.Evaluate, buffers: list[bytes]) -> list[Frame]:
    total, many = sum(message.counts), len(message.counts)
    numbers = bus.array(buffers[0], np.int64, (total,))
    positions = bus.array(buffers[1], np.float64, (total, 3))
    cells = bus.array(buffers[2], np.float64, (many, 3, 3))
    frames, end = [], 0
    for count, cell, periodic in zip(message.counts, cells, message.periodic, strict=True):
        rows = slice(end, end := end + count)
        frames.append(Frame.checked(numbers[rows], positions[rows], cell, periodic))  # the gateway has checked them
    return frames


def _packed(batch: int, answers: list[Answer], seconds: float) -> tuple[bus.Evaluated, list[Array]]:
    energies = [answer.prediction.energy for answer in answers]
    steps = [answer.step for answer in answers]
    forces = joined([answer.prediction.forces for answer in answers])
    virials = joined([answer.prediction.virial[None] for answer in answers])
    lpr = joined([answer.lpr for answer in answers])
    stds = [answer.energy_std for answer in answers]
    return bus.Evaluated(batch, energies, steps, seconds, energy_stds=stds), [forces, virials, lpr, *_committee(answers)]


def _committee(answers: list[Answer]) -> list[Array]:
    """The buffers of what the members say, none without a committee."""
    members = [answer.members for answer in answers if answer.members is not None]
    if not members:
        return []
    forces = np.concatenate([one.forces for one in members], axis=1)
    return [np.stack([one.energies for one in members]), forces, np.stack([one.virials for one in members])]


def warm_up(slot: Slot, template: Frame | None) -> float | None:
    """Evaluate the template a few times before anybody waits; return the force std per unit of score, eV/Å, or None."""
    if template is None:
        return None
    answers = [slot.answer([template], [(BASE, BASE, 0.0)]) for _ in range(3)]
    potential = slot.potential
    if not (isinstance(potential, Trainable) and potential.spec.n_hidden):
        return None
    score = float(answers[-1][0].lpr.max())
    sigma = float(force_std(potential.force_rows(template).rows, slot.covariance(BASE)).max())
    return sigma / score if np.isfinite(score) and score > 0.0 else None


def loaded(run_dir: Path, device: str) -> Slot:
    """Load the potential of a run.

    Raises:
        DriverError: it cannot be, or cannot do what the run asks of it.
    """
    settings = configs.load(run_dir)
    model, dtype = settings.potential.model, settings.potential.dtype
    slot = Slot(registry.load(model, device, dtype), lambda path: registry.of_version(model, path, device, dtype))
    if settings.serve.committee:
        slot.need_committee(settings.serve.committee)
    return slot


def serve(slot: Slot, name: str, run_dir: Path, lifeline: process.Lifeline) -> None:
    """Say that we are there, and answer batches until told to leave."""
    process.keep_memory()
    settings = configs.load(run_dir).potential
    template = structures.read_frame(settings.template) if settings.template else None
    lpr_scale = warm_up(slot, template)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reporter = process.Reporter(context, name)
    line = Line(bus.EVALUATORS, name)
    evaluator = Evaluator(slot, line, name, lpr_scale)
    reporter.log("info", "ready", potential=slot.potential.spec.name, pid=os.getpid())
    process.settle()
    while not lifeline.cut_off:
        if line.fileno() < 0:
            if not line.connect():
                lifeline.wait(_RETRY_S)
                continue
            evaluator.announce()
        readable, _, _ = select.select([line.fileno(), lifeline.fileno()], [], [], _IDLE_S)
        if line.fileno() in readable:
            evaluator.turn()
        elif not readable:
            evaluator.rest()
            evaluator.announce()


def main(run_dir: Path, lifeline: process.Lifeline) -> None:
    """Load the potential and serve it."""
    name, device = sys.argv[2:4]
    serve(loaded(run_dir, device), name, run_dir, lifeline)


if __name__ == "__main__":
    process.run("evaluator", main)
