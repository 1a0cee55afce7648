"""What labels of frames that were picked at random say of the forces that were served. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tumbaga.online.records import Reason
from tumbaga.online.store import Audit, Store

BEYOND: Final = 3.0  # times the calibrated uncertainty: with 90 % coverage of a normal error, one of a million
LAST: Final = 50  # audits that say how well the uncertainty holds what it promises: of more, many were served by versions long gone
RAREST: Final = 25  # at least one of so many frames picked at random is labelled, however well the others before did
IN_A_ROW: Final = 2  # a single one may be a doubtful label, or a frame of a kind that was never seen


def audit_of(store: Store, frame_id: int, method: str, ratio: float) -> Audit | None:
    """Hold the label of an audited frame against what was served for it; None if the frame was no audit.

    Args:
        store: of the run.
        frame_id: of the frame, whose label has come.
        method: of the label.
        ratio: of the error to the uncertainty, as the calibration tracks it.
    """
    stored = store.label_of(frame_id, method)
    flag = next((flag for flag in store.flags(frame_id) if flag.reason is Reason.AUDIT), None)
    if stored is None or flag is None:
        return None
    errors = stored.label.forces - flag.forces
    largest = float(np.linalg.norm(errors, axis=1).max())
    return Audit(frame_id, stored.id, flag.version, float(np.sqrt(np.mean(errors**2))), largest, min(ratio, 1e300), flag.score)


def rarer(audits: Sequence[Audit], version: int, target: float, settled: int) -> int:
    """Return how many times rarer than usual an audit of the version that serves is wanted: labels are dear, and a run may last for weeks.

    Each one that was as good as the user wants, beyond those that say that learning is done, halves how often there is another; one that was
    not brings all of them back.

    Args:
        audits: of all versions, in their order.
        version: that serves.
        target: the user's force error, eV/Å.
        settled: good ones in a row that are wanted first.
    """
    good = 0
    for audit in reversed([audit for audit in audits if audit.version == version]):
        if not audit.force_max <= target:
            break
        good += 1
    return min(RAREST, 1 << min(max(0, good - settled), 10))


@dataclass(frozen=True)
class Coverage:
    """How many of the last audits were as near to their labels as had been told when they were served.

    Attributes:
        audits: the last ones, those left out for which no uncertainty was known.
        within: those of them whose largest force error was within the calibrated uncertainty that was told.
        promised: the share that the calibration aims at.
    """

    audits: int
    within: int
    promised: float


def coverage(audits: Sequence[Audit], promised: float) -> Coverage:
    """Return how the last audits compare with what was told.

    Args:
        audits: of all versions, in their order.
        promised: share that is to be within.
    """
    known = [audit for audit in audits if audit.promised > 0.0][-LAST:]
    return Coverage(len(known), sum(audit.force_max <= audit.promised for audit in known), promised)


def beyond(audits: Sequence[Audit], version: int, target: float) -> list[Audit]:
    """The last audits of a version, if they say that it must not serve; empty if they do not.

    They do if so many in a row were wrong by much more than the version said of itself, and by more than the user allows.

    Args:
        audits: of all versions, in their order.
        version: its number.
        target: the user's force error, eV/Å.
    """
    last = [audit for audit in audits if audit.version == version][-IN_A_ROW:]
    if len(last) < IN_A_ROW or any(audit.force_max <= max(BEYOND * audit.promised, target) for audit in last):
        return []
    return last
