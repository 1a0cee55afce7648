"""What a run has learnt from, for other programs: rows of the store in the order they came, and the formats they are written in.

A file is written whole or not at all, and never in the place of another one unless that is asked for.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from tumbaga.driver.errors import ConfigError, DriverError, RunDirError
from tumbaga.online.errors import StoreError
from tumbaga.online.records import Array, Frame, Label, Role
from tumbaga.online.store import FILE, Store, StoredLabel

WHICH: Final = ("labels", "failures", "quarantine")
MARK: Final = "tumbaga-export.json"  # in folders that an export has written: only those are replaced

Fact = str | int | float


@dataclass(frozen=True, eq=False)
class Exported:
    """One frame with all that is known of it.

    Attributes:
        frame: the frame.
        label: its label; None for a frame whose label failed.
        role: what the label is used for; None without a label.
        facts: what stands beside it, by name; see `_facts`.
        served_forces: what was served for the frame when it was first flagged, shape (n_atoms, 3), eV/Å; None for an imported one.
    """

    frame: Frame
    label: Label | None
    role: Role | None
    facts: dict[str, Fact] = field(default_factory=dict)
    served_forces: Array | None = None


class Writer(Protocol):
    """Writes rows to a path that does not exist yet."""

    def __call__(self, rows: Sequence[Exported], path: Path, /, *, prefix: str, title: str) -> None:
        """Write a file, or a folder with `MARK` in it."""


@dataclass(frozen=True)
class Format:
    """A format: what its names may end in (the first is added to a name of ours), where its writer is, whether it holds frames without labels."""

    suffixes: tuple[str, ...]
    writer: str
    unlabelled: bool = True


FORMATS: Final = {
    "extxyz": Format((".extxyz", ".xyz"), "tumbaga.driver.exporting_xyz:write"),
    "ase-db": Format((".db",), "tumbaga.driver.exporting_ase:write"),
    "deepmd": Format(("",), "tumbaga.driver.exporting_deepmd:write", unlabelled=False),
    "chemiscope": Format((".json.gz", ".json"), "tumbaga.driver.exporting_chemiscope:write"),
}


def collect(run: Path, which: str = "labels", role: Role | None = None, method: str = "") -> list[Exported]:
    """Read the rows of a run, while it goes on or after it.

    Args:
        run: the run directory.
        which: "labels", "failures" (frames whose label failed, with the reason) or "quarantine" (labels that were set aside).
        role: only labels of this role; None means all.
        method: only labels of this method; empty means all, which must then be of one.

    Raises:
        RunDirError: there is no store, it cannot be read, or nothing in it was asked for.
        ConfigError: the labels are of several methods, and none was chosen.
    """
    if not (run / FILE).exists():
        raise RunDirError(str(run), f"has no {FILE}: it is not the directory of a run that learns")
    try:
        with Store(run / FILE, read_only=True) as store:
            rows = _of_which(store, which)
    except StoreError as error:
        raise RunDirError(str(run), str(error)) from error
    methods = sorted({one.label.method for one in rows if one.label is not None})
    if method:
        rows = [one for one in rows if one.label is None or one.label.method == method]
    elif len(methods) > 1:
        raise ConfigError("--method", f"must be one of the methods of these labels, which do not mix: {', '.join(methods)}")
    rows = [one for one in rows if role is None or one.role is role]
    if not rows:
        asked = f" of role {role.value}" if role else ""
        asked += f" of method {method}; there are {', '.join(methods) or 'none at all'}" if method else ""
        raise RunDirError(str(run), f"has no {which}{asked}")
    return rows


def write(rows: Sequence[Exported], to: str, path: Path, *, prefix: str = "REF_", title: str = "tumbaga", force: bool = False) -> None:
    """Write rows to a file or, in the format "deepmd", to a folder.

    Args:
        rows: at least one.
        to: a key of `FORMATS`.
        path: where to; its end must be one of the format's.
        prefix: what the names of energy, forces, stress and virials begin with, in extended XYZ.
        title: for people, in formats that have one.
        force: replace what is there, if it is a file or a folder that an export has written.

    Raises:
        ConfigError: the path does not fit, something is there, or rows without labels cannot be held by the format.
        DriverError: it cannot be written, or a package is missing.
    """
    form = FORMATS[to]
    if not path.name.endswith(form.suffixes):
        raise ConfigError("--output", f"{path} must end in {' or '.join(form.suffixes)}")
    if not form.unlabelled and any(one.label is None for one in rows):
        raise ConfigError(
            "--to", f"{to} holds labelled frames only; {', '.join(name for name in FORMATS if FORMATS[name].unlabelled)} hold others too"
        )
    _free(path, force)
    suffix = next(end for end in form.suffixes if path.name.endswith(end))
    temporary = path.with_name(f".{path.name.removesuffix(suffix)}.{os.getpid()}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _writer(form.writer)(rows, temporary, prefix=prefix, title=title)
        _sync(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        raise DriverError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def default_path(run: Path, to: str, which: str, role: Role | None) -> Path:
    """A name in the working directory that tells what is in the file.

    >>> str(default_path(Path("runs/first"), "extxyz", "labels", Role.HOLDOUT))
    'first-labels-holdout.extxyz'
    """
    return Path(
        "-".join([run.absolute().name, which, *([role.value] if role else []), *(["deepmd"] if to == "deepmd" else [])])
        + FORMATS[to].suffixes[0]
    )


def missing(package: str, error: ImportError) -> DriverError:
    """The sentence about a package that a format needs."""
    return DriverError(f"this format needs the package {package}: pip install 'tumbaga[export]' ({error})")


# -- rows ------------------------------------------------------------------------------------------------------------------------------


def _of_which(store: Store, which: str) -> list[Exported]:
    if which == "labels":
        return [_labelled(store, one, {}) for one in store.labels()]
    if which == "quarantine":
        return [_labelled(store, one.stored, {"check": one.check, "problem": one.reason}) for one in store.quarantined()]
    rows = []
    for frame_id, problem in store.failures():
        frame = store.frame(frame_id)
        rows.append(Exported(frame, None, None, *_facts(store, frame_id, frame, {"problem": problem})))
    return rows


def _labelled(store: Store, stored: StoredLabel, more: dict[str, Fact]) -> Exported:
    said: dict[str, Fact] = {"method": stored.label.method, "role": stored.role.value, "label_seconds": stored.label.seconds, **more}
    return Exported(stored.frame, stored.label, stored.role, *_facts(store, stored.frame_id, stored.frame, said, imported=stored.imported))


def _facts(
    store: Store, frame_id: int, frame: Frame, said: dict[str, Fact], *, imported: bool = False
) -> tuple[dict[str, Fact], Array | None]:
    """What is known of a frame, by name, and the forces that were served for it.

    ================  ====================================================================================================
    frame             content hash, as in the store ("sha256:" and 16 digits)
    reason            why it was picked; "imported" where its label was
    session, step     where it comes from
    version           what had served it
    force_std         its largest calibrated force uncertainty then, eV/Å
    served_energy     eV
    ================  ====================================================================================================
    """
    flags = store.flags(frame_id)
    facts: dict[str, Fact] = {"frame": f"sha256:{frame.key}", **said}
    if not flags:
        return facts | {"reason": "imported"}, None
    first = flags[0]
    facts |= {"reason": "imported" if imported else first.reason.value, "session": first.session, "step": first.step}
    facts |= {"version": first.version, "force_std": first.score, "served_energy": first.energy}
    return facts, first.forces


# -- files -----------------------------------------------------------------------------------------------------------------------------


def _writer(where: str) -> Writer:
    module, _, name = where.partition(":")
    found: Writer = getattr(importlib.import_module(module), name)
    return found


def _free(path: Path, force: bool) -> None:
    if not path.exists():
        return
    if not force:
        raise ConfigError("--output", f"{path} is there already; give another name, or --force to replace it")
    if path.is_dir() and not (path / MARK).exists():
        raise ConfigError("--output", f"{path} is a folder that no export has written; give another name")


def _sync(path: Path) -> None:
    """On the disk before it takes its name."""
    files: Iterable[Path] = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    for one in files:
        with open(one, "rb") as file:
            os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
