"""What a frame becomes for each kind of client, and the way back. The physics of a pair potential in a skewed lattice decides."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tumbaga.socket_protocol.events import Float64s, ForceReady, PosData
from tumbaga.socket_protocol.peers import PEERS, NeedsCellError, UnknownKindError, peer_of, place, to_triangular, wrapped

SAME = 1e-11


def pair_energy(cell: Float64s, positions: Float64s) -> tuple[float, Float64s, Float64s]:
    """E, F (N, 3) and W = -dE/d(strain) (3, 3) of exp(-r) between all atoms and their images in 7 x 7 x 7 cells around the home cell."""
    inside = wrapped(positions, cell, np.zeros(3))
    images = np.array(list(itertools.product(range(-3, 4), repeat=3))) @ cell
    vectors = inside[None, :, None, :] + images[None, None, :, :] - inside[:, None, None, :]
    lengths = np.linalg.norm(vectors, axis=-1)
    lengths[lengths == 0.0] = np.inf
    pushes = -np.exp(-lengths)[..., None] * vectors / lengths[..., None]  # on the first atom of each pair
    return 0.5 * float(np.exp(-lengths).sum()), pushes.sum(axis=(1, 2)), -0.5 * np.einsum("ijma,ijmb->ab", vectors, pushes)


def random_cell(seed: int, hand: int) -> Float64s:
    """A skewed cell of about 12 Bohr that is far from any axis; left-handed for hand = -1."""
    rng = np.random.default_rng(seed)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    cell = (12 * np.eye(3) + rng.uniform(-2, 2, (3, 3))) @ turn
    return cell if np.linalg.det(cell) * hand > 0 else np.ascontiguousarray(cell[::-1])


@pytest.mark.parametrize("hand", [1, -1], ids=["right-handed", "left-handed"])
@pytest.mark.parametrize("seed", range(5))
def test_lammps_gets_a_triangular_right_handed_cell_of_the_same_lattice(seed: int, hand: int) -> None:
    """The triangle spans the lattice of the submitted cell, turned; the diagonal is positive; what LAMMPS does not read is exactly zero."""
    cell = random_cell(seed, hand)
    triangular, rotation = to_triangular(cell)

    assert not np.triu(triangular, 1).any()
    assert np.diag(triangular).min() > 0
    assert np.allclose(rotation @ rotation.T, np.eye(3), rtol=0, atol=SAME)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    multiples = triangular @ rotation @ np.linalg.inv(cell)
    assert np.allclose(multiples, np.round(multiples), rtol=0, atol=SAME)
    assert abs(np.linalg.det(np.round(multiples))) == pytest.approx(1.0)


@pytest.mark.parametrize("hand", [1, -1], ids=["right-handed", "left-handed"])
def test_forces_and_virial_come_back_from_lammps_as_if_nothing_had_been_turned(hand: int) -> None:
    """Computed in the turned and wrapped frame, with the lower triangle of W left out, they are those of the submitted frame."""
    cell = random_cell(11, hand)
    positions = np.random.default_rng(3).uniform(-40, 40, (6, 3))
    energy, forces, virial = pair_energy(cell, positions)
    placed = place(PosData(cell, positions), peer_of("lammps"))
    sent = placed.sent
    there, forces_there, virial_there = pair_energy(sent.cell, sent.positions)
    result = placed.result(ForceReady(there, forces_there, np.triu(virial_there)))

    assert np.abs(forces).min() > 1e-6
    assert np.abs(virial).min() > 1e-6
    # the sum over 7 x 7 x 7 images sees other far images after another lattice vector was reversed
    assert result.energy == pytest.approx(energy, rel=1e-8)
    assert np.allclose(result.forces, forces, rtol=0, atol=1e-10)
    assert np.allclose(result.virial, virial, rtol=0, atol=1e-8)
    assert result.has_stress
    fractions = np.linalg.solve(sent.cell.T, (sent.positions + 0.5 * np.diag(sent.cell)).T).T
    assert fractions.min() >= -SAME
    assert fractions.max() <= 1 + SAME


@pytest.mark.parametrize("kind", sorted(set(PEERS) - {"lammps"}))
def test_the_other_kinds_get_a_periodic_frame_as_it_is(kind: str) -> None:
    frame = PosData(random_cell(1, -1), np.random.default_rng(0).normal(size=(3, 3)))
    placed = place(frame, peer_of(kind))

    assert placed.sent is frame
    assert placed.rotation is None


def test_without_a_cell_ase_gets_zeros_and_the_others_a_box_that_does_not_breathe() -> None:
    """Zeros mean "not periodic" to ASE alone; a box that changed with every frame would be another system each time."""
    positions = np.random.default_rng(0).uniform(-5, 5, (4, 3))
    none = np.zeros((3, 3))

    assert not place(PosData(none, positions), peer_of("ase")).sent.cell.any()
    for kind in ("generic", "ipi", "lammps"):
        boxes = {place(PosData(none, scale * positions), peer_of(kind)).sent.cell.tobytes() for scale in (0.9, 1.0, 1.1)}
        assert len(boxes) == 1
    assert place(PosData(none, positions), peer_of("generic")).sent.cell.tolist() == (90.0 * np.eye(3)).tolist()
    assert place(PosData(none, positions), peer_of("generic")).sent.positions is not None
    assert np.array_equal(place(PosData(none, positions), peer_of("generic")).sent.positions, positions)


@pytest.mark.parametrize("kind", ["cp2k", "qe"])
def test_a_code_whose_box_is_physics_is_not_given_one_of_our_choice(kind: str) -> None:
    frame = PosData(np.zeros((3, 3)), np.array([[5.0, 5.0, 5.0], [6.0, 5.0, 5.0]]))
    with pytest.raises(NeedsCellError, match=f"kind {kind} needs a cell.* option box"):
        place(frame, peer_of(kind))
    placed = place(frame, peer_of(kind), box=12.0)

    assert placed.sent.cell.tolist() == (12.0 * np.eye(3)).tolist()
    assert placed.sent.positions.mean(axis=0).tolist() == [6.0, 6.0, 6.0]


def test_zeros_for_a_virial_are_no_stress_and_a_cluster_has_none() -> None:
    """ASE and CP2K send zeros unless they are told to compute stress; a label must not take them for the truth."""
    positions = np.zeros((1, 3))
    crystal, cluster = PosData(9.0 * np.eye(3), positions), PosData(np.zeros((3, 3)), positions)
    zeros, some = ForceReady(0.0, positions, np.zeros((3, 3))), ForceReady(0.0, positions, np.eye(3))

    assert not place(crystal, peer_of("generic")).result(zeros).has_stress
    assert place(crystal, peer_of("generic")).result(some).has_stress
    assert not place(cluster, peer_of("generic")).result(some).has_stress


def test_every_init_has_a_byte_and_none_announces_anything() -> None:
    """An empty text is a lost connection to clients written in C, and a comma sends QE into a fixed-format read."""
    for peer in PEERS.values():
        assert len(peer.init_text) == 1
        assert b"," not in peer.init_text


def test_an_unknown_kind_is_refused_with_the_list_of_kinds() -> None:
    with pytest.raises(UnknownKindError, match="no kind of client 'vasp'; there are generic, ase, ipi, lammps, cp2k, qe"):
        peer_of("vasp")
