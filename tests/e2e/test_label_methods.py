"""Runs whose labels come from ASE calculators and from functions of the user, named on the command line or in the settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.testing import Program, command
from tumbaga.online.labels.factory import make_labeller
from tumbaga.online.store import FILE, Store, StoredLabel
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine

pytestmark = pytest.mark.slow
TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
XTB = "ase:tblite.ase:TBLite"
TIMEOUT = 120.0


def labels(run_dir: Path) -> list[StoredLabel]:
    store = Store(run_dir / FILE, read_only=True)
    found = store.labels()
    store.close()
    return found


def labelled(program: Program) -> list[StoredLabel]:
    """Wait for a label, and end the run."""
    program.until(lambda status: status["labels"]["converged"], "a label", TIMEOUT)
    assert program.stop() == 0, program.output
    return labels(program.run_dir)


def test_xtb_labels_from_the_command_line(start: Callable[..., Program]) -> None:
    """Options behind the method; the labels are those of the calculator itself, and nothing of it is left behind."""
    pytest.importorskip("tblite")
    method = f"{XTB}?method=GFN1-xTB&verbosity=0"
    program = start("run", "cuau-water", "--label", method, "--labels", "2", "--steps", "1000000")
    found = labelled(program)[0]
    expected = make_labeller(method).label(found.frame)

    assert found.label.method == f"{XTB}(method=GFN1-xTB, verbosity=0)"
    assert found.label.energy == pytest.approx(expected.energy, abs=1e-6)
    np.testing.assert_allclose(found.label.forces, expected.forces, atol=1e-5)


def test_xtb_labels_from_the_settings(tmp_path: Path, start: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """`[label.options]` of tumbaga.toml: the same method in name, so that both may stand in one store."""
    pytest.importorskip("tblite")
    name = socket_name()
    text = (
        f"[serve]\nconnect = ['unix:{name}']\n[potential]\ntemplate = '{TEMPLATE}'\n"
        f"[label]\nmethod = '{XTB}'\nbudget = 2\n[label.options]\nmethod = 'GFN1-xTB'\nverbosity = 0\n"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / configs.FILE).write_text(text)
    with listen(Address.unix(name)) as listener:
        program = start("serve", "--quiet")
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine:
            engine.forces(structures.read_frame(TEMPLATE).positions / 0.529177)
            found = labelled(program)

    assert {one.label.method for one in found} == {make_labeller(f"{XTB}?method=GFN1-xTB&verbosity=0").method}


def test_a_function_labels_from_the_command_line(tmp_path: Path, start: Callable[..., Program], monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by a relative path; it is executed in the labelling process alone, which works in a folder of its own."""
    (tmp_path / "mine.py").write_text(
        "import os\n\n"
        f"open({str(tmp_path / 'imported')!r}, 'a').write(f'{{os.getpid()}}\\n')\n\n\n"
        "def label(atoms, scale):\n"
        "    open('scratch', 'w').write('x')\n"
        "    details = {'pid': os.getpid(), 'folder': os.getcwd()}\n"
        "    arms = atoms.positions - atoms.positions.mean(axis=0)\n"
        "    return {'energy': scale * (arms**2).sum(), 'forces': -2 * scale * arms, 'details': details}\n"
    )
    monkeypatch.chdir(tmp_path)
    program = start("run", "cuau-water", "--label", "call:mine.py:label?scale=0.1", "--labels", "2", "--steps", "1000000")
    found = labelled(program)[0]

    assert found.label.method == "call:mine.py:label(scale=0.1)"
    assert found.label.energy == pytest.approx(0.1 * ((found.frame.positions - found.frame.positions.mean(axis=0)) ** 2).sum())
    assert (tmp_path / "imported").read_text().split() == [str(found.label.details["pid"])]
    assert found.label.details["folder"].startswith(str(program.scratch))
    assert not os.path.exists(found.label.details["folder"])


def test_a_function_that_cannot_be_imported_is_told_at_once(tmp_path: Path) -> None:
    """The run does not start: one sentence, no label spent."""
    (tmp_path / "mine.py").write_text("def label(atoms)\n    return 0.0, 0 * atoms.positions\n")
    said = command(
        "run", "cuau-water", "--label", f"call:{tmp_path / 'mine.py'}:label", "--run-dir", str(tmp_path / "run"), seconds=TIMEOUT
    )

    assert said.returncode != 0
    assert "mine.py cannot be imported: SyntaxError" in said.stdout + said.stderr
    assert "Traceback" not in said.stdout + said.stderr


def test_a_wrong_executor_is_a_sentence(tmp_path: Path) -> None:
    """Before anything starts."""
    said = command("run", "cuau-water", "--executor", "dask:localhost", "--run-dir", str(tmp_path / "run"))

    assert said.returncode == 2
    assert said.stderr.strip() == "tumbaga: label.executor: is 'dask:localhost'; write local, or dask:tcp://HOST:PORT of a Dask scheduler"
