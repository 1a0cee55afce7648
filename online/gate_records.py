"""What the gate takes and gives: evidence, thresholds and findings. Frozen, numpy only; the checks are in the other files `gate_*`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tumbaga.online.ports import Potential
from tumbaga.online.records import Frame, Label, LabelledFrame, Role

Number = float | int | str | None


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        name: "finite", "consistency", "audits", "replay", "short range", "shadow MD" or "calibration".
        passed: whether the candidate may serve as far as this check goes.
        numbers: what was measured and how much was done for it, JSON-compatible; None in place of what is not finite.
        reason: one sentence for people, also where it passed.
    """

    name: str
    passed: bool
    numbers: Mapping[str, Number]
    reason: str

    def __post_init__(self) -> None:
        cleaned = {key: _plain(value) for key, value in self.numbers.items()}
        object.__setattr__(self, "numbers", cleaned)


def _plain(value: Number) -> Number:
    """What JSON has a word for; numpy's floats are floats, its integers and truths are not."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return int(value)


@dataclass(frozen=True, eq=False)
class Known:
    """A label as evidence.

    Attributes:
        frame: the frame.
        label: its label; only forces are read.
        role: HOLDOUT where neither version has learnt from it, TRAIN otherwise.
        kinds: the classes it is judged in, any number of names: composition, reason, temperature stage.
    """

    frame: Frame
    label: Label
    role: Role
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a candidate is judged by. Everything may be empty: a check without evidence passes and says so.

    Attributes:
        labels: held-out and learnt ones, of one level of theory.
        replay: frames with what the original potential says of them, which must not be forgotten; see `training.replay.pseudo_labelled`.
        recent: frames of the engines, newest first; shadow MD starts from the first of them.
        elements: atomic numbers that occur; empty means those of all frames above.
        temperature: of the engines, K; None if it is not known: shadow MD then runs at 300 K.
        ratios: of each label, its largest force error over the std that was predicted for it without it (`calibration.error_ratio` of
            leave-one-out numbers), by the last layer built for the candidate.
        twin: the candidate computing in the other precision, where it can be had.
    """

    labels: Sequence[Known] = ()
    replay: Sequence[LabelledFrame] = ()
    recent: Sequence[Frame] = ()
    elements: Sequence[int] = ()
    temperature: float | None = None
    ratios: Sequence[float] = ()
    twin: Potential | None = None

    @property
    def frames(self) -> list[Frame]:
        """All frames, those of labels first."""
        return [one.frame for one in self.labels] + [one.frame for one in self.replay] + list(self.recent)

    @property
    def species(self) -> list[int]:
        """The elements that occur, ascending."""
        return sorted(set(self.elements) or {int(z) for frame in self.frames for z in frame.numbers})


@dataclass(frozen=True)
class Limits:
    """All thresholds; the defaults are those for a fine-tune. Design values where no measurement is named.

    Attributes:
        seconds: what the gate may take in all, about. Where the potential is slow, frames, steps and replicas are left out to keep to it
            (held-out labels never); the numbers of each check say how much was done.
        gradient: energy and forces must agree to this, eV/Å, or to as much of the largest force of the frame where that is above 1 eV/Å.
            The embedded potential keeps to 5e-5 in float32 (measured over 12 frames of its data set).
        precision: float32 and float64 forces must agree to this, relative in the same way.
        audit_ratio: force RMSE on held-out labels over the serving version's; more is worse where it is significant.
        clear_ratio: more than this is worse in any case, on all held-out labels and on any class; of few labels more is needed (`scatter`).
        scatter: standard deviation of the logarithm of the ratio of two versions' errors on a single label: of n labels, a ratio below
            exp(2 scatter / sqrt(n)) is not called clearly worse. 0.1 to 0.4 was measured between fine-tunes of one start.
        negligible: differences of force RMSE below this are none, eV/Å.
        resampled_from: held-out labels from which significance is judged, by resampling: of fewer, all may be worse by chance.
        class_least: labels a class must have to be judged by itself.
        drift_ratio, drift_extra: replay RMSE over, or eV/Å above, the serving version's; the larger counts. It is over `drift_frames`, a
            share of the frames, without those that changed most; and differences in frames whose forces have an rms above 1 eV/Å count
            relative to that: else a single frame in which atoms are pressed together outweighs all others.
        drift_share: replay RMSE up to this share of the error that the original has on the labels (upper quartile) is no forgetting:
            where the level of theory changes, forces change everywhere, and a serving version that is the original has no drift at all.
            A true change was 0.4 to 1.7 times as large on replay frames as on those of a run (measured, with frames of
            `training.replay.generated`, for the embedded potential against copies with other weights).
        wall: a pair counts as repulsive where the original pushes it apart by more, eV/Å.
        wall_share: share of the original's repulsion that must be left, as energy above the lowest one further out.
        wall_height: eV; what is nearer than where the candidate's own repulsion has come to this is out of reach and not looked at: there
            networks extrapolate, and sound fine-tunes of the embedded potential were seen to pull at half the bond length. With `wall_share`
            up to 1.5 eV are asked for, 30 kT at 600 K.
        shadow_frames: starts of shadow MD; shadow_steps: of each, half of them to settle; 0 leaves shadow MD out.
        steady_steps: without a thermostat, after that.
        shadow_force: larger forces are an explosion, eV/Å.
        temperature_sigmas, temperature_slack: the temperature must be right to so many standard deviations and this share of it.
        drift_energy: of the total energy without thermostat, eV per atom and ps, and `drift_energy_ratio`: over the serving version's
            from the same start; the larger counts. The embedded potential drifts by 0.0003 (measured).
        multiplier: how many standard deviations may be needed at most to cover the errors of `covered` of the labels.
        covered: share of labels.
        seed: of everything random.
    """

    seconds: float = 60.0
    gradient: float = 1e-3
    precision: float = 1e-3
    audit_ratio: float = 1.0
    clear_ratio: float = 1.2
    scatter: float = 0.35
    negligible: float = 0.003
    resampled_from: int = 5
    class_least: int = 2
    drift_ratio: float = 1.2
    drift_extra: float = 0.05
    drift_share: float = 2.0
    drift_frames: float = 0.9
    wall: float = 5.0
    wall_share: float = 0.3
    wall_height: float = 5.0
    shadow_frames: int = 5
    shadow_steps: int = 200
    steady_steps: int = 100
    shadow_force: float = 50.0
    temperature_sigmas: float = 3.0
    temperature_slack: float = 0.1
    drift_energy: float = 5e-3
    drift_energy_ratio: float = 3.0
    multiplier: float = 8.0
    covered: float = 0.9
    seed: int = 0


FINE_TUNE: Final = Limits()
"""What a fine-tuned candidate must pass."""

LAST_LAYER: Final = Limits(audit_ratio=1.05, shadow_steps=0)
"""What a candidate with another readout must pass: no shadow MD, and a slightly larger error on held-out labels is borne."""
