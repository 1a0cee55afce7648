"""The commands about versions: list them, go back to one, and trace a force to the labels behind it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tumbaga.driver.errors import DriverError, RunDirError

if TYPE_CHECKING:
    from tumbaga.driver.rolling_back import Outcome
    from tumbaga.driver.rundir import RunDir
    from tumbaga.online.store import Store

_SETTLE_S, _POLL_S = 2.0, 0.1  # how long to wait for the sessions to be on their way

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")]


def versions(run: RunArgument, as_json: JsonOption = False) -> None:
    """List the versions of a run: what each was made from, with which labels, and what became of it."""
    from tumbaga.driver import provenance

    with _store(run) as store:
        told = [provenance.described(store, version) for version in store.versions()]
        pinned = store.get_meta("pinned")
    if as_json:
        typer.echo(json.dumps({"versions": told, "pinned": None if pinned is None else int(pinned)}))
        return
    typer.echo(provenance.table(told))
    if pinned is not None:
        typer.echo(f"\nversion {pinned} is pinned: no new version is made before: tumbaga rollback {run} --release")


def rollback(
    run: RunArgument,
    version: Annotated[
        int | None, typer.Argument(metavar="[VERSION]", min=0, help="Number of the version to go back to; the parent of what serves.")
    ] = None,
    release: Annotated[bool, typer.Option("--release", help="Learn again: newer versions may be made and served.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="How long to wait for a running run, seconds.")] = 30.0,
) -> None:
    """Go back to an earlier version, and stay there.

    A running run goes on: its sessions ramp to that version at once. Labels are collected as before, but no new version is made and served
    until it is released with --release; then the next one is made of all labels that have come.
    """
    from tumbaga.driver.rundir import RunDir

    if release and version is not None:
        raise DriverError("rollback: --release takes no version; it lets the run learn again from where it is")
    folder = RunDir(run)
    holder = folder.holder()
    outcome = _alone(folder, version, release) if holder is None else _by_the_learner(folder, version, release, timeout)
    if outcome.problem:
        raise DriverError(f"rollback: {outcome.problem}")
    typer.echo(_said(run, outcome, release))
    if holder is not None and not release:
        for line in _sessions(folder, outcome.after):
            typer.echo(line)


def _alone(folder: RunDir, version: int | None, release: bool) -> Outcome:
    from tumbaga.driver import rolling_back
    from tumbaga.online.errors import StoreError
    from tumbaga.online.store import FILE, Store

    _store(folder.path).close()  # a run directory that learnt something; nothing is made where it is not
    folder.hold()
    try:
        with Store(folder.path / FILE) as store:
            outcome = rolling_back.do_alone(folder.path, store, version, release=release)
        with contextlib.suppress(RunDirError):  # a run that was never started has no status
            pinned = None if release else outcome.after
            changed = {} if outcome.problem else {"pinned": pinned, "serving_version": outcome.after}
            folder.write_status(folder.read_status() | changed)
        return outcome
    except StoreError as error:
        raise RunDirError(str(folder.path), str(error)) from error
    finally:
        folder.release()


def _by_the_learner(folder: RunDir, version: int | None, release: bool, timeout: float) -> Outcome:
    from tumbaga.driver import config as configs
    from tumbaga.driver import rolling_back

    if not configs.load(folder.path).learn.enabled:
        raise DriverError(
            "rollback: learning is off in this run, so there is nobody to carry it out; stop the run first, then it can be done"
        )
    return rolling_back.wait(folder.path, rolling_back.ask(folder.path, version, release=release), timeout)


def _said(run: Path, outcome: Outcome, release: bool) -> str:
    if release:
        return f"{run}: {outcome.note}"
    what = outcome.note or f"from version {outcome.before} back to version {outcome.after}"
    return f"{run}: {what}; it is pinned until: tumbaga rollback {run} --release"


def _sessions(folder: RunDir, version: int) -> list[str]:
    """Where the sessions are, once they are on their way; an engine moves with its next force calls."""
    until = time.monotonic() + _SETTLE_S
    while True:
        sessions: list[dict[str, Any]] = folder.read_status()["sessions"]
        arrived = all(version in (session["version"], session["ramping_to"]) for session in sessions)
        if arrived or time.monotonic() > until:
            return [f"  {session['name']}: {_where(session, version)}" for session in sessions]
        time.sleep(_POLL_S)


def _where(session: dict[str, Any], version: int) -> str:
    if session["ramping_to"] is not None:
        return f"on the way from version {session['version']} to version {session['ramping_to']}"
    if session["version"] == version:
        return f"version {version} serves"
    return f"version {session['version']} serves; it moves with its next force calls"


def trace(
    run: RunArgument,
    step: Annotated[int | None, typer.Argument(metavar="[STEP]", min=0, help="Step of the engine; the first force call is step 0.")] = None,
    session: Annotated[str | None, typer.Option("--session", metavar="NAME", help="Which session, where there are several.")] = None,
    conversation: Annotated[
        int | None,
        typer.Option("--conversation", metavar="N", min=1, help="Which conversation of the session, where its engine came again."),
    ] = None,
    call: Annotated[
        int | None, typer.Option("--call", metavar="N", min=0, help="Instead of a step: the N-th force call of the session, from 0.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say where a force comes from: the version that served it, its labels, and what the gate said, back to version 0."""
    from tumbaga.driver import provenance

    if (step is None) == (call is None):
        raise DriverError("trace: give a STEP, or --call N instead of it")
    with _store(run) as store:
        told = provenance.trace(store, *provenance.find(store, step, session=session, conversation=conversation, call=call))
    typer.echo(json.dumps(told) if as_json else provenance.text(told))


def _store(run: Path) -> Store:
    """The store of a run, open for reading.

    Raises:
        RunDirError: there is none.
    """
    from tumbaga.online.errors import StoreError
    from tumbaga.online.store import FILE, Store

    if not (run / FILE).exists():
        raise RunDirError(str(run), f"has no {FILE}; is it a run directory, and was learning on?")
    try:
        return Store(run / FILE, read_only=True)
    except StoreError as error:
        raise RunDirError(str(run), str(error)) from error
