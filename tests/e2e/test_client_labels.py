"""A run whose labels come from a program that connects to it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver import structures, units
from tumbaga.driver.testing import Program, until
from tumbaga.online.labels.testing import lennard_jones
from tumbaga.online.records import Frame
from tumbaga.online.store import FILE, Store
from tumbaga.socket_protocol.errors import NotYetError
from tumbaga.socket_protocol.events import ForceReady, PosData
from tumbaga.socket_protocol.streams import Address, Stream
from tumbaga.socket_protocol.testing import BlockingDriver, connect

pytestmark = pytest.mark.slow
TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
TIMEOUT = 120.0


def compute(frame: PosData) -> ForceReady:
    """Lennard-Jones, as the test labeller has it."""
    numbers = structures.read_frame(TEMPLATE).numbers
    energy, forces = lennard_jones(Frame(numbers, units.length_from_wire(frame.positions)), 0.2)
    return ForceReady(units.energy_to_wire(energy), units.forces_to_wire(forces), np.zeros((3, 3)))


def dialled(address: Address) -> Stream | None:
    try:
        return connect(address, TIMEOUT)
    except NotYetError:
        return None


def test_a_run_learns_from_a_client_that_comes_while_it_runs(start: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """The run starts without a client and serves meanwhile; then labels come, a version is swapped in, and the client is told to leave."""
    method = f"ipi:unix:{socket_name()}"
    program = start("run", "cuau-water", "--label", f"{method}?kind=ase", "--force-error", "0.02", "--steps", "1000000", "--seed", "5")
    program.until(lambda status: status["labels"]["running"] > 0, "a label to wait for its client", TIMEOUT)
    address = Address.parse(method.removeprefix("ipi:"))
    stream = until(lambda: dialled(address), TIMEOUT, "the socket")
    assert stream is not None
    driver = BlockingDriver(stream, compute, timeout=TIMEOUT)
    thread = threading.Thread(target=driver.serve, name="client")
    thread.start()
    # the status puts together what processes report at moments of their own: a swap may stand there before its label
    status = program.until(lambda status: status["swaps"] >= 1 and status["labels"]["converged"] >= 1, "a swap", TIMEOUT)
    program.stop()
    thread.join(TIMEOUT)

    assert not thread.is_alive()
    assert driver.frames >= status["labels"]["converged"] >= 1
    store = Store(program.run_dir / FILE, read_only=True)
    label = store.labels()[0].label
    store.close()
    assert label.method == f"{method}(kind=ase)"
    assert label.details["kind"] == "ase"
    said = (program.run_dir / "log" / "label-0.jsonl").read_text()
    assert "no client is connected at unix:/tmp/ipi_tumbaga-test-" in said
    assert "came in, 1 are connected" in said
