"""A run whose disk is really full, a small one of its own: it serves on, says so, loses nothing, and learns again when there is room."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.full_disk import SENTENCE
from tumbaga.driver.testing import Program
from tumbaga.online import versions
from tumbaga.online.labels.testing import read_journal
from tumbaga.online.store import FILE, Store
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine

pytestmark = pytest.mark.slow
TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
BOHR = 0.529177
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]


class Simulation:
    """An engine that asks for one new frame after the other."""

    def __init__(self, engine: BlockingEngine, program: Program) -> None:
        self._engine, self._program, self._rng = engine, program, np.random.default_rng(5)
        self._positions = structures.read_frame(TEMPLATE).positions

    def __call__(self, condition: object, what: str, calls: int = 100_000) -> dict[str, object]:
        """Ask for forces, each time finite, until the status fulfils a condition; return the status."""
        for _ in range(calls):
            for _ in range(10):
                places = self._positions + self._rng.uniform(-0.08, 0.08, self._positions.shape)
                assert np.isfinite(self._engine.forces(places / BOHR).forces).all()
            assert self._program.process.poll() is None, self._program.output
            status = self._program.status()
            if condition(status):  # type: ignore[operator]
                return status
        raise AssertionError(f"{what} did not come about: {status}")


def fill(path: Path) -> None:
    """Take all the room there is, to the last block."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def drill(folder: str, name: str) -> None:
    """In mounts of its own: run, fill the disk, make room, stop, look."""
    disk, beside = Path(folder) / "disk", Path(folder)
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)], check=True)
    journal = beside / "journal"
    settings = configs.Config(
        serve=configs.Serve(connect=(f"unix:{name}",)),
        potential=configs.Potential(template=str(TEMPLATE)),
        flag=configs.Flag(force_error=0.02),
        label=configs.Label(method=f"test:lj?delay=0.2&journal={journal}"),
    )
    (disk / "run").mkdir()
    (disk / "run" / configs.FILE).write_text(configs.dumps(settings))
    with listen(Address.unix(name)) as listener, Program(disk / "run", "serve", "--quiet", scratch=beside / "temporary") as program:
        with BlockingEngine.accept(listener, timeout=120.0) as engine:
            simulation = Simulation(engine, program)
            before = simulation(lambda status: status["labels"]["converged"] >= 3 and status["swaps"], "labels and a swap")
            fill(disk / "ballast")
            full = simulation(lambda status: SENTENCE in status["errors"], "the status to say that the disk is full")
            full = simulation(lambda status: status["force_calls"] > full["force_calls"] + 300, "to serve on")  # type: ignore[operator]
            assert full["errors"].count(SENTENCE) == 1  # type: ignore[attr-defined]
            assert full["serving_version"] >= before["serving_version"]  # type: ignore[operator]
            (disk / "ballast").unlink()
            simulation(
                lambda status: SENTENCE not in status["errors"] and status["labels"]["converged"] >= full["labels"]["converged"] + 3,  # type: ignore[index]
                "labels to come again",
            )
            simulation(lambda status: status["serving_version"] > full["serving_version"], "a new version to serve")
        assert program.stop() == 0, program.output
        status = program.status()
        assert set(status["restarts"].values()) == {0}, status["restarts"]
        assert status["errors"] == []
        logged = (disk / "run" / "log" / "learner.jsonl").read_text()
    with Store(disk / "run" / FILE) as store:
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        done = Counter(key for kind, key, _ in read_journal(journal) if kind == "end")
        kept = Counter(one.frame.key for one in (*store.labels(), *(aside.stored for aside in store.quarantined())))
        assert set(done.values()) == {1}, "a label was computed twice"
        assert kept == done, f"lost {done - kept}, failures {store.failures()}, counts {store.counts()}, logged {logged[-3000:]}"
        for version in store.versions():
            versions.read(disk / "run" / version.file)
        assert store.versions()[-1].number == status["serving_version"]
    print(len(kept), SENTENCE in logged or "there is room" in logged)


@pytest.mark.drill
def test_a_full_disk_stops_nothing(tmp_path: Path, socket_name: object) -> None:
    """Forces are served while the disk is full, the status says so, no process dies, and no label is lost or computed twice."""
    if subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a small disk (unshare --map-root-user --mount)")
    inner = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_full_disk import drill; drill(*sys.argv[1:])"
    done = subprocess.run(
        [*OWN_MOUNTS, sys.executable, "-c", inner, str(tmp_path), socket_name()],  # type: ignore[operator]
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    labels, said = done.stdout.split()

    assert int(labels) >= 6
    assert said == "True"
