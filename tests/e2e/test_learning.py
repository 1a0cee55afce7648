"""Runs that learn: labels of the test labeller, versions, swaps, and what happens when the processes behind them are killed."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.backends import registry
from tumbaga.driver.testing import Program, until
from tumbaga.online import versions
from tumbaga.online.labels.testing import read_journal
from tumbaga.online.store import FILE, Store
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine

pytestmark = pytest.mark.slow
TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
UNSURE = ("--force-error", "0.02")  # eV/Å, which the potential never holds on this labeller: labels are wanted all the time
FOREVER = ("--steps", "1000000")


class Journal:
    """What the labeller wrote down: who began and who ended which frame."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def count(self, what: str) -> Counter[str]:
        return Counter(key for kind, key, _ in read_journal(self.path) if kind == what)

    def next_start(self) -> tuple[str, int]:
        """Wait until a label has just begun; return its frame and the process that computes it."""
        before = sum(self.count("start").values())
        until(lambda: sum(self.count("start").values()) > before, 60.0, "the next label to begin")
        return [(key, pid) for kind, key, pid in read_journal(self.path) if kind == "start"][-1]

    def ended(self, key: str) -> None:
        """Wait until this frame's label has ended."""
        until(lambda: self.count("end")[key], 60.0, f"the label of {key} to end; starts {self.count('start')[key]}")


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


@pytest.fixture
def store() -> Iterator[Callable[[Program], Store]]:
    """Open the store of a run for reading."""
    opened: list[Store] = []

    def look(program: Program) -> Store:
        opened.append(Store(program.run_dir / FILE, read_only=True))
        return opened[-1]

    yield look
    for one in opened:
        one.close()


def test_a_run_swaps_in_what_it_learns(start: Callable[..., Program], store: Callable[[Program], Store], table: Callable) -> None:
    """New versions are swapped in and ramped while i-PI runs; each is a file that loads by itself, and its parents lead back to version 0."""
    program = start("run", "cuau-water", "--label", "test:lj", *UNSURE, "--steps", "1500", "--seed", "5")
    ramped = program.until(lambda status: status["sessions"] and status["sessions"][0]["version"] > 0, "a ramp to end", 120.0)
    assert ramped["state"] == "running"
    assert program.end() == 0, program.output
    status = program.status()
    assert status["swaps"] >= 1
    assert status["serving_version"] >= 1
    assert status["labels"]["converged"] >= 3
    labels = status["labels"]
    assert (labels["running"], labels["failed"]) == (0, 0)
    # of a teacher that the readout cannot follow a label may well look odd beside the others
    assert labels["quarantined"] <= labels["converged"] / 3
    assert status["errors"] == []
    assert status["coverage"]["promised"] == pytest.approx(0.9)

    assert table(program)[-1, 0] == 1500
    assert np.isfinite(table(program)).all()
    stds = np.array([float(line) for line in (program.run_dir / "engine" / "md.std_0").read_text().splitlines() if "#" not in line])
    assert len(stds) == 1500 // 100 + 1
    assert np.isfinite(stds).all()
    assert (stds >= 0).all()

    template = structures.read_frame(TEMPLATE)
    base = registry.load("painn:cuau-water", "cpu", "float64").predict([template])[0]
    stored = store(program).versions()
    assert [version.number for version in stored] == list(range(status["versions"]))
    assert [version.parent for version in stored] == [None, *range(status["versions"] - 1)]
    for version in (stored[0], stored[1], stored[-1]):
        # what is made at the very end serves from the next start on
        assert version.state == ("served" if version.number <= status["serving_version"] else "accepted")
        file = program.run_dir / version.file
        assert versions.read(file).facts["parent"] == version.parent
        assert (versions.read(file).energy_covariance is None) == (version.number == 0)
        assert version.number == 0 or versions.read(file).facts[versions.QUANTILE] >= 0.5
        made = registry.load(f"painn:{file}", "cpu", "float64").predict([template])[0]
        same = np.allclose(made.forces, base.forces, atol=1e-9)
        assert same == (version.number == 0)


def test_no_label_is_lost_or_done_twice_by_kills(
    start: Callable[..., Program], store: Callable[[Program], Store], journal: Journal
) -> None:
    """DESIGN.md §2, invariants 1 and 4: kill -9 of the learner, of the label worker and of the worker's child, each at a label under way."""
    program = start("run", "cuau-water", "--label", f"test:lj?delay=1.0&journal={journal.path}", *UNSURE, *FOREVER, "--seed", "5")

    # the learner: the label goes on without it, and is neither lost nor begun again
    survivor, _ = journal.next_start()
    before = program.status()["steps"]
    dead = program.kill("learner")
    journal.ended(survivor)
    program.restarted("learner", dead)

    # the worker: its label begins again with the next one
    again, child = journal.next_start()
    dead = program.kill("label-0")
    program.restarted("label-0", dead)
    journal.ended(again)
    assert not os.path.exists(f"/proc/{child}")

    # the child of the worker: the same
    third, child = journal.next_start()
    os.kill(child, signal.SIGKILL)
    journal.ended(third)

    # the run has not noticed; a label that is under way when it is stopped is not counted, and waits
    program.until(lambda status: status["steps"] > before + 50, "steps to go on")
    program.until(lambda status: status["labels"]["converged"] >= 5, "more labels")
    journal.next_start()
    assert program.stop() == 0, program.output
    status = program.status()
    starts, ends = journal.count("start"), journal.count("end")
    assert set(ends.values()) == {1}
    # the engine is stopped before the workers: the label that was under way may be done by then, and the next one have begun
    unfinished = starts - ends - Counter([again, third])
    assert unfinished.total() <= 1
    assert starts - ends == Counter([again, third]) + unfinished
    assert starts[survivor] == 1
    # one that ended in the very moment of the stop lies in the spool until the next start
    stored = Counter(label.frame.key for label in store(program).labels())
    left = ends - stored
    assert left.total() <= 1
    assert stored == ends - left
    assert status["labels"]["converged"] == stored.total()
    assert status["labels"]["failed"] == 0
    assert status["labels"]["running"] == 0
    assert status["restarts"] == {"gateway": 0, "zygote": 0, "evaluator-0": 0, "learner": 1, "label-0": 1, "trainer": 0}
    assert status["errors"] == []
    assert program.left_behind() == []

    # what waited is labelled after the next start, and nothing else a second time
    program = start("run", "cuau-water", "--label", f"test:lj?delay=1.0&journal={journal.path}", *UNSURE, *FOREVER, "--seed", "5")
    program.until(lambda status: status["state"] == "running", "the next run")  # its last label may have ended in the last one
    for cut in unfinished:
        journal.ended(cut)

    def stored_by_now() -> set[str]:
        with Store(program.run_dir / FILE, read_only=True) as one:
            return {label.frame.key for label in one.labels()}

    until(lambda: set(left) <= stored_by_now(), 60.0, "what lay in the spool to be stored")
    assert program.stop() == 0
    assert set(journal.count("end").values()) == {1}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "this labeller fails on purpose"),
        ("nan", "not finite"),
        ("exit", "the labelling process died 2 times on this frame (last exit code 86)"),
    ],
)
def test_failed_labels_are_recorded_and_never_learnt_from(
    fault: str, reason: str, start: Callable[..., Program], store: Callable[[Program], Store]
) -> None:
    """A labeller that raises, says NaN or takes its process along: every failure has its reason, no version is made, the run ends well."""
    program = start("run", "cuau-water", "--label", f"test:{fault}", *UNSURE, "--steps", "300", "--labels", "2")
    assert program.end() == 0, program.output
    status = program.status()
    assert status["steps"] == 300
    assert status["labels"]["failed"] >= 1
    assert status["labels"]["converged"] == 0
    assert (status["versions"], status["swaps"], status["serving_version"]) == (1, 0, 0)
    failures = store(program).failures()
    assert len(failures) == status["labels"]["failed"]
    assert all(reason in said for _, said in failures), failures
    assert store(program).labels() == []
    assert program.left_behind() == []


def test_a_label_that_hangs_is_killed_at_its_time_limit(
    tmp_path: Path, start: Callable[..., Program], store: Callable[[Program], Store], journal: Journal, socket_name: Callable[[], str]
) -> None:
    """It is recorded as failed with the limit in its reason, its process is gone, and forces are served all the while."""
    name = socket_name()
    settings = configs.Config(
        serve=configs.Serve(connect=(f"unix:{name}",)),
        potential=configs.Potential(template=str(TEMPLATE)),
        label=configs.Label(method=f"test:hang?journal={journal.path}", time_limit=2.0),
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / configs.FILE).write_text(configs.dumps(settings))
    positions = structures.read_frame(TEMPLATE).positions / 0.529177
    with listen(Address.unix(name)) as listener:
        program = start("serve", "--quiet")
        with BlockingEngine.accept(listener, timeout=60.0) as engine:
            engine.forces(positions)
            until(lambda: journal.count("start"), 60.0, "the label to begin")
            pid = read_journal(journal.path)[0][2]
            while not program.status()["labels"]["failed"]:
                assert np.isfinite(engine.forces(positions).forces).all()
                assert program.process.poll() is None
            assert not os.path.exists(f"/proc/{pid}")
            assert np.isfinite(engine.forces(positions).forces).all()
    assert program.stop() == 0, program.output
    ((_, said),) = store(program).failures()
    assert said == "took longer than label.time_limit = 2 s and was killed"
    assert journal.count("end") == Counter()
    assert program.status()["versions"] == 1


def test_no_force_call_takes_as_long_as_a_label(start: Callable[..., Program]) -> None:
    """DESIGN.md §2, invariant 1: while a label of 20 s is under way, and when it arrives and is learnt from, no call takes 5 s."""
    program = start("run", "cuau-water", "--label", "test:lj?delay=20", *UNSURE, *FOREVER)
    program.until(lambda status: status["labels"]["running"] and status["steps"] > 100, "steps during a label", 60.0)
    status = program.until(lambda status: status["swaps"] >= 1, "the label to arrive and be learnt from", 90.0)
    program.steps(status["steps"] + 50)
    assert program.stop() == 0, program.output
    assert program.status()["call_ms"]["max"] < 5000
