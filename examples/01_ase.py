"""ASE moves the atoms, tumbaga serves the forces: 200 steps of Langevin dynamics of CuAu(H2O)2, with a server that ends with the script.

    python examples/01_ase.py

`serve` starts `tumbaga serve` beside the script and returns ASE's own SocketIOCalculator, connected to it. With learn=True (the default)
uncertain frames are labelled by PySCF and learnt from while the dynamics goes on; what was learnt stays in the run directory.

The server can as well run in another terminal, or on after the script. Then the script is plain ASE,

    with SocketIOCalculator(unixsocket="NAME") as calc:

and beside it: tumbaga serve -m painn:cuau-water -t cluster.xyz -u -a NAME
"""

from importlib.resources import files

import numpy as np
from ase import units
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta

from tumbaga.driver.serving import serve

atoms = read(str(files("tumbaga.driver") / "data" / "cuau-water.xyz"))

with serve(atoms, model="painn:cuau-water", learn=False) as calc:
    atoms.calc = calc
    generator = np.random.default_rng(0)
    thermalize_momenta(atoms, temperature_K=300, rng=generator)
    # fixcm=False: with the default, ASE overheats small clusters
    dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False, rng=generator)

    def show() -> None:
        energy = atoms.get_potential_energy()
        print(f"step {dynamics.nsteps:4d}  {energy:10.4f} eV  ±{calc.results['force_std']:.2f} eV/Å  version {calc.results['version']}")

    dynamics.attach(show, interval=50)
    dynamics.run(200)

print(f"force calls: {calc.status()['force_calls']}; run directory: {calc.run_dir}")
