"""Checks of the gate against labels, real ones and those of the original potential. Knows no dynamics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tumbaga.online.accuracy import Judged, force_error, gain
from tumbaga.online.gate_asking import Answer, Answers, Case
from tumbaga.online.gate_records import Check, Limits, Number
from tumbaga.online.records import Frame, Label, LabelledFrame, Prediction, Role


class _Compared:
    """Force errors of both versions on the same labels, eV/Å."""

    def __init__(self, case: Case, answers: Sequence[Answer]) -> None:
        known = case.evidence.labels
        sound = [one for one in answers if one.serving.finite]  # where the serving version has no answer, nothing can be worse
        self.before = [_judged(known[one.place].frame, known[one.place].label, one.serving) for one in sound]
        self.after = [_judged(known[one.place].frame, known[one.place].label, one.candidate) for one in sound]
        self.count = len(sound)
        self.serving, self.candidate = force_error(self.before).rmse, force_error(self.after).rmse

    def clearly_worse(self, limits: Limits) -> str:
        """In words if it is, whatever chance there is in it; else empty."""
        if not self.count or self.candidate <= self.serving + limits.negligible:
            return ""
        most = max(limits.clear_ratio, math.exp(2.0 * limits.scatter / math.sqrt(self.count)))
        return f"more than {most:.2f} times the serving version's" if self.candidate > most * self.serving else ""


def audits(case: Case, answers: Answers) -> Check:
    """Judge the force error on held-out labels, all and by class, against the serving version's.

    Worse is what is clearly so, or significantly: of few labels only the former can be seen, and of none nothing; then the candidate must
    at least have learnt something, that is, be no worse on the learnt labels than the original potential.
    """
    roles = [case.evidence.labels[one.place].role for one in answers.labels]
    held = [one for one, role in zip(answers.labels, roles, strict=True) if role is Role.HOLDOUT]
    learnt = [one for one, role in zip(answers.labels, roles, strict=True) if role is not Role.HOLDOUT]
    found = _Compared(case, held)
    numbers: dict[str, Number] = {"held_out": found.count, "rmse": found.candidate, "rmse_serving": found.serving}
    after_learnt = _Compared(case, learnt)
    numbers |= {"learnt": after_learnt.count, "rmse_learnt": after_learnt.candidate, "rmse_learnt_serving": after_learnt.serving}
    if not found.count:
        return _without(case, after_learnt, numbers)
    problems, told = [found.clearly_worse(case.limits)], ""
    if found.count >= case.limits.resampled_from:
        value, low, high = _change(found, case.limits.seed)
        numbers |= {"change": value, "change_low": low, "change_high": high}
        told = f", changed by {value:+.4f} ({low:+.4f} to {high:+.4f} with 95 % confidence)"
        if low > max((case.limits.audit_ratio - 1.0) * found.serving, 0.0) and value > case.limits.negligible:
            problems.append("significantly more than the serving version's")
    for kind in sorted({kind for one in held for kind in case.evidence.labels[one.place].kinds}):
        of_kind = _Compared(case, [one for one in held if kind in case.evidence.labels[one.place].kinds])
        if case.limits.class_least <= of_kind.count < found.count and (worse := of_kind.clearly_worse(case.limits)):
            problems.append(f"on the {of_kind.count} of class {kind} {of_kind.candidate:.3f}, {worse}")
    what = f"force error {found.candidate:.4f} eV/Å on {found.count} held-out labels, {found.serving:.4f} by the serving version{told}"
    problems = [one for one in problems if one]
    return Check("audits", not problems, numbers, "; ".join([what, *problems]))


def _change(found: _Compared, seed: int) -> tuple[float, float, float]:
    """The change of the force RMSE and its 95 % interval, eV/Å.

    Percentiles of resamples are too narrow for a few frames, since resamples scatter as if the mean were known and the distribution were
    normal: widened by sqrt(n / (n - 1)) and by Student's over the normal quantile (Cornish-Fisher: 1 + 1.21/m + 1.44/m², m = n - 1).
    """
    change, m = gain(found.before, found.after, seed=seed), found.count - 1
    wider = math.sqrt((m + 1) / m) * (1.0 + 1.21 / m + 1.44 / m**2)
    return change.value, change.value - wider * (change.value - change.low), change.value + wider * (change.high - change.value)


def _without(case: Case, learnt: _Compared, numbers: dict[str, Number]) -> Check:
    """The check where no label was held out."""
    told = "no label was held out, so whether it is better than the serving version could not be judged"
    if not learnt.count:
        return Check("audits", True, numbers, told)
    said = case.original.all_of([one.frame for one in learnt.after])
    before = force_error([_judged(one.frame, one.label, by) for one, by in zip(learnt.after, said, strict=True)]).rmse
    worse = learnt.candidate > before + case.limits.negligible
    what = f"force error {learnt.candidate:.4f} eV/Å on {learnt.count} learnt labels, {before:.4f} by the original potential"
    return Check("audits", not worse, {**numbers, "rmse_learnt_original": before}, f"{told}; {what}")


def replay(case: Case, answers: Answers) -> Check:
    """Judge how far forces have gone from those of the original potential on frames that are to be remembered."""
    sound = [one for one in answers.replay if one.serving.finite]
    if not sound:
        return Check("replay", True, {"frames": 0}, "there are no replay frames, so what has been forgotten could not be judged")
    held = [case.evidence.replay[one.place] for one in sound]
    candidate = _drift(held, [one.candidate for one in sound], case.limits.drift_frames)
    serving = _drift(held, [one.serving for one in sound], case.limits.drift_frames)
    learnt = _to_learn(case)
    allowed = [case.limits.drift_ratio * serving, serving + case.limits.drift_extra, case.limits.drift_share * learnt]
    limit = max(one for one in allowed if math.isfinite(one))
    told = f"{candidate:.3f} eV/Å from the original potential on {len(sound)} replay frames, {limit:.3f} is borne"
    numbers = {"frames": len(sound), "given": len(case.evidence.replay), "rmse": candidate, "rmse_serving": serving, "to_learn": learnt}
    return Check("replay", candidate <= limit, {**numbers, "limit": limit}, told)


def calibration(case: Case) -> Check:
    """Judge how many predicted standard deviations cover the errors of most labels: too many mean that the uncertainty says nothing."""
    ratios = sorted(float(one) for one in case.evidence.ratios)
    if not ratios:
        return Check("calibration", True, {"labels": 0}, "no label has a predicted uncertainty, so that could not be judged")
    # the rank of conformal prediction: of n + 1 errors, of which one is yet to come, so many are covered
    rank = min(math.ceil(case.limits.covered * (len(ratios) + 1)), len(ratios))
    multiplier = ratios[rank - 1] if all(math.isfinite(one) for one in ratios) else math.inf
    numbers = {"labels": len(ratios), "multiplier": multiplier, "limit": case.limits.multiplier}
    told = f"{multiplier:.2f} standard deviations cover the errors of {rank} of {len(ratios)} labels, at most {case.limits.multiplier:g} are borne"
    return Check("calibration", multiplier <= case.limits.multiplier, numbers, told)


def _judged(frame: Frame, label: Label, said: Prediction) -> Judged:
    return Judged(frame, label, said.energy, said.forces)


def _drift(held: Sequence[LabelledFrame], said: Sequence[Prediction], share: float = 1.0) -> float:
    """RMSE of force components, eV/Å, relative to the frame's rms force where that is above 1 eV/Å; over a share of the frames, the best."""
    scales = [max(1.0, math.sqrt(float((one.label.forces**2).mean()))) for one in held]
    squares = [((by.forces - one.label.forces) / scale) ** 2 for one, by, scale in zip(held, said, scales, strict=True)]
    kept = sorted(squares, key=lambda each: float(each.mean()))[: math.ceil(share * len(squares))]
    return math.sqrt(float(np.concatenate(kept).mean()))


def _to_learn(case: Case) -> float:
    """Drift of the labels from the original potential, eV/Å; nan without labels.

    The upper quartile over labels: the original may have been trained on some of them, which say nothing of how wrong it is elsewhere.
    """
    labels = [LabelledFrame(one.frame, one.label) for one in case.evidence.labels]
    said = case.original.all_of([one.frame for one in labels], case.until(0.1))
    errors = [_drift([one], [by]) for one, by in zip(labels, said, strict=False) if by.finite]
    return float(np.quantile(errors, 0.75)) if errors else math.nan
