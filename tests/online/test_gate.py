"""The gate, with the embedded potential in many broken forms: each check lets a sound candidate pass and is seen to refuse a broken one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tumbaga.driver.backends.painn import PaiNN, load
from tumbaga.online.gate import FINE_TUNE, LAST_LAYER, Check, Evidence, Known, Limits, gate, passed, refusals
from tumbaga.online.gate_asking import Case, collect
from tumbaga.online.gate_labels import audits
from tumbaga.online.ports import ForceRows, Trainable
from tumbaga.online.records import Array, Frame, Label, LabelledFrame, Prediction, Role
from tumbaga.online.testing import ToyTrainable, label_from
from tumbaga.online.training.loop import Sets, Training
from tumbaga.online.training.replay import generated, pseudo_labelled
from tumbaga.online.training.settings import Settings

DATA = Path(__file__).parents[2] / "examples" / "cuau_water_model" / "data" / "cuau-water.npz"
MODEL = "painn:cuau-water"
STILL = replace(FINE_TUNE, shadow_steps=0)  # all but shadow MD: quick
SCATTER = 0.35  # of the logarithm of two versions' errors on one frame, as between fine-tunes of the embedded potential
ALL = ["finite", "consistency", "audits", "replay", "short range", "shadow MD", "calibration"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small batches on several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def potential() -> PaiNN:
    return load(MODEL, "cpu")


@pytest.fixture(scope="module")
def evidence(potential: PaiNN) -> Evidence:
    """Of two compositions, labels by GFN2-xTB from the data set behind the potential: 5 and 3 held out, 4 learnt; replay; recent frames."""
    known: list[Known] = []
    recent: list[Frame] = []
    with np.load(DATA) as held:
        ends, counts, names = np.cumsum(held["counts"]), held["counts"], held["trajectory"]
        energies, forces, numbers, positions = held["energy"], held["forces"], held["numbers"], held["positions"]
    for name, held_out in (("CuAu(H2O)2/0", 5), ("(H2O)4/0", 3)):
        for k, place in enumerate(np.random.default_rng(1).permutation(np.flatnonzero(names == name))[:12]):
            rows = slice(ends[place] - counts[place], ends[place])
            frame = Frame(numbers[rows], positions[rows].astype(np.float64))
            label = Label(float(energies[place]), forces[rows].astype(np.float64), "gfn2-xtb", 0.0)
            if k < held_out + 2:
                known.append(Known(frame, label, Role.HOLDOUT if k < held_out else Role.TRAIN, (name, "all")))
            elif name.startswith("CuAu"):
                recent.append(frame)
    return Evidence(known, pseudo_labelled(potential, generated(recent, 20, seed=3)), recent, temperature=300.0, ratios=[1.0, 2.5, 1.7])


def noisy(potential: PaiNN, size: float, only: str = "", seed: int = 0) -> PaiNN:
    """The potential with noise on its weights, relative to their spread; on all of the network, or on the tensor of that name alone."""
    rng, tensors = np.random.default_rng(seed), dict(potential.state())
    for name, one in tensors.items():
        if name == only or (not only and name not in ("readout", "reference")):
            tensors[name] = (one + size * one.std() * rng.standard_normal(one.shape)).astype(one.dtype)
    return PaiNN("painn:noisy", tensors, potential.metadata)


@dataclass
class Bent:
    """A potential whose predictions are changed on their way out; all else is that of the potential."""

    potential: Trainable
    bend: Callable[[Frame, Prediction], Prediction]
    spec: Any = field(init=False)

    def __post_init__(self) -> None:
        self.spec = self.potential.spec

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        return [self.bend(frame, one) for frame, one in zip(frames, self.potential.predict(frames, readouts), strict=True)]

    def readout(self) -> Array:
        return self.potential.readout()

    def force_rows(self, frame: Frame) -> ForceRows:
        return self.potential.force_rows(frame)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.potential.metadata

    def state(self, readout: Array | None = None) -> Mapping[str, np.ndarray]:
        return self.potential.state(readout)


def scaled(factor: float) -> Callable[[Frame, Prediction], Prediction]:
    return lambda frame, one: replace(one, forces=factor * one.forces)


def well(first: int, second: int, at: float, depth: float, width: float) -> Callable[[Frame, Prediction], Prediction]:
    """Adds a Gaussian well to each pair of these elements: energy and forces belong together."""

    def bend(frame: Frame, one: Prediction) -> Prediction:
        vectors = frame.positions[:, None] - frame.positions[None]
        lengths = np.linalg.norm(vectors, axis=2) + np.eye(len(frame))
        kinds = (frame.numbers[:, None] == first) & (frame.numbers[None] == second)
        apart = (lengths - at) / width
        wells = -depth * np.exp(-0.5 * apart**2) * (kinds | kinds.T) * (1.0 - np.eye(len(frame)))
        pushes = (wells * apart / width / lengths)[:, :, None] * vectors
        return replace(one, energy=one.energy + 0.5 * float(wells.sum()), forces=one.forces + pushes.sum(axis=1))

    return bend


def judged(candidate: Trainable, serving: Trainable, evidence: Evidence, limits: Limits = STILL, **how: Any) -> dict[str, Check]:
    return {check.name: check for check in gate(candidate, serving, how.pop("original", serving), evidence, limits, **how)}


def failed(checks: Mapping[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


# ---------------------------------------------------------------- all


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_the_serving_version_itself_passes(potential: PaiNN, evidence: Evidence, dtype: str) -> None:
    """An identical candidate passes every check, in either precision, and what was measured is told as JSON and in sentences."""
    twin = load(MODEL, "cpu", "float64" if dtype == "float32" else "float32")
    told: list[str] = []
    checks = gate(load(MODEL, "cpu", dtype), potential, potential, replace(evidence, twin=twin), FINE_TUNE, told.append)

    assert [check.name for check in checks] == list(dict.fromkeys(told)) == ALL
    assert refusals(checks) == []
    assert passed(checks)
    for check in checks:
        json.dumps(dict(check.numbers), allow_nan=False)
        assert check.reason
        assert "\n" not in check.reason
    numbers = {check.name: check.numbers for check in checks}
    assert numbers["audits"]["held_out"] == 8
    assert numbers["replay"]["frames"] == 20
    assert numbers["short range"]["repulsive"] == numbers["short range"]["pairs"] >= 12  # ten pairs of elements, and bonds
    assert numbers["shadow MD"]["replicas"] == 5
    assert numbers["calibration"]["multiplier"] == 2.5


def test_without_evidence_it_passes_and_says_that_nothing_was_judged(potential: PaiNN) -> None:
    """A first version, of which nothing is known yet, is not refused for that; each sentence says so."""
    checks = judged(potential, potential, Evidence(), FINE_TUNE, original=None)

    assert list(checks) == ALL
    assert failed(checks) == set()
    assert all("could not be judged" in checks[name].reason for name in ("audits", "replay", "calibration"))
    assert "no recent frames" in checks["shadow MD"].reason


def test_a_last_layer_candidate_needs_no_shadow_md(potential: PaiNN, evidence: Evidence) -> None:
    """Its limits leave shadow MD out and bear a twentieth more error on held-out labels."""
    assert judged(potential, potential, evidence, LAST_LAYER)["shadow MD"].reason == "shadow MD was not asked for"
    assert (FINE_TUNE.audit_ratio, LAST_LAYER.audit_ratio) == (1.0, 1.05)


# ---------------------------------------------------------------- finite and consistent


def test_weights_that_are_not_finite_are_refused(potential: PaiNN, evidence: Evidence) -> None:
    """One NaN among all weights: nothing else is asked of such a candidate."""
    tensors = {name: one.copy() for name, one in potential.state().items()}
    name = next(name for name, one in tensors.items() if one.ndim == 2)
    tensors[name][0, 0] = np.nan
    checks = gate(PaiNN("painn:nan", tensors, potential.metadata), potential, potential, evidence)

    assert [check.name for check in checks] == ["finite"]
    assert refusals(checks) == [f"finite: 1 of {len(tensors)} tensors hold numbers that are not finite, {name!r} first"]


def test_answers_that_are_not_finite_are_refused(potential: PaiNN, evidence: Evidence) -> None:
    """Finite weights that are so large that numbers overflow."""
    tensors = {name: one * (1.0 if name == "reference" else 1e20) for name, one in potential.state().items()}
    with np.errstate(all="ignore"):
        candidate = PaiNN("painn:huge", tensors, potential.metadata)
    checks = gate(candidate, potential, potential, evidence)

    assert [(check.name, check.passed) for check in checks] == [("finite", False)]
    assert "answers to" in checks[0].reason


def test_where_the_serving_version_has_no_answer_none_is_asked_for(potential: PaiNN, evidence: Evidence) -> None:
    """Frames of which neither says anything finite count for neither; of which the serving one alone does, against the candidate."""
    lost = {evidence.labels[0].frame.key, evidence.replay[0].frame.key, evidence.recent[0].key}
    silent = Bent(potential, lambda frame, one: replace(one, energy=math.nan) if frame.key in lost else one)

    both = judged(silent, silent, evidence, original=potential)
    assert failed(both) == set()
    assert (both["audits"].numbers["held_out"], both["replay"].numbers["frames"]) == (7, 19)
    assert judged(silent, potential, evidence)["finite"].numbers["frames_not_finite"] == 3


@pytest.mark.parametrize("factor", [-1.0, 1.01, 0.0])
def test_forces_that_are_no_gradient_are_refused(potential: PaiNN, evidence: Evidence, factor: float) -> None:
    """A wrong sign, one per cent too much, none at all: the work along short ways does not fit the energy."""
    checks = judged(Bent(potential, scaled(factor)), potential, evidence)

    assert "consistency" in failed(checks)
    assert "slopes of the energy" in checks["consistency"].reason


def test_a_form_that_the_serving_version_has_is_borne(potential: PaiNN, evidence: Evidence) -> None:
    """Where a potential gives forces that are no gradient by its form, its successors may, too."""
    form = Bent(potential, scaled(1.01))
    checks = judged(form, form, evidence)

    assert failed(checks) == set()
    assert checks["consistency"].numbers["error"] == pytest.approx(0.007, abs=0.003)


def test_another_precision_must_say_the_same(potential: PaiNN, evidence: Evidence) -> None:
    """Forces of the candidate in float32 and float64 that differ by two per mille."""
    checks = judged(potential, potential, replace(evidence, twin=Bent(potential, scaled(1.002))))

    assert failed(checks) == {"consistency"}


# ---------------------------------------------------------------- labels


def test_noise_that_ruins_forces_fails_on_held_out_labels(potential: PaiNN, evidence: Evidence) -> None:
    """A tenth of noise on all weights multiplies the error; one per mille changes nothing that counts."""
    ruined = judged(noisy(potential, 0.1), potential, evidence)

    assert {"audits", "replay"} <= failed(ruined)
    assert ruined["audits"].numbers["rmse"] > 3 * ruined["audits"].numbers["rmse_serving"]
    assert failed(judged(noisy(potential, 0.001), potential, evidence)) == set()


def test_one_class_that_is_worse_is_enough(potential: PaiNN, evidence: Evidence) -> None:
    """Better on most labels and on all together, but twice as wrong on one composition: refused, and the class is named."""
    right = {known.frame.key: known.label.forces for known in evidence.labels}

    def bend(frame: Frame, one: Prediction) -> Prediction:
        if frame.key not in right:
            return one
        factor = 2.0 if (frame.numbers == 29).sum() == 0 else 0.1
        return replace(one, forces=right[frame.key] + factor * (one.forces - right[frame.key]))

    heavy = replace(evidence, labels=[one for one in evidence.labels if one.role is Role.HOLDOUT][2:])
    heavy = replace(
        heavy, labels=[replace(one, label=_wrong(one, potential, 4.0)) if 29 in one.frame.numbers else one for one in heavy.labels]
    )
    right.update({known.frame.key: known.label.forces for known in heavy.labels})
    audits = judged(Bent(potential, bend), potential, heavy)["audits"]

    assert audits.numbers["rmse"] < audits.numbers["rmse_serving"]
    assert not audits.passed
    assert "on the 3 of class (H2O)4/0" in audits.reason
    assert "class all" not in audits.reason


def _wrong(known: Known, potential: PaiNN, factor: float) -> Label:
    """A label of which the potential is so many times further away."""
    said = potential.predict([known.frame])[0].forces
    return replace(known.label, forces=said + factor * (known.label.forces - said))


def test_without_held_out_labels_the_candidate_must_have_learnt(potential: PaiNN, evidence: Evidence) -> None:
    """Nothing held out: said so, and a candidate that is worse on what it was taught than the original potential is refused."""
    learnt = replace(evidence, labels=[one for one in evidence.labels if one.role is Role.TRAIN])

    assert judged(potential, potential, learnt)["audits"].reason.startswith("no label was held out, so whether it is better")
    assert judged(potential, potential, learnt)["audits"].passed
    assert not judged(noisy(potential, 0.03), noisy(potential, 0.1), learnt, original=potential)["audits"].passed


@pytest.mark.parametrize("count", [1, 2, 5, pytest.param(10, marks=pytest.mark.slow)])
def test_few_labels_are_no_toss_of_a_coin(count: int) -> None:
    """Of candidates that are as good as the serving version few are refused, of those twice as wrong few are not, however many labels."""
    rng, frame = np.random.default_rng(count), Frame(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]))
    frames = [replace(frame, positions=frame.positions + 0.01 * k) for k in range(count)]
    labels = [Known(one, Label(0.0, np.zeros((3, 3)), "test", 0.0), Role.HOLDOUT) for one in frames]
    refused = {1.0: 0, 2.0: 0}
    for factor in refused:
        for _ in range(200):
            hard = 0.1 * np.exp(0.4 * rng.standard_normal(count))  # what is hard about a frame both find hard
            versions = [_Said(frames, size * hard * np.exp(SCATTER / math.sqrt(2) * rng.standard_normal(count))) for size in (1.0, factor)]
            case = Case(versions[1], versions[0], versions[0], Evidence(labels), FINE_TUNE, lambda: 0.0)  # type: ignore[arg-type]
            refused[factor] += not audits(case, collect(case)).passed

    assert refused[1.0] <= 20
    assert refused[2.0] >= (60 if count == 1 else 130)


@pytest.mark.parametrize(("ratio", "limits", "sound"), [(1.1, FINE_TUNE, False), (1.04, FINE_TUNE, False), (1.04, LAST_LAYER, True)])
def test_a_little_worse_on_each_of_many_labels_is_significant(ratio: float, limits: Limits, sound: bool) -> None:
    """Less than would be clearly worse, but on all ten labels: refused, unless it is within what a last-layer update may lose."""
    frames = [Frame(np.array([1]), np.full((1, 3), float(k))) for k in range(10)]
    labels = [Known(one, Label(0.0, np.zeros((1, 3)), "test", 0.0), Role.HOLDOUT) for one in frames]
    sizes = np.linspace(0.1, 0.2, 10)
    serving, candidate = (_Said(frames, size) for size in (sizes, sizes * (ratio + 0.01 * np.sin(np.arange(10)))))
    case = Case(candidate, serving, serving, Evidence(labels), limits, lambda: 0.0)  # type: ignore[arg-type]
    check = audits(case, collect(case))

    assert check.passed is sound
    assert check.reason.endswith("significantly more than the serving version's") is not sound
    assert "more than 1." not in check.reason


class _Said:
    """Says forces of a given size, of which the labels say that there are none."""

    def __init__(self, frames: Sequence[Frame], sizes: Array) -> None:
        self._said = {
            frame.key: Prediction(0.0, np.full((len(frame), 3), size), np.zeros((3, 3))) for frame, size in zip(frames, sizes, strict=True)
        }

    def all_of(self, frames: Sequence[Frame], until: float = math.inf) -> list[Prediction]:
        return [self._said[frame.key] for frame in frames]


# ---------------------------------------------------------------- replay


@pytest.mark.slow
def test_a_candidate_that_knows_one_frame_alone_fails_replay(potential: PaiNN, evidence: Evidence, tmp_path: Path) -> None:
    """Trained hard on a single label that contradicts the original, without replay: right there, wrong everywhere else."""
    taught = evidence.labels[0]
    label = label_from(noisy(potential, 0.05, seed=4), taught.frame)
    train = [LabelledFrame(taught.frame, label)]
    candidate = Training(potential, Sets(train), Settings(epochs=80, rate=1e-2, warmup=5, average=0.9), tmp_path).run().potential
    only = replace(evidence, labels=[Known(taught.frame, label, Role.TRAIN)])
    checks = judged(candidate, potential, only)

    assert checks["audits"].passed
    assert checks["audits"].numbers["rmse"] is None
    assert checks["audits"].numbers["rmse_learnt"] < 0.5 * checks["audits"].numbers["rmse_learnt_original"]
    assert "replay" in failed(checks)


def test_drift_up_to_what_is_to_be_learnt_is_no_forgetting(potential: PaiNN, evidence: Evidence) -> None:
    """Where all labels say that the original is wrong, the right potential passes though its forces have changed on replay frames, too."""
    truth = noisy(potential, 0.1, seed=5)
    labels = [replace(one, label=label_from(truth, one.frame)) for one in evidence.labels]
    checks = judged(truth, potential, replace(evidence, labels=labels))

    assert failed(checks) == set()
    assert checks["replay"].numbers["rmse"] > FINE_TUNE.drift_extra
    assert "replay" in failed(judged(truth, potential, replace(evidence, labels=())))


def test_labels_that_the_original_was_trained_on_do_not_make_it_right(potential: PaiNN, evidence: Evidence) -> None:
    """It is exact on seven of twelve labels and wrong on all others: what these ask for is no forgetting."""
    truth = noisy(potential, 0.1, seed=5)
    labels = [replace(one, label=label_from(potential if k < 7 else truth, one.frame)) for k, one in enumerate(evidence.labels)]
    checks = judged(truth, potential, replace(evidence, labels=labels))

    assert "replay" not in failed(checks)
    assert checks["replay"].numbers["rmse"] > FINE_TUNE.drift_extra


def test_a_version_that_has_drifted_before_may_drift_a_little_more(potential: PaiNN, evidence: Evidence) -> None:
    """Drift is held against the serving version's: a fifth more is borne, and half as much again is not."""
    none = replace(evidence, labels=())
    serving, little, much = (noisy(potential, 1.5 * size, "readout") for size in (1.0, 1.1, 1.5))

    assert "replay" not in failed(judged(little, serving, none, original=potential))
    assert "replay" in failed(judged(much, serving, none, original=potential))


# ---------------------------------------------------------------- short range


def test_a_hole_at_short_distance_is_refused(potential: PaiNN, evidence: Evidence) -> None:
    """A narrow well between O and H nearer than any frame comes: only the scans see it, and name the pair and the distance."""
    checks = judged(Bent(potential, well(8, 1, at=0.6, depth=12.0, width=0.05)), potential, replace(evidence, replay=()))

    assert failed(checks) == {"short range"}
    assert "2 of 13 repulsive pairs are so no more: H-O is pulled together by" in checks["short range"].reason
    assert checks["short range"].numbers["broken"] == 2


def test_a_hole_that_a_pair_alone_does_not_have_is_refused(potential: PaiNN, evidence: Evidence) -> None:
    """The same well, but only among other atoms: the scan of a bond in a recent frame sees it."""
    bend = well(8, 1, at=0.6, depth=12.0, width=0.05)
    crowded = Bent(potential, lambda frame, one: bend(frame, one) if len(frame) > 2 else one)
    checks = judged(crowded, potential, replace(evidence, replay=()))

    assert failed(checks) == {"short range"}
    assert "1 of 13 repulsive pairs are so no more: O-H in a frame is pulled together by" in checks["short range"].reason


def test_a_wall_that_was_never_there_is_not_asked_for(potential: PaiNN, evidence: Evidence) -> None:
    """With the same hole in the original the candidate may have it; where the serving version alone has it, it must not be deeper."""
    shallow, deep = (Bent(potential, well(8, 1, at=0.6, depth=depth, width=0.05)) for depth in (12.0, 14.0))

    assert judged(shallow, shallow, evidence)["short range"].passed
    assert judged(shallow, shallow, evidence, original=potential)["short range"].passed
    assert not judged(deep, shallow, evidence, original=potential)["short range"].passed


def test_a_wall_may_begin_further_out_and_have_a_dip(potential: PaiNN, evidence: Evidence) -> None:
    """Atoms that get to the dip have climbed as far as the original would have had them: only where it is deeper than that is it a hole."""
    dip, hole = (Bent(potential, well(8, 1, at=at, depth=depth, width=0.05)) for at, depth in ((0.78, -6.0), (0.7, 12.0)))
    pushes = [
        one.forces[1, 0]
        for one in dip.predict([Frame(np.array([8, 1]), np.array([[0.0, 0, 0], [x, 0, 0]])) for x in np.linspace(0.6, 0.8, 41)])
    ]

    assert min(pushes) < -20.0
    assert judged(dip, potential, evidence)["short range"].passed
    assert not judged(hole, potential, evidence)["short range"].passed


def test_a_hole_where_the_wall_begins_is_refused(potential: PaiNN, evidence: Evidence) -> None:
    """Behind it the candidate climbs as the original does, and more: what is seen is the fall below where the wall begins."""
    hole = Bent(potential, well(8, 1, at=0.86, depth=12.0, width=0.02))
    check = judged(hole, potential, evidence)["short range"]

    assert not check.passed
    assert "H-O is pulled together by" in check.reason


def test_repulsion_that_has_gone_soft_is_refused() -> None:
    """A tenth of the core is left: nothing is pulled together, but the wall is no wall any more."""
    hard, half, soft = (ToyTrainable((1, 8), core=core) for core in (200.0, 100.0, 20.0))
    evidence = Evidence(elements=(1, 8))

    assert failed(judged(half, hard, evidence)) == set()
    checks = judged(soft, hard, evidence)
    assert failed(checks) == {"short range"}
    assert "has 10% of its repulsion left" in checks["short range"].reason


# ---------------------------------------------------------------- shadow MD


def shadow_only(evidence: Evidence) -> Evidence:
    return Evidence(recent=evidence.recent, temperature=300.0)


def noise(frame: Frame, one: Prediction) -> Prediction:
    """Forces with 1.2 eV/Å of noise that is a function of the positions."""
    rng = np.random.default_rng(np.abs(frame.positions).view(np.uint64).ravel()[:6])
    return replace(one, forces=one.forces + 1.2 * rng.standard_normal(one.forces.shape))


@pytest.mark.parametrize(
    ("bend", "told"),
    [
        (well(8, 1, at=0.75, depth=6.0, width=0.12), "broke"),  # a hole that a vibration reaches
        (scaled(-1.0), "broke"),  # everything flies apart or together
        pytest.param(lambda frame, one: replace(one, forces=one.forces * 60.0), "broke", marks=pytest.mark.slow),  # too stiff for any step
        pytest.param(noise, "the temperature is", marks=pytest.mark.slow),
        pytest.param(scaled(1.2), "energy drifts by", marks=pytest.mark.slow),
    ],
    ids=["hole", "sign", "stiff", "noise", "leak"],
)
def test_shadow_md_refuses(potential: PaiNN, evidence: Evidence, bend: Callable[[Frame, Prediction], Prediction], told: str) -> None:
    """Potentials that cannot be run with: each ends with a sentence that says what went wrong."""
    check = judged(Bent(potential, bend), potential, shadow_only(evidence), FINE_TUNE)["shadow MD"]

    assert not check.passed
    assert told in check.reason


def test_a_candidate_that_breaks_where_the_serving_version_does_is_no_worse(potential: PaiNN, evidence: Evidence) -> None:
    """A bad version can be replaced by one that is bad in the same way; the sentence says so."""
    bad = Bent(potential, scaled(-1.0))
    check = judged(bad, bad, shadow_only(evidence), FINE_TUNE)["shadow MD"]

    assert check.passed
    assert check.reason.endswith("but no worse than the serving version")
    assert check.numbers["broken"] == check.numbers["broken_serving"] == 5


# ---------------------------------------------------------------- calibration and time


@pytest.mark.parametrize(("ratios", "sound"), [([7.9], True), ([8.1], False), ([1.0] * 19 + [30.0], True), ([1.0, math.inf], False)])
def test_an_uncertainty_that_says_nothing_is_refused(potential: PaiNN, ratios: list[float], sound: bool) -> None:
    """More than eight standard deviations for nine labels in ten; one odd label of twenty is none of these."""
    check = judged(potential, potential, Evidence(ratios=ratios))["calibration"]

    assert check.passed is sound
    assert check.numbers["labels"] == len(ratios)


@dataclass
class Slow(Bent):
    """Takes a time for each atom, on a clock of its own that all of them share."""

    seconds: float = 0.05
    now: list[float] = field(default_factory=lambda: [0.0])

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        self.now[0] += self.seconds * sum(map(len, frames))
        return super().predict(frames, readouts)


def test_a_slow_potential_is_asked_less_but_about_all_held_out_labels(potential: PaiNN, evidence: Evidence) -> None:
    """At 50 ms an atom the gate keeps to about its time by fewer replay frames, scans and steps; the numbers say how many."""
    slow = Slow(potential, lambda frame, one: one)
    told: list[float] = []
    many = replace(evidence, replay=list(evidence.replay) * 10)
    checks = judged(slow, slow, many, FINE_TUNE, clock=lambda: slow.now[0], progress=lambda _: told.append(slow.now[0]))

    assert failed(checks) == set()
    assert slow.now[0] < 1.7 * FINE_TUNE.seconds
    assert checks["audits"].numbers["held_out"] == 8
    assert 0 < checks["replay"].numbers["frames"] < checks["replay"].numbers["given"] == 200
    assert 0 < checks["short range"].numbers["scanned"] < checks["short range"].numbers["pairs"]
    assert checks["shadow MD"].numbers["replicas"] == 1
    assert 20 <= checks["shadow MD"].numbers["steps"] < checks["shadow MD"].numbers["steps_asked"] == 300
    assert "(of 300: there was no time for more)" in checks["shadow MD"].reason
    assert max(np.diff(told)) < 10.0
