"""What a hostile peer costs those beside it: nothing, whatever it does, in either role.

Role "engine": `tumbaga serve` (two processes and their supervisor) with a well-behaved engine of 38 atoms that asks back to back, and an
engine at another address that misbehaves. Role "client": a pool that listens for programs that supply forces, with one that keeps the rules
and any number of others that do not.

    python benchmarks/hostile.py [--quick] [--json FILE] [--only engine|client] [--misdeed NAME]

Each misdeed is committed over and over for some seconds by a process of its own. Between two misdeeds there is a phase without any, so each
stands between two undisturbed ones of the same run; its quantiles are compared with those of these two together. Between two times of the
same misdeed the hostile engine has one frame computed as a good one does: so it is dialled again at once, and disturbs as often as it can.

Pass, for every misdeed: the 99 % quantile of the good calls is at most twice the undisturbed one or that + FLOOR_MS, whichever is larger;
every number of the good session is what it was at first, to the last bit; every hostile session was ended within its bound, and the log says
what was received and what was expected; afterwards as many files are open as before; memory never grew by more than MEMORY_MIB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from _hostile_engines import SILENCE
from _hostile_peers import Deeds, Misdeed
from _hostile_subjects import Daemon, Pool, Subject, WrongNumbersError
from _machine import described

FACTOR = 2.0
FLOOR_MS = 2.0
"""The hostile peer is a process too, and so is its frame between two misdeeds: on few cores a call may wait for one turn of either."""
MEMORY_MIB = 64.0
_SETTLE_S = 5.0
_PATIENCE_S = 60.0
_LOOK_EVERY = 8  # calls between two looks whether the hostile side has answered


@dataclass
class Row:
    """What came of one misdeed."""

    role: str
    misdeed: str
    times: int
    told: int
    ended_s: float
    bound_s: float
    calls: int
    p50: float
    p99: float
    longest: float
    quiet_calls: int
    quiet_p50: float
    quiet_p99: float
    quiet_longest: float
    memory_mib: float
    sentence: str
    faults: list[str]


class Hostile:
    """The hostile side, in its process.

    Args:
        subject: whom it is to trouble.
    """

    def __init__(self, subject: Subject) -> None:
        program = [sys.executable, str(Path(__file__).with_name("_hostile_peers.py")), f"{subject.role}s", *map(str, subject.where)]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def order(self, name: str, seconds: float) -> None:
        """Have a misdeed committed for so long."""
        assert self._process.stdin is not None
        print(json.dumps({"misdeed": name, "seconds": seconds}), file=self._process.stdin, flush=True)

    def done(self) -> Deeds | None:
        """What came of it, None as long as it goes on."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], 0.0)[0]:
            return None
        line = self._process.stdout.readline()
        return Deeds(**json.loads(line)) if line else Deeds(trouble="the hostile process has ended")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_SETTLE_S)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def undisturbed(subject: Subject, seconds: float) -> list[float]:
    """Times of calls while nobody misbehaves."""
    until = time.monotonic() + seconds
    times = []
    while time.monotonic() < until:
        times.append(subject.call())
    return times


def disturbed(subject: Subject, hostile: Hostile, misdeed: str, seconds: float) -> tuple[list[float], Deeds]:
    """Times of calls while a misdeed is committed, and what came of that."""
    until = time.monotonic() + seconds + _PATIENCE_S
    hostile.order(misdeed, seconds)
    times: list[float] = []
    while (done := hostile.done()) is None:
        if time.monotonic() > until:
            return times, Deeds(trouble="it did not come to an end")
        times += [subject.call() for _ in range(_LOOK_EVERY)]
    return times, done


def settled(subject: Subject, misdeed: Misdeed, before: int) -> tuple[list[str], int]:
    """The sentences about a misdeed and the files still open, as soon as there is one and they are as few as before, or after a while."""
    until = time.monotonic() + _SETTLE_S
    while True:
        subject.call()
        said = [line for line in subject.told() if re.search(misdeed.sentence, line)]
        if (said and subject.descriptors() <= before) or time.monotonic() > until:
            return said, subject.descriptors() - before


def drills(subject: Subject, hostile: Hostile, seconds: float, only: str) -> Iterator[Row]:
    """Commit all misdeeds, each between two undisturbed phases."""
    names = [*subject.misdeeds, *([Misdeed(SILENCE, lambda wire: None, "")] if subject.role == "engine" else [])]
    undisturbed(subject, 1.0)
    memory, quiet = subject.peak(), undisturbed(subject, seconds)
    for misdeed in names:
        if only and only not in misdeed.name:
            continue
        before = subject.descriptors()
        subject.prepare(misdeed)
        times, done = disturbed(subject, hostile, misdeed.name, seconds)
        said, leaked = (
            (["(nothing: it is served as soon as it speaks)"], 0) if misdeed.name == SILENCE else settled(subject, misdeed, before)
        )
        after = undisturbed(subject, seconds)
        yield judged(subject, misdeed, done, said, leaked, subject.peak() - memory, times, quiet + after)
        quiet = after


def judged(
    subject: Subject, misdeed: Misdeed, done: Deeds, said: list[str], leaked: int, memory: float, times: list[float], quiet: list[float]
) -> Row:
    """Put the figures of a misdeed together, and what is wrong with them."""
    bound = subject.bound(misdeed)
    (p50, p99, longest), (q50, q99, qlongest) = (np.quantile(one, (0.5, 0.99, 1.0)) * 1000.0 for one in (times or [np.inf], quiet))
    faults = [done.trouble] if done.trouble else []
    if p99 > (most := max(FACTOR * q99, q99 + FLOOR_MS)):
        faults.append(f"the 99 % quantile is {p99:.2f} ms, at most {most:.2f} ms was to be shown")
    if done.unended or done.slowest > bound:
        faults.append(
            f"{done.unended} of {done.times} sessions were not ended, the slowest after {done.slowest:.1f} s; bound {bound:.1f} s"
        )
    if not said:
        faults.append(f"no sentence like {misdeed.sentence!r}; there was {subject.told()[:3]}")
    if leaked > 0:
        faults.append(f"{leaked} more files are open than before")
    if memory > MEMORY_MIB:
        faults.append(f"memory has grown by {memory:.0f} MiB")
    figures = [round(float(one), 3) for one in (p50, p99, longest)], [round(float(one), 3) for one in (q50, q99, qlongest)]
    return Row(
        subject.role, misdeed.name, done.times, len(said), round(done.slowest, 3), bound, len(times), *figures[0], len(quiet), *figures[1],
        round(memory, 1), said[0] if said else "", faults,
    )  # fmt: skip


HEAD = f"{'role':6} {'misdeed':31} {'times':>6} {'ended s':>8} {'calls':>6} {'p50 ms':>7} {'p99':>7} {'max':>7} {'quiet p50':>9} {'p99':>7} {'max':>7} {'MiB':>6}"


def line(row: Row) -> str:
    """A line of the table."""
    return (
        f"{row.role:6} {row.misdeed:31} {row.times:6d} {row.ended_s:8.2f} {row.calls:6d} {row.p50:7.2f} {row.p99:7.2f} {row.longest:7.1f} "
        f"{row.quiet_p50:9.2f} {row.quiet_p99:7.2f} {row.quiet_longest:7.1f} {row.memory_mib:6.1f}{'  MISSED' if row.faults else ''}"
    )


def measured(role: str, seconds: float, only: str) -> Iterator[Row]:
    """All drills of one role, on a subject of their own."""
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as folder, contextlib.ExitStack() as stack:
        subject: Daemon | Pool = Daemon(Path(folder)) if role == "engine" else Pool(Path(folder))
        hostile = Hostile(subject)
        stack.callback(hostile.close)
        stack.enter_context(subject)
        yield from drills(subject, hostile, seconds, only)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter phases; the same checks")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--only", choices=("engine", "client"), help="one role")
    parser.add_argument("--misdeed", default="", metavar="NAME", help="those whose name has this in it")
    options = parser.parse_args()
    seconds, rows, missed = 1.0 if options.quick else 5.0, [], []
    print(HEAD)
    for role in (options.only,) if options.only else ("engine", "client"):
        try:
            for row in measured(role, seconds, options.misdeed):
                rows.append(row)
                print(line(row), flush=True)
                missed += [f"{row.role}, {row.misdeed}: {fault}" for fault in row.faults]
        except (WrongNumbersError, ConnectionError, TimeoutError) as error:
            missed.append(f"{role}, after {rows[-1].misdeed if rows else 'the start'}: the good session suffered: {error}")
    if options.json:
        command = " ".join(["python", "benchmarks/hostile.py", *sys.argv[1:]])
        told: dict[str, Any] = {"machine": described(), "command": command, "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(told, indent=1) + "\n")
    for sentence in missed:
        print(f"MISSED: {sentence}")
    if missed:
        return 1
    print(f"passed: {len(rows)} misdeeds; each was ended as stated, and the session beside it noticed none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
