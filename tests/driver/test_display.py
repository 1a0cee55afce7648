"""What a run shows: lines of text made of a status, and nothing that can fail."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tumbaga.driver import display
from tumbaga.driver.display import Progress
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Store


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def status(**changes: Any) -> dict[str, Any]:
    return {
        "state": "running",
        "model": "toy:lj",
        "seconds": 12.0,
        "steps": 100,
        "sessions": [{"name": "unix:/x", "state": "computing", "forces": 101}],
        "serving_version": 3,
        "versions": 4,
        "labels": {"pending": 1, "running": 2, "converged": 3, "failed": 0},
        "flags": 9,
        "swaps": 3,
        "refused": 0,
        "force_calls": 101,
        "call_ms": {"p50": 1.25, "p99": 4.0, "max": 77.0},
        "uncertainty": {"last": 0.1234, "max": 0.5},
        "quantile": 2.0,
        "force_rmse": {"holdout_rmse_base": 0.5, "holdout_rmse": 0.1, "train_rmse_base": None, "train_rmse": None},
        "workers": {},
        "stalls": {"now": 0, "all": 0, "in_vain": 0, "longest_s": 0.0},
        "evaluator_restarts": 0,
        "restarts": {"gateway": 0, "evaluator-0": 0},
        "errors": [],
        "pids": {},
    } | changes


def test_a_line_says_where_the_run_is() -> None:
    """Steps of the total, rate, temperature, uncertainty, labels, version and the longest call stand on one line."""
    clock = Clock()
    progress = Progress(2000, io.StringIO(), clock)
    progress.text(status(steps=0))
    clock.now = 2.0
    text = progress.text(status(engine={"temperature": 301.4}))

    assert text == "step 100/2000 · 50 steps/s · 301 K · ±0.12 eV/Å · labels 1 queued 2 running 3 done · version 3 · longest call 77 ms"


def test_a_server_has_no_total() -> None:
    """Without an engine of its own there is neither a total nor a temperature, and failures are told when there are any."""
    text = Progress(None, io.StringIO(), Clock()).text(status(labels={"pending": 0, "running": 0, "converged": 0, "failed": 2}))

    assert text.startswith("step 100 · 0 steps/s · ±0.12")
    assert "0 done 2 failed" in text


def test_a_log_gets_a_line_now_and_then() -> None:
    """Where nobody watches, a line is written every five seconds and not at every status."""
    clock, out = Clock(), io.StringIO()
    progress = Progress(None, out, clock)
    for tick in range(21):
        clock.now = 0.5 * tick
        progress(status())

    assert len(out.getvalue().splitlines()) == 3
    assert "\r" not in out.getvalue()


def test_a_terminal_has_one_line_that_changes() -> None:
    """On a terminal the line is rewritten in place and left at the end."""
    out = Terminal()
    progress = Progress(None, out, Clock())
    for _ in range(5):
        progress(status())
    progress.end()

    assert out.getvalue().count("\n") == 1
    assert out.getvalue().count("\r") == 5


def test_an_error_is_shown_once() -> None:
    """A sentence that stays in the status is written when it is new, and only then."""
    out = io.StringIO()
    progress = Progress(None, out, Clock())
    for errors in (["one"], ["one"], ["one", "two"]):
        progress(status(errors=errors))

    assert [line for line in out.getvalue().splitlines() if line.startswith("!")] == ["! one", "! two"]


def test_a_summary_without_learning(tmp_path: Path) -> None:
    """A run that only served says so, with its calls, its errors and where it lies."""
    text = display.summary(tmp_path, status(state="stopped", errors=["the engine left"]), [])

    assert text.startswith("\nstopped by request\n")
    assert "learning was off" in text
    assert "force calls: 101; median 1.2 ms, 99 % within 4.0 ms, longest 77 ms" in text
    assert "! the engine left" in text
    assert f"tumbaga status {tmp_path}" in text


def test_a_summary_tells_what_was_learnt(tmp_path: Path) -> None:
    """Labels, failures with their reasons, versions, and the held-out error before and after are there, as are engine and files."""
    store = Store(tmp_path / FILE)
    for seed in range(2):
        frame = Frame(np.array([1, 1]), np.array([[0.0, 0, 0], [0, 0, 0.7 + seed]]))
        number = store.add_flag(frame, session="s", step=0, reason=Reason.INITIAL, score=0, version=0, energy=0, forces=np.zeros((2, 3)))
        store.enqueue(number, Reason.INITIAL, Role.TRAIN, 0.1)
        task = store.start_task(number, "label-0", 1)
        if seed:
            store.add_failure(task, "the SCF did not converge")
        else:
            store.add_label(task, Label(-1.0, np.zeros((2, 3)), "pyscf:pbe", 3.0))
    store.close()
    engine = {"name": "i-PI", "step": 100, "temperature": 300.0, "mean_temperature": None, "finite": False}
    (tmp_path / "engine").mkdir()
    text = display.summary(tmp_path, status(state="finished", engine=engine, evaluator_restarts=1), [tmp_path / "engine" / "md.out"])

    assert "labels: 1 converged, 1 failed, 0 still wait (2 frames were flagged); pyscf:pbe, 3.0 s each" in text
    assert "frame 2 failed: the SCF did not converge" in text
    assert "versions: 3 new, 3 swapped in, 3 serves" in text
    assert "force error on held-out labels, never learnt from: 500 meV/Å before, 100 meV/Å after" in text
    assert "NOT FINITE" in text
    assert "the evaluator was restarted 1 times" in text
    assert "engine/md.out" in text


@pytest.mark.parametrize("data", [b"", b"junk" * 100])
def test_a_summary_survives_its_store(tmp_path: Path, data: bytes) -> None:
    """A store that cannot be read, as when the learner died at once, is a line of the summary and no exception."""
    (tmp_path / FILE).write_bytes(data)

    assert f"! store {tmp_path / FILE}" in display.summary(tmp_path, status(), [])


def test_a_status_for_people_has_everything_a_run_has() -> None:
    """State, potential, calls, labels, restarts, sessions and errors each have their line."""
    text = display.status_text(Path("runs/x"), status(restarts={"gateway": 0, "evaluator-0": 2}, errors=["oh"]))

    for part in (
        "runs/x: running",
        "toy:lj, version 3 serves (4 in all, 3 swaps)",
        "evaluator-0 2",
        "unix:/x: computing, 101 forces",
        "! oh",
    ):
        assert part in text


def test_the_noise_of_labels_is_told(tmp_path: Path) -> None:
    """Nothing without labels that were computed twice; else what they differ by, and how many second ones failed."""
    with Store(tmp_path / FILE) as store:
        assert "label noise" not in display.status_text(tmp_path, status())
        for seed, repeat in enumerate([{"energy": 0.001, "force_rmse": 0.004, "force_max": 0.02}, {"failure": "no"}]):
            frame = Frame(np.array([29, 79]), np.array([[0.0, 0.0, 0.0], [2.5 + seed, 0.0, 0.0]]))
            frame_id = store.add_flag(
                frame, session="s", step=seed, reason=Reason.AUDIT, score=0.1, version=0, energy=0.0, forces=np.zeros((2, 3))
            )
            store.enqueue(frame_id, Reason.AUDIT, Role.TRAIN, 0.1)
            store.add_label(store.start_task(frame_id, "label-0", 1), Label(-1.0, np.zeros((2, 3)), "m", 1.0, {"repeat": repeat}))
    (line,) = [line for line in display.status_text(tmp_path, status()).splitlines() if "label noise" in line]
    told = "1 computed twice: forces differ by 4.0 meV/Å, 20.0 at most; energies by 1.00 meV at most; of 1 the second one failed"
    assert line == f"  label noise    {told}"


def test_what_the_uncertainty_promised_is_held_against_what_audits_found(tmp_path: Path) -> None:
    """In the status and at the end; nothing is said as long as there is no audit."""
    told = "11 of the last 12 frames picked at random were as near to their labels as was told (90% promised)"
    found, none = (status(coverage={"audits": audits, "within": 11, "promised": 0.9}) for audits in (12, 0))

    assert told in display.status_text(tmp_path, found)
    assert "picked at random" not in display.status_text(tmp_path, none)
    Store(tmp_path / FILE).close()
    assert told in display.summary(tmp_path, found, [])
    assert "picked at random" not in display.summary(tmp_path, none, [])
