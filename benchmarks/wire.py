"""What the wire costs: milliseconds of a step with a potential that is zero, with i-PI and ASE as engines, beside their own drivers.

    python benchmarks/wire.py [--quick] [--json FILE] [--only ENGINE]

Each row (engine, socket, beads, batch) and size is answered in turn by the engine's own driver ("peer": i-pi-driver-py -m dummy, ASE's
SocketClient), by tumbaga's wire in one process ("wire"), and by the whole server ("daemon": tumbaga serve -m toy:zero, with a gateway and
an evaluator process). The rows "raw" have no engine: a loop in Python sends a request and waits for the answer. Their peer is the least that
Python can do, a loop of recv_into and sendall that looks at nothing; in the rows "raw/py" it is i-pi-driver-py, without i-PI's own time and
without its sleeps, in which a difference between drivers can drown.

Everything is interleaved: one repetition measures every row once, and the three answerers of a row follow one another within seconds, in an
order that turns with the repetition; the daemon is measured in every other one. A figure is the median over repetitions; a ratio is the
median of the ratios within repetitions. Rows that look slower than their peer after that are measured again, peer and wire, until there are
AGAIN repetitions, and judged by all of them: two are too few to tell a twentieth from what else the machine does.

Pass: the wire is not slower than the engines' own drivers with i-PI, with ASE and in the rows raw/py; ASE over tcp takes at most 1.5 times what
it takes over unix, for wire and daemon; i-PI's output is the same to the last digit whoever answers. "Slower" is a ratio above 1 + MARGIN (see
there) both of the medians and of the best that each reached: what else the machine does adds time to one or the other by chance, and a
difference that is ours is in both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _answerers as answerers
import _wire_engines as engines
import ase
import numpy as np
from _answerers import DAEMON, PEER, WIRE, Place
from _machine import described
from ase.build import bulk
from ase.calculators.socketio import SocketIOCalculator
from ase.cluster import Icosahedron, Octahedron
from ase.io import write

MARGIN = 0.05
"""A true ratio of 1 is measured as up to 1.05 here: i-PI polls with a sleep of 0.1 ms, so a step is quantised by when the answer falls into it,
and the same driver measured twice within one repetition differs by some per cent (the column "noise" says by how many)."""
TCP_OVER_UNIX = 1.5
AGAIN = 9
WHO = (PEER, WIRE, DAEMON)


@dataclass(frozen=True)
class Row:
    """One line of the table for every size."""

    engine: str
    kind: str
    beads: int = 1
    batch: int = 1

    @property
    def name(self) -> str:
        beads = f", {self.beads} beads, batch {self.batch}" if self.engine == "i-PI" else ""
        return f"{self.engine} {self.kind}{beads}"


ROWS = (
    *(Row("i-PI", kind, beads, batch) for beads, batch in ((1, 1), (8, 1), (8, 8)) for kind in ("unix", "tcp", "shm")),
    *(Row(engine, kind) for engine in ("ASE", "raw", "raw/py") for kind in ("unix", "tcp")),
)
Key = tuple[Row, int]
Figures = dict[str, dict[int, tuple[float, float]]]  # answerer -> repetition -> (median, best)


def structure(size: int) -> ase.Atoms:
    """13, 38 and 147 atoms: closed shells; 1000: cut out of the rattled crystal. Au on the first quarter."""
    if size == 1000:
        solid = bulk("Cu", cubic=True) * (7, 7, 7)
        distance = np.linalg.norm(solid.positions - solid.cell.sum(axis=0) / 2, axis=1)
        atoms = ase.Atoms(solid[np.argsort(distance, kind="stable")[:size]])
        atoms.rattle(0.05, seed=0)
    else:
        made = {13: lambda: Icosahedron("Cu", 2), 38: lambda: Octahedron("Cu", 4, 1), 147: lambda: Icosahedron("Cu", 4)}[size]()
        atoms = ase.Atoms(made.symbols, made.positions)
    atoms.numbers[: size // 4] = 79
    atoms.set_cell([40.0] * 3)
    atoms.center()
    atoms.pbc = False
    return atoms


def blocks(row: Row, size: int, quick: bool) -> int:
    """Hundreds of i-PI steps: about half a second to a second."""
    if row.beads == 1:
        return 2 if quick else 3
    return 1 if quick or row.batch == 1 or size == 1000 else 2


class Bench:
    """All measurements.

    Args:
        folder: to work in.
        quick: fewer steps.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self._folder, self._quick = folder, quick
        self.figures: dict[Key, Figures] = defaultdict(lambda: defaultdict(dict))
        self.differing: set[str] = set()

    def measure(self, row: Row, size: int, order: tuple[str, ...], repetition: int) -> None:
        """One row and size, by every answerer in turn."""
        atoms = structure(size)
        file = self._folder / f"{size}.xyz"
        write(file, ase.Atoms(atoms.symbols, atoms.positions))
        with contextlib.ExitStack() as stack:
            answered = [who for who in order if (row.engine, who) != ("raw/py", DAEMON)]  # the rows "raw" have it
            places = {who: stack.enter_context(self._place(row.kind, file, size, row.engine)) for who in answered}
            done = {"i-PI": self._ipi, "ASE": self._ase}.get(row.engine, self._raw)(row, atoms, places)
        for who, took in done.items():
            self.figures[row, size][who][repetition] = (float(np.median(took)), min(took))

    @contextlib.contextmanager
    def _place(self, kind: str, file: Path, size: int, engine: str) -> Iterator[Place]:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        prefix = "/tmp/ipi_" if engine == "ASE" else f"{folder}/"  # ASE knows no other
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = Place(folder, kind, port, f"tumbaga-{uuid.uuid4().hex[:12]}", prefix, file, size)
        try:
            yield place
        finally:
            Path(prefix + place.name).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _ipi(self, row: Row, atoms: ase.Atoms, places: dict[str, Place]) -> dict[str, list[float]]:
        commands = {PEER: answerers.ipi_driver, WIRE: answerers.wire, DAEMON: answerers.daemon}
        number = blocks(row, len(atoms), self._quick)
        with contextlib.ExitStack() as stack:
            # all start at once, since that takes them longer than the steps do; an i-PI that has no driver yet sleeps
            runs = {who: engines.Ipi(place, atoms, row.beads, row.batch, number) for who, place in places.items()}
            for run in runs.values():
                stack.callback(run.close)
            for place in places.values():
                answerers.until(place.listening, 60.0, "i-PI to listen")
            done = {}
            for who, place in places.items():
                with answerers.answering(commands[who](place), place):
                    done[who] = runs[who].ended()
            if len({run.output for run in runs.values()}) > 1:
                self.differing.add(f"{row.name}, {len(atoms)} atoms")
        return done

    def _ase(self, row: Row, atoms: ase.Atoms, places: dict[str, Place]) -> dict[str, list[float]]:
        commands = {PEER: answerers.ase_client, WIRE: answerers.wire, DAEMON: answerers.daemon}
        done = {}
        for who, place in places.items():
            told: dict[str, Any] = {"port": place.port} if row.kind == "tcp" else {"unixsocket": place.name}
            with SocketIOCalculator(timeout=60.0, **told) as calculator, answerers.answering(commands[who](place), place):
                done[who] = engines.ase_calls(calculator, atoms)
                calculator.close()
        return done

    def _raw(self, row: Row, atoms: ase.Atoms, places: dict[str, Place]) -> dict[str, list[float]]:
        floor = row.engine == "raw"
        commands = {PEER: answerers.floor if floor else answerers.ipi_driver, WIRE: answerers.wire, DAEMON: answerers.daemon}
        done = {}
        for who, place in places.items():
            with engines.raw_listener(place) as listener, answerers.answering(commands[who](place), place):
                done[who] = engines.raw_cycles(listener, atoms, handshake=not (floor and who == PEER))
        return done


def median_ratio(over: dict[int, tuple[float, float]], under: dict[int, tuple[float, float]]) -> float:
    """Median, over the repetitions that have both, of the ratio of medians."""
    return float(np.median([over[repetition][0] / under[repetition][0] for repetition in over.keys() & under.keys()]))


def best_ratio(over: dict[int, tuple[float, float]], under: dict[int, tuple[float, float]]) -> float:
    """Ratio of the best that each reached in any repetition."""
    return min(best for _, best in over.values()) / min(best for _, best in under.values())


def slower(row: Row, by: Figures) -> bool:
    """Whether the wire is slower than its peer by what was measured so far; the peer of the rows "raw" is a floor, not a rival."""
    return row.engine != "raw" and min(median_ratio(by[WIRE], by[PEER]), best_ratio(by[WIRE], by[PEER])) > 1 + MARGIN


def noise(figures: dict[int, tuple[float, float]]) -> float:
    """By how much the same thing differs from one repetition to the next, relative; the median of that."""
    values = np.log([median for median, _ in figures.values()])
    return float(np.median(np.abs(np.diff(values)))) if len(values) > 1 else float("nan")


def tabulated(bench: Bench) -> list[dict[str, Any]]:
    """Print the table, and return it for JSON."""
    rows = []
    print(f"{'':34} {'':5} {'median (best) ms a step':^53}  {'ratio to the peer':^17}  peer's")
    print(f"{'engine':34} {'atoms':>5} {'peer':>17} {'wire':>17} {'daemon':>17}  {'wire':>8} {'daemon':>8}  noise")
    for (row, size), by in sorted(bench.figures.items(), key=lambda item: (ROWS.index(item[0][0]), item[0][1])):
        told = {who: tuple(round(float(x), 4) for x in np.median(list(by[who].values()), axis=0)) for who in WHO if by[who]}
        ratios = {who: round(median_ratio(by[who], by[PEER]), 3) for who in told if who != PEER}
        cells = " ".join((f"{told[who][0]:7.3f} ({told[who][1]:.3f})" if who in told else "-").rjust(17) for who in WHO)
        print(
            f"{row.name:34} {size:5d} {cells}  {ratios[WIRE]:8.2f} {ratios.get(DAEMON, float('nan')):8.2f}  {100 * noise(by[PEER]):4.0f}%"
        )
        facts = {"engine": row.engine, "socket": row.kind, "beads": row.beads, "batch": row.batch, "atoms": size}
        ms = {who: {"median_ms": median, "best_ms": best} for who, (median, best) in told.items()}
        rows.append(
            {
                **facts,
                **ms,
                "ratio": ratios,
                "best_ratio": round(best_ratio(by[WIRE], by[PEER]), 3),
                "peer_noise": round(noise(by[PEER]), 3),
                "repetitions": len(by[PEER]),
            }
        )
    return rows


def missed(bench: Bench) -> list[str]:
    """The pass lines that were not reached, each in words."""
    found = [f"i-PI's output differs between answerers ({name})" for name in sorted(bench.differing)]
    for (row, size), by in bench.figures.items():
        if slower(row, by):
            ratio, best = median_ratio(by[WIRE], by[PEER]), best_ratio(by[WIRE], by[PEER])
            found.append(f"wire takes {ratio:.2f} times what the peer takes, at best {best:.2f} times ({row.name}, {size} atoms)")
        if row.engine == "ASE" and row.kind == "tcp" and (unix := bench.figures.get((Row("ASE", "unix"), size))):
            for who in (WIRE, DAEMON):
                over = median_ratio(by[who], unix[who])
                if over > TCP_OVER_UNIX:
                    found.append(f"ASE over tcp takes {over:.2f} times what it takes over unix ({who}, {size} atoms)")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes, fewer steps; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--only", metavar="ENGINE", choices=("i-PI", "ASE", "raw", "raw/py"), help="these rows only")
    parser.add_argument("--sizes", metavar="N", type=int, nargs="+", choices=(13, 38, 147, 1000), help="these sizes only")
    parser.add_argument("--repetitions", metavar="N", type=int, help="how often")
    options = parser.parse_args()
    sizes = options.sizes or ([38, 147] if options.quick else [13, 38, 147, 1000])
    repetitions = options.repetitions or 2
    rows = [row for row in ROWS if options.only in (None, row.engine)]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as folder:
        bench = Bench(Path(folder), options.quick)
        for repetition in range(repetitions):
            turned = WHO[repetition % 3 :] + WHO[: repetition % 3]
            alone = tuple(who for who in turned if who != DAEMON)
            for size in sizes:
                for row in rows:
                    # the server takes longest to start, and nothing of i-PI's rows passes or fails by it
                    left_out = repetition % 2 or (options.quick and row.engine == "i-PI" and size != sizes[0])
                    bench.measure(row, size, alone if left_out else turned, repetition)
            print(f"repetition {repetition + 1} of {repetitions} after {time.monotonic() - begin:.0f} s", file=sys.stderr)
        doubtful = [(row, size) for (row, size), by in bench.figures.items() if slower(row, by)]
        for repetition in range(repetitions, AGAIN if doubtful else 0):
            for row, size in doubtful:
                bench.measure(row, size, (PEER, WIRE) if repetition % 2 else (WIRE, PEER), repetition)
            print(f"{len(doubtful)} rows again, {repetition + 1} of {AGAIN}, after {time.monotonic() - begin:.0f} s", file=sys.stderr)
    table, faults = tabulated(bench), missed(bench)
    if options.json:
        command = " ".join(["python", "benchmarks/wire.py", *sys.argv[1:]])
        told = {"machine": described(), "command": command, "passed": not faults, "missed": faults, "rows": table}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if faults:
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    print(
        f"passed: the wire is not slower than the engines' own drivers (within {100 * MARGIN:.0f} %), ASE is as fast over tcp as over unix"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
