"""One run: Langevin dynamics at 300 K of the atoms in a file. Plain ASE; nothing here knows who answers at the socket.

    python engine.py SOCKET FILE STEPS SEED

Writes a line of JSON every few steps, and ends when nobody reads them any more.
"""

import json
import signal
import sys
import time

import numpy as np
from ase import units
from ase.calculators.socketio import SocketIOCalculator
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta

INTERVAL = 10  # steps between lines

# ASE removes the file of its socket only when the `with` block ends, so a signal has to end it
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))

name, file, steps, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
atoms = read(file)
generator = np.random.default_rng(seed)

with SocketIOCalculator(unixsocket=name) as calc:
    atoms.calc = calc
    atoms.get_forces()  # waits for the server
    thermalize_momenta(atoms, temperature_K=300, rng=generator)
    # fixcm=False: with the default, ASE overheats small clusters
    dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False, rng=generator)
    began = time.perf_counter()

    def tell() -> None:
        line = {"step": dynamics.nsteps, "seconds": time.perf_counter() - began, "temperature": float(atoms.get_temperature())}
        print(json.dumps(line), flush=True)

    dynamics.attach(tell, interval=INTERVAL)
    dynamics.run(steps)
