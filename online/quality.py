"""Whether a label can be trusted: what it says by itself, and what all other labels say of it. Pure numpy, float64.

A label that fails is not thrown away: whoever asks sets it aside with the reason, and a person may release it.

By itself a label must have forces within bounds. Against the others, each label is held against a fit that does not know it (leave-one-out),
and what that fit missed is compared with what such fits miss of the other labels. So the order in which labels come does not matter: a bad
one among the first is found as soon as there are enough others, and while it is judged it is part of no statistics.

Source: median and median absolute deviation as robust location and scale: Huber, Robust Statistics (1981). The limits are our own, from labels
of Cu-Au/water clusters by PBE and GFN1-xTB on top of a potential trained on GFN2-xTB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tumbaga.online.last_layer import Fit, Labelled, LeftOut, left_out
from tumbaga.online.records import Array, Frame, Label

LEAST = 6  # other labels that it takes to judge one
SIGMAS = 5.0  # robust standard deviations
_AGREES = 3.0  # of them: a label that was set aside comes back where the others contradict it no more than that
FORCES, ENERGY = "forces", "energy"  # checks against other labels
_MOST_ASIDE = 1 / 3  # of all labels: where more contradict each other, it is not they that are wrong
_MISSED = 0.6  # of the size of a label's forces: below it a label is believed however well the others are predicted
_EXPECTED = 2.0  # times the error that was predicted: up to that a label is no surprise, however small the others' errors are
_QUIET_FORCE = 0.3  # eV/Å; where all forces are small, their size means little
_FORCE_SPREAD = (0.2, 0.3)  # bounds of the scale of log(error / predicted error)
_ENERGY_SPREAD = 0.15  # eV per sqrt(atom), the least scale of energy errors
_REACH = 0.5  # Å: forces that are off by so much over this way make energies of atoms that are off, too, and the label need not be wrong
_MAD = 1.4826  # from a median absolute deviation to a standard deviation, for normal errors

Refit = Callable[[Sequence[Labelled]], Fit]


@dataclass(frozen=True)
class Bounds:
    """What a label must keep by itself.

    Attributes:
        force: largest force on an atom, eV/Å; 0 for no bound.
        net_force: norm of the sum of all forces of an isolated frame over sqrt(atoms), eV/Å; 0 for no bound.
    """

    force: float = 30.0
    net_force: float = 0.05


@dataclass(frozen=True)
class Doubt:
    """Why a label is not trusted.

    Attributes:
        check: "largest force", "net force", "forces" or "energy".
        reason: a sentence.
        numbers: what was measured.
    """

    check: str
    reason: str
    numbers: dict[str, float] = field(default_factory=dict)


def inspect(frame: Frame, label: Label, bounds: Bounds) -> Doubt | None:
    """Judge a label by itself."""
    largest = float(np.linalg.norm(label.forces, axis=1).max())
    if bounds.force and largest > bounds.force:
        said = f"a force of {largest:.1f} eV/Å; labels of frames that the potential should learn stay below {bounds.force:g}"
        return Doubt("largest force", said, {"force": largest, "bound": bounds.force})
    net, most = float(np.linalg.norm(label.forces.sum(axis=0))), bounds.net_force * math.sqrt(len(frame))
    if bounds.net_force and not frame.periodic and net > most:
        said = f"the forces on an isolated frame add up to {net:.3f} eV/Å; {most:.3f} is allowed for {len(frame)} atoms"
        return Doubt("net force", said, {"net_force": net, "bound": most})
    return None


def believed_again(one: Labelled, train: Sequence[Labelled], fitted: Fit) -> bool:
    """Whether a label that others contradicted may come back: a fit that does not know it, maybe behind another network, agrees with it.

    Args:
        one: the label.
        train: labels of the fit.
        fitted: the fit to them.
    """
    others = list(zip(train, fitted.left_out, strict=True))
    return len(train) >= LEAST and not _judged(one, left_out(one, fitted), others, _AGREES)


def room_aside(aside: int, believed: int) -> bool:
    """Whether one more label may be set aside because others contradict it.

    A potential that fits some labels perfectly, since it was trained on them, finds every other label strange. The labels are good then.

    Args:
        aside: labels that are set aside already.
        believed: labels that are not.
    """
    return aside + 1 <= max(2.0, _MOST_ASIDE * (aside + believed))


def doubtful(
    train: Sequence[Labelled], held_out: Sequence[Labelled], fitted: Fit, refit: Refit, spared: Collection[Labelled] = ()
) -> tuple[Labelled, Doubt] | None:
    """Return the label that the others contradict most, and why; None if none is contradicted enough to be set aside.

    Set it aside, fit the rest, and ask again: of several bad labels each hides behind the next.

    Args:
        train: labels of the fit.
        held_out: labels outside it.
        fitted: the fit to all of `train`.
        refit: fits some of them.
        spared: labels that are believed, whatever the others say.
    """
    if len(train) < LEAST:
        return None
    found: list[tuple[float, Labelled, Doubt]] = []
    for one in held_out:
        if one not in spared:
            found += _judged(one, left_out(one, fitted), list(zip(train, fitted.left_out, strict=True)))
    for place in _suspects(train, fitted.left_out) if len(train) > LEAST else ():
        if train[place] not in spared:
            rest = [*train[:place], *train[place + 1 :]]
            without = refit(rest)  # its forces have spoilt the errors of the others, too
            found += _judged(train[place], left_out(train[place], without), list(zip(rest, without.left_out, strict=True)))
    if not found:
        return None
    _, one, doubt = max(found, key=lambda judged: judged[0])
    return one, doubt


def _suspects(train: Sequence[Labelled], errors: Sequence[LeftOut]) -> list[int]:
    """Places of the labels that are worth a second look: the worst one by its forces, and the worst one by its energy."""
    misses = np.array([error.force if _share(one, error) > _MISSED else 0.0 for one, error in zip(train, errors, strict=True)])
    energies = np.array([_energy(one, error) for one, error in zip(train, errors, strict=True)])
    off = np.abs([energy - np.median(energies[_alike(one, train)]) for one, energy in zip(train, energies, strict=True)])
    places = [int(misses.argmax())] if misses.any() else []
    return list(dict.fromkeys([*places, *([int(off.argmax())] if off.max() > SIGMAS * _ENERGY_SPREAD else [])]))


def _judged(
    one: Labelled, error: LeftOut, others: Sequence[tuple[Labelled, LeftOut]], most: float = SIGMAS
) -> list[tuple[float, Labelled, Doubt]]:
    """What speaks against a label, with how many robust standard deviations it does; `most` of them say nothing."""
    found: list[tuple[float, Labelled, Doubt]] = []
    share = _share(one, error)
    logs = np.array([math.log(other.ratio) for _, other in others if other.ratio > 0])
    if share > _MISSED and error.ratio > _EXPECTED and len(logs) >= LEAST:
        sigmas, usual = _sigmas(math.log(error.ratio), logs, *_FORCE_SPREAD)
        if sigmas > most:
            said = (
                f"forces that {len(others)} other labels contradict: they are off by {error.force:.2f} eV/Å where {error.spread:.2f} was expected, "
                f"{error.ratio / math.exp(usual):.0f} times as much as is usual"
            )
            numbers = {"error": error.force, "expected": error.spread, "share": share, "sigmas": sigmas}
            found.append((sigmas, one, Doubt(FORCES, said, numbers)))
    energies = np.array([_energy(other, theirs) for other, theirs in others])[_alike(one, [other for other, _ in others])]
    energies = energies[np.isfinite(energies)]
    if len(energies) >= LEAST:
        sigmas, usual = _sigmas(_energy(one, error), energies, max(_ENERGY_SPREAD, _REACH * error.force))
        if abs(sigmas) > most:
            off = (_energy(one, error) - usual) * math.sqrt(one.composition.sum())
            said = f"an energy that is {off:+.2f} eV off from what {len(energies)} other labels of this composition say"
            found.append((abs(sigmas), one, Doubt(ENERGY, said, {"error": off, "sigmas": abs(sigmas)})))
    return found


def _share(one: Labelled, error: LeftOut) -> float:
    """What was missed, relative to the size of the label's forces."""
    return error.force / math.hypot(math.sqrt(float((one.forces_label**2).mean())), _QUIET_FORCE)


def _energy(one: Labelled, error: LeftOut) -> float:
    """Error of the energy over sqrt(atoms), eV: errors of atoms add up like random numbers."""
    return error.energy / math.sqrt(one.composition.sum())


def _alike(one: Labelled, others: Sequence[Labelled]) -> npt.NDArray[np.bool_]:
    """Which others have the same composition: only their energies share the offset between label and potential."""
    same: npt.NDArray[np.bool_] = np.array([np.array_equal(one.composition, other.composition) for other in others])
    return same


def _sigmas(value: float, others: Array, least: float, most: float = math.inf) -> tuple[float, float]:
    """Return how many robust standard deviations a value lies above the median of others, and that median."""
    median = float(np.median(others))
    scale = min(max(_MAD * float(np.median(np.abs(others - median))), least), most)
    return (value - median) / scale, median
