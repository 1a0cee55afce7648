"""Write `docs/protocol.md`: `python -m tumbaga.socket_protocol.document > docs/protocol.md`.

Tables of states, limits, errors and layouts, and the transcripts of conversations, come from the code that they describe; the sentences
between them stand in `prose.py`.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from tumbaga.socket_protocol import errors, prose
from tumbaga.socket_protocol.codec import Limits
from tumbaga.socket_protocol.connection import Connection, Role, Wait
from tumbaga.socket_protocol.events import (
    Event,
    Exit,
    ForceBatch,
    ForceReady,
    GetForce,
    HaveData,
    Init,
    NeedInit,
    PosBatch,
    PosData,
    Ready,
    Status,
)
from tumbaga.socket_protocol.layouts import MESSAGES, SEGMENTS, Message, written
from tumbaga.socket_protocol.states import REQUEST_OF, START, TRANSITIONS, ResultReady, Row, State, Word

HEADER: Final = "<!-- Written by `python -m tumbaga.socket_protocol.document > docs/protocol.md`: change that, not this. -->"
_REQUESTS: Final[tuple[Word, ...]] = (Status, Init, PosData, GetForce, Exit)
_ANSWERS: Final[tuple[Word, ...]] = (NeedInit, Ready, HaveData, ForceReady, Exit)
_TWINS: Final[dict[Word, Word]] = {PosData: PosBatch, ForceReady: ForceBatch}

EXAMPLES: Final[tuple[errors.RemoteProtocolError, ...]] = (
    errors.UnknownHeaderError(b"BUSY        ", ("NEEDINIT", "READY", "HAVEDATA", "FORCEREADY")),
    errors.OutOfTurnError("READY", "GETFORCE", ("STATUS", "INIT", "POSDATA")),
    errors.AtomCountError(38, 39),
    errors.BadLengthError("number of atoms", -1, 1),
    errors.MessageTooLargeError("number of atoms", 2_000_000, Limits().max_atoms),
    errors.NotFiniteError("POSDATA positions"),
    errors.SharedMemoryError(
        "there is no segment 'ipi_shm_4711_9_pos' (No such file or directory); engine and driver must share one machine"
    ),
    errors.ReadAheadError(7_000_000, 6_897_472),
)
"""One of each kind, for its sentence."""


def document() -> str:
    """Return the whole text of `docs/protocol.md`."""
    parts = (
        HEADER,
        prose.TITLE,
        prose.ROLES,
        "## States",
        prose.STATES,
        *(_states(role) for role in Role),
        prose.ORDER,
        _orders(),
        "## Messages",
        prose.MESSAGES,
        *(_layout(message) for message in MESSAGES if message.dialect in ("", "single")),
        prose.CELLS,
        "## Dialects",
        prose.DIALECTS,
        _conversation("Classic", _classic()),
        _conversation("Pipelined", _pipelined()),
        _conversation("Batched", _batched()),
        prose.BATCHED,
        *(_layout(message) for message in MESSAGES if message.dialect == "batched"),
        prose.SHARED,
        *(_layout(message) for message in MESSAGES if message.dialect == "shared"),
        _table(("segment", "type", "unit", "written by"), SEGMENTS),
        prose.INIT_TEXT,
        prose.EXTRAS,
        "## Limits",
        prose.LIMITS,
        _limits(),
        "## How a session ends",
        prose.ENDS,
        _errors(),
        prose.TRAPS,
    )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- states -------------------------------------------------------------------------------------------------------------------------


def _states(role: Role) -> str:
    """Return the two tables of a role."""
    driver = role is Role.DRIVER
    received, sent = (_REQUESTS, (*_ANSWERS[:-1], ResultReady)) if driver else (_ANSWERS, _REQUESTS)
    return "\n\n".join(
        (
            f"### {role.name}, received → next state",
            f"It begins in {START[role].name}.",
            _table(("state", *(word.word for word in received)), [_received(role, state, received) for state in TRANSITIONS[role]]),
            f"### {role.name}, sent → next state",
            _table(("state", *(word.word for word in sent)), [_sent(role, state, sent) for state in TRANSITIONS[role]]),
        )
    )


def _received(role: Role, state: State, words: Sequence[Word]) -> list[str]:
    row = TRANSITIONS[role][state]
    return [f"**{state.name}**", *(_next(row, row.receive.get(word), state) for word in words)]


def _sent(role: Role, state: State, words: Sequence[Word]) -> list[str]:
    sent = TRANSITIONS[role][state].send
    return [f"**{state.name}**", *(_named(sent.get(word), state) for word in words)]


def _next(row: Row, state: State | None, now: State) -> str:
    return "*held*" if state is None and row.hold else _named(state, now)


def _named(state: State | None, now: State) -> str:
    return "–" if state is None else "stays" if state is now else state.name


def _orders() -> str:
    """Return which answer belongs to which request."""
    answers: dict[str, list[str]] = {}
    for answer, request in REQUEST_OF.items():
        words = answers.setdefault(request.word, [])
        words += [answer.word] * (answer.word not in words)
    return _table(("request", "answered by"), [(request, ", ".join(words)) for request, words in answers.items()])


# --- messages -----------------------------------------------------------------------------------------------------------------------


def _layout(message: Message) -> str:
    title = f"### {message.word}" + (f", {message.dialect}" if message.dialect else "")
    rows = [(written(offset), field.type, field.name, field.unit, field.note) for offset, field in message.placed()]
    rows.insert(0, ("0", "bytes", f"`{message.word.ljust(12)}`", "", "12 bytes"))
    return f"{title}\n\n{_table(('offset', 'type', 'field', 'unit', 'meaning'), rows)}\n\nWhole size in bytes: {written(message.size)}."


# --- conversations ------------------------------------------------------------------------------------------------------------------

_FRAME = PosData(10 * np.eye(3), np.zeros((2, 3)))
_RESULT = ForceReady(0.0, np.zeros((2, 3)), np.zeros((3, 3)))
_Write = tuple[Role, tuple[Event, ...]]


def _say(role: Role, *events: Event) -> _Write:
    return role, events


def _start(text: bytes) -> list[_Write]:
    return [
        _say(Role.ENGINE, Status()),
        _say(Role.DRIVER, NeedInit()),
        _say(Role.ENGINE, Init(0, text), Status()),
        _say(Role.DRIVER, Ready()),
    ]


def _classic() -> list[_Write]:
    return [
        *_start(b" "),
        _say(Role.ENGINE, _FRAME),
        _say(Role.ENGINE, Status()),
        _say(Role.DRIVER, HaveData()),
        _say(Role.ENGINE, GetForce()),
        _say(Role.DRIVER, _RESULT),
        _say(Role.ENGINE, Exit()),
    ]


def _pipelined() -> list[_Write]:
    return [
        *_start(b" "),
        _say(Role.ENGINE, _FRAME, GetForce(), Status()),
        _say(Role.DRIVER, _RESULT),
        _say(Role.DRIVER, Ready()),
        _say(Role.ENGINE, Exit()),
    ]


def _batched() -> list[_Write]:
    return [
        *_start(b" batch_size:4"),
        _say(Role.ENGINE, PosBatch.of([_FRAME], 4), GetForce(), Status()),
        _say(Role.DRIVER, ForceBatch.of([_RESULT], 4)),
        _say(Role.DRIVER, Ready()),
        _say(Role.ENGINE, Exit()),
    ]


def _conversation(title: str, writes: list[_Write]) -> str:
    """Return a conversation as text, after having it between two connections, so that nothing impossible is printed."""
    ends = {Role.ENGINE: Connection(Role.ENGINE), Role.DRIVER: Connection(Role.DRIVER)}
    lines = []
    for role, events in writes:
        other = Role.DRIVER if role is Role.ENGINE else Role.ENGINE
        data = b"".join(ends[role].send(event) for event in events)
        ends[other].receive_data(data)
        for end in ends.values():
            _hear(end)
        words = " · ".join(event.word + (f" {event.text.decode()!r}" if isinstance(event, Init) else "") for event in events)
        lines.append(f"{'engine →' if role is Role.ENGINE else '  driver →':12s}{words:40s}{len(data):5d} bytes")
    return f"### {title}\n\n{prose.CONVERSATIONS[title]}\n\n```text\n" + "\n".join(lines) + "\n```"


def _hear(connection: Connection) -> None:
    """Take what can be taken; forces are there at once."""
    while not isinstance(event := connection.next_event(), Wait | Exit):
        if isinstance(event, PosData | PosBatch) and connection.role is Role.DRIVER:
            connection.complete()


# --- limits and errors --------------------------------------------------------------------------------------------------------------


def _limits() -> str:
    """Return the table of `Limits`, with its own words."""
    said = dict(re.findall(r"^ {8}(\w+): (.+?)$", Limits.__doc__ or "", re.MULTILINE))
    rows = [(f"`{field.name}`", f"{field.default:,}".replace(",", " "), said[field.name]) for field in dataclasses.fields(Limits)]
    return _table(("limit", "default", "of what"), rows)


def _errors() -> str:
    """Return the table of what the peer can do wrong."""
    return _table(
        ("error", "when", "for example"),
        [(f"`{type(error).__name__}`", (type(error).__doc__ or "").split("\n")[0], f"*{error}*".replace("|", "\\|")) for error in EXAMPLES],
    )


if __name__ == "__main__":
    sys.stdout.write(document())
