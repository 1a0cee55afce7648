"""An ASE socket calculator that brings its server along: the process, the connection, and what to say when one of them is gone.

ASE listens, the server dials. A calculator of ASE is dead once its connection is (it accepts no second one), so whatever ends the
connection becomes one exception that says why and where to look.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import CalculationFailed, PropertyNotImplementedError, all_changes
from ase.calculators.socketio import SocketIOCalculator, SocketServer, actualunixsocketname
from ase.outputs import all_outputs

from tumbaga.driver.answers import UNKNOWN_STD
from tumbaga.driver.errors import ConfigError, DriverError, RunDirError
from tumbaga.driver.process import LOGS
from tumbaga.driver.rundir import RunDir
from tumbaga.online.records import Frame

LOG = "serve.out"
_LOOK_S = 0.1  # between two looks at a server that has not dialled yet
_STOP_S = 60.0  # for an orderly stop; then the server is killed
_REASON_S = 20.0  # a reason stands in the status at most so long after the connection ended, also where the machine is busy
_LAST_LINES = 6  # of its output, where it has no complaint of its own to tell


class ServingError(DriverError, CalculationFailed):  # type: ignore[misc] # ASE has no types
    """The server of a script did not start or no longer answers."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return self.problem


class ServedCalculator(SocketIOCalculator):  # type: ignore[misc] # ASE has no types
    """Energy, forces and stress from a server that lives as long as this object; made by `tumbaga.driver.serving.serve`.

    Results are ASE's `energy`, `free_energy`, `forces`, `stress` (where periodic), and from the extras `force_std` (eV/Å, NaN where not
    known), `force_std_atom` and `version`.

    Args:
        frame: species and periodicity of all atoms to come.
        run_dir: with the settings of the server in it.
        timeout: seconds for the server to start and dial.

    Raises:
        ServingError: the server ended or did not dial; the message holds its last lines.
    """

    implemented_properties = [*SocketIOCalculator.implemented_properties, "force_std", "force_std_atom", "energy_std", "version"]  # noqa: RUF012
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(self, frame: Frame, run_dir: Path, timeout: float) -> None:
        self.run_dir = run_dir
        self._frame, self._lost = frame, ""
        name = f"tumbaga-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._socket = Path(actualunixsocketname(name))
        self._log = run_dir / LOGS / LOG
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        try:
            # before there is a socket: a script that is killed leaves its file to this process, which may dial too early and dials again
            self._process, released = _started(run_dir, self._socket, self._log)
            # also at the end of the interpreter, and when nobody holds the calculator any more
            self._end = weakref.finalize(self, _stop, self._process, released, os.getpid())
            super().__init__(unixsocket=name)
            self._await_server(time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<ServedCalculator {self.run_dir}: {'runs' if self._process.poll() is None else 'ended'}>"

    def launch_server(self) -> Any:
        """ASE's hook: how it listens."""
        return self.closelater(_Door(unixsocket=self._unixsocket))

    def _await_server(self, deadline: float) -> None:
        while not select.select([self.server.serversocket], [], [], _LOOK_S)[0]:
            if self._process.poll() is not None:
                raise ServingError(f"the server did not start: {self._last_lines()}\n(all of it: {self._log})")
            if time.monotonic() > deadline:
                raise ServingError(f"the server has not connected in time: {self._last_lines()}\n(look at {self.run_dir / LOGS})")
        self.server.accept()

    def status(self) -> dict[str, Any]:
        """What `tumbaga status --json` says of the run.

        Raises:
            RunDirError: there is none yet.
        """
        return RunDir(self.run_dir).read_status()

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        """Have the server evaluate the atoms; ASE calls this when its cached results do not hold any more.

        Raises:
            ConfigError: other species or periodicity than the server was started with.
            ServingError: the server cannot answer, or has not been able to before; the message says why.
        """
        if self.server is None:
            raise ServingError(f"the server was stopped; serve(atoms, run_dir={str(self.run_dir)!r}) goes on from there")
        if self._lost:
            raise ServingError(self._lost)
        self._check_same(atoms)
        if "stress" in properties and not self._frame.periodic:
            raise PropertyNotImplementedError("there is no stress: the atoms are not periodic (pbc is False in all directions)")
        try:
            super().calculate(atoms, properties, system_changes)
        except (OSError, AssertionError) as error:  # what ASE makes of a closed connection, depending on where it was
            self._lost = self._what_happened()
            raise ServingError(self._lost) from error
        except BaseException:
            self._lost = "a call was interrupted, so the connection is out of step; start another server"
            raise
        self.results |= _told(self.results.pop("morebytes"))

    def close(self) -> None:
        """Hang up and stop the server in order; labels under way wait in the run directory. Can be called twice."""
        try:
            super().close()
        finally:
            if hasattr(self, "_end"):
                self._end()
            self._socket.unlink(missing_ok=True)

    def export_properties(self) -> Any:
        """What ASE knows of the results, in its own type, which has no place for an uncertainty."""
        from ase.outputs import Properties

        return Properties({name: value for name, value in self.results.items() if name in all_outputs})

    def _check_same(self, atoms: Any) -> None:
        if not np.array_equal(atoms.numbers, self._frame.numbers):
            raise ConfigError("atoms", "have other species, or another order, than those that the server was started with; start another")
        if set(atoms.pbc.tolist()) != {self._frame.periodic}:
            raise ConfigError("atoms", "have another pbc than those that the server was started with; start another")

    def _what_happened(self) -> str:
        where = f"look at {self.run_dir / LOGS}; serve(atoms, run_dir={str(self.run_dir)!r}) goes on from there"
        return f"the server no longer answers: {self._reason()}; {where}"

    def _reason(self) -> str:
        deadline = time.monotonic() + _REASON_S
        while time.monotonic() < deadline:
            ended = self._process.poll()  # before the status is read, which may be written between the two
            with contextlib.suppress(RunDirError):
                for sentence in reversed(self.status().get("errors", [])):
                    if str(self._socket) in sentence:
                        return str(sentence)
            if ended is not None:
                return f"it has ended with code {ended}"
            time.sleep(_LOOK_S)
        return "it closed the connection without a word"

    def _last_lines(self) -> str:
        try:
            said = self._log.read_bytes()[self._log_start :].decode(errors="replace")
        except OSError:
            said = ""
        lines = said.split("\nfiles\n")[0].strip().splitlines()  # what went wrong stands above the list of files
        complaints = [line.strip().removeprefix("! ") for line in lines if line.strip().startswith("! ")]
        return "\n".join(complaints or lines[-_LAST_LINES:]) or "(it said nothing)"


class _Door(SocketServer):  # type: ignore[misc] # ASE has no types
    """ASE's listening end, whose file is gone as soon as the one connection that ASE takes is there: a kill leaves nothing behind."""

    def accept(self) -> None:
        """Take the connection that waits."""
        self._accept()
        Path(actualunixsocketname(self.unixsocket)).unlink(missing_ok=True)

    def calculate(self, atoms: Any) -> Any:
        """Ask for the forces; a cell in which nothing repeats is not sent, or the atoms of a wide cluster would be taken to be folded."""
        if atoms.pbc.any():
            return super().calculate(atoms)
        bare = atoms.copy()
        bare.cell = None
        return super().calculate(bare)

    def close(self) -> None:
        """Close, and do not mind that the file is gone."""
        with contextlib.suppress(FileNotFoundError):
            super().close()
        self._closed, self.protocol = True, None


# -- the process -----------------------------------------------------------------------------------------------------------------------


def _started(run_dir: Path, socket: Path, log: Path) -> tuple[subprocess.Popen[bytes], threading.Event]:
    """Start the server on a thread that lives as long as it does: the tether pulls when the *thread* that started a process ends."""
    command = [sys.executable, "-m", "tumbaga.driver.attached", str(os.getpid()), str(socket)]
    command += ["serve", "--run-dir", str(run_dir), "--connect", f"unix:{socket}", "--quiet"]
    log.parent.mkdir(exist_ok=True)
    made: list[subprocess.Popen[bytes]] = []
    faults: list[OSError] = []
    there, released = threading.Event(), threading.Event()

    def keep() -> None:
        try:
            with open(log, "ab") as out:
                # a session of its own: Ctrl-C is for the script, which then stops the server in order
                made.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True))
        except OSError as error:
            faults.append(error)
        there.set()
        if made:
            released.wait()

    threading.Thread(target=keep, name="tumbaga-server", daemon=True).start()
    there.wait()
    if faults:
        raise ServingError(f"the server could not be started: {faults[0]}") from faults[0]
    return made[0], released


def _stop(process: subprocess.Popen[bytes], released: threading.Event, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the script ends, not the script
    try:
        process.terminate()
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
    except BaseException:  # a second Ctrl-C: its processes leave by themselves when it is gone
        process.send_signal(signal.SIGKILL)
        raise
    finally:
        process.wait()
        released.set()


def _told(extras: Any) -> dict[str, Any]:
    """What the extras of an answer say, as results."""
    told = json.loads(np.asarray(extras).tobytes() or b"{}").get("tumbaga", {})
    std, of_energy = (float(told.get(name, UNKNOWN_STD)) for name in ("force_std", "energy_std"))
    return {
        "force_std": std if std < UNKNOWN_STD else float("nan"),
        "energy_std": of_energy if of_energy < UNKNOWN_STD else float("nan"),
        "force_std_atom": int(told.get("force_std_atom", -1)),
        "version": str(told.get("version", "")),
    }
