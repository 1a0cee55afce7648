"""What real i-PI 3.3.1 said, recorded by `tests/golden/record_ipi.py`, is understood and answered byte for byte as it was then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tumbaga.socket_protocol.codec import Limits, decode
from tumbaga.socket_protocol.connection import Connection, Role, State, Wait
from tumbaga.socket_protocol.events import Exit, ForceReady, GetForce, Init, PosData, Status

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("chunk", [1, 50, 10_000])
@pytest.mark.parametrize("dialect", ["pipelined", "classic"])
def test_the_recorded_conversation_is_repeated(dialect: str, chunk: int) -> None:
    turns = [json.loads(line) for line in (GOLDEN / f"ipi_{dialect}.jsonl").read_text().splitlines()]
    heard = b"".join(bytes.fromhex(turn["hex"]) for turn in turns if turn["from"] == "engine")
    expected = b"".join(bytes.fromhex(turn["hex"]) for turn in turns if turn["from"] == "driver")
    driver = Connection(Role.DRIVER, expected_atoms=2)
    said = b""
    texts, frames = [], 0
    # EXIT comes alone: i-PI says it after our last answer, and it would cut short what stands before it in the same piece
    requests, end = heard[:-12], heard[-12:]
    for piece in [*(requests[start : start + chunk] for start in range(0, len(requests), chunk)), end]:
        driver.receive_data(piece)
        while not isinstance(event := driver.next_event(), Wait | Exit):
            if isinstance(event, Status):
                said += driver.answer_status()
            elif isinstance(event, Init):
                texts.append(event.text)
            elif isinstance(event, PosData):
                assert event.periodic
                assert np.allclose(np.tril(event.cell), event.cell)  # i-PI's vectors as rows: a along x
                driver.complete()
                frames += 1
            elif isinstance(event, GetForce):
                result = decode(Role.ENGINE, bytearray(expected[len(said) :]), Limits())
                assert result is not None
                assert isinstance(result.event, ForceReady)
                said += driver.send(result.event)

    assert said == expected
    assert texts == [b" model : abc , "]
    assert frames == 4
    assert driver.state is State.CLOSED
