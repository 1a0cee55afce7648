"""What a back end costs over the model that it adapts, and what its uncertainty costs over plain forces.

    python benchmarks/backends.py [--quick] [--json FILE] [--model NAME] [--sizes N ...]

In one process, on one thread, for the same frames of Cu, Au and water whose atoms have just moved:

    predict      `potential.predict`: neighbour list, energy, forces, virial and features of one frame
    scored       `Slot.answer`: the same under the readout of a version, and the last-layer score of each atom; what the evaluator does
    model        the call of the package's own model on a graph that is ready, with the stress
    calculator   the whole of the package's own ASE calculator

The first two need a potential with a readout (sevennet:7net-0?elements=H,O,Cu,Au), the last two a package (sevennet, chgnet, mace; run it with
the Python that has it). painn, aenet and the toys are models of tumbaga itself: there is nothing to be compared with.

They take turns by short blocks of calls, in an order that turns with the block, so that what else the machine does hits all alike. A cost is
the median over blocks of (median of the one / median of the other in the same block) - 1; beside it stand its quartiles. Energies and
forces of predict and model are compared for every frame.

Pass: predict costs at most LIMIT more than the model's own call, scored at most LIMIT more than predict, and both say the same to float32.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy and torch are imported

import argparse
import json
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import ase
import numpy as np
from _machine import described
from _own_calls import Array, Own, own
from embedded import random_cluster

from tumbaga.driver.backends import registry
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.slot import BASE, Slot
from tumbaga.driver.structures import from_atoms
from tumbaga.online.ports import Potential

LIMIT = 0.10
MODEL = "painn:cuau-water"
SYSTEMS = {20: (2, 3, 5), 38: (3, 5, 10), 100: (2, 5, 31)}
"""Cu, Au and waters, by the number of atoms."""
PREDICT, SCORED, OWN_MODEL, CALCULATOR = "predict", "scored", "model", "calculator"
_MOVED, _FRAMES = 0.02, 8  # Å; different frames, in turn
_SETTLE, _WARM = 1, 3  # calls before a block, and before everything
_SAME_FORCE, _SAME_ENERGY = 5e-4, 2e-5  # eV/Å; eV an atom: the package adds energies of some eV an atom up in float32

Call = Callable[[], float]  # returns the seconds that it took


@dataclass(frozen=True)
class Length:
    """How much is measured: blocks, and seconds that the slowest may take in each of them."""

    blocks: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """A relative cost: median over blocks, and quartiles."""

    median: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One line of the table: medians in milliseconds, relative costs, largest differences from the package's own model."""

    model: str
    atoms: int
    calls: int
    ms: dict[str, float]
    adapter: Cost | None
    uncertainty: Cost | None
    energy_apart: float | None
    force_apart: float | None


def frames(size: int, periodic: bool) -> list[ase.Atoms]:
    """A compact random cluster of so many atoms, moved a little in each; in a wide box where the package cannot do without."""
    numbers, positions = random_cluster(*SYSTEMS[size], np.random.default_rng(0))
    rng = np.random.default_rng(1)
    made = [ase.Atoms(numbers, positions + rng.normal(scale=_MOVED, size=positions.shape)) for _ in range(_FRAMES)]
    for atoms in made if periodic else ():
        atoms.set_cell([40.0] * 3)
        atoms.center()
        atoms.pbc = True
    return made


def clocked(call: Callable[[Any], object], given: Sequence[Any], prepare: Callable[[Any], Any] | None = None) -> Call:
    """Return what times one call on the next of what is given, prepared outside of the clock."""
    turns = cycle(given)

    def once() -> float:
        one = next(turns) if prepare is None else prepare(next(turns))
        began = time.perf_counter()
        call(one)
        return time.perf_counter() - began

    return once


def subjects(potential: Potential, package: Own | None, atoms: Sequence[ase.Atoms]) -> dict[str, Call]:
    """All that is measured."""
    given = [from_atoms(one) for one in atoms]
    found = {PREDICT: clocked(lambda frame: potential.predict([frame]), given)}
    if potential.spec.n_hidden:
        slot = Slot(potential)
        found[SCORED] = clocked(lambda frame: slot.answer([frame], [(BASE, BASE, 0.0)]), given)
    if package is not None:
        found[OWN_MODEL] = clocked(package.call, atoms, package.prepare)
        found[CALCULATOR] = clocked(package.calculator.calculate, atoms)
    return found


def apart(potential: Potential, package: Own, atoms: Sequence[ase.Atoms]) -> tuple[float, float]:
    """Largest differences between back end and package: energy, eV an atom, and force component, eV/Å."""
    energies, forces = [], []
    for one in atoms:
        (said,), (energy, force) = potential.predict([from_atoms(one)]), package.call(package.prepare(one))
        energies.append(abs(said.energy - energy) / len(one))
        forces.append(float(np.abs(said.forces - force).max()))
    return max(energies), max(forces)


def cost(one: Array, other: Array) -> Cost:
    """What the one costs over the other, from their medians in each block."""
    low, median, high = np.quantile(one / other - 1.0, (0.25, 0.5, 0.75)).round(4).tolist()
    return Cost(median, (low, high))


def measured(model: str, potential: Potential, package: Own | None, size: int, length: Length) -> Row:
    """One line of the table."""
    atoms = frames(size, package is not None and package.periodic)
    calls = subjects(potential, package, atoms)
    warm = {who: [call() for _ in range(_WARM)][-1] for who, call in calls.items()}
    each = int(np.clip(length.seconds / max(warm.values()), 2, 50))
    who = list(calls)
    times: dict[str, list[list[float]]] = {one: [] for one in who}
    for block in range(length.blocks):
        turn = block % len(who)
        for one in who[turn:] + who[:turn]:
            times[one].append([calls[one]() for _ in range(_SETTLE + each)][_SETTLE:])
    blocks = {one: np.median(found, axis=1) for one, found in times.items()}
    energy, force = apart(potential, package, atoms) if package is not None else (None, None)
    return Row(
        model=model,
        atoms=size,
        calls=length.blocks * each,
        ms={one: round(1000.0 * float(np.median(found)), 3) for one, found in times.items()},
        adapter=cost(blocks[PREDICT], blocks[OWN_MODEL]) if OWN_MODEL in blocks else None,
        uncertainty=cost(blocks[SCORED], blocks[PREDICT]) if SCORED in blocks else None,
        energy_apart=energy,
        force_apart=force,
    )


HEAD = f"{'ms a frame':32} {'':>5}" + "".join(f" {who:>10}" for who in (PREDICT, SCORED, OWN_MODEL, CALCULATOR))
HEAD += f"  {'adapter over model':22} {'uncertainty over predict':24} apart: eV an atom, eV/Å"


def line(row: Row) -> str:
    """A line of the table."""

    def told(one: Cost | None) -> str:
        return "-" if one is None else f"{one.median:+.1%} ({one.quartiles[0]:+.1%} to {one.quartiles[1]:+.1%})"

    times = "".join(f" {row.ms[who]:10.3f}" if who in row.ms else f" {'-':>10}" for who in (PREDICT, SCORED, OWN_MODEL, CALCULATOR))
    differ = "-" if row.force_apart is None else f"{row.energy_apart:.1e} {row.force_apart:.1e}"
    return f"{row.model:32.32} {row.atoms:5d}{times}  {told(row.adapter):22} {told(row.uncertainty):24} {differ}"


def missed(rows: Sequence[Row]) -> list[str]:
    """The pass lines that were not reached, each in words."""
    found = []
    for row in rows:
        where = f"({row.model}, {row.atoms} atoms)"
        for what, one in (
            ("the adapter costs {} of the model's own call", row.adapter),
            ("the uncertainty costs {} of plain forces", row.uncertainty),
        ):
            if one is not None and not one.median <= LIMIT:
                found.append(f"{what.format(f'{one.median:.1%}')} {where}; at most {LIMIT:.0%} was to be shown")
        energy, force = row.energy_apart, row.force_apart
        if energy is not None and force is not None and not (energy <= _SAME_ENERGY and force <= _SAME_FORCE):
            told = f"back end and package differ by {energy:.1e} eV an atom and {force:.1e} eV/Å {where}"
            found.append(f"{told}; at most {_SAME_ENERGY:g} and {_SAME_FORCE:g} were to be shown")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter blocks; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--model", metavar="NAME", default=MODEL, help=f"the potential; it must know Cu, Au, O and H (default {MODEL})")
    parser.add_argument("--sizes", metavar="N", type=int, nargs="+", choices=SYSTEMS, default=tuple(SYSTEMS), help="these sizes only")
    options = parser.parse_args()
    length = Length(6, 0.3) if options.quick else Length(30, 1.0)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that temporary folders are removed
    import torch

    torch.set_num_threads(1)
    try:
        potential = registry.load(options.model, "cpu", "float32")
    except PotentialError as error:
        print(error, file=sys.stderr)
        return 2
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages
        package = own(options.model)
        print(HEAD)
        for size in options.sizes:
            rows.append(measured(options.model, potential, package, size, length))
            print(line(rows[-1]), flush=True)
    faults = missed(rows)
    if options.json:
        command = " ".join(["python", "benchmarks/backends.py", *sys.argv[1:]])
        told = {"machine": described(), "command": command, "passed": not faults, "missed": faults, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if faults:
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    judged = [what for what, one in (("the adapter", rows[0].adapter), ("the uncertainty", rows[0].uncertainty)) if one is not None]
    print(f"passed: at most {LIMIT:.0%} for {' and for '.join(judged)}" if judged else "measured; there is nothing to be judged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
