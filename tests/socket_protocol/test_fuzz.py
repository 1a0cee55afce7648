"""The fuzzer of the wire, in small: the invariant holds for some thousand inputs, and the fuzzer sees it when it does not."""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tumbaga.socket_protocol import codec, connection
from tumbaga.socket_protocol.connection import Connection, Wait
from tumbaga.socket_protocol.errors import RemoteProtocolError

FUZZ = Path(__file__).parents[1] / "fuzz"
SHM = Path("/dev/shm")


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FUZZ)
    return importlib.import_module("fuzz_wire")


def test_any_input_gives_an_event_or_a_pause_or_a_remote_error_within_the_memory_bound(fuzz: ModuleType) -> None:
    findings = fuzz.Findings()

    assert fuzz.run(20_000, 20261121, findings) == 20_000
    assert findings.failures == []
    words = {"STATUS", "INIT", "POSDATA", "GETFORCE", "NEEDINIT", "READY", "HAVEDATA", "FORCEREADY"}
    errors = {error.__name__ for error in RemoteProtocolError.__subclasses__()}
    assert (words | errors) - set(findings.told) <= {"ReadAheadError"}, "the inputs do not reach everything"
    assert not list(SHM.glob(f"ipi_shm_fuzz_{os.getpid():08x}_*"))


def broken_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = codec.decode, iter(range(10**9))

    def decode(*arguments: Any) -> Any:
        if next(calls) == 400:
            raise ValueError("not expected here")
        return real(*arguments)

    monkeypatch.setattr(connection, "decode", decode)


def broken_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "memory_bound", property(lambda self: 1000))


def broken_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Connection.next_event

    def next_event(self: Connection) -> Any:
        event = real(self)
        return Wait.NEED_DATA if event is Wait.PAUSED else event

    monkeypatch.setattr(Connection, "next_event", next_event)


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (broken_decode, "not expected here"),
        (broken_memory, "bytes of memory, bound 1000"),
        (broken_waiting, "NEED_DATA, and no data is wanted"),
    ],
)
def test_the_fuzzer_finds_what_is_broken_and_prints_an_input_that_shows_it_again(
    break_it: Callable[[pytest.MonkeyPatch], None], sentence: str, fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_it(monkeypatch)
    findings = fuzz.Findings()
    fuzz.run(600, 1, findings)

    assert any(sentence in text for text, _ in findings.failures)
    case = ast.literal_eval(repr(findings.failures[0][1]))
    assert {"role", "dialect", "chunks", "data"} <= set(case)
    if break_it is not broken_decode:  # which breaks once
        with fuzz.segments() as prefix, pytest.raises(Exception, match=sentence):
            fuzz.run_case(case, prefix, findings.told)
    assert not list(SHM.glob(f"ipi_shm_fuzz_{os.getpid():08x}_*"))


def test_an_interrupted_run_says_how_far_it_came(
    fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = iter(range(10**9))

    def interrupted(*_: object) -> None:
        if next(tried) == 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "run_case", interrupted)
    monkeypatch.setattr(fuzz, "cap_memory", lambda extra: None)

    assert fuzz.main(["--inputs", "1000", "--seed", "7"]) == 0
    assert "of 1000 inputs; seed 7" in capsys.readouterr().out
