"""What commands that read data sets share: their options, reading with a bar on the terminal, choosing a subset."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import typer

if TYPE_CHECKING:
    from rich.progress import TaskID

    from tumbaga.driver.datasets import Reading
    from tumbaga.driver.errors import DataError
    from tumbaga.online.records import LabelledFrame

_READ, _CHOOSE = "How data are read", "Which frames are used"

DataArgument = Annotated[
    list[Path],
    typer.Argument(metavar="DATA...", help="Labelled frames: .extxyz, .xyz, .db, .json, .aselmdb, .lmdb, .xsf, or folders of such files."),
]
EnergyKeyOption = Annotated[
    str, typer.Option("--energy-key", metavar="NAME", help="Name of the energy, if not a common one.", rich_help_panel=_READ)
]
ForcesKeyOption = Annotated[
    str, typer.Option("--forces-key", metavar="NAME", help="Name of the forces, if not a common one.", rich_help_panel=_READ)
]
StressKeyOption = Annotated[
    str, typer.Option("--stress-key", metavar="NAME", help="Name of the stress or the virial, likewise.", rich_help_panel=_READ)
]
PicklesOption = Annotated[
    bool,
    typer.Option("--trust-pickles", help="Open .lmdb files of OC20, which hold pickles; only those you trust.", rich_help_panel=_READ),
]
SkipOption = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out frames that are not fit for use, instead of stopping.", rich_help_panel=_READ)
]
WithOption = Annotated[
    str, typer.Option("--with", metavar="ELEMENTS", help="Frames that hold all of these, e.g. Cu,Au.", rich_help_panel=_CHOOSE)
]
OnlyOption = Annotated[str, typer.Option("--only", metavar="ELEMENTS", help="Frames that hold nothing but these.", rich_help_panel=_CHOOSE)]
CountOption = Annotated[
    list[str] | None,
    typer.Option(
        "--count", metavar="CONDITION", help="Cu>=2, atoms<=40, or a formula, CuAu(H2O)2; can be repeated.", rich_help_panel=_CHOOSE
    ),
]
EnergyWindowOption = Annotated[
    str,
    typer.Option("--energy", metavar="LOW:HIGH", help="Frames whose label has an energy per atom in it, eV.", rich_help_panel=_CHOOSE),
]
MaxForceOption = Annotated[
    float | None,
    typer.Option("--max-force", metavar="EV_PER_A", help="Frames without a larger labelled force.", rich_help_panel=_CHOOSE),
]
ChanceOption = Annotated[
    int | None, typer.Option("--frames", metavar="N", min=1, help="At most N frames, by chance.", rich_help_panel=_CHOOSE)
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]


class Bars:
    """Bars on standard error while something long goes on, one for each kind of work; nothing where nobody watches.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = quiet or not sys.stderr.isatty()
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._bars.stop()

    def expect(self, what: str, total: int | None) -> None:
        """Begin a bar; None where nobody knows how much it is."""
        self._tasks[what] = self._bars.add_task(what, total=total)

    def __call__(self, what: str, more: int = 1) -> None:
        """So much more is done."""
        if what not in self._tasks:
            self.expect(what, None)
        self._bars.advance(self._tasks[what], more)


def read(paths: Sequence[Path], how: Reading, skip_bad: bool, bars: Bars) -> list[LabelledFrame]:
    """Read all files; with `skip_bad`, a line on standard error says how many frames were left out and why the first was.

    Raises:
        DataError: see `datasets.stream`.
    """
    from tumbaga.driver import datasets

    left: list[DataError] = []
    found: list[LabelledFrame] = []
    for path in paths:
        for one in datasets.stream(path, how, left.append if skip_bad else None):
            found.append(one)
            bars("reading")
    if left:
        typer.echo(
            f"left out {len(left)} frame{'s' * (len(left) > 1)} that {'is' if len(left) == 1 else 'are'} not fit for use; the first: {left[0]}",
            err=True,
        )
    return found
