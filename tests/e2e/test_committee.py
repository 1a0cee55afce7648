"""`tumbaga serve --committee` beside an unmodified i-PI: its <ffcommittee> reads the members, and moves the atoms as without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.units
import numpy as np
import pytest
from ase.io import read

from tumbaga.driver import structures
from tumbaga.driver.testing import Program, command
from tumbaga.socket_protocol.events import PosData
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine

TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
MEMBERS, STEPS, BOX = 4, 40, 60.0
SERVE = ("serve", "-m", "painn:cuau-water", "-t", str(TEMPLATE), "--no-learn", "--quiet", "--committee", str(MEMBERS))
HARTREE = 27.211386  # eV, to the eight digits of i-PI's units
COMMITTEE = ("committee_pot", "committee_uncertainty", "committee_tumbaga_force_std", "committee_tumbaga_version")
_INPUT = """<simulation verbosity='low' safe_stride='100000' floatformat='%25.17e'>
 <output prefix='md'>
  <properties filename='out'> [ step, conserved, potential, virial_md ] </properties>
  <trajectory filename='pos'> positions </trajectory>
  {outputs}
 </output>
 <total_steps>{steps}</total_steps> <prng><seed>31415</seed></prng>
 {forcefield}
 <system>
  <initialize nbeads='{beads}'> <file mode='xyz'> init.xyz </file> <velocities mode='thermal' units='kelvin'> 300 </velocities> </initialize>
  <forces> <force forcefield='ff'/> </forces>
  <motion mode='dynamics'> <dynamics mode='{ensemble}'> <timestep units='femtosecond'> {timestep} </timestep>
   <thermostat mode='langevin'> <tau units='femtosecond'> 100 </tau> </thermostat> </dynamics> </motion>
  <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
 </system>
</simulation>
"""


class IPi:
    """One i-PI at work in a folder, on the packaged example."""

    def __init__(
        self, folder: Path, forcefield: str, extras: tuple[str, ...], ensemble: str = "nvt", timestep: float = 0.5, beads: int = 1
    ) -> None:
        self.folder = folder
        folder.mkdir()
        atoms = read(TEMPLATE)
        cell = f"# CELL(abcABC): {BOX} {BOX} {BOX} 90.0 90.0 90.0  positions{{angstrom}} cell{{angstrom}}"
        lines = [f"{symbol} {x:.12f} {y:.12f} {z:.12f}" for symbol, (x, y, z) in zip(atoms.symbols, atoms.positions + BOX / 2, strict=True)]
        (folder / "init.xyz").write_text("\n".join([str(len(atoms)), cell, *lines, ""]))
        outputs = "\n".join(f"<trajectory filename='{name}' extra_type='{name}'> extras </trajectory>" for name in extras)
        told = {"forcefield": forcefield, "outputs": outputs, "steps": STEPS, "ensemble": ensemble, "timestep": timestep, "beads": beads}
        (folder / "input.xml").write_text(_INPUT.format(**told))
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(sys.executable).parent / "i-pi"), "input.xml"],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def finished(self) -> np.ndarray:
        """Wait for its end, which must be a success, and return its properties, one row a step."""
        code = self.process.wait(120)
        log = (self.folder / "log").read_text(errors="replace")
        assert (code, "Traceback" in log) == (0, False), log[-2000:]
        assert "I-PI reports success" in log, log[-2000:]
        return np.loadtxt(self.folder / "md.out", ndmin=2)

    def extras(self, name: str, bead: int = 0) -> np.ndarray:
        """One row of numbers a step."""
        text = (self.folder / f"md.{name}_{bead}").read_text().splitlines()
        return np.array([[float(word) for word in line.split()] for line in text if "#" not in line and line.strip()])

    def positions(self) -> str:
        return (self.folder / "md.pos_0.xyz").read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def ipi(tmp_path: Path, socket_name: Callable[[], str]) -> Iterator[Callable[..., IPi]]:
    """Start an i-PI; see `IPi`. It has ended before the names of sockets are looked at."""
    runs: list[IPi] = []

    def begin(*arguments: Any, **options: Any) -> IPi:
        runs.append(IPi(tmp_path / f"ipi-{len(runs)}", *arguments, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def socket(address: str, name: str = "ff", batch: int = 1) -> str:
    # i-PI hands sockets_prefix to the sockets of its own, not to those within a committee: they are at /tmp/ipi_NAME always
    size = f"<batch_size>{batch}</batch_size>"
    return f"<ffsocket name='{name}' mode='unix' pbc='False'> <address>{address}</address> <latency>1e-4</latency> {size} </ffsocket>"


def committee(address: str, more: str = "", batch: int = 1) -> str:
    """The committee of one socket; `more` are further elements of it."""
    return f"<ffcommittee name='ff' pbc='False'> {socket(address, 'members', batch)} <parse_json>True</parse_json> {more} </ffcommittee>"


@pytest.mark.slow
def test_ipi_moves_as_without_a_committee_and_knows_the_spread(
    start: Callable[..., Program], ipi: Callable[..., IPi], socket_name: Callable[[], str]
) -> None:
    """Two i-PIs with the same seed, one with a plain socket, one with a committee: one trajectory, and the spread beside it."""
    plain, spread = socket_name(), socket_name()
    server = start(*SERVE, "--connect", f"unix:{plain}", "--connect", f"unix:{spread}")
    first = ipi(socket(plain), ("tumbaga_force_std", "tumbaga_version"))
    second = ipi(committee(spread), COMMITTEE)
    expected, found = first.finished(), second.finished()

    assert found[:, 0].tolist() == list(range(STEPS + 1))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
    coordinates = [
        np.array([line.split()[1:] for line in run.positions().splitlines() if line.split()[0].isalpha()], float) for run in (first, second)
    ]
    assert len(coordinates[0]) == (STEPS + 1) * len(read(TEMPLATE))
    np.testing.assert_allclose(coordinates[1], coordinates[0], rtol=1e-9)

    members, sigma = second.extras("committee_pot"), second.extras("committee_uncertainty")[:, 0]
    assert members.shape == (STEPS + 1, MEMBERS)
    assert np.isfinite(members).all()
    np.testing.assert_allclose(sigma, members.std(axis=1, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(members.mean(axis=1), found[:, 2], rtol=1e-12)
    assert (sigma > 0).all()
    for name in ("tumbaga_force_std", "tumbaga_version"):
        np.testing.assert_allclose(second.extras(f"committee_{name}"), first.extras(name), rtol=1e-6)
    assert server.stop() == 0, server.output
    assert server.status()["errors"] == []


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_every_bead_has_its_spread(
    batch: int, start: Callable[..., Program], ipi: Callable[..., IPi], socket_name: Callable[[], str]
) -> None:
    """Two beads, each over a connection of its own or both in one message: i-PI knows the members of each."""
    name = socket_name()
    server = start(*SERVE, "-u", "-a", name, "--connections", str(3 - batch))
    run = ipi(committee(name, batch=batch), COMMITTEE, beads=2)
    rows = run.finished()

    pots = [run.extras("committee_pot", bead) for bead in range(2)]
    np.testing.assert_allclose(np.mean(pots, axis=(0, 2)), rows[:, 2], rtol=1e-12)
    assert np.abs(pots[0][-1] - pots[1][-1]).min() > 1e-9
    for bead in range(2):
        np.testing.assert_allclose(run.extras("committee_uncertainty", bead)[:, 0], pots[bead].std(axis=1, ddof=1), rtol=1e-9)
    assert server.stop() == 0, server.output


@pytest.mark.slow
def test_the_weighted_baseline_and_active_learning_of_ipi_work(
    start: Callable[..., Program], ipi: Callable[..., IPi], socket_name: Callable[[], str]
) -> None:
    """V = V_base + g V_mean with g = s² / (s² + σ²) conserves energy, so member energies and forces belong together; σ above a threshold
    is written down by i-PI with the positions."""
    name, uncertainty = socket_name(), 20.0  # eV
    server = start(*SERVE, "-u", "-a", name)
    base = "<fflj name='base' threaded='True'> <parameters>{eps: 1e-4, sigma: 2.0, cutoff: 20.0}</parameters> </fflj>"
    told = (
        f"{base} <baseline_name>base</baseline_name> <baseline_uncertainty units='electronvolt'>{uncertainty}</baseline_uncertainty>"
        " <active_thresh units='electronvolt'>0.01</active_thresh> <active_output>active</active_output>"
    )
    run = ipi(committee(name, told), ("committee_pot", "committee_uncertainty", "wb_mixing", "baseline_pot"), "nve", 0.1)
    rows = run.finished()

    members, sigma = run.extras("committee_pot"), run.extras("committee_uncertainty")[:, 0]
    mixing, baseline = run.extras("wb_mixing")[:, 0], run.extras("baseline_pot")[:, 0]
    np.testing.assert_allclose(mixing, 1 / (1 + (sigma * HARTREE / uncertainty) ** 2), rtol=1e-6)
    np.testing.assert_allclose(rows[:, 2], baseline + mixing * members.mean(axis=1), rtol=1e-9)
    # what the weight adds to the potential is far from constant, and the forces know it
    added, conserved = np.ptp((mixing - 1) * members.mean(axis=1)), np.ptp(rows[:, 1])
    assert conserved < 0.02 * added

    text, found = (run.folder / "md.active").read_text(), []
    while text:
        one, end = json.JSONDecoder().raw_decode(text)  # i-PI writes one object behind the other, without a line break
        found.append(one)
        text = text[end:].lstrip()
    assert [one["uncertainty"] for one in found] == pytest.approx(sigma.tolist())
    assert len(found[0]["position"]) == 3 * len(read(TEMPLATE))
    assert server.stop() == 0, server.output


@pytest.mark.slow
def test_the_members_outlive_their_evaluator(start: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """The same frames get the same committees after the evaluator was killed; each frame of a batch has its own."""
    name = socket_name()
    atoms = read(TEMPLATE)
    frames = []
    for seed in range(3):
        atoms.rattle(0.03, seed=seed)
        frames.append(PosData(np.zeros((3, 3)), atoms.positions / ase.units.Bohr))
    with listen(Address.unix(name)) as listener:
        server = start(*SERVE, "-u", "-a", name)
        with BlockingEngine.accept(listener, "pipelined", init_text=b" batch_size:3") as engine:
            before = engine.batch(frames)
            killed = server.kill("evaluator-0")
            server.restarted("evaluator-0", killed)
            after = engine.batch(frames)
            again = engine.batch(frames[::-1])[::-1]
    told = [[json.loads(one.extras) for one in answers] for answers in (before, after, again)]
    for first, *others, answer in zip(*told, before, strict=True):
        members = np.array(first["committee_force"])
        assert members.shape == (MEMBERS, len(atoms), 3)
        np.testing.assert_allclose(members.mean(axis=0), answer.forces, atol=1e-12)
        np.testing.assert_allclose(np.mean(first["committee_virial"], axis=0), answer.virial, atol=1e-12)
        for other in others:  # float32 sums depend on the place in the batch
            np.testing.assert_allclose(other["committee_force"], members, atol=1e-5)
            np.testing.assert_allclose(other["committee_pot"], first["committee_pot"], atol=1e-5)
    pots = [np.array(one["committee_pot"]) for one in told[0]]
    assert np.abs((pots[0] - pots[0].mean()) - (pots[1] - pots[1].mean())).max() > 1e-4
    assert server.stop() == 0, server.output


def test_a_toy_has_no_committee(tmp_path: Path) -> None:
    """The command ends with one sentence and exit code 2 before anything is started, with learning as without."""
    for more in ((), ("--no-learn",)):
        told = command(
            "serve", "-m", "toy:lj", "-t", str(TEMPLATE), "-u", "-a", "nobody", "--committee", "4", "--run-dir", f"{tmp_path}/r", *more
        )
        assert told.returncode == 2, told.stderr
        assert told.stderr.startswith("tumbaga: serve.committee: is 4, but toy:lj")
        assert "has no linear readout to draw a committee from" in told.stderr
        assert told.stderr.count("\n") == 1
        assert not (tmp_path / "r").exists()
