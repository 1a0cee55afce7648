"""The tracked quantile: how many predicted standard deviations cover the true force error, learnt from labels as they come. Pure.

Source: Gibbs & Candès, arXiv 2106.00170 (adaptive conformal inference); the step proportional to q is derived: it keeps q positive and
makes the update independent of its unit. The long-run share of misses is `miscoverage` whatever the distribution of the errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tumbaga.online.records import Array

LEAST, MOST = 0.04, 100.0
_TRUSTED = 24  # components
FEWEST = 8  # held-out labels from which on they bound q: the variances were fitted to the same, and of four the largest was too small
_ELSEWHERE = 2.0  # flagged frames lie between those learnt from, some tens of fs apart: others were missed by 1.6 times as many stds


@dataclass(frozen=True)
class TrackedQuantile:
    """The multiplier q between predicted and covered force error.

    Attributes:
        q: multiplier; the flagging score of a frame is q times its largest force std.
        miscoverage: share of frames whose error may exceed the score.
        rate: relative step of an update.
        low: lower bound of q.
        high: upper bound of q; a potential that needs more is not calibrated at all.
        after_swap_least: q is raised to this when a new version serves, since its errors are not known yet.
    """

    q: float = 2.0
    miscoverage: float = 0.1
    rate: float = 0.1
    low: float = 0.5
    high: float = 8.0
    after_swap_least: float = 2.0

    def after(self, ratio: float, audit: bool) -> TrackedQuantile:
        """Return the quantile after a label.

        Args:
            ratio: largest error over std of any atom, by the version that served the frame (see `error_ratio`); not finite is a miss.
            audit: whether the frame was picked at random. Frames picked by the score are biased: they may only raise q.
        """
        missed = not ratio <= self.q  # nan is a miss
        if not missed and not audit:
            return self
        step = self.rate * ((1.0 if missed else 0.0) - self.miscoverage)
        return replace(self, q=min(max(self.q * (1.0 + step), self.low), self.high))

    def after_swap(self, ratios: Sequence[float] = ()) -> TrackedQuantile:
        """Return the quantile with which a new version starts: what held-out labels ask for, within a factor.

        An audit lowers q by a hundredth and there is one in thousands of calls, so that what an early version needed would outlive it by
        weeks. The bound above is twice the conformal quantile of the ratios, or twice their largest one where they are too few for it: most
        held-out labels are of the same stretch of a trajectory as those learnt from, and the variances were fitted to the same ones. The bound below is that quantile.

        Args:
            ratios: `error_ratio` of each held-out label under the new version; fewer than `FEWEST` bound nothing.
        """
        q = max(self.q, self.after_swap_least)
        if len(ratios) >= FEWEST:
            ordered, count = sorted(math.inf if math.isnan(ratio) else ratio for ratio in ratios), len(ratios)
            covering = ordered[min(count, math.ceil((count + 1) * (1.0 - self.miscoverage))) - 1]
            if math.isfinite(covering):
                q = min(max(q, covering), max(self.after_swap_least, _ELSEWHERE * covering), self.high)
        return replace(self, q=q)


def variance_factor(missed: float, spread: float, components: int, trusted: int = _TRUSTED) -> float:
    """Return what predicted variances must be multiplied with to fit the errors of labels that nothing was fitted to.

    The factor of largest likelihood is the ratio of the two sums. Few components say little of it: as many as one small frame has are taken
    to fit as they are. It stays within `LEAST` and `MOST`. What a readout cannot express is no part of its posterior, and behind the narrow
    last layer of a foundation model that is most of the error: there some 25 is asked for.

    Args:
        missed: sum of squared errors of force components, (eV/Å)².
        spread: sum of their predicted variances, likewise.
        components: how many.
        trusted: how many of them weigh as much as what was predicted.
    """
    if not (components and spread > 0.0):
        return 1.0
    return min(max((trusted + components * missed / spread) / (trusted + components), LEAST), MOST)


def error_ratio(forces_label: Array, forces_served: Array, stds: Array) -> float:
    """Return max_i |F_label,i - F_served,i| / std_i.

    Args:
        forces_label: shape (n_atoms, 3), eV/Å.
        forces_served: what the engine was given for this frame, likewise.
        stds: predicted standard deviation of each atom's force (norm over xyz) by the version that served, shape (n_atoms,), eV/Å.
    """
    errors = np.linalg.norm(forces_label - forces_served, axis=1)
    # an atom without any predicted spread covers no error at all, but a force that is right to rounding is no miss
    ratios = np.divide(errors, stds, out=np.where(errors > 1e-9, np.inf, 0.0), where=stds > 0)
    return float(ratios.max())
