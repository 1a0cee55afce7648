"""Real engines as processes of their own, and the server that answers them; in the end nothing of them is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.cluster import Icosahedron
from ase.io import write

from tumbaga.driver.testing import Program, until

BOX = 40.0  # Å: i-PI wants a cell; a cluster does not feel it
MODEL = "toy:lj?epsilon=0.05&sigma=2.2"
_NAMES = f"tumbaga-test-{os.getpid()}-"  # what the unix sockets of these tests are called
IPI = Path(sys.executable).parent / "i-pi"
_INPUT = """<simulation {attributes} verbosity='low' safe_stride='100000' floatformat='%25.17e'>
 <output prefix='md'> <properties stride='1' filename='out'> [ {properties} ] </properties> </output>
 <total_steps>{steps}</total_steps> <prng><seed>31415</seed></prng>
 {forcefield}
 <system>
  <initialize nbeads='{beads}'> <file mode='xyz'> init.xyz </file> <velocities mode='thermal' units='kelvin'> 300 </velocities> </initialize>
  <forces> <force forcefield='ff'/> </forces>
  {motion}
  <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
 </system>
</simulation>
"""
_LANGEVIN = """<motion mode='dynamics'> <dynamics mode='nvt'> <timestep units='femtosecond'> 0.5 </timestep>
   <thermostat mode='langevin'> <tau units='femtosecond'> 100 </tau> </thermostat> </dynamics> </motion>"""
# the same potential in i-PI's own process, with ASE's units: nothing of tumbaga's wire, server or units takes part
_IN_PROCESS = f"""
import ase.units as units
import numpy as np
from ipi.pes.dummy import Dummy_driver
from tumbaga.driver.backends import registry
from tumbaga.online.records import Frame

__DRIVER_NAME__, __DRIVER_CLASS__ = "custom", "InProcess"


class InProcess(Dummy_driver):
    def check_parameters(self):
        self.potential = registry.load({MODEL!r}, "cpu", "float64")

    def compute_structure(self, cell, pos):
        told = self.potential.predict([Frame(np.full(len(pos), 29), pos * units.Bohr)])[0]
        return told.energy / units.Ha, told.forces * units.Bohr / units.Ha, told.virial / units.Ha, ""
"""


def cluster() -> Atoms:
    """Thirteen atoms near their equilibrium."""
    made = Icosahedron("Cu", 2)
    return Atoms(made.symbols, made.positions)


def shaken_beads(beads: int) -> str:
    """The cluster once for each bead, each shaken in its own way, as i-PI reads it."""
    lines = []
    for bead in range(beads):
        atoms = cluster()
        atoms.rattle(0.02, seed=bead)
        lines += [str(len(atoms)), f"# CELL(abcABC): {BOX} {BOX} {BOX} 90.0 90.0 90.0  positions{{angstrom}} cell{{angstrom}}"]
        lines += [f"Cu {x:.12f} {y:.12f} {z:.12f}" for x, y, z in atoms.positions + BOX / 2]
    return "\n".join([*lines, ""])


class IPi:
    """One i-PI at work in a folder.

    Args:
        folder: new.
        forcefield: its element of the input, named ff.
        beads: of the ring polymers.
        steps: to do.
        frames: init.xyz; None for the cluster.
        properties: to write each step; None for energies, virial and every force.
        motion: element of the input.
        options: of the command.
        attributes: of the input's root.
    """

    def __init__(
        self,
        folder: Path,
        forcefield: str,
        beads: int = 1,
        steps: int = 30,
        *,
        frames: str | None = None,
        properties: str | None = None,
        motion: str = _LANGEVIN,
        options: Sequence[str] = (),
        attributes: str = "",
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        every = [f"atom_f({atom};{bead})" for atom in range(len(cluster())) for bead in range(beads)]
        told = properties or ", ".join(["step", "conserved", "potential", "virial_md", *every])
        (folder / "init.xyz").write_text(frames or shaken_beads(beads))
        (folder / "in_process.py").write_text(_IN_PROCESS)
        (folder / "input.xml").write_text(
            _INPUT.format(attributes=attributes, properties=told, steps=steps, forcefield=forcefield, beads=beads, motion=motion)
        )
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(IPI), *options, "input.xml"],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def __repr__(self) -> str:
        return f"<i-PI {self.folder.name}>"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def finished(self, seconds: float = 60.0) -> str:
        """Wait for its end, which must be a success, and return what it has written, every digit of it."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self} has not ended within {seconds:g} s:\n{self.log[-2000:]}") from None
        assert code == 0, self.log[-2000:]
        assert "I-PI reports success" in self.log, self.log[-2000:]
        assert "Traceback" not in self.log, self.log[-2000:]
        assert "died or got unresponsive" not in self.log, self.log[-2000:]
        return (self.folder / "md.out").read_text()

    def table(self) -> np.ndarray:
        """What it has written, one row a step."""
        return np.loadtxt(self.folder / "md.out", ndmin=2)

    def close(self) -> None:
        """End it, so that it can remove its socket and its memory; if it does not, kill it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def forcefield(mode: str, address: str, *, batch: int = 1, classic: bool = False, parameters: str = "") -> str:
    """The element of i-PI's input for a socket; `address` is the name of a unix socket, or a port."""
    where = f"<address>127.0.0.1</address> <port>{address}</port>" if mode == "inet" else f"<address>{address}</address>"
    told = f"<parameters>{{{parameters}}}</parameters>" if parameters else ""
    return (
        f"<ffsocket name='ff' mode='{mode}' pbc='False'> {where} {told} <latency>1e-4</latency> <timeout>0</timeout> "
        f"<batch_size>{batch}</batch_size> <consolidate_messages>{not classic}</consolidate_messages> </ffsocket>"
    )


@pytest.fixture(scope="session")
def socket_element() -> Callable[..., str]:
    """See `forcefield`."""
    return forcefield


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], IPi]:
    """i-PI with the potential in its own process, of so many beads and steps: what every run through a socket must reproduce."""
    made: dict[tuple[int, int], IPi] = {}

    def run(beads: int, steps: int) -> IPi:
        if (beads, steps) not in made:
            element = "<ffdirect name='ff'> <pes>custom</pes> <pes_path>in_process.py</pes_path> </ffdirect>"
            made[beads, steps] = IPi(tmp_path_factory.mktemp("direct") / "run", element, beads, steps)
            made[beads, steps].finished()
        return made[beads, steps]

    return run


@pytest.fixture
def ipi(tmp_path: Path) -> Iterator[Callable[..., IPi]]:
    """Start an i-PI; see `IPi`. In the end all of them are gone, with their sockets and their memory."""
    runs: list[IPi] = []

    def begin(*arguments: Any, **options: Any) -> IPi:
        runs.append(IPi(tmp_path / f"ipi-{len(runs)}", *arguments, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()
    left = [str(path) for run in runs for path in Path("/dev/shm").glob(f"ipi_shm_{run.process.pid}_*")]
    assert left + [str(path) for path in Path("/tmp").glob(f"ipi_{_NAMES}*")] == []


@pytest.fixture
def unix_name() -> Callable[[], str]:
    """Make names of unix sockets that nobody else uses."""
    return lambda: f"{_NAMES}{uuid.uuid4().hex[:12]}"


@pytest.fixture
def free_port() -> Callable[[], str]:
    """Make numbers of tcp ports that nobody listens at; each is given once."""
    given: set[int] = set()

    def make() -> str:
        while True:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            if port not in given:
                given.add(port)
                return str(port)

    return make


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start `tumbaga serve` with the potential of these tests; in the end it has left nothing behind."""
    programs: list[Program] = []
    write(tmp_path / "cluster.xyz", cluster())

    def begin(*arguments: str, template: Path | None = tmp_path / "cluster.xyz", model: str = MODEL) -> Program:
        told = ["-t", str(template)] if template is not None else []
        number = len(programs)
        command = ("serve", "-m", model, *told, "--no-learn", "--quiet", *arguments)
        programs.append(Program(tmp_path / f"run-{number}", *command, scratch=tmp_path / f"temporary-{number}"))
        return programs[-1]

    yield begin
    for program in programs:
        program.close()
    for program in programs:
        until(lambda program=program: not program.left_behind(), 10.0, f"{program} to leave nothing behind: {program.left_behind()}")
