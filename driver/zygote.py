"""The zygote: loads the potential of a run once, and forks the evaluators that compute on a CPU from it.

So they share the memory of the potential and of all that it imports, and one that was killed has a successor within milliseconds. What is
forked must have one thread only: the others would be missing in the child, and whoever waits for them there would hang. So nothing is
evaluated here (neighbour lists and OpenMP keep threads), and where a package has started threads while it was loaded, evaluators are started
as if there were no zygote. A GPU's driver does not survive a fork at all: evaluators of a GPU have no zygote.

Over standard input, a socket, come the names of evaluators, each with two descriptors: its lifeline and its standard error. Back goes "ready"
once, then the process id of each. They are forked twice, and the process between has ended by then: so they are children of the supervisor,
which adopts orphans (`tumbaga.driver.tether.adopt`), and live on when the zygote dies. Linux only.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tumbaga.driver import evaluator, process, tether

_LONGEST = 64  # bytes of a name
_DEVICE = "cpu"
_TASKS = Path("/proc/self/task")


def alone() -> bool:
    """Whether this process has one thread."""
    if (progress := sys.modules.get("tqdm")) is not None and progress.tqdm.monitor is not None:
        progress.tqdm.monitor.exit()  # the thread that looks after progress bars, of which there are none any more
    return len(list(_TASKS.iterdir())) == 1


def born(body: Callable[[], None], standard: Sequence[int]) -> int:
    """Start a process that the nearest ancestor which adopts orphans becomes the parent of.

    Args:
        body: what it does; it ends with that.
        standard: descriptors that become its standard input, output and error.

    Returns:
        Its process id.
    """
    read_end, write_end = os.pipe()
    between = os.fork()
    if not between:
        if child := os.fork():
            os.write(write_end, str(child).encode())
            os._exit(0)
        process.leave("evaluator", lambda: _grown(body, standard, (read_end, write_end)))
    os.close(write_end)
    with open(read_end, "rb") as told:
        child = int(told.read())
    os.waitpid(between, 0)
    return child


def _grown(body: Callable[[], None], standard: Sequence[int], further: Sequence[int]) -> None:
    """What the new process does."""
    os.setsid()  # a Ctrl-C in the terminal is for the supervisor alone
    for target, descriptor in enumerate(standard):
        os.dup2(descriptor, target)
    for descriptor in {*standard, *further}:
        os.close(descriptor)
    body()


def main(run_dir: Path) -> None:
    """Load the potential, say so, and make evaluators until the supervisor is gone."""
    tether.tie(signal.SIGKILL, os.getppid())
    slot = evaluator.loaded(run_dir, _DEVICE)
    # the garbage collector writes into what it looks at, and what is written is shared no more
    process.settle()
    process.give_back_memory()
    with socket.socket(fileno=0) as line:
        line.send(b"ready")
        while True:
            told, descriptors, _, _ = socket.recv_fds(line, _LONGEST, 2)
            if not told:
                return
            name = told.decode()

            def become(name: str = name) -> None:
                sys.argv[1:] = [str(run_dir), name, _DEVICE]
                process.run("evaluator", lambda path, lifeline: evaluator.serve(slot, name, path, lifeline))

            def become_another(name: str = name) -> None:
                os.execv(sys.executable, [sys.executable, "-m", evaluator.__name__, str(run_dir), name, _DEVICE])

            sys.stdout.flush()
            pid = born(become if alone() else become_another, (descriptors[0], descriptors[1], descriptors[1]))
            for descriptor in descriptors:
                os.close(descriptor)
            line.send(str(pid).encode())


if __name__ == "__main__":
    process.leave("evaluator", lambda: main(Path(sys.argv[1]).resolve()))
