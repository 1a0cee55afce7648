"""The label engines: PySCF against its own energies, ASE calculators, the factory and the labellers that fail on purpose."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tumbaga.online.errors import BadFrameError, LabelFailedError
from tumbaga.online.labels import geometry_gate, pyscf_ladder
from tumbaga.online.labels.factory import UnknownMethodError, make_labeller
from tumbaga.online.labels.pyscf_engine import PySCFLabeller
from tumbaga.online.labels.testing import EXIT_CODE, read_journal
from tumbaga.online.records import Frame

WATER = Frame(np.array([8, 1, 1]), np.array([[0.0, 0.02, 0.0], [0.79, 0.62, 0.05], [-0.74, 0.56, 0.0]]))
CUAU_2WATER = Frame(
    np.array([29, 79, 8, 1, 1, 8, 1, 1]),
    np.array(
        [
            [0.000, 0.000, 0.000],
            [2.350, 0.000, 0.000],
            [-2.050, 0.000, 0.000],
            [-2.602, 0.766, 0.221],
            [-2.602, -0.766, 0.221],
            [-3.600, 0.200, 2.200],
            [-3.644, 1.127, 2.480],
            [-4.163, -0.351, 2.757],
        ]
    ),
)


def moved(frame: Frame, atom: int, axis: int, by: float) -> Frame:
    positions = frame.positions.copy()
    positions[atom, axis] += by
    return Frame(frame.numbers, positions, frame.cell, frame.periodic)


@pytest.mark.slow
def test_pyscf_forces_are_the_slope_of_its_energies() -> None:
    """Water, three components, within the 15 meV/Å that the integration grid costs; and they add up to nothing."""
    engine = PySCFLabeller()
    label = engine.label(WATER)

    for atom, axis in ((0, 1), (1, 0), (2, 1)):
        plus, minus = (engine.label(moved(WATER, atom, axis, step)).energy for step in (0.01, -0.01))
        assert -(plus - minus) / 0.02 == pytest.approx(label.forces[atom, axis], abs=0.015)
    assert np.abs(label.forces.sum(axis=0)).max() < 1e-6
    assert label.method == "pyscf:pbe/def2-svp/grid2/df-jfit"
    assert label.energy == pytest.approx(-2076.3, abs=1.0)  # PBE/def2-SVP water, -76.30 Hartree
    assert label.details["converged"] is True
    assert (label.details["spin"], label.details["nao"], label.details["rung"]) == (0, 24, "atom")
    assert label.details["gap"] > 5.0


def test_an_odd_electron_makes_a_doublet() -> None:
    """OH is an unrestricted doublet, with the spin that belongs to it; a hydrogen atom works and feels no force."""
    radical = PySCFLabeller(grid=1).label(Frame(np.array([8, 1]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])))
    atom = PySCFLabeller(grid=1).label(Frame(np.array([1]), np.zeros((1, 3))))

    assert radical.details["spin"] == atom.details["spin"] == 1
    assert radical.details["s2"] == pytest.approx(0.75, abs=0.02)
    assert atom.energy == pytest.approx(-13.6, abs=0.3)
    np.testing.assert_allclose(atom.forces, 0.0, atol=1e-6)


def test_no_label_without_convergence() -> None:
    """Three cycles are not enough on any rung: the error names what was tried and how far it was."""
    with pytest.raises(LabelFailedError, match=r"atom: 3 cycles, last \|dE\| .*; minao: .*; atom\+shift0.1"):
        PySCFLabeller(max_cycle=3).label(WATER)


@pytest.mark.slow
def test_later_rungs_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first attempt fails the next one's result is taken, and the label says so."""
    run = pyscf_ladder._run

    def spoil(made, rung, start, limit, gpu):  # type: ignore[no-untyped-def]
        done, attempt = run(made, rung, start, limit, gpu)
        return done, replace(attempt, converged=attempt.converged and rung.start != "atom")

    monkeypatch.setattr(pyscf_ladder, "_run", spoil)
    label = PySCFLabeller(grid=1).label(WATER)
    assert label.details["rung"] == "minao"
    assert [(one["rung"], one["converged"]) for one in label.details["scf"]] == [("atom", False), ("minao", True)]


def test_pyscf_refuses_what_it_cannot_do() -> None:
    """Periodic frames and bad geometries are refused before any DFT, unknown bases with PySCF's reason."""
    engine = PySCFLabeller()

    with pytest.raises(LabelFailedError, match="periodic"):
        engine.label(Frame(np.array([1]), np.zeros((1, 3)), np.eye(3) * 9, True))
    with pytest.raises(LabelFailedError, match=r"atoms 0 and 1 are 0\.60 Å apart, nearer than 0\.75"):
        engine.label(Frame(np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.6, 0, 0], [0, 0.96, 0]])))
    with pytest.raises(LabelFailedError, match="no-such-basis"):
        PySCFLabeller(basis="no-such-basis").label(WATER)


@pytest.mark.parametrize(
    ("numbers", "distance", "refused"),
    [
        ((1, 1), 0.74, False),
        ((1, 1), 0.40, True),
        ((8, 1), 1.60, False),
        ((8, 1), 1.70, True),
        ((29, 79), 1.95, False),
        ((29, 79), 1.85, True),
        ((79, 29), 4.7, True),
        ((8, 29), 1.55, True),
        ((1, 79), 1.25, True),
        ((6, 6), 1.2, False),
        ((6, 6), 1.0, True),
        ((18, 18), 4.5, False),
    ],
)
def test_gate(numbers: tuple[int, int], distance: float, refused: bool) -> None:
    """Fused pairs and torn-off atoms are refused by kind; noble gases may be alone."""
    frame = Frame(np.array(numbers), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance]]))

    assert (geometry_gate.problem(frame) is not None) is refused


@pytest.mark.drill
@pytest.mark.slow
def test_copper_gold_water_costs_half_a_minute() -> None:
    """CuAu(H2O)2 converges on the first rung with the effective core of gold, in 30 s of one quiet core."""
    started = time.process_time()
    label = PySCFLabeller().label(CUAU_2WATER)

    assert (label.details["nao"], label.details["rung"], label.details["spin"]) == (111, "atom", 0)
    assert label.energy == pytest.approx(-52475.0, abs=5.0)
    assert time.process_time() - started < 60.0  # twice: the machine is shared


def test_ase_calculators_label_by_import_path() -> None:
    """EMT by its path, with ASE's numbers; a calculator's failure is a failed label with its reason."""
    frame = Frame(np.array([29, 79]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.6]]))
    engine = make_labeller("ase:ase.calculators.emt:EMT")
    label = engine.label(frame)

    assert engine.method == label.method == "ase:ase.calculators.emt:EMT"
    assert label.forces[0, 2] == pytest.approx(-label.forces[1, 2])
    with pytest.raises(LabelFailedError, match="NotImplementedError"):
        engine.label(Frame(np.array([26]), np.zeros((1, 3))))
    with pytest.raises(LabelFailedError, match="ModuleNotFoundError"):
        make_labeller("ase:ase.no_such_module:Thing").label(frame)


def test_toy_labels_are_exact(cluster: Callable[..., Frame]) -> None:
    """Forces are the slope of the energy, whose offset is as large as an all-electron total."""
    frame, engine = cluster(2), make_labeller("test:lj")
    label = engine.label(frame)

    assert label.energy == pytest.approx(-20_000.0, abs=500.0)
    for atom, axis in ((0, 0), (3, 2), (5, 1)):
        plus, minus = (engine.label(moved(frame, atom, axis, step)).energy for step in (1e-4, -1e-4))
        assert -(plus - minus) / 2e-4 == pytest.approx(label.forces[atom, axis], rel=1e-4, abs=1e-5)


def test_journal_tells_what_was_computed(tmp_path: Path) -> None:
    """One line at the start, one at the end; a failed label has no end."""
    journal = tmp_path / "journal"
    engine = make_labeller(f"test:raise?on=2&journal={journal}")
    engine.label(WATER)
    with pytest.raises(LabelFailedError, match="on purpose"):
        engine.label(WATER)

    lines = read_journal(journal)
    assert [(what, key) for what, key, _ in lines] == [("start", WATER.key), ("end", WATER.key), ("start", WATER.key)]
    assert read_journal(tmp_path / "none") == []


def test_faults() -> None:
    """A labeller cannot make a label of nan; every call fails where no call is named; a delay is a delay."""
    with pytest.raises(BadFrameError, match="not finite"):
        make_labeller("test:nan").label(WATER)
    for _ in range(2):
        with pytest.raises(LabelFailedError):
            make_labeller("test:raise").label(WATER)
    assert make_labeller("test:lj", delay="0.05").label(WATER).seconds >= 0.05


def test_the_fault_that_kills_its_process_happens_once(tmp_path: Path) -> None:
    """Counted in the journal over processes: the second call dies, the third, in a new process, does not."""
    method = f"test:exit?on=2&journal={tmp_path / 'journal'}"
    program = (
        "import sys, numpy as np\n"
        "from tumbaga.online.labels.factory import make_labeller\n"
        "from tumbaga.online.records import Frame\n"
        "engine = make_labeller(sys.argv[1])\n"
        "for _ in range(2): engine.label(Frame(np.array([1]), np.zeros((1, 3))))\n"
    )
    codes = [subprocess.run([sys.executable, "-c", program, method], check=False).returncode for _ in range(2)]

    assert codes == [EXIT_CODE, 0]
    assert [what for what, _, _ in read_journal(tmp_path / "journal")] == ["start", "end", "start", "start", "end", "start", "end"]


@pytest.mark.parametrize("method", ["pyscf", "ase:ase.calculators.emt:EMT", "test:lj?delay=60"])
def test_labellers_travel_to_child_processes(method: str) -> None:
    """They pickle, and keep their method."""
    engine = make_labeller(method)

    assert pickle.loads(pickle.dumps(engine)).method == engine.method


def test_pyscf_options_are_read_from_strings() -> None:
    """A command line has only strings."""
    engine = make_labeller("pyscf", basis="def2-tzvp", grid="3", conv_tol="1e-9", max_cycle="50", charge=-1)

    assert engine == PySCFLabeller(basis="def2-tzvp", grid=3, conv_tol=1e-9, max_cycle=50, charge=-1)
    assert engine.method == "pyscf:pbe/def2-tzvp/grid3/df-jfit/charge-1"


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("vasp", {}, "'vasp' is not known; there are pyscf"),
        ("test:boom", {}, "of test: there are lj, raise, hang, nan, exit"),
        ("ase:EMT", {}, "must be ase:MODULE:CLASS"),
        ("pyscf", {"functional": "pbe"}, "has no option 'functional'; there are xc"),
        ("pyscf", {"grid": "fine"}, "cannot read grid = 'fine' as int"),
        ("test:lj?fault=exit", {}, "has no option 'fault'"),
    ],
)
def test_unknown_methods_are_explained(method: str, options: dict[str, str], sentence: str) -> None:
    """The sentence says what there is instead."""
    with pytest.raises(UnknownMethodError, match=sentence):
        make_labeller(method, **options)


def test_naming_a_labeller_imports_no_engine() -> None:
    """PySCF and ASE are imported when they are used: whoever only checks names starts fast."""
    program = (
        "import sys\n"
        "from tumbaga.online.labels.factory import make_labeller\n"
        "make_labeller('pyscf'); make_labeller('ase:ase.calculators.emt:EMT')\n"
        "assert not {'pyscf', 'ase', 'scipy', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
