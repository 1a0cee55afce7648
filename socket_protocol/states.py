"""Who may say what when: one transition table for both roles, as data.

`TRANSITIONS[role][state]` is a `Row`: what may be received and what may be sent in that state, and the state that follows. What is not in
the table is an error: of the peer if it was received, ours if it was to be sent. This file knows no bytes and no sockets.

Two things are not in the table because they hold everywhere: answers leave in the order of their requests, and a connection that broke
the rules is in ERROR for good.

Source: the state machines of i-PI's driver interface as spoken by i-PI 3.3, ASE 3.29 and the CP2K server.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeAlias

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


class Role(enum.Enum):
    """Which side of the conversation is ours."""

    __hash__ = object.__hash__  # members are single; Enum's own hash runs in Python and is felt in tables

    DRIVER = "driver"  # we supply forces
    ENGINE = "engine"  # we ask for forces; the "server role"


class State(enum.Enum):
    """What a connection is doing. An ENGINE's state is what it knows about the driver at the other end."""

    __hash__ = object.__hash__

    NEEDINIT = "needinit"  # DRIVER: no INIT seen yet. ENGINE: the driver asked for INIT
    READY = "ready"  # waits for a frame
    COMPUTING = "computing"  # DRIVER: the force is being computed, requests are held. ENGINE: POSDATA is sent, the force not yet asked for
    HAVEDATA = "havedata"  # the force is there and was not collected
    UNKNOWN = "unknown"  # ENGINE: at the start, and after each force: only STATUS can tell whether the driver wants INIT
    INIT_SENT = "init_sent"  # ENGINE: INIT is sent, STATUS must confirm it
    ASKED = "asked"  # ENGINE: GETFORCE is sent
    CLOSED = "closed"  # the peer is gone, or we said EXIT
    ERROR = "error"  # the peer broke the rules


class ResultReady:
    """Not a message: the step that the caller of a DRIVER takes when the force is computed (`Connection.complete`)."""

    word: Final = "(result ready)"


Word: TypeAlias = type[Event] | type[ResultReady]


@dataclass(frozen=True)
class Row:
    """What one state allows.

    Attributes:
        receive: message → state after it was taken.
        send: message → state after it was sent.
        hold: true where received requests wait in a queue until the state changes; the end of the stream never waits.
    """

    receive: Mapping[Word, State] = field(default_factory=dict)
    send: Mapping[Word, State] = field(default_factory=dict)
    hold: bool = False


S = State

_DRIVER = {
    S.NEEDINIT: Row(
        receive={Status: S.NEEDINIT, Init: S.READY, PosData: S.COMPUTING, PosBatch: S.COMPUTING, Exit: S.CLOSED},
        send={NeedInit: S.NEEDINIT},
    ),
    S.READY: Row(
        receive={Status: S.READY, Init: S.READY, PosData: S.COMPUTING, PosBatch: S.COMPUTING, Exit: S.CLOSED},
        send={Ready: S.READY},
    ),
    S.COMPUTING: Row(
        receive={Exit: S.CLOSED},
        send={ResultReady: S.HAVEDATA},
        hold=True,
    ),
    S.HAVEDATA: Row(
        receive={Status: S.HAVEDATA, Init: S.HAVEDATA, GetForce: S.HAVEDATA, Exit: S.CLOSED},
        send={HaveData: S.HAVEDATA, ForceReady: S.READY, ForceBatch: S.READY},
    ),
    S.CLOSED: Row(),
    S.ERROR: Row(),
}

_ENGINE = {
    S.UNKNOWN: Row(
        receive={NeedInit: S.NEEDINIT, Ready: S.READY, HaveData: S.HAVEDATA, Exit: S.CLOSED},
        send={Status: S.UNKNOWN, Exit: S.CLOSED},
    ),
    S.NEEDINIT: Row(
        receive={NeedInit: S.NEEDINIT, Exit: S.CLOSED},
        send={Status: S.NEEDINIT, Init: S.INIT_SENT, Exit: S.CLOSED},
    ),
    S.INIT_SENT: Row(
        receive={NeedInit: S.NEEDINIT, Ready: S.READY, Exit: S.CLOSED},
        send={Status: S.INIT_SENT, Exit: S.CLOSED},
    ),
    S.READY: Row(
        receive={NeedInit: S.NEEDINIT, Ready: S.READY, Exit: S.CLOSED},
        send={Status: S.READY, PosData: S.COMPUTING, PosBatch: S.COMPUTING, Exit: S.CLOSED},
    ),
    # READY is not allowed here: it would mean that the driver ignored POSDATA
    S.COMPUTING: Row(
        receive={HaveData: S.HAVEDATA, Exit: S.CLOSED},
        send={Status: S.COMPUTING, GetForce: S.ASKED, Exit: S.CLOSED},
    ),
    S.HAVEDATA: Row(
        receive={HaveData: S.HAVEDATA, Exit: S.CLOSED},
        send={Status: S.HAVEDATA, GetForce: S.ASKED, Exit: S.CLOSED},
    ),
    # QE wants INIT again after every force, so a force does not make the driver READY: STATUS tells
    S.ASKED: Row(
        receive={HaveData: S.ASKED, ForceReady: S.UNKNOWN, ForceBatch: S.UNKNOWN, Exit: S.CLOSED},
        send={Status: S.ASKED, Exit: S.CLOSED},
    ),
    S.CLOSED: Row(),
    # a last EXIT may go out to a driver that broke the rules: some drivers spin for ever without it
    S.ERROR: Row(send={Exit: S.ERROR}),
}

TRANSITIONS: Final[Mapping[Role, Mapping[State, Row]]] = MappingProxyType(
    {Role.DRIVER: MappingProxyType(_DRIVER), Role.ENGINE: MappingProxyType(_ENGINE)}
)

START: Final[Mapping[Role, State]] = MappingProxyType({Role.DRIVER: State.NEEDINIT, Role.ENGINE: State.UNKNOWN})

REQUEST_OF: Final[Mapping[Word, Word]] = MappingProxyType(
    {NeedInit: Status, Ready: Status, HaveData: Status, ForceReady: GetForce, ForceBatch: GetForce}
)
"""Answer → the request it answers."""

ANSWER_IN: Final[Mapping[State, Event]] = MappingProxyType({S.NEEDINIT: NeedInit(), S.READY: Ready(), S.HAVEDATA: HaveData()})
"""What a DRIVER answers to STATUS, by its state."""
