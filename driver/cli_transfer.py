"""The command `tumbaga transfer`: options in, a trained potential and a table out. What it does stands in ``transferring``."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tumbaga.driver import cli_data
from tumbaga.driver.errors import ConfigError

if TYPE_CHECKING:
    from tumbaga.driver.choosing import Subset
    from tumbaga.driver.datasets import Reading
    from tumbaga.driver.transferring import Plan, Result
    from tumbaga.online.ports import Tunable
    from tumbaga.online.records import LabelledFrame

EXIT_STOPPED = 130
GENERATED = "generated"
MOST_TEST = 500  # frames that were not selected, taken by chance, judge the arms
MOST_GENERATED = 500
_TRAIN, _COMPARE, _KEEP = "How it is trained", "What it is compared with", "What is kept of the old"


def _option(name: str, metavar: str | None, told: str, panel: str = _TRAIN, **how: Any) -> Any:
    return typer.Option(name, metavar=metavar, help=told, rich_help_panel=panel, **how)


def transfer(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The potential to start from: painn:cuau-water, painn:FILE, …")],
    data: cli_data.DataArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The trained potential, a .safetensors file.")],
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="New weights of MODEL's shape, nothing taken over.")] = False,
    element_map: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NEW=OLD", help="Start an element from a similar one, e.g. Au=Cu; can be repeated."),
    ] = None,
    select: Annotated[
        int | None, typer.Option("--select", metavar="N", min=1, help="Learn from N frames; the others are for the test.")
    ] = None,
    by: Annotated[Literal["random", "diverse"], typer.Option("--by", help="How they are selected.")] = "random",
    level: Annotated[str, typer.Option("--level", metavar="NAME", help="Level of theory of the labels, for people.")] = "",
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="For checkpoints, logs and plots; default: beside --out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the training in --run-dir stopped.")] = False,
    seed: cli_data.SeedOption = 0,
    epochs: Annotated[int | None, _option("--epochs", "N", "Passes over the labels; default: about 1000 steps.", min=1)] = None,
    rate: Annotated[float | None, _option("--rate", "X", "Learning rate at its highest.")] = None,
    batch_atoms: Annotated[int | None, _option("--batch-atoms", "N", "Atoms in a batch, at most.", min=1)] = None,
    freeze: Annotated[
        list[str] | None, _option("--freeze", "GROUP,…", "Leave these alone: embedding, interactions.0, …, head, readout, reference.")
    ] = None,
    energy_weight: Annotated[
        float | None, _option("--energy-weight", "X", "Of squared energies per atom in the loss; forces have 1.")
    ] = None,
    virial_weight: Annotated[float | None, _option("--virial-weight", "X", "Of squared virials per atom, where labels have them.")] = None,
    huber: Annotated[float | None, _option("--huber", "X", "Errors beyond count linearly, eV/Å and eV/atom; 0 for plain squares.")] = None,
    average: Annotated[float | None, _option("--ema", "X", "Memory of the moving average of the weights, a step; 0 for none.")] = None,
    schedule: Annotated[Literal["cosine", "plateau", "constant"], _option("--schedule", "NAME", "Of the rate.")] = "cosine",
    patience: Annotated[
        int | None, _option("--patience", "N", "Epochs without a better validation error; 0 never stops early.", min=0)
    ] = None,
    valid: Annotated[float, _option("--valid", "SHARE", "Of the labels, held out to choose the best epoch.", min=0.0, max=0.9)] = 0.1,
    pitc: Annotated[float, _option("--pitc", "X", "Weight of the loss of consistent work (first order); 0 for none.", min=0.0)] = 0.0,
    pisc: Annotated[float, _option("--pisc", "X", "Weight of the one over two paths; 0 for none.", min=0.0)] = 0.0,
    replay: Annotated[
        list[str] | None, _option("--replay", "DATA", f"Old data not to be forgotten, or {GENERATED!r}; can be repeated.", _KEEP)
    ] = None,
    pseudo: Annotated[bool, _option("--pseudo", None, "Label the replay by MODEL as it is, whatever its labels say.", _KEEP)] = False,
    replay_ratio: Annotated[float | None, _option("--replay-ratio", "X", "Replay frames for each new one in an epoch.", _KEEP)] = None,
    test: Annotated[list[Path] | None, _option("--test", "DATA", "Frames to compare on; can be repeated.", _COMPARE)] = None,
    no_compare: Annotated[
        bool, _option("--no-compare", None, "Leave out the untuned potential and the one from scratch.", _COMPARE)
    ] = False,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[Literal["float32", "float64"], typer.Option("--dtype", help="Of the network.")] = "float32",
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="On a CPU; default: 1, all for foundation models.")
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
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
) -> None:
    """Train a potential on your labels: transfer, fine-tune, or from scratch.

    Starts from MODEL's weights, fits its reference energies to the labels, then trains all that is not frozen. At the end a table says how
    it does on frames it did not learn from, against MODEL as it was and against the same network trained from nothing on the same labels.
    Ctrl-C stops after writing a checkpoint; the same command with --resume goes on.

    Examples:

        tumbaga transfer painn:cuau-water dft.extxyz --out mine.safetensors

        tumbaga transfer painn:cuau-water dft.extxyz --select 50 --by diverse --replay generated -o mine.safetensors

        tumbaga transfer painn:silicon.safetensors germanium.extxyz --map Ge=Si --out germanium.safetensors
    """
    from tumbaga.driver import transferring
    from tumbaga.driver.choosing import Subset, criteria
    from tumbaga.driver.datasets import Reading
    from tumbaga.online.training.dataset import held_out
    from tumbaga.online.training.loop import Sets

    folder = run_dir or out.with_name(f"{out.stem}-training")
    _check(out, folder, resume, replay or [], pseudo)
    like = transferring.element_map(element_map or [])
    asked: dict[str, Any] = {
        "rate": rate,
        "epochs": epochs,
        "batch_atoms": batch_atoms,
        "energy_weight": energy_weight,
        "virial_weight": virial_weight,
        "huber": huber,
        "average": average,
        "patience": patience,
        "replay": replay_ratio,
        "frozen": tuple(part.strip() for text in freeze or [] for part in text.split(",") if part.strip()) or None,
    }
    chosen = {key: value for key, value in asked.items() if value is not None}
    chosen |= {"schedule": schedule, "pitc": pitc, "pisc": pisc, "seed": seed}
    how = Reading(energy_key, forces_key, stress_key, level, trust_pickles)
    subset = Subset(
        criteria(present, only, count or (), energy, max_force),
        select if by == "random" else None,
        select if by == "diverse" else None,
        seed=seed,
    )
    try:
        start, learnt, rest = _read(model, device, dtype, like, data, how, skip_bad, subset, quiet)
        train, validation = held_out(learnt, valid, seed)
        old = _replay(start, replay or [], pseudo, how, skip_bad, [one.frame for one in train], seed, quiet)
        judges, told = _test(test or [], rest, validation, train, how, skip_bad, seed, quiet)
        for some in (learnt, judges, old):
            transferring.check_elements(start, some)
        sets = Sets(train, validation, old)
        settings = transferring.settings_for(start, sets, from_scratch, chosen)
        _use_threads(threads, transferring.is_large(start))
        facts = {"level": ", ".join(sorted({one.label.method for one in train}))}
        plan = transferring.Plan(start, sets, judges, settings, from_scratch, not no_compare, facts)
        result = _train(plan, folder, quiet)
        _finish(result, out, folder, f"{len(train)} labels, {len(validation)} more to validate; errors on {len(judges)} {told}", no_compare)
    except KeyboardInterrupt:
        typer.echo("stopped before the training began, or after it ended: no checkpoint was needed", err=True)
        raise typer.Exit(EXIT_STOPPED) from None


def _check(out: Path, folder: Path, resume: bool, replay: Sequence[str], pseudo: bool) -> None:
    """Find out what can be seen to be wrong before anything long begins.

    Raises:
        ConfigError: an option; the sentence says which.
    """
    from tumbaga.driver import transferring

    if out.suffix != ".safetensors":
        raise ConfigError("--out", f"is {out}; the name of the file must end in .safetensors")
    if not out.absolute().parent.is_dir():
        raise ConfigError("--out", f"{out} cannot be written: there is no such folder")
    if folder.exists() and not folder.is_dir():
        raise ConfigError("--run-dir", f"{folder} is a file; name a folder")
    if not resume and transferring.begun(folder):
        raise ConfigError("--run-dir", f"{folder} holds a training already; go on with it by --resume, or name another folder")
    if not resume and out.exists():
        raise ConfigError("--out", f"{out} is there already; choose another name")
    if pseudo and not replay:
        raise ConfigError("--pseudo", "is about the frames of --replay; give those, too")


def _read(
    model: str,
    device: str,
    dtype: str,
    like: dict[int, int],
    data: Sequence[Path],
    how: Reading,
    skip_bad: bool,
    subset: Subset,
    quiet: bool,
) -> tuple[Tunable, list[LabelledFrame], list[LabelledFrame]]:
    """The potential, the frames to learn from, and those that meet the conditions but were not selected."""
    from dataclasses import replace

    from tumbaga.driver import transferring
    from tumbaga.driver.backends import registry
    from tumbaga.driver.choosing import choose

    name = registry.absolute(model)
    registry.weights_file(name)
    with cli_data.Bars(quiet) as bars:
        held = cli_data.read(data, how, skip_bad, bars)
    start = transferring.opened(registry.load(name, device, dtype), model, like)
    fit = choose(held, replace(subset, by_chance=None, different=None))
    transferring.check_elements(start, fit)
    learnt = choose(fit, subset, start)
    taken = {id(one) for one in learnt}
    return start, learnt, [one for one in fit if id(one) not in taken]


def _replay(
    start: Tunable, names: Sequence[str], pseudo: bool, how: Reading, skip_bad: bool, near: list[Any], seed: int, quiet: bool
) -> list[LabelledFrame]:
    """Old frames with their labels, or with those of the potential as it is; generated ones near the new frames."""
    from tumbaga.online.training.replay import generated, pseudo_labelled

    paths = [Path(name) for name in names if name != GENERATED]
    with cli_data.Bars(quiet) as bars:
        old = cli_data.read(paths, how, skip_bad, bars)
    if pseudo:
        old = pseudo_labelled(start, [one.frame for one in old])
    if GENERATED in names:
        old += pseudo_labelled(start, generated(near, min(MOST_GENERATED, 10 * len(near)), seed))
    return old


def _test(
    paths: Sequence[Path],
    rest: Sequence[LabelledFrame],
    validation: Sequence[LabelledFrame],
    train: Sequence[LabelledFrame],
    how: Reading,
    skip_bad: bool,
    seed: int,
    quiet: bool,
) -> tuple[list[LabelledFrame], str]:
    """Frames to compare on, the most honest there are, and what they are."""
    from tumbaga.online.subsets import by_chance

    if paths:
        with cli_data.Bars(quiet) as bars:
            return cli_data.read(paths, how, skip_bad, bars), "frames of --test"
    if rest:
        return [rest[k] for k in by_chance(len(rest), MOST_TEST, seed)], "frames that were not selected"
    if validation:
        return list(validation), "validation frames, which chose the best epoch; name others with --test"
    return list(train), "frames that were learnt, there being no others: name some with --test"


def _use_threads(threads: int | None, large: bool) -> None:
    """A small network has small operators: several threads wait for each other, and where other programs run they wait long."""
    import torch

    if threads is not None or not large:
        torch.set_num_threads(threads or 1)


def _train(plan: Plan, folder: Path, quiet: bool) -> Result:
    from tumbaga.driver import transferring
    from tumbaga.driver.transferring_text import Watch
    from tumbaga.online.errors import TrainingStoppedError

    try:
        with Watch(plan.settings.epochs, quiet) as watch, _interrupts() as asked:
            return transferring.carry_out(plan, folder, watch, lambda: bool(asked))
    except TrainingStoppedError as error:
        again = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
        typer.echo(f"stopped in epoch {error.epoch + 1}; go on with: {shlex.join(['tumbaga', *again])}", err=True)
        raise typer.Exit(EXIT_STOPPED) from None


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect the first Ctrl-C (or SIGTERM) instead of dying of it; the second is as usual."""
    asked: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def ask(kind: int, _: object) -> None:
        asked.append(kind)
        for one in kinds:
            signal.signal(one, before[one])

    for kind in kinds:
        signal.signal(kind, ask)
    try:
        yield asked
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


def _finish(result: Result, out: Path, folder: Path, title: str, alone: bool) -> None:
    from rich.console import Console

    from tumbaga.driver import plots, transferring_plots, transferring_text
    from tumbaga.driver.transferring import RESULT
    from tumbaga.online.training import finish

    try:
        finish.write(out, result.potential)
    except OSError as error:
        raise ConfigError(
            "--out", f"{out} cannot be written ({error.strerror}); the training is in {folder}, free it and --resume"
        ) from error
    typer.echo(f"{title}; forces in meV/Å, energies in meV/atom")
    Console(highlight=False).print(transferring_text.table(result.arms))
    if not alone:
        typer.echo("untuned: with reference energies fitted to the labels; from scratch: the same network and labels, nothing taken over")
    if told := transferring_text.verdict(result.arms):
        typer.echo(told)
    if plots.available():
        for path in transferring_plots.write(folder, result.arms):
            typer.echo(f"plot {path}")
    elif not alone:
        typer.echo("no plots, since matplotlib is not installed: pip install 'tumbaga[plots]'")
    kind = result.potential.spec.name.partition(":")[0]
    typer.echo(f"numbers {folder / RESULT}")
    typer.echo(f"the potential is {out}; serve it with: tumbaga serve --model {kind}:{out} --template FILE")
