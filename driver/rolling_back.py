"""Going back to an earlier version: what a person asks for, and what an alarm makes necessary.

A person's request is a file in the run directory, which the learner of a running run finds within half a second and answers with another
one; where nothing runs, the command does it by itself. The version that was named is pinned: until it is released no new one is made.
"""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any, Final

import msgspec

from tumbaga.driver import rollout
from tumbaga.driver.errors import DriverError
from tumbaga.online import versions
from tumbaga.online.errors import VersionError
from tumbaga.online.store import Store, StoredVersion
from tumbaga.online.versions import write_whole

FOLDER: Final = "requests"
EVENT: Final = "rollback"
_REQUEST, _ANSWER = "rollback.json", "rollback-answer.json"
_PIN: Final = "pinned"  # note in the store
_POLL_S: Final = 0.05


class RollbackError(DriverError):
    """A version cannot be gone back to."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"rollback: {self.problem}"


class Request(msgspec.Struct, frozen=True):
    """What a person asks for.

    Attributes:
        id: names it.
        version: to go back to; None for the one before what serves.
        release: learn again, instead.
    """

    id: str
    version: int | None = None
    release: bool = False


class Outcome(msgspec.Struct, frozen=True):
    """What became of a request.

    Attributes:
        id: of the request.
        before: number of the version that served.
        after: number of the version that serves now.
        problem: why nothing was done; empty if it was.
        note: what else is to be known.
    """

    id: str
    before: int = 0
    after: int = 0
    problem: str = ""
    note: str = ""


class RollingBack:
    """What the store is told when a version is gone back to.

    Args:
        store: of the run, open for writing.
        run_dir: the run directory.
    """

    def __init__(self, store: Store, run_dir: Path) -> None:
        self._store, self._run_dir = store, run_dir
        pinned = store.get_meta(_PIN)
        self.pinned: int | None = None if pinned is None else int(pinned)
        """Number of the version that a person went back to and did not release; None if there is none."""

    def carry_out(self, request: Request, serving: int) -> Outcome:
        """Do what was asked for, as far as the store is concerned: what is to serve then is the newest version that may."""
        try:
            if request.release:
                return Outcome(request.id, serving, serving, note=self._released())
            wanted = self._wanted(request.version, serving)
        except RollbackError as error:
            return Outcome(request.id, serving, serving, problem=error.problem)
        gone = [v.number for v in self._store.versions() if v.number > wanted.number and v.may_serve]
        for number in gone:
            self._store.set_version_state(number, "withdrawn")
        if not wanted.may_serve:
            self._store.set_version_state(wanted.number, "accepted")
        self._pin(wanted.number)
        self._store.add_event(EVENT, before=serving, after=wanted.number, by="user", reason="", withdrawn=gone)
        note = f"version {wanted.number} served already" if wanted.number == serving else ""
        return Outcome(request.id, serving, wanted.number, note=note)

    def withdraw(self, version: int, reason: str) -> list[int]:
        """An alarm: take back a version and all that were made from it; return their numbers, none if that was done before."""
        known = {v.number: v for v in self._store.versions()}
        if version not in known or version == 0 or not known[version].may_serve:
            return []
        gone = [number for number, v in known.items() if v.may_serve and version in (number, *_ancestors(v, known))]
        for number in gone:
            self._store.set_version_state(number, "withdrawn")
        after = max(v.number for v in self._store.versions() if v.may_serve)
        self._store.add_event(EVENT, before=version, after=after, by="alarm", reason=reason, withdrawn=gone)
        if self.pinned in gone:
            self._pin(after)
        return gone

    def _released(self) -> str:
        if self.pinned is None:
            raise RollbackError("no version is pinned here, so there is nothing to release")
        self._store.add_event("release", version=self.pinned)
        was, self.pinned = self.pinned, None
        self._store.set_meta(_PIN, None)
        return f"version {was} is no longer pinned: the next version is made of all labels that have come"

    def _pin(self, version: int) -> None:
        self._store.set_meta(_PIN, str(version))
        self.pinned = version

    def _wanted(self, number: int | None, serving: int) -> StoredVersion:
        """The version to go back to.

        Raises:
            RollbackError: there is no such version, or it must not serve.
        """
        known = {v.number: v for v in self._store.versions()}
        if number is None:
            if serving == 0 or serving not in known:
                raise RollbackError("version 0 serves, and there is none before it")
            number = next((n for n in _ancestors(known[serving], known) if known[n].state != "refused"), 0)
        if number not in known:
            raise RollbackError(f"there is no version {number}; there are 0 to {max(known, default=0)}, see: tumbaga versions")
        found = known[number]
        if found.state in ("refused", "candidate"):
            why = "was refused" if found.state == "refused" else "has not passed the gate"
            raise RollbackError(f"version {number} {why} and must not serve, see: tumbaga versions")
        if number:
            try:
                versions.read(self._run_dir / found.file)
            except VersionError as error:
                raise RollbackError(str(error)) from error
        return found


def _ancestors(version: StoredVersion, known: dict[int, StoredVersion]) -> list[int]:
    """The versions that a version came from, the nearest first."""
    found: list[int] = []
    while version.parent is not None and version.parent in known:
        found.append(version.parent)
        version = known[version.parent]
    return found


# -- the files -----------------------------------------------------------------------------------------------------------------------------


def ask(run_dir: Path, version: int | None, *, release: bool = False) -> Request:
    """Leave a request for the learner of a running run."""
    request = Request(uuid.uuid4().hex, version, release)
    write_whole(run_dir / FOLDER / _REQUEST, msgspec.json.encode(request))
    return request


def asked(run_dir: Path) -> Request | None:
    """The request that waits, if one does; one that cannot be read is taken away."""
    path = run_dir / FOLDER / _REQUEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Request)
    except OSError:
        return None
    except msgspec.DecodeError:
        path.unlink(missing_ok=True)
        return None


def answer(run_dir: Path, outcome: Outcome) -> None:
    """Tell the command what became of its request, which is done with."""
    write_whole(run_dir / FOLDER / _ANSWER, msgspec.json.encode(outcome))
    (run_dir / FOLDER / _REQUEST).unlink(missing_ok=True)


def wait(run_dir: Path, request: Request, seconds: float) -> Outcome:
    """Wait for the learner's answer.

    Raises:
        RollbackError: none came; the request is taken back.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            told = msgspec.json.decode((run_dir / FOLDER / _ANSWER).read_bytes(), type=Outcome)
        except (OSError, msgspec.DecodeError):
            told = None
        if told is not None and told.id == request.id:
            (run_dir / FOLDER / _ANSWER).unlink(missing_ok=True)
            return told
        time.sleep(_POLL_S)
    (run_dir / FOLDER / _REQUEST).unlink(missing_ok=True)
    raise RollbackError(
        f"the learner of this run has not answered within {seconds:g} s; nothing was done. Wait longer with --timeout, or look at {run_dir}/log"
    )


def do_alone(run_dir: Path, store: Store, version: int | None, *, release: bool = False) -> Outcome:
    """Go back where nothing runs; the caller holds the run directory. What the next start serves is written down at once."""
    serving = rollout.read_serving(run_dir)
    outcome = RollingBack(store, run_dir).carry_out(Request("", version, release), serving.version)
    if not outcome.problem and outcome.after != serving.version:
        path = next(v.file for v in store.versions() if v.number == outcome.after) if outcome.after else ""
        told: dict[str, Any] = {"version": outcome.after, "path": path, "lpr_scale": None, "quantile": serving.quantile}
        write_whole(run_dir / versions.FOLDER / versions.SERVING, json.dumps(told).encode())
    return outcome
