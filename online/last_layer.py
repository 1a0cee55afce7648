"""The closed-form Bayesian update of a linear readout from energy and force labels, with its trust region and its acceptance test.

Pure numpy, float64. Knows neither potentials nor stores: it is handed linear models of labelled frames and returns numbers.

The model: E = phi · (base + dw) + n_z · e_z + fixed and F = rows @ (base + dw) + fixed, Gaussian noise of the labels, Gaussian priors on
dw and on the offsets e_z. Every row is divided by its noise before it enters ("whitened"), so that the noise of all rows is `factor`,
which is 1 unless cross-validation asks for another. What the base misses by far, as where atoms are inside each other, is more than a readout
can mend: it counts less, or it would be learnt at the cost of everything else.

Source: Bishop, Pattern Recognition and Machine Learning (2006), chapter 3 (posterior, evidence); Bigi, Chong, Ceriotti, Grasselli,
arXiv 2403.02251 (last-layer posteriors of interatomic potentials); Holland & Welsch, Commun. Stat. A 6, 813 (1977) (the Cauchy weight of far
residuals). Force rows and the leave-one-label-out identity are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tumbaga.online import energies
from tumbaga.online.errors import UpdateRefusedError
from tumbaga.online.labelled import Labelled, LeftOut, force_rmse, labelled, largest_residual, mean_row_norm2
from tumbaga.online.records import Array

__all__ = [
    "Fit",
    "Labelled",
    "LeftOut",
    "Settings",
    "Verdict",
    "accept",
    "fit",
    "force_rmse",
    "labelled",
    "largest_residual",
    "left_out",
    "mean_row_norm2",
    "trust_region",
]

_REFINEMENTS = 2


@dataclass(frozen=True)
class Settings:
    """Noise, priors and limits of the update.

    The prior and the first noise factor were chosen on the labels of one run of CuAu(H2O)2, from tight binding to DFT: what the readout cannot
    express is noise too, and to trust the first labels to `sigma_force` alone fits them at the cost of all later frames.

    Attributes:
        sigma_force: label noise of a force component including what the readout cannot express, eV/Å; smaller values are overconfident.
        sigma_energy: label noise of the energy, eV per atom; inf leaves energies out.
        far: error of the base on an atom, eV/Å, whose square counts half; beyond it the more the less. inf: all count alike.
        prior_force: prior standard deviation of a force component, averaged over the rows behind `mean_h2`, eV/Å.
        prior_offset: prior standard deviation of the per-species offsets after their least-squares estimate is taken off, eV.
        noise_factors: candidates for the noise variance relative to the above; leave-one-label-out error chooses.
        first_factor: what is used before that.
        choose_from: how many labels it takes before that error chooses.
        anchor_weight: of an anchor's force row relative to a label's; enough to keep walls, and little where labels have something to say.
        trust_floor: change of force that is always allowed, eV/Å.
        trust_ratio: allowed change of force relative to the largest label residual.
        halvings: how often a step may be halved before it is refused.
        tolerance: how much worse than the serving readout a candidate may be.
    """

    sigma_force: float = 0.05
    sigma_energy: float = 0.002
    far: float = 2.0
    prior_force: float = 0.4
    prior_offset: float = 1.0
    noise_factors: tuple[float, ...] = (1.0, 5.0, 25.0, 100.0)
    first_factor: float = 25.0
    choose_from: int = 3
    anchor_weight: float = 1e-3
    trust_floor: float = 0.3
    trust_ratio: float = 1.5
    halvings: int = 2
    tolerance: float = 1.05


@dataclass(frozen=True, eq=False)
class Fit:
    """The posterior of a readout.

    Attributes:
        base: readout that the change is relative to, shape (n_columns,), eV.
        delta: posterior mean of the change, shape (n_columns,), eV.
        offsets: energy per atom of each species between label and potential, shape (n_species,), eV; empty without labels. Never served:
            reported energies keep the first version's zero, or the engine would see a step.
        precision: marginal precision of the change (offsets integrated out), shape (n_columns, n_columns), 1/eV².
        covariance: its inverse.
        prior_precision: of every weight, 1/eV².
        noise_factor: the chosen noise variance relative to the settings'.
        loo_rmse: leave-one-label-out force error, component RMSE, eV/Å; nan without labels.
        log_evidence: ln p(labels), whitened units; 0 without labels. For the record: it prefers too little noise, so it does not choose.
        n_labels: how many labels were used.
        noise: of a force component, what the readout cannot express included, eV/Å.
        left_out: for each label, what the fit to all others makes of it.
        energy_covariance: of change and offsets together, shape (n_columns + n_species, n_columns + n_species), eV²; None without labels.
    """

    base: Array
    delta: Array
    offsets: Array
    precision: Array
    covariance: Array
    prior_precision: float
    noise_factor: float
    loo_rmse: float
    log_evidence: float
    n_labels: int
    noise: float
    left_out: tuple[LeftOut, ...]
    energy_covariance: Array | None = None

    @property
    def readout(self) -> Array:
        """The updated readout, base + delta, shape (n_columns,), eV."""
        return self.base + self.delta


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate readout may serve.

    Attributes:
        accepted: yes or no.
        reason: one sentence, for the version's record.
        serving_rmse: force error of what the candidate is held against, component RMSE, eV/Å; nan if there was nothing to judge by.
        candidate_rmse: force error of the candidate, likewise.
    """

    accepted: bool
    reason: str
    serving_rmse: float
    candidate_rmse: float


def fit(
    labels: Sequence[Labelled],
    base: Array,
    settings: Settings | None = None,
    mean_h2: float | None = None,
    anchors: Array | None = None,
) -> Fit:
    """Return the posterior of the readout given labels; without labels, the prior.

    The prior on each weight is N(0, prior_force² / mean_h2), so that a typical force component has the prior standard deviation
    `prior_force`. Only the product of prior precision and noise variance matters to the mean; that product is chosen through the noise,
    which leaves the prior spread of the forces as it is. Below factor 1 the covariance keeps the noise of the settings: what the mean may
    trust, the spread should not.

    Args:
        labels: labelled frames, all in the features of `base`'s version.
        base: readout of that version, shape (n_columns,), eV.
        settings: None means the defaults.
        mean_h2: mean squared norm of a force row over the version's training data; None or 0 (unknown) takes the labels' own.
        anchors: force rows of frames on which the base is to stay as it is, shape (n_rows, n_columns), per Å: closed-form replay, for frames
            outside of what is simulated; inside it, it would undo what is learnt.

    Raises:
        UpdateRefusedError: the equations hold non-finite numbers or have no Cholesky factor, or neither labels nor mean_h2 are given.
    """
    settings = settings or Settings()
    scale = mean_h2 or mean_row_norm2([one.rows for one in labels])
    if not (math.isfinite(scale) and scale > 0):
        raise UpdateRefusedError(f"the mean squared force row is {scale}: the features do not depend on the positions")
    prior = scale / settings.prior_force**2
    if not labels:
        identity = np.eye(base.size)
        return Fit(
            base,
            np.zeros(base.size),
            np.zeros(0),
            prior * identity,
            identity / prior,
            prior,
            1.0,
            math.nan,
            0.0,
            0,
            settings.sigma_force,
            (),
        )
    # before anything else: all-electron totals are -5e4 eV and more, a prior of 1 eV around zero would fight them
    shift = energies.offsets(labels)
    equations = _Equations.of(labels, shift, prior, settings, anchors)
    factors = settings.noise_factors if len(labels) >= settings.choose_from else (settings.first_factor,)
    solutions = [equations.solve(factor) for factor in factors]
    best = min(solutions, key=lambda solution: solution.misfit)
    spread = best if best.factor >= 1.0 else equations.solve(1.0)
    n = base.size
    return Fit(
        base=base,
        delta=best.theta[:n],
        offsets=shift + best.theta[n:],
        precision=_marginal(spread.precision, n),
        covariance=spread.covariance[:n, :n],
        prior_precision=prior,
        noise_factor=best.factor,
        loo_rmse=best.loo_rmse,
        log_evidence=best.log_evidence,
        n_labels=len(labels),
        noise=settings.sigma_force * math.sqrt(best.factor),
        left_out=best.left_out,
        energy_covariance=spread.covariance,
    )


def left_out(one: Labelled, fitted: Fit) -> LeftOut:
    """Return what a fit makes of a label that it does not know; energies mean something only if it knows labels of this composition."""
    missed = one.residual(fitted.delta)
    variance = float(np.einsum("ij,ij->", one.rows @ fitted.covariance, one.rows)) / missed.size
    energy = one.energy_label - one.energy_base - float(one.phi @ fitted.delta) - float(one.composition @ fitted.offsets)
    return LeftOut(math.sqrt(float((missed**2).mean())), math.sqrt(max(variance, 0.0) + fitted.noise**2), energy)


@dataclass(frozen=True, eq=False)
class _Solution:
    factor: float
    theta: Array
    precision: Array
    covariance: Array
    left_out: tuple[LeftOut, ...]
    misfit: float  # sum of squares of the left-out forces, whitened
    loo_rmse: float
    log_evidence: float


@dataclass(frozen=True, eq=False)
class _Equations:
    """Whitened rows and targets of each label over the columns [change | offsets], and their sums."""

    blocks: tuple[Array, ...]
    targets: tuple[Array, ...]
    sigmas: tuple[Array, ...]  # of each row of forces, eV/Å
    prior: Array  # precision
    gram: Array
    moment: Array
    settings: Settings

    @classmethod
    def of(cls, labels: Sequence[Labelled], shift: Array, prior: float, settings: Settings, anchors: Array | None) -> _Equations:
        sigmas = tuple(_sigmas(one, settings) for one in labels)
        blocks, targets = zip(*(_whitened(one, shift, sigma, settings) for one, sigma in zip(labels, sigmas, strict=True)), strict=True)
        n_columns, n_species = labels[0].phi.size, labels[0].composition.size
        diagonal = np.concatenate([np.full(n_columns, prior), np.full(n_species, settings.prior_offset**-2)])
        gram = sum((block.T @ block for block in blocks), np.zeros((diagonal.size, diagonal.size)))
        moment = sum((block.T @ target for block, target in zip(blocks, targets, strict=True)), np.zeros(diagonal.size))
        before = np.diag(diagonal)
        if anchors is not None and anchors.size:
            before[:n_columns, :n_columns] += settings.anchor_weight / settings.sigma_force**2 * (anchors.T @ anchors)
        return cls(blocks, targets, sigmas, before, gram, moment, settings)

    def solve(self, factor: float) -> _Solution:
        precision: Array = self.gram / factor + self.prior
        try:
            lower = np.linalg.cholesky(precision)
        except np.linalg.LinAlgError as error:
            raise UpdateRefusedError("the equations of the update have no Cholesky factor") from error
        inverse = np.linalg.inv(lower)
        covariance = inverse.T @ inverse
        theta = covariance @ (self.moment / factor)
        # normal equations square the condition number; steps against the residual of the rows themselves win the digits back
        for _ in range(_REFINEMENTS):
            theta = theta + covariance @ self._slope(factor, theta)
        if not np.isfinite(theta).all():
            raise UpdateRefusedError("the update is not finite")
        evidence = self._log_evidence(factor, 2 * float(np.log(np.diag(lower)).sum()), theta)
        left_out, misfit = self._left_out(factor, theta, covariance)
        sizes = [sigma.size for sigma in self.sigmas]
        rmse = math.sqrt(sum(size * one.force**2 for size, one in zip(sizes, left_out, strict=True)) / sum(sizes))
        return _Solution(factor, theta, precision, covariance, left_out, misfit, rmse, evidence)

    def _slope(self, factor: float, theta: Array) -> Array:
        slope: Array = -(self.prior @ theta)
        for block, target in zip(self.blocks, self.targets, strict=True):
            slope += block.T @ (target - block @ theta) / factor
        return slope

    def _left_out(self, factor: float, theta: Array, covariance: Array) -> tuple[tuple[LeftOut, ...], float]:
        """Errors of each label had it not been used: r_(-j) = (1 - K_j)^-1 r_j with K_j = X_j C X_j^T / factor; exact. The same inverse times
        the noise is the covariance of those errors. Also the sum of squares of those of forces, whitened."""
        found, misfit, energy = [], 0.0, self.settings.sigma_energy
        for block, target, sigma in zip(self.blocks, self.targets, self.sigmas, strict=True):
            inverse = np.linalg.inv(np.eye(len(block)) - block @ covariance @ block.T / factor)
            missed = inverse @ (target - block @ theta)
            forces, variances = missed[:-1] * sigma, factor * np.diag(inverse)[:-1] * sigma**2  # the last row is the energy per atom
            misfit += float(missed[:-1] @ missed[:-1])
            off = float(missed[-1]) * energy * sigma.size / 3 if math.isfinite(energy) else math.nan
            found.append(LeftOut(math.sqrt(float((forces**2).mean())), math.sqrt(float(variances.mean())), off))
        return tuple(found), misfit

    def _log_evidence(self, factor: float, log_det: float, theta: Array) -> float:
        n_rows = sum(target.size for target in self.targets)
        squares = sum(float(target @ target) for target in self.targets)
        misfit = (squares - float(self.moment @ theta)) / factor
        volume = log_det - float(np.linalg.slogdet(self.prior)[1])
        return -0.5 * (n_rows * math.log(2 * math.pi * factor) + volume + misfit)


def _sigmas(one: Labelled, settings: Settings) -> Array:
    """Noise of each row of forces, eV/Å, shape (3 * n_atoms,)."""
    far = np.linalg.norm(one.residual(), axis=1) / settings.far
    sigmas: Array = settings.sigma_force * np.repeat(np.hypot(1.0, far), 3)
    return sigmas


def _whitened(one: Labelled, shift: Array, sigma: Array, settings: Settings) -> tuple[Array, Array]:
    n_atoms, n_columns = len(one.forces_label), one.phi.size
    block = np.zeros((3 * n_atoms + 1, n_columns + one.composition.size))
    block[:-1, :n_columns] = one.rows / sigma[:, None]
    weight = 1.0 / (n_atoms * settings.sigma_energy)
    block[-1, :n_columns], block[-1, n_columns:] = one.phi * weight, one.composition * weight
    energy = (one.energy_label - one.energy_base) - float(one.composition @ shift)
    return block, np.append(one.residual().ravel() / sigma, energy * weight)


def _marginal(precision: Array, n_columns: int) -> Array:
    """Precision of the first n_columns with the rest integrated out (Schur complement)."""
    kept, mixed, rest = precision[:n_columns, :n_columns], precision[:n_columns, n_columns:], precision[n_columns:, n_columns:]
    marginal: Array = kept - mixed @ np.linalg.solve(rest, mixed.T)
    return marginal


def trust_region(
    candidate: Array, serving: Array, buffered: Sequence[Array], largest_label_residual: float, settings: Settings | None = None
) -> float:
    """Return by how much the step from the serving to the candidate readout must be shortened: 1, 1/2, 1/4 …

    A step may change forces on recent frames by `trust_floor`, or by `trust_ratio` times what the labels themselves asked for.

    Args:
        candidate: proposed readout, shape (n_columns,), eV.
        serving: readout that serves now, in the same features.
        buffered: force rows of recent frames, each of shape (3 * n_atoms, n_columns).
        largest_label_residual: see `largest_residual`, eV/Å.
        settings: None means the defaults.

    Raises:
        UpdateRefusedError: even the shortest step is too long, or the step is not finite.
    """
    settings = settings or Settings()
    change = candidate - serving
    if not np.isfinite(change).all():
        raise UpdateRefusedError("the update is not finite")
    moved = max((float(np.linalg.norm((rows @ change).reshape(-1, 3), axis=1).max()) for rows in buffered), default=0.0)
    limit = max(settings.trust_floor, settings.trust_ratio * largest_label_residual)
    for halving in range(settings.halvings + 1):
        if moved * 0.5**halving <= limit:
            return float(0.5**halving)
    raise UpdateRefusedError(f"the update would change a force on a recent frame by {moved:.2f} eV/Å; {limit:.2f} is allowed")


def accept(
    fitted: Fit,
    labels: Sequence[Labelled],
    holdout: Sequence[Labelled],
    serving: Array,
    candidate: Array | None = None,
    settings: Settings | None = None,
) -> Verdict:
    """Judge a candidate readout by held-out labels; without any, by its leave-one-label-out error.

    The latter is compared with the *base* readout on the same labels: the serving one was fitted to most of them, so its error there says
    little, while neither the base nor a left-one-out fit has seen the label it is tried on.

    Args:
        fitted: the fit behind the candidate.
        labels: the labels it used.
        holdout: labels it did not use, joined with the same base.
        serving: readout that serves now.
        candidate: readout to judge; None means the fit's own (pass the shortened one after a trust region).
        settings: None means the defaults.
    """
    settings = settings or Settings()
    candidate = fitted.readout if candidate is None else candidate
    if not np.isfinite(candidate).all():
        return Verdict(False, "the candidate readout is not finite", math.nan, math.nan)
    if holdout:
        before, after = force_rmse(holdout, serving, fitted.base), force_rmse(holdout, candidate, fitted.base)
        what = f"{len(holdout)} held-out labels"
    elif labels:
        before, after = force_rmse(labels, fitted.base, fitted.base), fitted.loo_rmse
        what = f"{len(labels)} labels, each left out in turn"
    else:
        return Verdict(False, "there is no label to judge by", math.nan, math.nan)
    accepted = after <= settings.tolerance * before
    change = "accepted" if accepted else f"refused, more than {settings.tolerance:g} times"
    return Verdict(accepted, f"{change}: force RMSE {after:.4f} against {before:.4f} eV/Å on {what}", before, after)
