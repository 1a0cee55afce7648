"""What differs between the programs that connect to our server role: one table, and the change of frame that some of them need.

The wire does not say who the peer is, so the kind comes from the user; the default is what all of them can live with. Everything is in
atomic units, lattice vectors are rows. This file knows no bytes, sockets or states.

Source: LAMMPS `src/MISC/fix_ipi.cpp`, CP2K `src/ipi_driver.F`, Quantum ESPRESSO `PW/src/run_driver.f90`, ASE
`ase/calculators/socketio.py`, i-PI `drivers/py/driver.py`; and what these programs were seen to do.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

import numpy as np

from tumbaga.socket_protocol.errors import LocalProtocolError
from tumbaga.socket_protocol.events import Float64s, ForceReady, PosData

_PADDING: Final = 30.0  # Bohr of nothing around a cluster, on each side
_BOX_STEP: Final = 30.0  # Bohr; the box keeps its size while the cluster breathes


class NoCell(enum.Enum):
    """What a client is sent for a frame without a cell."""

    ZEROS = "zeros"
    BOX = "box"  # a cube with much room around the cluster
    ASK = "ask"  # the box is part of the client's physics: the user must give it


@dataclass(frozen=True)
class Peer:
    """How one kind of client wants to be spoken to.

    Attributes:
        kind: its name in the configuration.
        init_text: the text of INIT, one byte at least: clients written in C take none for a lost connection.
        no_cell: what is sent for a frame without a cell.
        centre: where in our box a cluster is put, as a fraction of the box along each side; None leaves it where it is.
        triangular: whether lattice vectors must be lower triangular as rows (a along x, b in the xy plane) and atoms inside the cell.
    """

    kind: str
    init_text: bytes = b" "
    no_cell: NoCell = NoCell.BOX
    centre: float | None = None
    triangular: bool = False


PEERS: Final[Mapping[str, Peer]] = MappingProxyType(
    {
        peer.kind: peer
        for peer in (
            Peer("generic"),
            Peer("ase", init_text=b"\0", no_cell=NoCell.ZEROS),
            Peer("ipi"),
            # its box is symmetric about the origin, and it reads only the triangle
            Peer("lammps", centre=0.0, triangular=True),
            # isolated systems must be inside the box; a basis of plane waves depends on its size
            Peer("cp2k", no_cell=NoCell.ASK, centre=0.5),
            # reads INIT by a fixed format as soon as there is a comma in it: one blank, never JSON
            Peer("qe", no_cell=NoCell.ASK, centre=0.5),
        )
    }
)
"""Kind → how to speak to it."""


class UnknownKindError(LocalProtocolError, ValueError):
    """The user named a kind of client that is not in the table."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind

    def __str__(self) -> str:
        return f"there is no kind of client {self.kind!r}; there are {', '.join(PEERS)}"


class NeedsCellError(LocalProtocolError):
    """A frame without a cell is to go to a client that computes in a box of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind

    def __str__(self) -> str:
        return (
            f"a client of kind {self.kind} needs a cell and the frame has none; give the option box, the side of the cube in its own input"
        )


def peer_of(kind: str) -> Peer:
    """Return the row of the table.

    Raises:
        UnknownKindError: no such kind.

    >>> peer_of("ase").init_text
    b'\\x00'
    """
    try:
        return PEERS[kind]
    except KeyError:
        raise UnknownKindError(kind) from None


class Result(NamedTuple):
    """What a client's answer means in the frame that was submitted.

    | field      | shape  | unit         |                                                                                      |
    |------------|--------|--------------|--------------------------------------------------------------------------------------|
    | energy     | ()     | Hartree      |                                                                                      |
    | forces     | (N, 3) | Hartree/Bohr | -dE/dR                                                                               |
    | virial     | (3, 3) | Hartree      | -dE/d(strain), symmetric                                                             |
    | has_stress | ()     |              | false for all zeros and for clusters: ASE and CP2K send zeros unless told to compute |
    """

    energy: float
    forces: Float64s
    virial: Float64s
    has_stress: bool


@dataclass(frozen=True, eq=False)
class Placed:
    """A frame as one kind of client gets it, and the way back.

    Attributes:
        sent: what goes over the wire.
        rotation: orthogonal, shape (3, 3), with `sent = submitted @ rotation.T` for row vectors; None if nothing was rotated.
        periodic: whether the submitted frame has a cell.
    """

    sent: PosData
    rotation: Float64s | None
    periodic: bool

    def result(self, answer: ForceReady) -> Result:
        """Turn an answer back: the virial is made symmetric (LAMMPS fills one triangle only), then both are rotated.

        Args:
            answer: to `sent`, with as many atoms.
        """
        forces, virial = answer.forces, answer.symmetric_virial
        if self.rotation is not None:
            forces, virial = forces @ self.rotation, self.rotation.T @ virial @ self.rotation
        return Result(answer.energy, forces, virial, self.periodic and bool(virial.any()))


def place(frame: PosData, peer: Peer, box: float | None = None) -> Placed:
    """Return `frame` as a client of this kind gets it.

    Args:
        frame: to be computed; one that is not `periodic` has no cell.
        peer: the kind.
        box: side of the cube for a frame without a cell, Bohr; None leaves the choice to the table.

    Raises:
        NeedsCellError: no cell, no box, and the kind cannot do without.

    >>> place(PosData(np.zeros((3, 3)), np.zeros((1, 3))), peer_of("ipi")).sent.cell[0].tolist()
    [60.0, 0.0, 0.0]
    """
    if not frame.periodic:
        return Placed(_boxed(frame.positions, peer, box), None, periodic=False)
    if not peer.triangular:
        return Placed(frame, None, periodic=True)
    cell, rotation = to_triangular(frame.cell)
    # the box of LAMMPS begins at minus half its three lengths, also when it is skewed
    positions = wrapped(frame.positions @ rotation.T, cell, -0.5 * np.diag(cell))
    return Placed(PosData(cell, positions), rotation, periodic=True)


def to_triangular(cell: Float64s) -> tuple[Float64s, Float64s]:
    """Rotate lattice vectors so that a points along +x, b lies in the xy plane with b_y > 0, and c_z > 0.

    A left-handed cell gets its third vector reversed first: the lattice is the same, and nothing has to be mirrored.

    Args:
        cell: lattice vectors as rows, shape (3, 3), float64, any unit, with a volume.

    Returns:
        The new cell as rows, lower triangular, and the rotation R, a proper one: new vectors are `v @ R.T`.

    >>> cell, rotation = to_triangular(np.array([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 2.0]]))
    >>> cell.tolist(), round(float(np.linalg.det(rotation)))
    ([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]], 1)
    """
    a, b, c = cell if np.linalg.det(cell) > 0 else cell * np.array([[1.0], [1.0], [-1.0]])
    x = a / np.linalg.norm(a)
    z = np.cross(a, b)
    z /= np.linalg.norm(z)
    rotation = np.array([x, np.cross(z, x), z])
    # exact zeros above the diagonal: they are not read, and rounding errors there would be another lattice
    return np.ascontiguousarray(np.tril(np.array([a, b, c]) @ rotation.T)), rotation


def wrapped(positions: Float64s, cell: Float64s, origin: Float64s) -> Float64s:
    """Move each atom by lattice vectors into the cell that begins at `origin`.

    Args:
        positions: shape (N, 3), float64.
        cell: lattice vectors as rows, shape (3, 3), float64, same unit, with a volume.
        origin: corner of the cell, shape (3,), same unit.

    >>> wrapped(np.array([[-1.0, 5.0, 1.0]]), 4.0 * np.eye(3), np.zeros(3)).tolist()
    [[3.0, 1.0, 1.0]]
    """
    shifts = np.floor(np.linalg.solve(cell.T, (positions - origin).T).T)
    return np.asarray(positions - shifts @ cell, np.float64)


def _boxed(positions: Float64s, peer: Peer, box: float | None) -> PosData:
    """A cluster as the client gets it."""
    if box is None:
        if peer.no_cell is NoCell.ZEROS:
            return PosData(np.zeros((3, 3)), positions)
        if peer.no_cell is NoCell.ASK:
            raise NeedsCellError(peer.kind)
        extent = float(np.ptp(positions, axis=0).max())
        box = _BOX_STEP * float(np.ceil((extent + 2 * _PADDING) / _BOX_STEP))
    if peer.centre is not None:
        middle = 0.5 * (positions.min(axis=0) + positions.max(axis=0))
        positions = positions - middle + peer.centre * box
    return PosData(box * np.eye(3), positions)
