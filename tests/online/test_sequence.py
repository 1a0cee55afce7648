"""The guards that learn what is usual: quiet in a run that goes well, loud where it breaks, silent where frames are no sequence."""

from __future__ import annotations

import numpy as np
import pytest

from tumbaga.online.guards import Finding, Verdict
from tumbaga.online.records import Array, Frame, Prediction
from tumbaga.online.sequence import LEARNT_FROM, SequenceWatch

NUMBERS = np.array([79, 29, 8, 1, 1])
MASSES = np.array([197.0, 63.5, 16.0, 1.0, 1.0])
CELL = np.diag([9.0, 10.0, 11.0])


class Run:
    """Independent oscillators with the thermal motion of their masses, and a watch that follows them."""

    def __init__(self, seed: int = 0, periodic: bool = False) -> None:
        self.rng, self.periodic = np.random.default_rng(seed), periodic
        self.watch = SequenceWatch()
        self.phase = self.rng.uniform(0, 2 * np.pi, (5, 3))
        self.time = 0

    def frame(self, shift: Array | float = 0.0) -> Frame:
        self.time += 1
        amplitude = 0.2 / np.sqrt(MASSES[:, None]) ** 0.5
        places = (
            2.5 * np.arange(15.0).reshape(5, 3) / 5 + amplitude * np.sin(0.3 / np.sqrt(MASSES[:, None]) * self.time + self.phase) + shift
        )
        if not self.periodic:
            return Frame(NUMBERS, places)
        wrapped = places @ np.linalg.inv(CELL)
        return Frame(NUMBERS, (wrapped - np.floor(wrapped)) @ CELL, CELL, True)

    def step(self, shift: Array | float = 0.0, energy: float = 0.0, force: float = 1.0, work: float = 0.0) -> Finding:
        forces = force * self.rng.normal(size=(5, 3))
        return self.watch.check(self.frame(shift), Prediction(energy + 0.02 * self.rng.normal(), forces, np.zeros((3, 3))), work)

    def settle(self) -> None:
        for _ in range(LEARNT_FROM + 50):
            assert self.step().verdict is Verdict.OK


@pytest.mark.parametrize("periodic", [False, True])
def test_a_calm_run_is_never_called_unusual(periodic: bool) -> None:
    """Atoms that cross the walls of a cell and are wrapped have made small steps."""
    run = Run(periodic=periodic)
    assert [run.step().verdict for _ in range(5000)] == [Verdict.OK] * 5000


def test_a_large_force_is_seen() -> None:
    run = Run()
    run.settle()
    assert run.step(force=8.0).verdict in (Verdict.OK, Verdict.WARN)
    found = run.step(force=300.0)
    assert found.verdict is Verdict.CRIT
    assert "eV/Å, where at most" in found.sentence


def test_a_long_step_is_seen_and_the_atom_named() -> None:
    run = Run()
    run.settle()
    shift = np.zeros((5, 3))
    shift[1, 2] = 0.8
    found = run.step(shift)
    assert found.verdict is Verdict.CRIT
    assert "atom 1 has moved by 0.8" in found.sentence


def test_heavy_atoms_are_held_against_their_own_kind() -> None:
    """A step that is usual for hydrogen is not for gold."""
    verdicts = []
    for atom in (0, 4):
        run = Run()
        run.settle()
        shift = np.zeros((5, 3))
        shift[atom] = 0.05
        verdicts.append(run.step(shift).verdict)
    assert verdicts[0] is not Verdict.OK
    assert verdicts[1] is Verdict.OK


def test_a_jump_of_the_energy_is_seen_unless_a_swap_made_it() -> None:
    run = Run()
    run.settle()
    assert run.step(energy=5.0, work=5.0).verdict is Verdict.OK
    found = run.step(energy=0.0)
    assert found.verdict is Verdict.CRIT
    assert "the energy has changed by -5" in found.sentence


def test_nothing_is_unusual_before_enough_was_seen() -> None:
    run = Run()
    assert [run.step(energy=20.0 * (k % 50 == 0), force=30.0 if k % 40 == 0 else 1.0).verdict for k in range(LEARNT_FROM)] == [
        Verdict.OK
    ] * LEARNT_FROM


def test_frames_that_are_no_sequence_are_left_alone() -> None:
    """Short walks from ever new starts: steps and energies between them say nothing, forces still do."""
    run = Run()
    found = [run.step(20.0 * run.rng.normal() * (k % 3 == 0), 50.0 * run.rng.normal() * (k % 3 == 0)).verdict for k in range(3000)]
    assert set(found[1000:]) == {Verdict.OK}
    assert run.step(force=500.0).verdict is Verdict.CRIT


def test_other_atoms_begin_anew() -> None:
    run = Run()
    run.settle()
    other = Frame(np.array([29, 29]), np.array([[0.0, 0.0, 0.0], [2.5, 0.0, 0.0]]))
    assert run.watch.check(other, Prediction(-100.0, np.full((2, 3), 90.0), np.zeros((3, 3)))).verdict is Verdict.OK
