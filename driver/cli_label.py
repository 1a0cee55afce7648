"""The command `tumbaga label`: work the queue of a run off later or elsewhere, look at it, and decide about labels that were set aside."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer

from tumbaga.driver import config as configs
from tumbaga.driver.errors import ConfigError, DriverError

if TYPE_CHECKING:
    from tumbaga.driver.rundir import RunDir
    from tumbaga.online.store import Store

EXIT_FAILED, EXIT_STOPPED = 1, 130
_PLAIN_S = 10.0  # between two lines where nobody watches a terminal
_SHOWN = 5  # new failures that are told
_Said = TypeVar("_Said")
_LOOK, _DECIDE = "Look at the queue", "Decide about labels that were set aside or failed"


def label(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    method: Annotated[
        str | None, typer.Option("--label", metavar="METHOD", help="Who labels, if not who the run has; of the same level of theory.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Labels at a time, if not as many as the run.")
    ] = None,
    most: Annotated[int | None, typer.Option("--max", metavar="N", min=1, help="Stop after so many labels.")] = None,
    show_queue: Annotated[
        bool, typer.Option("--list", help="Show which frames wait, and what became of others.", rich_help_panel=_LOOK)
    ] = False,
    show_aside: Annotated[
        bool, typer.Option("--quarantine", help="Show the labels that were set aside, with reasons.", rich_help_panel=_LOOK)
    ] = False,
    release: Annotated[
        list[int] | None,
        typer.Option("--release", metavar="FRAME", help="Believe the label of this frame; can be repeated.", rich_help_panel=_DECIDE),
    ] = None,
    retry: Annotated[
        list[int] | None,
        typer.Option("--retry", metavar="FRAME", help="Queue this frame once more; can be repeated.", rich_help_panel=_DECIDE),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="KEY=VALUE",
            help="For --retry: an option of the labeller that leaves the level of theory as it is; can be repeated.",
            rich_help_panel=_DECIDE,
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the summary.")] = False,
) -> None:
    """Label the frames that wait in a run which has stopped, and learn from them: its next start serves what was learnt.

    Uses the run's method, limits and checks. Stop it with Ctrl-C: labels under way wait for the next time. On another machine, label a copy of
    the run directory there and bring the labels back with `tumbaga export` and `tumbaga import`.

    Ends with exit code 0 when all is labelled that can be, 1 when labelling could not go on, 130 when it was stopped.

    Examples:

        tumbaga label runs/first --workers 4

        tumbaga label runs/first --list

        tumbaga label runs/first --retry 17 --with max_cycle=300
    """
    from tumbaga.online.errors import OnlineError

    chosen = [name for name, given in _exclusive(show_queue, show_aside, release, retry) if given]
    if len(chosen) > 1:
        raise ConfigError(chosen[1], f"and {chosen[0]} are two commands; give one of them")
    if options and not retry:
        raise ConfigError("--with", "says how a frame is to be labelled once more; name the frame with --retry")
    run = run.absolute()
    settings = configs.load(run)
    try:
        if show_queue:
            typer.echo(_read(run, _queue_text))
        elif show_aside:
            typer.echo(_read(run, _aside_text))
        elif release:
            _release(run, release)
        elif retry:
            _retry(run, settings, retry, options or [])
        else:
            _work_off(run, _with_method(settings, method), workers or 0, most or 0, quiet)
    except OnlineError as error:
        raise DriverError(str(error)) from error


def _exclusive(queue: bool, aside: bool, release: list[int] | None, retry: list[int] | None) -> list[tuple[str, bool]]:
    return [("--list", queue), ("--quarantine", aside), ("--release", bool(release)), ("--retry", bool(retry))]


# -- looking ---------------------------------------------------------------------------------------------------------------------------


def _read(run: Path, say: Callable[[Store], _Said]) -> _Said:
    from tumbaga.online.store import FILE, Store

    with Store(run / FILE, read_only=True) as store:
        return say(store)


def _queue_text(store: Store) -> str:
    lines = [f"{'frame':>6}  {'state':12} {'eV/Å':>6}  {'reason':10} {'used to':8}"]
    used = {"train": "learn", "holdout": "judge"}
    for task in store.running():
        reason, role = store.reason(task.frame).value, used[store.role(task.frame).value]
        lines.append(f"{task.frame:6d}  {'running':12} {'':6}  {reason:10} {role:8} by {task.worker}")
    for one in store.pending():
        how = f"with {one.strategy.replace('&', ', ')}" if one.strategy else ""
        lines.append(f"{one.frame:6d}  {'pending':12} {one.priority:6.3f}  {one.reason.value:10} {used[one.role.value]:8} {how}".rstrip())
    for one_aside in store.quarantined():
        if one_aside.state == "held":
            lines.append(f"{one_aside.stored.frame_id:6d}  {'set aside':12} {'':6}  {one_aside.check}")
    for frame, reason in dict(store.failures()).items():
        lines.append(f"{frame:6d}  {'failed':12} {'':6}  {reason}")
    counts = store.counts()
    total = f"{counts['pending']} wait, {counts['running']} under way, {counts['converged']} labelled, {counts['failed']} failed"
    spent = store.spent()
    return "\n".join([*lines, f"{total}, {counts['quarantined']} set aside; {spent.core_seconds / 3600:.3g} core-hours so far"])


def _aside_text(store: Store) -> str:
    aside = store.quarantined()
    if not aside:
        return "no label is set aside"
    lines = []
    for one in aside:
        lines.append(f"frame {one.stored.frame_id} ({one.stored.label.method}): {one.reason}")
        numbers = ", ".join(f"{key} {value:.3g}" for key, value in one.numbers.items())
        lines.append(
            f"    check: {one.check}; {numbers}" + ("" if one.state == "held" else f"; {one.state} with {one.strategy or 'nothing else'}")
        )
    return "\n".join(lines)


# -- deciding --------------------------------------------------------------------------------------------------------------------------


def _held(run: Path) -> RunDir:
    from tumbaga.driver.rundir import RunDir

    run_dir = RunDir(run)
    run_dir.hold()
    return run_dir


def _release(run: Path, frames: list[int]) -> None:
    from tumbaga.online.store import FILE, Store

    run_dir = _held(run)
    try:
        with Store(run / FILE) as store:
            for frame in frames:
                store.release(frame)
                typer.echo(f"frame {frame}: its label is believed from now on")
    finally:
        run_dir.release()


def _retry(run: Path, settings: configs.Config, frames: list[int], options: list[str]) -> None:
    from tumbaga.driver.label_work import otherwise
    from tumbaga.online.store import FILE, Store

    strategy = "&".join(options)
    _same_level(settings.label, otherwise(settings.label, strategy), "--with")
    run_dir = _held(run)
    try:
        with Store(run / FILE) as store:
            for frame in frames:
                store.retry(frame, strategy)
                typer.echo(f"frame {frame}: queued once more" + (f", with {', '.join(options)}" if options else ""))
    finally:
        run_dir.release()
    typer.echo(f"label it with: tumbaga label {run}")


def _same_level(run: configs.Label, other: configs.Label, key: str) -> None:
    """Levels of theory are never mixed."""
    from tumbaga.driver.client_labels import make_labeller

    has, gives = (make_labeller(one.method, **one.options).method for one in (run, other))
    if has != gives:
        raise ConfigError(key, f"would give labels of {gives}, and this run has {has}: levels of theory are not mixed")


def _with_method(settings: configs.Config, method: str | None) -> configs.Config:
    from tumbaga.online.labels.factory import absolute_method

    if method is None:
        return settings
    kind = method.partition(":")[0].partition("?")[0]
    options = settings.label.options if settings.label.method.startswith(kind) else {}
    changed = msgspec.structs.replace(settings.label, method=absolute_method(method), options=options)
    _same_level(settings.label, changed, "--label")
    return msgspec.structs.replace(settings, label=changed)


# -- working -----------------------------------------------------------------------------------------------------------------------------


def _work_off(run: Path, settings: configs.Config, workers: int, most: int, quiet: bool) -> None:
    from tumbaga.driver.label_work import Work
    from tumbaga.driver.labelling import Labelling

    run_dir = _held(run)
    try:
        before = _read(run, _Count.of)
        if not before.strategies:
            typer.echo(f"{run}: no frame waits for a label")
            return
        progress = Progress(before.states, most, quiet)
        for strategy in before.strategies:
            left = most - progress.done if most else 0
            ended = Labelling(run_dir, settings, Work(strategy=strategy, workers=workers, most=left), progress).run()
            progress(ended)
            if ended["state"] != "finished" or 0 < most <= progress.done:
                break
        progress.end()
        typer.echo(_summary(before, _read(run, _Count.of), ended, progress.seconds))
    finally:
        run_dir.release()
    if ended["state"] != "finished":
        raise typer.Exit(EXIT_FAILED if ended["state"] == "failed" else EXIT_STOPPED)


@dataclass(frozen=True)
class _Count:
    """What stands in a store: frames by state, labels that the run computed, what failed and what is set aside with its reason."""

    states: dict[str, int]
    labels: int
    failures: tuple[tuple[int, str], ...]
    aside: tuple[tuple[int, str], ...]
    strategies: tuple[str, ...]

    @classmethod
    def of(cls, store: Store) -> _Count:
        states, waiting = store.counts(), {one.strategy for one in store.pending()}
        aside = tuple((one.stored.frame_id, one.reason) for one in store.quarantined())
        # what was under way when a run was killed waits again as soon as a learner starts
        strategies = tuple(sorted(waiting | {""})) if waiting or states["running"] else ()
        return cls(states, store.spent().labels, tuple(store.failures()), aside, strategies)


def _summary(before: _Count, now: _Count, ended: dict[str, Any], seconds: float) -> str:
    failed, aside = now.failures[len(before.failures) :], now.aside[len(before.aside) :]
    state = {"failed": "FAILED: ", "stopped": "stopped: "}.get(ended["state"], "")
    dropped = now.states["dropped"] - before.states["dropped"]
    said = [f"{now.labels - before.labels} labels came in {seconds:.0f} s", f"{len(failed)} failed", f"{len(aside)} were set aside"]
    said += [f"{dropped} frames need none any more"] if dropped else []
    lines = [f"{state}{', '.join(said)}; {now.states['pending']} frames still wait"]
    lines += [f"  frame {frame} failed: {reason}" for frame, reason in failed[:_SHOWN]]
    lines += [f"  frame {frame} set aside: {reason}" for frame, reason in aside[:_SHOWN]]
    return "\n".join([*lines, *(f"  {note}" for note in ended["notes"]), *(f"  ! {error}" for error in ended["errors"])])


class Progress:
    """A bar on the terminal, or a line now and then elsewhere: how many frames are done, and how long the rest will take.

    Args:
        before: what the store counted at the start.
        most: labels at most; 0 for all.
        quiet: show nothing.
        clock: seconds.
    """

    def __init__(self, before: dict[str, int], most: int, quiet: bool, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._ended = _ended(before)
        self._most, self._quiet, self._clock = most, quiet, clock
        self._live = sys.stderr.isatty() and not quiet
        columns = (TextColumn("labels"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bars = RichProgress(*columns, console=Console(stderr=True), transient=True, disable=not self._live)
        self._bar = self._bars.add_task("", total=None)
        self._bars.start()
        self._began = clock()
        self._next = self._began + _PLAIN_S
        self.done, self.seconds = 0, 0.0

    def __call__(self, status: dict[str, Any]) -> None:
        """Show a status."""
        labels = status["labels"]
        if status["state"] == "starting":
            return
        self.done, self.seconds = max(self.done, _ended(labels) - self._ended), self._clock() - self._began
        left = labels["pending"] + labels["running"]
        total = min(self.done + left, self._most or self.done + left)
        text = "".join(f"{labels[key]} {said} " for key, said in (("failed", "failed"), ("quarantined", "set aside")) if labels.get(key))
        self._bars.update(self._bar, completed=self.done, total=total, description=text)
        if not (self._live or self._quiet) and self._clock() >= self._next:
            self._next = self._clock() + _PLAIN_S
            rest = f", about {self.seconds / self.done * (total - self.done):.0f} s left" if self.done else ""
            typer.echo(f"{self.done} of {total} labelled{rest}", err=True)

    def end(self) -> None:
        """Take the bar away."""
        self._bars.stop()


def _ended(labels: dict[str, int]) -> int:
    return labels["converged"] + labels["failed"] + labels.get("quarantined", 0)
