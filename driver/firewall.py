"""Judges answers before they leave the gateway: how doubtful they are, whether their frames are worth a label, what the policy makes of it.

Keeps of each conversation what that takes: what is usual in it, and its last frames. The rules themselves are `tumbaga.online.policy`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from tumbaga.driver import config as configs
from tumbaga.driver.answers import Certainty
from tumbaga.driver.pool import Outcome
from tumbaga.online import flagging, policy
from tumbaga.online.guards import QUIET, Finding, Verdict
from tumbaga.online.policy import Decision, Level, Policy, Rules, Waited
from tumbaga.online.records import Reason
from tumbaga.online.sequence import SequenceWatch

_RECENT = 50  # frames of a conversation that are kept as precursors


@dataclass(frozen=True, eq=False)
class Served:
    """A frame with what was made of it.

    Attributes:
        step: number of its request in the conversation.
        outcome: of the frame.
        sure: how sure the potential is.
    """

    step: int
    outcome: Outcome
    sure: Certainty


@dataclass(eq=False)
class Memory:
    """What the firewall remembers of one conversation."""

    flagger: flagging.Flagger = field(default_factory=flagging.Flagger)
    watches: list[SequenceWatch] = field(default_factory=list)  # by the place of a frame in its batch
    recent: deque[Served] = field(default_factory=lambda: deque(maxlen=_RECENT))


@dataclass(frozen=True, eq=False)
class Judgement:
    """Of one request, a frame or a batch.

    Attributes:
        level: of its most doubtful frame.
        worst: that frame.
        reason: to label it, or None.
        sentence: what a guard saw, if one did.
    """

    level: Level
    worst: Served
    reason: Reason | None
    sentence: str = ""


class Firewall:
    """All judgements of one run.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: configs.Config) -> None:
        self.rules = Rules(Policy(settings.policy.uncertain), Policy(settings.policy.critical))
        self._learns = settings.learn.enabled
        self._flag = flagging.Settings(settings.flag.force_error, settings.flag.audit_every, settings.flag.spacing)
        self._random = Random(settings.seed)
        # without anybody who could learn, and without a rule that could apply, there is nothing to look for
        self._looks = self._learns or self.rules != Rules()

    def judge(
        self,
        memory: Memory,
        step: int,
        outcomes: Sequence[Outcome],
        certainties: Sequence[Certainty],
        *,
        geometry: Finding = QUIET,
        swap_work: float = 0.0,
        again: bool = False,
    ) -> Judgement:
        """Judge the answers to one request; all of them are physical.

        Args:
            memory: of the conversation.
            step: number of the request in it.
            outcomes: of its frames.
            certainties: of the same.
            geometry: what was found in the frames before they were evaluated.
            swap_work: what the change of versions at this step did to the energies, eV.
            again: whether this request was judged before and evaluated once more since: then nothing is to be remembered of it.
        """
        scores = [sure.score or 0.0 for sure in certainties]
        place = scores.index(max(scores))
        worst = Served(step, outcomes[place], certainties[place])
        if not self._looks:
            return Judgement(Level.QUIET, worst, None)
        guard = geometry
        if not again:
            for index, outcome in enumerate(outcomes):
                found = self._watched(memory, index, outcome, swap_work / len(outcomes))
                if found.verdict > guard.verdict:
                    guard, worst = found, Served(step, outcome, certainties[index])
        level = policy.level(worst.sure.score, guard.verdict, self._flag.high, self._flag.critical)
        return Judgement(level, worst, None if again else self._reason(memory, step, worst.sure.score, guard.verdict), guard.sentence)

    @staticmethod
    def _watched(memory: Memory, index: int, outcome: Outcome, swap_work: float) -> Finding:
        while len(memory.watches) <= index:
            memory.watches.append(SequenceWatch())
        assert outcome.prediction is not None
        return memory.watches[index].check(outcome.job.frame, outcome.prediction, swap_work)

    def _reason(self, memory: Memory, step: int, score: float | None, guard: Verdict) -> Reason | None:
        """Whether to label a frame; a guard that saw something is as good as an uncertainty, spacing and all."""
        if not self._learns:
            return None
        told = score
        if guard is not Verdict.OK:
            least = math.nextafter(self._flag.high, math.inf) if guard is Verdict.WARN else math.inf
            told = max(score or 0.0, least)
        memory.flagger, reason = flagging.step(memory.flagger, step, told, self._flag, self._random.random())
        if reason is Reason.UNCERTAIN and guard is not Verdict.OK and (score or 0.0) <= self._flag.high:
            return Reason.GUARD
        return reason

    def decide(self, judgement: Judgement, *, second: bool, waited: Waited) -> Decision:
        """What to do with an answer that is physical; see `policy.decide`."""
        return policy.decide(judgement.level, self.rules, picked=judgement.reason is not None, second=second, waited=waited)

    def remember(self, memory: Memory, served: Served) -> None:
        """A frame was answered: it may be a precursor of what comes."""
        if self._learns:
            memory.recent.append(served)

    def precursors(self, memory: Memory) -> list[Served]:
        """What is worth a label of the frames before a conversation that has to be ended: the last one, and the first that was not calm."""
        scores = [served.sure.score or 0.0 for served in memory.recent]
        return [memory.recent[place] for place in policy.precursors(scores, self._flag.low)]
