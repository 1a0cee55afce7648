"""What follows "mace:" in a name: a file, the elements to learn, the head. Imports neither torch nor mace.

mace:/path/to/some.model    mace:/path/to/some.model?elements=Cu,Au,O,H    mace:/path/to/some.model?head=omat_pbe    mace:/path/to/version.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tumbaga.driver.backends.guest_names import absolute, installed, options
from tumbaga.driver.errors import PotentialError

__all__ = ["Wanted", "absolute", "wanted", "weights_file"]


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
    elements, further = options(name, query, "head")
    installed(name, "mace", "mace-torch", "mace")
    path = Path(file)
    if not path.is_file():
        raise PotentialError(
            name, f"there is no file {file!r}; the package brings no models: download one, and give its path (mace:/path/to/some.model)"
        )
    return Wanted(name, path, elements, further.get("head", ""))


def weights_file(rest: str) -> Path:
    """The file behind the part of a name that follows "mace:".

    Raises:
        PotentialError: see `wanted`.
    """
    return wanted(rest).path
