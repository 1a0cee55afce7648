"""Runs whose labels lie, and queues that are worked off when the run has stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tumbaga.driver.testing import Program, command, until
from tumbaga.online.labels.testing import read_journal
from tumbaga.online.store import FILE, Store

pytestmark = pytest.mark.slow
# a force error that the potential never holds on this labeller: labels are wanted all the time; fine-tunes have their own tests
UNSURE = ("--force-error", "0.02", "--set", "learn.finetune_every=0")


def test_a_wrong_label_is_set_aside_and_the_others_are_learnt(tmp_path: Path, start: Callable[..., Program]) -> None:
    """One label of a run has forces of the wrong sign: it ends in quarantine with a reason, all others are learnt, and status shows it."""
    journal = tmp_path / "journal"
    method = f"test:wrong?on=9&journal={journal}"
    program = start("run", "cuau-water", "--label", method, *UNSURE, "--labels", "16", "--steps", "1500", "--seed", "5")
    assert program.end(240) == 0, program.output
    status = program.status()
    wrong = [key for what, key, _ in read_journal(journal) if what == "start"][8]

    with Store(program.run_dir / FILE, read_only=True) as store:
        (aside,) = store.quarantined()
        assert aside.stored.frame.key == wrong
        assert aside.check == "forces"
        assert wrong not in {label.frame.key for label in store.labels()}
        assert aside.stored.id not in store.version_labels(store.versions()[-1].number)
        assert [event["frame"] for event in store.events("label set aside")] == [aside.stored.frame_id]
    assert status["labels"]["quarantined"] == 1
    assert status["labels"]["converged"] >= 11
    assert status["force_rmse"]["holdout_rmse"] < 0.5 * status["force_rmse"]["holdout_rmse_base"]
    told = command("status", str(program.run_dir)).stdout
    assert f"set aside      frame {aside.stored.frame_id}: forces that " in told
    assert "--release FRAME, --retry FRAME" in told


def test_the_queue_of_a_stopped_run_is_worked_off(tmp_path: Path, start: Callable[..., Program]) -> None:
    """`tumbaga label` labels what a run left behind, each frame once, also after Ctrl-C; the next start serves what was learnt meanwhile."""
    journal = tmp_path / "journal"
    slow, fast = (f"test:lj?delay={delay}&journal={journal}" for delay in (4, 0.5))
    run = ("run", "cuau-water", "--label", slow, *UNSURE, "--labels", "9", "--steps", "100000", "--seed", "5")
    program = start(*run)
    program.until(lambda status: status["labels"]["pending"] >= 5, "a queue", 120)
    assert program.stop() == 0, program.output
    steps = program.status()["steps"]

    arguments = [sys.executable, "-m", "tumbaga.driver.cli", "label", str(program.run_dir), "--label", fast, "--quiet"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, start_new_session=True) as first:
        before = len(read_journal(journal))
        until(lambda: len(read_journal(journal)) > before + 2, 60, "two labels")
        first.send_signal(signal.SIGINT)
        said, _ = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert said.startswith("stopped: ")
    with Store(program.run_dir / FILE, read_only=True) as store:
        counts = store.counts()
        assert counts["running"] == 0
        assert counts["pending"] > 0

    second = command(*arguments[3:], seconds=120)
    assert second.returncode == 0, second.stderr
    with Store(program.run_dir / FILE, read_only=True) as store:
        counts, newest = store.counts(), store.versions()[-1]
        assert (counts["pending"], counts["running"], counts["failed"]) == (0, 0, 0)
        ended = Counter(key for what, key, _ in read_journal(journal) if what == "end")
        assert set(ended.values()) == {1}
        assert sorted(label.frame.key for label in store.labels()) == sorted(ended)
    assert program.status()["steps"] == steps  # the status of the run is still there
    assert program.left_behind() == []

    program = start(*run)
    program.until(lambda status: status["serving_version"] == newest.number, f"version {newest.number} to serve")
    assert program.stop() == 0, program.output
