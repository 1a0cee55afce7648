"""From a method's name to its labeller. Names only: engines are imported when chosen, and import their own programs when used."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, get_type_hints
from urllib.parse import parse_qsl

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
    ``pyscf``                       xc, basis, grid, conv_tol, max_memory, charge, max_cycle (see `PySCFLabeller`)
    ``ase:MODULE:CLASS``            keyword arguments of the calculator class
    ``test:lj|raise|hang|nan|exit``  on, delay, epsilon, offset, journal (see `ToyLabeller`); also as ``test:lj?delay=60&journal=x``
    ==============================  ==============================================================================================

    Options may be strings, as a command line has them. A child process calls this with the same arguments: they pickle.

    Raises:
        UnknownMethodError: no such method or option, or an option's value does not fit.

    >>> make_labeller("pyscf", xc="pbe", grid="1").method
    'pyscf:pbe/def2-svp/grid1/df-jfit'
    """
    name, _, rest = method.partition(":")
    if method == "pyscf":
        from tumbaga.online.labels.pyscf_engine import PySCFLabeller

        return PySCFLabeller(**_typed(method, PySCFLabeller, options))
    if name == "ase":
        from tumbaga.online.labels.ase_engine import AseLabeller

        module, _, attribute = rest.partition(":")
        if not (module and attribute):
            raise UnknownMethodError(method, "must be ase:MODULE:CLASS, such as ase:ase.calculators.emt:EMT")
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:  # looks for the package, imports nothing
            raise UnknownMethodError(method, f"needs the package {package}, which is not installed here")
        return AseLabeller(rest, options)
    if name == "test":
        return _test_labeller(method, rest, options)
    raise UnknownMethodError(method, "is not known; there are pyscf, ase:MODULE:CLASS, ipi:ADDRESS and test:KIND")


def _test_labeller(method: str, rest: str, options: dict[str, Any]) -> Labeller:
    from tumbaga.online.labels.testing import Fault, ToyLabeller

    kind, _, query = rest.partition("?")
    kinds = {fault.value: fault for fault in Fault}
    if kind not in kinds:
        raise UnknownMethodError(method, f"is not known; of test: there are {', '.join(kinds)}")
    return ToyLabeller(kinds[kind], **_typed(method, ToyLabeller, dict(parse_qsl(query)) | options, hidden=("fault",)))


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
