"""Real i-PI in every dialect that it has, answered by the wire alone and by the whole server.

Precision: i-PI writes 17 digits if told so (`floatformat`), of all forces on all beads at every step. The reference is i-PI itself with the
same potential in its own process (`ffdirect`), so that i-PI's digits and units are the same on both sides: a force that differs in the last
digit moves the atoms elsewhere, and every later row shows it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from tumbaga.driver import structures
from tumbaga.driver.backends import registry
from tumbaga.driver.testing import until
from tumbaga.online.records import Frame
from tumbaga.socket_protocol.errors import NotYetError
from tumbaga.socket_protocol.events import ForceReady, PosData
from tumbaga.socket_protocol.streams import Address, Stream
from tumbaga.socket_protocol.testing import BlockingDriver, connect

MODEL = "toy:lj?epsilon=0.05&sigma=2.2"
SAME = 1e-10  # relative to the largest force: two changes of units, and sums in another order
STEPS = 24
TIMEOUT = 60.0


@dataclass(frozen=True)
class Case:
    """One way in which i-PI can ask."""

    mode: str
    beads: int = 1
    batch: int = 1
    classic: bool = False

    @property
    def frames(self) -> int:
        """Distinct configurations of the whole run."""
        return (STEPS + 1) * self.beads


def every(beads: Iterable[int] = (1, 8)) -> list[Case]:
    """Every combination that i-PI supports: batches are for fused messages only."""
    fused = [Case(*told) for told in itertools.product(("unix", "inet", "shm"), beads, (1, 8))]
    return fused + [Case(mode, count, classic=True) for mode, count in itertools.product(("unix", "inet", "shm"), beads)]


def check_against(reference: Any, run: Any) -> None:
    """Steps, energies, virial and all forces are those of i-PI with the potential in its own process."""
    got, expected = run.table(), reference.table()
    assert got.shape == expected.shape, run
    for columns in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 9), slice(9, None)):
        scale = np.abs(expected[:, columns]).max()
        np.testing.assert_allclose(got[:, columns], expected[:, columns], rtol=0, atol=SAME * scale, err_msg=str(run))


# -- the wire alone --------------------------------------------------------------------------------------------------------------------


def lennard_jones(frame: PosData) -> ForceReady:
    told = registry.load(MODEL, "cpu", "float64").predict([Frame(np.full(len(frame.positions), 29), frame.positions * ase.units.Bohr)])[0]
    return ForceReady(told.energy / ase.units.Ha, told.forces * ase.units.Bohr / ase.units.Ha, told.virial / ase.units.Ha)


class Answering:
    """A minimal driver in a thread, which dials until the engine is there."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self.driver: BlockingDriver | None = None
        self._thread = threading.Thread(target=self._serve, name=f"driver of {address}")
        self._thread.start()

    def _dial(self) -> Stream | None:
        try:
            return connect(self._address, TIMEOUT)
        except NotYetError:
            return None

    def _serve(self) -> None:
        self.driver = BlockingDriver(until(self._dial, TIMEOUT, "i-PI to listen"), lennard_jones, timeout=TIMEOUT)
        self.driver.serve()

    def joined(self) -> BlockingDriver:
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        assert self.driver is not None
        return self.driver


@pytest.mark.slow
def test_every_dialect_reaches_our_wire_and_moves_the_atoms_alike(
    ipi: Callable[..., Any],
    in_process: Callable[[int, int], Any],
    socket_element: Callable[..., str],
    unix_name: Callable[[], str],
    free_port: Callable[[], str],
) -> None:
    """Single, batched, padded and shared-memory frames, fused and one by one: the same trajectory to the last digit, each frame once."""
    cases = [Case("unix", 8, 8), Case("inet", 1, 1, classic=True), Case("shm", 8, 8), Case("shm", 1, 8)]
    runs, drivers = [], []
    for case in cases:
        name = free_port() if case.mode == "inet" else unix_name()
        runs.append(ipi(socket_element(case.mode, name, batch=case.batch, classic=case.classic), case.beads, STEPS))
        drivers.append(Answering(Address.tcp("127.0.0.1", int(name)) if case.mode == "inet" else Address.unix(name)))
    for case, run, driver in zip(cases, runs, drivers, strict=True):
        run.finished()
        check_against(in_process(case.beads, STEPS), run)
        assert driver.joined().frames == case.frames, case


# -- the server ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connections", "cases"),
    # with more connections than messages at a time the rest has nothing to do, which one case of a single bead shows
    [(1, every()), (2, [Case("unix", 8), Case("inet", 8, classic=True)]), (4, [Case("unix", 1), *every(beads=(8,))])],
    ids=["1", "2", "4"],
)
def test_ipi_moves_as_with_the_potential_in_its_own_process_in_every_dialect(
    connections: int,
    cases: list[Case],
    ipi: Callable[..., Any],
    serve: Callable[..., Any],
    in_process: Callable[[int, int], Any],
    socket_element: Callable[..., str],
    unix_name: Callable[[], str],
    free_port: Callable[[], str],
) -> None:
    """All at once, on one server: unix, tcp and shared memory, 1 and 8 beads, batches of 1 and 8, fused and one by one."""
    runs, addresses = [], []
    for case in cases:
        name = free_port() if case.mode == "inet" else unix_name()
        addresses += ["--connect", f"tcp:127.0.0.1:{name}" if case.mode == "inet" else f"unix:{name}"]
        runs.append(ipi(socket_element(case.mode, name, batch=case.batch, classic=case.classic), case.beads, STEPS))
    server = serve(*addresses, "--connections", str(connections))
    texts: dict[int, set[str]] = {}
    for case, run in zip(cases, runs, strict=True):
        texts.setdefault(case.beads, set()).add(run.finished())
        check_against(in_process(case.beads, STEPS), run)
    frames = sum(case.frames for case in cases)
    server.until(lambda status: status["frames"] >= frames, "all frames to be counted", 10.0)
    assert server.stop() == 0, server.output
    assert [len(different) for different in texts.values()] == [1] * len(texts)  # to the last digit
    assert server.status()["frames"] == frames  # padding is not computed
    assert server.status()["errors"] == []
    sessions = server.status()["sessions"]
    assert len(sessions) == connections * len(cases)
    # several messages at a time are there in fused mode only, and with more beads than one message takes
    spread = sum(case.beads > case.batch and not case.classic for case in cases)
    assert sum(session["forces"] > 0 for session in sessions) >= len(cases) + (connections - 1) * spread


@pytest.mark.slow
def test_a_short_batch_is_padded_by_ipi_and_its_frames_are_computed_once(
    ipi: Callable[..., Any], serve: Callable[..., Any], socket_element: Callable[..., str], unix_name: Callable[[], str]
) -> None:
    """Six beads in batches of four: what i-PI repeats to fill the second batch is not computed again, and nothing else changes."""
    padded, single = unix_name(), unix_name()
    runs = [ipi(socket_element("unix", padded, batch=4), 6, STEPS), ipi(socket_element("unix", single), 6, STEPS)]
    server = serve("--connect", f"unix:{padded}", "--connect", f"unix:{single}")
    assert runs[0].finished() == runs[1].finished()
    assert server.stop() == 0
    assert server.status()["frames"] == 2 * 6 * (STEPS + 1)
    assert server.status()["force_calls"] == (2 + 6) * (STEPS + 1)  # two messages a step, and six


@pytest.mark.slow
def test_ipi_comes_back_to_the_same_address_and_the_server_is_still_there(
    ipi: Callable[..., Any],
    serve: Callable[..., Any],
    in_process: Callable[[int, int], Any],
    socket_element: Callable[..., str],
    unix_name: Callable[[], str],
    free_port: Callable[[], str],
) -> None:
    """Another i-PI at the address of one that has ended, in another dialect even, is served like the first."""
    name, port = unix_name(), free_port()
    server = serve("--connect", f"unix:{name}", "--connect", f"tcp:127.0.0.1:{port}")
    for mode, batch in (("unix", 1), ("shm", 8)):
        runs = [ipi(socket_element(mode, name, batch=batch), 1, STEPS), ipi(socket_element("inet", port, batch=batch), 1, STEPS)]
        for run in runs:
            run.finished()
            check_against(in_process(1, STEPS), run)
    assert server.stop() == 0, server.output
    assert server.status()["frames"] == 4 * (STEPS + 1)
    assert server.status()["errors"] == []


@pytest.mark.slow
def test_two_servers_share_the_beads_of_one_ipi_and_each_has_another_of_its_own(
    ipi: Callable[..., Any],
    serve: Callable[..., Any],
    in_process: Callable[[int, int], Any],
    socket_element: Callable[..., str],
    unix_name: Callable[[], str],
) -> None:
    """Who computes which bead makes no difference to the trajectory, and no server hears of the other's engine."""
    shared, own = unix_name(), [unix_name(), unix_name()]
    together = ipi(socket_element("unix", shared), 8, STEPS)
    alone = [ipi(socket_element("unix", name), 1, STEPS) for name in own]
    servers = [serve("--connect", f"unix:{shared}", "--connect", f"unix:{name}") for name in own]
    together.finished()
    check_against(in_process(8, STEPS), together)
    for run in alone:
        run.finished()
        check_against(in_process(1, STEPS), run)
    for server in servers:
        assert server.stop() == 0
    counts = [[session["forces"] for session in server.status()["sessions"]] for server in servers]
    assert sum(count[0] for count in counts) == 8 * (STEPS + 1)
    assert [count[1] for count in counts] == [STEPS + 1] * 2


@pytest.mark.slow
@pytest.mark.parametrize("how", ["option", "attribute"])
def test_another_prefix_of_the_socket(
    how: str,
    ipi: Callable[..., Any],
    serve: Callable[..., Any],
    in_process: Callable[[int, int], Any],
    socket_element: Callable[..., str],
    tmp_path: Path,
) -> None:
    """`i-pi -S` and `sockets_prefix` in i-PI's input go with the server's -S; the atoms can be told in INIT instead of by a template."""
    prefix = f"{tmp_path}/p_"
    told: dict[str, Any] = {"options": ("-S", prefix)} if how == "option" else {"attributes": f"sockets_prefix='{prefix}'"}
    run = ipi(socket_element("unix", "x", parameters="species: Cu13"), 1, STEPS, **told)
    server = serve("-u", "-a", "x", "-S", prefix, template=None)
    run.finished()
    check_against(in_process(1, STEPS), run)
    assert server.stop() == 0
    assert list(tmp_path.glob("p_*")) == []


# -- virial and cell -------------------------------------------------------------------------------------------------------------------

CELL = np.array([[14.0, 0.0, 0.0], [2.3, 13.1, 0.0], [-1.7, 1.2, 15.2]])  # Bohr, lattice vectors as rows
STRAIN = 1e-4
INDICES = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))  # i-PI's order


def skewed() -> Atoms:
    """Seven atoms in a cell without any symmetry, no two of them near half a lattice vector apart, Å."""
    inside = np.array([[0, 0, 0], [4, 1, 1], [1, 4, 2], [3, 4, 6], [7, 2, 4], [5, 7, 3], [2, 8, 7]]) / 9 + 0.03 * np.sin(
        np.arange(21)
    ).reshape(7, 3)
    return Atoms("Cu7", inside @ CELL * ase.units.Bohr, cell=CELL * ase.units.Bohr, pbc=True)


def strained_frames() -> str:
    """The crystal as it is, and strained by one element of the upper triangle at a time, so that i-PI need not turn it; in Bohr."""
    lines = []
    strains = [np.zeros((3, 3))]
    for i, j in INDICES:
        for sign in (1, -1):
            strains.append(np.zeros((3, 3)))
            strains[-1][i, j] = sign * STRAIN
    for strain in strains:
        deformed = np.eye(3) + strain
        h, positions = deformed @ CELL.T, (skewed().positions / ase.units.Bohr) @ deformed.T
        lines += [
            str(len(positions)),
            f"# CELL{{H}}: {' '.join(f'{x:.17g}' for x in h.ravel())} positions{{atomic_unit}} cell{{atomic_unit}}",
        ]
        lines += [f"Cu {x:.17g} {y:.17g} {z:.17g}" for x, y, z in positions]
    return "\n".join([*lines, ""])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "batch"), [("unix", 1), ("unix", 2), ("shm", 1)])
def test_the_virial_that_ipi_gets_is_minus_the_strain_derivative_of_the_energy_that_it_gets(
    mode: str,
    batch: int,
    ipi: Callable[..., Any],
    serve: Callable[..., Any],
    socket_element: Callable[..., str],
    unix_name: Callable[[], str],
    tmp_path: Path,
) -> None:
    """Sign of the virial, order of the cell and units of both, by central differences through i-PI on a triclinic crystal."""
    write(tmp_path / "skewed.xyz", skewed())
    frames, name = strained_frames(), unix_name()
    (tmp_path / "frames.xyz").write_text(frames)
    motion = f"<motion mode='replay'> <file mode='xyz'> {tmp_path}/frames.xyz </file> </motion>"
    first = "\n".join([*frames.splitlines()[:9], ""])
    run = ipi(socket_element(mode, name, batch=batch), 1, 13, frames=first, properties="step, potential, volume, virial_md", motion=motion)
    serve("-u", "-a", name, template=tmp_path / "skewed.xyz", model=MODEL.replace("2.2", "2.9"))
    run.finished()
    rows = run.table()[1:14]  # the first row is the structure that i-PI starts from, which is the first frame as well
    energies, volume, told = rows[:, 1], rows[0, 2], rows[0, 3:9]
    measured = -(energies[1::2] - energies[2::2]) / (2 * STRAIN) / volume
    alone = registry.load(MODEL.replace("2.2", "2.9"), "cpu", "float64").predict([structures.from_atoms(skewed())])[0]
    expected = np.array([alone.virial[i, j] for i, j in INDICES]) / ase.units.Ha / volume

    assert volume == pytest.approx(np.linalg.det(CELL))
    assert np.abs(expected).min() > 0.02 * np.abs(expected).max()  # every element is put to the test
    np.testing.assert_allclose(told, expected, rtol=0, atol=SAME * np.abs(expected).max())
    np.testing.assert_allclose(measured, told, rtol=0, atol=1e-6 * np.abs(told).max())
