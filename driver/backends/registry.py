"""Names of potentials: "KIND:REST" to a loader, without importing any back end until it is asked for.

Further kinds come from other packages, by the entry point group `tumbaga.potentials`: its names are kinds, its values loaders.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, NamedTuple

from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import Potential

Loader = Callable[[str, str, str], Potential]  # (rest of the name, device, dtype)
GROUP: Final = "tumbaga.potentials"
_HERE: Final = "tumbaga.driver.backends"


class Kind(NamedTuple):
    """Where the code of one kind of potential is.

    Attributes:
        loader: "module:function", a `Loader`.
        files: a module that imports fast, with `weights_file(rest) -> Path | None`, which raises PotentialError for what can be seen to be
            wrong before anything is loaded, and `absolute(rest) -> str`; empty where the rest of a name is a path or nothing.
    """

    loader: str
    files: str = ""


KINDS: Final = {
    "aenet": Kind(f"{_HERE}.aenet:load_backend", f"{_HERE}.aenet_names"),
    "chgnet": Kind(f"{_HERE}.chgnet:load_backend", f"{_HERE}.chgnet_files"),
    "mace": Kind(f"{_HERE}.mace:load_backend", f"{_HERE}.mace_files"),
    "painn": Kind(f"{_HERE}.painn:load_backend", f"{_HERE}.painn_files"),
    "sevennet": Kind(f"{_HERE}.sevennet:load_backend", f"{_HERE}.sevennet_files"),
    "toy": Kind(f"{_HERE}.toy:load_backend", f"{_HERE}.toy"),
}


@functools.cache
def _of_others() -> dict[str, Kind]:
    """The kinds that installed packages bring along; they cannot take the place of ours."""
    return {point.name: Kind(point.value) for point in entry_points(group=GROUP) if point.name not in KINDS}


def _kind(name: str) -> tuple[Kind, str]:
    kind, _, rest = name.partition(":")
    known = KINDS | _of_others()
    if kind not in known:
        raise PotentialError(
            name, f"there is no back end {kind!r}; known are {', '.join(sorted(known))} (for example painn:cuau-water, toy:lj)"
        )
    return known[kind], rest


def loader(name: str) -> tuple[Loader, str]:
    """Return the loader of a potential and the rest of its name; imports the back end.

    Raises:
        PotentialError: no such kind, or the package that brings it cannot be imported.
    """
    kind, rest = _kind(name)
    module, _, attribute = kind.loader.partition(":")
    try:
        made: Loader = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise PotentialError(name, f"its loader {kind.loader} cannot be imported: {error}") from error
    return made, rest


def load(name: str, device: str = "auto", dtype: str = "float32") -> Potential:
    """Load a potential by name, e.g. "painn:cuau-water", "painn:/path/to/weights.safetensors", "sevennet:7net-0", "toy:lj?epsilon=0.01".

    Raises:
        PotentialError: no such kind, file or option; the sentence says which are known.
    """
    make, rest = loader(name)
    return make(rest, device, dtype)


def of_version(name: str, path: Path, device: str = "auto", dtype: str = "float32") -> Potential:
    """Load a version file of a run as a potential by itself: of the kind that the run's potential has, with the network that is in the file.

    Args:
        name: of the run's potential.
        path: the version file.
        device, dtype: see `load`.

    Raises:
        PotentialError: no such kind, or the file is not of it.
    """
    return load(f"{name.partition(':')[0]}:{path}", device, dtype)


def weights_file(name: str) -> Path | None:
    """The weights file behind a name, for the record of a run; None for potentials without one. Imports no back end but the toys.

    Raises:
        PotentialError: the name is of no known kind, its file does not exist, it is a toy that there is not, or its package is not installed.
    """
    kind, rest = _kind(name)
    if kind.files:
        found: Path | None = importlib.import_module(kind.files).weights_file(rest)
        return found
    path = Path(rest)
    return path if path.is_file() else None


def absolute(name: str) -> str:
    """Return the name with the full path of its file, if it names one: other processes work in other folders."""
    try:
        kind, rest = _kind(name)
    except PotentialError:
        return name  # said where it is loaded
    if kind.files:
        return f"{name.partition(':')[0]}:{importlib.import_module(kind.files).absolute(rest)}"
    return f"{name.partition(':')[0]}:{Path(rest).absolute()}" if Path(rest).is_file() else name
