"""The configuration of a run: one TOML file, checked when read; the run directory holds a frozen copy of it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import tomli_w

from tumbaga.driver.errors import ConfigError

FILE = "tumbaga.toml"
LOCAL = "local"
_DASK = "dask:"
_SCHEDULERS = tuple(f"{_DASK}{protocol}://" for protocol in ("tcp", "tls", "ucx", "ws", "wss"))
PolicyName: TypeAlias = Literal["continue", "stall", "reject"]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base: a misspelt key is an error, not a default."""


class Serve(_Section, frozen=True):
    """Where engines find us.

    Attributes:
        connect: addresses to dial, "unix:NAME" or "tcp:HOST:PORT".
        prefix: what a unix NAME is prefixed with, as in i-PI.
        templates: structure files of single addresses, where they differ from potential.template.
        connections: sessions at each address, so that the beads of one i-PI come together.
        window_ms: how long a frame waits for those of its siblings at the same address, at most.
        committee: members of the committee in the extras, for i-PI's ffcommittee; 0 for none.
        message_seconds: time to finish a message once it has begun.
        unread_seconds: time in which a peer must have read something of an answer.
        max_refusals: how many times in a row a session may end because no finite answer could be given, before it is given up.
    """

    connect: tuple[str, ...] = ()
    prefix: str = "/tmp/ipi_"
    templates: dict[str, str] = {}
    connections: int = 1
    window_ms: float = 2.0
    committee: int = 0
    message_seconds: float = 10.0
    unread_seconds: float = 30.0
    max_refusals: int = 3


class Potential(_Section, frozen=True):
    """What serves.

    Attributes:
        model: e.g. "painn:cuau-water", "toy:lj".
        template: structure file with the species, in the order of the engine (any format of ASE); empty if INIT tells them.
        device: "auto" (a GPU if there is one, else the free cores of the CPU, an evaluator each), "cpu", "cuda", or several for as many
            evaluators that share the work: "cuda:0,cuda:1".
        dtype: "float32" or "float64".
    """

    model: str = "painn:cuau-water"
    template: str = ""
    device: str = "auto"
    dtype: str = "float32"

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices as they are written; see `tumbaga.driver.devices` for what "auto" becomes."""
        return tuple(name.strip() for name in self.device.split(","))


class Flag(_Section, frozen=True):
    """What gets labelled.

    Attributes:
        force_error: the force error to hold, eV/Å; frames whose calibrated uncertainty is above it are labelled.
        spacing: steps between two flagged frames of a session, at least.
        audit_every: mean number of steps between random audits; up to 25 times as many once learn.converged_audits of the version that serves
            were within force_error.
    """

    force_error: float = 0.15
    spacing: int = 20
    audit_every: int = 2000


class Label(_Section, frozen=True):
    """Who labels.

    Attributes:
        method: "pyscf", "ase:MODULE:CLASS", "call:FILE:FUNCTION", "ipi:ADDRESS", or a test labeller.
        options: handed to the labeller, e.g. xc, basis, grid.
        executor: where labels are computed: "local", or "dask:ADDRESS" of a scheduler, such as "dask:tcp://node1:8786".
        workers: labels at a time.
        cores: of each label; its libraries use so many threads.
        budget: labels at most in the life of the run directory, failed ones included; 0 for none. A tenth is kept for audits.
        core_hours: cores times hours that all labels together may take, in vain or not; 0 for no limit. Labels under way are finished.
        max_force: a label with a larger force on an atom is set aside, eV/Å; 0 for no bound.
        net_force: so is that of an isolated frame whose forces add up to more than this times sqrt(atoms), eV/Å; 0 for no bound.
        time_limit: seconds after which a label is killed and recorded as failed.
        memory_gb: 10⁹ bytes of memory at which a label is killed and recorded as failed; 0 for no limit.
        attempts: how often a label is tried again when its worker dies.
        repeat_every: one of so many frames is labelled twice, the second time turned or shifted, which shows the noise of the method; 0 for
            none. Both count in time_limit and core_hours. Not for labels by programs that connect.
    """

    method: str = "pyscf"
    options: dict[str, str | int | float | bool | list[Any]] = {}
    executor: str = LOCAL
    workers: int = 1
    cores: int = 1
    budget: int = 200
    core_hours: float = 0.0
    max_force: float = 30.0
    net_force: float = 0.05
    time_limit: float = 1800.0
    memory_gb: float = 0.0
    attempts: int = 2
    repeat_every: int = 0

    @property
    def cluster(self) -> str:
        """Address of the scheduler; empty where labels are computed on this machine."""
        return "" if self.executor == LOCAL else self.executor.removeprefix(_DASK)


class Learn(_Section, frozen=True):
    """How the potential is updated.

    Attributes:
        enabled: off means serve only: no labels, no updates.
        swap: "ramp": an engine moves to a new version while it runs; "between": only with its next connection, as constant energy and
            optimisers ask for. Going back from a bad version, and a label that an engine waits for, do not wait for that.
        ramp_steps: force calls over which a session moves to a new version.
        ramp_pause: force calls between the end of a ramp and the start of the next.
        canary_calls: with several engines, force calls that a new version must answer one of them alone until the others move to it; 0 for all at
            once. Going back from a bad version, and a label that an engine waits for, do not wait for that.
        finetune_every: new training labels after which all weights are trained in the background; 0 for never.
        finetune_steps: of each such training; 0 for 1000, or 150 of a foundation model.
        finetune_frozen: groups of parameters that stay as they are then, such as "embedding" or "interactions.0" (see docs/transfer.md).
        finetune_device: "cpu", or "cuda" to train on a GPU, beside the force calls.
        converged_calls: force calls that a version must have served alone, 99 % of the last so many within flag.force_error, until the run
            is said to have converged.
        converged_audits: labels of frames picked at random that must have come meanwhile, 90 % of them within flag.force_error.
    """

    enabled: bool = True
    swap: Literal["ramp", "between"] = "ramp"
    ramp_steps: int = 200
    ramp_pause: int = 500
    canary_calls: int = 100
    finetune_every: int = 8
    finetune_steps: int = 0
    finetune_frozen: tuple[str, ...] = ()
    finetune_device: str = "cpu"
    converged_calls: int = 20_000
    converged_audits: int = 5


class Policy(_Section, frozen=True):
    """What happens to frames that the potential is not sure of.

    Attributes:
        uncertain: above flag.force_error: "continue" (answer now, label later), "stall" (answer once the label is learnt) or "reject" (end
            the session).
        critical: the same above 2.5 times flag.force_error, or where a guard says that a frame does not follow from those before it; with
            "stall", frames wait as well that no version can answer.
        max_stall: seconds that a frame waits for its label at most; keep it below the engine's own time limit, if it has one.
    """

    uncertain: PolicyName = "continue"
    critical: PolicyName = "continue"
    max_stall: float = 1800.0


class Config(_Section, frozen=True):
    """A run: serve, potential, flag, label, learn, policy, and the seed of everything random that tumbaga does."""

    serve: Serve = Serve()
    potential: Potential = Potential()
    flag: Flag = Flag()
    label: Label = Label()
    learn: Learn = Learn()
    policy: Policy = Policy()
    seed: int = 0

    def check(self) -> Config:
        """Return itself.

        Raises:
            ConfigError: a value is out of its range; names the key and says what is allowed.
        """
        _positive("flag.force_error", self.flag.force_error)
        _positive("label.time_limit", self.label.time_limit)
        _positive("policy.max_stall", self.policy.max_stall)
        for key, policy in (("policy.uncertain", self.policy.uncertain), ("policy.critical", self.policy.critical)):
            if policy == "stall" and not self.learn.enabled:
                raise ConfigError(
                    key, "is stall, and nothing learns here, so that engines would wait for nothing; set it to continue or reject"
                )
        _positive("serve.message_seconds", self.serve.message_seconds)
        _positive("serve.unread_seconds", self.serve.unread_seconds)
        if self.serve.committee == 1:
            raise ConfigError("serve.committee", "is 1; a committee has at least 2 members, 0 is for none")
        strangers = sorted(set(self.serve.templates) - set(self.serve.connect))
        if strangers:
            raise ConfigError("serve.templates", f"names {strangers[0]}, which is not in serve.connect")
        for key, value, least in (
            ("flag.spacing", self.flag.spacing, 1),
            ("flag.audit_every", self.flag.audit_every, 1),
            ("label.workers", self.label.workers, 0),
            ("label.cores", self.label.cores, 1),
            ("label.memory_gb", self.label.memory_gb, 0),
            ("label.budget", self.label.budget, 0),
            ("label.core_hours", self.label.core_hours, 0),
            ("label.max_force", self.label.max_force, 0),
            ("label.net_force", self.label.net_force, 0),
            ("label.attempts", self.label.attempts, 1),
            ("label.repeat_every", self.label.repeat_every, 0),
            ("learn.ramp_steps", self.learn.ramp_steps, 1),
            ("learn.ramp_pause", self.learn.ramp_pause, 0),
            ("learn.canary_calls", self.learn.canary_calls, 0),
            ("learn.finetune_every", self.learn.finetune_every, 0),
            ("learn.finetune_steps", self.learn.finetune_steps, 0),
            ("learn.converged_calls", self.learn.converged_calls, 1),
            ("learn.converged_audits", self.learn.converged_audits, 0),
            ("serve.max_refusals", self.serve.max_refusals, 1),
            ("serve.connections", self.serve.connections, 1),
            ("serve.window_ms", self.serve.window_ms, 0),
            ("serve.committee", self.serve.committee, 0),
        ):
            if value < least:
                raise ConfigError(key, f"is {value}; it must be at least {least}")
        if self.label.executor != LOCAL and not self.label.executor.startswith(_SCHEDULERS):
            raise ConfigError("label.executor", f"is {self.label.executor!r}; write local, or dask:tcp://HOST:PORT of a Dask scheduler")
        if self.label.cluster and self.label.method.startswith("ipi:"):
            raise ConfigError("label.executor", "is a Dask cluster, and ipi labels come from programs that connect here; set it to local")
        if not all(self.potential.devices):
            raise ConfigError(
                "potential.device", f"is {self.potential.device!r}; write auto, cpu, cuda, or several with commas between them"
            )
        if self.potential.dtype not in ("float32", "float64"):
            raise ConfigError("potential.dtype", f"is {self.potential.dtype!r}; choose float32 or float64")
        return self


def _positive(key: str, value: float) -> None:
    if not 0.0 < value < float("inf"):
        raise ConfigError(key, f"is {value}; it must be a positive number")


def parse(text: str, where: str) -> Config:
    """Read a configuration from TOML text.

    Raises:
        ConfigError: not TOML, an unknown key, a wrong type or a value out of range; `where` names the file in the sentence.
    """
    try:
        return msgspec.convert(tomllib.loads(text), Config).check()
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(where, f"is not valid TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(where, f"{error}") from error


def changed(config: Config, changes: Sequence[str]) -> Config:
    """Return a configuration with some keys set as "section.key=value"; values are written as in TOML, texts with or without quotes.

    Raises:
        ConfigError: no such key, or a value that does not fit; names the key.

    >>> changed(Config(), ["learn.finetune_every=4", "label.options.xc=pbe0"]).label.options
    {'xc': 'pbe0'}
    """
    plain: dict[str, Any] = msgspec.to_builtins(config)
    for change in changes:
        key, equals, text = change.partition("=")
        *sections, last = key.strip().split(".")
        place: Any = plain
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict) or not last:
            raise ConfigError("--set", f"cannot read {change!r}; write section.key=value, for example learn.finetune_every=4")
        place[last] = _value(text.strip())
    try:
        return msgspec.convert(plain, Config).check()
    except msgspec.ValidationError as error:
        raise ConfigError("--set", f"{error}") from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def load(run_dir: Path) -> Config:
    """Read the frozen configuration of a run directory.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    path = run_dir / FILE
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), "is no text file") from error
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror}); is this a run directory?") from error


def dumps(config: Config) -> str:
    """Return the TOML text of a configuration; `parse` of it gives an equal one."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return tomli_w.dumps(plain)
