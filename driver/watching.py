"""What the learner process watches a run for: versions that audits speak against, and the end of learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

from tumbaga.driver import config as configs
from tumbaga.driver import version_errors
from tumbaga.driver.errors import PotentialError
from tumbaga.online import auditing, convergence
from tumbaga.online.convergence import Convergence, Standing
from tumbaga.online.errors import VersionError
from tumbaga.online.ports import Trainable
from tumbaga.online.store import Audit, Store


class Watch:
    """Watches one run.

    Args:
        run_dir: the run directory.
        settings: of the run.
        store: of the run, open for writing.
        method: of the labels.
        tell: called with what the log should know of: an event and its JSON-compatible details.
    """

    def __init__(self, run_dir: Path, settings: configs.Config, store: Store, method: str, tell: Callable[..., None]) -> None:
        self._run_dir, self._settings, self._store, self._method, self._tell = run_dir, settings, store, method, tell
        learn, self._target = settings.learn, settings.flag.force_error
        until = convergence.Settings(self._target, learn.converged_calls, audits=learn.converged_audits, margin=learn.ramp_pause)
        self._convergence = Convergence(until)

    def label(self, frame_id: int, ratio: float, serving: int, held: Trainable) -> str:
        """Note what the label of an audited frame says; return why what serves must not go on, if so.

        It must not where audits in a row were wrong by much more than it says of itself, and the version before is nearer to their labels.

        Args:
            frame_id: whose label has come.
            ratio: of its error to the uncertainty.
            serving: number of the version that serves.
            held: the potential in memory.
        """
        audit = auditing.audit_of(self._store, frame_id, self._method, ratio)
        if audit is None:
            return ""
        self._store.add_audit(audit)
        found = auditing.beyond(self._store.audits(), serving, self._target)
        return self._was_better(found, serving, held) if found else ""

    def _was_better(self, audits: Sequence[Audit], serving: int, held: Trainable) -> str:
        before = [version for version in self._store.versions() if version.may_serve and version.number < serving]
        if not before:
            return ""
        frames = [audit.frame for audit in audits]
        try:
            errors = version_errors.largest(self._store, self._run_dir, self._settings.potential, before[-1], frames, self._method, held)
        except (VersionError, PotentialError):
            return ""  # there is nothing to go back to
        if any(error >= audit.force_max for error, audit in zip(errors, audits, strict=True)):
            return ""
        wrong = " and ".join(f"{audit.force_max:.2f}" for audit in audits)
        said = f"audits were wrong by {wrong} eV/Å, far beyond what it said of itself"
        return f"{said}, and version {before[-1].number} is nearer to the labels"

    def look(self, standings: Sequence[Standing], serving: int) -> None:
        """Judge whether the run has converged; each change of the verdict becomes an event."""
        was = self._convergence.verdict
        errors = [audit.force_max for audit in self._store.audits() if audit.version == serving]
        verdict = self._convergence.seen(standings, errors)
        if verdict.done != was.done:
            event = "converged" if verdict.done else "no longer converged"
            said = {"version": verdict.version, "steps": verdict.steps, "production": verdict.production, "why": verdict.why}
            self._store.add_event(event, **said)
            self._tell(event, **said)

    def wants(self, session: str, step: int, serving: int) -> bool:
        """Whether a frame that was picked at random is to be labelled; not each is where enough of them say that the version does well.

        Args:
            session: that it is of.
            step: its number there: the same frame gets the same answer.
            serving: number of the version that serves.
        """
        rarer = auditing.rarer(self._store.audits(), serving, self._target, self._settings.learn.converged_audits)
        return crc32(f"{self._settings.seed} {session} {step}".encode()) % rarer == 0

    def coverage(self, promised: float) -> dict[str, Any]:
        """For the status: how many of the last audits were within what was told, beside the share that was promised."""
        return asdict(auditing.coverage(self._store.audits(), promised))

    def report(self) -> dict[str, Any]:
        """For the status."""
        verdict = self._convergence.verdict
        return {"said": convergence.text(verdict), "done": verdict.done, "production": verdict.production}
