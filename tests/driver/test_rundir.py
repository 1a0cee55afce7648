"""A run directory has one holder, and a status that tells the truth about it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tumbaga.driver.errors import RunDirError
from tumbaga.driver.rundir import LOCK, STATUS, RunDir

HOLDER = """
import sys
from pathlib import Path
from tumbaga.driver.rundir import RunDir

run_dir = RunDir(Path(sys.argv[1]))
run_dir.hold()
run_dir.write_status({"state": sys.argv[2], "errors": []})
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    made = RunDir(tmp_path / "a" / "run")
    yield made
    made.release()


def test_holding_makes_the_folder_and_excludes_others(run_dir: RunDir) -> None:
    """The first holder makes the folder; the second is told the process, and how to stop it, until the first lets go."""
    assert run_dir.holder() is None
    run_dir.hold()
    other = RunDir(run_dir.path)
    with pytest.raises(RunDirError, match=f"is in use by process {os.getpid()}; stop that run first"):
        other.hold()
    assert other.holder() == os.getpid()
    run_dir.release()
    assert run_dir.holder() is None

    other.hold()
    other.release()


def test_the_bus_is_for_the_owner_only(run_dir: RunDir) -> None:
    """The folder of the bus is closed to everybody else."""
    run_dir.hold()

    assert stat.S_IMODE((run_dir.path / "bus").stat().st_mode) == 0o700


def test_asking_does_not_hold(run_dir: RunDir) -> None:
    """Asking who holds a folder, any number of times, leaves it free, and makes nothing where there is nothing."""
    for _ in range(3):
        assert run_dir.holder() is None
    assert not run_dir.path.exists()

    run_dir.hold()


def test_a_file_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    """A run directory cannot be made where a file is."""
    (tmp_path / "run").write_text("")

    with pytest.raises(RunDirError, match="cannot be made or written"):
        RunDir(tmp_path / "run").hold()


def test_a_status_is_read_as_written(run_dir: RunDir) -> None:
    """A status of a run that has ended is what was written, by whoever asks."""
    run_dir.hold()
    run_dir.write_status({"state": "finished", "errors": ["π"], "steps": 7})
    run_dir.release()

    assert RunDir(run_dir.path).read_status() == {"state": "finished", "errors": ["π"], "steps": 7}


@pytest.mark.parametrize("state", ["starting", "running", "finishing labels", "stopping"])
def test_a_run_that_is_gone_without_a_word_died(run_dir: RunDir, state: str) -> None:
    """A state that only a living run can be in is believed while it is held, and "died" with a reason after that."""
    run_dir.hold()
    run_dir.write_status({"state": state, "errors": []})
    assert run_dir.read_status()["state"] == state
    run_dir.release()
    status = run_dir.read_status()

    assert status["state"] == "died"
    assert "start the run again" in status["errors"][0]


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    """After SIGKILL of the holder the folder is free, its status is "died", and the next run can have it."""
    path = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), "running"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        seen = RunDir(path)
        assert seen.holder() == holder.pid
        assert seen.read_status()["state"] == "running"
        holder.kill()
        holder.wait()

        assert seen.holder() is None
        assert seen.read_status()["state"] == "died"
        seen.hold()
        seen.release()


@pytest.mark.parametrize(
    ("text", "sentence"), [(None, "has no status yet; is it a run directory"), ("{", "cannot be read"), ("[3]", "cannot be read")]
)
def test_no_status_is_a_sentence(run_dir: RunDir, text: str | None, sentence: str) -> None:
    """A missing or broken status file is one sentence that names the folder."""
    run_dir.hold()
    if text is not None:
        (run_dir.path / STATUS).write_text(text)

    with pytest.raises(RunDirError, match=sentence) as caught:
        run_dir.read_status()
    assert str(run_dir.path) in str(caught.value)


def test_a_lock_file_of_junk_tells_no_process(run_dir: RunDir) -> None:
    """A lock that is held but holds no number is held by nobody that can be named, and is no traceback."""
    run_dir.hold()
    (run_dir.path / LOCK).write_text("me")

    assert run_dir.holder() is None
