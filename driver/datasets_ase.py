"""Data sets that ASE reads: extended XYZ (OC20's with their reference energies, too), ASE databases. Frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from tumbaga.driver.datasets_raw import Raw
from tumbaga.driver.errors import DataError


def extxyz(path: Path) -> Iterator[Raw]:
    """Read extended XYZ, packed or not; where OC20's text file stands beside it, with its reference energies.

    Raises:
        DataError: the file is damaged, or the text file beside it does not have a line for each frame.
    """
    from ase.io.extxyz import read_xyz

    references = _references(path)
    with _opened(path) as file:
        number = 0
        frames = read_xyz(file, index=slice(None))
        while (atoms := _next(frames, path, number)) is not None:
            reference = _reference(references, path, number)
            yield _of_atoms(atoms, reference=reference)
            number += 1
    if references is not None and next(references, None) is not None:
        raise DataError(str(path), f"has {number} frames, but {_beside(path)} has more lines")


def database(path: Path) -> Iterator[Raw]:
    """Read an ASE database (.db, .json) in the order of its rows.

    Raises:
        DataError: the file is damaged or something else.
    """
    from ase.db import connect

    rows, number = _guarded(lambda: connect(str(path)).select(), path, 0), 0
    while (row := _next(rows, path, number)) is not None:
        atoms = _guarded(row.toatoms, path, number)
        yield _of_atoms(atoms, {**_guarded(lambda row=row: row.data, path, number), **row.key_value_pairs})
        number += 1


def _of_atoms(atoms: Any, more: dict[str, Any] | None = None, reference: float = 0.0) -> Raw:
    # the calculator's own dictionary: its methods would put zero forces on atoms that were held fixed
    own = {} if atoms.calc is None else atoms.calc.results
    beside = {name: value for name, value in atoms.arrays.items() if name not in ("numbers", "positions")}
    return Raw(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, {**atoms.info, **beside, **(more or {}), **own}, reference)


def _opened(path: Path) -> IO[str]:
    from ase.io.formats import open_with_compression

    try:
        file: IO[str] = open_with_compression(str(path), "rt")
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror or error})") from error
    return file


def _next(iterator: Any, path: Path, number: int) -> Any:
    return _guarded(lambda: next(iterator, None), path, number)


def _guarded(call: Any, path: Path, number: int) -> Any:
    try:
        return call()
    except Exception as error:  # a foreign reader: whatever it raises, the file is not what its name says
        told = " ".join(str(error).split())
        raise DataError(str(path), f"cannot be read any further ({type(error).__name__}: {told:.160})", number) from error


# -- OC20 ------------------------------------------------------------------------------------------------------------------------------


def _beside(path: Path) -> Path:
    """The text file that would hold the reference energies: s2ef/0.extxyz.xz has s2ef/0.txt.xz or s2ef/0.txt."""
    stem = path.name.partition(".extxyz")[0]
    return next(
        (found for end in (".txt", ".txt.xz", ".txt.gz") if (found := path.with_name(stem + end)).exists()), path.with_name(stem + ".txt")
    )


def _references(path: Path) -> Iterator[str] | None:
    """The lines of OC20's text file, or None where there is none beside the structures."""
    text = _beside(path)
    if ".extxyz" not in path.name or not text.exists():
        return None
    lines = _lines(text)
    first = next(lines, "")
    if _energy(first) is None:
        return None  # some text of the user
    return (line for part in ([first], lines) for line in part)


def _lines(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        while line := _guarded(file.readline, path, 0):
            if line.strip():
                yield line


def _reference(lines: Iterator[str] | None, path: Path, number: int) -> float:
    if lines is None:
        return 0.0
    line = next(lines, None)
    energy = None if line is None else _energy(line)
    if energy is None:
        raise DataError(str(path), f"has no reference energy in {_beside(path)}", number)
    return energy


def _energy(line: str) -> float | None:
    """The third of three parts, "random1,frame0,-12.3", in eV."""
    parts = line.strip().split(",")
    try:
        value = float(parts[2]) if len(parts) == 3 else np.nan
    except ValueError:
        return None
    return value if np.isfinite(value) else None
