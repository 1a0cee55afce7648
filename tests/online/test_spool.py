"""Results on their way to the store: whole or not there, and exact."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tumbaga.online import spool
from tumbaga.online.records import Label
from tumbaga.online.spool import FOLDER, Result


def result(task: int = 3) -> Result:
    rng = np.random.default_rng(task)
    forces = np.concatenate([rng.standard_normal((3, 3)) * 10.0 ** rng.integers(-300, 300, (3, 3)), [[-0.0, 5e-324, 0.1 + 0.2]]])
    return Result(task, 7, Label(-1.0 / 3.0 * 1e5, forces, "pyscf:pbe/x", 12.5, {"cycles": 14, "spin": 0.5, "note": "π"}))


def test_a_label_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    """Energy and forces of a label are the same 64 bits after the spool, signs of zero and denormals included."""
    told = result()
    spool.put(tmp_path, told)
    ((path, found),) = spool.waiting(tmp_path)

    assert found is not None
    assert told.label is not None
    assert found.label is not None
    assert (found.task, found.frame, found.failure) == (3, 7, "")
    assert found.label.forces.tobytes() == told.label.forces.tobytes()
    assert np.float64(found.label.energy).tobytes() == np.float64(told.label.energy).tobytes()
    assert (found.label.method, found.label.seconds, found.label.details) == ("pyscf:pbe/x", 12.5, told.label.details)
    assert path.name == "00000003.json"


def test_a_virial_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    """That of a crystal's label is kept as well."""
    virial = np.random.default_rng(1).standard_normal((3, 3))
    spool.put(tmp_path, Result(3, 7, Label(-1.0, np.zeros((1, 3)), "ase:x", 1.0, {}, virial)))
    ((_, found),) = spool.waiting(tmp_path)

    assert found is not None
    assert found.label is not None
    assert found.label.virial is not None
    assert found.label.virial.tobytes() == virial.tobytes()


def test_a_failure_comes_back_with_its_reason(tmp_path: Path) -> None:
    """A failure has no label and the sentence it was put with."""
    spool.put(tmp_path, Result(4, 7, None, "the SCF did not converge"))
    ((_, found),) = spool.waiting(tmp_path)

    assert found == Result(4, 7, None, "the SCF did not converge")


def test_results_come_oldest_task_first(tmp_path: Path) -> None:
    """The order is that of the tasks, not that of the files on disk, and a result is found by its task."""
    for task in (12, 3, 100_000_000, 7):
        spool.put(tmp_path, result(task))

    assert [path.name for path, _ in spool.waiting(tmp_path)][:3] == ["00000003.json", "00000007.json", "00000012.json"]
    assert spool.has(tmp_path, 100_000_000)
    assert not spool.has(tmp_path, 4)


def test_nothing_waits_where_nothing_was_put(tmp_path: Path) -> None:
    """A run directory without a spool has no results."""
    assert list(spool.waiting(tmp_path)) == []


def test_any_truncation_is_seen(tmp_path: Path) -> None:
    """Every proper beginning of a result's file is unreadable, and never half a result."""
    spool.put(tmp_path, result())
    path = tmp_path / FOLDER / "00000003.json"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert list(spool.waiting(tmp_path)) == [(path, None)]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "3",
        "null",
        "{}",
        '{"task": 1, "frame": 2}',
        '{"task": 1, "frame": 2, "failure": "", "label": null}',
        '{"task": 1, "frame": 2, "failure": "", "label": {"energy": 0.0}}',
        '{"task": 1, "frame": 2, "failure": "", "label": {"energy": 0.0, "forces": [[1, 2]], "method": "m", "seconds": 0, "details": {}}}',
        '{"task": 1, "frame": 2, "failure": "", "label": {"energy": 0.0, "forces": 3.0, "method": "m", "seconds": 0, "details": {}}}',
        '{"task": 1, "frame": 2, "failure": "", "label": {"energy": NaN, "forces": [[1, 2, 3]], "method": "m", "seconds": 0, "details": {}}}',
        '{"task": 1, "frame": 2, "failure": "", "label": {"energy": "x", "forces": [[1, 2, 3]], "method": "m", "seconds": 0, "details": {}}}',
        '{"task": "one", "frame": 2, "failure": ""}',
        '{"task": 1, "frame": null, "failure": ""}',
        "\udcff\udcfe",
    ],
)
def test_a_file_that_is_no_result_is_none(tmp_path: Path, text: str) -> None:
    """Whatever a file in the spool holds, it is a result or None, and the others are still read."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / "00000001.json").write_bytes(text.encode(errors="surrogateescape"))
    spool.put(tmp_path, result())

    assert [found is None for _, found in spool.waiting(tmp_path)] == [True, False]


def test_a_result_is_put_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk fails before the rename the spool holds what it held before."""
    spool.put(tmp_path, Result(3, 7, None, "first"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        spool.put(tmp_path, result())

    assert [found for _, found in spool.waiting(tmp_path)] == [Result(3, 7, None, "first")]


def test_a_result_is_plain_json(tmp_path: Path) -> None:
    """A result can be read by any program: nothing in it is executed."""
    spool.put(tmp_path, result())

    assert set(json.loads((tmp_path / FOLDER / "00000003.json").read_text())) == {"task", "frame", "failure", "label"}
