"""The learner on the exact toy, with labels made by the same toy with other weights: it learns, it remembers, and it refuses nonsense."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tumbaga.online import quality
from tumbaga.online.anchors import pair_rows
from tumbaga.online.calibration import FEWEST, error_ratio
from tumbaga.online.last_layer import Fit, Labelled, Settings, fit
from tumbaga.online.learner import Learner, Proposal, Refusal
from tumbaga.online.quality import Bounds
from tumbaga.online.records import Array, Frame, Label, Reason, Role
from tumbaga.online.selection import Limits
from tumbaga.online.store import FILE, Store
from tumbaga.online.testing import ToyTrainable, label_from
from tumbaga.online.uncertainty import AtomScore, force_std, species_index

METHOD = "toy"
LIMITS = Limits(force_error=1e-6, budget=60)
LEARNT = 0.01  # eV/Å: what is left of an error of about 1 eV/Å after eight exact labels for eight weights; the prior holds back the rest
NARROW = Settings(trust_floor=1e9)  # the trust region has its own tests
UNBOUND = Bounds(force=0.0, net_force=0.0)  # the toy has forces that no label should have, and one test makes worse ones


class Bench:
    """A learner, its store, and somebody who flags frames and labels them."""

    def __init__(
        self, path: Path, toy: ToyTrainable, truth: ToyTrainable, limits: Limits, method: str = METHOD, bounds: Bounds = UNBOUND
    ) -> None:
        self.store = Store(path)
        self.toy, self.truth = toy, truth
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.learner = Learner(toy, self.store, limits, method, NARROW, bounds, lambda event, **detail: self.told.append((event, detail)))

    def flag(self, frame: Frame, reason: Reason = Reason.UNCERTAIN) -> bool:
        said = self.toy.predict([frame])[0]
        return self.learner.candidate(
            frame, session="s", step=1, reason=reason, score=0.5, version=0, energy=said.energy, forces=said.forces
        )

    def label_next(self, spoil: Callable[[Label], Label] = lambda told: told) -> Role:
        chosen = self.learner.next_frame()
        assert chosen is not None
        task = self.store.start_task(chosen.frame, "label-0", 1, chosen.role)
        told = spoil(label_from(self.truth, self.store.frame(chosen.frame), {1: -13.6, 8: -2041.0}))
        assert self.learner.label(task, chosen.frame, told)
        return chosen.role

    def learn(self, frames: list[Frame]) -> None:
        for frame in frames:
            assert self.flag(frame)
            self.label_next()


@pytest.fixture
def make_bench(tmp_path: Path, toy: ToyTrainable, truth: ToyTrainable) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(limits: Limits = LIMITS, method: str = METHOD, bounds: Bounds = UNBOUND) -> Bench:
        made.append(Bench(tmp_path / FILE, toy, truth, limits, method, bounds))
        return made[-1]

    yield make
    for bench in made:
        bench.store.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


def proposal(learner: Learner) -> Proposal:
    made = learner.update()
    assert isinstance(made, Proposal), made
    return made


def test_it_learns(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """Eleven exact labels bring the held-out force error from above 0.1 to below 0.01 eV/Å."""
    bench.learn([cluster() for _ in range(11)])
    made = proposal(bench.learner)

    assert (made.metrics["labels"], made.metrics["held_out"]) == (8, 3)
    before, after = made.metrics["holdout_rmse_base"], made.metrics["holdout_rmse"]
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert before > 0.1
    assert after < LEARNT


def test_energies_are_calibrated_apart_from_forces(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """Held-out labels whose energies are off by 0.1 eV an atom, each by another sign, widen what is said of energies, and nothing of forces."""
    bench.learn([cluster() for _ in range(11)])
    before, held_out = proposal(bench.learner), bench.learner.sets[Role.HOLDOUT]
    held_out[:] = [replace(one, energy_label=one.energy_label + 0.6 * (-1) ** k) for k, one in enumerate(held_out)]
    made = proposal(bench.learner)

    assert made.metrics["variance_factor"] == before.metrics["variance_factor"]
    widened = made.metrics["energy_variance_factor"] / before.metrics["energy_variance_factor"]  # type: ignore[operator]
    assert widened > 10
    assert before.energy_covariance is not None
    assert made.energy_covariance is not None
    np.testing.assert_allclose(made.energy_covariance, widened * before.energy_covariance)
    bench.learner.serve(made.readout, made.covariance, made.ratios, made.energy_covariance)
    assert bench.learner.energy_covariance is made.energy_covariance


def test_it_learns_from_the_first_label(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """One label already makes a proposal whose error on that label is smaller than the base's."""
    bench.learn([cluster()])
    made = proposal(bench.learner)

    assert made.metrics["train_rmse"] < made.metrics["train_rmse_base"]  # type: ignore[operator]
    assert made.metrics["holdout_rmse"] is None


def test_uncertainty_falls_where_it_learnt(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """After an update serves, the frames that wait have lower scores, and those below the threshold are dropped with a reason."""
    frames = [cluster() for _ in range(8)]
    for frame in frames:
        bench.flag(frame)
    before = {waiting.frame: waiting.priority for waiting in bench.store.pending()}
    for _ in range(4):
        bench.label_next()
    made = proposal(bench.learner)
    bench.learner.serve(made.readout, made.covariance)
    after = {waiting.frame: waiting.priority for waiting in bench.store.pending()}

    assert len(after) == 4
    assert all(after[frame] < before[frame] for frame in after)


def test_frames_that_an_update_made_certain_are_dropped(
    make_bench: Callable[..., Bench], cluster: Callable[..., Frame], toy: ToyTrainable
) -> None:
    """A frame that looks like one that was learnt needs no label any more, and says why."""
    bench = make_bench(Limits(force_error=1.0, budget=60))
    frame = cluster()
    bench.flag(frame, Reason.INITIAL)
    bench.label_next()
    twin = Frame(frame.numbers, frame.positions + 1e-4)
    assert bench.flag(twin)
    made = proposal(bench.learner)
    bench.learner.serve(made.readout, made.covariance)

    assert bench.store.pending() == []
    (note,) = bench.store._db.execute("SELECT note FROM queue WHERE state = 'dropped'").fetchone()
    assert note.startswith("an update brought its force uncertainty down to 0.")


def test_a_candidate_is_on_disk_when_it_was_taken(bench: Bench, tmp_path: Path, cluster: Callable[..., Frame]) -> None:
    """Another process reads the flag and the place in the queue as soon as `candidate` has returned."""
    frame = cluster()
    assert bench.flag(frame, Reason.INITIAL)
    reader = Store(tmp_path / FILE, read_only=True)
    (queued,) = reader.pending()
    key = reader.frame(queued.frame).key
    reader.close()

    assert key == frame.key


def test_certain_frames_are_kept_without_a_label(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """A frame that force rows find certain enough is in the store as a flag and not in the queue."""
    bench = make_bench(Limits(force_error=1e6, budget=60))

    assert not bench.flag(cluster())
    assert {state: count for state, count in bench.store.counts().items() if count} == {"flags": 1}


def test_a_frame_is_labelled_once(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """A frame that is flagged again while it waits, or after its label, gets no second label."""
    frame = cluster()
    assert bench.flag(frame)
    assert not bench.flag(frame)
    bench.label_next()

    assert not bench.flag(frame)
    assert bench.learner.next_frame() is None


def test_a_known_frame_takes_no_place_from_others(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """A full queue loses nothing to a frame that is in it already."""
    bench = make_bench(Limits(force_error=1e-6, budget=60, queue=2))
    first, second = cluster(), cluster()
    assert bench.flag(first, Reason.INITIAL)
    assert bench.flag(second)

    assert not bench.flag(first, Reason.INITIAL)
    assert len(bench.store.pending()) == 2


def test_a_second_label_of_a_frame_is_not_learnt(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """Two tasks of one frame, as after a restart, count once."""
    bench.flag(cluster())
    chosen = bench.learner.next_frame()
    assert chosen is not None
    first, second = (bench.store.start_task(chosen.frame, "label-0", pid, chosen.role) for pid in (1, 2))
    told = label_from(bench.truth, bench.store.frame(chosen.frame))

    assert bench.learner.label(first, chosen.frame, told)
    assert not bench.learner.label(second, chosen.frame, told)
    assert bench.learner.n_labels == 1


def test_a_restart_knows_as_much(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """A learner on the same store has the same labels in the same roles and proposes the same readout to the last bit."""
    bench = make_bench()
    bench.learn([cluster() for _ in range(6)])
    bench.flag(cluster())
    again = make_bench()

    assert {role: len(found) for role, found in again.learner.sets.items()} == {Role.TRAIN: 4, Role.HOLDOUT: 2}
    one, other = proposal(bench.learner), proposal(again.learner)
    np.testing.assert_array_equal(one.readout, other.readout)
    np.testing.assert_array_equal(one.covariance, other.covariance)
    assert one.metrics == other.metrics
    assert bench.learner.next_frame() == again.learner.next_frame()


def test_labels_of_another_method_are_not_learnt(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """A learner of another method starts with nothing, and a label of a method that is not its own is stored but not learnt."""
    bench = make_bench()
    bench.learn([cluster() for _ in range(3)])
    other = make_bench(method="toy:better")

    assert other.learner.n_labels == 0
    assert other.flag(cluster())
    chosen = other.learner.next_frame()
    assert chosen is not None
    task = other.store.start_task(chosen.frame, "label-0", 1, chosen.role)
    assert not other.learner.label(task, chosen.frame, label_from(other.truth, other.store.frame(chosen.frame)))
    assert other.learner.n_labels == 0
    assert len(other.store.labels(METHOD)) == 4


def test_nonsense_is_refused(bench: Bench, cluster: Callable[..., Frame], rng: np.random.Generator) -> None:
    """Training labels with random forces make an update that held-out labels refuse, and nothing of the learner has changed."""
    good = bench.learner.readout.copy()

    def random_forces(told: Label) -> Label:
        forces: Array = 3.0 * rng.standard_normal(told.forces.shape)
        return Label(told.energy, forces, told.method, 0.0)

    for _ in range(6):
        assert bench.flag(cluster())
    roles = []
    while (chosen := bench.learner.next_frame()) is not None:
        roles.append(bench.label_next(random_forces if chosen.role is Role.TRAIN else lambda told: told))
    verdict = bench.learner.update()

    assert roles.count(Role.HOLDOUT) == 2
    assert isinstance(verdict, Refusal)
    assert "held-out" in verdict.reason
    np.testing.assert_array_equal(bench.learner.readout, good)


def test_an_update_that_cannot_be_computed_is_refused(bench: Bench) -> None:
    """Without any label there is no scale and no fit: a refusal with a reason, not an exception."""
    verdict = bench.learner.update()

    assert isinstance(verdict, Refusal)
    assert verdict.reason


def test_a_label_of_another_frame_is_a_failure(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """Forces of another number of atoms are not stored as a label: the task fails with a reason, now and after a restart."""
    bench.flag(cluster())
    chosen = bench.learner.next_frame()
    assert chosen is not None
    task = bench.store.start_task(chosen.frame, "label-0", 1, chosen.role)

    assert not bench.learner.label(task, chosen.frame, Label(-1.0, np.zeros((5, 3)), METHOD, 0.0))
    assert bench.store.labels() == []
    assert bench.store.failures() == [(chosen.frame, "the label has forces of 5 atoms, its frame has 6")]


def test_a_frame_without_a_finite_uncertainty_is_only_a_flag(bench: Bench) -> None:
    """Atoms on top of each other have force rows that are not finite: the frame is kept, not queued, and nothing else happens."""
    frame = Frame(np.array([1, 1]), np.zeros((2, 3)))

    assert not bench.learner.candidate(
        frame, session="s", step=1, reason=Reason.UNCERTAIN, score=0.5, version=0, energy=0.0, forces=np.zeros((2, 3))
    )
    assert bench.store.counts()["flags"] == 1
    assert bench.store.pending() == []


def test_only_audits_lower_the_quantile(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """A label that lay within the score lowers the quantile if the frame was picked at random, and not if the score picked it."""
    start = bench.learner.quantile.q

    def as_served(told: Label) -> Label:
        frame = bench.store.frame(chosen)
        return Label(told.energy, bench.toy.predict([frame])[0].forces, told.method, 0.0)

    for reason, lower in ((Reason.INITIAL, False), (Reason.UNCERTAIN, False), (Reason.AUDIT, True)):
        assert bench.flag(cluster(), reason)
        waiting = bench.learner.next_frame()
        assert waiting is not None
        chosen = waiting.frame
        bench.label_next(as_served)
        assert (bench.learner.quantile.q < start) is lower


def test_held_out_labels_bring_the_quantile_of_a_new_version_down(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """What bad versions have raised it to does not stay: the ratios are those of the held-out labels under what is about to serve."""
    bench.learn([cluster() for _ in range(4 * FEWEST)])
    learner = bench.learner
    learner.quantile = replace(learner.quantile, q=7.0)
    made = proposal(learner)

    held_out, change = learner.sets[Role.HOLDOUT], made.readout - bench.toy.readout()
    ratios = [
        error_ratio(one.residual(change), np.zeros((len(one.forces_label), 3)), force_std(one.rows, made.covariance)) for one in held_out
    ]
    assert len(ratios) >= FEWEST
    assert made.ratios == pytest.approx(ratios)
    learner.serve(made.readout, made.covariance)
    assert learner.quantile.q == 7.0
    learner.serve(made.readout, made.covariance, made.ratios)
    assert 2.0 <= learner.quantile.q <= max(2.0, 1.5 * max(ratios)) < 7.0


def test_the_scale_of_a_new_version_is_known_at_once(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """Unknown until a frame has come; from then on each version has the ratio of its own spread and score on the last frames, no other's."""
    assert not bench.learner.scale.known
    frame = cluster()
    bench.flag(frame)
    assert bench.learner.scale.known
    bench.label_next()
    proposal = bench.learner.update()
    assert isinstance(proposal, Proposal)
    before = bench.learner.scale.sigma(1.0)

    bench.learner.serve(proposal.readout, proposal.covariance)
    toy = bench.toy
    (said,) = toy.predict([frame])
    assert said.features is not None
    spread = force_std(toy.force_rows(frame).rows, proposal.covariance).max()
    score = atom_lpr_max(said.features, frame, toy, proposal.covariance)
    assert bench.learner.scale.sigma(score) == pytest.approx(spread)
    assert bench.learner.scale.sigma(1.0) != pytest.approx(before)


def atom_lpr_max(features: Array, frame: Frame, toy: ToyTrainable, covariance: Array) -> float:
    return float(AtomScore(covariance, len(toy.spec.elements))(features, species_index(frame.numbers, toy.spec.elements)).max())


def test_the_queue_is_bounded(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """However many frames are flagged, no more wait than the queue holds, and no more are accepted than the budget has labels."""
    bench = make_bench(Limits(force_error=1e-6, budget=6, queue=3))
    for _ in range(12):
        bench.flag(cluster())
    assert len(bench.store.pending()) == 3

    for _ in range(20):
        if bench.learner.next_frame() is not None:
            bench.label_next()
        bench.flag(cluster())
    assert bench.store.counts()["converged"] + bench.store.counts()["pending"] == 6


def turned(told: Label) -> Label:
    """A label whose forces have the wrong sign."""
    return Label(told.energy, -told.forces, told.method, told.seconds)


@pytest.mark.parametrize("place", [0, 5, 11])
def test_a_label_that_the_others_contradict_is_set_aside(
    place: int, make_bench: Callable[..., Bench], cluster: Callable[..., Frame]
) -> None:
    """Whether it comes first, among others or last, learnt from or held out: the fit is made without it, and a restart knows that."""
    bench = make_bench()
    wrong = 0
    for turn in range(12):
        frame = cluster()
        assert bench.flag(frame)
        bench.label_next(turned if turn == place else lambda told: told)
        state = bench.store.label_state(frame.key)
        assert state is not None
        wrong = state[0] if turn == place else wrong
    made = proposal(bench.learner)

    (aside,) = bench.store.quarantined()
    assert (aside.stored.frame_id, aside.check) == (wrong, "forces")
    assert bench.told == [("label set aside", {"frame": wrong, "check": "forces", "reason": aside.reason})]
    assert bench.learner.n_labels == 11
    assert made.metrics["holdout_rmse"] < LEARNT  # type: ignore[operator]
    again = proposal(make_bench().learner)
    np.testing.assert_array_equal(again.readout, made.readout)


def test_a_label_that_the_others_agree_with_comes_back(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """Set aside by an earlier learner, a good label is learnt from again, at once or after a restart; a bad one is not."""
    bench = make_bench()
    for turn in range(12):
        assert bench.flag(cluster())
        bench.label_next(turned if turn == 6 else lambda told: told)
    bench.learner.update()
    (bad,) = bench.store.quarantined()
    good = bench.store.labels()[2]
    bench.store.set_aside(good.id, "forces", "a network that knew little thought so")
    before = proposal(make_bench().learner)
    for learner in (bench.learner, make_bench().learner):
        after = proposal(learner)
        assert learner.n_labels == 11
        np.testing.assert_allclose(after.readout, before.readout, rtol=1e-9)

    assert [held.stored.id for held in bench.store.quarantined()] == [bad.stored.id]
    assert bench.store.label_ids(METHOD) == sorted(bench.store.label_ids(METHOD))
    bench.store.set_aside(good.id, "net force", "what it says of itself is for a person to judge")
    make_bench().learner.update()
    assert len(bench.store.quarantined()) == 2


def test_labels_come_back_together(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """Several at once, learnt from and held out: each is judged by the labels that were believed before."""
    bench = make_bench()
    bench.learn([cluster() for _ in range(16)])
    before = proposal(make_bench().learner)
    aside = bench.store.labels()[1:6]
    for one in aside:
        bench.store.set_aside(one.id, "energy", "a network that knew little thought so")
    assert {one.role for one in aside} == {Role.TRAIN, Role.HOLDOUT}
    again = make_bench()
    assert again.learner.n_labels == 11

    after = proposal(again.learner)

    assert again.learner.n_labels == 16
    assert again.store.quarantined() == []
    np.testing.assert_allclose(after.readout, before.readout, rtol=1e-9)


def test_a_released_label_is_learnt_and_believed(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """The next start takes it with the others, and does not set it aside again."""
    bench = make_bench()
    for turn in range(12):
        assert bench.flag(cluster())
        bench.label_next(turned if turn == 6 else lambda told: told)
    bench.learner.update()
    (aside,) = bench.store.quarantined()
    bench.store.release(aside.stored.frame_id)
    again = make_bench()
    again.learner.update()

    assert again.learner.n_labels == 12
    assert again.store.quarantined() == []


def test_what_another_learner_set_aside_is_forgotten(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """Two learners on one store, as around a fine-tune, agree about what there is to learn from."""
    bench = make_bench()
    bench.learn([cluster() for _ in range(4)])
    other = make_bench()
    (first, *_) = bench.store.labels()
    bench.store.set_aside(first.id, "forces", "by somebody else")
    other.learner.update()

    assert other.learner.n_labels == 3


def test_labels_are_judged_where_all_errors_count_alike(
    make_bench: Callable[..., Bench], cluster: Callable[..., Frame], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is far off counts less in what serves; in the judgement it would look stranger than it is, so there it counts in full."""
    bench, judged = make_bench(), []

    def far_off(told: Label) -> Label:
        return Label(told.energy, told.forces + 8.0 * rng.standard_normal(told.forces.shape), told.method, 0.0)

    def doubtful(train: list[Labelled], held_out: list[Labelled], fitted: Fit, refit: quality.Refit, spared: list[Labelled]) -> None:
        judged.append((train.copy(), fitted, refit(train)))

    monkeypatch.setattr(quality, "doubtful", doubtful)
    for turn in range(8):
        assert bench.flag(cluster())
        bench.label_next(far_off if turn == 4 else lambda told: told)
    made = proposal(bench.learner)

    ((train, fitted, again),) = judged
    anchors = pair_rows(bench.toy, {1, 8})
    wanted, alike = (fit(train, bench.toy.readout(), replace(NARROW, far=far), anchors=anchors) for far in (NARROW.far, math.inf))
    assert np.abs(wanted.readout - alike.readout).max() > 0.05
    np.testing.assert_allclose(fitted.readout, alike.readout, rtol=1e-9)
    np.testing.assert_allclose(again.readout, alike.readout, rtol=1e-9)
    np.testing.assert_allclose(made.readout, wanted.readout, rtol=1e-9)


def test_a_label_beyond_its_bounds_is_set_aside(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """It is kept with the reason and told, nothing is learnt from it, and its frame is not labelled a second time."""
    bench = make_bench(bounds=Bounds(force=1e-3))
    frame = cluster()
    assert bench.flag(frame)
    chosen = bench.learner.next_frame()
    assert chosen is not None
    task = bench.store.start_task(chosen.frame, "label-0", 1, chosen.role)

    assert not bench.learner.label(task, chosen.frame, label_from(bench.truth, frame))
    (aside,) = bench.store.quarantined()
    assert (aside.check, aside.state) == ("largest force", "held")
    assert [event for event, _ in bench.told] == ["label set aside"]
    assert bench.learner.n_labels == 0
    assert not bench.flag(frame)
    assert bench.learner.next_frame() is None


def test_the_twin_of_a_frame_under_way_waits(bench: Bench, cluster: Callable[..., Frame], rng: np.random.Generator) -> None:
    """Of two frames that are nearly alike one is labelled; then another one comes next, though the twin is more uncertain."""
    frame, other, apart = cluster(), cluster(), cluster()
    twin = Frame(frame.numbers, frame.positions + 1e-4 * rng.standard_normal(frame.positions.shape))
    for one in (apart, frame, twin, other):
        assert bench.flag(one)
    held_out, first, second, third = (waits.frame for waits in bench.store.pending())
    bench.store.set_priority(second, 9.0)
    bench.store.start_task(held_out, "label-0", 1, Role.HOLDOUT)
    bench.store.start_task(first, "label-1", 1, Role.TRAIN)
    chosen = bench.learner.next_frame()

    assert chosen is not None
    assert chosen.frame == third


def test_a_frame_for_another_strategy_is_left(bench: Bench, cluster: Callable[..., Frame]) -> None:
    """What somebody wants labelled in another way is given only to those who label in that way."""
    assert bench.flag(cluster())
    chosen = bench.learner.next_frame()
    assert chosen is not None
    bench.store.add_failure(bench.store.start_task(chosen.frame, "label-0", 1), "no convergence")
    bench.store.retry(chosen.frame, "max_cycle=300")

    assert bench.learner.next_frame() is None
    given = bench.learner.next_frame("max_cycle=300")
    assert given is not None
    assert given.frame == chosen.frame


def test_nothing_is_begun_when_the_core_hours_are_spent(make_bench: Callable[..., Bench], cluster: Callable[..., Frame]) -> None:
    """A label of two hours ends a budget of one: what waits is not begun, nothing more is accepted, and there is a note."""
    bench = make_bench(Limits(force_error=1e-6, budget=60, core_hours=1.0))
    assert bench.flag(cluster())
    assert bench.flag(cluster())
    assert bench.learner.notes() == []
    bench.label_next(lambda told: Label(told.energy, told.forces, told.method, 7200.0))

    assert bench.learner.exhausted
    assert bench.learner.next_frame() is None
    assert not bench.flag(cluster())
    assert bench.learner.notes() == ["the 1 core-hours for labels are spent: none is begun any more"]
