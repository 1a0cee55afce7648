"""How a new version fades in: a cosine ramp over force calls, one ramp at a time, and the work a swap does on the system. Pure.

lambda_k = (1 - cos(pi k / n)) / 2: the shock to a stiff mode is removed when the ramp lasts several of its periods (derived).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

N_CALLS = 200
REST_CALLS = 500


class Mix(NamedTuple):
    """What serves one force call: (1 - weight) * V_old + weight * V_new. Outside ramps old and new are the same and weight is 1."""

    old: int
    new: int
    weight: float


@dataclass(frozen=True)
class Ramp:
    """One version fading into another.

    Attributes:
        from_version: number of the version that served before.
        to_version: number of the one that will serve.
        k: calls made on the ramp so far, 0 … n.
        n: calls it takes.
    """

    from_version: int
    to_version: int
    k: int = 0
    n: int = N_CALLS

    def __post_init__(self) -> None:
        if not (self.n >= 1 and 0 <= self.k <= self.n):
            raise ValueError(f"a ramp of {self.n} calls cannot be at call {self.k}")

    def advance(self) -> Ramp:
        """Return the ramp one call later; itself when done."""
        return self if self.done else Ramp(self.from_version, self.to_version, self.k + 1, self.n)

    @property
    def weight(self) -> float:
        """Weight of the new version, 0 … 1."""
        return 1.0 if self.done else 0.5 * (1.0 - math.cos(math.pi * self.k / self.n))

    @property
    def done(self) -> bool:
        """Whether the new version serves alone."""
        return self.k >= self.n


@dataclass(frozen=True)
class RampState:
    """Which version serves one engine run, which one is fading in, and which one waits.

    A version published during a ramp, or within `rest` calls after one, waits; a newer one replaces it: updates that come too often
    never let the system settle.

    Attributes:
        serving: number of the version that serves, or served until the ramp began.
        ramp: the ramp under way.
        waiting: the version that comes next.
        idle: calls since the last ramp ended, up to `rest`.
        n: calls of a ramp; 1 is a hard swap.
        rest: calls between the end of a ramp and the next one.
        hurry: whether what waits does so for the ramp under way only.
    """

    serving: int
    ramp: Ramp | None = None
    waiting: int | None = None
    idle: int = REST_CALLS
    n: int = N_CALLS
    rest: int = REST_CALLS
    hurry: bool = False

    def publish(self, version: int) -> RampState:
        """Return the state after a version was published. What serves, or is about to, needs no ramp: a return to it cancels the wait."""
        target = self.serving if self.ramp is None else self.ramp.to_version
        return replace(self, waiting=None if version == target else version, hurry=False)

    def recall(self, version: int, *, at_once: bool = False) -> RampState:
        """Return the state after a version was gone back to: it does not wait for the rest between two ramps.

        A ramp that leads away from it turns round where it is; one between two others is finished first.

        Args:
            version: its number.
            at_once: whether it serves alone from the next call on, because what serves now must not even take a part.
        """
        now, ramp = self.serving if self.ramp is None else self.ramp.to_version, self.ramp
        if version == now:
            return replace(self, waiting=None)
        if at_once:
            return replace(self, serving=now, ramp=Ramp(now, version, 0, 1), waiting=None)
        if ramp is not None and version == ramp.from_version:
            return replace(self, serving=now, ramp=Ramp(now, version, ramp.n - ramp.k, ramp.n), waiting=None)
        return replace(self, waiting=version, hurry=True)

    def advance(self) -> tuple[RampState, Mix]:
        """Return the state after one more force call, and the mix that serves this call."""
        state = self._begun()
        if state.ramp is not None:
            ramp = state.ramp.advance()
            mix = Mix(ramp.from_version, ramp.to_version, ramp.weight)
            if ramp.done:
                return replace(state, serving=ramp.to_version, ramp=None, idle=0), mix
            return replace(state, ramp=ramp), mix
        if state.idle < state.rest:
            state = replace(state, idle=state.idle + 1)
        return state, Mix(state.serving, state.serving, 1.0)

    def _begun(self) -> RampState:
        if self.ramp is not None or self.waiting is None or (self.idle < self.rest and not self.hurry):
            return self
        return replace(self, ramp=Ramp(self.serving, self.waiting, 0, self.n), waiting=None, hurry=False)


def weight_step(before: Mix, now: Mix) -> float:
    """Return by how much the weight of the new version grew between two consecutive calls of one run; 0 outside ramps."""
    if now.old == now.new:
        return 0.0
    if (before.old, before.new) == (now.new, now.old):  # turned round: what was new is left again
        return now.weight - (1.0 - before.weight)
    return now.weight - (before.weight if (before.old, before.new) == (now.old, now.new) else 0.0)


def swap_work(weight_step: float, energy_new: float, energy_old: float) -> float:
    """Return the work one call of a ramp does on the system, eV: (lambda_k - lambda_(k-1)) * (V_new - V_old) at this call's positions.

    Positive when the potential energy was raised. The conserved energy of the engine minus the sum of these has no step. Both energies
    must have the same zero. For a ramp of a readout, V_new - V_old is (w_new - w_old) · phi.
    """
    return weight_step * (energy_new - energy_old)
