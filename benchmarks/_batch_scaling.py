"""What a back end gains by batches, in process: `python _batch_scaling.py MODEL STRUCTURE ...`

Each line of standard input is a number of seconds; for so long, a batch of one frame of each structure and the same frames one by one take
turns, as the evaluator would compute them. One line of JSON comes back: frames a second, "batched" and "single". A process of its own, so
that the memory of others is not counted as shared with this one for longer than that takes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence

from _raw_engines import moved

from tumbaga.driver import process, structures
from tumbaga.driver.backends import registry
from tumbaga.driver.slot import BASE, Slot
from tumbaga.online.records import Frame

_MIX = (BASE, BASE, 0.0)
_WARM = 3


def batches(files: Sequence[str]) -> Iterator[list[Frame]]:
    """A frame of each structure, others each time."""
    templates = [structures.read_frame(file) for file in files]
    positions = [moved(structures.to_atoms(template), seed) for seed, template in enumerate(templates)]
    while True:
        for each in zip(*positions, strict=True):
            yield [Frame(template.numbers, one) for template, one in zip(templates, each, strict=True)]


def turn(slot: Slot, frames: list[Frame]) -> tuple[float, float]:
    """Seconds that the frames take as one batch, and one by one."""
    began = time.perf_counter()
    slot.answer(frames, [_MIX] * len(frames))
    between = time.perf_counter()
    for frame in frames:
        slot.answer([frame], [_MIX])
    return between - began, time.perf_counter() - between


def rates(slot: Slot, source: Iterator[list[Frame]], seconds: float) -> dict[str, float]:
    """Frames a second, batched and one by one."""
    batched = single = 0.0
    frames = 0
    while batched + single < seconds:
        asked = next(source)
        took = turn(slot, asked)
        batched, single, frames = batched + took[0], single + took[1], frames + len(asked)
    return {"batched": frames / batched, "single": frames / single}


def main() -> None:
    process.keep_memory()  # as the evaluator does
    slot, source = Slot(registry.load(sys.argv[1])), batches(sys.argv[2:])
    for _ in range(_WARM):
        turn(slot, next(source))
    for line in sys.stdin:
        print(json.dumps(rates(slot, source, float(line))), flush=True)


if __name__ == "__main__":
    main()
