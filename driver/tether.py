"""Ties a process to its parent, so that nothing goes on when the parent is killed. As a program: tie, then become an engine.

Engines know nothing of a lifeline, and one whose server is gone waits for the next for ever. They are started through this file, which
keeps the process id: `python -m tumbaga.driver.tether PARENT PROGRAM ARGUMENTS...`. Linux only; elsewhere it does nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # from Linux's prctl.h


def tie(number: int, parent: int) -> None:
    """Have this process sent a signal when its parent ends; leave at once if that has ended already.

    Args:
        number: of the signal.
        parent: process id of the parent when this process was started.

    Raises:
        SystemExit: it has ended.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(1)


def adopt(orphans: bool = True) -> None:
    """Become the parent of processes below this one whose own parents end, or leave them to init again. Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0)


if __name__ == "__main__":
    # i-PI writes its restart file on this signal
    tie(signal.SIGTERM, int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])
