"""ASE moves the atoms, tumbaga serves the forces: 200 steps of Langevin dynamics of CuAu(H2O)2 over a unix socket.

    python examples/01_ase.py

The only line that a script of yours needs is the calculator; the server can as well run in another terminal:

    tumbaga serve -m painn:cuau-water -t cluster.xyz -u -a NAME
"""

import os
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np
from ase import units
from ase.calculators.socketio import SocketIOCalculator
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta

cluster = str(files("tumbaga.driver") / "data" / "cuau-water.xyz")
name = f"example-{os.getpid()}"

with tempfile.TemporaryDirectory() as folder:
    run = Path(folder) / "run"
    command = ["serve", "-m", "painn:cuau-water", "-t", cluster, "-u", "-a", name, "--no-learn", "--quiet", "--run-dir", str(run)]
    server = subprocess.Popen([sys.executable, "-m", "tumbaga.driver.cli", *command])
    try:
        atoms = read(cluster)
        with SocketIOCalculator(unixsocket=name) as calculator:
            atoms.calc = calculator
            generator = np.random.default_rng(0)
            thermalize_momenta(atoms, temperature_K=300, rng=generator)
            # fixcm=False: with the default, ASE overheats small clusters
            dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False, rng=generator)
            dynamics.attach(lambda: print(f"step {dynamics.nsteps:4d}  {atoms.get_potential_energy():10.4f} eV"), interval=50)
            dynamics.run(200)
    finally:
        server.terminate()
        server.wait(60)
