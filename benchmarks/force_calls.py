"""How long the force calls of a learning run take, and that it does not depend on how long a label takes.

Real i-PI, the embedded potential, real processes; labels by a test labeller that takes 0, 2 or 60 s. All runs are alike otherwise: same
seed, same number of steps, a learner that updates and swaps as soon as a label is there.

    python benchmarks/force_calls.py [--quick] [--json FILE]

Pass: with labels of 60 s the longest call is at most twice that with labels of 0 s or 100 ms, whichever is larger, and so is the 99 % quantile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _machine import described

FLOOR_MS = 100.0
FACTOR = 2.0


def measured(delay: float, steps: int, seed: int) -> dict[str, Any]:
    """One run; returns its last status."""
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "tumbaga.driver.cli", "run", "cuau-water", "--steps", str(steps), "--seed", str(seed)]
        command += ["--label", f"test:lj?delay={delay:g}", "--labels", "20", "--run-dir", str(run), "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1200)
        status: dict[str, Any] = json.loads((run / "status.json").read_text())
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps; the same checks")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    steps = 3000 if options.quick else 20000
    rows = []
    print(f"{'label s':>8} {'steps':>7} {'steps/s':>8} {'labels':>7} {'swaps':>6} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8}")
    for delay in (0.0, 2.0, 60.0):
        status = measured(delay, steps, seed=1)
        ms, labels = status["call_ms"], status["labels"]["converged"]
        rate = status["steps"] / status["seconds"]
        rows.append({"delay": delay, "steps": status["steps"], "rate": round(rate, 1), "labels": labels, "swaps": status["swaps"], **ms})
        print(
            f"{delay:8.0f} {status['steps']:7d} {rate:8.0f} {labels:7d} {status['swaps']:6d} {ms['p50']:8.2f} {ms['p99']:8.2f} {ms['max']:8.1f}"
        )
    if options.json:
        Path(options.json).write_text(
            json.dumps(
                {"machine": described(), "command": " ".join(["python", "benchmarks/force_calls.py", *sys.argv[1:]]), "rows": rows},
                indent=1,
            )
            + "\n"
        )
    first, last = rows[0], rows[-1]
    for name in ("max", "p99"):
        limit = max(FACTOR * first[name], FLOOR_MS)
        if last[name] > limit:
            print(f"MISSED: {name} of force calls is {last[name]:.1f} ms with labels of 60 s; at most {limit:.1f} ms was to be shown")
            return 1
    print("passed: the force calls do not depend on how long a label takes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
