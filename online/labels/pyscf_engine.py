"""Labels by PySCF: Kohn-Sham DFT with density fitting for isolated clusters, and for cells at the Gamma point.

Its parts: `pyscf_ladder` gets the SCF to converge, `pyscf_start` keeps densities to start from, `pyscf_checks` says what is a label,
`pyscf_periodic` makes cells, `dispersion` adds D3 or D4, `pyscf_gpu` runs on a graphics card. The response of the integration grid belongs
into the gradient, or molecules feel a net force.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels import dispersion, geometry_gate, pyscf_checks, pyscf_gpu, pyscf_periodic, pyscf_start
from tumbaga.online.labels.pyscf_ladder import ATOM, HARTREE, WARM, Rung, Solution, climb, gap, quiet
from tumbaga.online.records import Array, Frame, Label

FITTING = "def2-universal-jfit"
LOW = "low"
_SODIUM, _RUBIDIUM = 11, 37  # the first elements with an effective core: of the lanl sets, of the def2 ones
_GRADIENT = 0.1  # of the root of conv_tol: to which the gradient of the energy by orbitals is brought
_SAME = 1e-7  # Hartree: two SCFs nearer than this are the same solution
_CHECK = (Rung(ATOM, 40),)


@dataclass(frozen=True)
class PySCFLabeller:
    """Kohn-Sham energies and forces of isolated clusters, or of cells: restricted where no electron is unpaired, unrestricted else.

    Attributes:
        xc: functional, as PySCF names it.
        basis: orbital basis.
        grid: PySCF's integration grid level.
        conv_tol: SCF convergence, Hartree; a tenth of its root is that of the gradient by orbitals.
        max_memory: MB, advisory to PySCF.
        charge: of the whole cluster, e.
        max_cycle: upper limit of the cycles of every rung; None leaves the ladder's own.
        spin: unpaired electrons, 2S, of every frame; "low" takes none or, for an odd number of electrons, one.
        ecp: effective core potential of the elements from sodium on; "" takes the one that belongs to the basis: def2 sets have one from
            rubidium on, lanl sets from sodium on; "none" keeps all electrons.
        disp: "", "d3bj" or "d4": dispersion added to energy and forces.
        densities: how many of the last frames may serve for a warm start; 0 begins every SCF cold.
        kpts: "" labels clusters, "1x1x1" cells at the Gamma point, with GTH potentials and a GTH basis; grid and ecp have no meaning then,
            and every SCF begins cold.
        ke_cutoff: of the uniform grid of cells, Hartree; forces are refused where it is too low for the elements.
        gpu: "auto" computes on a graphics card where there is one and gpu4pyscf, "never" does not.

    Set OMP_NUM_THREADS before PySCF is first imported; nothing is imported before the first label. Keeps the densities of its last labels.

    Raises:
        ValueError: an option has a value that does not exist, or needs a package that is not installed.
    """

    xc: str = "pbe"
    basis: str = "def2-svp"
    grid: int = 2
    conv_tol: float = 1e-8
    max_memory: float = 2000.0
    charge: int = 0
    max_cycle: int | None = None
    spin: str = LOW
    ecp: str = ""
    disp: str = ""
    densities: int = 16
    kpts: str = ""
    ke_cutoff: float = 400.0
    gpu: str = "auto"
    _known: pyscf_start.Densities = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spin", str(self.spin))
        object.__setattr__(self, "_known", pyscf_start.Densities(self.densities))
        if self.spin != LOW and not self.spin.isdecimal():
            raise ValueError(f"cannot read spin = {self.spin!r}; it is {LOW} or the number of unpaired electrons, such as 0, 1 or 2")
        if self.gpu not in ("auto", "never"):
            raise ValueError(f"cannot read gpu = {self.gpu!r}; it is auto or never")
        if self.kpts and (reason := pyscf_periodic.problem(self.kpts, self.basis)):
            raise ValueError(reason)
        if self.disp and (reason := dispersion.problem(self.disp)):
            raise ValueError(reason)

    @property
    def method(self) -> str:
        """Identifies the level of theory, e.g. "pyscf:pbe/def2-svp/grid2/df-jfit"; versions stand in each label's details."""
        functional = self.xc + (f"-{self.disp}" if self.disp else "")
        level = f"grid{self.grid}/df-jfit"
        if self.kpts:
            level = f"{pyscf_periodic.PSEUDO}/ke{self.ke_cutoff:g}/k{self.kpts}"
        core = "" if self.kpts else self.ecp or (self.basis if self._first_core == _SODIUM else "")  # def2's own needs no name
        said = (
            f"ecp-{core}" if core else "",
            "" if self.spin == LOW else f"spin{self.spin}",
            f"charge{self.charge:+d}" if self.charge else "",
        )
        return "/".join(["pyscf:" + functional, self.basis, level, *filter(None, said)])

    def label(self, frame: Frame) -> Label:
        """Compute energy and forces of one cluster or cell.

        Returns:
            Total energy in eV (about -5e4 for each copper atom) and forces in eV/Å. Details: converged, rung, cycles, scf (every attempt),
            start (warm or cold, from how far, and whether checked), spin (2S), s2, s2_excess, nao, gap and flip_gap (eV; see
            `pyscf_ladder.gap`), net_force (eV/Å), net_torque (eV), dispersion (eV), warnings, xc, basis, versions, peak_memory_mb (of the
            process).

        Raises:
            LabelFailedError: the frame is periodic and kpts is not set, or the other way round; it fails the geometry gate or cannot have
                this spin; the SCF does not converge on any rung, or only with smearing; spins mix; or the forces are not finite, too large
                or do not add up to zero.
        """
        started = time.perf_counter()
        if mismatch := self.mismatch(frame):
            raise LabelFailedError(mismatch)
        reason = geometry_gate.problem(frame)
        if reason is not None:
            raise LabelFailedError(f"the geometry is refused before any DFT: {reason}")
        with quiet():
            molecule = self._molecule(frame)
            found, start = self._solved(frame, molecule)
            checked = pyscf_checks.check_spin(found.solution.field) | pyscf_checks.check_forces(frame, found.forces)
            self._keep(frame, found, start)
            details = self._facts(found, start) | checked
        energy, forces = found.energy, found.forces
        if self.disp:
            added, pushes, package = dispersion.correction(self.disp, self.xc, frame, self.charge)
            energy, forces = energy + added, forces + pushes
            details |= {"dispersion": added, "versions": details["versions"] | {self.disp: package}}
        return Label(energy, forces, self.method, time.perf_counter() - started, details)

    # -- the molecule --------------------------------------------------------------------------------------------------------------

    @property
    def _first_core(self) -> int:
        """The first element with an effective core."""
        return _SODIUM if self.ecp or self.basis.lower().startswith("lanl") else _RUBIDIUM

    def mismatch(self, frame: Frame) -> str:
        """Why frames of this kind are never labelled, a sentence; empty if they are."""
        if frame.periodic == bool(self.kpts):
            return ""
        if self.kpts:
            return f"kpts = {self.kpts} is for periodic frames; this one is an isolated cluster"
        return "these PySCF labels are for isolated clusters only, and this frame is periodic; kpts=1x1x1 and a gth basis label cells"

    def _molecule(self, frame: Frame) -> Any:
        from pyscf import gto

        unpaired = self._unpaired(int(frame.numbers.sum()) - self.charge)
        if self.kpts:
            return pyscf_periodic.cell(frame, self.basis, self.ke_cutoff, self.charge, unpaired, self.max_memory)
        numbers = [] if self.ecp == "none" else sorted(set(frame.numbers.tolist()))
        cores = {gto.mole._symbol(z): self.ecp or self.basis for z in numbers if z >= self._first_core}
        molecule = gto.Mole()
        molecule.atom = [(int(z), tuple(position)) for z, position in zip(frame.numbers, frame.positions.tolist(), strict=True)]
        molecule.unit = "Angstrom"
        molecule.basis, molecule.ecp = self.basis, cores
        molecule.charge, molecule.spin = self.charge, unpaired
        molecule.max_memory, molecule.verbose = self.max_memory, 0
        try:
            # dump_input would print; parse_arg would read our own command line
            return molecule.build(dump_input=False, parse_arg=False)
        except (KeyError, RuntimeError, ValueError) as error:
            raise LabelFailedError(f"PySCF cannot set up this molecule with basis {self.basis}: {error}") from error

    def _unpaired(self, electrons: int) -> int:
        if self.spin == LOW:
            return electrons % 2
        unpaired = int(self.spin)
        if (electrons - unpaired) % 2 or unpaired > electrons:
            raise LabelFailedError(
                f"spin = {unpaired} cannot be: of {electrons} electrons an {'odd' if electrons % 2 else 'even'} number is unpaired; "
                f"use spin = {LOW}, or another charge than {self.charge}"
            )
        return unpaired

    def _made(self, molecule: Any) -> Any:
        """An SCF object of a molecule or cell, not yet run."""
        from pyscf import dft

        if self.kpts:
            made = pyscf_periodic.field(molecule, self.xc)
        else:
            made = (dft.UKS if molecule.spin else dft.RKS)(molecule, xc=self.xc).density_fit(auxbasis=FITTING)
            made.grids.level = self.grid
        # forces are of first order in the error of the density: by PySCF's own measure two paths to one state differ by some meV/Å
        made.conv_tol, made.conv_tol_grad = self.conv_tol, _GRADIENT * self.conv_tol**0.5
        made.chkfile = None
        made._chkfile.close()  # PySCF opens it before it can be told not to: nothing to leave behind when the worker is killed
        return made

    # -- from the molecule to energy and forces -------------------------------------------------------------------------------------

    def _solved(self, frame: Frame, molecule: Any) -> tuple[_Found, _Start]:
        """Solve, from a near density if there is one, and check cold what came of a warm start and is in doubt."""
        near, warm = self._known.nearest(frame), None
        if near is not None:
            warm = pyscf_start.transported(near[0].density, molecule.intor("int1e_ovlp"))
        found = self._run(molecule, warm)
        if near is None or found.solution.history[-1].rung != WARM:
            return found, _Start()
        known, distance = near
        doubt = pyscf_start.doubt(known, frame, found.energy, found.forces, found.solution.history[-1].gap)
        if doubt is None:
            return found, _Start(distance, known.chain + 1)
        return self._checked(molecule, frame, found, _Start(distance, known.chain + 1, doubt))

    def _checked(self, molecule: Any, frame: Frame, found: _Found, start: _Start) -> tuple[_Found, _Start]:
        """Solve cold as well; the lower energy is the label's."""
        try:
            cold = climb(lambda: self._made(molecule), None, self.max_cycle, _CHECK, self._on_gpu)
        except LabelFailedError:
            return found, start.after("the cold SCF does not converge", start.chain)
        lower = float(found.solution.field.e_tot) - float(cold.field.e_tot)
        if lower <= _SAME:
            return found, start.after("the same" if lower >= -_SAME else f"the cold SCF ends {-lower * HARTREE:.3f} eV higher", 0)
        self._known.forget(frame)
        outcome = f"the cold SCF ends {lower * HARTREE:.3f} eV lower and is taken; warm starts of these atoms begin anew"
        return self._differentiated(Solution(cold.field, (*found.solution.history, *cold.history))), start.after(outcome, 0)

    def _run(self, molecule: Any, warm: Array | None) -> _Found:
        return self._differentiated(climb(lambda: self._made(molecule), warm, self.max_cycle, gpu=self._on_gpu))

    def _differentiated(self, solution: Solution) -> _Found:
        from pyscf.data import nist

        gradient = pyscf_gpu.gradient(solution.field, self._on_gpu)
        gradient.grid_response = not self.kpts  # a uniform grid does not move with the atoms
        forces = -np.asarray(gradient.kernel(), dtype=np.float64) * (nist.HARTREE2EV / nist.BOHR)
        return _Found(solution, float(solution.field.e_tot) * float(nist.HARTREE2EV), forces)

    @property
    def _on_gpu(self) -> bool:
        return self.gpu == "auto" and not self.kpts and pyscf_gpu.found()

    # -- what is kept ---------------------------------------------------------------------------------------------------------------

    def _keep(self, frame: Frame, found: _Found, start: _Start) -> None:
        if not self.densities or frame.periodic:
            return
        done = found.solution.field
        density = pyscf_start.orthogonalised(np.asarray(done.make_rdm1()), done.mol.intor("int1e_ovlp"))
        self._known.add(pyscf_start.Known(frame, density, found.energy, found.forces, found.solution.history[-1].gap, start.chain))

    def _facts(self, found: _Found, start: _Start) -> dict[str, Any]:
        done, last = found.solution.field, found.solution.history[-1]
        flip = gap(done, flip=True) if done.mol.spin else None
        return {
            "converged": bool(done.converged),
            "rung": last.rung,
            "cycles": last.cycles,
            "scf": found.solution.told,
            "start": start.told,
            "spin": int(done.mol.spin),
            "nao": int(done.mol.nao),
            "gap": last.gap,
            **({"flip_gap": flip} if done.mol.spin else {}),
            "warnings": pyscf_checks.warnings_of((last.gap, flip)),
            "xc": self.xc,
            "basis": self.basis,
            "versions": pyscf_checks.versions(),
            "peak_memory_mb": pyscf_checks.peak_memory_mb(),
            **({"gpu": True} if self._on_gpu else {}),
        }


@dataclass(frozen=True, eq=False)
class _Found:
    """A converged SCF with its energy (eV) and forces (n_atoms, 3), eV/Å, both of the density functional alone."""

    solution: Solution
    energy: float
    forces: Array


@dataclass(frozen=True)
class _Start:
    """How an SCF began: warm from a frame at a distance (Å, rms) or cold, warm starts in a row, why and how it was checked."""

    distance: float | None = None
    chain: int = 0
    doubt: str = ""
    outcome: str = ""

    def after(self, outcome: str, chain: int) -> _Start:
        return _Start(self.distance, chain, self.doubt, outcome)

    @property
    def told(self) -> dict[str, Any]:
        if self.distance is None:
            return {"kind": "cold"}
        checked = {"doubt": self.doubt, "cold": self.outcome} if self.doubt else {}
        return {"kind": "warm", "rms": self.distance, "chain": self.chain} | checked
