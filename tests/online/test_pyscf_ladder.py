"""The ladder of SCF attempts: what smearing may prepare and may not be, what is skipped, and what a failure tells."""

from __future__ import annotations

import numpy as np
import pytest

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels.pyscf_engine import PySCFLabeller
from tumbaga.online.labels.pyscf_ladder import ATOM, LADDER, LAST, MINAO, WARM, Attempt, Rung, Solution, _useless, climb
from tumbaga.online.records import Frame

HYDROXYL = Frame(np.array([8, 1]), np.array([[0.0, 0.0, 0.0], [0.1, 0.0, 1.0]]))
FERMI = Rung(ATOM, 60, smearing=0.01)


def climbed(*ladder: Rung, limit: int | None = None) -> Solution:
    engine = PySCFLabeller(grid=1)
    molecule = engine._molecule(HYDROXYL)
    return climb(lambda: engine._made(molecule), None, limit, ladder)


def test_smearing_prepares_the_next_rung() -> None:
    """From a smeared density an SCF without smearing ends where it ends without one; both stand in the history, -TS in the first."""
    plain, prepared = climbed(Rung(ATOM, 40)), climbed(FERMI, Rung(LAST, 60, level_shift=0.1))

    # the hole in the pi shell of OH may lie in any direction, which the grid tells apart by 0.5 meV
    assert prepared.field.e_tot == pytest.approx(plain.field.e_tot, abs=5e-5)
    assert [one["rung"] for one in prepared.told] == ["atom+fermi0.01", "last+shift0.1"]
    assert prepared.told[0]["entropy"] < -0.1
    assert "entropy" not in prepared.told[1]


def test_a_smeared_result_is_never_a_label() -> None:
    """Singlet methylene opened to 125 degrees: two orbitals change places, and only smearing converges; the sentence says it."""
    methylene = Frame(np.array([6, 1, 1]), np.array([[0.0, 0.0, 0.0], [0.95, 0.5, 0.0], [-0.95, 0.5, 0.0]]))
    with pytest.raises(LabelFailedError, match=r"no single ground state.*-TS = -0\.\d\d eV.*atom\+fermi0.01: converged in \d+ cycles"):
        PySCFLabeller(grid=1).label(methylene)


def test_no_rung_follows_from_one_that_did_not_converge() -> None:
    """The density of a smeared SCF that went astray is no start."""
    with pytest.raises(LabelFailedError, match="did not converge") as failure:
        climbed(FERMI, Rung(LAST, 60), limit=2)

    assert "last" not in str(failure.value).replace("last |dE|", "")


@pytest.mark.parametrize(("gap", "skipped"), [(0.5, True), (0.9, False), (None, False)])
def test_another_guess_is_skipped_where_the_gap_is_small(gap: float | None, skipped: bool) -> None:
    """The level shift comes next there."""
    history = [Attempt("atom", 40, 1e-3, gap, False)]

    assert _useless(Rung(MINAO, 40), None, history) is skipped
    assert not _useless(Rung(ATOM, 60, level_shift=0.1), None, history)


def test_the_ladder_ends_without_smearing() -> None:
    """Warm first; every rung is bounded; the last takes over what smearing prepared."""
    assert LADDER[0].start == WARM
    assert all(0 < rung.cycles <= 60 for rung in LADDER)
    assert (LADDER[-1].start, LADDER[-1].smearing, LADDER[-2].smearing > 0) == (LAST, 0.0, True)
