"""One server for 16 molecular-dynamics runs of different clusters, each an ASE process of its own: all that wait are evaluated as one batch.

    python examples/06_many_engines/run.py [--engines N] [--steps N] [--out DIR]

Starts `tumbaga serve` with an address and a structure for each engine, and the engines (engine.py), in any order; shows how fast they are; ends
them all after so many steps, or with Ctrl-C. To learn as well, take --no-learn out of the command below.
"""

import argparse
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.cluster import Icosahedron
from ase.io import write

# Cu, Au and waters; 13, 20, 38 and 55 atoms. The embedded potential knows few metal atoms in water, and metal clusters alone only up to
# some eight atoms: larger ones fly apart, and then the server refuses them.
COMPOSITIONS = ((2, 2, 3), (3, 2, 5), (3, 2, 11), (4, 3, 16))
HERE = Path(__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # many processes share the cores already


def cluster(copper: int, gold: int, waters: int, seed: int) -> Atoms:
    """A piece of an icosahedron with water around it, some shells of it where one is too small."""
    rng = np.random.default_rng(seed)
    core = Icosahedron("Au", 3, latticeconstant=3.85).positions
    core = core[np.argsort(np.linalg.norm(core - core[0], axis=1), kind="stable")[: copper + gold]]
    atoms = Atoms(rng.permutation(["Cu"] * copper + ["Au"] * gold), core - core.mean(axis=0))
    radius = np.linalg.norm(atoms.positions, axis=1).max() + 2.4
    while waters:
        water, direction = molecule("H2O"), rng.normal(size=3)
        water.rotate(rng.uniform(0, 360), rng.normal(size=3))
        water.positions += radius * direction / np.linalg.norm(direction) - water.positions[0]
        if np.linalg.norm(atoms.positions[:, None] - water.positions, axis=2).min() > 2.0:
            atoms, waters = atoms + water, waters - 1
        else:
            radius += 0.01  # it is getting crowded here
    return atoms


@contextlib.contextmanager
def started(command: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process that is asked to end with the block, and waited for; Ctrl-C in the terminal does not reach it directly."""
    process = subprocess.Popen([sys.executable, *command], text=True, env=ONE_THREAD, process_group=0, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()


class Run:
    """An engine and what it last told.

    Args:
        index: of the engine, from 0.
        steps: of its dynamics.
        out: where its structure goes.
    """

    def __init__(self, index: int, steps: int, out: Path) -> None:
        self.atoms = cluster(*COMPOSITIONS[index % len(COMPOSITIONS)], index)
        self.file, self.socket = out / f"engine-{index:02d}.xyz", f"engines-{os.getpid()}-{index}"
        write(self.file, self.atoms)
        self.command = [str(HERE / "engine.py"), self.socket, str(self.file), str(steps), str(index)]
        self.step, self.seconds, self.temperature = 0, 0.0, 0.0

    def take(self, line: str) -> None:
        told = json.loads(line)
        self.step, self.seconds, self.temperature = told["step"], told["seconds"], told["temperature"]

    @property
    def rate(self) -> float:
        """Steps a second."""
        return self.step / self.seconds if self.seconds else 0.0


def watch(runs: list[Run], engines: list[subprocess.Popen[str]], server: subprocess.Popen[str]) -> None:
    """Take the engines' lines until all have ended, and show once a second how it goes.

    Raises:
        SystemExit: the server has ended, or an engine has failed.
    """
    shown = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for run, engine in zip(runs, engines, strict=True):
            selector.register(engine.stdout, selectors.EVENT_READ, (run, engine))
        while selector.get_map():
            for key, _ in selector.select(1.0):
                run, engine = key.data
                if line := engine.stdout.readline():
                    run.take(line)
                    continue
                selector.unregister(key.fileobj)
                if engine.wait():
                    sys.exit(f"the engine of {run.file} has failed, code {engine.returncode}")
            if server.poll() is not None:
                sys.exit(f"the server has ended, code {server.returncode}; its logs are in the run directory")
            told = [run for run in runs if run.step]
            if told and time.monotonic() - shown > 1.0:
                shown = time.monotonic()
                rate = sum(run.rate for run in told)
                print(f"{len(told)} of {len(runs)} engines · {sum(run.step for run in runs)} steps · {rate:.0f} steps/s", flush=True)


def summary(runs: list[Run]) -> str:
    """A line for each engine, and one for all."""
    lines = [f"{'engine':10} {'atoms':>5}  {'':16} {'steps':>6} {'steps/s':>8} {'K':>5}"]
    for run in runs:
        formula = run.atoms.get_chemical_formula()
        lines.append(f"{run.file.stem:10} {len(run.atoms):5d}  {formula:16} {run.step:6d} {run.rate:8.1f} {run.temperature:5.0f}")
    longest = max(run.seconds for run in runs)
    total = sum(run.step for run in runs)
    lines.append(f"all: {total} steps in {longest:.1f} s, {total / longest if longest else 0.0:.1f} steps/s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1000, help="of each engine")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for structures and the run directory")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    runs = [Run(index, options.steps, out) for index in range(options.engines)]
    serve = ["-m", "tumbaga.driver.cli", "serve", "-m", "painn:cuau-water", "--no-learn", "--quiet", "--run-dir", str(out / "run")]
    for run in runs:
        serve += ["--connect", f"unix:{run.socket}={run.file}"]
    print(f"starting the server and {len(runs)} engines; they move once all of Python is loaded, half a minute on two cores", flush=True)
    # whoever asks this script to end gets the same clean end as with Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        engines: list[subprocess.Popen[str]] = []
        try:
            server = stack.enter_context(started(serve, stdout=subprocess.DEVNULL))
            for run in runs:
                engines.append(stack.enter_context(started(run.command, stdout=subprocess.PIPE)))
            watch(runs, engines, server)
        except KeyboardInterrupt:
            print("interrupted: ending the engines and the server")
        finally:
            for engine in engines:
                engine.terminate()  # all at once; each is waited for, the server last
    print(summary(runs))


if __name__ == "__main__":
    main()
