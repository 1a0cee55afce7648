"""What engines are told and what is read of their output, without starting one (tests/e2e does)."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.io import read

from tumbaga.driver import engines
from tumbaga.driver.engines import FOLDER, Dynamics, IPi, Progress
from tumbaga.driver.errors import ConfigError, EngineError
from tumbaga.driver.structures import from_atoms

WATER = from_atoms(molecule("H2O"))
ROWS = "# --> column 1: step\n{}"
RESTART = "<simulation>\n <step>{}</step>\n <total_steps>100</total_steps>\n</simulation>\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / FOLDER
    made.mkdir()
    return made


def rows(steps: range, temperature: float = 300.0) -> str:
    return "".join(f" {step} {step * 5e-4:.6e} -1.0e+00 {temperature:.6e} -2.0e+00\n" for step in steps)


def progress(folder: Path, text: str) -> Progress:
    (folder / "md.out").write_text(text)
    return IPi(WATER, Dynamics(100)).progress(folder.parent)


def test_the_input_says_what_was_asked(folder: Path) -> None:
    """i-PI's input is well-formed XML with the steps, temperature, time step, friction and seed of the dynamics."""
    IPi(WATER, Dynamics(1234, 350.0, 0.25, 50.0, 77, 5)).prepare(folder.parent)
    root = xml.parse(folder / "input.xml").getroot()

    def told(path: str) -> str:
        return (root.findtext(path) or "").strip()

    assert told("total_steps") == "1234"
    assert told("prng/seed") == "77"
    assert float(told("system/ensemble/temperature")) == float(told("system/initialize/velocities")) == 350.0
    assert float(told("system/motion/dynamics/timestep")) == 0.25
    assert float(told("system/motion/dynamics/thermostat/tau")) == 50.0
    assert told("ffsocket/address") == "forces"


def test_the_start_is_the_template_in_the_middle_of_a_box(folder: Path) -> None:
    """The structure that i-PI reads has the template's species in order, its distances, and its centre in the middle of the box."""
    IPi(WATER, Dynamics(10)).prepare(folder.parent)
    atoms = read(folder / "init.xyz")

    assert atoms.numbers.tolist() == WATER.numbers.tolist()
    np.testing.assert_allclose(atoms.positions.mean(axis=0), 30.0, atol=1e-9)
    np.testing.assert_allclose(atoms.positions - atoms.positions[0], WATER.positions - WATER.positions[0], atol=1e-9)


def test_stale_files_are_removed(folder: Path) -> None:
    """A socket and an EXIT file of a killed i-PI are out of the way of the next one."""
    for name in ("forces", "EXIT"):
        (folder / name).write_text("")
    IPi(WATER, Dynamics(10)).prepare(folder.parent)

    assert not (folder / "forces").exists()
    assert not (folder / "EXIT").exists()


def test_it_goes_on_from_the_newest_whole_state(folder: Path) -> None:
    """Of checkpoint and RESTART the one at the later step is continued, with the new number of steps; half a file is not used."""
    (folder / "md.chk_0").write_text(RESTART.format(40))
    (folder / "RESTART").write_text(RESTART.format(60))
    (folder / "md.chk_1").write_text(RESTART.format(80)[:-8])
    command = IPi(WATER, Dynamics(5000)).prepare(folder.parent)
    text = (folder / "continue.xml").read_text()

    assert command[-1] == "continue.xml"
    assert "<step>60</step>" in text
    assert "<total_steps>5000</total_steps>" in text
    assert not (folder / "input.xml").exists()


def test_progress_before_the_first_line(folder: Path) -> None:
    """Without an output, or with a head only, nothing is known and nothing is wrong."""
    for found in (IPi(WATER, Dynamics(1)).progress(folder.parent), progress(folder, ROWS.format(""))):
        assert (found.step, found.finite) == (0, True)
        assert math.isnan(found.temperature)


def test_progress_is_the_last_line(folder: Path) -> None:
    """Step and temperature are of the last line, the mean is over the second half, and a step that stands twice counts once."""
    found = progress(folder, ROWS.format(rows(range(0, 50, 10), 100.0) + rows(range(30, 100, 10), 300.0)))

    assert (found.step, found.temperature, found.mean_temperature, found.finite) == (90, 300.0, 300.0, True)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_seen(folder: Path, number: str) -> None:
    """One number that is not finite, anywhere in the output, is told."""
    assert not progress(folder, rows(range(0, 20, 10)) + f" 20 1.0e-2 -1.0 300.0 {number}\n" + rows(range(30, 50, 10))).finite


@pytest.mark.parametrize(
    "torn",
    [
        " 20 1.0e-02 -1.0e+00 3.1",
        " 20 1.0e-02 -1.0e+00 3.1e+02 -2.0e",
        " 20 1.0e-02 -1.0e+00 3.1e+02 -2.0e 30 1.5e-02 -1.0e+00 3.0e+02 -2.0e+00\n",
        " 20 1.0e-02 -1.0e+00 3.1e+ -2.0e+00\n",
        " nan 1.0e-02 -1.0e+00 3.1e+02 -2.0e+00\n",
        "\x00\x00\x00\n",
    ],
)
def test_half_a_line_is_no_line(folder: Path, torn: str) -> None:
    """A line that is being written, or that a killed engine left behind, is passed over, at the end and in the middle."""
    for text in (rows(range(0, 20, 10)) + torn, rows(range(0, 20, 10)) + torn.rstrip("\n") + "\n" + rows(range(40, 50, 10))):
        found = progress(folder, text)
        assert found.step in (10, 40)
        assert found.temperature == 300.0
        assert found.finite


def test_the_task_of_ase_is_what_was_asked(folder: Path) -> None:
    """ASE's process is told everything in one JSON file, and listens where the gateway is told to dial."""
    engine = engines.make("ase", folder.parent, "/t.xyz", Dynamics(10, seed=4))
    engine.prepare(folder.parent)
    task = json.loads((folder / "task.json").read_text())

    assert (task["template"], task["steps"], task["seed"]) == ("/t.xyz", 10, 4)
    assert engine.address == f"unix:/tmp/ipi_{task['socket']}"
    assert engines.make("ase", folder, "/t.xyz", Dynamics(10)).address != engine.address


def test_an_unknown_engine_is_a_sentence(tmp_path: Path) -> None:
    """An engine that cannot be started is named with those that can; a template that is not there is named too."""
    with pytest.raises(EngineError, match="lammps: is not an engine that tumbaga can start; choose ipi or ase"):
        engines.make("lammps", tmp_path, "/t.xyz", Dynamics(1))
    with pytest.raises(ConfigError, match="there is no file"):
        engines.make("ipi", tmp_path, str(tmp_path / "none.xyz"), Dynamics(1))
