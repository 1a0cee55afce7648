"""The installation check: imports what is needed, evaluates the packaged potential, asks each engine for its version."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tumbaga.driver.errors import DriverError

_PACKAGES = ("numpy", "torch", "ase", "ipi", "pyscf", "pyzmq", "msgspec", "safetensors", "vesin")


@dataclass(frozen=True)
class Finding:
    """One checked thing: what, whether it is good, and what was seen."""

    what: str
    good: bool
    said: str


def examine() -> list[Finding]:
    """Check everything, one finding each; never raises."""
    checks: list[tuple[str, Callable[[], str]]] = [("python", lambda: sys.version.split()[0])]
    checks += [(package, lambda package=package: importlib.metadata.version(package)) for package in _PACKAGES]  # type: ignore[misc]
    checks += [("painn:cuau-water", _potential), ("i-PI", _ipi), ("PySCF label of H2", _label)]
    return [_examined(what, check) for what, check in checks]


def _examined(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, check())
    except importlib.metadata.PackageNotFoundError:
        return Finding(what, False, f"is not installed; run: pip install {what}")
    except Exception as error:  # noqa: BLE001 - a check must never take the others along
        return Finding(what, False, f"{type(error).__name__}: {error}")


def _potential() -> str:
    from tumbaga.driver.backends import registry
    from tumbaga.driver.structures import read_frame

    template = read_frame(Path(__file__).parent / "data" / "cuau-water.xyz")
    potential = registry.load("painn:cuau-water")
    prediction = potential.predict([template])[0]
    if not prediction.finite:
        raise DriverError("gives numbers that are not finite on the packaged cluster")
    return f"{prediction.energy:.3f} eV on the packaged cluster"


def _ipi() -> str:
    from tumbaga.driver.engines import installed

    if not installed()["ipi"]:
        raise DriverError(f"there is no i-pi beside {sys.executable}; run: pip install ipi")
    return "can be started"


def _label() -> str:
    import numpy as np

    from tumbaga.online.labels.factory import make_labeller
    from tumbaga.online.records import Frame

    label = make_labeller("pyscf").label(Frame(np.array([1, 1]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.75]])))
    return f"{label.method}, {label.energy:.3f} eV in {label.seconds:.1f} s"
