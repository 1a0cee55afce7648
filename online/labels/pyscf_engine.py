"""Labels by PySCF: Kohn-Sham DFT with density fitting for isolated clusters. The only file of the program that knows PySCF.

What is measured rather than assumed: the `atom` guess needs a third fewer cycles than PySCF's default; PySCF does not raise when the SCF
fails to converge, so `converged` is asked for at every rung; the response of the integration grid belongs into the gradient, or molecules
feel a net force.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels import geometry_gate
from tumbaga.online.records import Array, Frame, Label

MAX_FORCE = 30.0  # eV/Å: beyond it a label teaches the repulsive wall and nothing else
NET_FORCE = 0.01  # eV/Å times sqrt(n_atoms)
FITTING = "def2-universal-jfit"
_FIRST_ECP = 37  # def2 sets have all electrons up to krypton, effective cores from rubidium on


@dataclass(frozen=True)
class Rung:
    """One attempt at a converged SCF: the initial guess, how many cycles at most, and a level shift (Hartree)."""

    guess: str
    cycles: int
    level_shift: float = 0.0

    def __str__(self) -> str:
        return self.guess + (f"+shift{self.level_shift:g}" if self.level_shift else "")


LADDER = (Rung("atom", 40), Rung("minao", 40), Rung("atom", 60, level_shift=0.1))
"""Each guess converges frames on which the other fails; the level shift comes last, being the slowest."""


@dataclass
class _Trace:
    """Energies (Hartree) of the cycles of one attempt, collected by the SCF's callback."""

    energies: list[float] = field(default_factory=list)

    def __call__(self, local: dict[str, Any]) -> None:
        self.energies.append(float(local["e_tot"]))

    @property
    def last_change(self) -> float:
        return abs(self.energies[-1] - self.energies[-2]) if len(self.energies) > 1 else float("nan")


@dataclass(frozen=True)
class PySCFLabeller:
    """Kohn-Sham energies and forces of isolated clusters; low spin: a singlet, or a doublet for an odd number of electrons.

    Attributes:
        xc: functional, as PySCF names it.
        basis: orbital basis; elements from rubidium on get the effective core potential of the same name.
        grid: PySCF's integration grid level.
        conv_tol: SCF convergence, Hartree.
        max_memory: MB, advisory to PySCF.
        charge: of the whole cluster, e.
        max_cycle: upper limit of the cycles of every rung; None leaves the ladder's own.

    Set OMP_NUM_THREADS before PySCF is first imported; nothing is imported before the first label.
    """

    xc: str = "pbe"
    basis: str = "def2-svp"
    grid: int = 2
    conv_tol: float = 1e-8
    max_memory: float = 2000.0
    charge: int = 0
    max_cycle: int | None = None

    @property
    def method(self) -> str:
        """Identifies the level of theory, e.g. "pyscf:pbe/def2-svp/grid2/df-jfit"; versions stand in each label's details."""
        charge = f"/charge{self.charge:+d}" if self.charge else ""
        return f"pyscf:{self.xc}/{self.basis}/grid{self.grid}/df-jfit{charge}"

    def label(self, frame: Frame) -> Label:
        """Compute energy and forces of one cluster.

        Returns:
            Total energy in eV (about -5e4 for each copper atom) and forces in eV/Å. Details: cycles, rung, spin (2S), s2, nao,
            converged, gap (eV), net_force (eV/Å), versions.

        Raises:
            LabelFailedError: the frame is periodic, fails the geometry gate, the SCF does not converge on any rung, or the forces are
                not finite, too large or do not add up to zero.
        """
        started = time.perf_counter()
        if frame.periodic:
            raise LabelFailedError("PySCF labels are for isolated clusters only; this frame is periodic")
        reason = geometry_gate.problem(frame)
        if reason is not None:
            raise LabelFailedError(f"the geometry is refused before any DFT: {reason}")
        with _quiet():
            molecule = self._molecule(frame)
            field_, rung, trace = self._converge(molecule)
            energy, forces = _energy_and_forces(field_)
        net = _checked_net_force(forces)
        details = _details(field_) | {"rung": str(rung), "cycles": len(trace.energies), "net_force": net}
        return Label(energy, forces, self.method, time.perf_counter() - started, details)

    def _molecule(self, frame: Frame) -> Any:
        from pyscf import gto

        heavy = {gto.mole._symbol(int(z)): self.basis for z in set(frame.numbers.tolist()) if z >= _FIRST_ECP}
        electrons = int(frame.numbers.sum()) - self.charge
        molecule = gto.Mole()
        molecule.atom = [(int(z), tuple(position)) for z, position in zip(frame.numbers, frame.positions.tolist(), strict=True)]
        molecule.unit = "Angstrom"
        molecule.basis, molecule.ecp = self.basis, heavy
        molecule.charge, molecule.spin = self.charge, electrons % 2
        molecule.max_memory, molecule.verbose = self.max_memory, 0
        try:
            # dump_input would print; parse_arg would read our own command line
            return molecule.build(dump_input=False, parse_arg=False)
        except (KeyError, RuntimeError, ValueError) as error:
            raise LabelFailedError(f"PySCF cannot set up this molecule with basis {self.basis}: {error}") from error

    def _converge(self, molecule: Any) -> tuple[Any, Rung, _Trace]:
        tried = []
        for rung in LADDER:
            attempt, trace = self._attempt(molecule, rung)
            if attempt.converged and np.isfinite(attempt.e_tot):
                return attempt, rung, trace
            tried.append(f"{rung}: {len(trace.energies)} cycles, last |dE| {trace.last_change:.1e} Ha")
        raise LabelFailedError("the SCF did not converge (" + "; ".join(tried) + ")")

    def _attempt(self, molecule: Any, rung: Rung) -> tuple[Any, _Trace]:
        from pyscf import dft

        attempt = (dft.UKS if molecule.spin else dft.RKS)(molecule, xc=self.xc).density_fit(auxbasis=FITTING)
        attempt.grids.level = self.grid
        attempt.conv_tol = self.conv_tol
        attempt.max_cycle = rung.cycles if self.max_cycle is None else min(rung.cycles, self.max_cycle)
        attempt.init_guess, attempt.level_shift = rung.guess, rung.level_shift
        attempt.chkfile = None  # nothing to leave behind when the worker is killed
        attempt.callback = trace = _Trace()
        # a singular overlap or an SCF gone astray ends in one of these; all mean that this attempt has no result
        with contextlib.suppress(np.linalg.LinAlgError, FloatingPointError, ZeroDivisionError):
            attempt.kernel()
        return attempt, trace


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep PySCF's own deprecations and overflow notes out of the worker's output: what they lead to is checked on the numbers."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", module=r"pyscf(\..*)?")
        yield


def _energy_and_forces(converged: Any) -> tuple[float, Array]:
    from pyscf.data import nist

    gradient = converged.nuc_grad_method()
    gradient.grid_response = True
    forces = -np.asarray(gradient.kernel(), dtype=np.float64) * (nist.HARTREE2EV / nist.BOHR)
    return float(converged.e_tot) * float(nist.HARTREE2EV), forces


def _checked_net_force(forces: Array) -> float:
    if not np.isfinite(forces).all():
        raise LabelFailedError("a force of the label is not finite")
    largest = float(np.linalg.norm(forces, axis=1).max())
    if largest > MAX_FORCE:
        raise LabelFailedError(f"the largest force of the label is {largest:.1f} eV/Å; beyond {MAX_FORCE:.0f} nothing is to be learnt")
    net = float(np.linalg.norm(forces.sum(axis=0)))
    if net > NET_FORCE * np.sqrt(len(forces)):
        raise LabelFailedError(f"the forces of the label add up to {net:.3f} eV/Å instead of zero")
    return net


def _details(converged: Any) -> dict[str, Any]:
    molecule = converged.mol
    details: dict[str, Any] = {
        "converged": bool(converged.converged),
        "spin": int(molecule.spin),
        "nao": int(molecule.nao),
        "gap": _gap(converged),
        "versions": {"pyscf": importlib.metadata.version("pyscf")},
    }
    if molecule.spin:
        details["s2"] = float(converged.spin_square()[0])
    return details


def _gap(converged: Any) -> float | None:
    """The lowest empty minus the highest occupied orbital energy over both spins, eV; None if there is no empty or no filled one."""
    from pyscf.data import nist

    energies, filled = np.ravel(converged.mo_energy), np.ravel(converged.mo_occ) > 0
    if filled.all() or not filled.any():
        return None
    return float((energies[~filled].min() - energies[filled].max()) * nist.HARTREE2EV)
