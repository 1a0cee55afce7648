"""The ASE engine of `tumbaga run --engine ase`: Langevin dynamics whose forces come over a socket, as in any user's script."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(task_file: str) -> None:
    """Run the task: read it, wait for a driver on the socket, integrate, write properties and trajectory.

    A run that was stopped goes on from its last saved frame with the velocities it had; the noise then is another one.
    """
    from ase import units
    from ase.calculators.socketio import SocketIOCalculator
    from ase.io import Trajectory
    from ase.md.langevin import Langevin

    task: dict[str, Any] = json.loads(Path(task_file).read_text())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    atoms, done = _start(task), int(task["done"])
    generator = np.random.default_rng([task["seed"], done])
    with SocketIOCalculator(unixsocket=task["socket"]) as calculator, open("md.out", "a", buffering=1) as out:
        atoms.calc = calculator
        # fixcm would heat a small cluster far above its temperature
        dynamics = Langevin(
            atoms,
            task["timestep"] * units.fs,
            temperature_K=task["temperature"],
            friction=1.0 / (task["friction_time"] * units.fs),
            fixcm=False,
            rng=generator,
        )
        dynamics.nsteps = done
        trajectory = Trajectory("md.traj", "a", atoms)
        saved_at = 10 * task["stride"]

        def write() -> None:
            step = dynamics.nsteps
            potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
            kelvin = kinetic / (1.5 * len(atoms) * units.kB)
            row = f"{step:10d} {step * task['timestep'] / 1000:.6e} {potential + kinetic:.10e} {kelvin:.6e} {potential:.10e}\n"
            out.write(row)
            if step % saved_at == 0:
                atoms.info["step"] = step
                trajectory.write()

        dynamics.attach(write, interval=task["stride"])
        dynamics.run(max(0, task["steps"] - done))


def _start(task: dict[str, Any]) -> Any:
    from ase.io import read
    from ase.md.velocitydistribution import thermalize_momenta

    if task["done"]:
        return read("md.traj", index=-1)
    atoms = read(task["template"])
    thermalize_momenta(atoms, temperature_K=task["temperature"], rng=np.random.default_rng(task["seed"]))
    return atoms


if __name__ == "__main__":
    main(sys.argv[1])
