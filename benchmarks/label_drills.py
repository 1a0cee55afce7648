"""Labels under faults: workers and the learner are killed at random, a label hangs, one eats memory, the disk is full; and what forces notice.

    python benchmarks/label_drills.py [--quick] [--json FILE] [--seed N]          Linux; the full disk needs root, for a small file system

One run: `tumbaga serve` with painn:cuau-water, an engine that asks back to back for new frames, and one label worker. Labels are computed
by a function that sleeps for DELAY_S and writes down when it begins and ends each frame. Before, between and after the drills are stretches
without any, with labels all the same; a drill is compared with the two beside it.

  workers   kill -9 at a random instant of a label, or soon after it: of the label worker, or of the labelling process itself
  learner   the same
  hang      a label that never ends (label.time_limit)
  memory    a label that eats memory (label.memory_gb)
  disk      the file system of the run directory is filled up, and some seconds later there is room again

In the end no more labels are begun, and every frame that was begun is looked for in the store. Pass: each frame whose label was computed is
there once, with its label; none was computed to its end twice; hanging and eating frames are failures with their reason, tried once; no other
has failed; labels went on after each drill; the engine's connection held, all its numbers were finite, and 99 % of its calls during a drill
took at most FACTOR times those beside it, or FLOOR_MS more. A frame may be begun again as often as its worker was killed, so label.attempts
is ATTEMPTS here; and now and then a label is waited for between two kills: who dies six times without having done anything is not started again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import _drill_parts
import numpy as np
from _drill_parts import HANG, MEMORY, Caller
from _machine import described

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.testing import Program, until
from tumbaga.online.labels.testing import read_journal
from tumbaga.online.store import FILE, Store
from tumbaga.socket_protocol.streams import Address

DELAY_S = 0.3
TIME_LIMIT_S, MEMORY_GB, ATTEMPTS = 20.0, 1.0, 100
FACTOR, FLOOR_MS = 2.0, 5.0
"""Starting a process costs a core its time: on two cores a call may wait for that."""
ROOM_MIB = 1024
_FULL_S = 5.0
_PATIENCE_S = 180.0
UNHELD = 1e-4  # eV/Å, which no potential holds: there is always a frame to be labelled
WITHOUT = configs.Learn(finetune_every=0)
STRUCTURE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
REASONS = {
    HANG: f"took longer than label.time_limit = {TIME_LIMIT_S:g} s",
    MEMORY: f"needed more memory than label.memory_gb = {MEMORY_GB:g}",
}


@dataclass
class Row:
    """One line of the table: a drill, or a stretch without one."""

    drill: str
    times: int
    seconds: float
    labels: int  # ended meanwhile
    calls: int
    p50: float  # ms
    p99: float
    longest: float
    beside_p99: float = 0.0
    faults: list[str] = field(default_factory=list)


class Run:
    """The run under test.

    Args:
        folder: an empty one.
        seed: of the instants of the kills.
        learn: settings of learning; by default without fine-tunes, which would be measured with the drills.
        target: the force error to hold, eV/Å.
    """

    def __init__(self, folder: Path, seed: int, learn: configs.Learn = WITHOUT, target: float = UNHELD) -> None:
        self.folder, self.run_dir, self._random = folder, folder / "disk" / "run", random.Random(seed)
        self.journal, self.orders = folder / "journal", folder / "orders"
        self.orders.mkdir()
        self.run_dir.mkdir()
        method = f"call:{Path(_drill_parts.__file__).absolute()}:label"
        options = {"journal": str(self.journal), "orders": str(self.orders), "delay": DELAY_S}
        label = configs.Label(
            method=method, options=options, budget=100_000, time_limit=TIME_LIMIT_S, memory_gb=MEMORY_GB, attempts=ATTEMPTS
        )
        where = Address.unix(str(folder / "engine"))
        settings = configs.Config(
            serve=configs.Serve(connect=(str(where),), prefix=""),
            potential=configs.Potential(template=str(STRUCTURE)),
            flag=configs.Flag(force_error=target, spacing=5),
            label=label,
            learn=learn,
        )
        (self.run_dir / configs.FILE).write_text(configs.dumps(settings))
        self._where = where

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.engine = stack.enter_context(contextlib.closing(Caller(self._where, STRUCTURE)))
            self.program = stack.enter_context(Program(self.run_dir, "serve", "--quiet", scratch=self.folder / "scratch"))
            self.more_labels(3)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for something that must come, as long as the engine is served."""
        return until(condition, _PATIENCE_S, what, lambda: "the engine has lost its server" if self.engine.gone else "")

    def count(self, what: str) -> int:
        """Lines of the journal."""
        return sum(said == what for said, _, _ in read_journal(self.journal))

    def more_labels(self, number: int) -> None:
        """Wait until so many more labels have ended."""
        goal = self.count("end") + number
        self.wait(lambda: self.count("end") >= goal, f"{number} more labels")

    def some_moment(self) -> None:
        """Wait for a random moment of a label that begins, or of what comes after it."""
        goal = self.count("start") + 1
        self.wait(lambda: self.count("start") >= goal, "the next label to begin")
        time.sleep(self._random.uniform(0.0, 1.5 * DELAY_S))

    def kill(self, name: str) -> None:
        """kill -9 of one of its processes; of "labelling", the process of the last label."""
        if name == "labelling":
            with contextlib.suppress(ProcessLookupError):  # it has been replaced meanwhile
                os.kill(read_journal(self.journal)[-1][2], signal.SIGKILL)
            return
        dead = self.program.kill(name)
        self.wait(lambda: self.program.status()["pids"][name] not in (None, dead), f"{name} to be started again")

    def some_victim(self, names: Sequence[str] = ("label-0", "labelling")) -> str:
        """Who is killed next."""
        return self._random.choice(names)

    def order(self, fault: str) -> None:
        """Have the next label go wrong, and wait until that is recorded."""
        failed = self.program.status()["labels"]["failed"]
        (self.orders / fault).touch()
        self.wait(lambda: self.program.status()["labels"]["failed"] > failed, f"the failure of a label ({fault})")


# --- the drills -----------------------------------------------------------------------------------------------------------------------


def nothing(run: Run, times: int) -> None:
    """So many labels without a fault."""
    run.more_labels(times)


def workers(run: Run, times: int) -> None:
    """Kill the label worker, or its labelling process."""
    for number in range(times):
        if number % 4 == 3:
            run.more_labels(1)
        run.some_moment()
        run.kill(run.some_victim())
    run.more_labels(1)


def learner(run: Run, times: int) -> None:
    """Kill the learner."""
    for _ in range(times):
        run.more_labels(2)
        run.some_moment()
        run.kill("learner")
    run.more_labels(1)


def hang(run: Run, times: int) -> None:
    """Labels that never end."""
    for _ in range(times):
        run.order(HANG)
    run.more_labels(1)


def memory(run: Run, times: int) -> None:
    """Labels that eat memory."""
    for _ in range(times):
        run.order(MEMORY)
    run.more_labels(1)


def disk(run: Run, times: int) -> None:
    """Fill the file system up, wait, make room."""
    for _ in range(times):
        filler = run.run_dir.parent / "filler"
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
        with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(512))
        time.sleep(_FULL_S)
        filler.unlink()
        run.more_labels(3)


DRILLS: dict[str, Callable[[Run, int], None]] = {"workers": workers, "learner": learner, HANG: hang, MEMORY: memory, "disk": disk}


def measured(run: Run, name: str, drill: Callable[[Run, int], None], times: int) -> Row:
    """Do a drill, and see what the engine noticed of it."""
    before, began, fault = run.count("end"), time.monotonic(), []
    try:
        drill(run, times)
    except TimeoutError as error:
        fault = [str(error)[:300]]
    ended = time.monotonic()
    windows = [window for window in list(run.engine.windows) if began <= window.ended <= ended]
    milliseconds = 1000.0 * np.array([seconds for window in windows for seconds in window.seconds] or [0.0])
    p50, p99 = np.percentile(milliseconds, (50, 99))
    if any(window.infinite for window in windows):
        fault.append("an answer was not finite")
    if run.engine.gone:
        fault.append("the engine has lost its server")
    labels, longest = run.count("end") - before, float(milliseconds.max())
    return Row(
        name, times, round(ended - began, 1), labels, len(milliseconds), round(p50, 2), round(p99, 2), round(longest, 1), faults=fault
    )


def compared(rows: list[Row]) -> None:
    """Hold each drill against the stretches beside it."""
    for index, row in enumerate(rows):
        if row.drill == "none":
            continue
        row.beside_p99 = max(rows[index - 1].p99, rows[index + 1].p99)
        if row.p99 > max(FACTOR * row.beside_p99, row.beside_p99 + FLOOR_MS):
            row.faults.append(f"99 % of the calls within {row.p99:g} ms, {row.beside_p99:g} ms beside it")


# --- what became of every frame -------------------------------------------------------------------------------------------------------


def drain(run: Run) -> None:
    """Have no more labels begun, and wait for the one under way to be stored."""
    os.kill(run.program.pid("learner"), signal.SIGUSR1)
    run.program.until(lambda status: not status["labels"]["running"], "the last label", _PATIENCE_S)


def accounted(run: Run) -> dict[str, Any]:
    """Look for every frame of the journal in the store."""
    journal = read_journal(run.journal)
    started, ended = (Counter(key for what, key, _ in journal if what == said) for said in ("start", "end"))
    ordered = {fault: {key for what, key, _ in journal if what == fault} for fault in (HANG, MEMORY)}
    with contextlib.closing(Store(run.run_dir / FILE, read_only=True)) as store:
        stored = Counter(one.frame.key for one in store.labels())
        stored += Counter(one.stored.frame.key for one in store.quarantined())
        reasons = [(store.frame(frame).key, reason) for frame, reason in store.failures()]
    faults = [f"{key} was computed and is not stored" for key in ended if not stored[key]]
    faults += [f"{key} was computed {times} times" for key, times in ended.items() if times > 1]
    faults += [f"{key} is stored {times} times" for key, times in stored.items() if times > 1]
    for fault, keys in ordered.items():
        for key in keys:
            said = [reason for one, reason in reasons if one == key]
            if len(said) != 1 or not said[0].startswith(REASONS[fault]) or started[key] != 1:
                faults.append(f"{key} ({fault}) was begun {started[key]} times and failed with {said}")
    known = set().union(*ordered.values())
    faults += [f"{key} failed: {reason}" for key, reason in reasons if key not in known]
    return {
        "begun": len(started),
        "begun again": sum(started.values()) - len(started),
        "computed": len(ended),
        "stored": len(stored),
        "failed": len(reasons),
        "still waiting": len(set(started) - set(stored) - {key for key, _ in reasons}),
        "faults": faults,
    }


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Make a file system of its own for the run directory; tell whether that was possible."""
    place = folder / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={ROOM_MIB}m", "tmpfs", str(place)], check=False, capture_output=True
    ).returncode == 0  # fmt: skip
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def printed(row: Row) -> str:
    """A line of the table."""
    beside = f"{row.beside_p99:>8.1f}" if row.beside_p99 else f"{'':8}"
    return (
        f"{row.drill:8} {row.times:>5} {row.seconds:>7.0f} {row.labels:>7} {row.calls:>7} {row.p50:>7.1f} {row.p99:>7.1f} {row.longest:>8.0f} "
        f"{beside}{'  MISSED' if row.faults else ''}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer kills; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--seed", type=int, default=0, help="of the instants of the kills")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    quiet, times = (10, (6, 2, 1, 1, 1)) if options.quick else (20, (50, 10, 2, 2, 2))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as name, small_disk(Path(name)) as mounted:
        with Run(Path(name), options.seed) as run:
            rows = [measured(run, "none", nothing, quiet)]
            for drill, often in zip(DRILLS, times, strict=True):
                if drill == "disk" and not mounted:
                    print("disk: left out, a file system of its own takes root")
                    continue
                rows.append(measured(run, drill, DRILLS[drill], often))
                rows.append(measured(run, "none", nothing, quiet))
            drain(run)
            run.engine.close()
            code = run.program.stop()
        found = accounted(run)
        status, left = run.program.status(), run.program.left_behind()
    compared(rows)
    print(f"{'drill':8} {'times':>5} {'seconds':>7} {'labels':>7} {'calls':>7} {'p50 ms':>7} {'p99 ms':>7} {'longest':>8} {'beside':>8}")
    for row in rows:
        print(printed(row))
    print(", ".join(f"{number} {what}" for what, number in found.items() if what != "faults"))
    missed = [f"{row.drill}: {fault}" for row in rows for fault in row.faults] + found["faults"] + left
    missed += [f"exit code {code}"] if code else []
    if options.json:
        command = " ".join(["python", "benchmarks/label_drills.py", *sys.argv[1:]])
        told = {"machine": described(), "command": command, "passed": not missed, "rows": [asdict(row) for row in rows], "frames": found}
        told |= {"missed": missed, "seconds": round(time.monotonic() - began, 1), "restarts": status["restarts"], "swaps": status["swaps"]}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if missed:
        print(f"MISSED: {'; '.join(missed)}")
        return 1
    print("passed: no label is lost, none computed twice, and forces do not notice")
    return 0


if __name__ == "__main__":
    sys.exit(main())
