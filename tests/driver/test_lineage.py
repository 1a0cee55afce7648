"""What the learner makes of a fine-tune that has come: served if the gate passed it, kept with the reasons if not, taken once in either case."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import finetuning
from tumbaga.driver.backends import registry
from tumbaga.driver.backends.painn import PaiNN
from tumbaga.driver.finetuning import Order, Result
from tumbaga.driver.lineage import Lineage
from tumbaga.online.gate_records import Check
from tumbaga.online.store import FILE, Store
from tumbaga.online.training import finish
from tumbaga.socket_protocol import bus

METHOD = "test:none"


@pytest.fixture
def base() -> PaiNN:
    loaded = registry.load("painn:cuau-water", "cpu")
    assert isinstance(loaded, PaiNN)
    return loaded


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / FILE) as opened:
        yield opened


def lineage(run_dir: Path, store: Store, base: PaiNN, told: list[bus.Serve]) -> Lineage:
    def log(level: str, event: str, **detail: Any) -> None: ...

    made = Lineage(run_dir, configs.Config(), store, base, METHOD, log, told.append)
    made.resume()
    return made


def come(run_dir: Path, store: Store, base: PaiNN, passed: bool) -> None:
    """A fine-tune that the trainer has just finished."""
    path = store.versions()[0].file
    order = Order(1, 0, path, path, (), (), METHOD)
    finetuning.put_order(run_dir, order)
    tensors = {key: one * 1.001 for key, one in base.state().items()}
    finish.write(order.folder(run_dir) / finetuning.CANDIDATE, PaiNN("painn:tuned", tensors, base.metadata))
    check = Check("audits", passed, {"rmse": 0.1}, "as it is")
    finetuning.put_result(run_dir, Result(order, passed, "as it is", (check,), {"epochs": 1}))


@pytest.mark.parametrize("passed", [True, False])
def test_only_what_passed_the_gate_serves(tmp_path: Path, store: Store, base: PaiNN, passed: bool) -> None:
    """DESIGN.md §2, invariant 5; a refused candidate keeps its file, its reasons and its gate, and a learner that starts anew takes neither again."""
    told: list[bus.Serve] = []
    lineage(tmp_path, store, base, told)  # makes version 0
    come(tmp_path, store, base, passed)
    lineage(tmp_path, store, base, told).look_for_fine_tune()
    again = lineage(tmp_path, store, base, told)
    again.look_for_fine_tune()

    first, second = store.versions()
    assert (second.kind, second.parent, second.state) == ("fine-tune", 0, "accepted" if passed else "refused")
    assert second.network != first.network
    assert (tmp_path / second.file).exists()
    assert [(gate.check, gate.passed) for gate in store.gates(1)] == [("audits", passed), ("serving now", True)]
    assert [one.version for one in told] == ([1] if passed else [])
    assert again.number == (1 if passed else 0)
    assert np.array_equal(again.potential.readout(), base.readout() * 1.001 if passed else base.readout())


def test_a_fine_tune_that_came_to_nothing_is_told_once(tmp_path: Path, store: Store, base: PaiNN) -> None:
    """No candidate, no version: an event with the reason."""
    lineage(tmp_path, store, base, [])
    order = Order(1, 0, store.versions()[0].file, store.versions()[0].file, (), (), METHOD)
    finetuning.put_order(tmp_path, order)
    finetuning.put_result(tmp_path, Result(order, False, "no candidate: it broke"))
    for _ in range(2):
        lineage(tmp_path, store, base, []).look_for_fine_tune()

    assert [event["reason"] for event in store.events("fine-tune failed")] == ["no candidate: it broke"]
    assert len(store.versions()) == 1
