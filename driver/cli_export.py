"""The commands `tumbaga export` and `tumbaga import`. What they do stands in ``exporting`` and ``importing``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from tumbaga.driver import cli_data
from tumbaga.driver.errors import ConfigError, DriverError

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9_-]*)?")


def export(
    run: RunArgument,
    to: Annotated[Literal["extxyz", "ase-db", "deepmd", "chemiscope"], typer.Option("--to", help="The format.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where to; otherwise a name in this folder that is told.")
    ] = None,
    which: Annotated[
        Literal["labels", "failures", "quarantine"], typer.Option("--which", help="Labels, frames whose label failed, or labels set aside.")
    ] = "labels",
    role: Annotated[
        Literal["train", "holdout"] | None, typer.Option("--role", help="Only what is learnt from, or only what is held out.")
    ] = None,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="Which, if the store has labels of several methods.")] = "",
    prefix: Annotated[
        str,
        typer.Option(
            "--prefix", metavar="TEXT", help="What energy, forces, virials and stress begin with in extended XYZ; '' for nothing."
        ),
    ] = "REF_",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a run's labels in the format of another program, with every bit.

    Extended XYZ has the names that MACE and others expect, ASE's database has results of a calculator, DeePMD's folders are made by dpdata,
    and chemiscope's file shows each frame with its uncertainty and its error. The run may go on meanwhile.

    Examples:

        tumbaga export runs/first --to extxyz

        tumbaga export runs/first --to deepmd --output systems

        tumbaga export runs/first --to extxyz --role holdout --output test.extxyz
    """
    from tumbaga.driver import exporting
    from tumbaga.online.records import Role

    if not _PREFIX.fullmatch(prefix):
        raise ConfigError("--prefix", f"is {prefix!r}; letters, digits, - and _ make a name, and the first is a letter")
    wanted = Role(role) if role else None
    path = output or exporting.default_path(run, to, which, wanted)
    rows = exporting.collect(run, which, wanted, method)
    exporting.write(rows, to, path, prefix=prefix, title=f"{run.absolute().name}: {which}", force=force)
    said = ", ".join(sorted({one.label.method for one in rows if one.label is not None})) or "without labels"
    typer.echo(f"{path}: {len(rows)} frame{'s' * (len(rows) > 1)}, {said}")


def import_(
    run: RunArgument,
    data: cli_data.DataArgument,
    method: Annotated[
        str,
        typer.Option(
            "--method", metavar="NAME", help="Level of theory of the labels, as the run names its own, if the files do not say it."
        ),
    ] = "",
    as_method: Annotated[
        str,
        typer.Option(
            "--as", metavar="NAME", help="Store them as this method, whatever they are called: you vouch that it is the same one."
        ),
    ] = "",
    role: Annotated[
        Literal["train", "holdout"] | None,
        typer.Option("--role", help="What they are for; otherwise as the files say, or every fourth held out."),
    ] = None,
    energy_key: cli_data.EnergyKeyOption = "",
    forces_key: cli_data.ForcesKeyOption = "",
    stress_key: cli_data.StressKeyOption = "",
    trust_pickles: cli_data.PicklesOption = False,
    skip_bad: cli_data.SkipOption = False,
    present: cli_data.WithOption = "",
    only: cli_data.OnlyOption = "",
    count: cli_data.CountOption = None,
    energy: cli_data.EnergyWindowOption = "",
    max_force: cli_data.MaxForceOption = None,
    frames: cli_data.ChanceOption = None,
    seed: cli_data.SeedOption = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars, only the result.")] = False,
) -> None:
    """Take existing labels into a run, before its first start or between two.

    The run learns from them when it starts, and they take nothing of its budget. Their method must be the run's own: levels of theory are
    never mixed. Frames that have a label already are left as they are. A run that goes on has to be stopped first.

    Examples:

        tumbaga import runs/second first-labels.extxyz

        tumbaga import runs/second old.db --method pyscf:pbe/def2-svp --max-force 20
    """
    from tumbaga.driver import importing
    from tumbaga.driver.choosing import Subset, choose, criteria
    from tumbaga.driver.datasets import Reading
    from tumbaga.online.records import Role

    subset = Subset(criteria(present, only, count or (), energy, max_force), frames, seed=seed)
    new = not run.exists()
    with cli_data.Bars(quiet) as bars:
        held = cli_data.read(data, Reading(energy_key, forces_key, stress_key, pickles=trust_pickles), skip_bad, bars)
        chosen = choose(held, subset)
        try:
            taken = importing.take(run, chosen, importing.Level(method, as_method, Role(role) if role else None))
        except OSError as error:
            raise DriverError(f"{run} cannot be written: {error.strerror or error}") from error
    total = sum(taken.added.values())
    parts = [f"{total} label{'s' * (total != 1)} of {taken.method} taken"]
    parts += [f"{taken.added.get(Role.TRAIN, 0)} to learn from, {taken.added.get(Role.HOLDOUT, 0)} held out"] if total else []
    typer.echo(f"{run}: {parts[0]}" + (f" ({parts[1]})" if total else "") + (f"; {taken.known} were known already" if taken.known else ""))
    if new:
        typer.echo(
            f"the directory is new; the run that is started with --run-dir {run} learns from them if its labels are of the same method"
        )
