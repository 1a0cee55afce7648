"""When a run has converged: enough calls, nearly all of them within the target, and audits that agree."""

from __future__ import annotations

import pytest

from tumbaga.online.convergence import Convergence, Settings, Standing, text

SETTINGS = Settings(0.15, calls=1000, share=0.99, audits=4, covered=0.75, margin=50)
GOOD = [0.1, 0.14, 0.05, 0.2]  # largest errors of audits, eV/Å: three of four within the target


def one(alone: int, above: int = 0, *, version: int = 3, step: int = 5000, session: str = "unix:a", ramped: bool = True) -> Standing:
    return Standing(session, version, step, alone, above, ramped)


def test_it_takes_calls_shares_and_audits() -> None:
    """Each that is missing is told by a sentence; with all of them it is done, and says where production began."""
    watch = Convergence(SETTINGS)
    assert text(watch.seen([], GOOD)) == "not converged: no engine has asked for forces yet"
    assert watch.seen([one(999)], GOOD).why == "version 3 has served alone for 999 of 1000 calls"
    assert watch.seen([one(1000, 11)], GOOD).why == "98.9 % of the last 1000 calls were within 0.15 eV/Å, 99 % are wanted"
    assert watch.seen([one(1000, 10)], GOOD[:3]).why == "3 of 4 audits of version 3 have come"
    assert watch.seen([one(1000, 10)], [*GOOD[:3], 0.2, 0.2]).why.startswith("3 of 5 audits of version 3 were within")
    verdict = watch.seen([one(1000, 10)], GOOD)
    assert verdict.done
    assert (verdict.version, verdict.steps, verdict.production) == (3, {"unix:a": 5000}, {"unix:a": 5000 - 1000 + 1 + 50})
    assert text(verdict).startswith("converged at step 5000: production from step 4051")


def test_a_new_version_begins_anew() -> None:
    """What was said of one version is nothing that the next one can rest on."""
    watch = Convergence(SETTINGS)
    assert watch.seen([one(2000)], GOOD).done
    assert not watch.seen([one(10, version=4)], []).done
    assert watch.seen([one(1500, version=4)], GOOD).done


def test_only_the_last_calls_count() -> None:
    """A bad beginning is forgotten after as many calls as are wanted, to within a fiftieth of them; a bad end is not averaged away."""
    watch = Convergence(SETTINGS)
    for alone in range(0, 2000, 7):
        verdict = watch.seen([one(alone, min(alone, 500))], GOOD)
        if alone < 1490:
            assert not verdict.done, alone
        if alone > 1540:
            assert verdict.done, alone
    for alone in range(2000, 2100, 7):
        verdict = watch.seen([one(alone, 500 + alone - 2000)], GOOD)
    assert not verdict.done


def test_every_session_has_to_hold() -> None:
    """The one that has been served for the shortest time, and the one that is least certain, decide."""
    watch = Convergence(SETTINGS)
    assert not watch.seen([one(5000), one(10, session="unix:b")], GOOD).done
    assert not watch.seen([one(5000), one(5000, 500, session="unix:b")], GOOD).done
    assert watch.seen([one(5000), one(5000, version=2, session="unix:b")], GOOD).why == "the sessions are served by different versions"
    verdict = watch.seen([one(5000), one(4000, step=4500, session="unix:c", ramped=False)], GOOD)
    assert verdict.production == {"unix:a": 51, "unix:c": 501}  # without a ramp there is nothing to die down
    assert "unix:c at step 4500: production from step 501" in text(verdict)


def test_the_verdict_stays_when_the_engine_has_gone() -> None:
    """The end of a run is told by its last word."""
    watch = Convergence(SETTINGS)
    said = watch.seen([one(2000)], GOOD)
    assert watch.seen([], []) is said


@pytest.mark.parametrize("audits", [[], [9.9]])
def test_no_audits_may_be_asked_for(audits: list[float]) -> None:
    """With none asked for none are waited for, but one that speaks against it counts."""
    watch = Convergence(Settings(0.15, calls=10, audits=0))
    assert watch.seen([one(20)], audits).done == (not audits)
