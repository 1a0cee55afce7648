"""Labellers for tests and drills: exact and instant or slow, and some that fail in every way a real one can. Numpy only.

A journal file, where given, receives one line when a label starts and one when it ends: it proves what was computed, and by whom.
"""

from __future__ import annotations

import enum
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.guards import COVALENT_RADII
from tumbaga.online.records import Array, Frame, Label

EXIT_CODE = 86  # of the labeller that kills its process, so that a test can tell it from other deaths


class Fault(enum.Enum):
    """How a label goes wrong."""

    NONE = "lj"
    RAISE = "raise"
    HANG = "hang"
    NAN = "nan"  # ends in a BadFrameError: no label can hold a number that is not finite
    EXIT = "exit"  # takes its process along, as running out of memory does
    WRONG = "wrong"  # forces with the wrong sign, and not a word about it


@dataclass
class ToyLabeller:
    """Lennard-Jones labels after a delay.

    Attributes:
        fault: what goes wrong.
        on: the call on which it does, from 1; 0 means on every call. Counted over all processes where there is a journal.
        delay: seconds that a label takes.
        epsilon: well depth, eV; the minimum of each pair is at the sum of the covalent radii.
        offset: energy per proton, eV: totals as large as all-electron ones, as a test of the arithmetic.
        journal: path of the journal; empty for none. Lines are "start KEY PID" and "end KEY PID".
    """

    fault: Fault = Fault.NONE
    on: int = 0
    delay: float = 0.0
    epsilon: float = 0.2
    offset: float = -1000.0
    journal: str = ""
    _calls: int = 0

    @property
    def method(self) -> str:
        """Identifies the formula; faults and delays do not belong to it."""
        return f"test:lj/epsilon{self.epsilon:g}/offset{self.offset:g}"

    def label(self, frame: Frame) -> Label:
        """Label one frame.

        Raises:
            LabelFailedError: the fault is RAISE.
            BadFrameError: the fault is NAN.
        """
        started = time.perf_counter()
        self._note("start", frame)
        self._calls += 1
        fault = self.fault if self.on in (0, self._count()) else Fault.NONE
        if fault is Fault.EXIT:
            os._exit(EXIT_CODE)
        time.sleep(self.delay)
        while fault is Fault.HANG:
            time.sleep(3600.0)
        if fault is Fault.RAISE:
            raise LabelFailedError("this labeller fails on purpose")
        energy, forces = lennard_jones(frame, self.epsilon)
        if fault is Fault.WRONG:
            forces = -forces
        energy += self.offset * float(frame.numbers.sum())
        label = Label(float("nan") if fault is Fault.NAN else energy, forces, self.method, time.perf_counter() - started)
        self._note("end", frame)
        return label

    def _note(self, what: str, frame: Frame) -> None:
        if not self.journal:
            return
        line = f"{what} {frame.key} {os.getpid()}\n".encode()
        descriptor = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)  # one write in append mode: lines of several processes do not mix
        finally:
            os.close(descriptor)

    def _count(self) -> int:
        return sum(what == "start" for what, _, _ in read_journal(self.journal)) if self.journal else self._calls


def read_journal(path: str | Path) -> list[tuple[str, str, int]]:
    """Return the lines of a journal as (start or end, frame key, process id), in order; empty if there is no such file."""
    if not Path(path).exists():
        return []
    lines = (line.split() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [(what, key, int(pid)) for what, key, pid in lines]


def lennard_jones(frame: Frame, epsilon: float) -> tuple[float, Array]:
    """Return energy (eV) and forces (n_atoms, 3), eV/Å, of the 12-6 potential between all pairs of a cluster.

    Raises:
        LabelFailedError: the frame is periodic.

    Source:
        Lennard-Jones, Proc. Phys. Soc. 43, 461 (1931); minimum -epsilon at the sum of the covalent radii.
    """
    if frame.periodic:
        raise LabelFailedError("the test labeller is for clusters only; this frame is periodic")
    first, second = np.triu_indices(len(frame), 1)
    vectors = frame.positions[second] - frame.positions[first]
    squares = np.einsum("pi,pi->p", vectors, vectors)
    minima = COVALENT_RADII[frame.numbers[first]] + COVALENT_RADII[frame.numbers[second]]
    sixth = (minima**2 / squares) ** 3
    energy = epsilon * float((sixth**2 - 2 * sixth).sum())
    pushes = (12 * epsilon * (sixth**2 - sixth) / squares)[:, None] * vectors
    forces = np.zeros((len(frame), 3))
    np.add.at(forces, second, pushes)
    np.add.at(forces, first, -pushes)
    return energy, forces
