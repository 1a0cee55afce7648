"""Whole runs in processes of their own: every one of them is gone at the end of its test, and has left nothing behind."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver.testing import Program, until

Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a `tumbaga` command in a run directory of the test; `start("run", ..., run="name")`."""
    programs: list[Program] = []

    def begin(*arguments: str, run: str = "run") -> Program:
        programs.append(Program(tmp_path / run, *arguments, scratch=tmp_path / f"temporary-{len(programs)}"))
        return programs[-1]

    yield begin
    for program in programs:
        program.close()
    for program in programs:
        until(lambda program=program: not program.left_behind(), 10.0, f"{program} to leave nothing behind: {program.left_behind()}")


@pytest.fixture
def table() -> Callable[[Program], np.ndarray]:
    """Read the properties that an engine wrote: step, time, conserved, temperature, potential."""

    def read(program: Program) -> np.ndarray:
        return np.loadtxt(program.run_dir / "engine" / "md.out", ndmin=2)

    return read


@pytest.fixture
def socket_name() -> Iterator[Callable[[], str]]:
    """Make names of unix sockets that nobody else uses; in the end none of their files is there."""
    names: list[str] = []

    def make() -> str:
        names.append(f"tumbaga-test-{uuid.uuid4().hex}")
        return names[-1]

    yield make
    assert [name for name in names if os.path.lexists(f"/tmp/ipi_{name}")] == []
