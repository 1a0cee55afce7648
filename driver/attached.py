"""A `tumbaga` command that belongs to a script: it ends when the script ends, by whatever death, and takes the script's socket file along.

`python -m tumbaga.driver.attached PARENT SOCKET ARGUMENTS...` is `tumbaga ARGUMENTS...` on a tether; the tether holds on Linux only.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tumbaga.driver import tether


def main(parent: int, socket: Path, arguments: list[str]) -> None:
    """Run the command.

    Args:
        parent: process id of the script.
        socket: file of the script's socket; ASE removes it too, unless the script is killed.
        arguments: of the command line.
    """
    # the supervisor has a handler of its own, but it takes seconds to come to that
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        if os.getppid() != parent:
            return
        tether.tie(signal.SIGTERM, parent)
        from tumbaga.driver import cli

        sys.argv = ["tumbaga", *arguments]
        cli.main()
    finally:
        socket.unlink(missing_ok=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
