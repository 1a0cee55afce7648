"""What `tumbaga label` asks of the processes of a run, beyond the run's own configuration. Handed to them as one argument."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tumbaga.driver import config as configs
from tumbaga.online.labels.factory import split_options


class Work(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the queue, and how it is to be worked off.

    Attributes:
        strategy: frames that are to be labelled in this way, "KEY=VALUE&…" with options of the labeller; empty for the run's own way.
        workers: labels at a time; 0 for as many as the run has.
        most: labels at most; 0 for all that wait.
    """

    strategy: str = ""
    workers: int = 0
    most: int = 0

    @property
    def argument(self) -> str:
        """For the command line of a child process."""
        return msgspec.json.encode(self).decode()


def told(run_dir: Path, arguments: list[str]) -> tuple[configs.Config, Work]:
    """Return the settings of a run as its processes are to use them, and the work that an argument names, if there is one.

    Raises:
        ConfigError: the configuration is missing or wrong.
        UnknownMethodError: the strategy is not KEY=VALUE.
    """
    settings = configs.load(run_dir)
    if not arguments:
        return settings, Work()
    work = msgspec.json.decode(arguments[0], type=Work)
    label = msgspec.structs.replace(settings.label, workers=work.workers or settings.label.workers)
    return msgspec.structs.replace(settings, label=otherwise(label, work.strategy)), work


def otherwise(label: configs.Label, strategy: str) -> configs.Label:
    """Return who labels, with some options changed.

    Raises:
        UnknownMethodError: the strategy is not KEY=VALUE.

    >>> otherwise(configs.Label(method="pyscf?grid=2", options={"max_cycle": 50}), "max_cycle=300").method
    'pyscf?grid=2&max_cycle=300'
    """
    if not strategy:
        return label
    method = f"{label.method}{'&' if '?' in label.method else '?'}{strategy}"
    changed = split_options(f"?{strategy}")[1]
    options = {
        key: value for key, value in label.options.items() if key not in changed
    }  # they would win over what stands behind the method
    return msgspec.structs.replace(label, method=method, options=options)
