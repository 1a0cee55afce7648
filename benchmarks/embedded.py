"""Time per step of the embedded potential against SevenNet-0, on the same frames and the same single core.

A step is what an MD step asks for: neighbour list, energy and forces of a frame whose atoms have just moved (and, for the embedded
potential, the features for the uncertainty). Force rows are what a label or a suspicious frame costs beside it. Each potential runs in a process of its own, pinned to one core; the two take turns, so that
a busy machine hurts both alike. SevenNet lives in an environment of its own, .venv-sevennet, made on the first run.

    python benchmarks/embedded.py --json benchmarks/results/embedded.json
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy and torch are imported

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Step = Callable[[npt.NDArray[np.int64], Array], None]

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-sevennet"
SEVENNET = "sevenn==0.13.*"
# copper, gold, waters; 8 atoms are the running cluster of the main job, the line holds for the others
SYSTEMS = {8: (1, 1, 2), 20: (2, 3, 5), 40: (2, 5, 11), 100: (2, 5, 31)}
LINE = (20, 40, 100)
CUTOFF = 5.0
PASS = 15.0  # times faster than SevenNet-0, at each size


def random_cluster(copper: int, gold: int, waters: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], Array]:
    """A compact random cluster: whole molecules at free places nearest to the centre."""
    water = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])
    placed = np.zeros((0, 3))
    for block in [np.zeros((1, 3))] * (copper + gold) + [water] * waters:
        best, best_radius = np.zeros((0, 3)), np.inf
        for _ in range(400):
            rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            trial = block @ rotation + rng.normal(size=3) * (1.1 * len(placed) ** (1 / 3) + 0.1)
            gap = 2.45 if len(block) == 1 else 2.1
            radius = float(np.linalg.norm(trial.mean(axis=0)))
            if radius < best_radius and (not len(placed) or np.linalg.norm(trial[:, None] - placed[None], axis=2).min() > gap):
                best, best_radius = trial, radius
        placed = np.concatenate([placed, best])
    return np.array([29] * copper + [79] * gold + [8, 1, 1] * waters), placed


def painn(rows: bool = False) -> tuple[Step, dict[str, str]]:
    """A step of the embedded potential (or its force rows, in float64), and the versions behind it."""
    import torch

    from tumbaga.driver.backends.painn import load
    from tumbaga.online.records import Frame

    torch.set_num_threads(1)
    potential = load("painn:cuau-water", device="cpu")

    def step(numbers: npt.NDArray[np.int64], positions: Array) -> None:
        frame = Frame(numbers, positions)
        if rows:
            potential.force_rows(frame)
        else:
            potential.predict([frame])

    return step, _versions("torch", "numpy", "vesin")


def sevennet() -> tuple[Step, dict[str, str]]:
    """A step of SevenNet-0 through its own ASE calculator."""
    import torch
    from ase import Atoms
    from sevenn.calculator import SevenNetCalculator

    torch.set_num_threads(1)
    calculator = SevenNetCalculator("7net-0", device="cpu")

    def step(numbers: npt.NDArray[np.int64], positions: Array) -> None:
        atoms = Atoms(numbers, positions)
        atoms.calc = calculator
        atoms.get_potential_energy()
        atoms.get_forces()

    return step, _versions("torch", "numpy", "sevenn", "e3nn")


def _versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def work(kind: str, frames: Path) -> None:
    """The child: one line "SIZE COUNT" in, one line of milliseconds out, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the libraries print goes to stderr
    step, versions = {"painn": painn, "rows": lambda: painn(rows=True), "sevennet": sevennet}[kind]()
    held = np.load(frames)
    rng = np.random.default_rng(0)
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        size, count = line.split()
        numbers, positions = held["numbers" + size], held["positions" + size]
        took = []
        for _ in range(int(count)):
            moved = positions + rng.normal(size=positions.shape) * 0.01
            begin = time.perf_counter()
            step(numbers, moved)
            took.append(1e3 * (time.perf_counter() - begin))
        print(json.dumps(took), file=answers, flush=True)


class Child:
    """A potential in its own process, pinned to the core that both share."""

    def __init__(self, python: Path, kind: str, frames: Path, core: int) -> None:
        command = [str(python), str(Path(__file__)), "--worker", kind, str(frames)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, {core})
        self.versions: dict[str, str] = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{shlex.join(self._process.args)} ended early")  # type: ignore[arg-type]
        return json.loads(line)

    def steps(self, size: int, count: int) -> list[float]:
        """Milliseconds of `count` steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{size} {count}\n")
        self._process.stdin.flush()
        found: list[float] = self._read()
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def set_up() -> Path:
    """Make the environment of SevenNet if there is none; torch of this environment's version first, so that pip fetches no other."""
    python = ENVIRONMENT / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", "import sevenn"], capture_output=True, check=False).returncode == 0:
        return python
    torch = f"torch=={importlib.metadata.version('torch')}"
    print(f"making {ENVIRONMENT.name} with {torch} and {SEVENNET}: some minutes")
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        pins.write(torch + "\n")
        pins.flush()
        subprocess.run([python, "-m", "pip", "install", "-q", torch], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", SEVENNET, "-c", pins.name], check=True)
    return python


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    """Alternate the two potentials; median milliseconds of all steps."""
    python = set_up()
    rng = np.random.default_rng(1)
    clusters = {size: random_cluster(*parts, rng) for size, parts in SYSTEMS.items()}
    frames = folder / "frames.npz"
    np.savez(frames, **{f"numbers{s}": z for s, (z, _) in clusters.items()}, **{f"positions{s}": r for s, (_, r) in clusters.items()})  # type: ignore[arg-type]
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    ours, theirs = Child(Path(sys.executable), "painn", frames, core), Child(python, "sevennet", frames, core)
    linear = Child(Path(sys.executable), "rows", frames, core)
    rows = []
    for size, (_, positions) in clusters.items():
        apart = np.linalg.norm(positions[:, None] - positions[None], axis=2)
        ours.steps(size, 20)
        theirs.steps(size, 3)
        linear.steps(size, 1)
        mine, other = [], []
        for _ in range(rounds):
            mine += ours.steps(size, 20)
            other += theirs.steps(size, 3)
        a, b, c = (float(np.median(took)) for took in (mine, other, linear.steps(size, 3)))
        pairs = int((apart < CUTOFF).sum() - size)
        found = {"painn_ms": round(a, 2), "sevennet0_ms": round(b, 1), "ratio": round(b / a, 1), "force_rows_ms": round(c, 1)}
        rows.append({"atoms": size, "pairs": pairs, **found})
    for child in (ours, theirs, linear):
        child.close()
    return {"rows": rows, "versions": {"painn": ours.versions, "sevennet": theirs.versions}}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--setup", action="store_true", help="make the environment of SevenNet and stop")
    args = parser.parse_args()
    if args.setup:
        set_up()
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(3 if args.quick else 12, Path(folder))
    print("atoms  pairs  painn:cuau-water  SevenNet-0  ratio  force rows   (median ms, one core)")
    for row in result["rows"]:
        print(
            f"{row['atoms']:5d} {row['pairs']:6d} {row['painn_ms']:17.2f} {row['sevennet0_ms']:11.1f} {row['ratio']:5.1f}x {row['force_rows_ms']:11.1f}"
        )
    missed = [row for row in result["rows"] if row["atoms"] in LINE and row["ratio"] < PASS]
    if args.json:
        machine = f"{os.cpu_count()}-core shared {platform.machine()} VM, {platform.system()}, Python {platform.python_version()}"
        facts = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "passed": not missed,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**facts, **result}, indent=1) + "\n")
    if missed:
        print(f"missed: {missed[0]['ratio']}x faster than SevenNet-0 at {missed[0]['atoms']} atoms, {PASS:.0f}x is the line")
        raise SystemExit(1)
    print(f"passed: at least {PASS:.0f}x faster than SevenNet-0 at {', '.join(map(str, LINE))} atoms")


if __name__ == "__main__":
    main()
