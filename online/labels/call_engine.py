"""Labels by a function of the user. Its module or file is imported at the first label, in whatever process labels, and nowhere else."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tumbaga.online.errors import BadFrameError, LabelFailedError
from tumbaga.online.labels.ase_engine import atoms_of, said
from tumbaga.online.records import Array, Frame, Label

_EXPECTED = "energy and forces, or a dict of energy, forces and, if there are any, virial and details"
_KEYS = ("energy", "forces", "virial", "details")


class CallLabeller:
    """Labels by ``function(atoms, **options)``.

    The function gets `ase.Atoms` and returns (energy, forces), or a dict of

    ============  ========  =======  ==========================================================================
    key           shape     unit     meaning
    ============  ========  =======  ==========================================================================
    ``energy``              eV       total energy
    ``forces``    (n, 3)    eV/Å     of all atoms
    ``virial``    (3, 3)    eV       -dE/dstrain, ASE's stress is -virial / volume; may be missing or None
    ``details``                      a dict of whatever is to be kept with the label, JSON-compatible; may be missing
    ============  ========  =======  ==========================================================================

    What is not converged must not be returned: it raises an error, whatever error, and its text is kept as the reason.

    Args:
        where: a module, or the path of a file that ends in .py.
        function: its name.
        options: its keyword arguments; part of the method's name, as `level` is, the name of the level of theory, which it does not get.
    """

    def __init__(self, where: str, function: str, options: Mapping[str, Any] | None = None) -> None:
        self._where, self._name, self._options = where, function, dict(options or {})
        self._arguments = {key: value for key, value in self._options.items() if key != "level"}
        self._function: Callable[..., Any] | None = None
        self._source: dict[str, str] = {}

    @property
    def method(self) -> str:
        """Identifies the level of theory, e.g. "call:dft.py:label(level=PBE-D4)"; of a file the name alone, since files move."""
        return f"call:{Path(self._where).name}:{self._name}" + said(self._options)

    def prepare(self) -> None:
        """Import the function.

        Raises:
            LabelFailedError: it cannot be imported.
        """
        self._imported()

    def label(self, frame: Frame) -> Label:
        """Call the function for one frame.

        Returns:
            Its label; the details hold what the function gave, and of a file the hash of its content as `source`.

        Raises:
            LabelFailedError: the function cannot be imported, fails, or returns something else than it should.
        """
        started = time.perf_counter()
        function = self._imported()
        try:
            returned = function(atoms_of(frame), **self._arguments)
        except Exception as error:  # a function of the user may raise anything; here its errors become ours
            raise LabelFailedError(f"the function {self._name} failed: {type(error).__name__}: {error}") from error
        parts = self._parts(returned)
        if len(parts["forces"]) != len(frame):
            raise self._wrong(f"forces of shape {parts['forces'].shape} for {len(frame)} atoms")
        try:
            seconds = time.perf_counter() - started
            return Label(parts["energy"], parts["forces"], self.method, seconds, self._source | parts["details"], parts["virial"])
        except BadFrameError as error:
            raise self._wrong(str(error)) from error

    def _parts(self, returned: Any) -> dict[str, Any]:
        """What the function returned, in the types of a label."""
        if isinstance(returned, tuple | list) and len(returned) == 2:
            returned = dict(zip(_KEYS, returned, strict=False))
        if not isinstance(returned, Mapping) or not {"energy", "forces"} <= set(returned):
            raise self._wrong(f"{_shown(returned)}; expected are {_EXPECTED}")
        if strange := sorted(set(map(str, returned)) - set(_KEYS)):
            raise self._wrong(f"the key {strange[0]!r}; there are {', '.join(_KEYS)}")
        virial = returned.get("virial")
        return {
            "energy": float(self._numbers("energy", returned["energy"], ())),
            "forces": self._numbers("forces", returned["forces"], (None, 3)),
            "virial": None if virial is None else self._numbers("virial", virial, (3, 3)),
            "details": self._details(returned.get("details") or {}),
        }

    def _numbers(self, key: str, value: Any, shape: tuple[int | None, ...]) -> Array:
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise self._wrong(f"{_shown(value)} as {key}, which are no numbers") from None
        if array.size == 1 and not shape:
            return array.reshape(())
        if len(array.shape) != len(shape) or any(wanted not in (None, had) for wanted, had in zip(shape, array.shape, strict=True)):
            raise self._wrong(f"{key} of shape {array.shape}")
        return array

    def _details(self, details: Any) -> dict[str, Any]:
        if not isinstance(details, Mapping):
            raise self._wrong(f"{_shown(details)} as details; a dict was expected")
        try:
            kept: dict[str, Any] = json.loads(json.dumps(dict(details), default=_plain))
        except (TypeError, ValueError) as error:
            raise self._wrong(f"details that cannot be kept as JSON: {error}") from error
        return kept

    def _wrong(self, what: str) -> LabelFailedError:
        return LabelFailedError(f"the function {self._name} returned {what}")

    def _imported(self) -> Callable[..., Any]:
        if self._function is not None:
            return self._function
        try:
            module = self._file() if self._where.endswith(".py") else importlib.import_module(self._where)
        except Exception as error:  # whatever stands there is executed
            raise LabelFailedError(f"{self._where} cannot be imported: {type(error).__name__}: {error}") from error
        function: Callable[..., Any] | None = getattr(module, self._name, None)
        if function is None or not callable(function):
            raise LabelFailedError(f"{self._where} has no function {self._name}")
        self._function = function
        return function

    def _file(self) -> Any:
        self._source = {"source": hashlib.sha256(Path(self._where).read_bytes()).hexdigest()[:16]}
        spec = importlib.util.spec_from_file_location(f"tumbaga_called_{Path(self._where).stem}", self._where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # as for any script: modules beside it are found, and it finds itself, which dataclasses and pickle need
        sys.path.append(str(Path(self._where).parent))
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module


def _plain(value: Any) -> Any:
    """Numpy's numbers and arrays as Python's."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
