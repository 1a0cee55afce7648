"""Intervals over few repeats, and how a plot is written small."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tumbaga.online.versions import write_whole

Z95 = 1.96
Band = tuple[float, float, float]  # value, low, high


def over_seeds(values: Sequence[float]) -> Band:
    """The geometric mean of errors with the 95 % t-interval of the mean logarithm; the interval is nan for fewer than two values.

    Errors are above zero and differ by factors: the interval of the plain mean of three of them may well begin below zero.
    """
    logs = np.log(np.asarray(values, dtype=np.float64))
    mean = float(logs.mean())
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def share(successes: int, total: int) -> Band:
    """The share with its 95 % interval. Source: Wilson, J. Am. Stat. Assoc. 22, 209 (1927)."""
    p, z2 = successes / total, Z95**2
    middle = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return p, max(0.0, middle - half), min(1.0, middle + half)


def saved(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100, bbox_inches="tight")
    write_whole(path, data.getvalue())
