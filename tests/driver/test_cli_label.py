"""`tumbaga label`: the queue of a run that has stopped is looked at, decided about and worked off; mistakes are one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver import cli, cli_label, structures
from tumbaga.driver import config as configs
from tumbaga.driver.rundir import RunDir
from tumbaga.driver.testing import command, processes_in
from tumbaga.online.labels.testing import ToyLabeller, read_journal
from tumbaga.online.records import Frame, Reason, Role
from tumbaga.online.store import FILE, Store

LJ = ToyLabeller()
PATIENCE = 300.0  # s; nothing here takes longer than a few of them on a machine that has nothing else to do
TEMPLATE = structures.read_frame(Path(structures.__file__).parent / "data" / "cuau-water.xyz")
Tumbaga = Callable[..., tuple[int, str, str]]


class Run:
    """A run directory whose run has stopped, with some frames in the queue."""

    def __init__(self, path: Path) -> None:
        self.path, self.journal = path, path.parent / "journal"
        path.mkdir()
        self.settings(f"test:lj?journal={self.journal}")
        self.store = Store(path / FILE)

    def settings(self, method: str, **others: float) -> None:
        label = configs.Label(method=method, **others)  # type: ignore[arg-type]
        (self.path / configs.FILE).write_text(configs.dumps(configs.Config(label=label)))

    def frame(self, seed: int) -> Frame:
        moved = 0.05 * np.random.default_rng(seed).standard_normal(TEMPLATE.positions.shape)
        return Frame(TEMPLATE.numbers, TEMPLATE.positions + moved)

    def queue(self, *seeds: int, reason: Reason = Reason.UNCERTAIN) -> list[int]:
        """Put frames into the queue; returns their ids."""
        ids = []
        for seed in seeds:
            frame = self.frame(seed)
            ids.append(
                self.store.add_flag(
                    frame, session="s", step=seed, reason=reason, score=0.9, version=0, energy=0.0, forces=np.zeros_like(frame.positions)
                )
            )
            assert self.store.enqueue(ids[-1], reason, Role.TRAIN, 0.5)
        return ids

    def set_aside(self, frame_id: int) -> None:
        task = self.store.start_task(frame_id, "label-0", 1)
        label = LJ.label(self.store.frame(frame_id))
        assert self.store.quarantine(task, label, "forces", "forces that others contradict", {"sigmas": 9.0})

    def labelled(self) -> int:
        return self.store.counts()["converged"]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "run")
    yield made
    made.store.close()
    assert list(processes_in(made.path)) == []


@pytest.fixture
def tumbaga(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tumbaga:
    """Runs the command line in this process; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tumbaga", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


# -- looking ---------------------------------------------------------------------------------------------------------------------------


def test_the_queue_is_shown(run: Run, tumbaga: Tumbaga) -> None:
    """Every frame that waits has a line with its state, uncertainty, reason and use; so has each that failed or was set aside."""
    first, second, third, fourth = run.queue(1, 2, 3, 4)
    run.set_aside(second)
    run.store.add_failure(run.store.start_task(third, "label-0", 1), "the SCF did not converge")
    run.store.start_task(fourth, "label-0", 1)
    code, out, err = tumbaga("label", "run", "--list")

    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"{first} pending 0.500 uncertain learn" in lines
    assert f"{second} set aside forces" in lines
    assert f"{third} failed the SCF did not converge" in lines
    assert f"{fourth} running uncertain learn by label-0" in lines
    assert lines[-1].startswith("1 wait, 1 under way, 0 labelled, 1 failed, 1 set aside; ")


def test_what_was_set_aside_is_shown_with_its_reason(run: Run, tumbaga: Tumbaga) -> None:
    """Frame, method, reason, check and what was measured; and a sentence where there is nothing."""
    assert tumbaga("label", "run", "--quarantine")[1] == "no label is set aside\n"
    (frame_id,) = run.queue(1)
    run.set_aside(frame_id)
    out = tumbaga("label", "run", "--quarantine")[1]

    assert f"frame {frame_id} ({LJ.method}): forces that others contradict" in out
    assert "check: forces; sigmas 9" in out


# -- deciding --------------------------------------------------------------------------------------------------------------------------


def test_a_released_label_is_a_label(run: Run, tumbaga: Tumbaga) -> None:
    """Afterwards the store has it among its labels, and no longer among those set aside."""
    (frame_id,) = run.queue(1)
    run.set_aside(frame_id)
    code, out, _ = tumbaga("label", "run", "--release", str(frame_id))

    assert code == 0
    assert out == f"frame {frame_id}: its label is believed from now on\n"
    assert [label.frame_id for label in run.store.labels()] == [frame_id]
    assert run.store.quarantined() == []


def test_a_frame_is_queued_once_more_in_another_way(run: Run, tumbaga: Tumbaga) -> None:
    """The queue holds it with the option that was given, and says so; what was set aside stays so until then."""
    (frame_id,) = run.queue(1)
    run.set_aside(frame_id)
    code, out, _ = tumbaga("label", "run", "--retry", str(frame_id), "--with", "delay=0.01")

    assert code == 0
    assert f"frame {frame_id}: queued once more, with delay=0.01" in out
    assert [(waits.frame, waits.strategy) for waits in run.store.pending()] == [(frame_id, "delay=0.01")]
    assert "with delay=0.01" in tumbaga("label", "run", "--list")[1]
    assert len(run.store.quarantined()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--list", "--release", "1"), "--release: and --list are two commands; give one of them"),
        (("--with", "delay=1"), "--with: says how a frame is to be labelled once more; name the frame with --retry"),
        (("--release", "7"), "has no label of frame 7 in quarantine"),
        (("--retry", "7"), "has no queued frame 7"),
        (("--retry", "7", "--with", "epsilon=2"), "--with: would give labels of test:lj/epsilon2/offset-1000, and this run has "),
        (("--retry", "7", "--with", "epsilom=2"), "epsilom"),
        (("--retry", "7", "--with", "delay"), "KEY=VALUE"),
        (("--label", "test:lj?epsilon=3"), "--label: would give labels of test:lj/epsilon3/offset-1000, and this run has "),
        (("--label", "vasp"), "is not known"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: tuple[str, ...], said: str, run: Run, tumbaga: Tumbaga) -> None:
    """Exit code 2, one line on standard error, and nothing of the queue has changed."""
    run.queue(1)
    code, out, err = tumbaga("label", "run", *arguments)

    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("tumbaga: ")
    assert err.count("\n") == 1
    assert [waits.strategy for waits in run.store.pending()] == [""]


def test_a_folder_without_a_run_is_told(tmp_path: Path, tumbaga: Tumbaga) -> None:
    """Neither a folder that is not there nor an empty one is labelled, and none is made."""
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        code, _, err = tumbaga("label", name)
        assert code == 2
        assert "is this a run directory?" in err
    assert not (tmp_path / "none").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_run_that_goes_on_is_left_alone(run: Run, tumbaga: Tumbaga) -> None:
    """While somebody holds the run directory its queue can be looked at, and nothing else."""
    (frame_id,) = run.queue(1)
    held = RunDir(run.path)
    held.hold()
    try:
        assert tumbaga("label", "run", "--list")[0] == 0
        for arguments in ((), ("--release", str(frame_id)), ("--retry", str(frame_id))):
            code, _, err = tumbaga("label", "run", *arguments)
            assert code == 2
            assert "is in use by process" in err
    finally:
        held.release()


# -- working -----------------------------------------------------------------------------------------------------------------------------


def test_an_empty_queue_is_no_work(run: Run, tumbaga: Tumbaga) -> None:
    """Nothing is started where nothing waits."""
    code, out, _ = tumbaga("label", "run")

    assert code == 0
    assert out.endswith("no frame waits for a label\n")
    assert not (run.path / "log").exists()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_tells_how_long_the_rest_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody watches a terminal a line is written every ten seconds, with the time that is left."""
    clock = Clock()
    before = {"pending": 8, "running": 0, "converged": 4, "failed": 1, "quarantined": 0}
    progress = cli_label.Progress(before, 0, quiet=False, clock=clock)
    for now, converged, failed in ((1.0, 5, 1), (11.0, 6, 1), (12.0, 6, 2)):
        clock.now = now
        left = 8 - (converged - 4) - (failed - 1)
        progress({"state": "labelling", "labels": before | {"converged": converged, "failed": failed, "pending": left - 1, "running": 1}})
    progress.end()

    assert capsys.readouterr().err == "2 of 8 labelled, about 33 s left\n"
    assert progress.done == 3


@pytest.mark.slow
def test_a_queue_is_worked_off(run: Run) -> None:
    """All frames that wait are labelled once, a failed one is told with its reason, a retried one in its own way; versions are made of them."""
    first = run.queue(1, reason=Reason.INITIAL)
    others = run.queue(2, 3, 4, 5, 6)
    again = run.queue(7)[0]
    run.set_aside(again)
    run.store.retry(again, "delay=0.01")
    run.settings(f"test:raise?on=2&journal={run.journal}")
    done = command("label", str(run.path), "--quiet", seconds=PATIENCE)

    assert done.returncode == 0, done.stderr
    counts = run.store.counts()
    assert (counts["pending"], counts["running"], counts["failed"], counts["quarantined"]) == (0, 0, 1, 0)
    assert counts["converged"] + counts["dropped"] == len(first) + len(others)  # those that an update made certain need no label
    assert "this labeller fails on purpose" in done.stdout
    assert f"{counts['converged']} labels came in " in done.stdout
    ended = [key for what, key, _ in read_journal(run.journal) if what == "end"]
    assert len(ended) == len(set(ended)) == counts["converged"]
    assert run.store.frame(again).key in ended
    assert len(run.store.versions()) >= 2
    status = RunDir(run.path).read_status()
    assert status["state"] == "finished"
    assert status["labels"]["converged"] == counts["converged"]
    assert command("label", str(run.path)).stdout.endswith("no frame waits for a label\n")


@pytest.mark.slow
def test_so_many_and_no_more(run: Run) -> None:
    """--max bounds the labels that are begun, over several workers."""
    run.queue(1, 2, 3, 4, 5, 6)
    done = command("label", str(run.path), "--max", "2", "--workers", "2", "--quiet", seconds=PATIENCE)

    assert done.returncode == 0, done.stderr
    assert run.labelled() == 2
    assert len([what for what, *_ in read_journal(run.journal) if what == "start"]) == 2


@pytest.mark.slow
def test_core_hours_end_the_work(run: Run) -> None:
    """Labels whose time is spent are not begun: the frames still wait, the reason is told and kept as an event, once."""
    run.settings(f"test:lj?delay=1.0&journal={run.journal}", core_hours=1.5 / 3600)
    run.queue(1, 2, 3, 4, 5)
    for _ in range(2):
        done = command("label", str(run.path), "--quiet", seconds=PATIENCE)
        assert done.returncode == 0, done.stderr
        assert "core-hours for labels are spent: none is begun any more" in done.stdout

    assert run.labelled() == 2
    assert len(run.store.events("budget")) == 1
    assert run.store.counts()["pending"] + run.store.counts()["dropped"] == 3


@pytest.mark.slow
def test_a_method_that_cannot_label_ends_the_work(run: Run) -> None:
    """Where no label worker can start, the command says why and ends with exit code 1; the queue is as it was."""
    run.queue(1, 2)
    run.settings("ase:no_such_package.module:Calculator")
    done = command("label", str(run.path), "--quiet", seconds=PATIENCE)

    assert done.returncode == 1, done.stdout
    assert "FAILED: 0 labels came" in done.stdout
    assert "needs the package no_such_package, which is not installed here" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert run.store.counts()["pending"] == 2
