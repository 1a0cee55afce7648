"""Labels by programs that connect to us: units, provenance, and the label worker that waits at their sockets."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ase.units
import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import structures, supervisor
from tumbaga.driver.client_labels import ClientLabeller, ClientPool, make_labeller
from tumbaga.driver.errors import ConfigError
from tumbaga.driver.label_worker import Worker
from tumbaga.driver.testing import until
from tumbaga.online import spool
from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels.factory import UnknownMethodError
from tumbaga.online.records import Frame
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.events import ForceReady, PosData
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingDriver, connect

TIMEOUT = 20.0
TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
CLUSTER = Frame(np.array([1, 1]), np.array([[0.0, 0.0, 0.0], [0.1, 0.2, 0.74]]))
CRYSTAL = Frame(CLUSTER.numbers, CLUSTER.positions, np.array([[5.0, 0.1, 0.2], [0.3, 6.0, 0.4], [0.5, 0.6, 7.0]]), True)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """Where to listen; nothing is left there."""
    yield f"{tmp_path}/socket"
    assert not os.path.lexists(f"{tmp_path}/socket")


class Computing:
    """Clients in threads: spring constant 1 Hartree/Bohr², a virial that has no symmetry in its values, and extras."""

    def __init__(self) -> None:
        self.frames: list[PosData] = []
        self.extras = b'{"cycles": 7}'
        self.threads: list[threading.Thread] = []

    def start(self, address: Address) -> None:
        driver = BlockingDriver(connect(address, TIMEOUT), self.compute, timeout=TIMEOUT)
        self.threads.append(threading.Thread(target=driver.serve, name="client"))
        self.threads[-1].start()

    def compute(self, frame: PosData) -> ForceReady:
        self.frames.append(frame)
        return ForceReady(0.5 * float((frame.positions**2).sum()), -frame.positions, np.diag([0.1, 0.2, 0.3]), self.extras)


@pytest.fixture
def computing() -> Iterator[Computing]:
    made = Computing()
    yield made
    for thread in made.threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()


@pytest.fixture
def labeller(path: str, computing: Computing) -> Iterator[ClientLabeller]:
    made = ClientLabeller(f"unix:{path}", "ase", level="springs")
    yield made
    made.close()


def test_a_label_is_in_electronvolts_and_angstroms(labeller: ClientLabeller, computing: Computing) -> None:
    """A spring constant of one Hartree/Bohr² is Ha/Bohr² in eV/Å²; cell and positions are the frame's, in Bohr on the way."""
    labeller.open()
    computing.start(labeller.address)
    label = labeller.label(CRYSTAL)

    spring = ase.units.Ha / ase.units.Bohr**2
    assert label.energy == pytest.approx(0.5 * spring * (CRYSTAL.positions**2).sum())
    assert np.allclose(label.forces, -spring * CRYSTAL.positions, rtol=1e-12)
    assert np.allclose(computing.frames[0].cell * ase.units.Bohr, CRYSTAL.cell, rtol=1e-12)
    assert np.allclose(label.details["virial_eV"], np.diag([0.1, 0.2, 0.3]) * ase.units.Ha)


def test_a_label_says_where_it_comes_from(labeller: ClientLabeller, computing: Computing, path: str) -> None:
    """Method, address, kind and client stand in it, and what the client said beside its forces."""
    labeller.open()
    computing.start(labeller.address)
    label = labeller.label(CLUSTER)

    assert label.method == labeller.method == f"ipi:unix:{path}(kind=ase, level=springs)"
    assert label.details == {"address": f"unix:{path}", "kind": "ase", "client": f"unix:{path}", "extras": {"cycles": 7}}
    assert not computing.frames[0].periodic
    assert label.seconds > 0


def test_an_error_of_the_client_fails_the_label(labeller: ClientLabeller, computing: Computing) -> None:
    computing.extras = b'{"error": "SCF did not converge in 50 cycles"}'
    labeller.open()
    computing.start(labeller.address)
    with pytest.raises(LabelFailedError, match="reports an error: SCF did not converge in 50 cycles"):
        labeller.label(CLUSTER)


def test_a_frame_that_cannot_be_sent_fails_the_label(path: str) -> None:
    """CP2K and QE compute in a box of their own, which only the user knows."""
    labeller = ClientLabeller(f"unix:{path}", "cp2k")
    with pytest.raises(LabelFailedError, match="kind cp2k needs a cell"):
        labeller.label(CLUSTER)
    labeller.close()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("ipi:", {}, "write unix:NAME"),
        ("ipi:cp2k", {}, "write unix:NAME"),
        ("ipi:tcp:localhost", {}, "port is missing"),
        ("ipi:unix:" + 200 * "x", {}, "the system allows 107"),
        ("ipi:unix:x", {"kind": "vasp"}, "no kind of client 'vasp'; there are generic, ase, ipi, lammps, cp2k, qe"),
        ("ipi:unix:x?speed=9", {}, "has no option 'speed'; there are kind, box, level, prefix"),
        ("ipi:unix:x?box=wide", {}, "cannot read box = 'wide' as a length in Å"),
        ("ipi:unix:x", {"box": -1}, "cannot read box = -1 as a length in Å"),
    ],
)
def test_a_mistake_in_the_method_is_a_sentence(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UnknownMethodError, match=said):
        make_labeller(method, **options)


def test_other_methods_are_made_where_they_were() -> None:
    assert make_labeller("test:lj").method.startswith("test:lj")


def test_a_run_whose_frames_have_no_cell_does_not_start_with_a_code_that_needs_one() -> None:
    """The sentence comes before anything is started, not with each label."""
    settings = configs.Config(
        potential=configs.Potential(template=str(TEMPLATE)), label=configs.Label(method="ipi:unix:x", options={"kind": "cp2k"})
    )
    with pytest.raises(ConfigError, match=r"label\.method: a client of kind cp2k needs a cell and the frame has none; give the option box"):
        supervisor.check(settings)
    supervisor.check(configs.Config(potential=settings.potential, label=configs.Label(method="ipi:unix:x?kind=cp2k&box=20")))


def test_each_worker_listens_at_an_address_of_its_own_and_makes_labels_of_the_same_method() -> None:
    base = ClientLabeller("tcp:127.0.0.1:31415", "qe")
    other = base.for_worker(2, 60.0)
    named = ClientLabeller("unix:x")

    assert str(base.for_worker(0).address) == "tcp:127.0.0.1:31415"
    assert str(other.address) == "tcp:127.0.0.1:31417"
    assert other.method == base.method
    assert str(named.for_worker(1).address) == "unix:/tmp/ipi_x-1"
    with pytest.raises(ConfigError, match=r"label\.workers: worker 1 cannot have an address"):
        ClientLabeller("tcp:127.0.0.1:65535").for_worker(1)


def test_an_address_in_use_is_a_sentence(labeller: ClientLabeller) -> None:
    with listen(labeller.address), pytest.raises(ConfigError, match=r"label\.method: another program listens at unix:"):
        labeller.open()


# --- in the label worker --------------------------------------------------------------------------------------------------------------


class Line:
    """The endpoint to the learner."""

    def __init__(self) -> None:
        self.inbox: list[tuple[str, bus.AnyMessage, list[bytes]]] = []
        self.sent: list[bus.AnyMessage] = []

    def give(self, task: int, frame: Frame) -> None:
        buffers = [array.tobytes() for array in (frame.numbers, frame.positions, frame.cell)]
        self.inbox.append(("", bus.Task(task, 10 * task, frame.key, frame.periodic), buffers))

    def receive(self) -> tuple[str, bus.AnyMessage, list[bytes]] | None:
        return self.inbox.pop(0) if self.inbox else None

    def send(self, message: bus.AnyMessage, buffers: Sequence[Any] = (), to: str = "") -> bool:
        self.sent.append(message)
        return True


class Bench:
    """A label worker with clients, whose loop the test turns."""

    def __init__(self, run_dir: Path, labeller: ClientLabeller) -> None:
        self.run_dir, self.line, self.now = run_dir, Line(), 0.0
        self.said: list[tuple[str, str, dict[str, Any]]] = []
        self.pool = ClientPool(labeller.for_worker(0, 60.0), self.log, lambda: self.now)
        self.worker = Worker(run_dir, "label-0", self.pool, self.line, self)  # type: ignore[arg-type]

    def state(self, **state: Any) -> None:
        pass

    def log(self, level: str, event: str, **detail: Any) -> None:
        self.said.append((level, event, detail))

    def turn(self) -> None:
        self.pool.turn()
        self.worker.finished()
        self.worker.messages()

    def results(self) -> list[spool.Result]:
        self.turn()
        return [result for _, result in spool.waiting(self.run_dir) if result is not None]

    def result_of(self, task: int) -> spool.Result | None:
        return next((one for one in self.results() if one.task == task), None)

    def warnings(self) -> list[str]:
        self.turn()
        return [detail["said"] for level, event, detail in self.said if (level, event) == ("warning", "clients")]

    def reasons(self) -> list[str]:
        return [detail["why"] for _, event, detail in self.said if event == "label waits"]


@pytest.fixture
def bench(tmp_path: Path, labeller: ClientLabeller) -> Iterator[Bench]:
    made = Bench(tmp_path, labeller)
    yield made
    made.pool.stop()
    os.close(made.worker.done_fd)
    os.close(made.worker._wake)


def test_a_worker_puts_the_labels_of_its_clients_on_disk(bench: Bench, labeller: ClientLabeller, computing: Computing) -> None:
    """No child process is there; one task after the other is labelled by the client that stays connected."""
    computing.start(labeller.address)
    for task in (4, 5):
        bench.line.give(task, CRYSTAL)
        result = until(partial(bench.result_of, task), TIMEOUT, "a label")

        assert result is not None
        assert result.label is not None
        assert result.label.method == labeller.method
        assert bench.line.sent[-1] == bus.WorkerIdle("label-0", os.getpid(), task)
    assert len(computing.threads) == 1


def test_while_no_client_is_there_the_log_says_where_one_is_expected(
    bench: Bench, labeller: ClientLabeller, computing: Computing, path: str
) -> None:
    """Once, and again after a minute; the label waits and does not fail, and comes when a client comes."""
    bench.line.give(4, CRYSTAL)
    for bench.now, times in ((0.0, 1), (59.0, 1), (60.0, 2)):
        bench.turn()
        bench.turn()
        assert bench.reasons() == times * [f"no client is connected at unix:{path}; start one there, kind ase"]
    assert bench.results() == []
    computing.start(labeller.address)
    (result,) = until(bench.results, TIMEOUT, "a label")

    assert result.label is not None


def test_the_log_of_the_worker_has_what_became_of_clients(bench: Bench, labeller: ClientLabeller) -> None:
    """A client that leaves or fails is told by its sentence."""
    connect(labeller.address, TIMEOUT).close()
    (warning,) = until(bench.warnings, TIMEOUT, "a sentence")

    assert "it closed the connection where READY or NEEDINIT was expected" in warning
    assert ["came in, 1 are connected" in detail.get("said", "") for _, _, detail in bench.said].count(True) == 1
