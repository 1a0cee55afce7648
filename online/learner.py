"""The learner: takes flagged frames and labels, keeps the store, and proposes new versions. No sockets, no processes, no back end of its own.

Everything that counts is in the store before anything is done with it, so a learner that dies starts again from there and knows as much.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tumbaga.online import energies, last_layer, quality, selection
from tumbaga.online.anchors import pair_rows
from tumbaga.online.calibration import TrackedQuantile, error_ratio, variance_factor
from tumbaga.online.errors import UpdateRefusedError
from tumbaga.online.gain import Costs, Gains
from tumbaga.online.last_layer import Labelled
from tumbaga.online.ports import ForceRows, Trainable
from tumbaga.online.records import Array, Frame, Ints, Label, Reason, Role
from tumbaga.online.store import Quarantined, Queued, Store, StoredLabel
from tumbaga.online.uncertainty import AtomScore, ScoreScale, force_std, species_index

_SCALED = 8  # frames from which a new version's scale of scores is taken
_RECENT = 50  # frames whose forces an update may not change too much


@dataclass(frozen=True, eq=False)
class _Seen:
    """A frame of the run: its force rows, the features of its atoms and their species."""

    rows: Array
    features: Array
    species: Ints

    def score(self, score: AtomScore) -> float:
        """The largest score of an atom."""
        return float(score(self.features, self.species).max())


@dataclass(frozen=True, eq=False)
class Proposal:
    """An update that passed its checks and wants to serve.

    Attributes:
        readout: new weights, shape (n_columns,), eV.
        covariance: their posterior covariance, shape (n_columns, n_columns), eV^2.
        metrics: JSON-compatible numbers for the record: labels used, errors before and after, what the checks said.
        ratios: largest error over its std of each held-out label (see `calibration.error_ratio`).
        energy_covariance: of readout and offsets, shape (n_columns + n_species, n_columns + n_species), eV²; None where
            no label has said anything of energies.
    """

    readout: Array
    covariance: Array
    metrics: dict[str, object]
    ratios: tuple[float, ...] = ()
    energy_covariance: Array | None = None


@dataclass(frozen=True)
class Refusal:
    """An update that must not serve, with the reason and what was measured."""

    reason: str
    metrics: dict[str, object]


class Learner:
    """One run's learning.

    Args:
        potential: the base potential; its readout is what all changes are relative to.
        store: the run's store.
        limits: threshold, budget and queue.
        method: the labels' method; labels of other methods in the store are not used.
        settings: of the last-layer update.
        bounds: what every label must keep.
        tell: called with what a person should know of: an event and its JSON-compatible details.
    """

    def __init__(
        self,
        potential: Trainable,
        store: Store,
        limits: selection.Limits,
        method: str,
        settings: last_layer.Settings | None = None,
        bounds: quality.Bounds | None = None,
        tell: Callable[..., None] = lambda event, **detail: None,
    ) -> None:
        self._potential, self._store, self._limits, self._method = potential, store, limits, method
        self._settings, self._bounds, self._tell = settings or last_layer.Settings(), bounds or quality.Bounds(), tell
        self._base = potential.readout()
        self._mean_h2 = potential.spec.mean_h2 or None
        prior = last_layer.fit([], self._base, self._settings, mean_h2=self._mean_h2 or 1.0)
        self.readout, self.covariance, self.energy_covariance = prior.readout, prior.covariance, prior.energy_covariance
        self._gains, self._costs = Gains(prior.covariance, self._settings.sigma_force), Costs()
        self._models: dict[int, ForceRows] = {}
        self._fresh: list[int] = []  # frames with training labels that what serves does not know
        self._sources: dict[Labelled, StoredLabel] = {}
        self._anchors: dict[frozenset[int], Array] = {frozenset(): np.zeros((0, self._base.size))}
        self._recent: deque[_Seen] = deque(maxlen=_RECENT)
        self.sets: dict[Role, list[Labelled]] = {role: [] for role in Role}
        self.scale = ScoreScale()
        self.quantile = TrackedQuantile()
        self.ratio = 0.0
        """Error over uncertainty of the last label that came."""
        for stored in store.labels(method):
            self._learnt(stored)
        self._doubted = {self._labelled(held.stored): held.stored for held in store.quarantined() if self._contradicted(held)}
        self._models.clear()

    # -- versions --------------------------------------------------------------------------------------------------------------------

    def serve(self, readout: Array, covariance: Array, ratios: Sequence[float] = (), energy_covariance: Array | None = None) -> None:
        """A version serves now: scores refer to it, and frames that it made certain leave the queue.

        Args:
            readout, covariance, energy_covariance: of the version.
            ratios: see `Proposal`.
        """
        self.readout, self.covariance, self.energy_covariance = readout, covariance, energy_covariance
        self.scale, self.quantile = self._scale_of(covariance), self.quantile.after_swap(ratios)
        self._gains, self._fresh = Gains(covariance, self._settings.sigma_force), []
        waiting = self._store.pending()
        wanted = {q.frame for q in waiting} | {task.frame for task in self._store.running()}
        self._models = {frame_id: model for frame_id, model in self._models.items() if frame_id in wanted}
        scores = {q.frame: self._score(self._model(q.frame)) for q in waiting}
        for frame_id, score in scores.items():
            self._store.set_priority(frame_id, score)
        for frame_id in selection.stale(waiting, scores, self._limits):
            self._drop(frame_id, f"an update brought its force uncertainty down to {scores[frame_id]:.3f} eV/Å")

    def settle(self) -> None:
        """The base readout serves as it is, with the uncertainty that the labels leave: how a fine-tuned potential begins."""
        train = self.sets[Role.TRAIN]
        # what is left of the errors on labels that the network was trained on says nothing of the noise
        settings = replace(self._settings, noise_factors=(1.0,), first_factor=1.0)
        try:
            mean_h2 = self._mean_h2 if train else self._mean_h2 or 1.0
            fitted = last_layer.fit(train, self._base, settings, mean_h2=mean_h2, anchors=self._anchored())
        except UpdateRefusedError:
            self.serve_base()
            return
        factor, ratios = self._calibrated(fitted.covariance, self._base)
        self.serve(self._base, factor * fitted.covariance, ratios, self._energies(fitted, self._base)[0])

    def _scale_of(self, covariance: Array) -> ScoreScale:
        """Force std for each unit of the score of atoms, from the last frames: each version has its own, and its first call needs it."""
        scale, score = ScoreScale(), AtomScore(covariance, len(self._potential.spec.elements))
        recent = list(self._recent)[-_SCALED:]
        if not recent:
            labels = self._store.labels(self._method)[-_SCALED:]
            recent = [seen for one in labels if (seen := self._seen(one.frame, self._potential.force_rows(one.frame))) is not None]
        for seen in recent:
            scale = scale.updated(seen.score(score), float(force_std(seen.rows, covariance).max()))
        return scale

    def _seen(self, frame: Frame, model: ForceRows) -> _Seen | None:
        (said,) = self._potential.predict([frame])
        if said.features is None:
            return None
        return _Seen(model.rows, said.features, species_index(frame.numbers, self._potential.spec.elements))

    def serve_base(self) -> None:
        """The base potential serves, with the uncertainty of the prior."""
        prior = last_layer.fit([], self._base, self._settings, mean_h2=self._mean_h2 or 1.0)
        self.serve(prior.readout, prior.covariance)

    # -- candidates ------------------------------------------------------------------------------------------------------------------

    def candidate(
        self, frame: Frame, *, session: str, step: int, reason: Reason, score: float, version: int, energy: float, forces: Array
    ) -> bool:
        """Take a frame that the gateway flagged; return whether it was accepted for a label.

        It is on disk when this returns, unless the budget is spent. The score from the last layer only asked for a look: force rows decide.

        Args:
            frame: the frame.
            session: which session it is of.
            step: its number there.
            reason: why it was flagged.
            score: the gateway's estimate, eV/Å.
            version: what served it.
            energy: what was served, eV.
            forces: what was served, shape (n_atoms, 3), eV/Å.
        """
        waits = reason is Reason.STALLED
        if (self.scale.known or waits) and self.spending.spent(self._limits, reason):
            return False  # nothing can come of it, and a run of weeks would fill the disk with frames
        frame_id = self._store.add_flag(
            frame, session=session, step=step, reason=reason, score=score, version=version, energy=energy, forces=forces
        )
        if self._store.accepted(frame_id):
            return False  # equal frames are one frame, and it must not take another one's place in a full queue
        model = self._model(frame_id, frame)
        exact = float(force_std(model.rows, self.covariance).max())
        if not math.isfinite(exact):
            self._models.pop(frame_id, None)
            return False  # kept as a flag; there is nothing that an update could learn from it
        seen = self._seen(frame, model)
        if seen is not None:
            self._recent.append(seen)
            # not what the gateway says it was: that may have been by another version
            self.scale = self.scale.updated(seen.score(AtomScore(self.covariance, len(self._potential.spec.elements))), exact)
        exact_score = self.quantile.q * exact
        waiting = self._store.pending()
        by_role, audits = self._store.queued_by_role(), self._store.count_reason(Reason.AUDIT)
        admission = selection.admit(reason, exact_score, waiting, by_role, audits, self._limits, self.spending.core_hours)
        if admission.replaces is not None:
            self._drop(admission.replaces, "made room for a more uncertain frame")
        if admission.role is None:
            self._models.pop(frame_id, None)
            return False
        accepted = self._store.enqueue(frame_id, reason, admission.role, exact_score)
        self._anchored(list(frame.numbers))  # now, while its label is computed: the update that follows is waited for
        return accepted

    def _drop(self, frame_id: int, note: str) -> None:
        self._store.drop(frame_id, note)
        self._models.pop(frame_id, None)

    def next_frame(self, strategy: str = "") -> Queued | None:
        """What should be labelled next, and in which role, of the frames that are to be labelled in this way (see `Queued.strategy`)."""
        if self.exhausted:
            return None
        waiting = [q for q in self._store.pending() if q.strategy == strategy]
        return selection.next_frame(waiting, self._store.started_by_role(), self._pick)

    def _pick(self, others: Sequence[Queued]) -> Queued | None:
        """Which frame would tell most for what its label costs; None to wait for what is under way."""
        frames = [q.frame for q in others]
        under_way = [task.frame for task in self._store.running() if self._store.role(task.frame) is Role.TRAIN]
        known = (*frames, *under_way, *self._fresh)
        self._gains.keep(known)
        for frame_id in known:
            self._gains.add(frame_id, self._model(frame_id).rows)
        costs = {frame_id: self._costs.of(self._store.frame(frame_id).numbers) for frame_id in frames}
        best = self._gains.best(frames, under_way, self._fresh, costs)
        return next((q for q in others if q.frame == best), None)

    @property
    def spending(self) -> selection.Spending:
        """What labels have cost so far."""
        accepted, audits = sum(self._store.queued_by_role().values()), self._store.count_reason(Reason.AUDIT)
        return selection.Spending(accepted, self._store.spent().core_seconds / 3600, audits)

    @property
    def exhausted(self) -> bool:
        """Whether no label is begun any more, not even of frames that wait."""
        return self.spending.timed_out(self._limits)

    def notes(self) -> list[str]:
        """What a person should know of the budget, as sentences."""
        return self.spending.notes(self._limits)

    # -- labels ----------------------------------------------------------------------------------------------------------------------

    def label(self, task: int, frame_id: int, label: Label) -> bool:
        """Take a label that arrived; False when there is nothing to learn from: the frame had one already, or it does not fit its frame or
        this run's method, or it cannot be trusted and was set aside.
        """
        frame = self._store.frame(frame_id)
        if len(label.forces) != len(frame):
            self._store.add_failure(task, f"the label has forces of {len(label.forces)} atoms, its frame has {len(frame)}")
            return False
        doubt = quality.inspect(frame, label, self._bounds)
        if doubt is not None:
            if self._store.quarantine(task, label, doubt.check, doubt.reason, doubt.numbers):
                self._tell("label set aside", frame=frame_id, check=doubt.check, reason=doubt.reason)
            return False
        if not self._store.add_label(task, label) or label.method != self._method:
            return False
        stored = self._store.label_of(frame_id, self._method)
        assert stored is not None  # it has just been added
        self._calibrate(frame_id, label, audit=self._store.reason(frame_id) is Reason.AUDIT)
        self._learnt(stored)
        if stored.role is Role.TRAIN:
            self._fresh.append(frame_id)
        else:
            self._models.pop(frame_id, None)
        return True

    def _calibrate(self, frame_id: int, label: Label, *, audit: bool) -> None:
        stds = force_std(self._model(frame_id).rows, self.covariance)
        self.ratio = error_ratio(label.forces, self._store.served_forces(frame_id), stds)
        self.quantile = self.quantile.after(self.ratio, audit=audit)

    def _labelled(self, stored: StoredLabel) -> Labelled:
        model = self._model(stored.frame_id, stored.frame)
        return last_layer.labelled(model, stored.frame, stored.label, self._base, self._potential.spec.elements)

    def _contradicted(self, held: Quarantined) -> bool:
        """Whether a label was set aside for what others say of it, and nothing has become of it since."""
        return held.check in (quality.FORCES, quality.ENERGY) and held.state == "held" and held.stored.label.method == self._method

    def _learnt(self, stored: StoredLabel) -> None:
        made = self._labelled(stored)
        self.sets[stored.role].append(made)
        self._sources[made] = stored
        if not stored.imported:
            self._costs.add(stored.frame.numbers, stored.label.seconds)

    @property
    def n_labels(self) -> int:
        """Labels in hand, of both roles."""
        return sum(len(found) for found in self.sets.values())

    def update(self) -> Proposal | Refusal:
        """Fit the readout to all training labels and judge the result; nothing changes until `serve`, but labels that all others contradict
        are set aside.
        """
        metrics: dict[str, object] = {}
        try:
            fitted = self._trusted_fit()
            train, held_out = self.sets[Role.TRAIN], self.sets[Role.HOLDOUT]
            metrics |= {"labels": len(train), "held_out": len(held_out)}
            metrics["loo_rmse"] = _number(fitted.loo_rmse)
            residual = max(last_layer.largest_residual(train), self._settings.trust_floor)
            factor = last_layer.trust_region(fitted.readout, self.readout, [one.rows for one in self._recent], residual, self._settings)
        except UpdateRefusedError as error:
            return Refusal(str(error), metrics)
        candidate = self.readout + factor * (fitted.readout - self.readout)
        verdict = last_layer.accept(fitted, train, held_out, self.readout, candidate, self._settings)
        variance, ratios = self._calibrated(fitted.covariance, candidate)
        of_energies, energy_variance = self._energies(fitted, candidate)
        metrics |= {
            "variance_factor": variance,
            "energy_variance_factor": energy_variance,
            "trust": factor,
            "noise_factor": fitted.noise_factor,
            "serving_rmse": _number(verdict.serving_rmse),
            "candidate_rmse": _number(verdict.candidate_rmse),
            "verdict": verdict.reason,
            **self.errors(candidate),
        }
        if not verdict.accepted:
            return Refusal(verdict.reason, metrics)
        return Proposal(candidate, variance * fitted.covariance, metrics, ratios, of_energies)

    def _calibrated(self, covariance: Array, readout: Array) -> tuple[float, tuple[float, ...]]:
        """What the held-out labels say of a posterior: its `calibration.variance_factor`, and with that the ratio of each of them."""
        held_out = self.sets[Role.HOLDOUT]
        errors = [one.residual(readout - self._base) for one in held_out]
        stds = [force_std(one.rows, covariance) for one in held_out]
        missed, spread = (sum(float((some**2).sum()) for some in found) for found in (errors, stds))
        factor = variance_factor(missed, spread, sum(error.size for error in errors))
        pairs = zip(errors, stds, strict=True)
        return factor, tuple(error_ratio(error, np.zeros_like(error), math.sqrt(factor) * std) for error, std in pairs)

    def _energies(self, fitted: last_layer.Fit, readout: Array) -> tuple[Array | None, float]:
        """The covariance of energies, calibrated apart from that of forces, and its factor."""
        change, covariance = readout - self._base, fitted.energy_covariance
        factor = energies.energy_factor(self.sets[Role.TRAIN], self.sets[Role.HOLDOUT], change, covariance)
        return None if covariance is None else factor * covariance, factor

    def _trusted_fit(self) -> last_layer.Fit:
        """The fit to all training labels that can be trusted."""
        self._judge()
        return self._fit(self.sets[Role.TRAIN], self._settings)

    def _judge(self) -> None:
        """Take labels back that the others contradict no longer, and set those aside, the worst one first, that they do.

        By fits in which all errors count alike: others would find every label strange that is far off, and atoms that are inside each other make
        such labels, which are right.
        """
        self._see_what_others_judged()
        fitted = self._plain_fit(self.sets[Role.TRAIN])
        if self._taken_back(fitted):
            fitted = self._plain_fit(self.sets[Role.TRAIN])
        released = self._store.released()
        spared = [one for one, stored in self._sources.items() if stored.id in released]
        while quality.room_aside(len(self._doubted), self.n_labels):
            found = quality.doubtful(self.sets[Role.TRAIN], self.sets[Role.HOLDOUT], fitted, self._plain_fit, spared)
            if found is None:
                return
            self._set_aside(*found)
            fitted = self._plain_fit(self.sets[Role.TRAIN])

    def _taken_back(self, fitted: last_layer.Fit) -> bool:
        """Take labels back that were set aside and agree with the fit by now; return whether it must be made anew."""
        trains, known = False, [*self.sets[Role.TRAIN]]  # those of the fit; whoever comes back is not among them
        for one, stored in [*self._doubted.items()]:
            if not quality.believed_again(one, known, fitted):
                continue
            if self._store.take_back(stored.id, "the other labels contradict it no longer"):
                self._believe(one)
                trains = trains or stored.role is Role.TRAIN
                self._tell("label taken back", frame=stored.frame_id)
            else:
                del self._doubted[one]
        return trains

    def _doubt(self, one: Labelled) -> None:
        self._doubted[one] = stored = self._sources.pop(one)
        self.sets[stored.role].remove(one)

    def _believe(self, one: Labelled) -> None:
        self._sources[one] = stored = self._doubted.pop(one)
        self.sets[stored.role].append(one)
        self.sets[stored.role].sort(key=lambda labelled: self._sources[labelled].id)  # as another start would have them

    def _see_what_others_judged(self) -> None:
        """Another learner on the same store may have judged meanwhile: one behind a network that was just trained."""
        known = set(self._store.label_ids(self._method))
        for one in [one for one, stored in self._sources.items() if stored.id not in known]:
            self._doubt(one)
        for one in [one for one, stored in self._doubted.items() if stored.id in known]:
            self._believe(one)

    def _plain_fit(self, labels: Sequence[Labelled]) -> last_layer.Fit:
        return self._fit(labels, replace(self._settings, far=math.inf))

    def _fit(self, labels: Sequence[Labelled], settings: last_layer.Settings) -> last_layer.Fit:
        return last_layer.fit(labels, self._base, settings, mean_h2=self._mean_h2, anchors=self._anchored())

    def _anchored(self, more: Sequence[int] = ()) -> Array:
        """Rows of pressed pairs of the elements that have labels, and of more; computed when one is new."""
        elements = frozenset({int(z) for stored in self._sources.values() for z in stored.frame.numbers} | {int(z) for z in more})
        if elements not in self._anchors:
            self._anchors[elements] = pair_rows(self._potential, elements)
        return self._anchors[elements]

    def _set_aside(self, one: Labelled, doubt: quality.Doubt) -> None:
        stored = self._sources[one]
        self._store.set_aside(stored.id, doubt.check, doubt.reason, doubt.numbers)  # first: on a full disk nothing has changed
        self._doubt(one)
        self._fresh = [frame_id for frame_id in self._fresh if frame_id != stored.frame_id]
        self._tell("label set aside", frame=stored.frame_id, check=doubt.check, reason=doubt.reason)

    def errors(self, readout: Array) -> dict[str, object]:
        """Force RMSE (component, eV/Å) of the base and of a readout on training and held-out labels; None where there is no label."""
        found: dict[str, object] = {}
        for role, labels in self.sets.items():
            found[f"{role.value}_rmse_base"] = _number(last_layer.force_rmse(labels, self._base, self._base))
            found[f"{role.value}_rmse"] = _number(last_layer.force_rmse(labels, readout, self._base))
        return found

    # -- force rows ------------------------------------------------------------------------------------------------------------------

    def _model(self, frame_id: int, frame: Frame | None = None) -> ForceRows:
        """Force rows, kept while the frame waits: they are there when the label comes, so that it costs only the solve."""
        if frame_id not in self._models:
            self._models[frame_id] = self._potential.force_rows(frame if frame is not None else self._store.frame(frame_id))
        return self._models[frame_id]

    def _score(self, model: ForceRows) -> float:
        return self.quantile.q * float(force_std(model.rows, self.covariance).max())


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None


def rmse_text(metrics: dict[str, object], names: Sequence[str]) -> str:
    """Errors for people, in meV/Å.

    >>> rmse_text({"a": 0.1, "b": None}, ["a", "b"])
    '100 → -'
    """
    shown = [metrics.get(name) for name in names]
    return " → ".join(f"{1000 * value:.0f}" if isinstance(value, float) else "-" for value in shown)
