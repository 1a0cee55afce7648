"""The closed-form update against brute force, explicit refits and its own limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tumbaga.online.errors import BadFrameError, UpdateRefusedError
from tumbaga.online.last_layer import (
    Labelled,
    Settings,
    accept,
    fit,
    force_rmse,
    labelled,
    largest_residual,
    mean_row_norm2,
    trust_region,
)
from tumbaga.online.records import Array, Frame, Label
from tumbaga.online.testing import ToyTrainable
from tumbaga.online.uncertainty import force_std

MakeLabels = Callable[..., list[Labelled]]
NO_RIDGE = Settings(prior_force=1e4, sigma_force=1e-2, sigma_energy=1e-3, prior_offset=1e4, noise_factors=(1.0,), first_factor=1.0)


def test_enough_exact_labels_give_the_true_weights(toy: ToyTrainable, truth: ToyTrainable, make_labels: MakeLabels) -> None:
    """Where labels follow the same features, a vanishing ridge finds the weights behind them."""
    fitted = fit(make_labels(12), toy.readout(), NO_RIDGE)

    np.testing.assert_allclose(fitted.readout, truth.readout(), atol=1e-6)


def test_offsets_of_1e5_electronvolts_cost_no_accuracy(toy: ToyTrainable, truth: ToyTrainable, make_labels: MakeLabels) -> None:
    """All-electron totals change nothing but the offsets, which come out to a micro-electronvolt, with several compositions too."""
    fitted = fit(make_labels(12, offsets={1: -1.2e4, 8: -1e5}, waters=(1, 2, 3)), toy.readout(), NO_RIDGE)

    np.testing.assert_allclose(fitted.readout, truth.readout(), atol=1e-6)
    waters = np.array([2.0, 1.0])  # water is the only composition, so only the sum over one water is determined
    assert waters @ fitted.offsets == pytest.approx(-1.24e5, abs=1e-6)


def test_the_covariance_is_the_brute_force_posterior(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """Marginal covariance of the weights = block of the inverse of the full, plainly assembled precision."""
    labels, settings = make_labels(2), Settings(first_factor=1.0)
    fitted = fit(labels, toy.readout(), settings, mean_h2=2.0)

    full = np.diag([2.0 / Settings().prior_force ** 2] * 8 + [1.0, 1.0])
    for one in labels:
        far = np.repeat((one.residual() ** 2).sum(axis=1), 3) / 2.0**2  # what the base misses by 2 eV/Å counts half
        for row, more in zip(one.rows, far, strict=True):
            x = np.append(row, [0, 0])
            full += np.outer(x, x) / (0.05**2 * (1.0 + more))
        x = np.append(one.phi, one.composition) / len(one.forces_label)
        full += np.outer(x, x) / 0.002**2
    expected = np.linalg.inv(full)[:8, :8]
    np.testing.assert_allclose(fitted.covariance, expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(fitted.precision @ fitted.covariance, np.eye(8), atol=1e-6)
    direct = np.sqrt(np.einsum("ij,jk,ik->i", labels[0].rows, expected, labels[0].rows).reshape(-1, 3).sum(axis=1))
    np.testing.assert_allclose(force_std(labels[0].rows, fitted.covariance), direct, rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_leave_one_out_is_what_refits_give(toy: ToyTrainable, make_labels: MakeLabels, factor: float) -> None:
    """The identity r_(-j) = (1 - K_j)^-1 r_j equals the error of refits without label j, energies included."""
    labels = make_labels(5, noise=0.05)
    # each refit estimates the offsets anew before it applies their prior, so the prior must not matter
    settings = Settings(noise_factors=(factor,), choose_from=1, prior_offset=1e3)
    fitted = fit(labels, toy.readout(), settings, mean_h2=2.0)

    squares = []
    for left_out in labels:
        rest = [one for one in labels if one is not left_out]
        without = fit(rest, toy.readout(), settings, mean_h2=2.0)
        squares.append((left_out.residual(without.delta) ** 2).mean())
    assert fitted.loo_rmse == pytest.approx(math.sqrt(float(np.mean(squares))), rel=1e-5)


def test_with_one_label_leaving_it_out_is_the_base_error(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """Without its only label the fit is the prior, whose error is that of the base readout."""
    labels = make_labels(1)

    assert fit(labels, toy.readout()).loo_rmse == pytest.approx(force_rmse(labels, toy.readout(), toy.readout()), rel=1e-6)


def test_what_is_far_off_does_not_spoil_the_rest(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """A label with forces that no readout can express costs other frames little."""
    labels, others = make_labels(6), make_labels(6)
    wild = replace(labels[0], forces_label=labels[0].forces_label + 40.0 * np.sign(labels[0].forces_label))
    wanted, robust, plain = (
        fit([first, *labels[1:]], toy.readout(), Settings(far=far, sigma_energy=math.inf))
        for first, far in ((labels[0], 2.0), (wild, 2.0), (wild, math.inf))
    )
    exact, robust_error, plain_error = (force_rmse(others, fitted.readout, fitted.base) for fitted in (wanted, robust, plain))

    assert robust_error < exact + 0.1 * plain_error
    assert plain_error > 10 * exact


def test_errors_of_a_usual_size_count_alike(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """Far below 2 eV/Å the weight makes no difference."""
    labels = [replace(one, forces_label=one.forces_base + 0.02 * one.residual()) for one in make_labels(5)]

    np.testing.assert_allclose(
        fit(labels, toy.readout(), mean_h2=2.0).delta,
        fit(labels, toy.readout(), Settings(far=math.inf), mean_h2=2.0).delta,
        rtol=0.05,
        atol=1e-4,
    )


def test_no_label_gives_the_prior(toy: ToyTrainable) -> None:
    """Zero labels: no change, and the prior covariance."""
    fitted = fit([], toy.readout(), mean_h2=4.0)

    assert not fitted.delta.any()
    np.testing.assert_allclose(fitted.covariance, np.eye(8) * Settings().prior_force ** 2 / 4.0)
    with pytest.raises(UpdateRefusedError):
        fit([], toy.readout())


def test_prior_force_spread_is_as_stated_on_average(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """Root mean square of the prior std of force components is `prior_force` over the rows that set the scale."""
    rows = [one.rows for one in make_labels(6)]
    fitted = fit([], toy.readout(), mean_h2=mean_row_norm2(rows))

    variances = np.concatenate([force_std(block, fitted.covariance) ** 2 for block in rows]) / 3
    assert math.sqrt(variances.mean()) == pytest.approx(Settings().prior_force)


@pytest.mark.parametrize(("prior", "moved"), [(1e-6, 0.0), (1e6, 1.0)])
def test_limits_of_the_ridge(toy: ToyTrainable, truth: ToyTrainable, make_labels: MakeLabels, prior: float, moved: float) -> None:
    """An infinitely stiff prior moves nothing; an infinitely soft one goes all the way."""
    settings = Settings(prior_force=prior, noise_factors=(1.0,), first_factor=1.0, sigma_energy=math.inf)
    fitted = fit(make_labels(12), toy.readout(), settings)

    np.testing.assert_allclose(fitted.delta, moved * (truth.readout() - toy.readout()), atol=1e-5)


def test_noise_is_chosen_by_the_left_out_error(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """From three labels on the factor with the least left-out error is taken, and noisy labels ask for more than exact ones."""
    alike = Settings(far=math.inf)
    exact, noisy = fit(make_labels(6), toy.readout(), alike), fit(make_labels(6, noise=1.0), toy.readout(), alike)

    assert exact.noise_factor < noisy.noise_factor
    for factor in Settings().noise_factors:
        labels = make_labels(4, noise=0.2)
        one = fit(labels, toy.readout(), Settings(far=math.inf, noise_factors=(factor,)))
        assert fit(labels, toy.readout(), alike).loo_rmse <= one.loo_rmse + 1e-12
    assert fit(make_labels(2), toy.readout()).noise_factor == Settings().first_factor


def test_the_spread_keeps_the_floor_of_the_noise(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """A factor below 1 sharpens the mean, never the uncertainty."""
    labels = make_labels(4)
    sharp, plain = (fit(labels, toy.readout(), Settings(noise_factors=(f,))) for f in (0.01, 1.0))

    np.testing.assert_allclose(sharp.covariance, plain.covariance)
    assert sharp.noise_factor == 0.01


def test_labels_shrink_the_uncertainty(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """More labels never raise the predicted force spread of a new frame (at fixed noise and prior)."""
    labels, new = make_labels(4), make_labels(1)[0]
    settings = Settings(noise_factors=(1.0,), first_factor=1.0)
    spreads = [force_std(new.rows, fit(labels[:n], toy.readout(), settings, mean_h2=2.0).covariance).max() for n in range(5)]

    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.5 * spreads[0]


def test_evidence_is_the_density_of_the_labels(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """ln p from determinants equals the plain Gaussian density of the whitened targets under prior plus noise."""
    label = make_labels(1)[0]
    settings = Settings(sigma_energy=math.inf, first_factor=1.0, far=math.inf)
    fitted = fit([label], toy.readout(), settings, mean_h2=2.0)

    x, y = label.rows / 0.05, label.residual().ravel() / 0.05
    spread = np.eye(len(y)) + x @ x.T * Settings().prior_force ** 2 / 2.0
    expected = -0.5 * (y @ np.linalg.solve(spread, y) + np.linalg.slogdet(spread)[1] + (len(y) + 1) * math.log(2 * math.pi))
    assert fitted.log_evidence == pytest.approx(expected, rel=1e-8)


def test_trust_region_halves_then_refuses(toy: ToyTrainable) -> None:
    """A step passes whole below the limit, is halved at most twice, and is refused beyond."""
    rows: list[Array] = [np.eye(3, 8)]

    def step(length: float, residual: float = 0.0) -> float:
        return trust_region(toy.readout() + length * np.eye(8)[0], toy.readout(), rows, residual)

    assert [step(0.29), step(0.59), step(1.19)] == [1.0, 0.5, 0.25]
    assert step(1.19, residual=0.8) == 1.0  # labels that far off ask for such a step
    assert trust_region(toy.readout() + 100.0, toy.readout(), [], 0.0) == 1.0  # nothing buffered, nothing to compare with
    with pytest.raises(UpdateRefusedError, match=r"1\.21 eV/Å"):
        step(1.21)
    with pytest.raises(UpdateRefusedError, match="not finite"):
        step(math.nan)


def test_candidate_worse_on_the_held_out_labels_is_refused(toy: ToyTrainable, truth: ToyTrainable, make_labels: MakeLabels) -> None:
    """Held-out labels decide where there are any, whatever the training labels say; 5 % worse is allowed."""
    train, holdout = make_labels(6), make_labels(2)
    fitted = fit(train, toy.readout())

    good = accept(fitted, train, holdout, toy.readout())
    assert good.accepted
    assert good.candidate_rmse < 0.2 * good.serving_rmse
    bad = accept(fitted, train, holdout, serving=truth.readout())
    assert not bad.accepted
    assert "2 held-out labels" in bad.reason
    away = toy.readout() - truth.readout()
    for much, accepted in ((1.04, True), (1.06, False)):
        assert accept(fitted, train, holdout, toy.readout(), candidate=truth.readout() + much * away).accepted is accepted


def test_without_held_out_labels_each_label_is_left_out(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """A fit that predicts its own labels no better than the base is refused; one that does is not."""
    good = make_labels(4)
    # labels that contradict each other: the same frame with the residual up and down
    scrambled = [replace(good[0], forces_label=good[0].forces_base + sign * good[0].residual()) for sign in (1, -1, 1, -1)]

    assert accept(fit(good, toy.readout()), good, [], toy.readout()).accepted
    eager = fit(scrambled, toy.readout(), Settings(prior_force=10.0, sigma_energy=math.inf, noise_factors=(1.0,), first_factor=1.0))
    verdict = accept(eager, scrambled, [], toy.readout())
    assert not verdict.accepted
    assert verdict.candidate_rmse == eager.loo_rmse
    assert not accept(fit([], toy.readout(), mean_h2=1.0), [], [], toy.readout()).accepted


def test_nothing_that_is_not_finite_is_accepted(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """Non-finite labels raise, a non-finite candidate is refused with a sentence."""
    labels = make_labels(2)

    with pytest.raises(UpdateRefusedError):
        fit([replace(labels[0], forces_label=np.full_like(labels[0].forces_label, np.nan))], toy.readout())
    verdict = accept(fit(labels, toy.readout()), labels, labels, toy.readout(), candidate=np.full(8, np.inf))
    assert not verdict.accepted


def test_what_does_not_fit_together_is_refused(toy: ToyTrainable, cluster: Callable[..., Frame]) -> None:
    """Rows of another frame, labels of another length and unknown elements are errors of shape, not silent broadcasts."""
    frame, other = cluster(2), cluster(1)
    label = Label(0.0, np.zeros((6, 3)), "m", 0.0)

    with pytest.raises(BadFrameError, match="force rows"):
        labelled(toy.force_rows(other), frame, label, toy.readout(), toy.elements)
    with pytest.raises(BadFrameError, match="label forces"):
        labelled(toy.force_rows(other), other, label, toy.readout(), toy.elements)
    with pytest.raises(BadFrameError, match="element"):
        labelled(toy.force_rows(frame), frame, label, toy.readout(), (8,))


def test_residual_helpers(toy: ToyTrainable, make_labels: MakeLabels) -> None:
    """RMSE counts components, the largest residual counts atoms; without labels there is none."""
    label = make_labels(1)[0]
    shifted = replace(label, forces_label=label.forces_base + np.array([0.3, 0.0, 0.4]))

    assert force_rmse([shifted], toy.readout(), toy.readout()) == pytest.approx(math.sqrt(0.25 / 3))
    assert largest_residual([shifted]) == pytest.approx(0.5)
    assert math.isnan(force_rmse([], toy.readout(), toy.readout()))
    assert largest_residual([]) == 0.0
