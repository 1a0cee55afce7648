"""Labelled data sets from files: extended XYZ, ASE databases, OC20's archives, LMDB, XSF of ænet. One frame after the other, each checked.

    for one in datasets.stream("train.extxyz"):
        print(one.source, one.label.energy)

Energies eV, forces eV/Å, stresses eV/Å³ as ASE has them (positive where the cell wants to shrink), virials eV. Positions in Å.
What the names of energies and forces are is told by `Reading`; without it the common ones are tried (`ENERGIES`, `FORCES`, …).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from tumbaga.driver import datasets_ase, datasets_lmdb
from tumbaga.driver.datasets_raw import Raw
from tumbaga.driver.errors import ConfigError, DataError
from tumbaga.online.errors import BadFrameError
from tumbaga.online.records import Array, Frame, Label, LabelledFrame

__all__ = ["ENERGIES", "FORCES", "FORMATS", "SAID", "STRESSES", "VIRIALS", "Reading", "files", "read", "stream"]

_MAKERS: Final = ("", "REF_", "ref_", "dft_", "DFT_")
ENERGIES: Final = (*(f"{maker}energy" for maker in _MAKERS), "Energy", "total_energy")
FORCES: Final = (*(f"{maker}forces" for maker in _MAKERS), "Forces", "force", "REF_force", "dft_force")
STRESSES: Final = tuple(f"{maker}stress" for maker in _MAKERS)
VIRIALS: Final = (*(f"{maker}virial" for maker in _MAKERS), "virials")
SAID: Final = ("method", "role", "label_seconds")  # kept as the label's details
FORMATS: Final = {
    ".extxyz": "extended XYZ",
    ".xyz": "extended XYZ",
    ".db": "ASE database",
    ".json": "ASE database",
    ".aselmdb": "ASE rows in LMDB (fairchem)",
    ".lmdb": "pickled S2EF frames in LMDB (OC20)",
    ".xsf": "XSF of ænet, a frame a file",
}
_PACKED: Final = (".gz", ".bz2", ".xz")


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        energy: name of the energy in the files; empty tries the common ones.
        forces: name of the forces, likewise.
        stress: name of the stress, or of the virial if the name says so, likewise.
        method: level of theory that the labels are said to be of.
        pickles: whether `.lmdb` files, which hold pickles, may be opened at all.
    """

    energy: str = ""
    forces: str = ""
    stress: str = ""
    method: str = "data"
    pickles: bool = False


def read(
    paths: str | Path | Sequence[str | Path], how: Reading | None = None, bad: Callable[[DataError], None] | None = None
) -> list[LabelledFrame]:
    """Read all frames of one or several files or folders; see `stream`.

    Raises:
        DataError: as `stream`, or a file without any frame that is fit for use.
    """
    listed = [paths] if isinstance(paths, str | Path) else paths
    return [one for path in listed for one in stream(path, how, bad)]


def stream(path: str | Path, how: Reading | None = None, bad: Callable[[DataError], None] | None = None) -> Iterator[LabelledFrame]:
    """Read frame by frame; no more than one is held.

    Args:
        path: a file of a known format (`FORMATS`; text also packed as .gz, .bz2, .xz), or a folder whose files of known formats are all
            read, by name. An extended XYZ file `X.extxyz` beside a `X.txt` of OC20 ("id,frame,reference energy" a line) has the
            reference energies taken off, as OC20 means it. Either may be packed.
        how: names and permissions; None means the defaults.
        bad: told of each frame that is not fit for use, which is then left out; None raises instead.

    Raises:
        DataError: no such file or format, a file that is damaged, empty or holds no frame that is fit for use; a package is missing; or,
            without `bad`, a frame without energy or forces, with numbers that are not finite, of a wrong shape or periodic in one or two
            directions only.
    """
    how = how or Reading()
    good = 0
    for file in files(path):
        number = -1
        for number, raw in enumerate(_raws(file, how)):
            try:
                one = _checked(file, number, raw, how)
            except DataError as error:
                if bad is None:
                    raise
                bad(error)
                continue
            good += 1
            yield one
        if number < 0:
            raise DataError(str(file), "holds no frame")
    if not good:
        raise DataError(str(path), "holds no frame that is fit for use")


def files(path: str | Path) -> list[Path]:
    """Return the file itself, or the data files of a folder by name (numbers in names count as numbers).

    Raises:
        DataError: there is no such path, no file of a known format in the folder, or the file is of no known format.
    """
    path = Path(path)
    if path.is_dir() and not (path / "data.mdb").exists():
        found = sorted((one for one in path.iterdir() if one.is_file() and _format(one)), key=_natural)
        if not found:
            raise DataError(str(path), f"the folder holds no file that ends in {', '.join(FORMATS)}")
        return found
    if not path.exists():
        raise DataError(str(path), "there is no such file")
    if not _format(path):
        raise DataError(str(path), f"its format is not known; names end in {', '.join(FORMATS)} ({', '.join(_PACKED)} for packed text)")
    return [path]


def _said(results: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a label besides its numbers, as `tumbaga export` writes it."""
    return {name: results[name] for name in SAID if isinstance(results.get(name), str | int | float)}


# -- helpers ---------------------------------------------------------------------------------------------------------------------------


def _format(path: Path) -> str:
    """What the file is by its name, e.g. ".extxyz"; empty if that is not known."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in _PACKED]
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else ""


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _raws(path: Path, how: Reading) -> Iterator[Raw]:
    form = _format(path)
    if form in (".extxyz", ".xyz"):
        return datasets_ase.extxyz(path)
    if form in (".db", ".json"):
        return datasets_ase.database(path)
    if form == ".xsf":
        return _xsf(path)
    if form == ".aselmdb":
        return datasets_lmdb.ase_rows(path)
    if not how.pickles:
        told = "holds pickles, which can run code of whoever wrote them; if you trust it, say so with --trust-pickles (Reading.pickles)"
        raise DataError(str(path), told)
    return datasets_lmdb.oc20(path)


def _xsf(path: Path) -> Iterator[Raw]:
    from tumbaga.driver.backends.aenet_xsf import read_xsf

    try:
        frame, energy, forces = read_xsf(path)
    except ConfigError as error:
        yield Raw([], [], [], [], broken=error.problem)
        return
    yield Raw(frame.numbers, frame.positions, frame.cell, [frame.periodic] * 3, {"energy": energy, "forces": forces})


def _checked(path: Path, number: int, raw: Raw, how: Reading) -> LabelledFrame:
    where = str(path)
    if raw.broken:
        raise DataError(where, raw.broken, number)
    periodic = bool(np.any(raw.pbc))
    if periodic and not np.all(raw.pbc):
        raise DataError(where, "is periodic in some directions only; write it with all three (vacuum in the cell) or none", number)
    try:
        cell = np.asarray(raw.cell, dtype=np.float64)
        frame = Frame(np.asarray(raw.numbers), np.asarray(raw.positions), cell if periodic else np.zeros((3, 3)), periodic)
        energy = float(_numbers(_one(raw.results, how.energy, ENERGIES, "energy"), "energy", ())) - raw.reference
        forces = _numbers(_one(raw.results, how.forces, FORCES, "forces"), "forces", (len(frame), 3))
        label = Label(energy, forces, how.method, 0.0, _said(raw.results), virial=_virial(raw.results, how.stress, frame))
    except BadFrameError as error:
        raise DataError(where, f"{error}", number) from error
    return LabelledFrame(frame, label, f"{path.name}#{number}")


def _one(results: Mapping[str, Any], chosen: str, known: Sequence[str], what: str) -> Any:
    """The value of that name, or the only one of the known names."""
    if chosen:
        if results.get(chosen) is None:
            names = ", ".join(sorted(str(name) for name, value in results.items() if value is not None)) or "nothing"
            raise BadFrameError("it", f"has no {what} of the name {chosen!r}; it has {names:.300}")
        return results[chosen]
    there = [name for name in known if results.get(name) is not None]
    if not there:
        raise BadFrameError("it", f"has no {what}; names that are tried are {', '.join(known)}, another is told with --{what}-key")
    first = np.asarray(results[there[0]])
    for other in there[1:]:
        if not np.array_equal(first, np.asarray(results[other])):
            raise BadFrameError("it", f"has {what} as {there[0]} and, with other numbers, as {other}; choose with --{what}-key")
    return results[there[0]]


def _numbers(value: Any, what: str, shape: tuple[int, ...]) -> Array:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise BadFrameError(what, f"cannot be read as numbers ({value!s:.60})") from error
    if array.shape != shape and array.size == 1 and shape == ():
        array = array.reshape(())
    if array.shape != shape:
        raise BadFrameError("it", f"has {what} of shape {array.shape}, expected {shape}")
    if not np.isfinite(array).all():
        raise BadFrameError("it", f"has {what} with a number that is not finite")
    return array


def _virial(results: Mapping[str, Any], chosen: str, frame: Frame) -> Array | None:
    """-dE/dstrain, eV, from a stress (times minus the volume) or a virial; None without one, or where nothing can be strained."""
    if not frame.periodic:
        return None
    names = (chosen,) if chosen else (*STRESSES, *VIRIALS)
    found = next((name for name in names if results.get(name) is not None), "")
    if not found:
        if chosen:
            raise BadFrameError("it", f"has no stress of the name {chosen!r}")
        return None
    tensor = _tensor(results[found])
    return tensor if "virial" in found.lower() else -tensor * abs(float(np.linalg.det(frame.cell)))


def _tensor(value: Any) -> Array:
    """A symmetric tensor from 3 x 3 numbers, or from 6 in Voigt's order xx yy zz yz xz xy."""
    size = np.size(value)
    if size == 6:
        xx, yy, zz, yz, xz, xy = _numbers(np.ravel(value), "stress", (6,))
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    if size != 9:
        raise BadFrameError("stress", f"has {size} numbers; 6 or 9 are needed")
    return _numbers(np.reshape(value, (3, 3)), "stress", (3, 3))
