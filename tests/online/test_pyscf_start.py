"""Warm starts of PySCF labels: densities carried over, the nearest one, the check by a cold SCF, and labels that do not depend on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tumbaga.online.labels import pyscf_ladder, pyscf_start
from tumbaga.online.labels.pyscf_engine import PySCFLabeller
from tumbaga.online.labels.pyscf_start import Densities, Known
from tumbaga.online.records import Frame

WATER = Frame(np.array([8, 1, 1]), np.array([[0.0, 0.02, 0.0], [0.79, 0.62, 0.05], [-0.74, 0.56, 0.0]]))


def moved(frame: Frame, by: float, seed: int = 0) -> Frame:
    return Frame(frame.numbers, frame.positions + by * np.random.default_rng(seed).standard_normal(frame.positions.shape))


def known(frame: Frame, size: int = 4, gap: float | None = 5.0, chain: int = 0) -> Known:
    return Known(frame, np.eye(size), -1.0, np.zeros((len(frame), 3)), gap, chain)


def test_a_carried_density_keeps_electrons_and_idempotency() -> None:
    """In another, nonorthogonal basis it holds as many electrons and is a projector still; in its own it is itself."""
    rng = np.random.default_rng(0)
    old, new = (np.eye(6) + 0.3 * (noise + noise.T) / 2 for noise in rng.uniform(-1, 1, (2, 6, 6)))
    values, vectors = np.linalg.eigh(old)
    orbitals = (vectors / np.sqrt(values))[:, :2]  # orthonormal under the old overlap
    density = 2 * orbitals @ orbitals.T
    kept = pyscf_start.orthogonalised(density, old)
    carried = pyscf_start.transported(kept, new)

    assert np.trace(carried @ new) == pytest.approx(4.0)
    np.testing.assert_allclose(carried @ new @ carried, 2 * carried, atol=1e-12)
    np.testing.assert_allclose(pyscf_start.transported(kept, old), density, atol=1e-12)
    np.testing.assert_allclose(pyscf_start.transported(np.stack([kept, kept]), new)[1], carried, atol=1e-12)


def test_the_nearest_frame_of_the_same_atoms_is_the_start() -> None:
    """Nearest without the shift of the whole; other atoms and frames beyond 0.3 Å do not count."""
    densities = Densities(8)
    near, far = moved(WATER, 0.02), moved(WATER, 0.1)
    shifted = Frame(WATER.numbers, near.positions + 3.0)
    for frame in (far, shifted, Frame(np.array([1, 8, 1]), WATER.positions)):
        densities.add(known(frame))
    found = densities.nearest(WATER)

    assert found is not None
    assert found[0].frame is shifted
    assert 0.0 < found[1] < 0.05
    assert densities.nearest(moved(WATER, 1.0)) is None
    assert densities.nearest(Frame(np.array([8, 8]), np.zeros((2, 3)))) is None


def test_densities_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In number and in memory, the oldest going first; none are kept where none are wanted."""
    few, none = Densities(2), Densities(0)
    for seed in range(4):
        few.add(known(moved(WATER, 0.01, seed)))
        none.add(known(WATER))
    monkeypatch.setattr(pyscf_start, "MAX_BYTES", 1000)
    large = Densities(9)
    for _ in range(3):
        large.add(known(WATER, size=8))  # 512 bytes each

    assert (len(few), len(none), len(large)) == (2, 0, 1)


@pytest.mark.parametrize(
    ("near", "gap", "energy", "said"),
    [
        (known(WATER), 5.0, -1.0, None),
        (known(WATER, gap=0.3), 5.0, -1.0, "a gap of 0.30 eV"),
        (known(WATER), 0.2, -1.0, "a gap of 0.20 eV"),
        (known(WATER, gap=None), None, -1.0, "no gap is known"),
        (known(WATER), 5.0, -0.8, r"\+0.20 eV from what"),
        (known(WATER, chain=9), 5.0, -1.0, "10 warm starts in a row"),
    ],
)
def test_what_calls_for_a_cold_scf(near: Known, gap: float | None, energy: float, said: str | None) -> None:
    """A small gap at either end, an energy that the forces do not lead to, and a long chain of warm starts."""
    found = pyscf_start.doubt(near, WATER, energy, np.zeros((3, 3)), gap)

    assert found is None if said is None else found is not None
    if said is not None:
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(found)


@pytest.mark.parametrize("charge", [0, 1])
def test_a_warm_label_is_the_cold_one(charge: int) -> None:
    """Within 1e-3 meV and 0.5 meV/Å, for a closed shell and for a doublet, in no more cycles."""
    warm, cold = PySCFLabeller(grid=1, charge=charge), PySCFLabeller(grid=1, charge=charge, densities=0)
    warm.label(WATER)
    one, other = (engine.label(moved(WATER, 0.03)) for engine in (warm, cold))

    assert (one.details["start"]["kind"], other.details["start"]["kind"]) == ("warm", "cold")
    assert one.details["spin"] == charge
    assert one.energy == pytest.approx(other.energy, abs=1e-6)
    np.testing.assert_allclose(one.forces, other.forces, atol=5e-4)
    assert one.details["cycles"] <= other.details["cycles"]


def test_a_lower_cold_solution_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm SCF that ends 0.27 eV too high is found out by the forces; the cold energy is the label's and the densities are dropped."""
    run = pyscf_ladder._run

    def spoil(made, rung, start, limit, gpu):  # type: ignore[no-untyped-def]
        done, attempt = run(made, rung, start, limit, gpu)
        done.e_tot += 0.01 if rung.start == "warm" else 0.0
        return done, attempt

    monkeypatch.setattr(pyscf_ladder, "_run", spoil)
    warm, cold = PySCFLabeller(grid=1), PySCFLabeller(grid=1, densities=0)
    warm.label(WATER)
    one, other = (engine.label(moved(WATER, 0.03)) for engine in (warm, cold))

    assert one.energy == pytest.approx(other.energy, abs=1e-6)
    assert "+0.27 eV from what" in one.details["start"]["doubt"]
    assert "0.272 eV lower and is taken" in one.details["start"]["cold"]
    assert [attempt["rung"] for attempt in one.details["scf"]] == ["warm", "atom"]
    assert len(warm._known) == 1


def test_a_small_gap_is_checked_and_confirmed() -> None:
    """The cold SCF ends at the same energy: the warm label stands, says so, and its chain begins anew."""
    warm = PySCFLabeller(grid=1)
    warm.label(WATER)
    warm._known._known[0] = replace(warm._known._known[0], gap=0.2, chain=4)
    start = warm.label(moved(WATER, 0.03)).details["start"]

    assert start == {"kind": "warm", "rms": start["rms"], "chain": 0, "doubt": "a gap of 0.20 eV", "cold": "the same"}
