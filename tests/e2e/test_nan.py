"""DESIGN.md §2, invariant 2: no number that is not finite leaves on the wire, whatever the potential says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver import structures
from tumbaga.driver.testing import Program
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine, Dialect

TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
NOT_FINITE = re.compile(rb"(?i)(?<![a-z])[+-]?(nan|inf|infinity)(?![a-z])")


def nothing_infinite(program: Program) -> bool:
    """Whether all that the engine wrote is finite; ASE's trajectory is binary and read by ASE."""
    for path in (program.run_dir / "engine").glob("md.*"):
        if path.suffix == ".traj":
            from ase.io import read

            frames = read(path, index=":")
            if not all(
                np.isfinite(a.positions).all() and np.isfinite(a.get_forces()).all() and np.isfinite(a.get_momenta()).all() for a in frames
            ):
                return False
        elif NOT_FINITE.search(path.read_bytes()):
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ipi", "ase"])
def test_a_run_on_a_broken_potential_ends_with_a_sentence(engine: str, start: Callable[..., Program]) -> None:
    """Good numbers for a while, then NaN for ever: exit code 1, the reason is told, and the output is finite to its last row."""
    program = start("run", "cuau-water", "-m", "toy:nan?after=20&every=1", "--no-learn", "--engine", engine, "--steps", "1000")
    assert program.end() == 1, program.output
    status = program.status()
    assert status["state"] == "failed"
    assert status["refused"] >= 1
    assert 10 <= status["steps"] < 20
    assert "not finite" in " ".join(status["errors"])
    assert "Traceback" not in program.output
    assert (program.run_dir / "engine" / "md.out").stat().st_size > 0
    assert nothing_infinite(program)
    assert program.left_behind() == []


@pytest.mark.slow
def test_a_run_survives_single_bad_answers(start: Callable[..., Program], table: Callable) -> None:
    """One answer in fifty is NaN: each ends a conversation with i-PI, which asks again, and the run goes to its end on finite numbers."""
    program = start("run", "cuau-water", "-m", "toy:nan?after=20&every=50", "--no-learn", "--steps", "300")
    assert program.end() == 0, program.output
    status = program.status()
    assert status["refused"] >= 5
    assert "not finite" in " ".join(status["errors"])
    assert table(program)[-1, 0] == 300
    assert nothing_infinite(program)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 50])
def test_an_engine_sees_a_closed_connection_and_never_a_nan(
    every: int, start: Callable[..., Program], socket_name: Callable[[], str]
) -> None:
    """Every number of every answer is finite, in both dialects; where there would be a NaN there is the end of the connection."""
    names: list[tuple[str, Dialect]] = [(socket_name(), "classic"), (socket_name(), "pipelined")]
    positions = np.arange(24.0).reshape(8, 3) ** 1.1 * 4
    with listen(Address.unix(names[0][0])) as one, listen(Address.unix(names[1][0])) as other:
        server = start(
            "serve", "-m", f"toy:nan?after=20&every={every}", "-t", str(TEMPLATE), "--no-learn", "--quiet",
            *(word for name, _ in names for word in ("--connect", f"unix:{name}")),
        )  # fmt: skip
        closed = answers = 0
        for listener, (_, dialect) in zip((one, other), names, strict=True):
            with BlockingEngine.accept(listener, dialect, timeout=30.0) as engine:
                try:
                    for _ in range(120):
                        got = engine.forces(positions)
                        answers += 1
                        assert np.isfinite(got.energy)
                        assert np.isfinite(got.forces).all()
                        assert np.isfinite(got.virial).all()
                        assert b"NaN" not in got.extras
                        assert b"Infinity" not in got.extras
                except ConnectionError:
                    closed += 1
        status = server.until(lambda status: status["refused"] == 2, "both refusals to be counted")
        assert closed == 2
        assert answers == (20 - 3 if every == 1 else 20 - 3 + 49 + 49)
        assert any("not finite" in sentence for sentence in status["errors"])
    assert server.stop() == 0
