"""Several evaluators share the frames; when one is killed, what it had goes to the other, and no engine notices."""

from __future__ import annotations

import threading
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
from tumbaga.socket_protocol.streams import Address, Listener, listen
from tumbaga.socket_protocol.testing import BlockingEngine

pytestmark = pytest.mark.slow
MODEL = "toy:lj?epsilon=0.05&sigma=2.3"
STEPS, BEADS, ENGINES = 150, 4, 3


def relax(listener: Listener, seed: int, found: dict[int, np.ndarray]) -> None:
    """Go downhill with several beads at once; where they end depends on every force."""
    rng = np.random.default_rng(seed)
    start = Icosahedron("Cu", 2).positions
    positions = [start + rng.normal(scale=0.1, size=start.shape) for _ in range(BEADS)]
    with BlockingEngine.accept(listener, "pipelined", timeout=120.0, init_text=b"batch_size:%d" % BEADS) as engine:
        for _ in range(STEPS):
            results = engine.batch([PosData(np.zeros((3, 3)), units.length_to_wire(one)) for one in positions])
            positions = [one + 0.05 * units.forces_from_wire(said.forces) for one, said in zip(positions, results, strict=True)]
    found[seed] = np.stack(positions)


def expected(seed: int) -> np.ndarray:
    """The same with the potential in this process."""
    potential = registry.load(MODEL, "cpu", "float64")
    rng = np.random.default_rng(seed)
    atoms = Icosahedron("Cu", 2)
    positions = [atoms.positions + rng.normal(scale=0.1, size=atoms.positions.shape) for _ in range(BEADS)]
    for _ in range(STEPS):
        said = potential.predict([Frame(atoms.numbers, one) for one in positions])
        positions = [one + 0.05 * prediction.forces for one, prediction in zip(positions, said, strict=True)]
    return np.stack(positions)


def test_two_evaluators_share_the_work_and_stand_in_for_each_other(start: Callable[..., Program], tmp_path: Path) -> None:
    write(tmp_path / "t.xyz", Icosahedron("Cu", 2))
    names = [str(tmp_path / f"s{index}") for index in range(ENGINES)]
    listeners = [listen(Address.unix(name)) for name in names]
    where = [part for name in names for part in ("--connect", f"unix:{name}")]
    program = start("serve", "-m", MODEL, "--device", "cpu, cpu", "--no-learn", "-t", str(tmp_path / "t.xyz"), *where)
    found: dict[int, np.ndarray] = {}
    engines = [threading.Thread(target=relax, args=(listener, seed, found)) for seed, listener in enumerate(listeners)]
    for engine in engines:
        engine.start()
    for name, steps in (("evaluator-1", 40), ("evaluator-0", 200)):
        program.steps(steps)
        program.restarted(name, program.kill(name))
    for engine in engines:
        engine.join(120.0)
    for listener in listeners:
        listener.close()

    status = program.until(lambda status: status["steps"] >= ENGINES * (STEPS - 1), "all steps")
    assert status["evaluator_restarts"] == 2
    for seed in range(ENGINES):
        np.testing.assert_allclose(found[seed], expected(seed), atol=1e-9)
