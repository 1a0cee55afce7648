"""Fine-tunes on disk: orders and results that survive either side, and when one is due."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tumbaga.driver import finetuning
from tumbaga.driver.finetuning import Order, Result
from tumbaga.driver.learner_finetune import no_worse
from tumbaga.online.gate_records import Check

ORDER = Order(1, 6, "versions/000006-abc.safetensors", "versions/000000-def.safetensors", (1, 2, 4), (3,), "test:lj")
CHECKS = (Check("finite", True, {"frames": 4}, "all finite"), Check("audits", False, {"rmse": 0.1, "none": None}, "worse"))


@pytest.mark.parametrize(
    ("train", "last", "every", "refused", "is_due"),
    [(8, 0, 8, 0, True), (7, 0, 8, 0, False), (15, 8, 8, 0, False), (16, 8, 8, 0, True), (16, 8, 8, 1, False), (24, 8, 8, 1, True), (99, 0, 0, 0, False)],
)  # fmt: skip
def test_a_fine_tune_is_due_by_new_labels_twice_as_many_after_each_refusal(
    train: int, last: int, every: int, refused: int, is_due: bool
) -> None:
    """Training labels since the last order count; 0 is never."""
    assert finetuning.due(train, last, every, refused) is is_due


def test_an_order_is_open_until_its_result_is_there(tmp_path: Path) -> None:
    """Whoever starts anew finds what is to be done, and nothing when it is done."""
    assert finetuning.newest(tmp_path) is None
    assert finetuning.open_order(tmp_path) is None
    (tmp_path / finetuning.FOLDER / "000009").mkdir(parents=True)  # of a process that died before it had written its order
    finetuning.put_order(tmp_path, ORDER)
    assert finetuning.open_order(tmp_path) == finetuning.newest(tmp_path) == ORDER
    assert finetuning.result(tmp_path, ORDER) is None
    finetuning.put_result(tmp_path, Result(ORDER, False, "audits: worse", CHECKS, {"epochs": 3}))
    assert finetuning.open_order(tmp_path) is None
    second = replace(ORDER, number=2)
    finetuning.put_order(tmp_path, second)
    assert finetuning.open_order(tmp_path) == second


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    """Checks with their numbers, the reason, and the candidate only while it is there: so long it is under way."""
    assert not finetuning.under_way(tmp_path)
    finetuning.put_order(tmp_path, ORDER)
    assert finetuning.under_way(tmp_path)
    given = Result(ORDER, False, "audits: worse", CHECKS, {"epochs": 3})
    finetuning.put_result(tmp_path, given)
    found = finetuning.result(tmp_path, ORDER)
    assert found == given
    assert found.candidate(tmp_path) is None
    weights, checkpoint = (ORDER.folder(tmp_path) / name for name in (finetuning.CANDIDATE, "checkpoint.pt"))
    weights.write_bytes(b"weights")
    checkpoint.write_bytes(b"state")
    assert found.candidate(tmp_path) == weights
    assert finetuning.under_way(tmp_path)
    finetuning.clear(tmp_path, ORDER)
    assert not finetuning.under_way(tmp_path)
    assert not weights.exists()
    assert not checkpoint.exists()
    assert finetuning.result(tmp_path, ORDER) == given


@pytest.mark.parametrize(
    ("before", "after", "passed"),
    [(0.10, 0.09, True), (0.10, 0.10, True), (0.10, 0.12, False), (0.001, 0.003, True), (None, None, True), (None, 0.5, True)],
)
def test_what_serves_by_then_must_not_be_better(before: float | None, after: float | None, passed: bool) -> None:
    """A candidate that was overtaken while it was trained is refused; differences of some meV/Å are none."""
    check = no_worse(before, after, 5)
    assert check.passed is passed
    assert check.numbers["labels_since"] == 5
