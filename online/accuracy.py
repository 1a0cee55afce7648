"""How good predictions are against labels: errors, energy offsets, softening slopes, coverage of uncertainties. Pure numpy.

Energies eV, forces eV/Å. Force errors are of components (x, y, z apart), as RMSE and MAE; energy errors are per atom.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np

from tumbaga.online.records import Array, Frame, Ints, Label

RESAMPLES: Final = 2000
MAGNITUDES: Final = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, math.inf)  # of the label's force on an atom, eV/Å
QUANTILES: Final = (0.5, 0.683, 0.9, 0.95, 0.99)
_CHUNK: Final = 100  # resamples at once: memory


@dataclass(frozen=True, eq=False)
class Judged:
    """A labelled frame with what a potential says of it.

    Attributes:
        frame: the frame.
        label: its label.
        energy: predicted, eV.
        forces: predicted, shape (n_atoms, 3), float64, eV/Å.
        stds: predicted standard deviation of each force component, shape (n_atoms, 3), eV/Å; None where not asked for or not known.
        energy_std: that of the total energy, up to a constant for each element, eV; nan likewise.
    """

    frame: Frame
    label: Label
    energy: float
    forces: Array
    stds: Array | None = None
    energy_std: float = math.nan


@dataclass(frozen=True)
class ForceError:
    """Force error over components, eV/Å; `rms` is that of the labels' own components, to see an error in proportion. nan without atoms."""

    atoms: int
    rmse: float
    mae: float
    rms: float


@dataclass(frozen=True)
class EnergyError:
    """Energy error per atom over frames, eV; `bias` is its mean (prediction minus label)."""

    frames: int
    rmse: float
    mae: float
    bias: float


@dataclass(frozen=True)
class Offsets:
    """An energy for each element, by least squares.

    Attributes:
        elements: atomic numbers.
        energies: eV per atom of each; of the smallest norm where compositions leave them open.
        rank: how many independent compositions there are; below the number of elements the single values mean nothing, their sums do.
    """

    elements: tuple[int, ...]
    energies: tuple[float, ...]
    rank: int

    def of(self, frame: Frame) -> float:
        """Their sum over the atoms of a frame, eV."""
        return float(sum(energy * (frame.numbers == z).sum() for z, energy in zip(self.elements, self.energies, strict=True)))


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % bootstrap interval; low and high are nan where there are too few frames to resample."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Slope:
    """Predicted against labelled force components: a slope below 1 is a soft potential.

    Attributes:
        origin: of the line through the origin.
        line: of the line with an intercept.
        intercept: of that line, eV/Å.
    """

    origin: Interval
    line: Interval
    intercept: float


@dataclass(frozen=True)
class Coverage:
    """Share of errors within the bound that promised to hold for a share of them."""

    promised: float
    found: float


def force_error(judged: Sequence[Judged], masks: Sequence[np.ndarray] | None = None) -> ForceError:
    """Return the force error over all atoms, or over those of the masks, one for each frame."""
    masks = masks or [np.ones(len(one.frame), dtype=bool) for one in judged]
    said = [one.forces[mask] for one, mask in zip(judged, masks, strict=True)]
    true = [one.label.forces[mask] for one, mask in zip(judged, masks, strict=True)]
    labels = np.concatenate(true) if true else np.zeros((0, 3))
    errors = (np.concatenate(said) if said else labels) - labels
    if not errors.size:
        return ForceError(0, math.nan, math.nan, math.nan)
    return ForceError(len(errors), _rms(errors), float(np.abs(errors).mean()), _rms(labels))


def by_element(judged: Sequence[Judged]) -> dict[int, ForceError]:
    """Return the force error of each element, by atomic number."""
    elements = sorted({int(z) for one in judged for z in one.frame.numbers})
    return {z: force_error(judged, [one.frame.numbers == z for one in judged]) for z in elements}


def by_magnitude(judged: Sequence[Judged], edges: Sequence[float] = MAGNITUDES) -> list[tuple[float, float, ForceError]]:
    """Return (low, high, error) of the atoms whose labelled force, norm over xyz, is at least low and below high, eV/Å."""
    sizes = [np.linalg.norm(one.label.forces, axis=1) for one in judged]
    bins = itertools.pairwise(edges)
    return [(low, high, force_error(judged, [(low <= size) & (size < high) for size in sizes])) for low, high in bins]


def per_element(frames: Sequence[Frame], energies: Sequence[float]) -> Offsets:
    """Return energies of the elements whose sums are nearest to those of the frames, by least squares per atom.

    Args:
        frames: only their species are read.
        energies: of each frame, eV.
    """
    elements = tuple(sorted({int(z) for frame in frames for z in frame.numbers}))
    shares = np.array([[(frame.numbers == z).mean() for z in elements] for frame in frames], dtype=np.float64)
    sizes = np.array([len(frame) for frame in frames])
    found, _, rank, _ = np.linalg.lstsq(shares, np.asarray(energies, dtype=np.float64) / sizes, rcond=1e-10)
    return Offsets(elements, tuple(float(energy) for energy in found), int(rank))


def offsets(judged: Sequence[Judged]) -> Offsets:
    """Return what is to be added to the predictions for each atom, so that the energy error per atom is smallest.

    Labels and potentials count energies from different zeros: of the atoms, of the electrons. No force depends on them.
    """
    return per_element([one.frame for one in judged], [one.label.energy - one.energy for one in judged])


def energy_error(judged: Sequence[Judged], added: Offsets | None = None) -> EnergyError:
    """Return the energy error per atom, raw or with offsets added to the predictions."""
    errors = np.array([(one.energy + (added.of(one.frame) if added else 0.0) - one.label.energy) / len(one.frame) for one in judged])
    if not errors.size:
        return EnergyError(0, math.nan, math.nan, math.nan)
    return EnergyError(len(errors), _rms(errors), float(np.abs(errors).mean()), float(errors.mean()))


def slope(judged: Sequence[Judged], seed: int = 0, resamples: int = RESAMPLES) -> Slope:
    """Return the softening slope with its interval, from resampled frames.

    Source:
        Deng et al., npj Comput. Mater. 11, 9 (2025), for the slope; Efron, Ann. Statist. 7, 1 (1979), for the interval.
    """
    sums = np.array([_sums(one) for one in judged]).reshape(-1, 5)
    drawn = resampled(sums, seed, resamples)
    total = sums.sum(axis=0, keepdims=True)
    line = float(_line(total)[0])
    intercept = float((total[0, 3] - line * total[0, 2]) / total[0, 4]) if len(sums) else math.nan
    return Slope(_interval(float(_through(total)[0]), _through(drawn)), _interval(line, _line(drawn)), intercept)


def gain(before: Sequence[Judged], after: Sequence[Judged], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Return by how much the force RMSE changes from one potential to another on the same frames, eV/Å, from resampled frames.

    Below zero is better; the interval is that of the difference, so what both find hard does not widen it.
    """
    squares = np.array(
        [
            [float(((one.forces - one.label.forces) ** 2).sum()) for one in pair] + [pair[0].forces.size]
            for pair in zip(before, after, strict=True)
        ]
    ).reshape(-1, 3)
    return _interval(float(_change(squares.sum(axis=0, keepdims=True))[0]), _change(resampled(squares, seed, resamples)))


def resampled(sums: Array, seed: int, resamples: int = RESAMPLES) -> Array:
    """Return the column sums over frames drawn with replacement, shape (resamples, n_columns); none for fewer than two frames.

    Args:
        sums: of each frame, shape (n_frames, n_columns).
        seed: of the draws.
        resamples: how many.
    """
    many = len(sums)
    if many < 2:
        return np.zeros((0, sums.shape[1]))
    rng, found = np.random.default_rng(seed), []
    for start in range(0, resamples, _CHUNK):
        found.append(rng.multinomial(many, np.full(many, 1.0 / many), size=min(_CHUNK, resamples - start)) @ sums)
    return np.concatenate(found)


def coverage(judged: Sequence[Judged], quantiles: Sequence[float] = QUANTILES) -> list[Coverage]:
    """Return how many force components lie within the interval of a normal distribution of the predicted width, at each quantile."""
    errors, stds = _with_stds(judged)
    found = []
    for quantile in quantiles:
        width = NormalDist().inv_cdf(0.5 + 0.5 * quantile)
        found.append(Coverage(quantile, float((errors <= width * stds).mean()) if errors.size else math.nan))
    return found


def width_factor(judged: Sequence[Judged]) -> float:
    """Return the number by which stds would have to be multiplied to fit the errors: sqrt(pi/2) times the mean of |error| / std.

    nan where no component has a std above zero.
    """
    errors, stds = _with_stds(judged)
    ratios = errors[stds > 0] / stds[stds > 0]
    return math.sqrt(math.pi / 2) * float(ratios.mean()) if ratios.size else math.nan


def energy_coverage(judged: Sequence[Judged], added: Offsets, quantiles: Sequence[float] = QUANTILES) -> list[Coverage]:
    """Return how many total energies, offsets added, lie within the interval of a normal distribution of the predicted width.

    Empty where no frame has a predicted width, or no more have one than there are offsets.
    """
    ratios = _energy_ratios(judged, added)
    widths = [(quantile, NormalDist().inv_cdf(0.5 + 0.5 * quantile)) for quantile in quantiles]
    return [Coverage(quantile, float((ratios <= width).mean())) for quantile, width in widths] if ratios.size else []


def energy_width_factor(judged: Sequence[Judged], added: Offsets) -> float:
    """Return what `width_factor` does, for total energies, offsets added; nan where `energy_coverage` is empty."""
    ratios = _energy_ratios(judged, added)
    return math.sqrt(math.pi / 2) * float(ratios.mean()) if ratios.size else math.nan


def _energy_ratios(judged: Sequence[Judged], added: Offsets) -> Array:
    held = [one for one in judged if one.energy_std > 0.0]
    if len(held) <= added.rank:
        return np.zeros(0)
    return np.array([abs(one.energy + added.of(one.frame) - one.label.energy) / one.energy_std for one in held])


def _with_stds(judged: Sequence[Judged]) -> tuple[Array, Array]:
    held = [(np.abs(one.forces - one.label.forces).ravel(), one.stds.ravel()) for one in judged if one.stds is not None]
    if not held:
        return np.zeros(0), np.zeros(0)
    errors, stds = zip(*held, strict=True)
    return np.concatenate(errors), np.concatenate(stds)


def _rms(values: Array) -> float:
    return math.sqrt(float((values**2).mean()))


def _sums(one: Judged) -> list[float]:
    true, said = one.label.forces.ravel(), one.forces.ravel()
    return [float(true @ said), float(true @ true), float(true.sum()), float(said.sum()), float(true.size)]


def _through(sums: Array) -> Array:
    return _ratio(sums[:, 0], sums[:, 1])


def _line(sums: Array) -> Array:
    xy, xx, x, y, n = sums.T
    return _ratio(n * xy - x * y, n * xx - x * x)


def _change(sums: Array) -> Array:
    found: Array = np.sqrt(_ratio(sums[:, 1], sums[:, 2])) - np.sqrt(_ratio(sums[:, 0], sums[:, 2]))
    return found


def _ratio(above: Array, below: Array) -> Array:
    found: Array = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    return found


def _interval(value: float, drawn: Array) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def indices_in_halves(total: int, seed: int) -> tuple[Ints, Ints]:
    """Split the indices below `total` by chance into two halves, each in increasing order; the second has the odd one more."""
    order = np.random.default_rng(seed).permutation(total)
    return np.sort(order[: total // 2]), np.sort(order[total // 2 :])
