"""From a method's name to its labeller. Names only: engines are imported when chosen, and import their own programs when used."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import unquote

from tumbaga.online.errors import OnlineError
from tumbaga.online.ports import Labeller


class UnknownMethodError(OnlineError, ValueError):
    """The user named a label method, or an option of one, that does not exist."""

    def __init__(self, method: str, problem: str) -> None:
        super().__init__(method, problem)
        self.method, self.problem = method, problem

    def __str__(self) -> str:
        return f"label method {self.method!r} {self.problem}"


def make_labeller(method: str, /, **options: Any) -> Labeller:
    """Return the labeller of a method.

    ==============================  ==============================================================================================
    method                          options
    ==============================  ==============================================================================================
    ``pyscf``                       xc, basis, grid, charge, spin, ecp, disp, kpts … (see `PySCFLabeller`)
    ``ase:MODULE:CLASS``            keyword arguments of the calculator class (see `AseLabeller`)
    ``call:MODULE:FUNCTION``        keyword arguments of the function, and level, the name of the level of theory (see `CallLabeller`);
    ``call:/PATH/FILE.py:FUNCTION``  the file is executed by the first label, in the process that labels
    ``test:KIND``                   on, delay, epsilon, offset, journal (see `ToyLabeller`); KIND is lj, or a fault
    ==============================  ==============================================================================================

    Options may stand behind the method, as in ``pyscf?basis=def2-tzvp&grid=3`` (see `split_options`), and be strings, as a command line has them.
    Nothing foreign is imported or executed here. A child process calls this with the same arguments.

    Raises:
        UnknownMethodError: no such method or option, or an option's value does not fit.

    >>> make_labeller("pyscf", xc="pbe", grid="1").method
    'pyscf:pbe/def2-svp/grid1/df-jfit'
    """
    called, written = split_options(method)
    name, _, rest = called.partition(":")
    if called == "pyscf":
        from tumbaga.online.labels.pyscf_engine import PySCFLabeller

        try:
            return PySCFLabeller(**_typed(method, PySCFLabeller, written | options))
        except UnknownMethodError:
            raise
        except ValueError as error:
            raise UnknownMethodError(method, str(error)) from error
    if name == "ase":
        from tumbaga.online.labels.ase_engine import AseLabeller

        module, _, attribute = rest.partition(":")
        if not (module and attribute):
            raise UnknownMethodError(method, "must be ase:MODULE:CLASS, such as ase:ase.calculators.emt:EMT")
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:  # looks for the package, imports nothing
            raise UnknownMethodError(method, f"needs the package {package}, which is not installed here")
        return AseLabeller(rest, _read(written) | options)
    if name == "call":
        return _calling(method, rest, _read(written) | options)
    if name == "test":
        return _test_labeller(method, rest, written | options)
    raise UnknownMethodError(method, "is not known; there are pyscf, ase:MODULE:CLASS, call:FILE:FUNCTION, ipi:ADDRESS and test:KIND")


def split_options(method: str) -> tuple[str, dict[str, str]]:
    """Return a method without the options that are written behind it, and these; ``%26`` stands for ``&``, as in addresses of the web.

    Raises:
        UnknownMethodError: what stands behind the question mark is not KEY=VALUE, with & between several.

    >>> split_options("ase:tblite.ase:TBLite?method=GFN1-xTB&max_iterations=100")
    ('ase:tblite.ase:TBLite', {'method': 'GFN1-xTB', 'max_iterations': '100'})
    """
    called, _, query = method.partition("?")
    options = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        if not (key and equals):
            raise UnknownMethodError(method, f"has {part!r} where KEY=VALUE was expected, with & between several")
        options[unquote(key)] = unquote(value)
    return called, options


def absolute_method(method: str) -> str:
    """Return the same method for another working directory: the path of a file that is called becomes absolute.

    >>> absolute_method("ase:ase.calculators.emt:EMT")
    'ase:ase.calculators.emt:EMT'
    """
    file = _called_file(method.partition("?")[0].removeprefix("call:"))
    return method.replace(str(file), str(file.absolute()), 1) if method.startswith("call:") and file else method


def _called_file(rest: str) -> Path | None:
    """The file of FILE.py:FUNCTION; None where a module is named."""
    file = rest.rpartition(":")[0]
    return Path(file) if file.endswith(".py") else None


def _read(options: dict[str, str]) -> dict[str, Any]:
    """Options for foreign code, whose types are not known: what is JSON (numbers, true, lists) is read as such, everything else is text."""
    read: dict[str, Any] = {}
    for key, text in options.items():
        try:
            read[key] = json.loads(text)
        except ValueError:
            read[key] = text
    return read


def _calling(method: str, rest: str, options: dict[str, Any]) -> Labeller:
    from tumbaga.online.labels.call_engine import CallLabeller

    where, _, function = rest.rpartition(":")
    file = _called_file(rest)
    if not (where and function.isidentifier()):
        raise UnknownMethodError(method, "must be call:/PATH/FILE.py:FUNCTION or call:MODULE:FUNCTION")
    if file is not None and not file.is_absolute():
        raise UnknownMethodError(method, "must name its file with the whole path: labels are computed in other folders")
    if file is not None and not file.is_file():
        raise UnknownMethodError(method, f"needs the file {file}, which is not there")
    if file is None and importlib.util.find_spec(where.partition(".")[0]) is None:
        raise UnknownMethodError(method, f"needs the module {where}, which is not found; a file is named with its path and its .py")
    return CallLabeller(where, function, options)


def _test_labeller(method: str, rest: str, options: dict[str, Any]) -> Labeller:
    from tumbaga.online.labels.testing import Fault, ToyLabeller

    kinds = {fault.value: fault for fault in Fault}
    if rest not in kinds:
        raise UnknownMethodError(method, f"is not known; of test: there are {', '.join(kinds)}")
    return ToyLabeller(kinds[rest], **_typed(method, ToyLabeller, options, hidden=("fault",)))


def _typed(method: str, record: type, options: dict[str, Any], hidden: tuple[str, ...] = ()) -> dict[str, Any]:
    """Options with strings turned into the numbers that the record's fields are declared as."""
    hints = get_type_hints(record)
    known = [item.name for item in dataclasses.fields(record) if not item.name.startswith("_") and item.name not in hidden]
    typed = {}
    for key, value in options.items():
        if key not in known:
            raise UnknownMethodError(method, f"has no option {key!r}; there are {', '.join(known)}")
        kind = hints[key] if isinstance(hints[key], type) else int  # the only other one is "int | None"
        try:
            typed[key] = kind(value) if value is not None else None
        except (TypeError, ValueError) as error:
            raise UnknownMethodError(method, f"cannot read {key} = {value!r} as {kind.__name__}") from error
    return typed
