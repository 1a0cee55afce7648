"""Names of potentials: "KIND:REST" to a loader, without importing any back end until it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tumbaga.driver.backends import sevennet_files
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import Potential

Loader = Callable[[str, str, str], Potential]  # (rest of the name, device, dtype)

KINDS: Final = {
    "painn": "tumbaga.driver.backends.painn:load_backend",
    "sevennet": "tumbaga.driver.backends.sevennet:load_backend",
    "toy": "tumbaga.driver.backends.toy:load_backend",
}
PACKAGED: Final = {"painn:cuau-water": Path(__file__).parent.parent / "data" / "cuau-water.safetensors"}


def loader(name: str) -> tuple[Loader, str]:
    """Return the loader of a potential and the rest of its name; imports the back end.

    Raises:
        PotentialError: no such kind.
    """
    kind, _, rest = name.partition(":")
    if kind not in KINDS:
        raise PotentialError(
            name, f"there is no back end {kind!r}; known are {', '.join(sorted(KINDS))} (for example painn:cuau-water, toy:lj)"
        )
    module, _, attribute = KINDS[kind].partition(":")
    made: Loader = getattr(importlib.import_module(module), attribute)
    return made, rest


def load(name: str, device: str = "auto", dtype: str = "float32") -> Potential:
    """Load a potential by name, e.g. "painn:cuau-water", "painn:/path/to/weights.safetensors", "sevennet:7net-0", "toy:lj?epsilon=0.01".

    Raises:
        PotentialError: no such kind, file or option; the sentence says which are known.
    """
    make, rest = loader(name)
    return make(rest, device, dtype)


def weights_file(name: str) -> Path | None:
    """The weights file behind a name, for the record of a run; None for potentials without one. Imports no back end but the toys.

    Raises:
        PotentialError: the name is of no known kind, its file does not exist, it is a toy that there is not, or its package is not installed.
    """
    kind, _, rest = name.partition(":")
    if kind not in KINDS:
        loader(name)
    if name in PACKAGED:
        return PACKAGED[name]
    if kind == "sevennet":
        return sevennet_files.wanted(rest).path
    if kind != "painn":
        load(name)  # nothing else could tell a misspelt toy before the processes are started
        return None
    path = Path(rest)
    if not path.is_file():
        known = ", ".join(sorted(PACKAGED))
        raise PotentialError(name, f"there is no file {rest!r}, and it is not a packaged potential ({known})")
    return path


def absolute(name: str) -> str:
    """Return the name with the full path of its file, if it names one: other processes work in other folders."""
    kind, _, rest = name.partition(":")
    if kind == "sevennet":
        return f"{kind}:{sevennet_files.absolute(rest)}"
    if kind == "painn" and name not in PACKAGED and Path(rest).is_file():
        return f"{kind}:{Path(rest).absolute()}"
    return name
