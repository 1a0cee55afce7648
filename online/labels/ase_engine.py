"""Labels by any ASE calculator, named by import path. Knows ASE; imports it, and the calculator, at the first label."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from tumbaga.online.errors import BadFrameError, LabelFailedError
from tumbaga.online.records import Array, Frame, Label


class AseLabeller:
    """Energy, forces and, for periodic frames, the virial of a calculator class such as ``ase.calculators.emt:EMT``.

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
        return f"ase:{self._path}" + said(self._options)

    def prepare(self) -> None:
        """Import and make the calculator.

        Raises:
            LabelFailedError: it cannot be made.
        """
        try:
            if self._calculator is None:
                self._calculator = self._made()
        except Exception as error:  # whatever a foreign package raises
            raise LabelFailedError(f"the calculator {self._path} failed: {type(error).__name__}: {error}") from error

    def label(self, frame: Frame) -> Label:
        """Compute the label of one frame, periodic or not.

        Raises:
            LabelFailedError: the calculator cannot be made, fails, or returns numbers that are not finite or not one force an atom.
        """
        started = time.perf_counter()
        atoms = atoms_of(frame)
        self.prepare()
        try:
            atoms.calc = self._calculator
            energy, forces = float(atoms.get_potential_energy()), np.asarray(atoms.get_forces(), dtype=np.float64)
            virial = self._virial(atoms) if frame.periodic else None
            label = Label(energy, forces, self.method, time.perf_counter() - started, virial=virial)
        except BadFrameError as error:
            raise LabelFailedError(f"the calculator {self._path} returned {error}") from error
        except Exception as error:  # a foreign calculator may raise anything; here its errors become ours
            self._calculator = None  # whatever state it is in, the next frame must not start from it
            raise LabelFailedError(f"the calculator {self._path} failed: {type(error).__name__}: {error}") from error
        if len(label.forces) != len(frame):
            raise LabelFailedError(f"the calculator {self._path} returned forces of {len(label.forces)} atoms for {len(frame)}")
        return label

    def _virial(self, atoms: Any) -> Array | None:
        """W = -stress * volume, eV; None where the calculator has no stress."""
        from ase.calculators.calculator import PropertyNotImplementedError

        if "stress" not in getattr(self._calculator, "implemented_properties", ()):
            return None
        try:
            return np.asarray(-atoms.get_volume() * atoms.get_stress(voigt=False), dtype=np.float64)
        except PropertyNotImplementedError:
            return None

    def _made(self) -> Any:
        module, _, name = self._path.partition(":")
        return getattr(importlib.import_module(module), name)(**self._options)


def atoms_of(frame: Frame) -> Any:
    """Return a frame as ASE's Atoms."""
    from ase import Atoms

    return Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.periodic)


def said(options: Mapping[str, Any]) -> str:
    """Return options as part of a method's name: in brackets and in order, or nothing.

    >>> said({"method": "GFN1-xTB", "charge": 1})
    '(charge=1, method=GFN1-xTB)'
    """
    return f"({', '.join(f'{key}={value}' for key, value in sorted(options.items()))})" if options else ""
