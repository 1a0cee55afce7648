"""What follows a back end's kind in the names of foundation models: a model, and the elements to learn. Imports neither torch nor a back end.

KIND:MODEL    KIND:MODEL?elements=Cu,Au,O,H
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

from ase.data import atomic_numbers

from tumbaga.driver.errors import PotentialError


class Wanted(NamedTuple):
    """What a name asks for.

    Attributes:
        name: as the user wrote it, with the kind.
        model: its part before the options: one that the package brings along, or a path.
        path: the file.
        elements: atomic numbers, ascending, each with a readout of its own; empty where none are named.
    """

    name: str
    model: str
    path: Path
    elements: tuple[int, ...]


class Names(NamedTuple):
    """The names of one kind whose package brings models along.

    Attributes:
        kind: the part of a name before the colon; an extra of tumbaga of this name installs the package.
        package: of Python.
        folder: in the package, of its models.
        packaged: names of these models, with their files in the folder.
    """

    kind: str
    package: str
    folder: str
    packaged: Mapping[str, str]

    def wanted(self, rest: str) -> Wanted:
        """Read the part of a name behind the colon.

        Raises:
            PotentialError: the package is not installed, there is no such model, file or option, or an element that there is not.
        """
        name = f"{self.kind}:{rest}"
        model, _, query = rest.partition("?")
        elements, _ = options(name, query)
        folder = installed(name, self.package, self.package, self.kind) / self.folder
        path = folder / self.packaged[model] if model in self.packaged else Path(model)
        if not path.is_file():
            known = ", ".join(self.packaged)
            raise PotentialError(
                name, f"there is no file {str(path)!r}; the package has {known}, of other models give the path of the checkpoint"
            )
        return Wanted(name, model, path, elements)

    def weights_file(self, rest: str) -> Path:
        """The file behind the part of a name that follows the colon.

        Raises:
            PotentialError: see `wanted`.
        """
        return self.wanted(rest).path

    def absolute(self, rest: str) -> str:
        """Return the same with the full path of its file, if it names one."""
        return rest if rest.partition("?")[0] in self.packaged else absolute(rest)


def absolute(rest: str) -> str:
    """Return what follows the colon with the full path of its file, if it names one."""
    file, mark, query = rest.partition("?")
    return f"{Path(file).absolute()}{mark}{query}" if Path(file).is_file() else rest


def installed(name: str, package: str, distribution: str, extra: str) -> Path:
    """Return the folder of a Python package.

    Args:
        name: of the potential, for the error.
        package: as Python imports it.
        distribution: as pip calls it.
        extra: of tumbaga, that installs it.

    Raises:
        PotentialError: it is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None:
        raise PotentialError(name, f"needs the package {distribution}, which is not installed; pip install 'tumbaga[{extra}]'")
    return Path(next(iter(found.submodule_search_locations or ()), ""))


def options(name: str, query: str, *others: str) -> tuple[tuple[int, ...], dict[str, str]]:
    """Return the atomic numbers that the option elements names, ascending, and the options of other names.

    Args:
        name: of the potential, for the error.
        query: what follows the question mark.
        others: names of options beside elements.

    Raises:
        PotentialError: there is no such option or element, or it cannot be read.
    """
    given = parse_qsl(query, keep_blank_values=True)
    if query and not given:
        raise PotentialError(name, f"cannot read {query!r}; write for example ?elements=Cu,Au,O,H")
    elements: set[int] = set()
    further = {}
    for key, value in given:
        if key == "elements":
            elements.update(_number(name, symbol) for symbol in value.split(","))
        elif key in others:
            further[key] = value
        else:
            raise PotentialError(name, f"has no option {key!r}; known are {', '.join(('elements', *others))}")
    return tuple(sorted(elements)), further


def _number(name: str, symbol: str) -> int:
    number: int = atomic_numbers.get(symbol, 0)
    if not number:
        raise PotentialError(name, f"option elements names {symbol!r}, which is no element; write for example elements=Cu,Au,O,H")
    return number
