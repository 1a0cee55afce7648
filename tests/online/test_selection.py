"""Who gets a label, what for, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tumbaga.online import selection
from tumbaga.online.records import Reason, Role
from tumbaga.online.selection import Limits, Spending, admit, stale
from tumbaga.online.store import Queued

LIMITS = Limits(force_error=0.2, budget=50, queue=3)
NOBODY = {Role.TRAIN: 0, Role.HOLDOUT: 0}


def waits(frame: int, priority: float, role: Role = Role.TRAIN, reason: Reason = Reason.UNCERTAIN) -> Queued:
    return Queued(frame, reason, role, priority)


def next_frame(queued: Sequence[Queued], started: dict[Role, int]) -> Queued | None:
    """The choice where the most uncertain frame is the one that tells most."""
    return selection.next_frame(queued, started, lambda others: max(others, key=lambda q: q.priority))


def test_every_fourth_label_is_held_out() -> None:
    """Of uncertain frames labelled one by one the 2nd, 6th, 10th … are held out and the others learnt from."""
    started = dict(NOBODY)
    held_out = []
    for label in range(1, 20):
        chosen = next_frame([waits(1, 0.5), waits(2, 0.3)], started)
        assert chosen is not None
        started[chosen.role] += 1
        held_out += [label] if chosen.role is Role.HOLDOUT else []

    assert held_out == [2, 6, 10, 14, 18]


def test_the_score_does_not_choose_what_is_held_out() -> None:
    """The newest waiting frame is held out, not the most uncertain one; the most uncertain one is learnt from."""
    queue = [waits(1, 0.2), waits(2, 0.9), waits(3, 0.5)]

    assert next_frame(queue, {Role.TRAIN: 1, Role.HOLDOUT: 0}) == waits(3, 0.5, Role.HOLDOUT)
    assert next_frame(queue, {Role.TRAIN: 1, Role.HOLDOUT: 1}) == waits(2, 0.9)


def test_audits_are_held_out_and_the_others_wait_to_be_learnt_from() -> None:
    """A random frame is held out whatever was accepted before; first and uncertain frames are accepted for learning."""
    roles = {reason: admit(reason, 9.0, [], NOBODY, 0, LIMITS).role for reason in Reason}

    assert roles == dict.fromkeys(Reason, Role.TRAIN) | {Reason.AUDIT: Role.HOLDOUT}


@pytest.mark.parametrize("reason", list(Reason))
def test_the_budget_ends_everything(reason: Reason) -> None:
    """Once as many frames were accepted as the budget has labels, none of any kind is."""
    assert admit(reason, 9.0, [], {Role.TRAIN: 40, Role.HOLDOUT: 9}, 5, LIMITS).role is not None

    refused = admit(reason, 9.0, [], {Role.TRAIN: 40, Role.HOLDOUT: 10}, 5, LIMITS)
    assert (refused.role, refused.note) == (None, "the label budget is spent")


@pytest.mark.parametrize(("accepted", "audits", "taken"), [(44, 0, True), (45, 0, False), (47, 3, True), (48, 3, False), (49, 8, True)])
def test_uncertain_frames_leave_a_tenth_of_the_budget_to_audits(accepted: int, audits: int, taken: bool) -> None:
    """Of 50 labels 45 are for frames picked by their uncertainty: a run without audits would not hear any more of what it serves."""
    by_role = {Role.TRAIN: accepted - audits, Role.HOLDOUT: audits}

    assert (admit(Reason.UNCERTAIN, 9.0, [], by_role, audits, LIMITS).role is not None) is taken
    assert admit(Reason.INITIAL, 0.0, [], by_role, audits, LIMITS).role is Role.TRAIN
    assert admit(Reason.STALLED, 9.0, [], by_role, audits, LIMITS).role is Role.TRAIN
    if audits < 8:
        assert admit(Reason.AUDIT, 0.0, [], by_role, audits, LIMITS).role is Role.HOLDOUT


def test_a_budget_of_a_few_labels_keeps_none_back() -> None:
    """A tenth of nine is no label."""
    assert admit(Reason.UNCERTAIN, 9.0, [], {Role.TRAIN: 8, Role.HOLDOUT: 0}, 0, Limits(0.2, budget=9)).role is Role.TRAIN


def test_a_budget_of_none_labels_nothing() -> None:
    """With a budget of 0 not even the first frame is accepted."""
    assert admit(Reason.INITIAL, 9.0, [], NOBODY, 0, Limits(0.2, budget=0)).role is None


@pytest.mark.parametrize(("score", "taken"), [(0.19, False), (0.2, False), (0.21, True), (float("inf"), True)])
def test_force_rows_decide_about_uncertain_frames(score: float, taken: bool) -> None:
    """An uncertain frame is accepted only if its exact score is above the force error to hold."""
    assert (admit(Reason.UNCERTAIN, score, [], NOBODY, 0, LIMITS).role is not None) is taken


@pytest.mark.parametrize("reason", [Reason.INITIAL, Reason.AUDIT])
def test_first_frames_and_audits_need_no_uncertainty(reason: Reason) -> None:
    """A first or a random frame is accepted with a score of nothing."""
    assert admit(reason, 0.0, [], NOBODY, 0, LIMITS).role is not None


def test_audits_have_their_share() -> None:
    """At least one audit is accepted, and after that a fifth of all labels at most as long as other frames wait; else a fifth of the budget."""
    few, many, others = {Role.TRAIN: 1, Role.HOLDOUT: 1}, {Role.TRAIN: 22, Role.HOLDOUT: 8}, [waits(1, 0.5)]

    for queue in ([], others):
        assert admit(Reason.AUDIT, 0.0, queue, NOBODY, 0, LIMITS).role is Role.HOLDOUT
    assert admit(Reason.AUDIT, 0.0, others, few, 1, LIMITS).role is None
    assert admit(Reason.AUDIT, 0.0, others, many, 5, LIMITS).role is Role.HOLDOUT
    assert admit(Reason.AUDIT, 0.0, others, many, 6, LIMITS).role is None
    assert admit(Reason.AUDIT, 0.0, [], few, 1, LIMITS).role is Role.HOLDOUT
    assert admit(Reason.AUDIT, 0.0, [], many, 9, LIMITS).role is Role.HOLDOUT
    assert admit(Reason.AUDIT, 0.0, [], many, 10, LIMITS).role is None


def test_a_full_queue_keeps_the_most_uncertain() -> None:
    """In a full queue an uncertain frame takes the place of the least uncertain one, and of none that is as uncertain."""
    queue = [waits(1, 0.5), waits(2, 0.3), waits(3, 0.4)]

    better = admit(Reason.UNCERTAIN, 0.31, queue, {Role.TRAIN: 3, Role.HOLDOUT: 1}, 0, LIMITS)
    assert (better.role, better.replaces) == (Role.TRAIN, 2)
    same = admit(Reason.UNCERTAIN, 0.3, queue, {Role.TRAIN: 3, Role.HOLDOUT: 1}, 0, LIMITS)
    assert (same.role, same.replaces) == (None, None)


@pytest.mark.parametrize("reason", [Reason.INITIAL, Reason.AUDIT])
def test_first_frames_and_audits_find_a_place(reason: Reason) -> None:
    """In a full queue a first or a random frame takes the place of the least uncertain one, however uncertain that is."""
    queue = [waits(1, 0.5), waits(2, 0.3), waits(3, 0.4)]

    assert admit(reason, 0.0, queue, {Role.TRAIN: 3, Role.HOLDOUT: 0}, 0, LIMITS).replaces == 2


def test_first_frames_and_audits_are_not_replaced() -> None:
    """A queue full of first and random frames takes nothing more."""
    queue = [waits(1, 0.0, reason=Reason.INITIAL), waits(2, 0.0, Role.HOLDOUT, Reason.AUDIT), waits(3, 0.0, reason=Reason.INITIAL)]

    assert admit(Reason.UNCERTAIN, 9.0, queue, {Role.TRAIN: 2, Role.HOLDOUT: 1}, 1, LIMITS).role is None


def test_a_label_that_was_begun_before_comes_first() -> None:
    """A label whose worker was stopped is begun again before anything else, in the role it had."""
    begun = Queued(2, Reason.UNCERTAIN, Role.HOLDOUT, 0.1, tried=True)

    assert next_frame([waits(1, 9.0, reason=Reason.INITIAL), begun, waits(3, 9.0)], {Role.TRAIN: 0, Role.HOLDOUT: 9}) == begun


def test_first_frames_come_first() -> None:
    """A session's first frame is labelled before all others, the oldest first."""
    queue = [waits(1, 9.0), waits(2, 9.0, Role.HOLDOUT), waits(3, 0.0, reason=Reason.INITIAL), waits(4, 1.0, reason=Reason.INITIAL)]
    chosen = next_frame(queue, {Role.TRAIN: 5, Role.HOLDOUT: 0})

    assert chosen is not None
    assert chosen.frame == 3


@pytest.mark.parametrize(("labelled", "frame"), [((1, 0), 1), ((3, 1), 2), ((4, 1), 1), ((0, 0), 2), ((6, 2), 2), ((7, 2), 1)])
def test_held_out_labels_are_a_third_of_the_others(labelled: tuple[int, int], frame: int) -> None:
    """A held-out frame is next while its kind has fewer than a third of the training labels, else the most uncertain one."""
    queue = [waits(1, 0.3, Role.HOLDOUT), waits(2, 0.9), waits(3, 0.5)]
    chosen = next_frame(queue, {Role.TRAIN: labelled[0], Role.HOLDOUT: labelled[1]})

    assert chosen is not None
    assert chosen.frame == frame


def test_held_out_frames_are_labelled_when_nothing_else_waits() -> None:
    """A worker is never idle while a frame waits, and has nothing to do when none does."""
    chosen = next_frame([waits(1, 0.3, Role.HOLDOUT)], {Role.TRAIN: 0, Role.HOLDOUT: 9})

    assert chosen is not None
    assert next_frame([], NOBODY) is None


def test_only_uncertain_training_frames_grow_stale() -> None:
    """What an update made certain leaves the queue; first, random, held-out, uncertain and unscored frames stay."""
    queue = [
        waits(1, 0.5),
        waits(2, 0.5),
        waits(3, 0.5, Role.HOLDOUT),
        waits(4, 0.5, reason=Reason.INITIAL),
        waits(5, 0.5, Role.HOLDOUT, Reason.AUDIT),
        waits(6, 0.5),
        waits(7, 0.5),
    ]
    scores = {1: 0.119, 2: 0.121, 3: 0.0, 4: 0.0, 5: 0.0, 7: float("nan")}

    assert stale(queue, scores, LIMITS) == [1]


def test_waiting_can_be_better_than_a_label() -> None:
    """Where no uncertain frame is worth a label now, an audit that waits is labelled, and without one nothing is; first frames still are."""
    nothing = [waits(1, 0.9), waits(2, 0.5)]
    audit, first = waits(3, 0.1, Role.HOLDOUT, Reason.AUDIT), waits(4, 0.1, reason=Reason.INITIAL)
    enough = {Role.TRAIN: 3, Role.HOLDOUT: 9}

    assert selection.next_frame(nothing, enough, lambda others: None) is None
    assert selection.next_frame([*nothing, audit], enough, lambda others: None) == audit
    assert selection.next_frame([*nothing, audit, first], enough, lambda others: None) == first


def test_what_is_held_out_is_never_chosen_by_its_gain() -> None:
    """When it is the turn of a held-out frame, nobody asks which one would tell most."""

    def never(others: Sequence[Queued]) -> Queued | None:
        raise AssertionError("asked")

    assert selection.next_frame([waits(1, 0.9), waits(2, 0.5)], {Role.TRAIN: 1, Role.HOLDOUT: 0}, never) == waits(2, 0.5, Role.HOLDOUT)


def test_the_last_fifth_of_the_budget_is_for_worse_frames() -> None:
    """Once four fifths of the labels are given away, an uncertain frame needs 1.25 times the uncertainty, and the user is told."""
    before, after = {Role.TRAIN: 30, Role.HOLDOUT: 9}, {Role.TRAIN: 30, Role.HOLDOUT: 10}

    assert admit(Reason.UNCERTAIN, 0.21, [], before, 0, LIMITS).role is Role.TRAIN
    assert admit(Reason.UNCERTAIN, 0.25, [], after, 0, LIMITS).note == "force uncertainty 0.250 eV/Å from force rows is within 0.25"
    assert admit(Reason.UNCERTAIN, 0.26, [], after, 0, LIMITS).role is Role.TRAIN
    assert admit(Reason.STALLED, 0.0, [], after, 0, LIMITS).role is Role.TRAIN
    assert Spending(39).notes(LIMITS) == []
    assert Spending(40).notes(LIMITS) == ["40 of 50 labels are given away: frames get one above 0.25 eV/Å from now on, in place of 0.2"]
    assert Spending(45).notes(LIMITS) == ["what is left of the label budget is kept for audits"]
    assert Spending(45, audits=1).notes(LIMITS) != Spending(45).notes(LIMITS)
    assert Spending(50).notes(LIMITS) == ["the label budget is spent"]


def test_core_hours_are_a_budget_of_their_own() -> None:
    """Labels that took their core-hours end all admission whatever the number of labels; without such a limit time does not count."""
    limits = Limits(force_error=0.2, budget=50, core_hours=2.0)

    assert admit(Reason.STALLED, 9.0, [], NOBODY, 0, limits, core_hours=1.9).role is Role.TRAIN
    refused = admit(Reason.STALLED, 9.0, [], NOBODY, 0, limits, core_hours=2.0)
    assert (refused.role, refused.note) == (None, "the 2 core-hours for labels are spent: none is begun any more")
    assert Spending(3, 2.0).notes(limits) == [refused.note]
    assert Spending(3, 2.0).timed_out(limits)
    assert not Spending(3, 1e9).timed_out(LIMITS)
    assert admit(Reason.STALLED, 9.0, [], NOBODY, 0, LIMITS, core_hours=1e9).role is Role.TRAIN
