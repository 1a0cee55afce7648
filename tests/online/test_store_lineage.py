"""Versions and what is known of them: labels, gate, ramps, audits."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Audit, Gate, Ramp, Store, StoredVersion

METHOD = "test:a"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / FILE, clock=lambda: 1000.0) as made:
        yield made


def labels(store: Store, n: int) -> list[int]:
    """Frames with labels, every second held out; the labels' ids."""
    for seed in range(n):
        frame = Frame(np.array([1]), np.array([[float(seed), 0.0, 0.0]]))
        role = Role.HOLDOUT if seed % 2 else Role.TRAIN
        number = store.add_flag(
            frame, session="s", step=seed, reason=Reason.AUDIT, score=0.1, version=0, energy=0.0, forces=np.zeros((1, 3))
        )
        store.enqueue(number, Reason.AUDIT, role, 0.1)
        store.add_label(store.start_task(number, "label-0", 1), Label(-1.0, np.zeros((1, 3)), METHOD, 1.0))
    return [one.id for one in store.labels()]


def version(number: int, parent: int | None, state: str = "accepted", kind: str = "", network: str = "") -> StoredVersion:
    return StoredVersion(number, f"{number:064x}", parent, f"versions/{number}", state, 0, {}, kind, network)


def test_a_version_knows_what_made_it(store: Store) -> None:
    """Kind, network, parent and the labels of each version are there; without a word the first is the base and others are last layers."""
    made_by = labels(store, 4)
    store.add_version(version(0, None))
    store.add_version(version(1, 0), made_by[:2])
    store.add_version(version(2, 1, "candidate", "fine-tune", "ab12"), iter(made_by))
    store.add_version(version(3, 2, kind="rollback"))

    assert [(one.number, one.kind, one.network, one.created) for one in store.versions()] == [
        (0, "base", "", 1000.0),
        (1, "last-layer", "", 1000.0),
        (2, "fine-tune", "ab12", 1000.0),
        (3, "rollback", "", 1000.0),
    ]
    assert [store.version_labels(number) for number in range(4)] == [[], made_by[:2], made_by, []]
    assert store.label_ids(METHOD, Role.TRAIN) == made_by[::2]
    assert store.label_ids(METHOD) == made_by
    assert store.label_ids("test:b") == []


def test_a_version_is_recorded_with_its_labels_or_not_at_all(store: Store) -> None:
    """A version of a label that is not in the store, or of a kind that does not exist, is turned away whole."""
    for bad, made_by in ((version(0, None), [41]), (version(0, None, kind="magic"), []), (version(0, None, "great"), [])):
        with pytest.raises(sqlite3.IntegrityError):
            store.add_version(bad, made_by)
    assert store.versions() == []
    store.add_version(version(0, None))


@pytest.mark.parametrize(
    ("state", "serves"), [("candidate", False), ("accepted", True), ("served", True), ("refused", False), ("withdrawn", False)]
)
def test_who_may_serve(store: Store, state: str, serves: bool) -> None:
    """Invariant 5: only versions that the gate passed and that nobody took back may serve."""
    store.add_version(version(0, None))
    store.set_version_state(0, state)

    assert store.versions()[0].may_serve is serves


def test_what_the_gate_said(store: Store) -> None:
    """Results stand in their order, of their version, with numbers and reason; there are none of a version that nobody knows."""
    store.add_version(version(0, None))
    told = [Gate(1, "audits", True, "0.08 eV/Å on 12 labels", {"rmse": 0.08}), Gate(1, "short range", False, "repels too little at 0.7 Å")]
    store.add_version(version(1, 0, "candidate"), gates=told)

    assert store.gates(0) == []
    assert [(one.check, one.passed, one.reason, one.numbers, one.created) for one in store.gates(1)] == [
        (one.check, one.passed, one.reason, one.numbers, 1000.0) for one in told
    ]


def test_a_version_is_kept_with_all_that_it_came_from_or_not_at_all(store: Store) -> None:
    """A label that is not there, or a check that cannot be written: no version either."""
    store.add_version(version(0, None))
    with pytest.raises(sqlite3.IntegrityError):
        store.add_version(version(1, 0), [12345], [Gate(1, "audits", True)])
    with pytest.raises(TypeError):
        store.add_version(version(1, 0), gates=[Gate(1, "audits", True, "", {"rmse": object()})])
    assert [one.number for one in store.versions()] == [0]
    assert store.gates(1) == store.version_labels(1) == []


def test_which_version_served_which_steps(store: Store) -> None:
    """A ramp is open until it ends, with its last step and its work; sessions are told apart."""
    store.add_ramp(Ramp("a", 0, 0, 0, 0, 0.0))
    open_ramp = store.add_ramp(Ramp("a", 0, 1, 120))
    store.add_ramp(Ramp("b", 0, 1, 130))
    assert store.ramps("a")[-1].last_step is None
    store.end_ramp(open_ramp, 160, -0.25)

    assert [(one.from_version, one.to_version, one.first_step, one.last_step, one.work_ev) for one in store.ramps("a")] == [
        (0, 0, 0, 0, 0.0),
        (0, 1, 120, 160, -0.25),
    ]
    assert [(one.session, one.last_step) for one in store.ramps()] == [("a", 0), ("a", 160), ("b", None)]


def test_audits_are_kept(store: Store) -> None:
    """What a label said of served forces comes back as it was."""
    (label,) = labels(store, 1)
    told = Audit(1, label, 0, 0.11, 0.4, 1.7, 0.25, {"share": 0.5}, created=1000.0)
    store.add_audit(told)

    assert store.audits() == [told]
    with pytest.raises(sqlite3.IntegrityError):
        store.add_audit(Audit(1, 99, 0, 0.1, 0.1, 1.0, 0.1))


def test_notes_of_the_run(store: Store, tmp_path: Path) -> None:
    """A note is there for the next who opens the store, is replaced, and can be taken away."""
    assert store.get_meta("pinned version") is None
    store.set_meta("pinned version", "3")
    store.set_meta("pinned version", "4")
    with Store(tmp_path / FILE, read_only=True) as other:
        assert other.get_meta("pinned version") == "4"
    store.set_meta("pinned version", None)
    assert store.get_meta("pinned version") is None
