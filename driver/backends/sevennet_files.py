"""What follows "sevennet:" in a name: a model of the package sevenn or a file, and the elements to learn. Imports neither torch nor sevenn.

sevennet:7net-0    sevennet:7net-0?elements=Cu,Au,O,H    sevennet:/path/to/checkpoint.pth    sevennet:/path/to/version.safetensors
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from ase.data import atomic_numbers

from tumbaga.driver.errors import PotentialError

PACKAGE: Final = "sevenn"
# what the wheel brings along; other models of its list would be fetched from the network behind the user's back
PACKAGED: Final = {
    "7net-0": "SevenNet_0__11Jul2024/checkpoint_sevennet_0.pth",
    "7net-0_22may2024": "SevenNet_0__22May2024/checkpoint_sevennet_0.pth",
    "7net-l3i5": "SevenNet_l3i5/checkpoint_l3i5.pth",
}


class Wanted(NamedTuple):
    """What a name asks for.

    Attributes:
        name: as the user wrote it, with "sevennet:".
        model: its part before the options: a key of `PACKAGED`, or a path.
        path: the file.
        elements: atomic numbers, ascending, each with a readout of its own; empty where none are named.
    """

    name: str
    model: str
    path: Path
    elements: tuple[int, ...]


def wanted(rest: str) -> Wanted:
    """Read the part of a name behind "sevennet:".

    Raises:
        PotentialError: the package is not installed, there is no such model, file or option, or an element that there is not.
    """
    name = f"sevennet:{rest}"
    model, _, query = rest.partition("?")
    elements = _elements(name, query)
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise PotentialError(name, "needs the package sevenn, which is not installed; pip install 'tumbaga[sevennet]'")
    folder = Path(next(iter(found.submodule_search_locations or ()), "")) / "pretrained_potentials"
    path = folder / PACKAGED[model] if model in PACKAGED else Path(model)
    if not path.is_file():
        known = ", ".join(PACKAGED)
        raise PotentialError(
            name, f"there is no file {str(path)!r}; the package has {known}, of other models give the path of the checkpoint"
        )
    return Wanted(name, model, path, elements)


def weights_file(rest: str) -> Path:
    """The file behind the part of a name that follows "sevennet:".

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
