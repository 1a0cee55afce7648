"""Which version serves: what the learner wants, what the evaluators hold, and how each session moves from one to the next."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tumbaga.driver import config as configs
from tumbaga.driver.canary import Canary, running
from tumbaga.driver.pool import Pool
from tumbaga.driver.session import Session
from tumbaga.online import versions
from tumbaga.online.ramp import RampState
from tumbaga.socket_protocol import bus


class Rollout:
    """Versions of one run.

    Args:
        learn: settings of ramps.
        pool: of evaluators.
        serving: the version to start with and its path; version 0 needs none.
        tell: called with what the learner must hear.
        log: takes a level, an event and its JSON-compatible details.

    Attributes:
        sessions: all of the run.
        serving: number of the version that all sessions move to.
        canary: the session that tries the next one, if one does.
        swaps: how often all sessions began to move to another version.
    """

    def __init__(
        self,
        learn: configs.Learn,
        pool: Pool,
        serving: bus.Serve,
        tell: Callable[[bus.NowServing], None],
        log: Callable[..., object],
    ) -> None:
        self._learn, self._pool, self._tell, self._log = learn, pool, tell, log
        self.sessions: Iterable[Session] = ()
        self.serving = serving.version
        self.canary: Canary | None = None
        self._target = serving  # what the learner wants served
        if serving.path:
            pool.require(serving.version, serving.path, {0, serving.version})
        self._scales: dict[int, tuple[float, float]] = {}
        self.base_scale: float | None = None
        if serving.lpr_scale is not None:
            self._scales[serving.version] = (serving.lpr_scale, serving.quantile)
        self._hashes = {0: "base", serving.version: hash_of(serving)}
        self.swaps = 0

    def name(self, version: int) -> str:
        """Number and hash, as extras have it."""
        return f"{version}-{self._hashes.get(version, '')}"

    def scale(self, version: int) -> tuple[float | None, float]:
        """Return eV/Å of force std per unit of last-layer score (None if not known) and the quantile of the calibration."""
        return self._scales.get(version, (self.base_scale, 2.0))

    def fresh_ramp(self, version: int | None = None) -> RampState:
        """Where a session stands that has nothing to be smooth for."""
        return RampState(
            self.serving if version is None else version, idle=self._learn.ramp_pause, n=self._learn.ramp_steps, rest=self._learn.ramp_pause
        )

    def begun(self, session: Session) -> None:
        """A conversation begins: nothing is behind it that it would have to be smooth with."""
        if self._learn.swap == "between" and session.ramp.serving != self.serving:
            session.ramp = self.fresh_ramp()

    def wanted(self, message: bus.Serve) -> None:
        """The learner says what should serve."""
        if message.lpr_scale is not None:
            self._scales[message.version] = (message.lpr_scale, message.quantile)
        if message.version == self._target.version:
            return
        self._target = message
        self._hashes[message.version] = hash_of(message)
        if message.version and not self._pool.holds(message.version):
            self._pool.require(message.version, message.path, self._in_use() | {message.version})
        self._begin()

    @property
    def newest(self) -> int:
        """Number of the version that the learner wants, as soon as it can be served; until then of the one that serves."""
        return self._target.version if self._held else self.serving

    @property
    def _held(self) -> bool:
        return not self._target.version or self._pool.holds(self._target.version)

    def awaited(self, version: int) -> bool:
        """Whether a version is still to come: the learner wants it, and not every evaluator holds it."""
        return version == self._target.version and not self._held

    def loaded(self, message: bus.Loaded) -> None:
        """An evaluator has answered to a Load."""
        if message.error:
            self._withdraw(message.version)
            self._tell(bus.NowServing(message.version, message.error))
        elif message.version == self._target.version:
            self._begin()

    def look(self, now: float) -> None:
        """Look after the session that tries a version; to be called a few times a second.

        Args:
            now: s, monotonic.
        """
        canary = self.canary
        if canary is None:
            return
        if canary.proven(self.sessions, self._learn.canary_calls):
            self.canary = None
            self._publish(canary.target)
            self._begin()
        elif (group := canary.replaced(self.sessions, now)) is not None:
            self._log("info", "canary", version=canary.target.version, session=group)
            canary.move(self.sessions, group, now)

    def _begin(self) -> None:
        """Have sessions move to what the learner wants, if it can be served: one of several first, and the others when that went well."""
        target = self._target
        if not self._held or (target.version == self.serving and self.canary is None):
            return
        several = len(running(self.sessions)) > 1
        if target.hurry or not several or not self._learn.canary_calls or self._learn.swap != "ramp":
            self.canary = None
            self._publish(target)
        elif self.canary is None:
            self.canary = Canary(target, self.sessions)
            self._log("info", "canary", version=target.version, session=self.canary.group)
            self._tell(bus.NowServing(target.version))

    def _withdraw(self, version: int) -> None:
        """A version cannot be served (any more, if an evaluator was restarted): sessions that use it go back to what they came from."""
        if self.canary is not None and self.canary.target.version == version:
            self.canary = None
        for session in self.sessions:
            ramp = session.ramp
            if version in (ramp.serving, ramp.waiting) or (ramp.ramp and version in (ramp.ramp.from_version, ramp.ramp.to_version)):
                session.ramp = self.fresh_ramp(0 if ramp.serving == version else ramp.serving)
        if self.serving == version:
            self.serving = max((session.ramp.serving for session in self.sessions), default=0)

    def _publish(self, target: bus.Serve) -> None:
        """Every evaluator holds it: sessions begin to move to it, each over its own ramp."""
        version, state = target.version, self.fresh_ramp(target.version)
        self.serving = version
        self.swaps += 1
        self._log("info", "swap", version=version)
        for session in self.sessions:
            if target.hurry:
                session.good = tuple(good for good in session.good if good <= version)  # what was gone back from is no resort any more
            if session.stream is None:
                session.ramp = state  # without an engine there is nothing to be smooth for
            elif target.hurry:
                session.ramp = session.ramp.recall(version, at_once=target.hurry > 1)
            elif self._learn.swap == "ramp":
                session.ramp = session.ramp.publish(version)
        self._tell(bus.NowServing(version))

    def _in_use(self) -> set[int]:
        used = {0, self._target.version, self.serving} | ({self.canary.target.version} if self.canary else set())
        for session in self.sessions:
            ramp = session.ramp
            used |= {*session.good, ramp.serving, ramp.waiting or 0} | (
                {ramp.ramp.from_version, ramp.ramp.to_version} if ramp.ramp else set()
            )
        return used


def shown(canary: Canary | None) -> dict[str, Any] | None:
    """For `status`: which session tries which version."""
    return None if canary is None else {"version": canary.target.version, "session": canary.group}


def hash_of(serve: bus.Serve) -> str:
    """The hash in a version file's name."""
    return Path(serve.path).stem.rpartition("-")[2] or "base"


def read_serving(run_dir: Path) -> bus.Serve:
    """What served last in this run directory; version 0 where nothing did."""
    try:
        told = json.loads((run_dir / versions.FOLDER / versions.SERVING).read_text())
        return bus.Serve(int(told["version"]), str(told["path"]), told.get("lpr_scale"), float(told.get("quantile", 2.0)))
    except (OSError, ValueError, KeyError):
        return bus.Serve(0, "", None, 2.0)
