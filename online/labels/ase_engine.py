"""Labels by any ASE calculator, named by import path. Knows ASE; imports it, and the calculator, at the first label."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from tumbaga.online.errors import BadFrameError, LabelFailedError
from tumbaga.online.records import Frame, Label


class AseLabeller:
    """Energy and forces of a calculator class such as ``ase.calculators.emt:EMT``.

    Args:
        path: ``module:Class``.
        options: keyword arguments of the class; part of the method's name, since they make the level of theory.
    """

    def __init__(self, path: str, options: Mapping[str, Any] | None = None) -> None:
        self._path, self._options = path, dict(options or {})
        self._calculator: Any = None

    @property
    def method(self) -> str:
        """Identifies the level of theory, e.g. "ase:ase.calculators.emt:EMT" or "ase:x:Y(a=1)"."""
        said = ", ".join(f"{key}={value}" for key, value in sorted(self._options.items()))
        return f"ase:{self._path}" + (f"({said})" if said else "")

    def label(self, frame: Frame) -> Label:
        """Compute energy and forces of one frame, periodic or not.

        Raises:
            LabelFailedError: the calculator cannot be made, fails, or returns numbers that are not finite.
        """
        from ase import Atoms

        started = time.perf_counter()
        atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.periodic)
        try:
            if self._calculator is None:
                self._calculator = self._made()
            atoms.calc = self._calculator
            energy, forces = float(atoms.get_potential_energy()), np.asarray(atoms.get_forces(), dtype=np.float64)
            return Label(energy, forces, self.method, time.perf_counter() - started)
        except BadFrameError as error:
            raise LabelFailedError(f"the calculator {self._path} returned {error}") from error
        except Exception as error:  # a foreign calculator may raise anything; here its errors become ours
            raise LabelFailedError(f"the calculator {self._path} failed: {type(error).__name__}: {error}") from error

    def _made(self) -> Any:
        module, _, name = self._path.partition(":")
        return getattr(importlib.import_module(module), name)(**self._options)
