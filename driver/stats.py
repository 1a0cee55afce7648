"""Counts and quantiles of force calls, in bounded memory. Pure."""

from __future__ import annotations

import math

import numpy as np

_LEAST_MS, _RATIO, _BINS = 0.01, 1.02, 1000  # 0.01 ms to more than an hour, each bin 2 % wide
_SCALE = 1.0 / math.log(_RATIO)


class CallTimes:
    """A histogram of durations with logarithmic bins: quantiles to 2 %, the maximum exactly."""

    def __init__(self) -> None:
        self._bins = np.zeros(_BINS, dtype=np.int64)
        self.count = 0
        self.longest_ms = 0.0

    def add(self, seconds: float) -> None:
        """Count one call."""
        ms = 1000.0 * seconds
        place = int(math.log(ms / _LEAST_MS) * _SCALE) if ms > _LEAST_MS else 0
        self._bins[place if place < _BINS else _BINS - 1] += 1
        self.count += 1
        self.longest_ms = max(self.longest_ms, ms)

    def quantile_ms(self, share: float) -> float:
        """The duration, ms, that `share` of all calls did not exceed; 0 before the first call.

        >>> times = CallTimes()
        >>> for ms in range(1, 101):
        ...     times.add(ms / 1000)
        >>> abs(times.quantile_ms(0.5) / 50 - 1) < 0.02
        True
        """
        if not self.count:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self._bins), math.ceil(share * self.count)))
        return float(min(_LEAST_MS * _RATIO ** (place + 0.5), self.longest_ms))

    def summary(self) -> dict[str, float]:
        """p50, p99 and max in ms."""
        return {"p50": round(self.quantile_ms(0.5), 3), "p99": round(self.quantile_ms(0.99), 3), "max": round(self.longest_ms, 3)}
