"""How sure energies are: against the posterior by brute force, against errors, and up to a constant for each element."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tumbaga.online.energies import energy_factor, energy_std, offsets
from tumbaga.online.labelled import Labelled
from tumbaga.online.last_layer import Settings, fit
from tumbaga.online.testing import ToyTrainable

MakeLabels = Callable[..., list[Labelled]]
SETTINGS = Settings(sigma_energy=0.005, far=math.inf, noise_factors=(1.0,), first_factor=1.0)


def test_it_is_the_posterior_of_readout_and_offsets_together(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """The variance is that of phi · change + composition · offsets under the inverse of the plainly assembled precision."""
    labels = make_labels(3, waters=(1, 2, 3))
    fitted = fit(labels, toy.readout(), SETTINGS, mean_h2=2.0)
    precision = np.diag([2.0 / SETTINGS.prior_force**2] * 8 + [1.0, 1.0])
    for one in labels:
        rows = np.hstack([one.rows, np.zeros((len(one.rows), 2))]) / SETTINGS.sigma_force
        total = np.append(one.phi, one.composition) / len(one.forces_label) / SETTINGS.sigma_energy
        precision += rows.T @ rows + np.outer(total, total)

    (new,) = make_labels(4, waters=(2,))[3:]
    inputs = np.append(new.phi, new.composition)
    found = energy_std(new.phi, new.composition, fitted.energy_covariance)
    assert found == pytest.approx(math.sqrt(inputs @ np.linalg.solve(precision, inputs)), rel=1e-5)
    # labels of the same composition fix the zero: what is left is far below that of the offsets alone
    assert found < 0.1 * math.sqrt(new.composition @ new.composition)


def test_without_labels_nothing_is_known(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """The prior has no zero to count energies from."""
    prior = fit([], toy.readout(), mean_h2=2.0)
    (one,) = make_labels(1)

    assert prior.energy_covariance is None
    assert math.isnan(energy_std(one.phi, one.composition, None))
    assert energy_factor([one], [one], np.zeros(8), None) == 1.0


def test_another_zero_changes_nothing(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """Labels whose energies count from elsewhere, differently for each element, give the same factor, and offsets that say where."""
    labels = make_labels(12, noise=0.02, waters=(1, 2))
    moved = [replace(one, energy_label=one.energy_label + float(one.composition @ [-13.6, -2041.0])) for one in labels]
    change = fit(labels[:8], toy.readout(), SETTINGS, mean_h2=2.0).delta
    covariance = fit(labels[:8], toy.readout(), SETTINGS, mean_h2=2.0).energy_covariance

    assert energy_factor(moved[:8], moved[8:], change, covariance) == pytest.approx(
        energy_factor(labels[:8], labels[8:], change, covariance)
    )
    water = np.array([2.0, 1.0])
    apart = water @ (offsets(moved[:8], change) - offsets(labels[:8], change))
    assert apart == pytest.approx(water @ [-13.6, -2041.0], abs=1e-6)


@pytest.mark.parametrize("wrong", [0.2, 1.0, 5.0])
def test_the_factor_is_the_ratio_of_errors_to_what_was_predicted(toy: ToyTrainable, make_labels: MakeLabels, wrong: float) -> None:
    """Held-out energies drawn from the posterior itself, times a number: its square comes back, beside four labels' worth of belief in what
    was predicted, and forces have no part in it.
    """
    train, many = make_labels(6, noise=0.02), make_labels(206, noise=0.02)[6:]
    fitted = fit(train, toy.readout(), SETTINGS, mean_h2=2.0)
    zero, rng = offsets(train, fitted.delta), np.random.default_rng(0)
    held_out = []
    for one in many:
        said = one.energy_base + float(one.phi @ fitted.delta) + float(one.composition @ zero)
        error = wrong * energy_std(one.phi, one.composition, fitted.energy_covariance) * rng.standard_normal()
        held_out.append(replace(one, energy_label=said + error, forces_label=one.forces_label + 9.0))

    assert energy_factor(train, held_out, fitted.delta, fitted.energy_covariance) == pytest.approx((4 + 200 * wrong**2) / 204, rel=0.2)
    assert energy_factor(train, held_out[:1], fitted.delta, fitted.energy_covariance) >= 0.8
