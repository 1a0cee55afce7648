"""A server that belongs to a script: the script's socket file goes with it, even when the script dies while the tether is being tied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# the parent as it is when looked at first, and then when the tether is tied
LATE = "import os; told = iter(({first}, {second})); os.getppid = lambda: next(told); from tumbaga.driver import attached"


@pytest.mark.skipif(sys.platform != "linux", reason="the tether holds on Linux only")
@pytest.mark.parametrize("parents", [(1, 1), (7, 1)])
def test_a_script_that_died_meanwhile_leaves_no_socket(parents: tuple[int, int], tmp_path: Path) -> None:
    """Nothing is served for it, and its socket file is removed; `--help` would have been written."""
    path = tmp_path / "socket"
    path.touch()
    code = LATE.format(first=parents[0], second=parents[1]) + f"; attached.main(7, attached.Path({str(path)!r}), ['--help'])"

    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)

    assert done.stderr == ""
    assert done.stdout == ""
    assert not path.exists()
