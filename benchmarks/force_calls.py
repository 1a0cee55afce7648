"""How long the force calls of a learning run take, that it does not depend on how long a label takes, and how soon a label serves.

Real i-PI, the embedded potential or another one, real processes; labels by a test labeller that takes 0, 2 or 60 s. All runs are alike
otherwise: same seed, same number of steps, a learner that updates and swaps as soon as a label is there.

    python benchmarks/force_calls.py [--quick] [--json FILE] [--model MODEL] [--steps N]

"serves" is the time from the end of a label in its process until engines begin to move to the version that knows it, over all versions that
came to serve, in ms: the label is stored, judged and fitted, the version written, loaded by each evaluator and published.
Pass: with labels of 60 s the longest call is at most twice that with labels of 0 s or 100 ms, whichever is larger, and so is the 99 % quantile;
the median of "serves" is at most 100 ms with the embedded potential, 1000 ms with any other.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from _machine import described

FLOOR_MS = 100.0
FACTOR = 2.0
EMBEDDED = "painn:cuau-water"
SERVES_MS = {True: 100.0, False: 1000.0}  # whether the potential is the embedded one
HEAD = f"{'label s':>8} {'steps':>7} {'steps/s':>8} {'labels':>7} {'swaps':>6} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'serves: median':>15} {'max':>8}"
Line = dict[str, Any]


def measured(model: str, delay: float, steps: int, seed: int) -> Line:
    """One run, as a row of the table."""
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "tumbaga.driver.cli", "run", "cuau-water", "-m", model, "--steps", str(steps), "--seed", str(seed)]
        command += ["--label", f"test:lj?delay={delay:g}", "--labels", "20", "--run-dir", str(run), "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=2400)
        status = json.loads((run / "status.json").read_text())
        took = serves(run / "log")
    rate = round(status["steps"] / status["seconds"], 1)
    row = {"delay": delay, "steps": status["steps"], "rate": rate, "labels": status["labels"]["converged"], "swaps": status["swaps"]}
    return row | status["call_ms"] | {"serves_p50": statistics.median(took) if took else None, "serves_max": max(took, default=None)}


def serves(log: Path) -> list[float]:
    """Milliseconds from the end of a label until sessions began to move to the version that was made of it, for each such version."""
    ended = [when(line) for line in lines(log / "label-0.jsonl") if line["event"] == "label ended"]
    swapped = {line["version"]: when(line) for line in reversed(lines(log / "gateway.jsonl")) if line["event"] == "swap"}
    found, told = [], lines(log / "learner.jsonl")
    # after a fine-tune the readout is fitted to labels that came while it was trained: these were served before
    updates = [line for before, line in pairwise(told) if line["event"] == "update" and not before["event"].startswith("fine-tune")]
    for update in (line for line in updates if line["version"] in swapped):
        begun = when(update) - update["ms"] / 1000.0
        if before := [label for label in ended if label <= begun]:
            found.append(1000.0 * (swapped[update["version"]] - before[-1]))
    return found


def lines(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def when(line: Line) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()


def shown(row: Line) -> str:
    ms = "".join(
        f"{'-' if row[key] is None else format(row[key], '.0f'):>{width}}" for key, width in (("serves_p50", 16), ("serves_max", 9))
    )
    return (
        f"{row['delay']:8.0f} {row['steps']:7d} {row['rate']:8.0f} {row['labels']:7d} {row['swaps']:6d} "
        f"{row['p50']:8.2f} {row['p99']:8.2f} {row['max']:8.1f}{ms}"
    )


def missed(rows: list[Line], embedded: bool) -> list[str]:
    """The pass lines that do not hold."""
    first, last, faults = rows[0], rows[-1], []
    for name in ("max", "p99"):
        limit = max(FACTOR * first[name], FLOOR_MS)
        if last[name] > limit:
            faults.append(f"{name} of force calls is {last[name]:.1f} ms with labels of 60 s; at most {limit:.1f} ms was to be shown")
    for row in rows:
        if row["serves_p50"] is not None and row["serves_p50"] > SERVES_MS[embedded]:
            faults.append(
                f"a label serves after {row['serves_p50']:.0f} ms (median, labels of {row['delay']:.0f} s), not {SERVES_MS[embedded]:.0f}"
            )
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps; the same checks")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument("--model", metavar="MODEL", default=EMBEDDED, help="another potential that learns")
    parser.add_argument("--steps", metavar="N", type=int, help="of each run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    steps = options.steps or (3000 if options.quick else 20000)
    rows = []
    print(HEAD)
    for delay in (0.0, 2.0, 60.0):
        rows.append(measured(options.model, delay, steps, seed=1))
        print(shown(rows[-1]), flush=True)
    if options.json:
        command = " ".join(["python", "benchmarks/force_calls.py", *sys.argv[1:]])
        Path(options.json).write_text(json.dumps({"machine": described(), "command": command, "rows": rows}, indent=1) + "\n")
    if faults := missed(rows, options.model == EMBEDDED):
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    print("passed: the force calls do not depend on how long a label takes, and what it teaches serves soon")
    return 0


if __name__ == "__main__":
    sys.exit(main())
