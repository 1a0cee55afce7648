"""Runs whose potential is fine-tuned in the background: what passes the gate serves, and no kill loses or doubles anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver.testing import Program, until
from tumbaga.online import versions
from tumbaga.online.errors import StoreError
from tumbaga.online.store import FILE, Store, StoredVersion

pytest.importorskip("tblite", reason="labels of another level of theory: install the extra xtb")
pytestmark = pytest.mark.slow
RUN = ("run", "cuau-water", "--steps", "1000000", "--label", "ase:tblite.ase:TBLite", "--force-error", "0.03", "--seed", "7")
FEW = ("--labels", "6", "--set", "flag.spacing=10", "--set", "learn.finetune_every=4", "--set", 'label.options.method="GFN1-xTB"')


def tuned(run_dir: Path) -> list[StoredVersion]:
    """Fine-tunes in the store so far."""
    try:
        with Store(run_dir / FILE, read_only=True) as store:
            return [version for version in store.versions() if version.kind == "fine-tune"]
    except StoreError:  # the run has only begun
        return []


def epochs(run_dir: Path) -> list[int]:
    """Epochs that the first fine-tune has put on disk."""
    log = run_dir / "finetune" / "000001" / "log.jsonl"
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []


@pytest.fixture
def learnt(start: Callable[..., Program]) -> Program:
    """A run whose first fine-tune has been taken, one way or the other."""
    program = start(*RUN, *FEW, "--set", "learn.finetune_steps=60", "--set", "learn.ramp_steps=30", "--set", "learn.ramp_pause=20")
    until(lambda: tuned(program.run_dir), 240.0, "a fine-tune", lambda: "" if program.process.poll() is None else program.output)
    return program


def test_a_fine_tune_serves_and_goes_on_serving_after_a_restart(
    learnt: Program, start: Callable[..., Program], table: Callable[[Program], np.ndarray]
) -> None:
    """The version has its labels, its gate and a network of its own; the engine moves on to it, finite, and a new start finds it again."""
    (version, *_) = tuned(learnt.run_dir)
    assert version.state in ("accepted", "served"), version.metrics
    learnt.until(
        lambda status: any(s["version"] >= version.number and s["ramping_to"] is None for s in status["sessions"]),
        "the session to come over",
        120.0,
    )
    learnt.stop()
    status = learnt.status()
    assert status["errors"] == []
    assert np.isfinite(table(learnt)).all()
    with Store(learnt.run_dir / FILE, read_only=True) as store:
        known = {one.number: one for one in store.versions()}
        assert version.network != known[0].network
        assert len(store.version_labels(version.number)) >= 4
        assert {"finite", "audits", "shadow MD", "serving now"} <= {gate.check for gate in store.gates(version.number)}
    newest = known[status["serving_version"]]
    assert newest.network == version.network
    layer = versions.read(learnt.run_dir / newest.file)
    assert layer.metadata[versions.ORIGIN] == known[0].network

    again = start(*RUN, *FEW)
    later = again.until(lambda status: status["sessions"] and status["sessions"][0]["forces"] > 20, "forces after a restart", 60.0)
    assert later["sessions"][0]["version"] >= newest.number
    again.stop()
    assert again.status()["errors"] == []
    assert again.status()["evaluated_again"] == 0


@pytest.mark.drill
def test_a_trainer_that_is_killed_again_and_again_makes_one_version(start: Callable[..., Program]) -> None:
    """It goes on from its checkpoint: each epoch once in the log, one version in the store, and no force call is late for it."""
    program = start(*RUN, *FEW, "--set", "learn.finetune_steps=300")
    seen = 0
    for _ in range(2):
        until(lambda seen=seen: len(epochs(program.run_dir)) > seen + 2, 200.0, "epochs of a fine-tune", lambda: "")
        seen = len(epochs(program.run_dir))
        before = program.status()["restarts"]["trainer"]
        program.kill("trainer")
        program.restarted("trainer", before)
    until(lambda: tuned(program.run_dir), 240.0, "a fine-tune", lambda: "" if program.process.poll() is None else program.output)
    program.stop()
    assert len([version for version in tuned(program.run_dir) if version.metrics["fine_tune"] == 1]) == 1
    done = epochs(program.run_dir)
    assert done == list(range(len(done)))
    assert not (program.run_dir / "finetune" / "000001" / "checkpoint.pt").exists()


@pytest.mark.drill
def test_a_learner_that_is_killed_while_a_fine_tune_comes_takes_it_once(start: Callable[..., Program]) -> None:
    """The result waits on disk for whoever takes it."""
    program = start(*RUN, *FEW, "--set", "learn.finetune_steps=60")
    until(lambda: len(epochs(program.run_dir)) > 0, 200.0, "a fine-tune to begin")
    for _ in range(3):
        before = program.status()["restarts"]["learner"]
        program.kill("learner")
        program.restarted("learner", before)
    until(lambda: tuned(program.run_dir), 240.0, "a fine-tune", lambda: "" if program.process.poll() is None else program.output)
    before = program.status()["restarts"]["learner"]
    program.kill("learner")
    program.restarted("learner", before)
    program.stop()
    numbers = [version.metrics["fine_tune"] for version in tuned(program.run_dir)]
    assert sorted(numbers) == sorted(set(numbers))
