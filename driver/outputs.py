"""Output files of engines that go on after a kill: what lies behind the state that they go on from is cut off, so no step stands twice."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tumbaga.online.versions import write_whole

_STEP = re.compile(r"Step:\s*(\d+)")


def cut_table(path: Path, step: int) -> None:
    """Keep the rows of a table up to a step, which stands in the first column; a row that is not whole goes too."""

    def keep(lines: list[str]) -> int:
        for i, line in enumerate(lines):
            if not line.endswith("\n") or (line.strip() and not line.lstrip().startswith("#") and float(line.split()[0]) > step):
                return i
        return len(lines)

    _cut(path, keep)


def cut_xyz(path: Path, step: int) -> None:
    """Keep the frames of i-PI's xyz file up to a step, which stands in the comment; a frame that is not whole goes too."""

    def keep(lines: list[str]) -> int:
        place = 0
        while place + 1 < len(lines):
            after = place + int(lines[place]) + 2
            if after > len(lines) or not lines[after - 1].endswith("\n") or _step(lines[place + 1]) > step:
                break
            place = after
        return place

    _cut(path, keep)


def cut_extras(path: Path, step: int) -> None:
    """Keep the records of i-PI's extras file up to a step, which stands in the line above each."""

    def keep(lines: list[str]) -> int:
        return next((i for i, line in enumerate(lines) if _step(line) > step or not line.endswith("\n")), len(lines))

    _cut(path, keep)


def _step(line: str) -> int:
    found = _STEP.search(line)
    return int(found.group(1)) if found else -1


def _cut(path: Path, keep: Callable[[list[str]], int]) -> None:
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = keep(lines)
    if kept < len(lines):
        write_whole(path, "".join(lines[:kept]).encode())
