"""Engines that tumbaga starts itself: i-PI and ASE on a packaged example. Writes their input, knows how to start, stop and continue them."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tumbaga.driver import outputs
from tumbaga.driver.errors import EngineError
from tumbaga.driver.structures import read_frame
from tumbaga.online.records import Frame

FOLDER = "engine"
STARTED = f"{FOLDER}/started.json"  # when an engine was started last, and from which step it goes on
_BOX = 60.0  # Å: i-PI wants a cell; a cluster gets one that it never feels


@dataclass(frozen=True)
class Dynamics:
    """What an engine is asked to do: NVT Langevin dynamics.

    Attributes:
        steps: in all.
        temperature: K.
        timestep: fs.
        friction_time: fs, the Langevin time constant.
        seed: of velocities and noise.
        stride: steps between two lines of properties.
    """

    steps: int
    temperature: float = 300.0
    timestep: float = 0.5
    friction_time: float = 100.0
    seed: int = 0
    stride: int = 10


@dataclass(frozen=True)
class Progress:
    """Where an engine is, read from its output.

    Attributes:
        step: last one written.
        temperature: K, at that step; NaN before the first.
        mean_temperature: K, over the second half of the output.
        finite: whether every number of the output is finite.
    """

    step: int = 0
    temperature: float = math.nan
    mean_temperature: float = math.nan
    finite: bool = True


class Engine(Protocol):
    """An engine of a run.

    Attributes:
        name: for people.
        dynamics: what it is asked to do.
        done: steps of earlier starts, from which it goes on; known once it is prepared.
    """

    name: str
    dynamics: Dynamics
    done: int

    @property
    def address(self) -> str:
        """Where the gateway finds it, as `serve.connect` has it, relative to the run directory."""

    def prepare(self, run_dir: Path) -> list[str]:
        """Write what it needs into the run directory, continuing where an earlier start ended; return the command, to be run in FOLDER."""

    def finished(self, run_dir: Path) -> bool:
        """Whether earlier starts have done all steps; then there is nothing to prepare."""

    def progress(self, run_dir: Path) -> Progress:
        """Read how far it is."""

    def files(self, run_dir: Path) -> list[Path]:
        """Its output files, for the summary."""


class IPi:
    """i-PI with one unix socket in the run directory.

    Args:
        template: starting structure.
        dynamics: what to do.
    """

    name = "i-PI"

    def __init__(self, template: Frame, dynamics: Dynamics) -> None:
        self._template, self.dynamics, self.done = template, dynamics, 0
        self._properties = _Properties()

    @property
    def address(self) -> str:
        """A socket file in the engine's folder: nothing is left in /tmp."""
        return f"unix:./{FOLDER}/forces"

    def prepare(self, run_dir: Path) -> list[str]:
        """Write input.xml and init.xyz, or continue from RESTART or the newest checkpoint.

        Raises:
            EngineError: i-PI is not installed.
        """
        program = Path(sys.executable).parent / "i-pi"
        if not program.exists():
            raise EngineError("i-PI", f"there is no i-pi beside {sys.executable}; install it with: pip install ipi")
        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        # left behind by a killed i-PI: the next one would refuse to start, or stop at once
        for stale in ("forces", "EXIT"):
            (folder / stale).unlink(missing_ok=True)
        old = self._restart_file(folder)
        if old is not None:
            text = re.sub(r"<total_steps>[^<]*</total_steps>", f"<total_steps>{self.dynamics.steps}</total_steps>", old.read_text())
            (folder / "continue.xml").write_text(text)
            self.done = _step_of(old)
            outputs.cut_table(folder / "md.out", self.done)
            outputs.cut_xyz(folder / "md.pos_0.xyz", self.done)
            outputs.cut_extras(folder / "md.std_0", self.done)
            return [sys.executable, str(program), "-S", "./", "continue.xml"]
        (folder / "init.xyz").write_text(_ipi_xyz(self._template))
        (folder / "input.xml").write_text(_ipi_input(self.dynamics))
        return [sys.executable, str(program), "-S", "./", "input.xml"]

    def finished(self, run_dir: Path) -> bool:
        """Ask the restart file: i-PI refuses to start when nothing is left to do."""
        old = self._restart_file(run_dir / FOLDER)
        return old is not None and _step_of(old) >= self.dynamics.steps

    @staticmethod
    def _restart_file(folder: Path) -> Path | None:
        """The newest state of an earlier start: RESTART after an orderly stop, else the last whole checkpoint."""
        found = [*folder.glob("md.chk*"), *folder.glob("RESTART")]
        whole = [path for path in found if "</simulation>" in path.read_text()[-200:]]
        return max(whole, key=lambda path: (_step_of(path), path.stat().st_mtime), default=None)

    def progress(self, run_dir: Path) -> Progress:
        """Read the properties file."""
        return self._properties.progress(run_dir)

    def files(self, run_dir: Path) -> list[Path]:
        """Properties, positions, force uncertainty."""
        return sorted(p for p in (run_dir / FOLDER).glob("md.*") if ".chk" not in p.name)


class Ase:
    """ASE's Langevin dynamics with a SocketIOCalculator, in a process of its own.

    Args:
        template: path of the starting structure.
        dynamics: what to do.
        label: unique part of the socket's name: ASE puts it under /tmp/ipi_.
    """

    name = "ASE"

    def __init__(self, template: str, dynamics: Dynamics, label: str) -> None:
        self._template, self.dynamics, self._label, self.done = template, dynamics, label, 0
        self._properties = _Properties()

    @property
    def address(self) -> str:
        """ASE's unix sockets always begin with /tmp/ipi_."""
        return f"unix:/tmp/ipi_{self._label}"

    def prepare(self, run_dir: Path) -> list[str]:
        """Write the task of `tumbaga.driver.ase_engine`."""
        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        Path(f"/tmp/ipi_{self._label}").unlink(missing_ok=True)
        self.done = _last_frame(folder / "md.traj")
        if not self.done:
            (folder / "md.traj").unlink(missing_ok=True)
        outputs.cut_table(folder / "md.out", self.done or -1)
        d = self.dynamics
        task = {
            "done": self.done,
            "template": self._template,
            "socket": self._label,
            "steps": d.steps,
            "temperature": d.temperature,
            "timestep": d.timestep,
            "friction_time": d.friction_time,
            "seed": d.seed,
            "stride": d.stride,
        }
        (folder / "task.json").write_text(json.dumps(task, indent=1))
        return [sys.executable, "-m", "tumbaga.driver.ase_engine", "task.json"]

    def finished(self, run_dir: Path) -> bool:
        """Ask the properties file."""
        return self.progress(run_dir).step >= self.dynamics.steps

    def progress(self, run_dir: Path) -> Progress:
        """Read the properties file."""
        return self._properties.progress(run_dir)

    def files(self, run_dir: Path) -> list[Path]:
        """Properties and trajectory."""
        return sorted((run_dir / FOLDER).glob("md.*"))


def make(kind: str, run_dir: Path, template: str, dynamics: Dynamics) -> Engine:
    """Make an engine by name.

    Raises:
        EngineError: no such engine.
    """
    if kind == "ipi":
        return IPi(read_frame(template), dynamics)
    if kind == "ase":
        return Ase(template, dynamics, _label(run_dir))
    raise EngineError(kind, "is not an engine that tumbaga can start; choose ipi or ase")


def _label(run_dir: Path) -> str:
    import hashlib

    return f"tumbaga-{hashlib.sha256(str(run_dir).encode()).hexdigest()[:10]}"


def _last_frame(trajectory: Path) -> int:
    """The step of the last frame that an earlier start saved, 0 if it saved none."""
    from ase.io import read

    if not trajectory.exists() or not trajectory.stat().st_size:
        return 0
    return int(read(trajectory, index=-1).info.get("step", 0))


def _step_of(path: Path) -> int:
    found = re.search(r"<step>\s*(\d+)\s*</step>", path.read_text())
    return int(found.group(1)) if found else 0


class _Properties:
    """A properties file that grows: columns step, time, conserved, temperature, potential. Reads only what is new.

    Args:
        name: of the file in the engine's folder.
    """

    def __init__(self, name: str = "md.out") -> None:
        self._name = name
        self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self._step = 0
        self._temperatures = array("d")
        self._finite = True

    def progress(self, run_dir: Path) -> Progress:
        """Read on; what an engine wrote behind the state it goes on from was cut off, so no step stands twice."""
        with contextlib.suppress(OSError):
            self._read(run_dir / FOLDER / self._name)
        if not self._temperatures:
            return Progress()
        half = np.array(self._temperatures[len(self._temperatures) // 2 :])
        return Progress(self._step, self._temperatures[-1], float(half.mean()), self._finite)

    def _read(self, path: Path) -> None:
        if path.stat().st_size < self._offset:
            self._forget()  # cut, because the engine goes on from an earlier step
        with open(path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be on its way
        self._offset += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, OverflowError):  # a line that a killed engine left half written
                row = [float(x) for x in line.split()]
                if len(row) == 5:
                    self._step = int(row[0])
                    self._temperatures.append(row[3])
                    self._finite &= bool(np.isfinite(row).all())


def _ipi_xyz(frame: Frame) -> str:
    from ase.data import chemical_symbols

    head = f"# CELL(abcABC): {_BOX} {_BOX} {_BOX} 90.0 90.0 90.0  positions{{angstrom}} cell{{angstrom}}"
    centred = frame.positions - frame.positions.mean(axis=0) + _BOX / 2
    rows = [f"{chemical_symbols[z]} {x:.10f} {y:.10f} {w:.10f}" for z, (x, y, w) in zip(frame.numbers, centred, strict=True)]
    return "\n".join([str(len(frame)), head, *rows, ""])


def _ipi_input(d: Dynamics) -> str:
    return f"""<simulation verbosity='low' safe_stride='100'>
 <output prefix='md'>
  <properties stride='{d.stride}' filename='out'> [ step, time{{picosecond}}, conserved{{electronvolt}}, temperature{{kelvin}}, potential{{electronvolt}} ] </properties>
  <trajectory stride='{10 * d.stride}' filename='pos' format='xyz' cell_units='angstrom'> positions{{angstrom}} </trajectory>
  <trajectory stride='{10 * d.stride}' filename='std' extra_type='tumbaga_force_std'> extras </trajectory>
  <checkpoint stride='{100 * d.stride}' filename='chk' overwrite='true'/>
 </output>
 <total_steps>{d.steps}</total_steps>
 <prng><seed>{d.seed}</seed></prng>
 <ffsocket name='tumbaga' mode='unix' pbc='False'> <address>forces</address> <latency>1e-4</latency> <timeout>0</timeout> </ffsocket>
 <system>
  <initialize nbeads='1'>
   <file mode='xyz'> init.xyz </file>
   <velocities mode='thermal' units='kelvin'> {d.temperature} </velocities>
  </initialize>
  <forces> <force forcefield='tumbaga'/> </forces>
  <motion mode='dynamics'>
   <fixcom>True</fixcom>
   <dynamics mode='nvt'>
    <timestep units='femtosecond'> {d.timestep} </timestep>
    <thermostat mode='langevin'> <tau units='femtosecond'> {d.friction_time} </tau> </thermostat>
   </dynamics>
  </motion>
  <ensemble> <temperature units='kelvin'> {d.temperature} </temperature> </ensemble>
 </system>
</simulation>
"""


def installed() -> dict[str, bool]:
    """Which engines can be started here."""
    return {"ipi": (Path(sys.executable).parent / "i-pi").exists() or shutil.which("i-pi") is not None, "ase": True}
