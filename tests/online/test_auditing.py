"""What audits say of the uncertainty: how often errors were within what was told."""

from __future__ import annotations

from tumbaga.online.auditing import LAST, Coverage, coverage
from tumbaga.online.store import Audit


def audit(promised: float, error: float) -> Audit:
    return Audit(1, 1, 4, error / 3, error, 1.0, promised)


def test_audits_are_held_against_what_was_told_for_them() -> None:
    """An error as large as was told is within; a frame of which nothing was told says nothing."""
    audits = [audit(0.2, 0.1), audit(0.2, 0.2), audit(0.2, 0.21), audit(0.0, 0.1)]

    assert coverage(audits, 0.9) == Coverage(3, 2, 0.9)
    assert coverage([], 0.9) == Coverage(0, 0, 0.9)


def test_only_the_last_audits_count() -> None:
    """What versions of long ago did is no news."""
    audits = [audit(0.1, 0.5)] * 30 + [audit(0.1, 0.05)] * (LAST - 1) + [audit(0.1, 0.5)]

    assert coverage(audits, 0.9) == Coverage(LAST, LAST - 1, 0.9)
