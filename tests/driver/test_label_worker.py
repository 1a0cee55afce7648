"""A label worker between the learner, where labels are computed and the disk; and labelling processes that do what real ones do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import devices
from tumbaga.driver.errors import ConfigError
from tumbaga.driver.label_pool import LocalPool
from tumbaga.driver.label_process import Terms, UnusableError, resident
from tumbaga.driver.label_worker import Worker
from tumbaga.driver.testing import until
from tumbaga.online import spool
from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels.repeating import REPEAT
from tumbaga.online.labels.testing import read_journal
from tumbaga.online.records import Frame, Label
from tumbaga.socket_protocol import bus

FRAME = Frame(np.array([1, 1]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]]))
COPPER_GOLD = Frame(np.array([29, 79]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.6]]))
TIMEOUT = 60.0


class Line:
    """The endpoint to the learner: what came in is what the test puts there, what goes out is written down."""

    def __init__(self) -> None:
        self.inbox: list[tuple[str, bus.AnyMessage, list[bytes]]] = []
        self.sent: list[bus.AnyMessage] = []

    def give(self, task: int) -> None:
        buffers = [array.tobytes() for array in (FRAME.numbers, FRAME.positions, FRAME.cell)]
        self.inbox.append(("", bus.Task(task, 10 * task, FRAME.key, False), buffers))

    def receive(self) -> tuple[str, bus.AnyMessage, list[bytes]] | None:
        return self.inbox.pop(0) if self.inbox else None

    def send(self, message: bus.AnyMessage, buffers: Sequence[Any] = (), to: str = "") -> bool:
        self.sent.append(message)
        return True


class Reporter:
    def __init__(self) -> None:
        self.events: list[str] = []

    def state(self, **state: Any) -> None:
        pass

    def log(self, level: str, event: str, **detail: Any) -> None:
        self.events.append(event)


class Pool:
    """Computes when the test says so."""

    def __init__(self) -> None:
        self.futures: list[Future[Label]] = []
        self.frames: list[Frame] = []
        self.safe: list[Frame] = []

    def schedule(self, frame: Frame) -> Future[Label]:
        self.frames.append(frame)
        self.futures.append(Future())
        return self.futures[-1]

    def saved(self, frame: Frame) -> None:
        self.safe.append(frame)

    def fileno(self) -> int:
        return -1

    def turn(self) -> None:
        pass

    def stop(self) -> None:
        pass


class Bench:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.line, self.reporter, self.pool = run_dir, Line(), Reporter(), Pool()
        self.worker = Worker(run_dir, "label-0", self.pool, self.line, self.reporter)  # type: ignore[arg-type]

    def turn(self) -> None:
        self.worker.finished()
        self.worker.messages()

    def results(self) -> list[spool.Result | None]:
        return [result for _, result in spool.waiting(self.run_dir)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    os.close(made.worker.done_fd)
    os.close(made.worker._wake)


def label() -> Label:
    return Label(-31.0, np.zeros((2, 3)), "test:lj", 0.5)


def test_a_label_is_on_disk_before_the_worker_is_idle(bench: Bench) -> None:
    """Between the end of a label and the word that it ended stands the file; the word names the task."""
    bench.line.give(4)
    bench.turn()
    assert isinstance(bench.line.sent[-1], bus.WorkerBusy)
    bench.turn()
    assert bench.results() == []
    bench.pool.futures[0].set_result(label())
    assert bench.pool.safe == []
    bench.turn()
    (result,) = bench.results()
    assert bench.pool.safe == bench.pool.frames

    assert bench.pool.frames[0].key == FRAME.key
    assert result is not None
    assert (result.task, result.frame) == (4, 40)
    assert bench.line.sent[-1] == bus.WorkerIdle("label-0", os.getpid(), 4)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LabelFailedError("the SCF did not converge"), "the SCF did not converge"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failure_is_on_disk_with_its_reason(bench: Bench, error: Exception, reason: str) -> None:
    """Whatever ended a label other than a result is recorded as a sentence, and the next task is taken."""
    bench.line.give(4)
    bench.turn()
    bench.pool.futures[0].set_exception(error)
    bench.turn()
    bench.line.give(5)
    bench.turn()

    assert bench.results() == [spool.Result(4, 40, None, reason)]
    assert len(bench.pool.futures) == 2


def test_a_full_disk_loses_no_label(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 4: while the disk takes nothing the worker keeps its label, says that it is busy, and saves it when it can."""
    whole = spool.put

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    bench.line.give(4)
    bench.turn()
    bench.pool.futures[0].set_result(label())
    monkeypatch.setattr(spool, "put", full)
    for _ in range(3):
        bench.turn()
        bench.worker.beat()
        assert isinstance(bench.line.sent[-1], bus.WorkerBusy)
    assert "label not saved" in bench.reporter.events
    monkeypatch.setattr(spool, "put", whole)
    bench.turn()

    assert len(bench.results()) == 1
    assert bench.line.sent[-1] == bus.WorkerIdle("label-0", os.getpid(), 4)


def test_a_second_task_is_seen_and_not_taken(bench: Bench) -> None:
    """A task that comes while another is under way is not computed, and the idle worker says that it has seen it: it is not on its way."""
    bench.line.give(4)
    bench.turn()
    bench.line.give(5)
    bench.turn()
    bench.pool.futures[0].set_result(label())
    bench.turn()

    assert len(bench.pool.futures) == 1
    assert bench.line.sent[-1] == bus.WorkerIdle("label-0", os.getpid(), 5)


# -- real processes --------------------------------------------------------------------------------------------------------------------


class Elsewhere:
    """Pools of real labelling processes; their temporary folders lie in one of the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pools, self.said = folder, [], []  # type: ignore[var-annotated]
        folder.mkdir()

    def pool(self, method: str, **terms: Any) -> LocalPool:
        made = LocalPool(Terms(method, **terms), "tumbaga-label-test-", lambda level, event, **detail: self.said.append((event, detail)))
        self.pools.append(made)
        return made

    def label(self, method: str, frame: Frame = FRAME, **terms: Any) -> Label:
        return self.pool(method, **terms).schedule(frame).result(TIMEOUT)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    made = Elsewhere(tmp_path / "temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(made.folder))
    yield made
    pids = [pool._process.pid for pool in made.pools if pool._process.pid]
    for pool in made.pools:
        pool.stop()
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []
    assert list(made.folder.iterdir()) == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("label")] == []


@pytest.fixture
def function(tmp_path: Path) -> Callable[[str], str]:
    """Write a function of a user with this body; return the method that calls it."""

    def write(body: str) -> str:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "mine.py").write_text(f"import os, subprocess, sys, time\nimport numpy as np\n\ndef label(atoms):\n{lines}")
        return f"call:{tmp_path / 'mine.py'}:label"

    return write


def begun(journal: Path, times: int = 1) -> int:
    """Wait until so many labels have begun; return the process of the last one."""
    until(lambda: sum(what == "start" for what, _, _ in read_journal(journal)) >= times, TIMEOUT, "the label to begin")
    return read_journal(journal)[-1][2]


@pytest.mark.parametrize("method", ["test:lj", pytest.param("ase:ase.calculators.emt:EMT", marks=pytest.mark.slow)])
def test_a_label_from_a_process_is_the_same_to_the_last_bit(method: str, elsewhere: Elsewhere) -> None:
    """Energy, forces and method are those of the engine itself; a second frame goes to the same process."""
    from tumbaga.online.labels.factory import make_labeller

    pool, here = elsewhere.pool(method), make_labeller(method).label(COPPER_GOLD)
    made = [pool.schedule(COPPER_GOLD).result(TIMEOUT) for _ in range(2)]

    for one in made:
        assert (one.energy, one.method, one.details) == (here.energy, here.method, here.details)
        np.testing.assert_array_equal(one.forces, here.forces)


def test_a_label_whose_process_was_killed_is_computed_again(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """A killed process is no verdict on the frame: as many are tried as `attempts` says, then it is a failure that names the exit code."""
    journal = tmp_path / "journal"
    pool = elsewhere.pool(f"test:lj?delay=0.5&journal={journal}")
    future = pool.schedule(FRAME)
    os.kill(begun(journal), signal.SIGKILL)
    assert future.result(TIMEOUT).method.startswith("test:lj")
    pool.turn()
    assert elsewhere.said == [("labelling process died", {"deaths": 1, "code": -9})]

    future = pool.schedule(FRAME)
    for times in (3, 4):
        os.kill(begun(journal, times), signal.SIGKILL)
    with pytest.raises(LabelFailedError, match=r"^the labelling process died 2 times on this frame \(last exit code -9\)$"):
        future.result(TIMEOUT)
    assert pool.schedule(FRAME).result(TIMEOUT).energy  # and the next frame has a process again


@pytest.mark.slow
def test_a_process_that_dies_between_two_labels_costs_nothing(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """Nobody waits for it then: the next frame has a new one at once, and no attempt is counted."""
    journal = tmp_path / "journal"
    pool = elsewhere.pool(f"test:lj?journal={journal}", attempts=1)
    for _ in range(3):
        pool.schedule(FRAME).result(TIMEOUT)
        os.kill(begun(journal), signal.SIGKILL)


def test_an_answer_is_kept_until_it_is_safe(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """Invariant 4: who asked is killed before it has put the label on disk; its successor has it without a second computation."""
    journal, keep = tmp_path / "journal", tmp_path / "spool"
    keep.mkdir()
    method = f"test:lj?journal={journal}"
    first = elsewhere.label(method, keep=str(keep))
    pool = elsewhere.pool(method, keep=str(keep))
    again = pool.schedule(FRAME).result(TIMEOUT)
    assert (again.energy, again.method, again.seconds) == (first.energy, first.method, first.seconds)
    assert len(read_journal(journal)) == 2

    pool.saved(FRAME)
    assert list(keep.iterdir()) == []
    assert elsewhere.label("test:lj?epsilon=0.4", keep=str(keep)).energy != first.energy
    pool.schedule(FRAME).result(TIMEOUT)
    assert len(read_journal(journal)) == 4  # of another method, and after it was safe: computed


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("def label(:", "cannot be used: .*mine.py cannot be imported: SyntaxError"),
        ("x = 1", "cannot be used: .*mine.py has no function label"),
        ("kept = bytearray(400_000_000)\nimport time; time.sleep(3600)", "cannot be used: what it imports needed more memory than"),
        ("import os; os._exit(3)", r"has no process that could be started \(last exit code 3\)"),
    ],
)
def test_a_method_that_cannot_be_used_is_no_failure_of_frames(text: str, sentence: str, tmp_path: Path, elsewhere: Elsewhere) -> None:
    """It is told when the worker starts; a worker that finds out later leaves, and nothing is written down of its frame."""
    (tmp_path / "mine.py").write_text(text)
    pool = elsewhere.pool(f"call:{tmp_path / 'mine.py'}:label", memory_gb=0.3)

    with pytest.raises(UnusableError, match=sentence):
        pool.prepare()
    with pytest.raises(UnusableError, match=sentence):
        pool.schedule(FRAME).result(TIMEOUT)


def test_a_worker_with_a_method_that_cannot_be_used_leaves(bench: Bench) -> None:
    """Its process ends with the sentence; the task stays, for a worker whose user has mended it."""
    bench.line.give(4)
    bench.turn()
    bench.pool.futures[0].set_exception(UnusableError("call:mine.py:label", "cannot be used"))
    with pytest.raises(UnusableError):
        bench.turn()
    assert bench.results() == []


def test_labels_are_repeated_if_asked(elsewhere: Elsewhere) -> None:
    """In the process that labels; the difference comes back in the details."""
    assert REPEAT not in elsewhere.label("test:lj").details
    assert elsewhere.label("test:lj", repeat_every=1).details[REPEAT]["force_max"] < 1e-9


@pytest.mark.slow
def test_a_label_that_hangs_is_killed(elsewhere: Elsewhere) -> None:
    """At its time limit, with the limit in the reason; it is not tried again, and the pool goes on."""
    pool = elsewhere.pool("test:hang?on=1", time_limit=1.5)
    with pytest.raises(LabelFailedError, match=r"^took longer than label.time_limit = 1.5 s and was killed$"):
        pool.schedule(FRAME).result(TIMEOUT)
    assert pool._process.pid is None


@pytest.mark.slow
def test_a_label_may_be_suspended(tmp_path: Path) -> None:
    """A worker and its label that are stopped for longer than the time limit, as jobs of a queue are, go on and finish."""
    journal, limit = tmp_path / "journal", 3.0
    program = (
        "import numpy as np\n"
        "from tumbaga.driver.label_pool import LocalPool\n"
        "from tumbaga.driver.label_process import Terms\n"
        "from tumbaga.online.records import Frame\n"
        f"pool = LocalPool(Terms('test:lj?delay=1&journal={journal}', time_limit={limit}), 'tumbaga-label-test-', print)\n"
        "print(pool.schedule(Frame(np.array([1]), np.zeros((1, 3)))).result().method)\n"
        "pool.stop()\n"
    )
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True) as worker:
        stopped = (worker.pid, begun(journal))
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        until(lambda: time.monotonic() > began + 1.5 * limit, TIMEOUT, "the time limit to be over")
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        said, _ = worker.communicate(timeout=TIMEOUT)

    assert said.startswith("test:lj/")


@pytest.mark.slow
def test_a_label_that_eats_memory_is_killed(tmp_path: Path, elsewhere: Elsewhere, function: Callable[[str], str]) -> None:
    """Near the limit and not beyond twice of it, with the limit in the reason, and once: the next attempt would need as much."""
    eater = f"open({str(tmp_path / 'begun')!r}, 'a').write('x')\nkept = []\nwhile True:\n    kept.append(np.ones(1 << 20))\n    time.sleep(0.02)"
    with pytest.raises(LabelFailedError, match=r"^needed more memory than label.memory_gb = 0.4 and was killed$"):
        elsewhere.label(function(eater), memory_gb=0.4)
    assert (tmp_path / "begun").read_text() == "x"


@pytest.mark.slow
def test_memory_of_programs_that_a_label_starts_counts(elsewhere: Elsewhere, function: Callable[[str], str]) -> None:
    """A calculator that runs a program is watched together with it, and both are killed."""
    hungry = "import time; kept = bytearray(500_000_000); time.sleep(3600)"
    with pytest.raises(LabelFailedError, match="needed more memory"):
        elsewhere.label(function(f"subprocess.run([sys.executable, '-c', {hungry!r}])"), memory_gb=0.5)


@pytest.mark.slow
def test_a_limit_that_is_kept_changes_nothing(elsewhere: Elsewhere) -> None:
    """A label that needs less than it may is computed as without a limit."""
    assert elsewhere.label("test:lj", memory_gb=0.5).energy == elsewhere.label("test:lj").energy


@pytest.mark.slow
@pytest.mark.parametrize("end", ["time limit", "stop"])
def test_programs_that_a_label_has_started_are_killed_with_it(
    end: str, tmp_path: Path, elsewhere: Elsewhere, function: Callable[[str], str]
) -> None:
    """A foreign program in a process group of its own does not outlive its label."""
    note = tmp_path / "pid"
    body = f"running = subprocess.Popen(['sleep', '3600'], process_group=0)\nopen({str(note)!r}, 'w').write(f'{{running.pid}}\\n')\nrunning.wait()"
    pool = elsewhere.pool(function(body), time_limit=1.5 if end == "time limit" else 3600.0)
    future = pool.schedule(FRAME)
    pid = int(until(lambda: note.exists() and note.read_text().strip(), TIMEOUT, "the program to run"))
    if end == "stop":
        pool.stop()
    else:
        with pytest.raises(LabelFailedError, match="took longer"):
            future.result(TIMEOUT)

    until(lambda: not alive(pid), TIMEOUT, "the program to be gone")


def alive(pid: int) -> bool:
    """Whether a process is there and not only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_killed_worker_takes_its_label_along(tmp_path: Path) -> None:
    """kill -9 of the process that waits: the labelling process, the program that it runs and its files are gone at once."""
    (tmp_path / "mine.py").write_text(
        "import os, subprocess\n"
        "def label(atoms):\n"
        "    running = subprocess.Popen(['sleep', '3600'])\n"
        f"    open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{running.pid}}\\n')\n"
        "    running.wait()\n"
    )
    program = (
        "import numpy as np\n"
        "from tumbaga.driver.label_pool import LocalPool\n"
        "from tumbaga.driver.label_process import Terms\n"
        "from tumbaga.online.records import Frame\n"
        f"pool = LocalPool(Terms('call:{tmp_path / 'mine.py'}:label'), 'tumbaga-label-test-', print)\n"
        "pool.schedule(Frame(np.array([1]), np.zeros((1, 3)))).result()\n"
    )
    (tmp_path / "temporary").mkdir()
    with subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path / "temporary")}) as waiting:
        pids = until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().split(), TIMEOUT, "the label to begin")
        waiting.kill()

    until(lambda: not any(alive(int(pid)) for pid in pids), TIMEOUT, "its processes to be gone")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_label_has_its_threads_its_cores_and_its_folder(elsewhere: Elsewhere, function: Callable[[str], str]) -> None:
    """As many threads as it may have, the cores that it may use, an own working directory for files; its standard input is empty."""
    body = (
        "details = dict(threads=os.environ['OMP_NUM_THREADS'], cores=sorted(os.sched_getaffinity(0)), nice=os.nice(0))\n"
        "details |= dict(folder=os.getcwd(), first=open('/proc/self/oom_score_adj').read().strip(), input=sys.stdin.read())\n"
        "return dict(energy=0.0, forces=np.zeros((2, 3)), details=details)"
    )
    core = max(os.sched_getaffinity(0))
    details = elsewhere.label(function(body), threads=3, cores=(core,)).details

    assert (details["threads"], details["cores"], details["input"]) == ("3", [core], "")
    assert details["nice"] == min(19, os.nice(0) + 10)
    assert details["first"] == "1000"  # where memory runs out, the system takes it before whoever serves
    assert Path(details["folder"]).parent == elsewhere.folder


def test_what_a_label_prints_is_not_taken_for_its_answer(elsewhere: Elsewhere, function: Callable[[str], str]) -> None:
    """Foreign code prints as it likes, from Python or below it."""
    body = "print('hello', flush=True)\nos.write(1, b'from below')\nreturn 1.5, np.zeros((2, 3))"

    assert elsewhere.label(function(body)).energy == 1.5


@pytest.mark.parametrize(
    ("label", "cores", "evaluators", "left"),
    [
        ({}, 2, 1, (1,)),
        ({}, 1, 1, ()),
        ({"workers": 2}, 8, 2, (2, 3, 4, 5, 6, 7)),
        ({"workers": 2, "cores": 3}, 8, 2, (2, 3, 4, 5, 6, 7)),
        ({"workers": 2, "cores": 4}, 8, 2, ()),
    ],
)
def test_labels_keep_off_the_cores_of_the_evaluators(label: dict[str, int], cores: int, evaluators: int, left: tuple[int, ...]) -> None:
    """Where enough are left; otherwise they may use all, and their low priority must do."""
    settings = configs.Config(label=configs.Label(**label))  # type: ignore[arg-type]

    assert devices.left_for_labels(settings, range(cores), evaluators) == left


def test_evaluators_are_as_many_as_cores_are_left() -> None:
    """Each label takes its cores of this machine, and none on a cluster."""
    serve = configs.Serve(connect=tuple(f"unix:{index}" for index in range(9)))

    def evaluators(**label: Any) -> int:
        return len(devices.chosen(configs.Config(serve=serve, label=configs.Label(**label)), 8, gpu=False))

    assert (evaluators(), evaluators(cores=3), evaluators(cores=2, workers=3), evaluators(cores=8)) == (7, 5, 2, 1)
    assert evaluators(workers=6, cores=4, executor="dask:tcp://127.0.0.1:8786") == 8


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ({"executor": "tcp://127.0.0.1:8786"}, "label.executor: is 'tcp://127.0.0.1:8786'; write local, or dask:tcp://HOST:PORT"),
        ({"executor": "dask:127.0.0.1:8786"}, "label.executor: is 'dask:127.0.0.1:8786'"),
        ({"executor": "dask:tcp://127.0.0.1:8786", "method": "ipi:unix:x"}, "label.executor: is a Dask cluster, and ipi labels come from"),
        ({"cores": 0}, "label.cores: is 0; it must be at least 1"),
        ({"memory_gb": -1.0}, "label.memory_gb: is -1.0; it must be at least 0"),
    ],
)
def test_wrong_settings_are_explained(label: dict[str, Any], sentence: str) -> None:
    """Each is a sentence that names its key."""
    with pytest.raises(ConfigError) as caught:
        configs.Config(label=configs.Label(**label)).check()

    assert str(caught.value).startswith(sentence)


def test_options_stand_in_toml() -> None:
    """The settings of a calculator, with numbers, text and lists, are read back as they were written."""
    text = "[label]\nmethod = 'ase:tblite.ase:TBLite'\nexecutor = 'dask:tcp://node:1'\n[label.options]\nmethod = 'GFN1-xTB'\nkpts = [1, 1, 2]\n"
    settings = configs.parse(text, "here")

    assert settings.label.options == {"method": "GFN1-xTB", "kpts": [1, 1, 2]}
    assert settings.label.cluster == "tcp://node:1"
    assert configs.parse(configs.dumps(settings), "there") == settings


def test_memory_is_that_of_a_process_and_its_children() -> None:
    """A child's memory is added, and a process that is not there has none."""
    alone = resident(os.getpid())
    with subprocess.Popen(
        [sys.executable, "-c", "kept = bytearray(200_000_000); print(flush=True); input()"], stdin=-1, stdout=-1
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert resident(os.getpid()) - alone > 200_000_000
        child.kill()
        child.communicate()

    assert resident(child.pid) == 0
