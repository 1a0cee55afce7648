"""What audits say of the uncertainty: how often errors were within what was told."""

from __future__ import annotations

import pytest

from tumbaga.online.auditing import LAST, RAREST, Coverage, coverage, rarer
from tumbaga.online.store import Audit


def audit(promised: float, error: float, version: int = 4) -> Audit:
    return Audit(1, 1, version, error / 3, error, 1.0, promised)


def test_audits_are_held_against_what_was_told_for_them() -> None:
    """An error as large as was told is within; a frame of which nothing was told says nothing."""
    audits = [audit(0.2, 0.1), audit(0.2, 0.2), audit(0.2, 0.21), audit(0.0, 0.1)]

    assert coverage(audits, 0.9) == Coverage(3, 2, 0.9)
    assert coverage([], 0.9) == Coverage(0, 0, 0.9)


def test_only_the_last_audits_count() -> None:
    """What versions of long ago did is no news."""
    audits = [audit(0.1, 0.5)] * 30 + [audit(0.1, 0.05)] * (LAST - 1) + [audit(0.1, 0.5)]

    assert coverage(audits, 0.9) == Coverage(LAST, LAST - 1, 0.9)


@pytest.mark.parametrize(("good", "times"), [(0, 1), (5, 1), (6, 2), (7, 4), (9, 16), (10, RAREST), (500, RAREST)])
def test_audits_become_rare_where_all_of_them_are_good(good: int, times: int) -> None:
    """Beyond five in a row each halves how often there is another, down to one of 25."""
    audits = [audit(0.1, 0.3), *[audit(0.1, 0.05)] * good]

    assert rarer(audits, 4, 0.15, 5) == times
    assert rarer([*audits, audit(0.1, 0.16)], 4, 0.15, 5) == 1
    assert rarer(audits, 5, 0.15, 5) == 1  # what others did says nothing of a new version
    assert rarer([*audits, audit(0.1, 0.3, version=3)], 4, 0.15, 5) == times
