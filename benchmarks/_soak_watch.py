"""What the processes of a server hold, as /proc tells it (Linux): memory, descriptors, threads, files that are nobody else's."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from tumbaga.driver.testing import Program

_LOOKS, _BETWEEN_S = 9, 0.05
"""A sample is made of several looks: at one instant a file may be open, or a frame in memory, that is not at the next."""
_PUBLIC = ("/dev/shm/", "/tmp/")


@dataclass(frozen=True)
class Held:
    """What one process, or a few of the same kind, hold.

    Attributes:
        resident: MiB that are in memory (VmRSS).
        proportional: MiB, with memory that n processes share counted as an nth (Pss).
        descriptors: open files.
        threads: of it.
    """

    resident: float
    proportional: float
    descriptors: int
    threads: int

    def __add__(self, other: Held) -> Held:
        return Held(
            self.resident + other.resident,
            self.proportional + other.proportional,
            self.descriptors + other.descriptors,
            self.threads + other.threads,
        )


def _field(path: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", path.read_text(), re.MULTILINE)
    return int(found.group(1)) if found else 0  # a process that is about to end has no memory


def held(pid: int) -> Held:
    """What a process holds at this instant."""
    proc = Path("/proc", str(pid))
    resident, proportional = _field(proc / "status", "VmRSS"), _field(proc / "smaps_rollup", "Pss")
    return Held(resident / 1024, proportional / 1024, len(os.listdir(proc / "fd")), _field(proc / "status", "Threads"))


class Watch:
    """Looks at a server.

    Args:
        program: that runs.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.public: set[str] = set()  # files below /tmp and /dev/shm that its processes had open or in memory

    def _pids(self) -> dict[str, list[int]]:
        """All processes, by name; those that the label workers start are one kind."""
        named = {"supervisor": self._program.process.pid, **{k: v for k, v in self._program.status()["pids"].items() if v}}
        found = {name: [pid] for name, pid in named.items()}
        others = [pid for pid, _ in self._program.processes() if pid not in named.values()]
        return {**found, **({"label children": others} if others else {})}

    def _look(self) -> dict[str, Held]:
        seen: dict[str, Held] = {}
        for name, pids in self._pids().items():
            for pid in pids:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                    now = held(pid)
                    seen[name] = seen[name] + now if name in seen else now
                    self._public_files(pid)
        return seen

    def _public_files(self, pid: int) -> None:
        own = str(self._program.run_dir.parent.resolve())
        paths = {
            line.split(maxsplit=5)[5] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if len(line.split(maxsplit=5)) > 5
        }
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                paths.add(os.readlink(entry))
        self.public |= {path for path in paths if path.startswith(_PUBLIC) and not path.startswith(own)}

    def sample(self) -> dict[str, Held]:
        """What each process holds: its median memory over a moment, and the descriptors and threads that it had all the time."""
        looks = []
        for number in range(_LOOKS):
            if number:
                time.sleep(_BETWEEN_S)
            looks.append(self._look())
        found = {}
        for name in dict.fromkeys(name for look in looks for name in look):
            had = [look[name] for look in looks if name in look]
            memory = (statistics.median(one.resident for one in had), statistics.median(one.proportional for one in had))
            found[name] = Held(*memory, min(one.descriptors for one in had), min(one.threads for one in had))
        return found

    def log_bytes(self) -> int:
        """Size of all logs."""
        return sum(path.stat().st_size for path in (self._program.run_dir / "log").iterdir())

    def left(self) -> list[str]:
        """What is there after the end: processes, files in its folder for temporary ones, files of everybody that were its own."""
        return [*self._program.left_behind(), *(path for path in sorted(self.public) if os.path.lexists(path))]
