"""How many evaluators a run has, and where each computes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tumbaga.driver.config import Config

AUTO: Final = "auto"
THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables with which libraries are told how many threads to compute with."""
_DRIVERS: Final = (Path("/dev/nvidiactl"), Path("/dev/kfd"))  # torch would tell for sure, and takes seconds to import
_MOST: Final = 8  # copies of a potential that are made without being asked for


def has_gpu() -> bool:
    """Whether this machine seems to have a GPU that its user has not hidden."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1") and any(path.exists() for path in _DRIVERS)


def forkable(device: str, gpu: bool) -> bool:
    """Whether evaluators of a device may share what they have loaded: on a CPU, with one thread each, where the system can do that.

    Args:
        device: as `chosen` says.
        gpu: whether there is one.
    """
    single = all(os.environ.get(name, "1") == "1" for name in THREADS)
    return sys.platform == "linux" and single and (device == "cpu" or (device == AUTO and not gpu))


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
    free = cores - _of_labels(settings)
    engines = len(settings.serve.connect) * settings.serve.connections
    return (AUTO,) * max(1, min(free, engines, _MOST))


def _of_labels(settings: Config) -> int:
    """How many cores of this machine labels take."""
    return settings.label.workers * settings.label.cores if settings.learn.enabled and not settings.label.cluster else 0


def left_for_labels(settings: Config, cores: Sequence[int], evaluators: int) -> tuple[int, ...]:
    """Return the cores on which labels are computed; none where they may be computed on all.

    Labels keep off as many cores as there are evaluators, if enough are left. They share what is left, rather than to have a core each: several
    runs on one machine would choose the same ones.

    Args:
        settings: of the run.
        cores: that this process may use.
        evaluators: how many there are.
    """
    left = tuple(sorted(cores))[evaluators:]
    return left if len(left) >= _of_labels(settings) else ()


def for_labels(settings: Config) -> tuple[int, ...]:
    """`left_for_labels` for this machine."""
    return left_for_labels(settings, sorted(os.sched_getaffinity(0)), len(of_run(settings)))


def of_run(settings: Config) -> tuple[str, ...]:
    """`chosen` for this machine."""
    return chosen(settings, len(os.sched_getaffinity(0)), has_gpu())
