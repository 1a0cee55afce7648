"""The driver that each user starts for himself today, on the same back end: `python _private_driver.py ADDRESS MODEL STRUCTURE`

One engine, one process, one copy of the potential, nothing in between: no gateway, no uncertainty, no extras. Dials until the engine is
there, and answers until it leaves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from _zero_driver import dialled

from tumbaga.driver import structures, units
from tumbaga.driver.backends import registry
from tumbaga.online.records import Frame
from tumbaga.socket_protocol.events import ForceReady, PosData
from tumbaga.socket_protocol.streams import Address
from tumbaga.socket_protocol.testing import BlockingDriver

_SILENCE_S = 1800.0  # others are measured meanwhile


def answerer(model: str, structure: str) -> Callable[[PosData], ForceReady]:
    """What makes forces of positions, of a cluster that lies whole in its box."""
    potential, numbers = registry.load(model), structures.read_frame(structure).numbers

    def answer(asked: PosData) -> ForceReady:
        (said,) = potential.predict([Frame(numbers, units.length_from_wire(asked.positions))])
        return ForceReady(units.energy_to_wire(said.energy), units.forces_to_wire(said.forces), units.virial_to_wire(said.virial))

    return answer


if __name__ == "__main__":
    # the potential first: who is connected can answer
    compute = answerer(*sys.argv[2:])
    BlockingDriver(dialled(Address.parse(sys.argv[1])), compute, timeout=_SILENCE_S).serve()
