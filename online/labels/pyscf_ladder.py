"""The ladder of SCF attempts: which start, how many cycles, which help, and what came of each. Knows PySCF's SCF objects, no frames.

What is measured rather than assumed: the `atom` guess needs a third fewer cycles than PySCF's default, and each of the two converges frames
on which the other fails; PySCF does not raise when the SCF fails to converge, so `converged` is asked for at every rung; with a gap
near zero only Fermi smearing converges, but the forces of a smeared state are those of its free energy, another functional: its density is
taken as a start, its energy and forces never as a label.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels import pyscf_gpu
from tumbaga.online.records import Array

HARTREE = 27.211386245988  # eV, CODATA 2018
WARM, ATOM, MINAO, LAST = "warm", "atom", "minao", "last"  # starts: a density handed in, PySCF's guesses, the density of the rung before


@dataclass(frozen=True)
class Rung:
    """One attempt at a converged SCF.

    Attributes:
        start: the initial density: handed in, a guess by PySCF's name, or the rung before.
        cycles: at most.
        level_shift: of the empty orbitals, Hartree.
        smearing: width of the Fermi function, Hartree; such a rung only prepares the one after it.
    """

    start: str
    cycles: int
    level_shift: float = 0.0
    smearing: float = 0.0

    def __str__(self) -> str:
        shift = f"+shift{self.level_shift:g}" if self.level_shift else ""
        return self.start + shift + (f"+fermi{self.smearing:g}" if self.smearing else "")


SHIFT_GAP = 0.8  # eV: where an attempt ended with less, another guess is no use and the level shift comes next
LADDER = (
    Rung(WARM, 40),
    Rung(ATOM, 40),
    Rung(MINAO, 40),
    Rung(ATOM, 60, level_shift=0.1),
    Rung(ATOM, 60, smearing=0.01),
    Rung(LAST, 60, level_shift=0.1),
)
"""The first rung that converges without smearing is the label; a warm start only where a density is handed in."""


@dataclass(frozen=True)
class Attempt:
    """What came of one rung.

    Attributes:
        rung: its name.
        cycles: done.
        change: of the energy in the last cycle, Hartree; nan after a single one.
        gap: lowest empty minus highest filled orbital of the same spin, eV; None if there is none.
        converged: whether PySCF says so.
        entropy: -TS of a smeared state, eV.
    """

    rung: str
    cycles: int
    change: float
    gap: float | None
    converged: bool
    entropy: float | None = None

    def __str__(self) -> str:
        gap = "" if self.gap is None else f", gap {self.gap:.2f} eV"
        entropy = "" if self.entropy is None else f", -TS {self.entropy:.2f} eV"
        ended = "converged in " if self.converged else ""
        return f"{self.rung}: {ended}{self.cycles} cycles, last |dE| {self.change:.1e} Ha{gap}{entropy}"


@dataclass(frozen=True)
class Solution:
    """A converged SCF: PySCF's object and the attempts that led there, the last one being its own."""

    field: Any
    history: tuple[Attempt, ...]

    @property
    def told(self) -> list[dict[str, Any]]:
        """The history as JSON has it, numbers that are not finite left out."""
        return [{key: value for key, value in asdict(one).items() if _told(value)} for one in self.history]


def _told(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


@dataclass
class _Trace:
    """Energies (Hartree) of the cycles of one attempt, collected by the SCF's callback."""

    energies: list[float] = field(default_factory=list)

    def __call__(self, local: dict[str, Any]) -> None:
        self.energies.append(float(local["e_tot"]))

    @property
    def last_change(self) -> float:
        return abs(self.energies[-1] - self.energies[-2]) if len(self.energies) > 1 else float("nan")


def climb(make: Callable[[], Any], warm: Array | None, limit: int | None, ladder: Sequence[Rung] = LADDER, gpu: bool = False) -> Solution:
    """Try rung after rung until one converges.

    Args:
        make: a new SCF object of the molecule, not yet run.
        warm: a density matrix to start from, in the orbitals of the molecule; None if none is known.
        limit: cycles of every rung at most; None leaves the ladder's own.
        ladder: the rungs, the first to be tried first.
        gpu: run on the graphics card.

    Raises:
        LabelFailedError: none converges; the sentence holds the whole history.
    """
    history: list[Attempt] = []
    last: Any = None
    for rung in ladder:
        if _useless(rung, warm, history):
            continue
        start = warm if rung.start == WARM else last.make_rdm1() if rung.start == LAST else None
        last, attempt = _run(make(), rung, start, limit, gpu)
        history.append(attempt)
        if attempt.converged and not rung.smearing:
            return Solution(last, tuple(history))
    raise LabelFailedError(_failure(history))


def _useless(rung: Rung, warm: Array | None, history: Sequence[Attempt]) -> bool:
    if rung.start == WARM:
        return warm is None
    if rung.start == LAST:
        return not history[-1].converged
    last = history[-1].gap if history else None
    return rung.start == MINAO and last is not None and last < SHIFT_GAP


def _run(made: Any, rung: Rung, start: Array | None, limit: int | None, gpu: bool) -> tuple[Any, Attempt]:
    made.max_cycle = rung.cycles if limit is None else min(rung.cycles, limit)
    made.level_shift = rung.level_shift
    if start is None:
        made.init_guess = rung.start
    if rung.smearing:
        from pyscf.scf.addons import smearing

        made = smearing(made, sigma=rung.smearing, method="fermi", fix_spin=True)
    made.callback = trace = _Trace()
    # a singular overlap or an SCF gone astray ends in one of these; all mean that this attempt has no result
    with quiet(), contextlib.suppress(np.linalg.LinAlgError, FloatingPointError, ZeroDivisionError):
        made = pyscf_gpu.run(made, start, gpu and not rung.smearing)
    converged = bool(made.converged) and bool(np.isfinite(made.e_tot))
    entropy = None if not rung.smearing or made.entropy is None else -rung.smearing * float(made.entropy) * HARTREE
    return made, Attempt(str(rung), len(trace.energies), trace.last_change, gap(made), converged, entropy)


def gap(done: Any, flip: bool = False) -> float | None:
    """The lowest empty minus the highest filled orbital energy, eV, of the spin for which it is smaller; None if there is none to be told.

    Orbitals that smearing fills by less than half count as empty. With flip, the lowest empty orbital of either spin minus the highest
    filled one of either: below zero, turning a spin over would lower the sum of orbital energies.
    """
    if done.mo_energy is None:
        return None
    channels = (
        [(np.ravel(done.mo_energy), np.ravel(done.mo_occ))]
        if flip or np.ndim(done.mo_energy) == 1
        else zip(done.mo_energy, done.mo_occ, strict=True)
    )
    full = 0.5 * float(np.max(done.mo_occ))
    gaps = [e[occupied < full].min() - e[occupied >= full].max() for e, occupied in channels if 0 < (occupied >= full).sum() < len(e)]
    return float(min(gaps)) * HARTREE if gaps and np.isfinite(gaps).all() else None


def _failure(history: Sequence[Attempt]) -> str:
    tried = "; ".join(map(str, history))
    for one in history:
        if one.entropy is not None and one.converged:
            gap_ = "no" if one.gap is None else f"a gap of {one.gap:.2f} eV"
            return (
                f"the frame has no single ground state: the SCF converges with Fermi smearing alone ({gap_}, -TS = {one.entropy:.2f} eV), "
                f"whose forces belong to another functional and are no label ({tried})"
            )
    return f"the SCF did not converge ({tried})"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep PySCF's own deprecations and overflow notes out of the worker's output: what they lead to is checked on the numbers."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", module=r"pyscf(\..*)?")
        yield
