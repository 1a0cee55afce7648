"""Options of the PySCF engine that make its level of theory (spin, effective cores, dispersion), and the checks of what it computes."""

from __future__ import annotations

import importlib.util
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from tumbaga.online.errors import LabelFailedError
from tumbaga.online.labels import dispersion, pyscf_checks
from tumbaga.online.labels.factory import UnknownMethodError, make_labeller
from tumbaga.online.labels.pyscf_engine import PySCFLabeller
from tumbaga.online.records import Frame

WATER = Frame(np.array([8, 1, 1]), np.array([[0.0, 0.02, 0.0], [0.79, 0.62, 0.05], [-0.74, 0.56, 0.0]]))
METHYLENE = Frame(np.array([6, 1, 1]), np.array([[0.0, 0.0, 0.0], [0.87, 0.69, 0.0], [-0.87, 0.69, 0.0]]))
COPPER_HYDRIDE = Frame(np.array([29, 1]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.5]]))
needs_dispersion = pytest.mark.skipif(importlib.util.find_spec("dftd3") is None, reason="needs the extra dispersion")


def test_spin_is_low_or_what_is_asked_for() -> None:
    """Methylene is a singlet by default and lower as a triplet, which is another level of theory."""
    low, high = (PySCFLabeller(grid=1, spin=spin).label(METHYLENE) for spin in ("low", "2"))

    assert (low.details["spin"], high.details["spin"]) == (0, 2)
    assert high.energy < low.energy - 0.3
    assert high.method == "pyscf:pbe/def2-svp/grid1/df-jfit/spin2"
    assert high.details["s2"] == pytest.approx(2.0, abs=0.02)
    assert "s2" not in low.details


def test_a_spin_that_cannot_be_is_one_sentence() -> None:
    """The number of electrons decides, and the sentence says it."""
    with pytest.raises(LabelFailedError, match="spin = 1 cannot be: of 10 electrons an even number is unpaired"):
        PySCFLabeller(spin="1").label(WATER)
    assert PySCFLabeller(grid=1, spin="1", charge=1).label(WATER).details["spin"] == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"spin": "high"}, "cannot read spin = 'high'; it is low or"),
        ({"gpu": "yes"}, "cannot read gpu = 'yes'; it is auto or never"),
        ({"disp": "d5"}, "has no dispersion 'd5'; there are d3bj, d4"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, str], sentence: str) -> None:
    """Before anything is computed."""
    with pytest.raises(UnknownMethodError, match=sentence):
        make_labeller("pyscf", **options)


def test_a_missing_package_of_dispersion_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(dispersion.PACKAGES, "d3bj", "no_such_package")

    with pytest.raises(UnknownMethodError, match=r"needs the package no_such_package for disp=d3bj: pip install 'tumbaga\[dispersion\]'"):
        make_labeller("pyscf", disp="d3bj")


@needs_dispersion
@pytest.mark.parametrize(("kind", "energy"), [("d3bj", -0.0098), ("d4", -0.0053)])
def test_dispersion_is_added_and_told(kind: str, energy: float) -> None:
    """Energy and forces are those of the plain functional plus the correction, whose energy and package stand in the details."""
    plain, corrected = PySCFLabeller(grid=1).label(WATER), PySCFLabeller(grid=1, disp=kind).label(WATER)
    added, forces, package = dispersion.correction(kind, "pbe", WATER, 0)

    assert corrected.method == f"pyscf:pbe-{kind}/def2-svp/grid1/df-jfit"
    assert corrected.details["dispersion"] == added == pytest.approx(energy, abs=3e-4)
    assert corrected.energy - plain.energy == pytest.approx(added, abs=1e-6)
    np.testing.assert_allclose(corrected.forces - plain.forces, forces, atol=1e-6)
    assert corrected.details["versions"][kind] == package


@pytest.mark.slow
@needs_dispersion
@pytest.mark.parametrize("kind", ["d3bj", "d4"])
def test_forces_of_dispersion_are_slopes(kind: str) -> None:
    """Of a cluster and of a crystal."""
    for frame in (WATER, Frame(WATER.numbers, WATER.positions, np.diag([3.0, 4.0, 5.0]), True)):
        forces = dispersion.correction(kind, "pbe", frame, 0)[1]
        energies = []
        for step in (1e-3, -1e-3):
            positions = frame.positions.copy()
            positions[1, 0] += step
            energies.append(dispersion.correction(kind, "pbe", Frame(frame.numbers, positions, frame.cell, frame.periodic), 0)[0])

        assert -(energies[0] - energies[1]) / 2e-3 == pytest.approx(forces[1, 0], abs=1e-6)


@needs_dispersion
def test_a_functional_without_dispersion_parameters_is_a_failed_label() -> None:
    """It is named."""
    with pytest.raises(LabelFailedError, match="there is no d3bj dispersion for lda,vwn"):
        dispersion.correction("d3bj", "lda,vwn", WATER, 0)


def test_effective_cores_follow_the_basis() -> None:
    """lanl2dz brings copper's, def2 sets do not, "none" keeps all electrons; what is not def2's own is part of the method's name."""
    methods = {}
    for options in ({}, {"basis": "lanl2dz"}, {"ecp": "none"}, {"basis": "def2-svp", "ecp": "lanl2dz"}):
        engine = PySCFLabeller(**options)
        methods[engine.method] = engine._molecule(COPPER_HYDRIDE).nelectron

    assert methods == {
        "pyscf:pbe/def2-svp/grid2/df-jfit": 30,
        "pyscf:pbe/lanl2dz/grid2/df-jfit/ecp-lanl2dz": 20,
        "pyscf:pbe/def2-svp/grid2/df-jfit/ecp-none": 30,
        "pyscf:pbe/def2-svp/grid2/df-jfit/ecp-lanl2dz": 20,
    }


def test_labels_tell_what_they_are() -> None:
    """Level, versions, attempts, spin, gaps, sums of forces, memory: JSON that a store can keep."""
    import json

    label = PySCFLabeller(grid=1, charge=1).label(WATER)
    details = json.loads(json.dumps(label.details))

    assert (details["xc"], details["basis"], details["converged"], details["spin"]) == ("pbe", "def2-svp", True, 1)
    assert set(details["versions"]) == {"pyscf", "libxc"}
    assert details["scf"][-1]["rung"] == details["rung"]
    assert abs(details["s2_excess"]) < 0.05
    assert details["net_force"] < 1e-6
    assert details["net_torque"] < 0.05
    assert details["peak_memory_mb"] > 50
    assert {"gap", "flip_gap", "warnings", "start"} <= set(details)


def test_forces_that_turn_or_push_the_cluster_are_refused() -> None:
    """So are forces beyond any use; sums are told of what passes."""
    forces = np.zeros((3, 3))
    forces[1:, 0] = 1.0, -1.0
    straight = Frame(np.array([1, 1, 1]), np.array([[0.0, 0, 0], [1.0, 0, 0], [2.0, 0, 0]]))

    assert pyscf_checks.check_forces(straight, forces) == {"net_force": 0.0, "net_torque": 0.0}
    for wrong, said in (
        (forces[:, ::-1], "torque of 1.000 eV"),
        (forces + 0.01, "add up to 0.052"),
        (forces * 31, "31.0 eV/Å"),
        (forces * np.nan, "finite"),
    ):
        with pytest.raises(LabelFailedError, match=said):
            pyscf_checks.check_forces(straight, wrong)


def test_mixed_spins_are_refused() -> None:
    """A doublet with the <S^2> of a half-broken bond is no label; one that is nearly pure is told."""
    pure, mixed = (SimpleNamespace(mol=SimpleNamespace(spin=1), spin_square=lambda s=s: (s, 0.0)) for s in (0.76, 1.4))

    assert pyscf_checks.check_spin(pure) == pytest.approx({"s2": 0.76, "s2_excess": 0.01})
    with pytest.raises(LabelFailedError, match=r"mixture of spins: <S\^2> is 1.40 and of 2S = 1 it is 0.75"):
        pyscf_checks.check_spin(mixed)


@pytest.mark.parametrize(("gaps", "count"), [((2.0, None), 0), ((0.3, None), 1), ((2.0, 0.1), 1), ((None, None), 0)])
def test_low_gaps_warn(gaps: tuple[float | None, ...], count: int) -> None:
    """Of the same spin or over both."""
    assert len(pyscf_checks.warnings_of(gaps)) == count


def test_a_labeller_with_densities_pickles() -> None:
    """Its equality is that of its options."""
    engine = PySCFLabeller(grid=1)
    engine.label(Frame(np.array([1, 1]), np.array([[0.0, 0, 0], [0.0, 0, 0.75]])))

    assert pickle.loads(pickle.dumps(engine)) == engine == PySCFLabeller(grid=1)


BOX = np.diag([4.0, 4.0, 4.5])
HYDROGEN = Frame(np.array([1, 1]), np.array([[0.1, 0.2, 0.3], [0.1, 0.5, 1.0]]), BOX, True)


@pytest.mark.slow
def test_forces_of_cells_are_slopes() -> None:
    """Hydrogen in a box, closed shell and doublet, along a direction in which all atoms move, within 2 meV/Å."""
    engine = PySCFLabeller(basis="gth-dzvp", kpts="1x1x1", ke_cutoff=120.0)
    radical = Frame(np.array([1, 1, 1]), np.vstack([HYDROGEN.positions, [0.1, 0.8, 1.9]]), BOX, True)
    for frame in (HYDROGEN, radical):
        direction = np.random.default_rng(0).standard_normal(frame.positions.shape)
        direction /= np.linalg.norm(direction)
        energies = [engine.label(Frame(frame.numbers, frame.positions + step * direction, BOX, True)).energy for step in (0.01, -0.01)]
        label = engine.label(frame)

        assert -(energies[0] - energies[1]) / 0.02 == pytest.approx(float((label.forces * direction).sum()), abs=2e-3)
        assert label.method == "pyscf:pbe/gth-dzvp/gth-pbe/ke120/k1x1x1"
        assert label.details["start"] == {"kind": "cold"}


def test_a_grid_too_coarse_for_a_cell_is_refused() -> None:
    """Its forces do not add up to zero."""
    with pytest.raises(LabelFailedError, match=r"add up to 0\.\d+ eV/Å instead of zero"):
        PySCFLabeller(basis="gth-dzvp", kpts="1x1x1", ke_cutoff=60.0).label(HYDROGEN)


def test_cells_and_clusters_are_of_different_levels() -> None:
    """Each is refused by the other's labeller; meshes and bases that would give wrong forces are, too."""
    with pytest.raises(LabelFailedError, match="isolated clusters only, and this frame is periodic"):
        PySCFLabeller().label(HYDROGEN)
    with pytest.raises(LabelFailedError, match="is for periodic frames"):
        PySCFLabeller(basis="gth-dzvp", kpts="1x1x1").label(WATER)
    with pytest.raises(UnknownMethodError, match="cannot have kpts = '2x2x1'"):
        make_labeller("pyscf", kpts="2x2x1", basis="gth-dzvp")
    with pytest.raises(UnknownMethodError, match="needs a basis made for pseudopotentials"):
        make_labeller("pyscf", kpts="1x1x1")
