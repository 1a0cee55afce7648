"""DESIGN.md §8, figure R: the evaluator is killed again and again under four engines at once, and each trajectory is the one it would have had."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import ase.units
import numpy as np
import pytest

from tumbaga.driver.testing import Program
from tumbaga.online.records import Array
from tumbaga.socket_protocol.streams import Address, Listener, listen
from tumbaga.socket_protocol.testing import BlockingEngine, Dialect

pytestmark = pytest.mark.slow
KILLS = 20
LJ = "toy:lj?epsilon=0.05&sigma=2.2"
STEPS = 5000  # of each engine
SIZES = (4, 6, 9, 13)
DIALECTS: tuple[Dialect, ...] = ("classic", "pipelined", "pipelined", "pipelined")
TIMEOUT = 120.0
TIMESTEP = 1e-15 / ase.units._aut  # 1 fs in atomic units
MASS = 63.546 * ase.units._amu / ase.units._me


def cluster(size: int) -> Array:
    """A piece of a grid of 2.6 Å, shaken so that it moves from the first step on; Å."""
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:size]
    shaken: Array = 2.6 * grid + np.random.default_rng(size).normal(scale=0.08, size=grid.shape)
    return shaken


class Progress:
    """Force calls of all engines together, for somebody who waits for a certain number of them."""

    def __init__(self) -> None:
        self._calls = 0
        self._changed = threading.Condition()
        self.faults: list[str] = []

    def call(self) -> None:
        """One more call was answered."""
        with self._changed:
            self._calls += 1
            self._changed.notify_all()

    def fail(self, sentence: str) -> None:
        """An engine has ended before its time: nobody needs to wait any more."""
        with self._changed:
            self.faults.append(sentence)
            self._changed.notify_all()

    def until(self, calls: int) -> None:
        """Wait for so many calls, which do not come if an engine has failed."""
        with self._changed:
            come = self._changed.wait_for(lambda: self._calls >= calls or bool(self.faults), TIMEOUT)
        assert come, f"{self._calls} of {calls} calls within {TIMEOUT:g} s"
        assert not self.faults, self.faults


@dataclass(eq=False)
class Engine:
    """Moves one cluster by velocity Verlet, so that a wrong bit of any force is in all positions after it.

    Attributes:
        listener: where the server dials.
        size: atoms.
        dialect: how it asks.
        trajectory: energy, positions and forces of every step, as bytes.
    """

    listener: Listener
    size: int
    dialect: Dialect
    trajectory: bytes = b""

    def run(self, progress: Progress) -> None:
        """All steps; for a thread, so what goes wrong is told to those who wait."""
        try:
            with BlockingEngine.accept(self.listener, self.dialect, timeout=TIMEOUT) as wire:
                self.trajectory = b"".join(self._steps(wire, progress))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test is to tell it
            progress.fail(f"the engine of {self.size} atoms: {error!r}")

    def _steps(self, wire: BlockingEngine, progress: Progress) -> list[bytes]:
        positions = cluster(self.size) / ase.units.Bohr
        velocities = np.zeros_like(positions)
        kept = []
        for step in range(STEPS + 1):
            got = wire.forces(positions)
            progress.call()
            kept += [np.float64(got.energy).tobytes(), positions.tobytes(), got.forces.tobytes()]
            assert np.isfinite(got.forces).all()
            push = 0.5 * TIMESTEP / MASS * got.forces
            velocities = velocities + (2.0 * push if step else push)  # two halves, of the step that ends here and of the next one
            positions = positions + TIMESTEP * velocities
        return kept


def write_template(folder: Path, size: int) -> Path:
    path = folder / f"{size}.xyz"
    path.write_text("\n".join([str(size), "", *(f"Cu {x:.8f} {y:.8f} {z:.8f}" for x, y, z in cluster(size)), ""]))
    return path


@contextlib.contextmanager
def listening(names: Callable[[], str]) -> Iterator[list[Listener]]:
    """Where one run's engines wait for it: what an earlier server has dialled in vain must not wait there too."""
    with contextlib.ExitStack() as stack:
        wheres = [Address.unix(names()), Address.tcp("127.0.0.1", 0), Address.unix(names()), Address.tcp("127.0.0.1", 0)]
        yield [stack.enter_context(listen(where)) for where in wheres]


def moved(
    begin: Callable[[list[Listener]], Program], listeners: list[Listener], disturb: Callable[[Program, Progress], None]
) -> list[bytes]:
    """Have all engines do all their steps on one server; return their trajectories."""
    engines = [Engine(*one) for one in zip(listeners, SIZES, DIALECTS, strict=True)]
    progress = Progress()
    threads = [threading.Thread(target=engine.run, args=(progress,), name=f"engine-{engine.size}") for engine in engines]
    server = begin(listeners)
    for thread in threads:
        thread.start()
    try:
        disturb(server, progress)
        progress.until(len(SIZES) * (STEPS + 1))
    except BaseException:
        server.close()  # or the other engines would wait for it
        raise
    finally:
        for thread in threads:
            thread.join(2 * TIMEOUT)
    assert server.stop() == 0, server.output
    return [engine.trajectory for engine in engines]


def killing(times: int) -> Callable[[Program, Progress], None]:
    """Kill the evaluator at so many points spread at random over the run."""
    calls = len(SIZES) * STEPS
    # so far apart that each evaluator has answered before its end, and no frame meets too many of them
    points = sorted(Random(11).sample(range(calls // 40, calls * 39 // 40, 20 * len(SIZES)), times))

    def disturb(server: Program, progress: Progress) -> None:
        for point in points:
            progress.until(point)
            server.restarted("evaluator-0", server.kill("evaluator-0"))

    return disturb


@pytest.mark.drill
def test_four_trajectories_are_those_they_would_have_been(
    tmp_path: Path, start: Callable[..., Program], socket_name: Callable[[], str]
) -> None:
    """kill -9 of the evaluator under four engines of different size and dialect: every bit that each has seen is the same as without."""
    files = [write_template(tmp_path, size) for size in SIZES]

    def begin(run: str, listeners: list[Listener]) -> Program:
        told = [word for where, file in zip(listeners, files, strict=True) for word in ("--connect", f"{where.address}={file}")]
        return start("serve", "-m", LJ, "--no-learn", "--quiet", "--device", "cpu", *told, run=run)

    with listening(socket_name) as listeners:
        stormy = moved(partial(begin, "stormy"), listeners, killing(KILLS))
    with listening(socket_name) as listeners:
        calm = moved(partial(begin, "calm"), listeners, lambda server, progress: None)
    assert [len(trajectory) for trajectory in calm] == [(STEPS + 1) * 8 * (1 + 6 * size) for size in SIZES]
    assert [left == right for left, right in zip(stormy, calm, strict=True)] == [True] * len(SIZES)
