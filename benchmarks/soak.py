"""What a server gathers over a long life: nothing. Memory, descriptors, threads and files over a million calls, 100 swaps and 200 sessions.

    python benchmarks/soak.py [--quick] [--json FILE] [--only calls|swaps]

Two servers, one after the other, each with real processes and two raw engines that ask back to back, one over unix and one over tcp, always
for new frames; beside them sessions that are opened, served and ended, over unix, tcp and shared memory, with EXIT, by closing the socket
and in the middle of a message. "calls": toy:zero, so that a million calls fit. "swaps": painn:cuau-water learns from a labeller that computes
next to nothing, so that several versions come in a second; then no more labels are begun, and the calls go on for a while without swaps.

Each process is looked at after every tenth of the work. Pass, for every process of both servers: from the first tenth on, its resident
memory grows by no more than MEMORY_MIB or MEMORY_SHARE, and it has as many descriptors and threads at the end as after the first tenth. All
answers are finite; the longest call while versions are swapped takes LONGEST_MS at most; the logs hold so many bytes for each session and label
(see LOG_BYTES) and none for a call; after the end there is no process, nothing in the server's folder for temporary files,
and nothing new in /tmp and /dev/shm that a process of it had ever opened.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from _hostile_subjects import free_port
from _machine import described
from _soak_engines import Brief, Load, Window, bohr
from _soak_watch import Held, Watch

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.testing import Program, until
from tumbaga.socket_protocol.streams import Address, listen

MEMORY_MIB, MEMORY_SHARE = 16.0, 0.02
"""A leak of 20 bytes a call, or of 200 kB a swap, would be seen. What an allocator keeps differs by some MiB from one moment to the next."""
LONGEST_MS = 100.0
"""As DESIGN.md has it for the embedded potential, figure L1."""
LOG_BYTES = {"of itself": 16_000, "session": 1_000, "label": 2_500}
"""A session is told when it is connected, at its first frame and at its end; a label when it begins and ends, with update and swap."""
LABEL_S = 0.25  # of sleep, so that a ramp has time to end before the next version is there
TENTHS = 10
STRUCTURE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
_PATIENCE_S = 600.0
_ENDLESS = 10**12


@dataclass
class Row:
    """One line of the table."""

    part: str
    quantity: str
    start: float
    warm: float
    end: float
    limit: str
    missed: str = ""


@dataclass
class Sizes:
    """How much of everything."""

    calls: int
    swaps: int
    sessions: int  # of each part
    quiet: float  # seconds without swaps


@dataclass
class Seen:
    """What was seen of one server."""

    samples: list[dict[str, Held]] = field(default_factory=list)
    log: int = 0
    infinite: int = 0
    calls: int = 0
    sessions: int = 0
    status: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    swapping: list[Window] = field(default_factory=list)
    quiet: list[Window] = field(default_factory=list)


class Part:
    """One server with its engines.

    Args:
        folder: an empty one.
        potential: that serves.
        calls: of each of the two engines.
        learn, label: settings.
    """

    def __init__(self, folder: Path, potential: str, calls: int, learn: configs.Learn, label: configs.Label) -> None:
        self._folder, self._stack, self.seen = folder, contextlib.ExitStack(), Seen()
        busy = Address.unix(str(folder / "busy")), Address.tcp("127.0.0.1", free_port())
        brief = Address.unix(str(folder / "brief")), Address.tcp("127.0.0.1", free_port()), Address.unix(str(folder / "shm"))
        settings = configs.Config(
            serve=configs.Serve(connect=tuple(map(str, (*busy, *brief))), prefix=""),
            potential=configs.Potential(potential, str(STRUCTURE)),
            flag=configs.Flag(force_error=1e-4, spacing=5),  # which no potential holds: whatever is flagged is labelled
            label=label,
            learn=learn,
        )
        (folder / "run").mkdir()
        (folder / "run" / configs.FILE).write_text(configs.dumps(settings))
        self._busy, self._brief, self._calls = busy, brief, calls

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.loads = [stack.enter_context(contextlib.closing(Load(where, STRUCTURE, self._calls))) for where in self._busy]
            one, two, three = (stack.enter_context(listen(where)) for where in self._brief)
            self.brief, self._listeners = Brief((one, two, three), bohr(STRUCTURE)), (one, two, three)
            scratch = self._folder / "scratch"
            self.program = stack.enter_context(Program(self._folder / "run", "serve", "--quiet", scratch=scratch))
            self.watch = Watch(self.program)
            self._wait(lambda: all(load.calls for load in self.loads), "the first calls")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wait(self, condition: Callable[[], Any], what: str) -> None:
        until(condition, _PATIENCE_S, what, lambda: "an engine has lost its server" if any(load.gone for load in self.loads) else "")

    @property
    def calls(self) -> int:
        """Of both engines."""
        return sum(load.calls for load in self.loads)

    def soak(self, progress: Callable[[], int], goal: int, sessions: int) -> None:
        """Look at every tenth of what is to be done."""
        self._sample()
        for tenth in range(1, TENTHS + 1):
            for _ in range(sessions * tenth // TENTHS - self.brief.sessions):
                self.brief.one()
            self._reached(progress, goal * tenth // TENTHS)
            self._sample()

    def _reached(self, progress: Callable[[], int], number: int) -> None:
        self._wait(lambda: progress() >= number, f"{number} calls or swaps")

    def _sample(self) -> None:
        # the brief sessions are in the same state each time: dialled, and not taken yet
        for listener in self._listeners:
            until(partial(_knocked, listener.fileno()), _PATIENCE_S, f"the server to dial {listener.address}")
        self.seen.samples.append(self.watch.sample())

    def drain(self) -> None:
        """Have no more labels begun, so that no more versions are made, and wait for those under way."""
        os.kill(self.program.pid("learner"), signal.SIGUSR1)
        self.program.until(
            lambda status: not status["labels"]["running"] and _settled(status), "the last label and the last swap", _PATIENCE_S
        )

    def between(self, began: float, ended: float) -> list[Window]:
        """The windows of both engines within some time."""
        return [window for load in self.loads for window in list(load.windows) if window.began >= began and window.ended <= ended]

    def end(self) -> None:
        """Stop engines and server, and see what is left."""
        seen = self.seen
        for load in self.loads:
            load.close()
        seen.infinite = sum(window.infinite for load in self.loads for window in load.windows) + self.brief.infinite
        seen.calls, seen.sessions = self.calls + self.brief.sessions * Brief.CALLS, self.brief.sessions
        code = self.program.stop()
        seen.status, seen.log = self.program.status(), self.watch.log_bytes()
        seen.left = [*([f"exit code {code}"] if code else []), *self.watch.left(), *self.brief.left_in_memory]


def _knocked(descriptor: int) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(0))


def _settled(status: dict[str, Any]) -> bool:
    """Whether nothing fades in any more in the sessions that are served."""
    return all(session["ramping_to"] is None for session in status["sessions"] if session["forces"])


# --- the two parts --------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _part(potential: str, calls: int, learn: configs.Learn, label: configs.Label) -> Iterator[Part]:
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as folder, Part(Path(folder), potential, calls, learn, label) as part:
        yield part
        part.end()


def soaked_by_calls(sizes: Sizes) -> Seen:
    """So many calls that cost nothing."""
    each = sizes.calls // 2
    with _part("toy:zero", each, configs.Learn(enabled=False), configs.Label()) as part:
        part.soak(lambda: part.calls, 2 * each, sizes.sessions)
    return part.seen


def soaked_by_swaps(sizes: Sizes) -> Seen:
    """So many versions under load, then a while without."""
    learn = configs.Learn(ramp_steps=10, ramp_pause=0)
    with _part("painn:cuau-water", _ENDLESS, learn, configs.Label(method="test:lj", options={"delay": LABEL_S}, budget=100_000)) as part:
        began = time.monotonic()
        part.soak(lambda: int(part.program.status()["swaps"]), sizes.swaps, sizes.sessions)
        part.seen.swapping = part.between(began, time.monotonic())
        part.drain()
        began = time.monotonic()
        until(lambda: time.monotonic() > began + sizes.quiet, 2 * sizes.quiet + 60.0, "a while without swaps")
        part.seen.quiet = part.between(began, time.monotonic())
        for load in part.loads:
            load.rest()
    return part.seen


# --- what is said of them -------------------------------------------------------------------------------------------------------------


def rows(name: str, seen: Seen) -> Iterator[Row]:
    """The table of one part."""
    first, warm, last = seen.samples[0], seen.samples[1], seen.samples[-1]
    for process in last:
        start, before, after = (sample.get(process, Held(0.0, 0.0, 0, 0)) for sample in (first, warm, last))
        if process not in warm:
            yield Row(name, f"{process}: there", 0, 0, 1, "0", "it is new since the first tenth")
            continue
        yield _memory(name, process, start.resident, before.resident, after.resident)
        for what in ("descriptors", "threads"):
            had = tuple(getattr(one, what) for one in (start, before, after))
            fault = "" if had[2] == had[1] else f"{had[2]} after {had[1]}"
            yield Row(name, f"{process}: {what}", had[0], had[1], had[2], str(had[1]), fault)
    whole = [round(sum(held.proportional for held in sample.values()), 1) for sample in (first, warm, last)]
    yield Row(name, "all: MiB, shared ones once", whole[0], whole[1], whole[2], "")
    yield from _totals(name, seen)
    if seen.swapping:
        yield _longest(name, seen)


def _memory(name: str, process: str, start: float, before: float, after: float) -> Row:
    most = before + max(MEMORY_MIB, MEMORY_SHARE * before)
    fault = "" if after <= most else f"{after:.1f} MiB after {before:.1f}"
    return Row(name, f"{process}: MiB", round(start, 1), round(before, 1), round(after, 1), f"{most:.1f}", fault)


def _totals(name: str, seen: Seen) -> Iterator[Row]:
    labels = sum(seen.status["labels"][state] for state in ("converged", "failed"))
    most = LOG_BYTES["of itself"] + LOG_BYTES["session"] * seen.sessions + LOG_BYTES["label"] * labels
    yield Row(name, f"bytes of logs, {seen.sessions} sessions", 0, 0, seen.log, str(most), "" if seen.log <= most else f"{seen.log}")
    yield Row(name, "left behind", 0, 0, len(seen.left), "0", "; ".join(seen.left[:3]))
    yield Row(name, f"not finite, of {seen.calls} calls", 0, 0, seen.infinite, "0", "" if not seen.infinite else f"{seen.infinite} answers")
    restarts = sum(seen.status["restarts"].values()) + seen.status["refused"]
    yield Row(name, "restarts and refusals", 0, 0, restarts, "0", "" if not restarts else f"{seen.status['errors'][-2:]}")


def _longest(name: str, seen: Seen) -> Row:
    """The longest call while versions are swapped; without swaps it stands in the column for the start."""
    quiet, swapping = (1000.0 * max(window.longest for window in windows) for windows in (seen.quiet, seen.swapping))
    fault = "" if swapping <= LONGEST_MS else f"{swapping:.0f} ms, and {quiet:.0f} ms without swaps"
    what = f"longest call ms, {seen.status['swaps']} swaps"
    return Row(name, what, round(quiet, 1), round(quiet, 1), round(swapping, 1), f"{LONGEST_MS:g}", fault)


def printed(row: Row) -> str:
    """A line of the table."""
    return (
        f"{row.part:6} {row.quantity:36} {row.start:>10g} {row.warm:>10g} {row.end:>10g} {row.limit:>10}{'  MISSED' if row.missed else ''}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer calls, swaps and sessions; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--only", choices=("calls", "swaps"), help="one of the two servers")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    sizes = Sizes(30_000, 10, 15, 10.0) if options.quick else Sizes(1_000_000, 100, 100, 30.0)
    table: list[Row] = []
    facts: dict[str, Any] = {}
    print(f"{'server':6} {'quantity':36} {'start':>10} {'a tenth':>10} {'end':>10} {'limit':>10}")
    for name, soaked in (("calls", soaked_by_calls), ("swaps", soaked_by_swaps)):
        if options.only in (None, name):
            began = time.monotonic()
            seen = soaked(sizes)
            for row in rows(name, seen):
                table.append(row)
                print(printed(row), flush=True)
            facts[name] = {"seconds": round(time.monotonic() - began, 1), "calls": seen.calls, "sessions": seen.sessions}
            facts[name] |= {"samples": [{k: asdict(v) for k, v in sample.items()} for sample in seen.samples], "status": seen.status}
    missed = [f"{row.part}, {row.quantity}: {row.missed}" for row in table if row.missed]
    if options.json:
        command = " ".join(["python", "benchmarks/soak.py", *sys.argv[1:]])
        told = {"machine": described(), "command": command, "passed": not missed, "rows": [asdict(row) for row in table], **facts}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if missed:
        print(f"MISSED: {'; '.join(missed)}")
        return 1
    print("passed: nothing grows with calls, swaps or sessions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
