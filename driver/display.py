"""What a run shows while it goes on, and what it says at the end. Text only; knows status objects, the store and nothing else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tumbaga.online.errors import StoreError
from tumbaga.online.store import FILE, Store

_FILES = {
    "store.sqlite": "every flagged frame, label, failure and version",
    "versions": "every set of weights, loadable by itself as the FILE of -m KIND:FILE",
    "log": "one file a process",
}
_PLAIN_S = 5.0  # between two lines where nobody watches a terminal


class Progress:
    """One line about a run: rewritten in place on a terminal, a new one every few seconds elsewhere.

    Args:
        total: steps the engine is to do; None for a server.
        out: where to.
        clock: seconds.
    """

    def __init__(self, total: int | None, out: TextIO = sys.stdout, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._out, self._clock = total, out, clock
        self._live = out.isatty()
        self._next = 0.0
        self._last: tuple[float, int] | None = None
        self._seen: set[str] = set()

    def __call__(self, status: dict[str, Any]) -> None:
        """Show a status."""
        for error in status["errors"]:
            if error not in self._seen:
                self._seen.add(error)
                self._line(f"! {error}")
        now = self._clock()
        if self._live:
            self._out.write("\r\x1b[K" + self.text(status))
        elif now >= self._next or status["state"] in ("failed",):
            self._next = now + _PLAIN_S
            self._out.write(self.text(status) + "\n")
        self._out.flush()

    def _line(self, text: str) -> None:
        self._out.write(("\r\x1b[K" if self._live else "") + text + "\n")

    def text(self, status: dict[str, Any]) -> str:
        """The line."""
        if status["state"] == "starting":
            return "starting: loading the potential …"
        steps, now = int(status["steps"]), self._clock()
        rate = 0.0
        if self._last is not None and now > self._last[0]:
            rate = max(0.0, (steps - self._last[1]) / (now - self._last[0]))
        if self._last is None or now - self._last[0] > 2.0:
            self._last = (now, steps)
        labels, engine = status["labels"], status.get("engine", {})
        parts = [
            status["state"] if status["state"] != "running" else "",
            f"step {steps}" + (f"/{self._total}" if self._total else ""),
            f"{rate:.0f} steps/s",
            f"{engine['temperature']:.0f} K" if engine.get("temperature") is not None else "",
            f"±{status['uncertainty']['last']:.2f} eV/Å",
            f"labels {labels['pending']} queued {labels['running']} running {labels['converged']} done"
            + (f" {labels['failed']} failed" if labels["failed"] else "")
            + (f" {labels['quarantined']} set aside" if labels.get("quarantined") else ""),
            f"version {status['serving_version']}",
            f"longest call {status['call_ms']['max']:.0f} ms",
        ]
        return " · ".join(part for part in parts if part)

    def end(self) -> None:
        """Leave the line."""
        if self._live:
            self._out.write("\n")


def summary(run_dir: Path, status: dict[str, Any], files: list[Path]) -> str:
    """What happened in a run, how good the potential was before and after, where the files are, what to do next."""
    lines = [f"\n{_headline(status)}"]
    engine = status.get("engine")
    if engine:
        lines.append(
            f"  {engine['name']}: {status['steps']} steps in {status['seconds']:.0f} s"
            + (f", mean temperature {engine['mean_temperature']:.0f} K" if engine["mean_temperature"] is not None else "")
            + ("" if engine["finite"] else "; THE OUTPUT HOLDS NUMBERS THAT ARE NOT FINITE")
        )
    ms = status["call_ms"]
    lines.append(
        f"  force calls: {status['force_calls']}; median {ms['p50']:.1f} ms, 99 % within {ms['p99']:.1f} ms, longest {ms['max']:.0f} ms"
    )
    if status["evaluator_restarts"]:
        lines.append(f"  the evaluator was restarted {status['evaluator_restarts']} times; no force call was lost")
    lines += _waits(status)
    lines += _learning(run_dir, status)
    lines += [f"  {said}" for said in _end(status)]
    lines += [f"  ! {error}" for error in status["errors"][-5:]]
    lines += ["", "files", f"  {run_dir}/"]
    lines += [f"    {name:14s} {what}" for name, what in _FILES.items() if (run_dir / name).exists()]
    lines += [f"    {path.relative_to(run_dir)}" for path in files]
    lines += ["", "next", f"  tumbaga status {run_dir}"]
    return "\n".join(lines)


def _waits(status: dict[str, Any]) -> list[str]:
    stalls = status["stalls"]
    if not stalls["all"]:
        return []
    vain = f"; {stalls['in_vain']} of them in vain" if stalls["in_vain"] else ""
    return [f"  {stalls['all']} frames waited for their labels, {stalls['longest_s']:.0f} s at most{vain}"]


def _headline(status: dict[str, Any]) -> str:
    state = str(status["state"])
    return {"stopped": "stopped by request", "failed": "FAILED"}.get(state, state)


def _learning(run_dir: Path, status: dict[str, Any]) -> list[str]:
    if not (run_dir / FILE).exists():
        return ["  learning was off"]
    try:
        store = Store(run_dir / FILE, read_only=True)
    except StoreError as error:  # the run is over and has its summary, whatever became of this file
        return [f"  ! {error}"]
    try:
        labels, failures, counts, aside = store.labels(), store.failures(), store.counts(), store.quarantined()
    finally:
        store.close()
    lines = [
        f"  labels: {len(labels)} converged, {counts['failed']} failed, {counts['pending']} still wait ({counts['flags']} frames were flagged)"
    ]
    if labels:
        seconds = [stored.label.seconds for stored in labels]
        lines[-1] += f"; {labels[0].label.method}, {sum(seconds) / len(seconds):.1f} s each"
    lines += [f"    frame {frame} failed: {reason}" for frame, reason in failures[-3:]]
    lines += [f"    frame {one.stored.frame_id} set aside: {one.reason}" for one in aside[-3:]]
    lines.append(f"  versions: {status['versions'] - 1} new, {status['swaps']} swapped in, {status['serving_version']} serves")
    lines += _errors(status["force_rmse"])
    return lines + [f"  uncertainty: {told}" for told in _coverage(status)]


def _coverage(status: dict[str, Any]) -> list[str]:
    """Whether the uncertainty holds what it promises."""
    found = status.get("coverage", {})
    if not found.get("audits"):
        return []
    return [
        f"{found['within']} of the last {found['audits']} frames picked at random were as near to their labels as was told ({found['promised']:.0%} promised)"
    ]


def _errors(rmse: dict[str, Any]) -> list[str]:
    lines = []
    for role, what in (("holdout", "held-out labels, never learnt from"), ("train", "labels it learnt from")):
        before, after = rmse.get(f"{role}_rmse_base"), rmse.get(f"{role}_rmse")
        if before is not None and after is not None:
            lines.append(f"  force error on {what}: {1000 * before:.0f} meV/Å before, {1000 * after:.0f} meV/Å after")
    return lines


def _end(status: dict[str, Any]) -> list[str]:
    """Whether learning is done, and whether somebody has stopped it."""
    pinned, said = status.get("pinned"), status.get("convergence", {}).get("said")
    lines = [f"version {pinned} is pinned, no new one is made; go on with: tumbaga rollback RUN --release"] if pinned is not None else []
    return lines + ([said] if said else [])


def _fine_tune(status: dict[str, Any]) -> list[str]:
    """What the trainer is doing."""
    told = status.get("fine_tune", {})
    if told.get("doing") == "training":
        return [f"a fine-tune is at epoch {told['epoch']} of {told['epochs']}"]
    return [f"the gate looks at a fine-tune: {told['doing']}"] if told.get("doing") else []


def status_text(run_dir: Path, status: dict[str, Any]) -> str:
    """A status for people."""
    labels, ms, restarts = status["labels"], status["call_ms"], status["restarts"]
    lines = [
        f"{run_dir}: {status['state']}",
        f"  potential      {status['model']}, version {status['serving_version']} serves ({status['versions']} in all, {status['swaps']} swaps)",
        f"  steps          {status['steps']} in {status['seconds']:.0f} s, {status['force_calls']} force calls",
        f"  force call     median {ms['p50']:.2f} ms, 99 % within {ms['p99']:.2f} ms, longest {ms['max']:.1f} ms",
        f"  uncertainty    {status['uncertainty']['last']:.3f} eV/Å now, {status['uncertainty']['max']:.3f} at most",
        f"  labels         {labels['pending']} queued, {labels['running']} running, {labels['converged']} converged, {labels['failed']} failed"
        + (f", {labels['quarantined']} set aside" if labels.get("quarantined") else ""),
        f"  restarts       {', '.join(f'{name} {count}' for name, count in restarts.items() if count) or 'none'}",
    ]
    lines += _quarantine(run_dir, status)
    lines += _noise(run_dir)
    lines += [f"  budget         {note}" for note in status.get("notes", [])]
    lines += [f"  audits         {told}" for told in _coverage(status)]
    lines += _errors(status["force_rmse"])
    lines += [f"  learning       {said}" for said in (*_fine_tune(status), *_end(status))]
    if canary := status.get("canary"):
        lines.append(f"  learning       version {canary['version']} is tried in {canary['session']} before the others have it")
    lines += [f"  session        {s['name']}: {s['state']}, {s['forces']} forces" for s in status["sessions"]]
    lines += [f"  ! {error}" for error in status["errors"]]
    return "\n".join(lines)


def _noise(run_dir: Path) -> list[str]:
    """What labels that were computed twice differ by."""
    try:
        with Store(run_dir / FILE, read_only=True) as store:
            noise = store.noise()
    except StoreError:
        return []
    if noise is None:
        return []
    failed = f"; of {noise.failures} the second one failed" if noise.failures else ""
    if not noise.labels:
        return [f"  label noise    {failed.removeprefix('; ')}"]
    forces = f"forces differ by {1000 * noise.force_rmse:.1f} meV/Å, {1000 * noise.force_max:.1f} at most"
    return [f"  label noise    {noise.labels} computed twice: {forces}; energies by {1000 * noise.energy_max:.2f} meV at most{failed}"]


def _quarantine(run_dir: Path, status: dict[str, Any]) -> list[str]:
    """Labels that were set aside, with their reasons."""
    if not status["labels"].get("quarantined"):
        return []
    try:
        with Store(run_dir / FILE, read_only=True) as store:
            aside = [one for one in store.quarantined() if one.state == "held"]
    except StoreError as error:
        return [f"  ! {error}"]
    lines = [f"  set aside      frame {one.stored.frame_id}: {one.reason}" for one in aside]
    return [*lines, f"                 to believe one or have it done again: tumbaga label {run_dir} --release FRAME, --retry FRAME"]
