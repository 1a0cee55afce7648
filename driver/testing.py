"""What tests of whole runs need, here and in other repositories: a `tumbaga` command as a process of its own, watched and ended by its id."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tumbaga.driver.errors import RunDirError
from tumbaga.driver.rundir import RunDir

_POLL_S = 0.02
Found = TypeVar("Found")


def until(condition: Callable[[], Found], seconds: float, what: str, still: Callable[[], str] = lambda: "") -> Found:
    """Wait until a condition gives something true, and return that.

    Args:
        condition: asked every few milliseconds.
        seconds: how long at most.
        what: is waited for, for the error.
        still: gives a sentence when it is no use to wait any longer.

    Raises:
        TimeoutError: it did not come about.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        hopeless = still()
        if (hopeless or time.monotonic() > deadline) and not (found := condition()):
            raise TimeoutError(f"waited for: {what}; {hopeless or f'not within {seconds:g} s'}")
        if found:
            break
        time.sleep(_POLL_S)
    return found


class Program:
    """A `tumbaga` command at work on one run directory.

    Args:
        run_dir: the run directory, which the command is told as well.
        arguments: the command and its options, without --run-dir.
        scratch: an empty folder, which the command takes for the system's folder of temporary files.
    """

    def __init__(self, run_dir: Path, *arguments: str, scratch: Path) -> None:
        self.run_dir, self.scratch = run_dir, scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self._output = scratch.with_name(f"{scratch.name}.out")
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tumbaga.driver.cli", *arguments, "--run-dir", str(run_dir)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(scratch)},
                start_new_session=True,
            )

    def __repr__(self) -> str:
        code = self.process.poll()
        return f"<Program {self.run_dir.name}: {'runs' if code is None else f'ended with code {code}'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def output(self) -> str:
        """All that it has written to the terminal."""
        return self._output.read_text(errors="replace")

    def status(self) -> dict[str, Any]:
        """Its status, as `tumbaga status --json` gives it; empty before the first one is there."""
        try:
            return RunDir(self.run_dir).read_status()
        except RunDirError:
            return {}

    def pid(self, name: str) -> int:
        """Process id of one of its processes; 0 while that one does not run."""
        return int(self.status().get("pids", {}).get(name) or 0)

    def until(self, condition: Callable[[dict[str, Any]], Any], what: str, seconds: float = 60.0) -> dict[str, Any]:
        """Wait for a status that fulfils a condition, and return it.

        Raises:
            TimeoutError: it did not come about, or the command ended before; the message holds the end of its output.
        """

        def look() -> dict[str, Any]:
            status = self.status()
            return status if status and condition(status) else {}

        def over() -> str:
            code = self.process.poll()
            return "" if code is None else f"the command has ended with code {code}"

        try:
            return until(look, seconds, what, over)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; status {json.dumps(self.status())[-2000:]}; output {self.output[-2000:]}") from None

    def steps(self, number: int, seconds: float = 60.0) -> dict[str, Any]:
        """Wait until so many steps are done."""
        return self.until(lambda status: status["steps"] >= number, f"{number} steps", seconds)

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to one of its processes, once that runs; return the process id."""
        pid = until(lambda: self.pid(name), 30.0, f"{name} to run")
        os.kill(pid, number)
        return pid

    def restarted(self, name: str, before: int) -> dict[str, Any]:
        """Wait until another process bears the name of a killed one."""
        return self.until(lambda status: status["pids"][name] not in (None, before), f"{name} to be started again")

    def end(self, seconds: float = 120.0) -> int:
        """Wait for its end, and return the exit code.

        Raises:
            TimeoutError: it did not end.
        """
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not ended within {seconds:g} s; status {json.dumps(self.status())[-2000:]}") from None

    def stop(self, seconds: float = 60.0) -> int:
        """Ask it to stop, as `tumbaga stop` does, and return the exit code."""
        self.process.terminate()
        return self.end(seconds)

    def close(self) -> None:
        """End it and all its processes, whatever they do."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid, _ in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def processes(self) -> Iterator[tuple[int, str]]:
        """All its processes, with their command lines: they work in the run directory, those that label in a folder for temporary files."""
        yield from processes_in(self.run_dir)
        yield from processes_in(self.scratch)

    def left_behind(self) -> list[str]:
        """What is still there of it that should be gone: processes, and temporary files."""
        processes = [f"process {pid}: {command}" for pid, command in self.processes()]
        return processes + [f"file {path}" for path in self.scratch.rglob("*")]


def command(*arguments: str, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a short `tumbaga` command to its end; what it wrote is in `stdout` and `stderr`."""
    return subprocess.run(
        [sys.executable, "-m", "tumbaga.driver.cli", *arguments], check=False, capture_output=True, text=True, timeout=seconds
    )


def processes_in(folder: Path) -> Iterator[tuple[int, str]]:
    """All processes that work in a folder or below it, with their command lines (Linux)."""
    inside = str(folder.resolve())
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            where = os.readlink(entry / "cwd")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # of another user, or gone meanwhile
        # a process that is dead and not yet collected has no command line
        if command and int(entry.name) != os.getpid() and (where == inside or where.startswith(inside + os.sep)):
            yield int(entry.name), command
