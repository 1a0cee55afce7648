"""Children of a run: real processes of a few lines, an injected clock, no waiting but for their ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tumbaga.driver import process
from tumbaga.driver.children import MAX_DEATHS, Child

LOYAL = "import sys; sys.stdin.read(); open('left', 'w').close()"
STUBBORN = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); sys.stdin.read()"
SENTENCE = f"import sys; print('noise'); print('label-0: pyscf is not installed', file=sys.stderr); sys.exit({process.EXIT_USER})"
CRASH = "import os, sys; print(f'out of luck', file=sys.stderr, flush=True); os._exit(3)"


class Clock:
    """Time that passes when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def child(code: str, *arguments: str) -> Child:
        (tmp_path / "a_child.py").write_text(code)
        made.append(Child("one", "a_child", tmp_path, clock, arguments))
        made[-1].start()
        return made[-1]

    yield child
    for one in made:
        one.stop(0.0)


def begin(child: Child) -> None:
    """Have it started if its time has come and it was not started before."""
    if child._process is None:
        child.watch()


def wait(child: Child) -> None:
    assert child._process is not None
    child._process.wait(60)


def test_a_child_knows_where_it_is(make: Callable[..., Child], tmp_path: Path) -> None:
    """A child runs in the run directory with it as its first argument, and what it prints is in the log folder."""
    child = make("import os, sys; print(os.getcwd() == sys.argv[1], sys.argv[2:], os.environ['OMP_NUM_THREADS'].isdigit())", "x")
    wait(child)

    assert (tmp_path / process.LOGS / "one.err").read_text() == "True ['x'] True\n"


def test_a_users_mistake_is_not_tried_again(make: Callable[..., Child], clock: Clock) -> None:
    """Exit code 78 ends in its last line on standard error, once, and the child is not started again however long one waits."""
    child = make(SENTENCE)
    wait(child)

    assert child.watch() == "label-0: pyscf is not installed"
    clock.now += 1e6
    assert child.pid is None
    child.watch()
    assert child.pid is None
    assert child.restarts == 0


def test_a_crash_is_started_again_after_a_growing_pause(make: Callable[..., Child], clock: Clock) -> None:
    """After a first death there is another at once, and each further one in a row waits twice as long for its restart, and not before."""
    child = make(CRASH)
    wait(child)
    assert child.watch() == ""
    assert child.restarts == 1
    for pause in (0.1, 0.2, 0.4):
        wait(child)
        assert child.watch() == ""
        clock.now += 0.99 * pause
        assert child.watch() == ""
        assert child.pid is None
        clock.now += 0.02 * pause
        assert child.watch() == ""

    assert child.restarts == 4


def test_a_child_that_never_lives_is_given_up(make: Callable[..., Child], clock: Clock) -> None:
    """After six deaths in a row there is a sentence with the exit code and the last words, and no further start."""
    child = make(CRASH)
    sentences = []
    for _ in range(MAX_DEATHS):
        wait(child)
        sentences.append(child.watch())
        clock.now += 20.0
        begin(child)

    assert sentences[:-1] == [""] * (MAX_DEATHS - 1)
    assert sentences[-1] == "one died 6 times in a row, last with code 3; its last words: out of luck"
    child.watch()
    assert child.pid is None


def test_a_long_life_is_forgiven(make: Callable[..., Child], clock: Clock) -> None:
    """A child that lived longer than a minute each time is started again however often it dies, at once."""
    child = make(CRASH)
    for _ in range(MAX_DEATHS + 2):
        wait(child)
        clock.now += 61.0
        assert child.watch() == ""

    assert child.restarts == MAX_DEATHS + 2


def test_work_that_was_done_is_forgiven(make: Callable[..., Child], clock: Clock) -> None:
    """A child that answered before it died had started well, however often that happens and even if the news comes after its death."""
    child = make(CRASH)
    for deaths in range(1, 3 * MAX_DEATHS):
        dead = child._last_pid
        wait(child)
        if deaths % 2:  # the news comes before its death is seen, or after
            child.worked(dead)
        assert child.watch() == ""
        child.worked(dead)
        assert child.restarts == deaths
    for _ in range(MAX_DEATHS):
        child.worked(dead)  # of an earlier one
        wait(child)
        fault = child.watch()
        clock.now += 20.0
        begin(child)
    assert "died 6 times in a row" in fault


def test_a_killed_child_is_replaced(make: Callable[..., Child], clock: Clock) -> None:
    """After SIGKILL there is a new process of another id; its death is told once."""
    child = make(LOYAL)
    first = child.pid
    child.signal(signal.SIGKILL)
    wait(child)
    assert child.died_with() == -signal.SIGKILL
    assert child.watch() == ""
    assert child.died_with() is None
    clock.now += 1.0
    child.watch()

    assert child.pid not in (None, first)


def test_the_end_of_the_lifeline_is_seen(make: Callable[..., Child], tmp_path: Path) -> None:
    """A child whose lifeline ends can leave by itself: nothing else holds the other end of its standard input."""
    child, other = make(LOYAL), make(LOYAL)
    child._close_lifeline()
    wait(child)

    assert (tmp_path / "left").exists()
    assert other.pid is not None


def test_a_stubborn_child_is_killed(make: Callable[..., Child], tmp_path: Path) -> None:
    """A child that does not heed SIGTERM within the patience is gone after `stop`, and stopping twice is no error."""
    child = make(STUBBORN)
    pid = child.pid
    assert pid is not None
    child.stop(0.05)
    child.stop(0.05)

    assert child.pid is None
    assert not Path(f"/proc/{pid}").exists()


def test_last_words_of_the_silent() -> None:
    """A child that said nothing, or never had a log, has no last words."""
    assert Child("none", "m", Path("/nonexistent"), lambda: 0.0).last_words() == "(nothing)"
