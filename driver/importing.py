"""Labels that were computed elsewhere, into the store of a run: one level of theory, nothing twice, nothing while the run goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ase.data import chemical_symbols

from tumbaga.driver import config as configs
from tumbaga.driver.errors import ConfigError, DataError, RunDirError
from tumbaga.driver.rundir import RunDir
from tumbaga.online.errors import OnlineError
from tumbaga.online.ports import PotentialSpec
from tumbaga.online.records import Frame, Label, LabelledFrame, Role
from tumbaga.online.selection import TRAIN_PER_HOLDOUT
from tumbaga.online.store import FILE, Store

_EVERY: Final = TRAIN_PER_HOLDOUT + 1


@dataclass(frozen=True)
class Level:
    """What the labels are said to be.

    Attributes:
        method: of all of them; empty where the files say it themselves.
        as_method: the method they are stored as, if somebody vouches that both are the same level of theory; empty otherwise.
        role: what they are for; None keeps what the files say, and without a word holds out every fourth one.
    """

    method: str = ""
    as_method: str = ""
    role: Role | None = None


@dataclass(frozen=True)
class Taken:
    """What an import did: labels by role, how many were in the store before, and the method."""

    added: dict[Role, int]
    known: int
    method: str


def take(run: Path, found: Iterable[LabelledFrame], level: Level) -> Taken:
    """Put labels into a run's store: all of them or, if one cannot be taken, none. A directory that is not there yet is made.

    Args:
        run: the run directory; nobody may hold it.
        found: labelled frames; `details["method"]` and `details["role"]` are what their file says.
        level: of theory.

    Raises:
        RunDirError: the run goes on, or its store cannot be written.
        ConfigError: labels of another method than the run's, of several methods, of one that nobody told, or of two different ones.
        DataError: an element that the run's potential does not know.
    """
    settings = configs.load(run) if (run / configs.FILE).exists() else None
    own = "" if settings is None else method_of(settings)
    elements = () if settings is None else _elements(settings)
    folder = RunDir(run)
    folder.hold()
    try:
        with Store(run / FILE) as store:
            checked = _Checked(own or _only_method(store, run), level, elements)
            labelled = {one.frame.key for one in store.labels() if one.label.method == checked.method} if checked.method else set()
            known, held = store.import_labels(checked.rows(found, labelled)), checked.added
            return Taken(dict(held), known.known, checked.method)
    except OnlineError as error:
        raise RunDirError(str(run), str(error)) from error
    finally:
        folder.release()


def method_of(settings: configs.Config) -> str:
    """The method of a run's labels.

    Raises:
        ConfigError: there is none of that name.
    """
    from tumbaga.driver.client_labels import make_labeller

    try:
        return make_labeller(settings.label.method, **settings.label.options).method
    except OnlineError as error:
        raise ConfigError("label.method", str(error)) from error


def check_elements(store: Store, method: str, spec: PotentialSpec, run: Path) -> None:
    """Find labels that a potential cannot learn from, since they were imported before it was known which one the run would have.

    Raises:
        RunDirError: there are some; the sentence says which elements it does not know.
    """
    strange = {number for one in store.labels(method) for number in one.frame.numbers.tolist()} - set(spec.elements)
    if spec.elements and strange:
        told = f"holds labels with {_names(strange)}, which {spec.name} does not know; choose another directory, and import with --only"
        raise RunDirError(str(run), told)


class _Checked:
    """Looks at each label before it is stored.

    Args:
        own: the method of the run, empty if nothing has given it one.
        level: what the user says.
        elements: atomic numbers that the run's potential knows; empty means any.
    """

    def __init__(self, own: str, level: Level, elements: tuple[int, ...]) -> None:
        self._level, self._elements = level, frozenset(elements)
        self._own = own
        self.method = own or level.as_method or level.method
        self.added: Counter[Role] = Counter()
        if own and level.as_method and level.as_method != own:
            raise ConfigError("--as", f"is {level.as_method!r}, but this run's labels are of {own!r}, and it would never learn from others")

    def rows(self, found: Iterable[LabelledFrame], labelled: set[str]) -> Iterator[tuple[Frame, Label, Role]]:
        """What the store takes; `labelled` are the keys of frames that it has a label of."""
        for one in found:
            self._check_elements(one)
            label = self._label(one)
            known = one.frame.key in labelled
            role = self._role(one)
            if not known:
                labelled.add(one.frame.key)
                self.added[role] += 1
            yield one.frame, label, role

    def _role(self, one: LabelledFrame) -> Role:
        if self._level.role is not None:
            return self._level.role
        if (said := one.label.details.get("role")) in [role.value for role in Role]:
            return Role(said)
        return Role.HOLDOUT if sum(self.added.values()) % _EVERY == 1 else Role.TRAIN  # as for a run's own labels

    def _label(self, one: LabelledFrame) -> Label:
        told = dict(one.label.details)
        in_file, seconds = str(told.pop("method", "")), told.pop("label_seconds", 0.0)
        told.pop("role", None)
        said = self._level.method or in_file
        if in_file and self._level.method and in_file != self._level.method:
            raise ConfigError("--method", f"is {self._level.method!r}, but {one.source} says that its label is of {in_file!r}")
        if not (said or self._level.as_method):
            raise ConfigError("--method", f"must say the level of theory of these labels: {one.source} does not")
        method = self._level.as_method or said
        if self.method and method != self.method:
            raise ConfigError("--method", self._mismatch(one, method))
        self.method = method
        facts: dict[str, Any] = {**told, "imported": one.source}
        if self._level.as_method:
            facts["method_said"] = said
        return replace(one.label, method=method, seconds=float(seconds), details=facts)

    def _mismatch(self, one: LabelledFrame, method: str) -> str:
        whose = "this run's labels are" if self._own else "the labels before it are"
        return (
            f"{one.source} is of {method!r}, but {whose} of {self.method!r}, and levels of theory are never mixed; "
            f"if they are the same one under two names, say so with --as {self.method!r}"
        )

    def _check_elements(self, one: LabelledFrame) -> None:
        strange = set(one.frame.numbers.tolist()) - self._elements
        if self._elements and strange:
            raise DataError(one.source, f"holds {_names(strange)}, which the run's potential does not know; choose frames with --only")


def _names(numbers: Iterable[int]) -> str:
    return ", ".join(chemical_symbols[number] for number in sorted(numbers))


def _only_method(store: Store, run: Path) -> str:
    """The method of the labels in a store whose run has not begun."""
    methods = sorted({one.label.method for one in store.labels()})
    if len(methods) > 1:
        raise RunDirError(
            str(run), f"has labels of several methods and no {configs.FILE} that says which are learnt from: {', '.join(methods)}"
        )
    return methods[0] if methods else ""


def _elements(settings: configs.Config) -> tuple[int, ...]:
    from tumbaga.driver.backends import registry

    return registry.load(settings.potential.model, "cpu", settings.potential.dtype).spec.elements
