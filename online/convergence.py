"""When learning is done: the uncertainty has held below the target for long enough, and audits agree. Pure: no clock, no store.

Averages are strictly right only after the last swap, so a new version starts the count again, and what a trajectory is worth begins where
the ramp of the last one has ended and its effect has died down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

_PIECES: Final = 50  # samples of a window: it is as long as asked for, and by up to one of these longer


@dataclass(frozen=True)
class Settings:
    """When it is done.

    Attributes:
        target: force error to hold, eV/Å.
        calls: force calls of every session, at least, that a version has served alone.
        share: of the last so many of them whose calibrated uncertainty is within the target.
        audits: frames picked at random, at least, whose labels came while the version served.
        covered: share of them whose largest force error is within the target; what the calibration promises.
        margin: calls after a ramp that do not count as production.
    """

    target: float
    calls: int = 20_000
    share: float = 0.99
    audits: int = 5
    covered: float = 0.9
    margin: int = 500


@dataclass(frozen=True)
class Standing:
    """Where a session stands.

    Attributes:
        session: its name.
        version: that serves it.
        step: of its last call.
        alone: calls since this version has served it alone.
        above: those of them whose uncertainty was above the target.
        ramped: whether the session came to this version over a ramp, and did not begin with it.
    """

    session: str
    version: int
    step: int
    alone: int
    above: int
    ramped: bool = True


@dataclass(frozen=True)
class Verdict:
    """Whether it is done.

    Attributes:
        done: whether it is.
        why: what is missing, or what was found.
        version: that serves all sessions; None where they differ.
        steps: last step of each session when this was said.
        production: first step of the production part of each session, as far as is known now; it moves with each new version.
    """

    done: bool
    why: str
    version: int | None = None
    steps: dict[str, int] = field(default_factory=dict)
    production: dict[str, int] = field(default_factory=dict)


class Window:
    """How many calls were above the target among the last ones of a session."""

    def __init__(self) -> None:
        self._samples: deque[tuple[int, int]] = deque([(0, 0)])
        self._version = -1

    def add(self, standing: Standing, calls: int) -> None:
        """Take note of where the session stands.

        Args:
            standing: now.
            calls: that the window is to cover.
        """
        if standing.version != self._version or standing.alone < self._samples[-1][0]:
            self._samples, self._version = deque([(0, 0)]), standing.version
        if standing.alone - self._samples[-1][0] >= max(1, calls // _PIECES):
            self._samples.append((standing.alone, standing.above))
        while len(self._samples) > 1 and self._samples[1][0] <= standing.alone - calls:
            self._samples.popleft()

    def within(self, standing: Standing) -> float:
        """Share of the calls of the window that were within the target, up to now."""
        calls, above = self._samples[0]
        return 1.0 - (standing.above - above) / max(1, standing.alone - calls)


class Convergence:
    """Watches all sessions of a run.

    Args:
        settings: when it is done.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._windows: dict[str, Window] = {}
        self.verdict = Verdict(False, "no engine has asked for forces yet")

    def seen(self, standings: Sequence[Standing], audits: Sequence[float]) -> Verdict:
        """Judge anew, and return the verdict; without a session the last one stays.

        Args:
            standings: of all sessions that go on.
            audits: largest force error of each audit of the version that serves, eV/Å.
        """
        if not standings:
            return self.verdict
        self._windows = {one.session: self._windows.get(one.session, Window()) for one in standings}
        for one in standings:
            self._windows[one.session].add(one, self._settings.calls)
        versions = {one.version for one in standings}
        missing = self._missing(standings, audits) if len(versions) == 1 else "the sessions are served by different versions"
        version = standings[0].version if len(versions) == 1 else None
        steps = {one.session: one.step for one in standings}
        self.verdict = Verdict(not missing, missing or self._found(standings, audits), version, steps, self._production(standings))
        return self.verdict

    def _missing(self, standings: Sequence[Standing], audits: Sequence[float]) -> str:
        """The first thing that is missing, as a sentence; empty if it is done."""
        wanted, version = self._settings, standings[0].version
        least = min(standings, key=lambda one: one.alone)
        if least.alone < wanted.calls:
            return f"version {version} has served alone for {least.alone} of {wanted.calls} calls"
        worst = self._worst(standings)
        if worst < wanted.share:
            return f"{100 * worst:.1f} % of the last {wanted.calls} calls were within {wanted.target:g} eV/Å, {100 * wanted.share:g} % are wanted"
        if len(audits) < wanted.audits:
            return f"{len(audits)} of {wanted.audits} audits of version {version} have come"
        good = sum(error <= wanted.target for error in audits)
        if good < wanted.covered * len(audits):
            return f"{good} of {len(audits)} audits of version {version} were within {wanted.target:g} eV/Å, {100 * wanted.covered:g} % are wanted"
        return ""

    def _found(self, standings: Sequence[Standing], audits: Sequence[float]) -> str:
        wanted, good = self._settings, sum(error <= self._settings.target for error in audits)
        return (
            f"{100 * self._worst(standings):.1f} % of the last {wanted.calls} calls and {good} of {len(audits)} audits of version "
            f"{standings[0].version} were within {wanted.target:g} eV/Å"
        )

    def _worst(self, standings: Sequence[Standing]) -> float:
        return min(self._windows[one.session].within(one) for one in standings)

    def _production(self, standings: Sequence[Standing]) -> dict[str, int]:
        return {one.session: one.step - one.alone + 1 + (self._settings.margin if one.ramped else 0) for one in standings}


def text(verdict: Verdict) -> str:
    """A verdict for people.

    >>> text(Verdict(False, "2 of 5 audits of version 3 have come"))
    'not converged: 2 of 5 audits of version 3 have come'
    >>> text(Verdict(True, "all was well", 3, {"unix:a": 900}, {"unix:a": 300}))
    'converged at step 900: production from step 300 (all was well)'
    """
    if not verdict.done:
        return f"not converged: {verdict.why}"
    several = len(verdict.steps) > 1
    parts = [
        f"{f'{session} ' if several else ''}at step {step}: production from step {verdict.production[session]}"
        for session, step in verdict.steps.items()
    ]
    return f"converged {'; '.join(parts)} ({verdict.why})"
