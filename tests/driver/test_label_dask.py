"""Labels on a real Dask cluster of two workers on this machine; what is killed is killed by its process id."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tumbaga.driver.label_pool import LocalPool
from tumbaga.driver.label_process import Terms
from tumbaga.driver.testing import Program, until
from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels.factory import make_labeller
from tumbaga.online.labels.testing import read_journal
from tumbaga.online.records import Frame
from tumbaga.online.store import FILE, Store

pytest.importorskip("distributed")
from tumbaga.driver.label_dask import DaskPool

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(600)]
TIMEOUT = 180.0  # a cluster starts seven processes with many imports
FRAMES = [Frame(np.array([29, 79]), np.array([[0.0, 0.0, 0.0], [0.0, 0.1, 2.5 + 0.1 * index]])) for index in range(4)]
EMT = "ase:ase.calculators.emt:EMT"


class Cluster:
    """A scheduler and workers with nannies, as `dask scheduler` and `dask worker` start them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._programs = folder, []  # type: ignore[var-annotated]
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"

    def start(self, workers: int = 2) -> None:
        self._start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        for _ in range(workers):
            self._start("worker", self.address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.folder))

    def _start(self, kind: str, *arguments: str) -> None:
        environment = {**os.environ, "TMPDIR": str(self.folder), "DASK_CONFIG": str(self.folder)}
        with open(self.folder.with_name(f"{self.folder.name}-{len(self._programs)}.log"), "wb") as log:
            command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", *arguments]
            self._programs.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    def kill(self) -> None:
        """The scheduler, the nannies and the workers, at one stroke; their trackers see it, remove semaphores from /dev/shm, and leave."""
        for program in self._programs:
            family = [psutil.Process(program.pid), *psutil.Process(program.pid).children(recursive=True)]
            trackers = [one for one in family if "resource_tracker" in " ".join(one.cmdline())]
            for one in family:
                if one not in trackers:
                    one.kill()
            program.wait()
            assert psutil.wait_procs(family, TIMEOUT)[1] == []
        self._programs.clear()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("dask") / "cluster")
    made.start()
    yield made
    made.kill()


@pytest.fixture
def pool(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., DaskPool]]:
    """Make pools for the cluster; in the end nothing of theirs is left on it."""
    pools: list[DaskPool] = []

    def make(method: str, workers: int = 2, address: str = cluster.address, **terms: Any) -> DaskPool:
        pools.append(DaskPool(address, Terms(method, **terms), workers, str(tmp_path), lambda *_, **__: None))
        return pools[-1]

    yield make
    for one in pools:
        for frame in FRAMES:
            with contextlib.suppress(RuntimeError):  # it was stopped by the test
                one.saved(frame)
        one.stop()
    assert published(cluster) == []


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], LocalPool]]:
    """Make pools on this machine."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pools: list[LocalPool] = []

    def make(method: str) -> LocalPool:
        pools.append(LocalPool(Terms(method), "tumbaga-label-test-", lambda *_, **__: None))
        return pools[-1]

    yield make
    for one in pools:
        one.stop()


def begun(journal: Path, times: int = 1) -> list[int]:
    """Wait until so many labels have begun; return the processes that compute them, in order."""

    def look() -> list[int]:
        return [pid for what, _, pid in read_journal(journal) if what == "start"]

    until(lambda: len(look()) >= times, TIMEOUT, f"{times} labels to begin")
    return look()


def counted(journal: Path, what: str) -> Counter[str]:
    return Counter(key for kind, key, _ in read_journal(journal) if kind == what)


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def published(cluster: Cluster) -> list[str]:
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        return list(client.list_datasets())


@pytest.mark.parametrize(
    ("method", "accuracy"),
    [
        ("test:lj", 0.0),
        (EMT, 0.0),
        # tblite begins from the frame before, which is another one on two workers: equal to what its SCF converges to
        ("ase:tblite.ase:TBLite?method=GFN1-xTB&verbosity=0&accuracy=0.01", 1e-6),
    ],
)
def test_labels_of_a_cluster_are_those_of_this_machine(
    method: str, accuracy: float, pool: Callable[..., DaskPool], here: Callable[[str], LocalPool]
) -> None:
    """Energies and forces are equal to the last bit where the engine itself has that, as are methods and details."""
    if "tblite" in method:
        pytest.importorskip("tblite")
    local, remote = here(method), pool(method)
    futures = [(local.schedule(frame), remote.schedule(frame)) for frame in FRAMES]
    for one, other in [(one.result(TIMEOUT), other.result(TIMEOUT)) for one, other in futures]:
        assert (other.method, other.details) == (one.method, one.details)
        assert abs(other.energy - one.energy) <= accuracy
        np.testing.assert_allclose(other.forces, one.forces, rtol=0.0, atol=accuracy)


def test_two_labels_are_computed_at_a_time(pool: Callable[..., DaskPool], tmp_path: Path) -> None:
    """On a cluster of two workers the second label begins before the first has ended."""
    journal = tmp_path / "journal"
    there = pool(f"test:lj?delay=2&journal={journal}")
    for future in [there.schedule(frame) for frame in FRAMES[:2]]:
        future.result(TIMEOUT)

    assert [what for what, _, _ in read_journal(journal)] == ["start", "start", "end", "end"]


def test_a_lost_worker_is_replaced(pool: Callable[..., DaskPool], cluster: Cluster, tmp_path: Path) -> None:
    """kill -9 of a Dask worker in mid-label: its label is computed by another one and delivered once, and its process is gone with it."""
    journal = tmp_path / "journal"
    there = pool(f"test:lj?delay=2&journal={journal}")
    future = there.schedule(FRAMES[0])
    (pid,) = begun(journal)
    os.kill(parent(pid), signal.SIGKILL)

    assert future.result(TIMEOUT).energy == make_labeller("test:lj").label(FRAMES[0]).energy
    until(lambda: gone(pid), TIMEOUT, "the process of the lost worker to be gone")
    assert (counted(journal, "start").total(), counted(journal, "end").total()) == (2, 1)
    assert len(published(cluster)) == 1  # until it is on disk here
    there.saved(FRAMES[0])
    until(lambda: published(cluster) == [], TIMEOUT, "the label to be taken off the cluster")


def test_faults_on_a_cluster_are_those_of_this_machine(pool: Callable[..., DaskPool], tmp_path: Path) -> None:
    """A label that hangs is killed at its limit, one that crashes is tried as often as it may be, one that raises says why; all go on."""
    journal = tmp_path / "journal"
    with pytest.raises(LabelFailedError, match=r"^took longer than label.time_limit = 2 s and was killed$"):
        pool(f"test:hang?journal={journal}", time_limit=2.0).schedule(FRAMES[0]).result(TIMEOUT)
    until(lambda: gone(begun(journal)[0]), TIMEOUT, "the process that hung to be gone")
    with pytest.raises(LabelFailedError, match=r"^the labelling process died 2 times on this frame \(last exit code 86\)$"):
        pool("test:exit").schedule(FRAMES[0]).result(TIMEOUT)
    with pytest.raises(LabelFailedError, match=r"^this labeller fails on purpose$"):
        pool("test:raise").schedule(FRAMES[0]).result(TIMEOUT)
    assert pool("test:lj").schedule(FRAMES[0]).result(TIMEOUT).energy


def test_a_stop_leaves_nothing_on_the_cluster(pool: Callable[..., DaskPool], cluster: Cluster, tmp_path: Path) -> None:
    """Labels under way are cancelled: their processes are gone, nothing is published, and the cluster has room for others."""
    journal = tmp_path / "journal"
    there = pool(f"test:hang?journal={journal}")
    for frame in FRAMES[:2]:
        there.schedule(frame)
    pids = begun(journal, 2)
    there.stop()

    until(lambda: all(gone(pid) for pid in pids), TIMEOUT, "the processes of the cancelled labels to be gone")
    assert published(cluster) == []
    assert pool("test:lj").schedule(FRAMES[0]).result(TIMEOUT).energy


def test_a_label_outlives_whoever_waits_for_it(pool: Callable[..., DaskPool], cluster: Cluster, tmp_path: Path) -> None:
    """kill -9 of the waiting process: its successor gets the label that was under way, and none is begun a second time."""
    journal = tmp_path / "journal"
    method = f"test:lj?delay=4&journal={journal}"
    program = (
        "import numpy as np\n"
        "from tumbaga.driver.label_dask import DaskPool\n"
        "from tumbaga.driver.label_process import Terms\n"
        "from tumbaga.online.records import Frame\n"
        f"pool = DaskPool({cluster.address!r}, Terms({method!r}), 2, {str(tmp_path)!r}, print)\n"
        "pool.schedule(Frame(np.array([29, 79]), np.array([[0.0, 0.0, 0.0], [0.0, 0.1, 2.5]]))).result()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program]) as waiting:
        begun(journal)
        waiting.kill()

    there = pool(method)
    assert there.schedule(FRAMES[0]).result(TIMEOUT).energy
    assert counted(journal, "start").total() == 1
    there.saved(FRAMES[0])
    until(lambda: published(cluster) == [], TIMEOUT, "the label to be taken off the cluster")


def test_without_a_scheduler_labels_wait(tmp_path: Path) -> None:
    """One that is not there yet, and one that is killed: the log says so and where, and labels come when a scheduler does."""
    cluster, said = Cluster(tmp_path / "cluster"), []  # type: ignore[var-annotated]
    there = DaskPool(cluster.address, Terms("test:lj?delay=1"), 1, str(tmp_path), lambda *words, **detail: said.append((words, detail)))

    def told(event: str) -> list[dict[str, Any]]:
        there.turn()
        return [detail for (_, what), detail in said if what == event]

    try:
        future = there.schedule(FRAMES[0])
        (first, *_) = until(lambda: told("no Dask scheduler"), TIMEOUT, "word that there is no scheduler")
        assert first["address"] == cluster.address
        cluster.start(workers=1)
        assert future.result(TIMEOUT).energy
        future = there.schedule(FRAMES[1])
        cluster.kill()
        until(lambda: told("Dask scheduler lost"), TIMEOUT, "word that the scheduler is gone")
        assert not future.done()
        cluster.start(workers=1)
        assert future.result(TIMEOUT).energy
        assert len(told("connected to the Dask scheduler")) == 2
    finally:
        there.stop()
        cluster.kill()


def test_a_run_learns_from_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    """`tumbaga run --executor dask:…`: labels arrive and are those of this machine; a killed label worker costs no label a second time."""
    journal = tmp_path / "journal"
    label = ("--label", f"test:lj?delay=2&journal={journal}", "--executor", f"dask:{cluster.address}")
    with Program(
        tmp_path / "run", "run", "cuau-water", *label, "--force-error", "0.02", "--steps", "1000000", scratch=tmp_path / "scratch"
    ) as run:
        begun(journal)
        dead = run.kill("label-0")
        run.restarted("label-0", dead)
        status = run.until(lambda status: status["labels"]["converged"] >= 3 and status["swaps"], "labels and a swap", TIMEOUT)
        assert status["steps"] > 0
        assert run.stop() == 0, run.output
        assert run.left_behind() == []
    starts, ends = counted(journal, "start"), counted(journal, "end")
    store = Store(run.run_dir / FILE, read_only=True)
    labels = store.labels()
    store.close()

    assert max(starts.values()) == 1
    # of labels that were under way at the stop some may have ended since
    assert {stored.frame.key for stored in labels} <= set(ends)
    assert (ends - Counter(stored.frame.key for stored in labels)).total() <= 1
    for stored in labels:
        local = make_labeller("test:lj").label(stored.frame)
        assert (stored.label.energy, stored.label.method) == (local.energy, local.method)
        np.testing.assert_array_equal(stored.label.forces, local.forces)
