"""Errors, slopes and coverage against what they are by construction."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tumbaga.online import accuracy
from tumbaga.online.accuracy import Judged
from tumbaga.online.records import Array, Frame, Label


def frames(rng: np.random.Generator, many: int, slope: float = 1.0, noise: float = 0.0, stds: float | None = None) -> list[Judged]:
    """Frames of waters and copper whose predicted forces are the slope times the label's, and noise."""
    made = []
    for k in range(many):
        numbers = np.array([8, 1, 1] * (1 + k % 3) + [29] * (k % 2))
        labels = rng.standard_normal((len(numbers), 3))
        said: Array = slope * labels + noise * rng.standard_normal(labels.shape)
        frame = Frame(numbers, 3.0 * rng.standard_normal(labels.shape))
        width = None if stds is None else np.full(labels.shape, stds)
        made.append(Judged(frame, Label(float(rng.standard_normal()), labels, "test", 0.0), float(rng.standard_normal()), said, width))
    return made


def test_force_errors_are_of_components(rng: np.random.Generator) -> None:
    """RMSE and MAE run over x, y, z of all atoms; elements and sizes part them without loss."""
    judged = frames(rng, 12, noise=0.2)
    errors = np.concatenate([(one.forces - one.label.forces).ravel() for one in judged])

    found = accuracy.force_error(judged)
    assert found.rmse == pytest.approx(math.sqrt((errors**2).mean()))
    assert found.mae == pytest.approx(np.abs(errors).mean())
    parts = accuracy.by_element(judged)
    assert list(parts) == [1, 8, 29]
    assert sum(part.atoms for part in parts.values()) == found.atoms
    assert sum(part.rmse**2 * part.atoms for part in parts.values()) == pytest.approx(found.rmse**2 * found.atoms)
    bins = [part for _, _, part in accuracy.by_magnitude(judged) if part.atoms]
    assert sum(part.atoms for part in bins) == found.atoms
    assert sum(part.mae * part.atoms for part in bins) == pytest.approx(found.mae * found.atoms)


def test_a_bin_without_atoms_has_no_error(rng: np.random.Generator) -> None:
    """Where no force is of that size the error is not a number, and no warning is given."""
    (*_, (low, high, error)) = accuracy.by_magnitude(frames(rng, 3), (0.0, 100.0, 200.0))

    assert (low, high, error.atoms) == (100.0, 200.0, 0)
    assert math.isnan(error.rmse)


def test_offsets_find_the_zero_of_each_element(rng: np.random.Generator) -> None:
    """Labels that differ by -2e3, -13 and -4e4 eV an atom have no error left; the raw error has all of it."""
    zeros = {8: -2.0e3, 1: -13.0, 29: -4.0e4}
    judged = [
        replace(one, label=replace(one.label, energy=one.energy + sum(zeros[int(z)] for z in one.frame.numbers))) for one in frames(rng, 12)
    ]

    added = accuracy.offsets(judged)
    assert added.rank == 2  # water has as many H for each O, so only H2O is known
    assert 2 * added.energies[0] + added.energies[1] == pytest.approx(zeros[8] + 2 * zeros[1])
    assert added.energies[2] == pytest.approx(zeros[29])
    assert accuracy.energy_error(judged, added).rmse < 1e-8
    assert accuracy.energy_error(judged).rmse > 1000


def test_offsets_make_no_energy_error_larger(rng: np.random.Generator) -> None:
    """The least squares are those of the error that is reported, so that offsets can only lower it."""
    for seed in range(5):
        judged = frames(np.random.default_rng(seed), 7)

        assert accuracy.energy_error(judged, accuracy.offsets(judged)).rmse <= accuracy.energy_error(judged).rmse


def test_a_known_slope_is_found(rng: np.random.Generator) -> None:
    """0.8 without noise is found exactly, with an interval of no width; with an offset the line finds slope and intercept."""
    found = accuracy.slope(frames(rng, 20, slope=0.8))

    for interval in (found.origin, found.line):
        assert [interval.value, interval.low, interval.high] == pytest.approx([0.8] * 3)
    shifted = [replace(one, forces=one.forces + 0.3) for one in frames(rng, 20, slope=0.8)]
    assert accuracy.slope(shifted).line.value == pytest.approx(0.8)
    assert accuracy.slope(shifted).intercept == pytest.approx(0.3)
    assert accuracy.slope(shifted).origin.value != pytest.approx(0.8, abs=1e-4)


def test_the_interval_covers_the_truth_as_promised() -> None:
    """Of 100 data sets whose slope is 0.8 with noise, 95 % have it in their interval: 88 at least (three standard errors)."""
    within = 0
    for seed in range(100):
        origin = accuracy.slope(frames(np.random.default_rng(seed), 40, slope=0.8, noise=0.5), seed, 400).origin
        within += origin.low <= 0.8 <= origin.high
    assert 88 <= within <= 100


def test_resampling_is_the_same_for_the_same_seed(rng: np.random.Generator) -> None:
    """2,000 resamples, the same for a seed; one frame alone has no interval."""
    sums = rng.standard_normal((9, 2))

    drawn = accuracy.resampled(sums, 1)
    assert drawn.shape == (2000, 2)
    np.testing.assert_array_equal(drawn, accuracy.resampled(sums, 1))
    assert not np.array_equal(drawn, accuracy.resampled(sums, 2))
    np.testing.assert_allclose(drawn.mean(axis=0), sums.sum(axis=0), atol=0.5)
    alone = accuracy.slope(frames(rng, 1, slope=0.8))
    assert alone.origin.value == pytest.approx(0.8)
    assert math.isnan(alone.origin.low)


def test_gain_is_of_the_same_frames(rng: np.random.Generator) -> None:
    """A potential that errs half as much everywhere is better without doubt, the same one is not."""
    before = frames(rng, 15, noise=0.4)
    after = [replace(one, forces=0.5 * (one.forces + one.label.forces)) for one in before]

    found = accuracy.gain(before, after)
    assert found.value == pytest.approx(-0.5 * accuracy.force_error(before).rmse)
    assert found.low < found.value < found.high < 0
    assert accuracy.gain(before, before).value == 0.0


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_coverage_of_normal_errors(rng: np.random.Generator, factor: float) -> None:
    """Errors as wide as promised are covered as promised; wider or narrower ones are told, and the factor mends them."""
    judged = frames(rng, 600, noise=0.1 * factor, stds=0.1)

    found = {one.promised: one.found for one in accuracy.coverage(judged)}
    assert accuracy.width_factor(judged) == pytest.approx(factor, rel=0.03)
    if factor == 1.0:
        assert all(abs(share - promised) < 0.015 for promised, share in found.items())
    else:
        assert (found[0.683] < 0.45) if factor > 1 else (found[0.683] > 0.9)
    mended = [replace(one, stds=np.full(one.forces.shape, 0.1 * factor)) for one in judged]
    assert abs(accuracy.coverage(mended, [0.9])[0].found - 0.9) < 0.015


def test_without_stds_nothing_is_covered_or_promised(rng: np.random.Generator) -> None:
    """Where no uncertainty is known there is no share, and no warning."""
    judged = frames(rng, 2)

    assert math.isnan(accuracy.coverage(judged, [0.5])[0].found)
    assert math.isnan(accuracy.width_factor(judged))


def test_halves_are_all_of_it() -> None:
    """The halves of a split have every index once."""
    first, second = accuracy.indices_in_halves(9, 0)

    assert sorted([*first, *second]) == list(range(9))
    assert (len(first), len(second)) == (4, 5)
