"""What follows "chgnet:" in a name: a model of the package chgnet or a file, and the elements to learn. Imports neither torch nor chgnet.

chgnet:0.3.0    chgnet:0.3.0?elements=Cu,Au,O,H    chgnet:/path/to/checkpoint.pth.tar    chgnet:/path/to/version.safetensors
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from ase.data import atomic_numbers

from tumbaga.driver.errors import PotentialError

PACKAGE: Final = "chgnet"
# all that the wheel brings along
PACKAGED: Final = {
    "0.3.0": "0.3.0/chgnet_0.3.0_e29f68s314m37.pth.tar",
    "0.2.0": "0.2.0/chgnet_0.2.0_e30f77s348m32.pth.tar",
    "r2scan": "r2scan/chgnet_r2scan_transfer_learning_e15f36s161m23.pth.tar",
}


class Wanted(NamedTuple):
    """What a name asks for.

    Attributes:
        name: as the user wrote it, with "chgnet:".
        model: its part before the options: a key of `PACKAGED`, or a path.
        path: the file.
        elements: atomic numbers, ascending, each with a readout of its own; empty where none are named.
    """

    name: str
    model: str
    path: Path
    elements: tuple[int, ...]


def wanted(rest: str) -> Wanted:
    """Read the part of a name behind "chgnet:".

    Raises:
        PotentialError: the package is not installed, there is no such model, file or option, or an element that there is not.
    """
    name = f"chgnet:{rest}"
    model, _, query = rest.partition("?")
    elements = _elements(name, query)
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise PotentialError(name, "needs the package chgnet, which is not installed; pip install 'tumbaga[chgnet]'")
    folder = Path(next(iter(found.submodule_search_locations or ()), "")) / "pretrained"
    path = folder / PACKAGED[model] if model in PACKAGED else Path(model)
    if not path.is_file():
        known = ", ".join(PACKAGED)
        raise PotentialError(
            name, f"there is no file {str(path)!r}; the package has {known}, of other models give the path of the checkpoint"
        )
    return Wanted(name, model, path, elements)


def weights_file(rest: str) -> Path:
    """The file behind the part of a name that follows "chgnet:".

    Raises:
        PotentialError: see `wanted`.
    """
    return wanted(rest).path


def absolute(rest: str) -> str:
    """Return the same with the full path of its file, if it names one."""
    model, mark, query = rest.partition("?")
    return f"{Path(model).absolute()}{mark}{query}" if model not in PACKAGED and Path(model).is_file() else rest


def _elements(name: str, query: str) -> tuple[int, ...]:
    given = parse_qsl(query, keep_blank_values=True)
    if query and not given:
        raise PotentialError(name, f"cannot read {query!r}; write for example ?elements=Cu,Au,O,H")
    found: set[int] = set()
    for key, value in given:
        if key != "elements":
            raise PotentialError(name, f"has no option {key!r}; known are elements")
        for symbol in value.split(","):
            if not atomic_numbers.get(symbol):
                raise PotentialError(name, f"option elements names {symbol!r}, which is no element; write for example elements=Cu,Au,O,H")
            found.add(atomic_numbers[symbol])
    return tuple(sorted(found))
