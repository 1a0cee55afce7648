"""How many evaluators a run has, and where each computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from tumbaga.driver.config import Config

AUTO: Final = "auto"
_DRIVERS: Final = (Path("/dev/nvidiactl"), Path("/dev/kfd"))  # torch would tell for sure, and takes seconds to import
_MOST: Final = 8  # copies of a potential that are made without being asked for


def has_gpu() -> bool:
    """Whether this machine seems to have a GPU that its user has not hidden."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and any(path.exists() for path in _DRIVERS)


def chosen(settings: Config, cores: int, gpu: bool) -> tuple[str, ...]:
    """Return the device of each evaluator.

    "auto" is one evaluator for a GPU. Without one, an evaluator computes on one core: there is one for each core that label workers leave, but
    not more than engines can be connected.

    Args:
        settings: of the run.
        cores: that this process may use.
        gpu: whether there is one.
    """
    names = settings.potential.devices
    if names != (AUTO,) or gpu:
        return names
    free = cores - (settings.label.workers if settings.learn.enabled else 0)
    engines = len(settings.serve.connect) * settings.serve.connections
    return (AUTO,) * max(1, min(free, engines, _MOST))


def of_run(settings: Config) -> tuple[str, ...]:
    """`chosen` for this machine."""
    return chosen(settings, len(os.sched_getaffinity(0)), has_gpu())
