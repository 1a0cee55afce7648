"""Feed broken and splendid conversations to `Connection`, by the million: `python tests/fuzz/fuzz_wire.py --inputs 1000000 --seed 1`.

The invariant: whatever bytes arrive, in whatever pieces, whatever the caller does, each call gives an event, NEED_DATA, PAUSED or a
`RemoteProtocolError`, and never more memory than `memory_bound`. In detail, and all of it checked after each piece:

- a `RemoteProtocolError` leaves the connection in ERROR, where it raises the same error again;
- a call out of turn raises a `LocalProtocolError` and changes nothing; a right answer is never refused;
- NEED_DATA comes only while data is wanted, PAUSED only while we owe something: nobody waits for ever;
- an unspoilt conversation is understood to its last message;
- `parse_init` never raises; what `check_extras` lets pass, Python's own json reads as an object with the same keys, none of them `raw`.

A failing input is printed as one Python literal; `--replay LITERAL` runs it again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NoReturn

import numpy as np
from _wire_caller import SHM, BrokenError, Caller, try_texts
from _wire_inputs import Case, make_case

from tumbaga.socket_protocol.shm import KINDS

RSS_BOUND: Final = 64 << 20
"""The most by which a whole run, however long, may raise the peak of resident memory, in bytes, after the first inputs."""
WARM_UP: Final = 2000


@contextlib.contextmanager
def segments() -> Iterator[str]:
    """Make segments that inputs can name; yield what their names begin with instead of PREFIX. Nothing is left behind."""
    prefix = f"ipi_shm_fuzz_{os.getpid():08x}_"  # as long as PREFIX
    try:
        refill(prefix)
        yield prefix
    finally:
        for path in SHM.glob(f"{prefix}*"):
            path.unlink()


def refill(prefix: str) -> None:
    """Fill all segments: enough for 4 configurations of 4 atoms, or for nothing."""
    for group in ("good_", "nan_", "tiny_", "cut_"):
        numbers = np.ones(6 if group == "tiny_" else 48)
        if group == "nan_":
            numbers[7] = np.nan
        for kind in KINDS:
            (SHM / f"{prefix}{group}{kind}").write_bytes(numbers.tobytes())


def run_case(case: Case, prefix: str, told: Counter[str]) -> None:
    """Play one case; raises whatever breaks the invariant."""
    Caller(case, prefix, told).play()


class Findings:
    """What a run found so far; a problem is told once, by where it arose."""

    def __init__(self) -> None:
        self.told: Counter[str] = Counter()
        self.failures: list[tuple[str, object]] = []
        self.places: Counter[str] = Counter()

    def add(self, error: BaseException, case: object) -> None:
        frames = [f"{frame.name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-2:]]
        place = f"{type(error).__name__} {frames} {str(error)[:24]}"
        self.places[place] += 1
        if self.places[place] == 1 and len(self.failures) < 20:
            self.failures.append(("".join(traceback.format_exception(error)), case))


def run(inputs: int, seed: int, findings: Findings, progress: Callable[[int], None] = lambda done: None) -> int:
    """Try so many inputs; return how many were tried when it is done, or interrupted."""
    rng, done = random.Random(seed), 0
    with segments() as prefix, warnings.catch_warnings(), contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("error")
        while done < inputs:
            try_one(rng, done, prefix, findings)
            done += 1
            if done % 1000 == 0:
                refill(prefix)
                progress(done)
    return done


def try_one(rng: random.Random, number: int, prefix: str, findings: Findings) -> None:
    """Try the next input: four conversations, then a text."""
    case: Case | None = None
    try:
        if number % 5:
            case = make_case(rng)
            run_case(case, prefix, findings.told)
        else:
            try_texts(rng)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  whatever it is, it is a finding
        findings.add(error, case)


def main(argv: list[str] | None = None) -> int:
    """Run as a program; 1 if the invariant was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--replay", help="a literal that was printed")
    options = parser.parse_args(argv)
    if options.replay:
        replay(ast.literal_eval(options.replay))
    findings, start, peaks = Findings(), time.perf_counter(), [0]
    cap_memory(512 << 20)

    def progress(done: int) -> None:
        if done == WARM_UP:
            peaks[0] = peak()
        rate = done / (time.perf_counter() - start)
        sys.stderr.write(f"\r{done} of {options.inputs} inputs, {rate:.0f}/s, {findings.places.total()} broken ")

    done = run(options.inputs, options.seed, findings, progress)
    sys.stderr.write("\n")
    growth = max(peak() - peaks[0], 0) if peaks[0] else 0
    if growth > RSS_BOUND:
        findings.add(BrokenError(f"resident memory has grown by {growth} bytes, bound {RSS_BOUND}"), None)
    for text, case in findings.failures:
        print(f"{text}input: {case!r}\n")
    seconds = time.perf_counter() - start
    figures = {
        "inputs": done, "seed": options.seed, "seconds": round(seconds, 1), "per_second": round(done / seconds), "broken": findings.places.total(),
        "rss_growth_bytes": growth, "rss_bound_bytes": RSS_BOUND, "told": dict(findings.told.most_common()),
    }  # fmt: skip
    print(json.dumps(figures))
    if done < options.inputs:
        print(f"interrupted after {done} of {options.inputs} inputs; seed {options.seed}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return int(bool(findings.places))


def replay(case: Case) -> NoReturn:
    """Run one printed input and exit."""
    with segments() as prefix:
        run_case(case, prefix, Counter())
    print("the invariant holds")
    raise SystemExit(0)


def peak() -> int:
    """Return the peak of resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cap_memory(extra: int) -> None:
    """Let this process allocate no more than `extra` bytes beyond what it has, so that nothing large is allocated unseen."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    raise SystemExit(main())
