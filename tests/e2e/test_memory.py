"""An evaluator that runs out of memory answers all the same, in smaller batches, and the engine notices nothing but the time."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase.cluster import Icosahedron
from ase.io import write

from tumbaga.driver import units
from tumbaga.driver.backends import registry
from tumbaga.driver.testing import Program
from tumbaga.online.records import Frame
from tumbaga.socket_protocol.events import PosData
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine

pytestmark = pytest.mark.slow
BEADS = 48
ROOM = 40 << 20  # bytes: a batch as large as is tried at first takes more


def frames(count: int) -> tuple[list[PosData], np.ndarray]:
    atoms = Icosahedron("Cu", 4)
    rng = np.random.default_rng(0)
    moved = [atoms.positions + rng.normal(scale=0.05, size=atoms.positions.shape) for _ in range(count)]
    return [PosData(np.zeros((3, 3)), units.length_to_wire(positions)) for positions in moved], atoms.numbers


def address_space(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def test_a_run_goes_on_with_smaller_batches(start: Callable[..., Program], tmp_path: Path) -> None:
    """48 beads of 147 atoms in one message, with room for a few of them: the forces are those of one frame after the other."""
    batch, numbers = frames(BEADS)
    potential = registry.load("painn:cuau-water", "cpu", "float32")
    write(tmp_path / "t.xyz", Icosahedron("Cu", 4))
    with listen(Address.unix(str(tmp_path / "s"))) as listener:
        program = start("serve", "-m", "painn:cuau-water", "-t", str(tmp_path / "t.xyz"), "--no-learn", "--connect", f"unix:{tmp_path}/s")
        with BlockingEngine.accept(listener, "pipelined", timeout=120.0, init_text=b"batch_size:%d" % BEADS) as engine:
            pid = program.until(lambda status: status["pids"].get("evaluator-0"), "an evaluator")["pids"]["evaluator-0"]
            resource.prlimit(pid, resource.RLIMIT_AS, (address_space(pid) + ROOM,) * 2)
            found = engine.batch(batch)
            status = program.until(lambda status: status["out_of_memory"], "a batch that did not fit")

    assert status["pids"]["evaluator-0"] == pid, "it was killed"
    for one, frame in zip(found, batch, strict=True):
        (expected,) = potential.predict([Frame(numbers, units.length_from_wire(frame.positions))])
        np.testing.assert_allclose(units.forces_from_wire(one.forces), expected.forces, atol=1e-4)
