"""Every knob of a training, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from tumbaga.online.errors import TrainingError

Schedule = Literal["cosine", "plateau", "constant"]
LEAST: Final = 0.01  # of the rate: where a cosine schedule ends


@dataclass(frozen=True)
class Settings:
    """How a training goes.

    The loss of a batch is the sum of three means, each of squared errors, or of Huber's loss (twice, so that small errors are squared):
    components of forces, eV/Å; energies per atom, eV; components of virials per atom, eV, where the labels have them.

    Attributes:
        epochs: passes over the new frames.
        rate: learning rate of AdamW at its highest.
        batch_atoms: frames are put together up to so many atoms; at least one a batch.
        force_weight, energy_weight, virial_weight: of the three means.
        huber: errors beyond it count linearly, eV/Å and eV per atom; 0 for plain squares.
        average: memory of the moving average of the weights, a step; 0 for none. The average is what is judged and what comes out.
        schedule: of the rate: half a cosine over all epochs, halved where the validation error stays, or constant.
        warmup: steps over which the rate rises from nothing.
        clip: the norm of the gradient at most.
        decay: weight decay a step and rate.
        patience: epochs without a better validation error after which to stop; 0 never stops early. A plateau halves after a third of it.
        frozen: groups of parameters that stay as they are, by name or first part of it ("interactions" for all layers); "reference" keeps the
            reference energies.
        replay: replay frames for each new frame in an epoch, at most all there are.
        replay_weight: of a replay frame in the loss; a new one has 1.
        pitc, pisc: weights of the two losses of work that is consistent; 0 leaves them out (they cost two or three times a step).
        work_step: displacements of these two losses, Å, for each coordinate evenly between plus and minus it.
        seed: of everything random.

    Raises:
        TrainingError: a number out of range.
    """

    epochs: int
    rate: float = 1e-3
    batch_atoms: int = 64
    force_weight: float = 1.0
    energy_weight: float = 10.0
    virial_weight: float = 10.0
    huber: float = 0.3
    average: float = 0.99
    schedule: Schedule = "cosine"
    warmup: int = 20
    clip: float = 1.0
    decay: float = 0.0
    patience: int = 0
    frozen: tuple[str, ...] = ()
    replay: float = 10.0
    replay_weight: float = 1.0
    pitc: float = 0.0
    pisc: float = 0.0
    work_step: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_atoms", "rate", "clip", "work_step"):
            self._demand(name, getattr(self, name) > 0, "must be above 0")
        for name in ("force_weight", "energy_weight", "virial_weight", "huber", "decay", "replay", "replay_weight", "pitc", "pisc"):
            self._demand(name, getattr(self, name) >= 0, "must not be negative")
        for name in ("warmup", "patience", "seed"):
            self._demand(name, getattr(self, name) >= 0, "must not be negative")
        self._demand("average", 0 <= self.average < 1, "must be from 0 to below 1")
        self._demand("schedule", self.schedule in get_args(Schedule), f"must be one of {', '.join(get_args(Schedule))}")
        self._demand("force_weight", self.force_weight + self.energy_weight > 0, "and energy_weight must not both be 0")

    def _demand(self, name: str, holds: bool, problem: str) -> None:
        if not holds:
            raise TrainingError(name, f"{problem}; it is {getattr(self, name)}")

    def rate_at(self, step: int, done: float, halvings: int = 0) -> float:
        """Return the rate of a step.

        Args:
            step: counted from 0.
            done: which part of all epochs is done, 0 to 1.
            halvings: plateaus so far.
        """
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "cosine":
            rise *= LEAST + (1.0 - LEAST) * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.rate * float(rise) * 0.5**halvings
