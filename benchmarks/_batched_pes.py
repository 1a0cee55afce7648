"""A potential for i-pi-driver-py that evaluates all structures of a message as one batch: `i-pi-driver-py -m custom -P _batched_pes.py -o ...`

What an i-PI user can do without a server: the same back end, in the process that holds the socket, and nothing beside forces. As i-PI's own batched
potentials do, it takes lists of cells and positions.
"""

from __future__ import annotations

from ipi.pes.dummy import Dummy_driver

from tumbaga.driver import structures, units
from tumbaga.driver.backends import registry
from tumbaga.online.records import Array, Frame

__DRIVER_NAME__ = "tumbaga_batched"
__DRIVER_CLASS__ = "Batched"

Said = tuple[float, Array, Array, str]  # energy, forces, virial as i-PI has them, extras


class Batched(Dummy_driver):
    """A cluster that lies whole in its box; the cell is not looked at.

    Args:
        template: file with the atoms.
        model: name of the potential.
    """

    def __init__(self, template: str, model: str, *args: object, **kwargs: object) -> None:
        self._numbers = structures.read_frame(template).numbers
        self._potential = registry.load(model)
        super().__init__(*args, **kwargs)

    def compute(self, cell: Array | list[Array], pos: Array | list[Array]) -> Said | list[Said]:
        """Forces of one structure, or of a list of them; positions (n_atoms, 3) in Bohr, all that is returned in atomic units."""
        asked = pos if isinstance(pos, list) else [pos]
        said = self._potential.predict([Frame(self._numbers, units.length_from_wire(one)) for one in asked])
        told = [(units.energy_to_wire(one.energy), units.forces_to_wire(one.forces), units.virial_to_wire(one.virial), "") for one in said]
        return told if isinstance(pos, list) else told[0]
