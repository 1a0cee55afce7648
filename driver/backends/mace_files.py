"""What follows "mace:" in a name: a file, the elements to learn, the head. Imports neither torch nor mace.

mace:/path/to/some.model    mace:/path/to/some.model?elements=Cu,Au,O,H    mace:/path/to/some.model?head=omat_pbe    mace:/path/to/version.safetensors
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import parse_qsl

from ase.data import atomic_numbers

from tumbaga.driver.errors import PotentialError

PACKAGE: Final = "mace"


class Wanted(NamedTuple):
    """What a name asks for.

    Attributes:
        name: as the user wrote it, with "mace:".
        path: the file.
        elements: atomic numbers, ascending, each with a readout of its own; empty where none are named.
        head: of a model of several levels of theory; empty where none is named.
    """

    name: str
    path: Path
    elements: tuple[int, ...]
    head: str


def wanted(rest: str) -> Wanted:
    """Read the part of a name behind "mace:".

    Raises:
        PotentialError: the package is not installed, there is no such file or option, or an element that there is not.
    """
    name = f"mace:{rest}"
    file, _, query = rest.partition("?")
    elements, head = _options(name, query)
    if importlib.util.find_spec(PACKAGE) is None:
        raise PotentialError(name, "needs the package mace-torch, which is not installed; pip install 'tumbaga[mace]'")
    path = Path(file)
    if not path.is_file():
        raise PotentialError(
            name, f"there is no file {file!r}; the package brings no models: download one, and give its path (mace:/path/to/some.model)"
        )
    return Wanted(name, path, elements, head)


def weights_file(rest: str) -> Path:
    """The file behind the part of a name that follows "mace:".

    Raises:
        PotentialError: see `wanted`.
    """
    return wanted(rest).path


def absolute(rest: str) -> str:
    """Return the same with the full path of its file, if it names one."""
    file, mark, query = rest.partition("?")
    return f"{Path(file).absolute()}{mark}{query}" if Path(file).is_file() else rest


def _options(name: str, query: str) -> tuple[tuple[int, ...], str]:
    given = parse_qsl(query, keep_blank_values=True)
    if query and not given:
        raise PotentialError(name, f"cannot read {query!r}; write for example ?elements=Cu,Au,O,H")
    found: set[int] = set()
    head = ""
    for key, value in given:
        if key == "head":
            head = value
        elif key == "elements":
            found.update(_number(name, symbol) for symbol in value.split(","))
        else:
            raise PotentialError(name, f"has no option {key!r}; known are elements, head")
    return tuple(sorted(found)), head


def _number(name: str, symbol: str) -> int:
    number: int = atomic_numbers.get(symbol, 0)
    if not number:
        raise PotentialError(name, f"option elements names {symbol!r}, which is no element; write for example elements=Cu,Au,O,H")
    return number
