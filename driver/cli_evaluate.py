"""The command `tumbaga evaluate`: options in, a table out. What it computes stands in ``evaluating`` and ``softening``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tumbaga.driver import cli_data
from tumbaga.driver.errors import ConfigError

if TYPE_CHECKING:
    from tumbaga.driver.evaluating import Report
    from tumbaga.driver.softening import Softening

EXIT_STOPPED = 130
_SCHEMA = 1


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The potential: painn:cuau-water, painn:FILE, sevennet:7net-0, …")],
    data: cli_data.DataArgument,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[Literal["float32", "float64"], typer.Option("--dtype", help="Of the network.")] = "float32",
    batch_atoms: Annotated[int, typer.Option("--batch-atoms", metavar="N", min=1, help="Atoms evaluated at once, at most.")] = 512,
    uncertain_frames: Annotated[
        int, typer.Option("--uncertain-frames", metavar="N", min=0, help="Frames whose uncertainty is computed, by chance; 0 for none.")
    ] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything for programs.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="FOLDER", help="Write parity plots (PNG).")] = None,
    fix_softening: Annotated[
        bool, typer.Option("--fix-softening", help="Try one scale on the forces, from a few labels; held-out frames decide.")
    ] = False,
    labels: Annotated[int, typer.Option("--labels", metavar="N", min=1, help="Labels that the scale is fitted to.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the scaled potential (safetensors), if the fix is accepted.")
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
    """Say how good a potential is on labelled frames.

    Errors of forces by element and by size, of energies raw and after an offset for each element, the slope of predicted against
    labelled forces (below 1 is soft) and, where the potential has a linear readout, whether its uncertainties keep their promises.

    Examples:

        tumbaga evaluate painn:cuau-water test.extxyz

        tumbaga evaluate sevennet:7net-0 test.db --only Cu,Au --max-force 20 --json result.json --plots plots

        tumbaga evaluate painn:mine.safetensors hot.extxyz --fix-softening --labels 4 --out stiffer.safetensors
    """
    from tumbaga.driver import evaluating, softening
    from tumbaga.driver.backends import registry
    from tumbaga.driver.choosing import Subset, choose, criteria
    from tumbaga.driver.datasets import Reading

    _check(device, json_file, plots, fix_softening, out)
    subset = Subset(criteria(present, only, count or (), energy, max_force), frames, seed=seed)
    name, file = registry.absolute(model), registry.weights_file(model)
    try:
        with cli_data.Bars(quiet) as bars:
            held = cli_data.read(data, Reading(energy_key, forces_key, stress_key, pickles=trust_pickles), skip_bad, bars)
            chosen = choose(held, subset)
            potential = registry.load(name, device, dtype)
            if fix_softening:
                softening.check(potential, len(chosen), labels)
            layer = evaluating.last_layer_of(potential, file) if uncertain_frames else None
            bars.expect("predicting", len(chosen))
            if layer is not None:
                bars.expect("uncertainties", min(uncertain_frames, len(chosen)))
            report, judged = evaluating.evaluate(potential, chosen, layer, uncertain_frames, seed, batch_atoms, bars)
            fix = softening.try_scale(softening.trainable(potential), judged, labels, seed) if fix_softening else None
            written = (
                softening.write(softening.trainable(potential), fix, out) if fix is not None and fix.accepted and out is not None else None
            )
    except KeyboardInterrupt:
        typer.echo("stopped; nothing was written", err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    _tell(report, f"{model} on {len(chosen)} of {len(held)} frames", fix, written)
    if json_file is not None:
        facts = {"schema": _SCHEMA, "model": model, "level": potential.spec.level, "data": [str(path) for path in data], "seed": seed}
        found = {**facts, "frames_read": len(held), "device": device, "dtype": dtype, **report.plain()}
        _write_json(json_file, {**found, "softening": None if fix is None else evaluating.finite(asdict(fix)), "written": written})
    if plots is not None:
        from tumbaga.driver import evaluating_plots

        for path in evaluating_plots.write(plots, judged, report.offsets):
            typer.echo(f"plot {path}")


def _check(device: str, json_file: Path | None, plots: Path | None, fix_softening: bool, out: Path | None) -> None:
    """Find out what can be seen to be wrong before anything long begins.

    Raises:
        ConfigError: an option; the sentence says which.
    """
    if "," in device:
        raise ConfigError("--device", f"is {device!r}; one device evaluates")
    if out is not None and not fix_softening:
        raise ConfigError("--out", "is where --fix-softening writes; give both or neither")
    if out is not None and out.suffix != ".safetensors":
        raise ConfigError("--out", f"is {out}; the name of the file must end in .safetensors")
    if out is not None and out.exists():
        raise ConfigError("--out", f"{out} is there already; choose another name")
    for option, path in (("--json", json_file), ("--out", out)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(option, f"{path} cannot be written: {'it is a folder' if path.is_dir() else 'there is no such folder'}")
    if plots is not None:
        from tumbaga.driver import evaluating_plots

        if plots.exists() and not plots.is_dir():
            raise ConfigError("--plots", f"{plots} is a file; name a folder")
        evaluating_plots.need_matplotlib()


def _tell(report: Report, title: str, fix: Softening | None, written: str | None) -> None:
    from rich.console import Console

    from tumbaga.driver import evaluating_text

    console = Console(highlight=False)
    console.print(evaluating_text.table(report, title))
    for line in evaluating_text.sentences(report):
        typer.echo(line)
    if fix is not None:
        typer.echo(f"fix of softening: {fix.told}")
    if written is not None:
        typer.echo(f"the scaled potential is {written}")
    elif fix is not None and fix.accepted:
        typer.echo("write the scaled potential with --out FILE.safetensors")


def _write_json(path: Path, found: dict[str, Any]) -> None:
    from tumbaga.online.versions import write_whole

    try:
        write_whole(path, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ConfigError("--json", f"{path} cannot be written ({error.strerror})") from error
