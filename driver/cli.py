"""The command line. Every mistake of a user is one sentence and an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from tumbaga.driver import cli_evaluate, cli_export, cli_label, cli_transfer, cli_versions
from tumbaga.driver import config as configs
from tumbaga.driver.errors import ConfigError, DriverError, RunDirError

if TYPE_CHECKING:
    from tumbaga.driver.engines import Engine

EXIT_USAGE, EXIT_FAILED = 2, 1
EXAMPLES = {"cuau-water": Path(__file__).parent / "data" / "cuau-water.xyz"}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="A force server for i-PI and ASE that learns while it serves.\n\n"
    "Start with **tumbaga run cuau-water**: an i-PI run of a Cu-Au/water cluster whose potential gets better while it runs. "
    "Then let your own engine use it with **tumbaga serve**.",
)

RunDirOption = Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Where everything of this run is kept.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
ErrorOption = Annotated[
    float | None,
    typer.Option("--force-error", metavar="EV_PER_A", help="Force error to hold, eV/Å: frames less certain than this are labelled."),
]
LabelOption = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="METHOD",
        help="Who labels: pyscf, ase:MODULE:CLASS for any ASE calculator, call:FILE.py:FUNCTION for a function of yours, or ipi:ADDRESS for "
        "programs that connect there; options behind it, as in 'pyscf?basis=def2-tzvp&grid=3'.",
    ),
]
ExecutorOption = Annotated[
    str | None,
    typer.Option("--executor", metavar="WHERE", help="Where labels are computed: local, or dask:tcp://HOST:PORT of a Dask scheduler."),
]
LabelsOption = Annotated[int | None, typer.Option("--labels", metavar="N", help="Labels at most; 0 for none.")]
NoLearnOption = Annotated[bool, typer.Option("--no-learn", help="Serve only: no labels, no updates.")]
CriticalOption = Annotated[
    configs.PolicyName | None,
    typer.Option(
        "--critical",
        help="Frames far above the force error: answer now and label later, let the engine wait until the label is learnt, or end the session.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any other setting, such as learn.finetune_every=4, written as in tumbaga.toml of a run directory; can be repeated.",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress, only the summary.")]


@app.command()
def run(
    example: Annotated[str, typer.Argument(help=f"A packaged example: {', '.join(EXAMPLES)}.")],
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps of 0.5 fs, in all.")] = 20_000,
    temperature: Annotated[float, typer.Option("--temperature", metavar="K", min=1.0, help="Temperature of the thermostat, K.")] = 300.0,
    engine: Annotated[str, typer.Option("--engine", metavar="ipi|ase", help="Who moves the atoms.")] = "ipi",
    model: Annotated[str, typer.Option("--model", "-m", help="The potential.")] = "painn:cuau-water",
    labels: LabelsOption = None,
    seed: SeedOption = 0,
    run_dir: RunDirOption = None,
    force_error: ErrorOption = None,
    label: LabelOption = None,
    executor: ExecutorOption = None,
    critical: CriticalOption = None,
    no_learn: NoLearnOption = False,
    changes: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run a packaged example: an engine, the server and the learner together.

    Starts i-PI (Langevin dynamics, 0.5 fs) on a cluster, serves it with the embedded potential, has uncertain frames labelled by PySCF,
    updates the potential and swaps it in while i-PI runs. Ctrl-C stops everything in order; the same command with the same --run-dir
    goes on where it stopped.
    """
    from tumbaga.driver import engines
    from tumbaga.driver.backends import registry

    if example not in EXAMPLES:
        raise ConfigError("EXAMPLE", f"there is no example {example!r}; there is {', '.join(EXAMPLES)}")
    folder = (run_dir or _new_folder(example)).absolute()
    settings = configs.Config(
        serve=configs.Serve(),
        potential=configs.Potential(model=registry.absolute(model), template=str(EXAMPLES[example])),
        flag=configs.Flag(spacing=50),
        seed=seed,
    )
    settings = _with(settings, force_error, label, executor, labels, critical, no_learn)
    made = engines.make(engine, folder, str(EXAMPLES[example]), engines.Dynamics(steps, temperature, seed=seed))
    settings = msgspec.structs.replace(settings, serve=configs.Serve(connect=(made.address,)))
    _carry_out(folder, configs.changed(settings, changes or ()), made, steps, quiet)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The potential: painn:cuau-water, painn:FILE, toy:zero, toy:lj.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option("--template", "-t", metavar="FILE", help="A structure with the engine's atoms in the engine's order.")
    ] = None,
    unix: Annotated[bool, typer.Option("--unix", "-u", help="Use a unix socket.")] = False,
    address: Annotated[str | None, typer.Option("--address", "-a", metavar="NAME|HOST", help="Unix socket name, or host.")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", metavar="PORT", help="Port, for a host.")] = None,
    prefix: Annotated[
        str, typer.Option("--sockets_prefix", "-S", metavar="PREFIX", help="What a unix socket name begins with.")
    ] = "/tmp/ipi_",
    connect: Annotated[
        list[str] | None,
        typer.Option(
            "--connect", metavar="ADDRESS[=FILE]", help="unix:NAME or tcp:HOST:PORT, with its own template if need be; can be repeated."
        ),
    ] = None,
    connections: Annotated[
        int | None,
        typer.Option("--connections", metavar="N", min=1, help="Connections to each address: the beads of one i-PI then come together."),
    ] = None,
    committee: Annotated[
        int | None,
        typer.Option(
            "--committee",
            metavar="K",
            min=0,
            help="Put K members, drawn from what is known of the last layer, into the extras, for i-PI's ffcommittee; 0 for none.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="NAME", help="auto (a GPU, else the free cores), cpu, cuda, or several: cuda:0,cuda:1 makes two evaluators."
        ),
    ] = None,
    run_dir: RunDirOption = None,
    no_learn: NoLearnOption = False,
    force_error: ErrorOption = None,
    label: LabelOption = None,
    executor: ExecutorOption = None,
    critical: CriticalOption = None,
    labels: LabelsOption = None,
    seed: SeedOption = 0,
    changes: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Serve forces to engines that you start yourself: i-PI, or ASE with a SocketIOCalculator.

    Takes the address flags of i-pi-driver-py. Dials until the engine is there, and again after it ended; stop it with Ctrl-C or with
    `tumbaga stop RUN`. With a --run-dir that exists it goes on with the settings, labels and newest version found there.

    Engines do not say which atoms they move: give a template, or let i-PI tell: `<parameters>{species: Cu3Au(H2O)2}</parameters>` in its
    `<ffsocket>`. Batches (`batch_size`) and shared memory (`mode='shm'`) of i-PI are recognised by themselves.

    Examples:

        tumbaga serve -m painn:cuau-water -t init.xyz -u -a cuau

        tumbaga serve -m painn:cuau-water -t beads.xyz -u -a pimd --connections 4

        tumbaga serve -m painn:cuau-water -t init.xyz -u -a spread --committee 8

        tumbaga serve -m painn:cuau-water -t init.xyz -u -a careful --critical stall

        tumbaga serve -m toy:lj -t init.xyz --connect tcp:127.0.0.1:31415 --connect unix:second=other.xyz --no-learn
    """
    from tumbaga.driver.backends import registry

    folder = (run_dir or _new_folder("serve")).absolute()
    settings = configs.load(folder) if (folder / configs.FILE).exists() else None
    given = [text.partition("=") for text in connect or ()]
    addresses = tuple(text for text, _, _ in given) + _classic_address(unix, address, port)
    if settings is None:
        settings = configs.Config(seed=seed)
        if model is None:
            raise ConfigError("serve", "needs a potential (-m MODEL), or the --run-dir of an earlier run")
    potential = settings.potential
    if template is not None:
        potential = msgspec.structs.replace(potential, template=str(template.absolute()))
    potential = msgspec.structs.replace(
        potential, model=registry.absolute(model) if model else potential.model, device=device or potential.device
    )
    connected = settings.serve
    if addresses:
        templates = {text: str(Path(file).absolute()) for text, _, file in given if file}
        connected = msgspec.structs.replace(connected, connect=addresses, prefix=prefix, templates=templates)
    connected = msgspec.structs.replace(
        connected,
        connections=connections or connected.connections,
        committee=connected.committee if committee is None else committee,
    )
    if not connected.connect:
        raise ConfigError("serve", "needs an address: -u -a NAME for a unix socket, -a HOST -p PORT for tcp, or --connect")
    settings = msgspec.structs.replace(settings, potential=potential, serve=connected)
    settings = _with(settings, force_error, label, executor, labels, critical, no_learn)
    _carry_out(folder, configs.changed(settings, changes or ()), None, None, quiet)


@app.command()
def status(run: RunArgument, as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False) -> None:
    """Say how a run is, while it goes on or after it ended."""
    from tumbaga.driver import display
    from tumbaga.driver.rundir import RunDir

    folder = RunDir(run)
    found = folder.read_status()
    typer.echo(json.dumps(found) if as_json else display.status_text(run, found))


@app.command()
def stop(
    run: RunArgument, timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="How long to wait for it, seconds.")] = 60.0
) -> None:
    """Stop a run in order: the engine writes its restart file, labels under way wait for the next start."""
    from tumbaga.driver.rundir import RunDir

    folder = RunDir(run)
    holder = folder.holder()
    if holder is None:
        folder.read_status()  # tells a run that ended from a folder that never was one
        typer.echo(f"{run}: nothing runs there")
        return
    os.kill(holder, signal.SIGTERM)
    until = time.monotonic() + timeout
    while folder.holder() is not None:
        if time.monotonic() > until:
            raise RunDirError(
                str(run), f"process {holder} has not stopped within {timeout:g} s; look at {run}/log, or wait longer with --timeout"
            )
        time.sleep(0.1)
    typer.echo(f"{run}: stopped")


@app.command()
def doctor() -> None:
    """Check the installation: every package, the packaged potential, the engines, the label engine."""
    from tumbaga.driver.doctor import examine

    findings = examine()
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.good else 'BAD '} {finding.what}: {finding.said}")
    if not all(finding.good for finding in findings):
        raise typer.Exit(EXIT_FAILED)


app.command()(cli_evaluate.evaluate)
app.command()(cli_transfer.transfer)
app.command()(cli_label.label)
app.command()(cli_export.export)
app.command("import")(cli_export.import_)
app.command()(cli_versions.versions)
app.command()(cli_versions.rollback)
app.command()(cli_versions.trace)


# -- helpers ---------------------------------------------------------------------------------------------------------------------------


def _with(
    settings: configs.Config,
    force_error: float | None,
    label: str | None,
    executor: str | None,
    labels: int | None,
    critical: configs.PolicyName | None,
    no_learn: bool,
) -> configs.Config:
    from tumbaga.online.labels.factory import absolute_method

    flag, labelled, learn, policy = settings.flag, settings.label, settings.learn, settings.policy
    if force_error is not None:
        flag = msgspec.structs.replace(flag, force_error=force_error)
    if label is not None:
        labelled = msgspec.structs.replace(labelled, method=absolute_method(label))
    if executor is not None:
        labelled = msgspec.structs.replace(labelled, executor=executor)
    if labels is not None:
        labelled = msgspec.structs.replace(labelled, budget=labels)
    if no_learn:
        learn = msgspec.structs.replace(learn, enabled=False)
    if critical is not None:
        policy = msgspec.structs.replace(policy, critical=critical)
    return msgspec.structs.replace(settings, flag=flag, label=labelled, learn=learn, policy=policy)


def _classic_address(unix: bool, address: str | None, port: int | None) -> tuple[str, ...]:
    if unix:
        if port is not None:
            raise ConfigError("--port", "a unix socket (-u) has no port; leave out -u for tcp")
        return (f"unix:{address or 'localhost'}",)
    if address is None and port is None:
        return ()
    if port is None:
        raise ConfigError("--port", "is missing: give -p PORT for a host, or -u for a unix socket")
    return (f"tcp:{address or 'localhost'}:{port}",)


def _new_folder(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _carry_out(folder: Path, settings: configs.Config, engine: Engine | None, steps: int | None, quiet: bool) -> None:
    """Check, hold the run directory, run, and say how it went."""
    from tumbaga.driver import display, supervisor
    from tumbaga.driver.rundir import RunDir

    supervisor.check(settings)
    if (folder / configs.FILE).exists() and (earlier := configs.load(folder).potential.model) != settings.potential.model:
        raise RunDirError(str(folder), f"is of a run of {earlier}; choose another directory for {settings.potential.model}")
    run_dir = RunDir(folder)
    if engine is not None and steps is not None and engine.finished(folder):
        typer.echo(f"run directory {folder}: {engine.name} has done its {steps} steps; ask for more with --steps")
        return
    run_dir.hold()
    typer.echo(f"run directory {folder}")
    if steps is None:
        typer.echo(f"serving {settings.potential.model} to {', '.join(settings.serve.connect)}; stop with Ctrl-C or: tumbaga stop {folder}")
    progress = display.Progress(steps)
    try:
        made = supervisor.Supervisor(run_dir, settings, engine, None if quiet else progress)
        ended = made.run()
        if not quiet:
            progress.end()
        typer.echo(display.summary(folder, ended, engine.files(folder) if engine is not None else []))
    finally:
        run_dir.release()
    if ended["state"] == "failed":
        raise typer.Exit(EXIT_FAILED)


def main() -> None:
    """Entry point: a DriverError is one sentence on standard error and exit code 2."""
    try:
        app()
    except DriverError as error:
        print(f"tumbaga: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_USAGE)


if __name__ == "__main__":
    main()
