"""Zygotes and what is forked from them: real processes, a toy potential, no waiting but for answers and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import process, tether
from tumbaga.driver.children import Child, Zygote, reap
from tumbaga.driver.testing import until
from tumbaga.online.versions import write_whole

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process adopt orphans")
EVALUATOR = "tumbaga.driver.evaluator"
SECONDS = 60.0


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    found = Family(tmp_path)
    yield found
    found.end()


class Family:
    """A zygote and the children that it makes, in a run directory of a toy potential."""

    def __init__(self, run_dir: Path, model: str = "toy:zero") -> None:
        self.run_dir, self.now = run_dir, 1000.0
        self.zygote: Zygote = Zygote(run_dir, lambda: self.now)
        self.children: list[Child] = []
        self.choose(model)

    def choose(self, model: str) -> None:
        settings = configs.Config(potential=configs.Potential(model=model), learn=configs.Learn(enabled=False))
        write_whole(self.run_dir / configs.FILE, configs.dumps(settings).encode())

    def load(self, module: str = "tumbaga.driver.zygote") -> None:
        self.zygote = Zygote(self.run_dir, lambda: self.now, module)
        self.zygote.start()
        until(lambda: not self.zygote.loading, SECONDS, "the zygote to load")

    def child(self, name: str) -> Child:
        made = Child(name, EVALUATOR, self.run_dir, lambda: self.now, (name, "cpu"), self.zygote)
        made.start()
        self.children.append(made)
        return made

    def end(self) -> None:
        for child in (*self.children, self.zygote):
            child.stop(0.0)
        reap(())
        tether.adopt(False)


def command(pid: int | None) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


def parent(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def leads_session(pid: int) -> bool:
    return os.getsid(pid) == pid


def cleared(stranger: int, known: int) -> bool:
    reap({known})
    return not Path(f"/proc/{stranger}").exists()


def listens(pid: int | None) -> bool:
    """Whether the process has the thread that watches its lifeline."""
    return len(list(Path(f"/proc/{pid}/task").iterdir())) > 1


def wait(child: Child) -> int:
    assert child._process is not None
    return child._process.wait(SECONDS)


def test_evaluators_share_what_was_loaded(family: Family) -> None:
    """Each is a process and a session of its own, a child of this one, forked from the zygote and not started anew."""
    family.load()
    first, second = family.child("evaluator-0"), family.child("evaluator-1")

    assert first.pid != second.pid
    for one in (first, second):
        assert one.pid is not None
        assert "zygote" in command(one.pid)
        assert parent(one.pid) == os.getpid()
        until(partial(leads_session, one.pid), SECONDS, "a session of its own")


def test_a_killed_evaluator_has_a_successor(family: Family) -> None:
    """SIGKILL is seen with its number, the zygote makes the next one at once, and counts no restart of its own."""
    family.load()
    child = family.child("evaluator-0")
    first = child.pid
    child.signal(signal.SIGKILL)

    assert wait(child) == -signal.SIGKILL
    assert child.died_with() == -signal.SIGKILL
    assert child.watch() == ""
    assert child.pid not in (None, first)
    assert (child.restarts, family.zygote.restarts) == (1, 0)
    assert "zygote" in command(child.pid)


def test_evaluators_outlive_their_zygote(family: Family) -> None:
    """When the zygote is killed its evaluators go on; one that dies then is started as other children are, and later ones forked again."""
    family.load()
    child, other = family.child("evaluator-0"), family.child("evaluator-1")
    family.zygote.signal(signal.SIGKILL)
    wait(family.zygote)
    child.signal(signal.SIGKILL)
    wait(child)
    assert child.watch() == ""

    assert other.pid is not None
    until(lambda: EVALUATOR in command(child.pid), SECONDS, "a program of its own")  # the kernel tells it a moment later
    assert family.zygote.watch() == ""
    until(lambda: not family.zygote.loading, SECONDS, "the next zygote to load")
    assert family.zygote.restarts == 1
    child.signal(signal.SIGKILL)
    wait(child)
    assert child.watch() == ""  # two deaths in a row: not at once
    family.now += 1.0
    until(lambda: child.watch() == "" and child.pid is not None, SECONDS, "its third start")
    assert "zygote" in command(child.pid)


def test_an_evaluator_waits_for_its_zygote(family: Family) -> None:
    """While the zygote loads nothing is started, and nothing is counted; afterwards `watch` has the evaluator forked."""
    family.zygote.start()
    child = family.child("evaluator-0")
    if family.zygote.loading:
        assert child.pid is None
    until(lambda: child.watch() == "" and child.pid is not None, SECONDS, "the evaluator")

    assert "zygote" in command(child.pid)
    assert child.restarts == 0


def test_a_stopped_evaluator_is_gone(family: Family) -> None:
    """Asked to leave, it leaves with code 0 and nothing of it is left; a deaf one is killed."""
    family.load()
    child, deaf = family.child("evaluator-0"), family.child("evaluator-1")
    until(lambda: listens(child.pid), SECONDS, "the evaluator to listen")
    deaf.signal(signal.SIGSTOP)
    pids = [child.pid, deaf.pid]
    ended = child._process
    child.stop(SECONDS)
    deaf.stop(0.05)

    assert ended is not None
    assert ended.poll() == 0
    assert [Path(f"/proc/{pid}").exists() for pid in pids] == [False, False]


def test_the_end_of_the_lifeline_is_seen(family: Family) -> None:
    """When the supervisor's end of its lifeline closes it leaves, and its sibling stays: nobody else holds that end."""
    family.load()
    child, other = family.child("evaluator-0"), family.child("evaluator-1")
    child._close_lifeline()

    assert wait(child) == 0
    assert other.pid is not None


def test_a_users_mistake_is_told_by_the_zygote(family: Family) -> None:
    """A potential that cannot be loaded ends the zygote with its sentence, and it is not started again."""
    family.choose("toy:lj?nonsense=1")
    family.zygote.start()
    assert wait(family.zygote) == process.EXIT_USER

    assert "has no option 'nonsense'" in family.zygote.watch()
    assert family.zygote.given_up


def test_what_has_threads_is_not_forked(family: Family) -> None:
    """Where a package has started a thread while it was loaded, evaluators are started anew instead, under the same rules."""
    (family.run_dir / "threaded.py").write_text(
        textwrap.dedent("""
            import sys, threading
            from pathlib import Path
            from tumbaga.driver import zygote

            threading.Thread(target=threading.Event().wait, daemon=True).start()
            zygote.main(Path(sys.argv[1]))
        """)
    )
    family.load("threaded")
    child = family.child("evaluator-0")
    pid = child.pid

    until(lambda: EVALUATOR in command(pid), SECONDS, "a program of its own")
    assert parent(pid) == os.getpid()
    until(lambda: listens(pid), SECONDS, "the evaluator to listen")
    child.stop(SECONDS)
    assert not Path(f"/proc/{pid}").exists()


def test_a_zygote_that_hangs_is_done_without(family: Family) -> None:
    """One that does not answer is killed, and the evaluator is started as other children are."""
    family.load()
    assert family.zygote._line is not None
    family.zygote._line.settimeout(0.05)
    family.zygote.signal(signal.SIGSTOP)
    child = family.child("evaluator-0")

    until(lambda: EVALUATOR in command(child.pid), SECONDS, "a program of its own")  # the kernel tells it a moment later
    assert wait(family.zygote) == -signal.SIGKILL


def test_strangers_are_cleared_away(family: Family) -> None:
    """A process that was adopted without being known leaves no zombie, and known ones keep their exit codes."""
    tether.adopt()
    script = "import os, sys; child = os.fork(); child or os._exit(0); print(child)"
    stranger = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(5)"], stdin=subprocess.PIPE) as known:
        until(lambda: cleared(stranger, known.pid), SECONDS, "the stranger to be cleared away")
        assert known.stdin is not None
        known.stdin.close()
        os.waitid(os.P_PID, known.pid, os.WEXITED | os.WNOWAIT)
        reap({known.pid})
        assert known.wait(SECONDS) == 5
