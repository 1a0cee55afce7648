"""Checks of what every interatomic potential is bound to, whatever its form."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from tumbaga.online.conformance.frames import boxed, turned
from tumbaga.online.conformance.subject import Subject, agree, near
from tumbaga.online.guards import COVALENT_RADII
from tumbaga.online.records import Array, Frame, Prediction

_GAP = 0.5  # Å beyond the cutoff that count as out of reach
_EDGE = 1e-5  # Å to either side of the cutoff: float32 still tells them apart, and an envelope has no slope yet
_PAIRS = 9  # of elements at the cutoff


def forces_are_the_slope_of_the_energy(subject: Subject) -> None:
    """F = -dE/dR, by central differences along single coordinates and along random directions of all atoms."""
    for frame in subject.frames:
        forces = subject.predict(frame).forces
        for direction in _directions(frame):
            slope = _slope(subject, frame, direction)
            near("forces are -dE/dR (eV/Å)", -(forces * direction).sum(), slope, subject.tolerances.gradient, _largest(forces))


def the_virial_is_the_slope_along_strain(subject: Subject) -> None:
    """W = -dE/dstrain for the six symmetric strains, which move atoms and cell alike."""
    for frame in [*subject.frames, *subject.crystals[-1:]]:
        virial = subject.predict(frame).virial
        for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (2, 0)):
            strain = np.zeros((3, 3))
            strain[a, b] += 0.5
            strain[b, a] += 0.5
            size = max(1.0, _largest(frame.positions), _largest(frame.cell))
            slope = size * _slope(subject, frame, frame.positions @ strain / size, frame.cell @ strain / size)
            near("the virial is -dE/dstrain (eV)", -virial[a, b], slope, subject.tolerances.gradient, _largest(virial))


def a_translation_changes_nothing(subject: Subject) -> None:
    """Energy, forces and virial stay as they are when all atoms move together, by little or by a thousand Å."""
    for frame, far in product(subject.frames, (1.0, 1000.0)):
        moved = replace(frame, positions=frame.positions + far * np.array([0.31, -0.17, 0.23]))
        agree("a translation changes nothing", subject.predict(moved), subject.predict(frame), subject.tolerances.same)


def a_rotation_turns_forces_and_virial(subject: Subject) -> None:
    """The energy stays, forces and virial turn along; by an angle about a skew axis, so that no grid of axes can hide anything."""
    turn = np.linalg.qr(np.array([[1.0, 0.4, -0.2], [0.3, 1.0, 0.5], [-0.6, 0.1, 1.0]]))[0]
    turn *= np.linalg.det(turn)  # a rotation: a model need not know reflections
    for frame in subject.frames:
        said = subject.predict(frame)
        expected = Prediction(said.energy, said.forces @ turn.T, turn @ said.virial @ turn.T)
        agree("a rotation turns forces and virial", subject.predict(turned(frame, turn)), expected, subject.tolerances.same)


def the_order_of_the_atoms_does_not_matter(subject: Subject) -> None:
    """Forces follow their atoms when these are listed in another order; nothing else changes."""
    for frame in subject.frames:
        said, order = subject.predict(frame), np.random.default_rng(0).permutation(len(frame))
        mixed = replace(frame, numbers=frame.numbers[order], positions=frame.positions[order])
        expected = Prediction(said.energy, said.forces[order], said.virial)
        agree("the order of the atoms does not matter", subject.predict(mixed), expected, subject.tolerances.same)


def the_net_force_is_zero(subject: Subject) -> None:
    """Forces on all atoms of a frame add up to nothing."""
    for frame in [*subject.frames, *subject.crystals]:
        forces = subject.predict(frame).forces
        scale = len(frame) * (1.0 + _largest(forces))
        near("the net force is zero (eV/Å)", forces.sum(axis=0), np.zeros(3), subject.tolerances.same, scale)


def an_atom_alone_feels_nothing(subject: Subject) -> None:
    """One atom without neighbours has a finite energy, and neither force nor virial; for each element of the frames."""
    for z in subject.elements:
        said = subject.predict(Frame(np.array([z]), np.array([[1.0, 2.0, 3.0]])))
        near("an atom alone has a finite energy (eV)", said.energy, said.energy, 0.0)
        near("an atom alone feels no force (eV/Å)", said.forces, np.zeros((1, 3)), subject.tolerances.same)
        near("an atom alone has no virial (eV)", said.virial, np.zeros((3, 3)), subject.tolerances.same)


def a_wide_box_changes_nothing(subject: Subject) -> None:
    """A cluster in a periodic box whose images are out of reach is the cluster without a box; so is an atom alone."""
    for frame in subject.clusters:
        wide = boxed(frame, subject.potential.spec.cutoff + _GAP)
        agree("a wide box changes nothing", subject.predict(wide), subject.predict(frame), subject.tolerances.same)


def wrapping_changes_nothing(subject: Subject) -> None:
    """In a periodic frame an atom may stand in any cell: moved by lattice vectors it is the same atom."""
    for frame in subject.crystals:
        cells = np.random.default_rng(0).integers(-5, 6, (len(frame), 3))
        far = replace(frame, positions=frame.positions + cells @ frame.cell)
        agree("wrapping changes nothing", subject.predict(far), subject.predict(frame), subject.tolerances.same)


def a_supercell_is_its_cells(subject: Subject) -> None:
    """Two cells have twice the energy and the same forces as one, though one is smaller than the cutoff and its atoms see their own images."""
    for frame in subject.crystals:
        said = subject.predict(frame)
        for axis in range(3):
            double = Frame(
                np.tile(frame.numbers, 2),
                np.concatenate([frame.positions, frame.positions + frame.cell[axis]]),
                frame.cell * np.where(np.arange(3) == axis, 2, 1)[:, None],
                periodic=True,
            )
            expected = Prediction(2 * said.energy, np.tile(said.forces, (2, 1)), 2 * said.virial)
            agree("a supercell is its cells", subject.predict(double), expected, subject.tolerances.same)


def energies_of_what_is_far_apart_add_up(subject: Subject) -> None:
    """Two clusters beyond each other's reach have the energies, virials and forces that they have alone, added up or side by side."""
    clusters = subject.clusters
    for one, other in zip(clusters, clusters[::-1], strict=True):
        shift = one.positions.max(axis=0) - other.positions.min(axis=0) + subject.potential.spec.cutoff + _GAP
        both = Frame(np.concatenate([one.numbers, other.numbers]), np.concatenate([one.positions, other.positions + shift]))
        first, second = subject.predict(one), subject.predict(other)
        added = Prediction(first.energy + second.energy, np.concatenate([first.forces, second.forces]), first.virial + second.virial)
        agree("energies of what is far apart add up", subject.predict(both), added, subject.tolerances.same)


def nothing_jumps_at_the_cutoff(subject: Subject) -> None:
    """Energy and forces have no step when an atom enters the range of another one, which has a bond on its far side."""
    cutoff, tolerance = subject.potential.spec.cutoff, subject.tolerances.gradient
    for a, b in list(product(subject.elements, repeat=2))[:_PAIRS]:
        bond = 2.2 * float(COVALENT_RADII[a])
        inside, outside = (
            subject.predict(Frame(np.array([a, a, b]), np.array([[0.0, 0.0, 0.0], [-bond, 0.0, 0.0], [cutoff + gap, 0.0, 0.0]])))
            for gap in (-_EDGE, _EDGE)
        )
        scale = _largest(outside.forces)
        near("the energy does not jump at the cutoff (eV)", inside.energy, outside.energy, tolerance, scale)
        near("forces do not jump at the cutoff (eV/Å)", inside.forces, outside.forces, tolerance, scale)


def _directions(frame: Frame) -> list[Array]:
    """Three atoms by three axes, and three ways in which all atoms move at once; each of shape (n_atoms, 3)."""
    found = []
    for atom, axis in product(range(min(len(frame), 3)), range(3)):
        found.append(np.zeros_like(frame.positions))
        found[-1][atom, axis] = 1.0
    rng = np.random.default_rng(0)
    return found + [rng.standard_normal(frame.positions.shape) / np.sqrt(len(frame)) for _ in range(3)]


def _slope(subject: Subject, frame: Frame, direction: Array, cell: Array | None = None) -> float:
    """dE/dt where positions and cell move by t times these, by four points: the error is of fourth order in the step."""
    h, lattice = subject.tolerances.displacement, np.zeros((3, 3)) if cell is None else cell
    steps = [replace(frame, positions=frame.positions + k * h * direction, cell=frame.cell + k * h * lattice) for k in (1, -1, 2, -2)]
    one, back, two, far_back = (said.energy for said in subject.potential.predict(steps))
    return (8.0 * (one - back) - (two - far_back)) / (12.0 * h)


def _largest(array: Array) -> float:
    return float(np.abs(array).max())
