"""A driver of zero potential on tumbaga's wire alone: no gateway, no evaluator, one process. `python _zero_driver.py ADDRESS`

Dials until the engine is there, and answers until it leaves.
"""

from __future__ import annotations

import functools
import sys
import time
from random import Random

import numpy as np

from tumbaga.socket_protocol.errors import NotYetError
from tumbaga.socket_protocol.events import ForceReady, PosData
from tumbaga.socket_protocol.streams import Address, Backoff, Stream
from tumbaga.socket_protocol.testing import BlockingDriver, connect

PATIENCE_S = 60.0


@functools.cache
def zeros(atoms: int) -> ForceReady:
    """The same answer for every frame of a size."""
    return ForceReady(0.0, np.zeros((atoms, 3)), np.zeros((3, 3)))


def answer(frame: PosData) -> ForceReady:
    return zeros(len(frame.positions))


def dialled(address: Address) -> Stream:
    """A stream to the engine, once it listens."""
    backoff, until = Backoff(Random(0), most=0.1), time.monotonic() + PATIENCE_S
    while True:
        try:
            return connect(address, PATIENCE_S)
        except NotYetError:
            if time.monotonic() > until:
                raise
            time.sleep(backoff.next_delay())


if __name__ == "__main__":
    BlockingDriver(dialled(Address.parse(sys.argv[1])), answer, timeout=PATIENCE_S).serve()
