"""The one-label fix of a soft potential: one scale on what its readout gives, taken only if it helps where it was not fitted.

    F = c · F_readout + F_fixed,    c = F_readout · (F_label - F_fixed) / |F_readout|²

over the components of one label or a few. Whatever stands outside the readout (a repulsive core, reference energies) is not scaled.

Source: Deng et al., npj Comput. Mater. 11, 9 (2025), where c multiplies the whole energy; that it can make things worse, and must be judged
by held-out labels, was measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save

from tumbaga.driver.choosing import batches
from tumbaga.driver.errors import ConfigError
from tumbaga.online import accuracy
from tumbaga.online.accuracy import Interval, Judged
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Array, LabelledFrame
from tumbaga.online.versions import write_whole

LEAST_HELD_OUT: Final = 8  # frames; the interval of fewer says nothing
SCALES: Final = (0.5, 2.0)  # what can be softening; outside it the potential is wrong, not soft


@dataclass(frozen=True)
class Softening:
    """What became of the fix.

    Attributes:
        accepted: whether the scale may be used.
        scale: c.
        labels: how many labels it was fitted to.
        held_out: how many others it was judged by.
        before: force RMSE on those without it, eV/Å.
        after: with it.
        change: after minus before, with its 95 % bootstrap interval.
        told: one sentence.
    """

    accepted: bool
    scale: float
    labels: int
    held_out: int
    before: float
    after: float
    change: Interval
    told: str


def trainable(potential: Potential) -> Trainable:
    """Return the potential, if it has a readout to scale.

    Raises:
        ConfigError: it has none.
    """
    if isinstance(potential, Trainable) and potential.spec.n_hidden:
        return potential
    raise ConfigError("--fix-softening", f"{potential.spec.name} has no linear readout that could be scaled")


def check(potential: Potential, frames: int, labels: int) -> None:
    """Find out whether the fix can be tried at all.

    Raises:
        ConfigError: the potential has no readout, or there are too few frames.
    """
    trainable(potential)
    if not 1 <= labels <= frames // 2:
        raise ConfigError("--labels", f"is {labels}, and the half of the data that is not held out has {frames // 2} frames")


def try_scale(potential: Trainable, judged: Sequence[Judged], labels: int = 1, seed: int = 0) -> Softening:
    """Fit the scale to a few labels and judge it by others.

    The frames are split by chance into two halves. Labels to fit come from the first, by chance; all of the second judge. The scale is
    accepted if it lowers the force RMSE there with the whole 95 % interval of the difference below zero (2,000 resamples of frames).

    Args:
        potential: whose predictions `judged` holds.
        judged: frames with labels and predictions.
        labels: how many to fit.
        seed: of the split, the choice and the bootstrap.

    Raises:
        ConfigError: see `check`.
    """
    check(potential, len(judged), labels)
    first, second = accuracy.indices_in_halves(len(judged), seed)
    fitted = np.random.default_rng(seed).permutation(first)[:labels]
    fixed = _fixed_forces(potential, [judged[k] for k in (*fitted, *second)])
    scale = _fit([judged[k] for k in fitted], fixed[:labels])
    held = [judged[k] for k in second]
    scaled = [replace(one, forces=rest + scale * (one.forces - rest)) for one, rest in zip(held, fixed[labels:], strict=True)]
    change = accuracy.gain(held, scaled, seed)
    before, after = accuracy.force_error(held).rmse, accuracy.force_error(scaled).rmse
    why = _against(scale, len(held), change)
    what = f"a scale of {scale:.3f} from {labels} label{'s' * (labels > 1)}"
    effect = f"changes the force RMSE on {len(held)} held-out frames from {before:.4f} to {after:.4f} eV/Å"
    told = (
        f"{what} {effect} (95 % interval of the change {change.low:+.4f} to {change.high:+.4f}): {'refused, ' + why if why else 'accepted'}"
    )
    return Softening(not why, scale, labels, len(held), before, after, change, told)


def write(potential: Trainable, fix: Softening, path: Path) -> str:
    """Write the potential with its readout scaled, whole or not at all; return the name by which it is loaded.

    Raises:
        ConfigError: the file cannot be written.
    """
    metadata = {**potential.metadata, "softening": json.dumps({**asdict(fix), "of": potential.spec.name})}
    tensors = {name: np.ascontiguousarray(value) for name, value in potential.state(fix.scale * potential.readout()).items()}
    try:
        write_whole(path, save(tensors, metadata))
    except OSError as error:
        raise ConfigError("--out", f"{path} cannot be written ({error.strerror})") from error
    return f"{potential.spec.name.partition(':')[0]}:{path}"


def _fixed_forces(potential: Trainable, judged: Sequence[Judged]) -> list[Array]:
    """The forces from outside the readout: what is left with a readout of zeros."""
    found: list[Array] = []
    for part in batches([LabelledFrame(one.frame, one.label) for one in judged]):
        zeros = np.zeros((len(part), potential.spec.n_columns))
        found += [said.forces for said in potential.predict([one.frame for one in part], zeros)]
    return found


def _fit(judged: Sequence[Judged], fixed: Sequence[Array]) -> float:
    pairs = [(one.forces - rest, one.label.forces - rest) for one, rest in zip(judged, fixed, strict=True)]
    below = sum(float((said * said).sum()) for said, _ in pairs)
    return sum(float((said * true).sum()) for said, true in pairs) / below if below > 0 else float("nan")


def _against(scale: float, held_out: int, change: Interval) -> str:
    low, high = SCALES
    if held_out < LEAST_HELD_OUT:
        return f"at least {LEAST_HELD_OUT} held-out frames are needed to judge it"
    if not low <= scale <= high:
        return f"a scale outside {low:g} to {high:g} is not softening"
    return "" if change.high < 0 else "the interval is not below zero"
