"""Learning under faults: the learner and the trainer are killed again and again; what became of labels and versions, and what forces notice.

    python benchmarks/learner_drills.py [--quick] [--json FILE] [--seed N]          Linux

One run as in label_drills.py: `tumbaga serve` with painn:cuau-water, an engine that asks back to back for new frames, one label worker with
labels of 0.3 s, and a fine-tune of STEPS steps as soon as EVERY new training labels are there, so that one is nearly always under way. At
random instants one of learner and trainer is killed with SIGKILL; before and after are stretches without kills. Who dies six times without
having done anything is not started again: so a label is waited for before each kill of the learner.

In the end no more labels are begun, the fine-tune under way is waited for, and labels and versions are looked for in the store. Pass: each
label that was computed is there once, and none was computed twice; the version that serves knows all training labels, or an update with them
was refused by a check that the store has; each version has its parent, the labels that it was fitted to, its file with the hash that the store
says, and, if it came of a fine-tune, what the gate said of it; each fine-tune made one version, or its failure is told; nothing but learner
and trainer was started again, the engine's connection held, all its numbers were finite, and 99 % of its calls during the kills took at most
twice those beside it, or 5 ms more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _machine import described
from label_drills import Run, accounted, compared, drain, measured, nothing, printed

from tumbaga.driver import config as configs
from tumbaga.driver import finetuning
from tumbaga.driver.learner_finetune import FAILED, FINE_TUNE
from tumbaga.online import versions
from tumbaga.online.errors import VersionError
from tumbaga.online.records import Role
from tumbaga.online.store import FILE, Store, StoredVersion

EVERY, STEPS = 4, 60
_ORDERED_S = 3.0  # after a fine-tune the next one is ordered at once, if there are labels for it
TARGET = 1e-3  # eV/Å, which no potential holds: there is always a frame to be labelled
LEARN = configs.Learn(finetune_every=EVERY, finetune_steps=STEPS, ramp_steps=30, ramp_pause=30)


def kills(run: Run, times: int) -> None:
    """Kill one of the two at a random instant."""
    for _ in range(times):
        victim = run.some_victim(("learner", "trainer"))
        if victim == "learner":
            run.more_labels(1)
        run.some_moment()
        run.kill(victim)
    run.more_labels(2)


def settle(run: Run) -> None:
    """Have no more labels begun, and wait for what is learnt of those that are there."""
    drain(run)
    while True:
        run.wait(lambda: not _under_way(run), "the last fine-tune")
        last = finetuning.newest(run.run_dir)
        time.sleep(_ORDERED_S)
        if finetuning.newest(run.run_dir) == last:
            return


def _under_way(run: Run) -> bool:
    order = finetuning.newest(run.run_dir)
    if order is None:
        return False
    with contextlib.closing(Store(run.run_dir / FILE, read_only=True)) as store:
        return order.number not in _outcomes(store)


def _outcomes(store: Store) -> list[int]:
    """The numbers of the fine-tunes of which something came, one way or the other."""
    made = [int(version.metrics["fine_tune"]) for version in store.versions() if version.kind == FINE_TUNE]
    return made + [int(event["number"]) for event in store.events(FAILED)]


def lineage(run: Run) -> dict[str, Any]:
    """Look at every version of the store."""
    with contextlib.closing(Store(run.run_dir / FILE, read_only=True)) as store:
        known = {version.number: version for version in store.versions()}
        (method,) = {label.label.method for label in store.labels()}
        train = store.label_ids(method, Role.TRAIN)
        faults = [fault for version in known.values() for fault in _of_version(run, store, version, known, set(train))]
        orders = finetuning.newest(run.run_dir)
        told, wanted = sorted(_outcomes(store)), list(range(1, orders.number + 1 if orders else 1))
        if told != wanted:
            faults.append(f"of the fine-tunes {wanted} came {told}")
        newest = max((version for version in known.values() if version.may_serve), key=lambda version: version.number)
        refused = len(store.events("update refused"))
        if set(store.version_labels(newest.number)) != set(train) and not refused:
            faults.append(f"version {newest.number} serves and does not know all labels")
        return {
            "versions": len(known),
            "fine-tunes": len(wanted),
            "of which passed": sum(v.kind == FINE_TUNE and v.state != "refused" for v in known.values()),
            "updates refused": refused,
            "faults": faults,
        }


def _of_version(run: Run, store: Store, version: StoredVersion, known: dict[int, StoredVersion], train: set[int]) -> list[str]:
    """What is wrong with the record of one version."""
    if version.number == 0:
        return []
    faults = []
    if version.parent not in known or version.parent >= version.number:
        faults.append(f"has no parent in the store ({version.parent})")
    labels = store.version_labels(version.number)
    if not labels or not set(labels) <= train:
        faults.append(f"was fitted to labels that are not there ({labels})")
    if version.kind == FINE_TUNE and not store.gates(version.number):
        faults.append("has no word of the gate")
    try:
        if versions.read(run.run_dir / version.file).facts["parent"] != version.parent:
            faults.append("has another parent in its file")
    except VersionError as error:
        faults.append(str(error))
    if version.hash[:8] not in version.file:
        faults.append("has another hash than its file")
    return [f"version {version.number} {fault}" for fault in faults]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 kills; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--seed", type=int, default=0, help="of the instants of the kills")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    quiet, times = (10, 5) if options.quick else (20, 20)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as name:
        folder = Path(name)
        (folder / "disk").mkdir()
        with Run(folder, options.seed, LEARN, TARGET) as run:
            rows = [measured(run, *stretch) for stretch in (("none", nothing, quiet), ("kills", kills, times), ("none", nothing, quiet))]
            settle(run)
            run.engine.close()
            code = run.program.stop()
        labels, found = accounted(run), lineage(run)
        status, left = run.program.status(), run.program.left_behind()
    compared(rows)
    print(f"{'drill':8} {'times':>5} {'seconds':>7} {'labels':>7} {'calls':>7} {'p50 ms':>7} {'p99 ms':>7} {'longest':>8} {'beside':>8}")
    for row in rows:
        print(printed(row))
    for part in (labels, found):
        print(", ".join(f"{number} {what}" for what, number in part.items() if what != "faults"))
    missed = [f"{row.drill}: {fault}" for row in rows for fault in row.faults] + labels["faults"] + found["faults"] + left
    missed += [f"{who} was started again" for who, often in status["restarts"].items() if often and who not in ("learner", "trainer")]
    missed += [f"exit code {code}"] if code else []
    if options.json:
        command = " ".join(["python", "benchmarks/learner_drills.py", *sys.argv[1:]])
        told = {"machine": described(), "command": command, "passed": not missed, "rows": [asdict(row) for row in rows]}
        told |= {"labels": labels, "versions": found, "restarts": status["restarts"], "missed": missed}
        options.json.write_text(json.dumps(told | {"seconds": round(time.monotonic() - began, 1)}, indent=1) + "\n")
    if missed:
        print(f"MISSED: {'; '.join(missed)}")
        return 1
    print("passed: no label is lost, every version has its lineage, and forces do not notice")
    return 0


if __name__ == "__main__":
    sys.exit(main())
