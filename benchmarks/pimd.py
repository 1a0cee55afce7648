"""Path-integral MD: milliseconds of a step of i-PI with 32 beads of a 20-atom cluster, the embedded potential behind the server and without one.

    python benchmarks/pimd.py [--quick] [--json FILE] [--model MODEL] [--beads N]

    server          tumbaga serve, <batch_size> = beads: all beads of a step in one message
    own             i-pi-driver-py with the same <batch_size> and the same back end in its process, which evaluates the message as one
                    batch (see _batched_pes.py): the best that i-PI can do by itself, and without uncertainty and extras
    bead by bead    tumbaga serve, no <batch_size>, one connection: a message for each bead, one after the other
    8 connections   tumbaga serve --connections 8, no <batch_size>: what a user of an older i-PI does

Each figure is the median of the times that i-PI itself says for its steps, without the first SETTLE of a run; torch has one thread
everywhere. In a repetition each row is measured once, by a run of i-PI with the same seed, in an order that turns with the repetition; the
runs must give the same potential energies. Figures are medians over repetitions, ratios medians of ratios within repetitions. If the
server looks slower than "own", these two are measured again until there are AGAIN repetitions, and judged by all of them.

A step holds i-PI's own work, too, which is the same for all rows.

Pass: a step takes by the server at most 1 + MARGIN times what it takes with i-PI's own driver. How much the batch gains, "bead by bead" over
"server", is reported and not judged: it is the back end's and the machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ase
import numpy as np
import numpy.typing as npt
from _answerers import BIN, HERE, Place, answering, until
from _machine import described
from _raw_engines import place, system
from _wire_engines import write_ipi_xyz

MARGIN = 0.05
ATOMS, BEADS, CONNECTIONS = 20, 32, 8
REPETITIONS, AGAIN = 5, 9
SETTLE = 5
SERVER, OWN, SINGLE, MANY = "server", "own", "bead by bead", f"{CONNECTIONS} connections"
WHO = (SERVER, OWN, SINGLE, MANY)
_SAME = 2e-3  # eV: float32 inside, and a batch sums up in another order, step after step
_PATIENCE_S = 300.0
_INPUT = """<simulation verbosity='high' safe_stride='100000' floatformat='%25.17e'>
 <output prefix='md'> <properties stride='1' filename='out'> [ step, potential{{electronvolt}} ] </properties> </output>
 <total_steps>{steps}</total_steps> <prng><seed>31415</seed></prng>
 <ffsocket name='ff' mode='unix' pbc='False'>
  <address>{address}</address> <latency>1e-4</latency> <timeout>0</timeout> <batch_size>{batch}</batch_size>
 </ffsocket>
 <system>
  <initialize nbeads='{beads}'> <file mode='xyz'> init.xyz </file> <velocities mode='thermal' units='kelvin'> 300 </velocities> </initialize>
  <forces> <force forcefield='ff'/> </forces>
  <motion mode='dynamics'>
   <dynamics mode='nvt'>
    <timestep units='femtosecond'> 0.25 </timestep> <thermostat mode='pile_l'> <tau units='femtosecond'> 100 </tau> </thermostat>
   </dynamics>
  </motion>
  <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
 </system>
</simulation>
"""


@dataclass(frozen=True)
class Job:
    """What every row does.

    Attributes:
        model: its name.
        beads: of each ring.
        steps: timed in one run.
    """

    model: str
    beads: int
    steps: int


def batch(who: str, job: Job) -> int:
    """Structures in a message."""
    return job.beads if who in (SERVER, OWN) else 1


def command(who: str, job: Job, where: Place) -> list[str]:
    """Who answers."""
    if who == OWN:
        told = ["-m", "custom", "-P", str(HERE / "_batched_pes.py"), "-o", f"template={where.structure},model={job.model}"]
        return [sys.executable, str(BIN / "i-pi-driver-py"), *told, "-u", "-a", where.name, "-S", where.prefix]
    told = ["-m", job.model, "-t", str(where.structure), "--no-learn", "--quiet", "--connect", where.address]
    told += ["--connections", str(CONNECTIONS if who == MANY else 1), "--run-dir", str(where.folder / "run")]
    return [sys.executable, "-m", "tumbaga.driver.cli", "serve", *told]


class Rings:
    """One run of i-PI, started and waiting for its driver.

    Args:
        where: it listens; its folder is where it works.
        atoms: that every bead starts from.
        job: what it does.
        size: structures in a message.
    """

    def __init__(self, where: Place, atoms: ase.Atoms, job: Job, size: int) -> None:
        self._folder, self._steps = where.folder, job.steps
        write_ipi_xyz(atoms, where.folder / "init.xyz")
        (where.folder / "input.xml").write_text(_INPUT.format(steps=job.steps + SETTLE, address=where.name, batch=size, beads=job.beads))
        with open(where.folder / "ipi.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(BIN / "i-pi"), "-S", where.prefix, "input.xml"],
                cwd=where.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def ended(self) -> list[float]:
        """Wait for its end; return the milliseconds of each step but the first ones.

        Raises:
            RuntimeError: it did not do all its steps.
        """
        code = self._process.wait(_PATIENCE_S)
        log = (self._folder / "ipi.log").read_text(errors="replace")
        found = [1000 * float(text) for text in re.findall(r"t/step:\s*(\S+)", log)]
        if code or len(found) != self._steps + SETTLE:
            raise RuntimeError(f"i-PI ended with code {code} after {len(found)} of {self._steps + SETTLE} steps:\n{log[-2000:]}")
        return found[SETTLE:]

    @property
    def energies(self) -> npt.NDArray[np.float64]:
        """Potential energy at each step, mean over the beads, shape (n_steps,), eV."""
        return np.loadtxt(self._folder / "md.out")[:, 1]

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def measured(who: str, job: Job) -> tuple[float, npt.NDArray[np.float64]]:
    """Median milliseconds of a step, and the energies of the run."""
    atoms = system(ATOMS)
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as made:
        where = place(Path(made), "pimd", atoms)
        with contextlib.closing(Rings(where, atoms, job, batch(who, job))) as rings:
            until(where.listening, _PATIENCE_S, "i-PI to listen")
            with answering(command(who, job, where), where):
                took = rings.ended()
            return float(np.median(took)), rings.energies


class Bench:
    """All measurements.

    Args:
        job: what every row does.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._energies: npt.NDArray[np.float64] | None = None
        self.times: dict[str, dict[int, float]] = defaultdict(dict)  # of whom, in which repetition, ms

    def measure(self, who: Sequence[str], repetition: int) -> None:
        """Measure these, in this order.

        Raises:
            ValueError: one went another way than the others.
        """
        for one in who:
            self.times[one][repetition], energies = measured(one, self._job)
            self._energies = energies if self._energies is None else self._energies
            apart = float(np.abs(energies - self._energies).max())
            if not apart <= _SAME:
                raise ValueError(f"the potential energies of {one!r} differ from those of {WHO[0]!r} by {apart:g} eV")

    def median(self, who: str) -> float:
        """Milliseconds of a step."""
        return float(np.median(list(self.times[who].values())))

    def ratio(self, over: str, under: str) -> float:
        """Median, over the repetitions that have both."""
        both = self.times[over].keys() & self.times[under].keys()
        return float(np.median([self.times[over][one] / self.times[under][one] for one in both]))


def missed(bench: Bench) -> list[str]:
    """The pass lines that were not reached, each in words."""
    ratio = bench.ratio(SERVER, OWN)
    if ratio <= 1.0 + MARGIN:
        return []
    return [f"a step takes by the server {ratio:.2f} times what it takes with i-PI's own driver; at most {1 + MARGIN:.2f} was to be shown"]


def run(job: Job, repetitions: int) -> Bench:
    """Measure everything."""
    bench = Bench(job)
    for repetition in range(repetitions):
        turn = repetition % len(WHO)
        bench.measure(WHO[turn:] + WHO[:turn], repetition)
        print(f"repetition {repetition + 1} of {repetitions}", file=sys.stderr)
    for repetition in range(repetitions, AGAIN):
        if not missed(bench):
            break
        bench.measure((OWN, SERVER) if repetition % 2 else (SERVER, OWN), repetition)
        print(f"server and own again, {repetition + 1} of at most {AGAIN}", file=sys.stderr)
    return bench


def tabulated(bench: Bench, job: Job) -> list[dict[str, object]]:
    """Print the table, and return it for JSON."""
    print(f"{job.beads} beads of {ATOMS} atoms\n{'':14} {'batch':>5} {'ms a step':>10} {'frames/s':>9} {'over server':>11} {'over own':>9}")
    rows: list[dict[str, object]] = []
    for who in WHO:
        took, size = bench.median(who), batch(who, job)
        over_server, over_own = bench.ratio(who, SERVER), bench.ratio(who, OWN)
        print(f"{who:14} {size:5d} {took:10.1f} {1000 * job.beads / took:9.0f} {over_server:11.2f} {over_own:9.2f}")
        each = [round(one, 3) for _, one in sorted(bench.times[who].items())]
        ratios = {"over_server": round(over_server, 3), "over_own": round(over_own, 3)}
        rows.append({"who": who, "batch": size, "ms_a_step": round(took, 3), **ratios, "repetitions_ms": each})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and repetitions; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--model", metavar="MODEL", default="painn:cuau-water", help="another potential; it must know Cu, Au, O and H")
    parser.add_argument("--beads", metavar="N", type=int, default=BEADS, help="another number of beads")
    options = parser.parse_args()
    job = Job(options.model, options.beads, 15 if options.quick else 40)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    bench = run(job, 2 if options.quick else REPETITIONS)
    rows, faults = tabulated(bench, job), missed(bench)
    if options.json:
        told = {"machine": described(), "command": " ".join(["python", "benchmarks/pimd.py", *sys.argv[1:]]), "model": job.model}
        told |= {"beads": job.beads, "atoms": ATOMS, "passed": not faults, "missed": faults, "rows": rows}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if faults:
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    gain = bench.ratio(SINGLE, SERVER)
    print(
        f"passed: the server is not slower than i-PI's own driver with the whole batch (within {MARGIN:.0%}); the batch gains a factor of {gain:.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
