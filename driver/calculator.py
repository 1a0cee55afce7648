"""`Tumbaga`: an ASE calculator that evaluates in the process of the script, with the numbers and the uncertainty of the server.

For a script that needs forces and does not need learning; `tumbaga.driver.serving` starts a server for one that does.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import CalculationFailed, Calculator, PropertyNotImplementedError, all_changes
from ase.data import chemical_symbols
from ase.outputs import all_outputs
from ase.stress import full_3x3_to_voigt_6_stress

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.answers import UNKNOWN_STD, certainty
from tumbaga.driver.backends import registry
from tumbaga.driver.errors import ConfigError, DriverError, PotentialError, RunDirError
from tumbaga.driver.evaluator import warm_up
from tumbaga.driver.rollout import hash_of, read_serving
from tumbaga.driver.slot import BASE, Slot
from tumbaga.online import guards, versions
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Array, Frame
from tumbaga.online.uncertainty import force_std
from tumbaga.socket_protocol import bus

DEFAULT_MODEL = "painn:cuau-water"
_KEPT = 8  # potentials held for calculators to come
_OWN = bus.Serve(BASE, "", None, 2.0)  # the potential as it was loaded
_loading = threading.Lock()  # two threads must not load the same potential twice


class RefusedError(DriverError, CalculationFailed):  # type: ignore[misc] # ASE has no types
    """A frame or its forces are unphysical: the server would have closed the connection, the calculator gives no number."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class _Source:
    """Which weights serve, and where the scale of the uncertainty comes from."""

    model: str
    dtype: str
    serving: bus.Serve = _OWN  # path: of the version's file; lpr_scale: force std per score, if the learner has noted it
    template: Frame | None = None  # else that is measured on this


class Tumbaga(Calculator):  # type: ignore[misc] # ASE has no types
    """Energy, forces, stress and their uncertainty from a potential loaded into this process.

    Results, beside ASE's `energy`, `free_energy` (the same), `forces` and `stress` (eV, eV/Å, eV/Å³; the stress only where the atoms
    are periodic):

    - `force_std`: largest force standard deviation of any atom, eV/Å, before calibration, as in the server's extras; NaN where it is not
      known (there the extras say 1000000);
    - `force_std_atom`: the index of that atom; -1 where no atom has a score;
    - `force_stds`: standard deviation of each atom's force, norm over xyz, shape (n_atoms,), eV/Å; NaN where not known. Only when asked for,
      with `calc.get_property("force_stds", atoms)`: it is exact for the posterior of the readout and costs some force calls, where
      `force_std` is an estimate that costs nothing, the largest last-layer score times a scale; the two can differ by a factor;
    - `energy_std`: standard deviation of the total energy up to a constant for each element, eV, calibrated with held-out labels; NaN where it
      is not known, as before the first label;
    - `version`: "NUMBER-HASH" of the weights, as in the extras; "0-base" for a potential as it was loaded.

    The scale of the estimate is the learner's where a run has noted one, else it is measured once, on `template`, as the server does.

    Args:
        model: "painn:cuau-water" (the default), "painn:FILE", "toy:lj"; not together with `run`.
        device: "auto", "cpu", "cuda".
        dtype: "float32" or "float64"; None means float32, or that of the run.
        run: a run directory, also of a run that goes on: it is only read. Gives model, dtype, template and the newest version that was
            fit to serve. The version stays the one found now; make a new calculator for a newer one.
        version: of the run, instead of the newest.
        template: Atoms on which the scale is measured; None means the run's template, or else the first frame of each composition.

    Raises:
        PotentialError: the potential cannot be found or loaded.
        ConfigError: arguments that exclude each other, a run directory without settings, a template periodic in some directions only.
        RunDirError: the run directory has no such version.
        VersionError: the version's file is damaged.
    """

    implemented_properties = [  # noqa: RUF012
        "energy",
        "free_energy",
        "forces",
        "stress",
        "force_std",
        "force_std_atom",
        "force_stds",
        "energy_std",
        "version",
    ]
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        model: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        *,
        run: str | Path | None = None,
        version: int | None = None,
        template: Any = None,
    ) -> None:
        source = _plain(model, dtype, version) if run is None else _of_run(Path(run), model, dtype, version)
        self._slot = Slot(
            shared_potential(source.model, device, source.dtype),
            lambda path: registry.of_version(source.model, path, device, source.dtype),
        )
        self._number, self._scale = source.serving.version, source.serving.lpr_scale
        if source.serving.path:
            self._slot.load(self._number, Path(source.serving.path), ())
        self.version = f"{self._number}-{hash_of(source.serving)}"
        # a scale that the learner noted, or one measured on a template, is for all frames; else each composition has its own
        self._measured_on: bytes | None = None
        reference = source.template if template is None else _frame(template)
        silent = not self._slot.potential.spec.n_hidden  # no readout, no uncertainty
        self._fixed = silent or self._scale is not None or reference is not None
        if not silent and self._scale is None and reference is not None:
            self._scale = warm_up(self._slot, self._checked(reference))
        super().__init__(model=source.model, dtype=source.dtype, version=self.version)

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """Evaluate the atoms; ASE calls this when its cached results do not hold any more.

        Raises:
            PotentialError: an element that the potential does not know; names it, and those that it knows.
            ConfigError: periodic in some directions only.
            BadFrameError: a position is not finite, or a periodic cell has no volume.
            RefusedError: atoms inside each other, or forces that are not finite or beyond 1000 eV/Å.
            PropertyNotImplementedError: the stress of atoms that are not periodic.
        """
        super().calculate(atoms, properties, system_changes)
        frame = self._checked(_frame(self.atoms))
        if "stress" in properties and not frame.periodic:
            raise PropertyNotImplementedError("there is no stress: the atoms are not periodic (pbc is False in all directions)")
        if (finding := guards.check_frame(frame)).verdict is guards.Verdict.DEAD:
            _refuse_unless_ok(finding)
        (answer,) = self._slot.answer([frame], [(self._number, self._number, 1.0)])
        prediction = answer.prediction
        _refuse_unless_ok(guards.check_prediction(prediction))
        sure = certainty(answer.lpr, self._scale_of(frame), 1.0)
        self.results = {
            "energy": prediction.energy,
            "free_energy": prediction.energy,
            "forces": prediction.forces,
            "force_std": sure.std if sure.std < UNKNOWN_STD else float("nan"),
            "force_std_atom": sure.atom,
            "energy_std": answer.energy_std,
            "version": self.version,
        }
        if frame.periodic:
            volume = abs(np.linalg.det(frame.cell))
            self.results["stress"] = full_3x3_to_voigt_6_stress(-prediction.virial / volume)
        if "force_stds" in properties:
            self.results["force_stds"] = self._exact_stds(frame)

    def export_properties(self) -> Any:
        """What ASE knows of the results, in its own type, which has no place for an uncertainty."""
        from ase.outputs import Properties

        return Properties({name: value for name, value in self.results.items() if name in all_outputs})

    # -- uncertainty -----------------------------------------------------------------------------------------------------------------

    def _scale_of(self, frame: Frame) -> float | None:
        if not self._fixed:
            kind = bytes([frame.periodic]) + np.sort(frame.numbers).tobytes()
            if kind != self._measured_on:
                self._scale, self._measured_on = warm_up(self._slot, frame), kind
        return self._scale

    def _exact_stds(self, frame: Frame) -> Array:
        potential = self._slot.potential
        if not (isinstance(potential, Trainable) and potential.spec.n_hidden):
            return np.full(len(frame), np.nan)
        return force_std(potential.force_rows(frame).rows, self._slot.covariance(self._number))

    def _checked(self, frame: Frame) -> Frame:
        spec = self._slot.potential.spec
        unknown = sorted(set(frame.numbers.tolist()) - set(spec.elements)) if spec.elements else []
        if unknown:
            named, known = (", ".join(chemical_symbols[z] for z in numbers) for numbers in (unknown, spec.elements))
            raise PotentialError(spec.name, f"it does not know {named}; it knows {known}")
        return frame


# -- where the weights come from -------------------------------------------------------------------------------------------------------


def shared_potential(model: str, device: str = "auto", dtype: str = "float32") -> Potential:
    """Return a potential, loaded once for all calculators of this process; again only after its file has changed.

    Raises:
        PotentialError: no such kind, file, option, device or dtype.
    """
    file = registry.weights_file(model)
    told = file.stat() if file else None
    with _loading:
        return _loaded(model, device, dtype, (told.st_mtime_ns, told.st_size) if told else None)


@lru_cache(maxsize=_KEPT)
def _loaded(model: str, device: str, dtype: str, stamp: tuple[int, int] | None) -> Potential:
    try:
        return registry.load(model, device, dtype)
    except (RuntimeError, AssertionError) as error:  # what torch says of a device that is not there
        raise PotentialError(model, f"cannot be loaded on device {device!r} ({str(error).splitlines()[0]})") from error


def _plain(model: str | None, dtype: str | None, version: int | None) -> _Source:
    if version is not None:
        raise ConfigError("version", "belongs to a run; give run=DIRECTORY as well")
    return _Source(model or DEFAULT_MODEL, dtype or "float32")


def _of_run(run: Path, model: str | None, dtype: str | None, version: int | None) -> _Source:
    if model is not None:
        raise ConfigError("model", "is that of the run; leave out either model or run")
    potential = configs.load(run).potential
    serving = read_serving(run)
    if version is not None and version != serving.version:
        serving = bus.Serve(version, str(_version_file(run, version)) if version else "", None, 2.0)
    elif serving.path:
        serving = bus.Serve(serving.version, str(run / serving.path), serving.lpr_scale, serving.quantile)
    return _Source(_model_of(run, potential.model), dtype or potential.dtype, serving, _template_of(potential))


def _version_file(run: Path, number: int) -> Path:
    found = sorted((run / versions.FOLDER).glob(f"{number:06d}-*.safetensors"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1]
    known = sorted({int(path.name[:6]) for path in (run / versions.FOLDER).glob("[0-9]" * 6 + "-*.safetensors")})
    raise RunDirError(str(run), f"has no version {number}; it has {', '.join(map(str, known)) or 'none but 0'}")


def _model_of(run: Path, model: str) -> str:
    """The model's name; where its file is not here, as in a run directory that was copied, version 0 is that potential, whole."""
    try:
        registry.weights_file(model)
    except PotentialError:
        whole = sorted((run / versions.FOLDER).glob(f"{BASE:06d}-*.safetensors"))
        if not whole:
            raise
        return f"{model.partition(':')[0]}:{whole[0]}"
    return model


def _template_of(potential: configs.Potential) -> Frame | None:
    try:
        return structures.read_frame(potential.template)
    except ConfigError:
        return None  # not copied along: then the first frame has to do


def _frame(atoms: Any) -> Frame:
    try:
        return structures.from_atoms(atoms)
    except ConfigError as error:
        raise ConfigError("atoms", error.problem) from error


def _refuse_unless_ok(finding: guards.Finding) -> None:
    if finding.verdict is not guards.Verdict.OK:
        raise RefusedError(finding.sentence)
