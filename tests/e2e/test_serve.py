"""`tumbaga serve` for engines that come and go: real ASE calculators, and minimal engines that see every byte."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.socketio import SocketIOCalculator
from ase.io import read

from tumbaga.driver import structures
from tumbaga.driver.backends import registry
from tumbaga.driver.testing import Program
from tumbaga.online.records import Prediction
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine

TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
MODEL = "toy:lj?epsilon=0.05&sigma=1.2"
SERVE = ("serve", "-m", MODEL, "-t", str(TEMPLATE), "--no-learn", "--quiet")
SAME = 1e-10  # relative: two changes of units and a sum in another order
TIMEOUT = 30.0


def shaken(seed: int) -> Atoms:
    atoms = read(TEMPLATE)
    atoms.rattle(0.05, seed=seed)
    return atoms


def truth(atoms: Atoms) -> Prediction:
    return registry.load(MODEL, "cpu", "float64").predict([structures.from_atoms(atoms)])[0]


def free_port() -> int:
    with listen(Address.tcp("127.0.0.1", 0)) as free:
        return free.address.port


def check_engine(engine: BlockingEngine, seeds: range) -> None:
    """The forces of a minimal engine are those of the potential itself."""
    for seed in seeds:
        atoms = shaken(seed)
        got, expected = engine.forces(atoms.positions / ase.units.Bohr), truth(atoms)
        assert got.energy * ase.units.Ha == pytest.approx(expected.energy, rel=SAME)
        scale = np.abs(expected.forces).max()
        np.testing.assert_allclose(got.forces * ase.units.Ha / ase.units.Bohr, expected.forces, rtol=SAME, atol=SAME * scale)
        np.testing.assert_allclose(got.virial * ase.units.Ha, expected.virial, rtol=SAME, atol=SAME * np.abs(expected.virial).max())


def check_ase(calculator: SocketIOCalculator, seeds: range, faults: list[str]) -> None:
    """The forces of an ASE calculator are those of the potential itself; for a thread, so faults are collected."""
    try:
        for seed in seeds:
            atoms = shaken(seed)
            expected = truth(atoms)
            atoms.calc = calculator
            scale = np.abs(expected.forces).max()
            np.testing.assert_allclose(atoms.get_forces(), expected.forces, rtol=SAME, atol=SAME * scale)
            assert atoms.get_potential_energy() == pytest.approx(expected.energy, rel=SAME)
    except Exception as error:  # noqa: BLE001 - whatever it is, the test is to tell it
        faults.append(repr(error))


@pytest.mark.slow
def test_several_engines_at_once_get_the_forces_of_the_potential(start: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """ASE over unix and tcp and minimal engines in both dialects, all connected at once, some there before the server, some after."""
    first, second, port, other_port = socket_name(), socket_name(), free_port(), free_port()
    faults: list[str] = []
    with listen(Address.unix(second)) as early, SocketIOCalculator(unixsocket=first, timeout=TIMEOUT) as by_unix:
        addresses = [f"unix:{first}", f"unix:{second}", f"tcp:127.0.0.1:{port}", f"tcp:127.0.0.1:{other_port}"]
        server = start(*SERVE, *(word for address in addresses for word in ("--connect", address)))
        with BlockingEngine.accept(early, "classic", timeout=TIMEOUT) as classic:
            check_engine(classic, range(3))
            with (
                SocketIOCalculator(port=port, timeout=TIMEOUT) as by_tcp,
                listen(Address.tcp("127.0.0.1", other_port)) as late,
                BlockingEngine.accept(late, "pipelined", timeout=TIMEOUT) as pipelined,
            ):
                threads = [
                    threading.Thread(target=check_ase, args=(calculator, range(10 * i, 10 * i + 10), faults), name=f"ase-{i}")
                    for i, calculator in enumerate((by_unix, by_tcp))
                ]
                for thread in threads:
                    thread.start()
                check_engine(classic, range(20, 40))
                check_engine(pipelined, range(40, 60))
                for thread in threads:
                    thread.join(TIMEOUT)
                assert faults == []
                status = server.until(lambda status: status["force_calls"] == 63, "all forces to be counted", 10.0)
                assert [session["state"] for session in status["sessions"]] == ["connected"] * 4
                assert [session["forces"] for session in status["sessions"]] == [10, 23, 10, 20]

        # the engine comes back at the same address, and so does the server
        with BlockingEngine.accept(early, "pipelined", timeout=TIMEOUT) as again:
            check_engine(again, range(5))
    assert server.stop() == 0, server.output
    assert server.status()["errors"] == []
    assert server.left_behind() == []


@pytest.mark.slow
def test_an_engine_of_other_size_is_told_off_and_the_others_go_on(start: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """A frame with another number of atoms than the template ends that session with a sentence that names both counts."""
    wrong, right = socket_name(), socket_name()
    with listen(Address.unix(wrong)) as bad, listen(Address.unix(right)) as good:
        server = start(*SERVE, "-u", "-a", wrong, "--connect", f"unix:{right}")
        with BlockingEngine.accept(good, timeout=TIMEOUT) as engine:
            check_engine(engine, range(3))
            stranger = BlockingEngine.accept(bad, timeout=TIMEOUT)
            with pytest.raises(ConnectionError):
                stranger.forces(np.ones((5, 3)) * np.arange(5)[:, None])
            stranger.close()
            check_engine(engine, range(3, 6))
            many = len(shaken(0))
            told = server.until(lambda status: status["errors"], "the sentence")["errors"]
            assert any("5 atoms" in sentence and str(many) in sentence for sentence in told), told
            # its address is not given up: whoever comes there next, with the right atoms, is served
            with BlockingEngine.accept(bad, timeout=TIMEOUT) as mended:
                check_engine(mended, range(2))
            check_engine(engine, range(6, 9))
    assert server.stop() == 0
