"""Labels that are doubted: kept, not learnt from, released by hand or computed once more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.online.errors import StoreError
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Store

METHOD = "test:a"


def frame(seed: int = 0) -> Frame:
    return Frame(np.array([29, 29]), np.random.default_rng(seed).standard_normal((2, 3)), 9.0 * np.eye(3), True)


def label(seed: int = 0, method: str = METHOD) -> Label:
    rng = np.random.default_rng([seed, 1])
    return Label(-53210.1 + seed / 3, rng.standard_normal((2, 3)), method, 1.5, {"cycles": 12}, virial=rng.standard_normal((3, 3)))


def queue(store: Store, seed: int = 0, role: Role = Role.TRAIN) -> int:
    served = np.zeros((2, 3))
    number = store.add_flag(frame(seed), session="s", step=7, reason=Reason.UNCERTAIN, score=0.3, version=0, energy=-1.0, forces=served)
    store.enqueue(number, Reason.UNCERTAIN, role, 0.3)
    return number


def set_aside(store: Store, seed: int = 0) -> int:
    number = queue(store, seed)
    task = store.start_task(number, "label-0", 11)
    assert store.quarantine(task, label(seed), "neighbours", "its forces are 9 eV/Å away from its neighbours'", {"distance": 9.0})
    return number


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / FILE, clock=lambda: 1000.0) as made:
        yield made


def test_a_doubtful_label_is_kept_and_not_given_to_anybody(store: Store) -> None:
    """It stands in quarantine with every bit, check, reason and numbers, and not among the labels; its frame is not queued again."""
    number = set_aside(store)
    (held,) = store.quarantined()

    assert store.labels() == []
    assert store.labels(METHOD) == []
    assert store.label_ids(METHOD) == []
    assert store.label_of(number, METHOD) is None
    assert (held.stored.frame_id, held.stored.role, held.stored.frame.key) == (number, Role.TRAIN, frame().key)
    assert (held.check, held.numbers, held.state) == ("neighbours", {"distance": 9.0}, "held")
    assert "9 eV/Å away" in held.reason
    assert held.stored.label.energy == label().energy
    np.testing.assert_array_equal(held.stored.label.forces, label().forces)
    np.testing.assert_array_equal(held.stored.label.virial, label().virial)
    assert {state: count for state, count in store.counts().items() if count} == {"quarantined": 1, "flags": 1}
    assert store.label_state(frame().key) == (number, "quarantined")
    assert not store.enqueue(number, Reason.AUDIT, Role.HOLDOUT, 1.0)
    assert store.running() == []
    assert store.queued_by_role()[Role.TRAIN] == 1  # it was paid for


def test_it_is_set_aside_once(store: Store) -> None:
    """A result that is read again after a kill changes nothing, whatever is asked for it."""
    number = queue(store)
    task = store.start_task(number, "label-0", 11)
    assert store.quarantine(task, label(), "net force", "it is 3 eV/Å")

    assert not store.quarantine(task, label(), "net force", "it is 3 eV/Å")
    assert not store.add_label(task, label())
    assert not store.quarantine(99, label(), "net force", "of a task that nobody knows")
    assert len(store.quarantined()) == 1
    assert store.labels() == []


def test_a_label_that_was_learnt_from_can_be_set_aside(store: Store) -> None:
    """It leaves the labels under its own number, so that versions that it made still name it; that is done once."""
    number = queue(store)
    store.add_label(store.start_task(number, "label-0", 11), label())
    (stored,) = store.labels()
    store.set_aside(stored.id, "refit", "all its neighbours contradict it", {"residual": 2.0})

    assert store.labels() == []
    assert [held.stored.id for held in store.quarantined()] == [stored.id]
    assert store.counts()["quarantined"] == 1
    with pytest.raises(StoreError, match=f"no label {stored.id} that could be set aside"):
        store.set_aside(stored.id, "refit", "twice")


def test_a_released_label_is_a_label(store: Store) -> None:
    """Released by hand it is among the labels with its role, and no longer in quarantine."""
    number = set_aside(store)
    released = store.release(number)

    assert [one.id for one in store.labels(METHOD)] == [released.id]
    np.testing.assert_array_equal(released.label.virial, label().virial)
    assert store.quarantined() == []
    assert store.label_state(frame().key) == (number, "labelled")
    with pytest.raises(StoreError, match=f"no label of frame {number} in quarantine"):
        store.release(number)


def test_a_label_that_comes_back_is_a_label(store: Store) -> None:
    """Taken back it is among the labels with its number, out of quarantine, and not believed whatever comes, as a released one is."""
    number = set_aside(store)
    (held,) = store.quarantined()
    assert store.take_back(held.stored.id, "agrees with the others by now")

    assert store.label_ids(METHOD) == [held.stored.id]
    assert store.quarantined() == []
    assert store.released() == set()
    assert store.label_state(frame().key) == (number, "labelled")
    assert not store.take_back(held.stored.id, "twice")
    store.set_aside(held.stored.id, "forces", "once more")
    assert [one.reason for one in store.quarantined()] == ["once more"]
    assert store.take_back(held.stored.id, "and back")


def test_no_label_comes_back_beside_another_one(store: Store) -> None:
    """A frame that was queued again is for somebody else to judge, and no frame has two labels."""
    number = set_aside(store)
    (held,) = store.quarantined()
    store.retry(number, "newton")
    assert not store.take_back(held.stored.id, "it waits")
    assert store.add_label(store.start_task(number, "label-0", 11), label(7))
    assert not store.take_back(held.stored.id, "it has another one")
    assert [one.label.energy for one in store.labels()] == [label(7).energy]


def test_another_try_gives_another_label(store: Store) -> None:
    """A frame that is retried waits again with its strategy; its new label is a label, and the first one stays in quarantine."""
    number = set_aside(store)
    store.retry(number, "newton")
    (waiting,) = store.pending()
    (held,) = store.quarantined()

    assert (waiting.frame, waiting.strategy, waiting.role, waiting.tried) == (number, "newton", Role.TRAIN, True)
    assert (held.state, held.strategy) == ("retried", "newton")
    store.drop(number, "an update made it certain")  # which is no reason here: somebody asked for it
    assert len(store.pending()) == 1
    assert store.add_label(store.start_task(number, "label-0", 11), label(7))
    assert [one.label.energy for one in store.labels()] == [label(7).energy]
    assert [one.stored.label.energy for one in store.quarantined()] == [label().energy]
    assert store.spent() == (2, 3.0)
    with pytest.raises(StoreError, match=f"frame {number}: the frame has another one of {METHOD}"):
        store.release(number)


def test_another_try_may_be_set_aside_as_well(store: Store) -> None:
    """Both labels are in quarantine then, and the newer one is released."""
    number = set_aside(store)
    store.retry(number, "newton")
    assert store.quarantine(store.start_task(number, "label-0", 11), label(7), "neighbours", "still far off")

    assert [one.stored.label.energy for one in store.quarantined()] == [label().energy, label(7).energy]
    assert store.counts()["quarantined"] == 1
    assert store.release(number).label.energy == label(7).energy
    assert [one.stored.label.energy for one in store.quarantined()] == [label().energy]


def test_a_label_that_waited_for_another_try_can_be_released(store: Store) -> None:
    """Released before anybody began, its frame waits no more; while somebody works at it, it cannot be released."""
    number, other = set_aside(store), set_aside(store, 1)
    store.retry(number, "newton")
    store.retry(other, "newton")
    store.release(number)
    store.start_task(other, "label-0", 11)

    assert store.pending() == []
    with pytest.raises(StoreError, match=f"frame {other} now: the frame is being labelled"):
        store.release(other)
    assert len(store.quarantined()) == 1


def test_a_failed_try_leaves_the_first_label_in_quarantine(store: Store) -> None:
    """Nothing is lost by trying: a failure counts as one, and the first label can still be released."""
    number = set_aside(store)
    store.retry(number, "newton")
    store.add_failure(store.start_task(number, "label-0", 11), "no convergence")

    assert store.counts()["failed"] == 1
    assert store.release(number).label.energy == label().energy
    assert {state: count for state, count in store.counts().items() if count} == {"converged": 1, "flags": 1}


def test_a_failed_frame_can_be_tried_in_another_way(store: Store) -> None:
    """A failure is no end either; a frame that is labelled or waits is not tried again."""
    number, done = queue(store), queue(store, 1)
    store.add_failure(store.start_task(number, "label-0", 11), "no convergence")
    store.add_label(store.start_task(done, "label-0", 11), label(1))
    store.retry(number, "smearing")

    assert [(one.frame, one.strategy) for one in store.pending()] == [(number, "smearing")]
    for frame_id in (number, done):
        with pytest.raises(StoreError, match=f"cannot queue frame {frame_id} again"):
            store.retry(frame_id, "newton")
    with pytest.raises(StoreError, match="no queued frame 41"):
        store.retry(41, "newton")


def test_a_doubtful_second_method_leaves_the_first_label(store: Store) -> None:
    """A frame with a good label of one method stays labelled when that of another method is set aside."""
    number = queue(store)
    store.add_label(store.start_task(number, "label-0", 11), label())
    store.quarantine(store.start_task(number, "label-0", 11), label(1, "test:b"), "net force", "it is 3 eV/Å")

    assert store.label_state(frame().key) == (number, "labelled")
    assert [one.label.method for one in store.labels()] == [METHOD]


def test_what_labels_cost(tmp_path: Path) -> None:
    """Core-seconds count labels, doubtful ones, failures, lost and stopped tasks, each by its cores; a lost one by its limit at most."""
    now = [0.0]
    with Store(tmp_path / FILE, clock=lambda: now[0]) as store:
        tasks = [store.start_task(queue(store, seed), "label-0", 11, cores=4.0) for seed in range(6)]
        now[0] = 1000.0
        store.add_label(tasks[0], label(0))
        store.quarantine(tasks[1], label(1), "net force", "it is 3 eV/Å")
        assert store.spent() == (2, 4 * (1.5 + 1.5))
        store.add_failure(tasks[2], "no convergence", seconds=20.0)
        store.add_failure(tasks[3], "no convergence")
        assert store.spent().core_seconds == 4 * (3.0 + 20.0 + 1000.0)
        store.task_lost(tasks[4], attempts=2, at_most=60.0)
        assert store.spent().core_seconds == 4 * (3.0 + 1020.0 + 60.0)
        store.release_running()
        assert store.spent() == (2, 4 * (3.0 + 1080.0 + 1000.0))


def test_imported_labels_cost_nothing(store: Store) -> None:
    """They are labels with their roles and take nothing of the budget; those that are known are counted and left alone."""
    queued, failed = queue(store, 0, Role.HOLDOUT), queue(store, 1)
    store.add_failure(store.start_task(failed, "label-0", 11), "no convergence")
    spent = store.spent()
    found = [(frame(seed), label(seed), Role.TRAIN) for seed in range(4)]

    assert store.import_labels(found) == (4, 0)
    assert store.import_labels([*found, (frame(9), label(9), Role.HOLDOUT)]) == (1, 4)
    roles = [Role.HOLDOUT, Role.TRAIN, Role.TRAIN, Role.TRAIN, Role.HOLDOUT]
    assert [(one.label.energy, one.role, one.imported) for one in store.labels(METHOD)] == [
        (label(seed).energy, role, True) for seed, role in zip((0, 1, 2, 3, 9), roles, strict=True)
    ]
    np.testing.assert_array_equal(store.labels()[2].label.virial, label(2).virial)
    assert store.pending() == []
    assert store.accepted(queued)
    assert store.spent() == spent
    assert sum(store.queued_by_role().values()) == 2
    assert sum(store.started_by_role().values()) == 2


def test_an_import_is_all_or_nothing(store: Store) -> None:
    """Where reading stops in the middle, nothing of the file is in the store."""

    def broken() -> Iterator[tuple[Frame, Label, Role]]:
        yield frame(), label(), Role.TRAIN
        raise ValueError("the file ends here")

    with pytest.raises(ValueError, match="the file ends here"):
        store.import_labels(broken())
    assert store.labels() == []
    assert store.import_labels([(frame(), label(), Role.TRAIN)]) == (1, 0)
