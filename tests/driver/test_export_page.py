"""The page on export and import: its commands do what it shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver import cli
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Store

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
BLOCKS = re.findall(r"```\n(\$ .*?)```", PAGE, re.DOTALL)
METHOD = "pyscf:pbe/def2-svp/grid2/df-jfit"


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's run, with twelve labels, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("runs/first").mkdir(parents=True)
    with Store(Path("runs/first") / FILE) as store:
        for seed in range(12):
            rng = np.random.default_rng(seed)
            frame = Frame(np.array([79, 29, 8, 1, 1]), rng.standard_normal((5, 3)))
            forces = rng.standard_normal((5, 3))
            number = store.add_flag(
                frame, session="s", step=seed, reason=Reason.UNCERTAIN, score=0.05 * seed, version=0, energy=0.0, forces=forces + 0.1
            )
            store.enqueue(number, Reason.UNCERTAIN, Role.HOLDOUT if seed % 4 == 1 else Role.TRAIN, 1.0)
            store.add_label(store.start_task(number, "label-0", 1), Label(-53210.1 * 5, forces, METHOD, 20.0))


@pytest.mark.usefixtures("first")
def test_its_commands_say_what_it_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command that the page shows with its output gives that output, one after the other; then its script reads the files."""
    pytest.importorskip("dpdata")
    pytest.importorskip("chemiscope")
    shown = [part.split("\n", 1) for block in BLOCKS for part in block.removeprefix("$ ").split("\n$ ")]
    assert len(shown) == 6
    for command, output in shown:
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert (left.value.code or 0, capsys.readouterr().out.strip()) == (0, output.strip()), command

    (script,) = re.findall(r"```python\n# read.py\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "12 frames, 3 held out, largest error 0.17 eV/Å\n7 of them were served with more than 0.2 eV/Å of uncertainty\n"
