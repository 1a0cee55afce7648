"""The potential in the process of the script, without a server: relax CuAu(H2O)2, then shake it and see where the potential is unsure.

    python examples/03_ase_calculator.py [RUN]

With a run directory, the newest version that the run has learnt is used; the run may still go on.
"""

import sys
from importlib.resources import files

from ase.io import read
from ase.optimize import BFGS

from tumbaga.driver.calculator import Tumbaga

atoms = read(str(files("tumbaga.driver") / "data" / "cuau-water.xyz"))
calc = Tumbaga(run=sys.argv[1]) if len(sys.argv) > 1 else Tumbaga(model="painn:cuau-water")
atoms.calc = calc

with BFGS(atoms, logfile=None) as relaxation:
    relaxation.run(fmax=0.02, steps=300)
print(f"version {calc.version}: relaxed in {relaxation.nsteps} steps to {atoms.get_potential_energy():.4f} eV")

for width in (0.0, 0.05, 0.1, 0.2):
    shaken = atoms.copy()
    shaken.rattle(width, seed=0)
    exact = calc.get_property("force_stds", shaken)  # of each atom; asked for, because it costs more than the forces
    estimate = calc.results["force_std"]  # comes with every evaluation
    worst = int(exact.argmax())
    print(f"shaken by {width:.2f} Å: ±{exact[worst]:.2f} eV/Å on atom {worst} ({shaken.symbols[worst]}), estimated ±{estimate:.2f} eV/Å")
