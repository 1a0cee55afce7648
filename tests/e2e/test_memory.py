"""An evaluator whose memory is limited for real: batches that do not fit are split, smaller ones follow, and no engine notices."""

from __future__ import annotations

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
BEADS, STEPS, NEED = 8, 30, 10  # MB an atom
ATOMS = 13
LIMIT = 600  # MB: for 60 atoms, where a batch has 104


def test_batches_that_do_not_fit_into_memory_are_split(
    start: Callable[..., Program], tmp_path: Path, socket_name: Callable[[], str]
) -> None:
    cluster = Icosahedron("Cu", 2)
    assert len(cluster) == ATOMS
    write(tmp_path / "t.xyz", cluster)
    rng, name = np.random.default_rng(0), socket_name()
    with listen(Address.unix(name)) as listener:
        program = start(
            "serve", "-m", f"toy:hungry?need={NEED}&limit={LIMIT}", "-t", str(tmp_path / "t.xyz"), "-u", "-a", name, "--no-learn"
        )
        exact = registry.load("toy:lj")
        with BlockingEngine.accept(listener, "pipelined", timeout=120.0, init_text=b"batch_size:%d" % BEADS) as engine:
            for _ in range(STEPS):
                beads = [cluster.positions + rng.normal(scale=0.1, size=(ATOMS, 3)) for _ in range(BEADS)]
                said = engine.batch([PosData(np.zeros((3, 3)), units.length_to_wire(one)) for one in beads])
                truth = exact.predict([Frame(cluster.numbers, one) for one in beads])
                for one, other in zip(said, truth, strict=True):
                    np.testing.assert_allclose(units.forces_from_wire(one.forces), other.forces, atol=1e-9)
        status = program.until(lambda status: status["frames"] == STEPS * BEADS, "all frames to be counted")
        assert status["out_of_memory"] >= 1
        assert status["batch_atoms"] <= LIMIT // NEED
        assert status["evaluator_restarts"] == status["refused"] == 0
    assert program.stop() == 0, program.output
