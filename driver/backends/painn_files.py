"""What follows "painn:" in a name: a packaged potential or a weights file. Imports nothing that takes time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tumbaga.driver.errors import PotentialError

PACKAGED: Final = {"cuau-water": Path(__file__).parent.parent / "data" / "cuau-water.safetensors"}


def weights_file(rest: str) -> Path:
    """The file behind the part of a name that follows "painn:".

    Raises:
        PotentialError: there is none.
    """
    path = PACKAGED.get(rest, Path(rest))
    if not path.is_file():
        known = ", ".join(f"painn:{name}" for name in sorted(PACKAGED))
        raise PotentialError(f"painn:{rest}", f"there is no file {rest!r}, and it is not a packaged potential ({known})")
    return path


def absolute(rest: str) -> str:
    """Return the same with the full path of its file, if it names one."""
    return str(Path(rest).absolute()) if rest not in PACKAGED and Path(rest).is_file() else rest
