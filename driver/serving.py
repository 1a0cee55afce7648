"""`serve`: a server for an ASE script in one line, which learns while the script runs and is gone when the script is.

with serve(atoms) as calc:
    atoms.calc = calc
    ...
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from tumbaga.driver import config as configs
from tumbaga.driver import structures, supervisor
from tumbaga.driver.backends import registry
from tumbaga.driver.errors import ConfigError, RunDirError
from tumbaga.driver.rundir import RunDir
from tumbaga.driver.served import ServedCalculator, ServingError
from tumbaga.online.labels.factory import absolute_method
from tumbaga.online.records import Frame
from tumbaga.online.versions import write_whole

__all__ = ["ServedCalculator", "ServingError", "serve"]

TEMPLATE = "template.xyz"
Section = TypeVar("Section", bound=msgspec.Struct)


def serve(
    atoms: Any,
    model: str | None = None,
    *,
    run_dir: str | Path | None = None,
    learn: bool = True,
    label: str | None = None,
    label_options: dict[str, str | int | float | bool] | None = None,
    labels: int | None = None,
    force_error: float | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int | None = None,
    timeout: float = 120.0,
) -> ServedCalculator:
    """Start a server for these atoms, wait until it can answer, and return a calculator that is connected to it.

    The server ends with the `with` block, with `calc.close()`, or with the script, however that ends (on Linux also by SIGKILL). What it
    learnt stays in the run directory; given again, everything goes on from there, and what is None here is as it was.

    Args:
        atoms: Atoms with the species, their order and the periodicity of all that is to be evaluated.
        model: the potential; None means "painn:cuau-water".
        run_dir: where everything is kept; None makes a new folder below `runs`.
        learn: whether uncertain frames are labelled and learnt from.
        label: who labels; None means "pyscf".
        label_options: for whoever labels, e.g. {"xc": "pbe", "basis": "def2-svp", "charge": 1}.
        labels: at most so many; 0 for none.
        force_error: the force error to hold, eV/Å.
        device: "auto", "cpu", "cuda".
        dtype: "float32" or "float64".
        seed: of everything random that the server does.
        timeout: seconds for the server to start.

    Raises:
        DriverError: a mistake in the arguments, in one sentence (ConfigError, PotentialError, RunDirError).
        ServingError: the server did not start; the message holds its last lines.
    """
    frame = _frame(atoms)
    folder = _new_folder() if run_dir is None else Path(run_dir).absolute()
    earlier = configs.load(folder) if (folder / configs.FILE).exists() else None
    settings = _settings(earlier or configs.Config(), folder, frame, earlier is not None, model)
    settings = msgspec.structs.replace(
        settings,
        potential=_with(settings.potential, device=device, dtype=dtype),
        flag=_with(settings.flag, force_error=force_error),
        label=_with(settings.label, method=label and absolute_method(label), options=label_options, budget=labels),
        learn=_with(settings.learn, enabled=learn),
        seed=settings.seed if seed is None else seed,
    )
    _check(settings, frame)
    held = RunDir(folder)
    held.hold()  # nobody else may read half of this
    try:
        if settings.potential.template == str(folder / TEMPLATE) and not (folder / TEMPLATE).exists():
            _write(folder / TEMPLATE, frame)
        write_whole(folder / configs.FILE, configs.dumps(settings).encode())
    finally:
        held.release()
    return ServedCalculator(frame, folder, timeout)


def _settings(settings: configs.Config, folder: Path, frame: Frame, again: bool, model: str | None) -> configs.Config:
    """The model and the template: those of the run directory if it has any, which must be of this potential and of these atoms."""
    potential, template = settings.potential, str(folder / TEMPLATE)
    model = potential.model if model is None else registry.absolute(model)
    if again:
        if model != potential.model:
            raise RunDirError(str(folder), f"is of a run of {potential.model}; choose another directory for {model}")
        if potential.template and Path(potential.template).exists():
            template = potential.template
            before = structures.read_frame(template)
            if not np.array_equal(before.numbers, frame.numbers) or before.periodic != frame.periodic:
                raise RunDirError(str(folder), "is of a run of other atoms (species, order or periodicity); choose another directory")
    # the only engine is the script, at an address of its own
    alone = msgspec.structs.replace(settings.serve, connect=(), templates={}, connections=1)
    return msgspec.structs.replace(settings, potential=_with(potential, model=model, template=template), serve=alone)


def _check(settings: configs.Config, frame: Frame) -> None:
    """Find mistakes before anything is made or started; they read a template, which is not in its place yet."""
    with tempfile.TemporaryDirectory() as scratch:
        _write(Path(scratch) / TEMPLATE, frame)
        potential = _with(settings.potential, template=str(Path(scratch) / TEMPLATE))
        supervisor.check(msgspec.structs.replace(settings, potential=potential))


def _with(section: Section, **given: Any) -> Section:
    return msgspec.structs.replace(section, **{key: value for key, value in given.items() if value is not None})


def _frame(atoms: Any) -> Frame:
    try:
        return structures.from_atoms(atoms)
    except ConfigError as error:
        raise ConfigError("atoms", error.problem) from error


def _write(path: Path, frame: Frame) -> None:
    from ase.io import write

    write(path, structures.to_atoms(frame), format="extxyz")


def _new_folder() -> Path:
    name = f"ase-{time.strftime('%Y%m%d-%H%M%S')}"
    choices = [Path("runs", name), *(Path("runs", f"{name}-{i}") for i in range(2, 1000))]
    return next(path for path in choices if not path.exists()).absolute()
