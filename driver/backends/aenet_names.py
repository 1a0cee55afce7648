"""What follows "aenet:" in a name: a weights file, or files of ænet. Imports nothing that takes time.

aenet:/path/to/weights.safetensors      a version of a run, or what was trained here
aenet:/path/to/folder                   a folder with one *.nn.ascii file for each element; or with folders of that kind: a committee
aenet:/path/Cu.nn.ascii,/path/Au.nn.ascii    one file for each element; a * in a file name stands for anything
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tumbaga.driver.errors import PotentialError

SUFFIX: Final = ".nn.ascii"
_FORMS: Final = (
    "give a .safetensors file, a folder with one *.nn.ascii file for each element (or of such folders), or the files with commas"
)


def files(rest: str) -> tuple[tuple[Path, ...], ...]:
    """The files behind the part of a name that follows "aenet:", those of each member together.

    Raises:
        PotentialError: there are none.
    """
    named = [part.strip() for part in rest.split(",") if part.strip()]
    if len(named) == 1 and Path(named[0]).is_dir():
        return _in_folder(rest, Path(named[0]))
    found: list[Path] = []
    for one in named:
        path = Path(one)
        matching = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
        if not matching or not all(match.is_file() for match in matching):
            raise PotentialError(f"aenet:{rest}", f"there is no file {one!r}; {_FORMS}")
        found += matching
    if not found:
        raise PotentialError(f"aenet:{rest}", f"names no file; {_FORMS}")
    if len(found) > 1 and (strange := [path for path in found if not path.name.endswith(SUFFIX)]):
        raise PotentialError(f"aenet:{rest}", f"{strange[0].name!r} is no network of one element (*{SUFFIX}), so it must stand alone")
    return (tuple(found),)


def _in_folder(rest: str, folder: Path) -> tuple[tuple[Path, ...], ...]:
    own = tuple(sorted(folder.glob(f"*{SUFFIX}")))
    members = [tuple(sorted(inner.glob(f"*{SUFFIX}"))) for inner in sorted(folder.iterdir()) if inner.is_dir()]
    members = [member for member in members if member]
    if bool(own) == bool(members):
        told = "and folders with such files; take one of both away" if own else "nor folders with such files"
        raise PotentialError(f"aenet:{rest}", f"the folder has {'' if own else 'neither '}*{SUFFIX} files {told}")
    return (own,) if own else tuple(members)


def weights_file(rest: str) -> Path:
    """The file behind the part of a name that follows "aenet:"; of several the one that was changed last.

    Raises:
        PotentialError: see `files`.
    """
    return max((path for member in files(rest) for path in member), key=lambda path: path.stat().st_mtime_ns)


def absolute(rest: str) -> str:
    """Return the same with the full paths of its files and folders, as far as there are any."""
    parts = [part.strip() for part in rest.split(",")]
    return ",".join(str(Path(part).absolute()) if part and _exists(Path(part)) else part for part in parts)


def _exists(path: Path) -> bool:
    return any(path.parent.glob(path.name)) if "*" in path.name else path.exists()
