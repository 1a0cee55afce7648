"""The inputs of `fuzz_wire.py`: whole conversations, and all that can be wrong with them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final, TypeVar

import numpy as np

from tumbaga.socket_protocol.batched import Batched
from tumbaga.socket_protocol.codec import SINGLE, Limits, encode
from tumbaga.socket_protocol.events import (
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
from tumbaga.socket_protocol.shm import KINDS

PREFIX: Final = "ipi_shm_fuzz_00000000_"  # in inputs; replaced by a name of this process, of the same length
LIMITS: Final = {
    "small": Limits(max_atoms=4, max_init=64, max_extras=48, max_batch=4, max_message=4096),
    "tight": Limits(max_atoms=4, max_init=64, max_extras=48, max_batch=4, max_message=560),  # below what the others allow together
    "default": Limits(),
}
DIALECTS: Final = ("single", "single", "batched", "batched", "shared")
MOST, LEAST = 2**31 - 1, -(2**31)
COUNTS: Final = (0, 1, -1, 2, 3, 4, 5, 47, 48, 49, 63, 64, 65, 1024, 1025, 100_000, 100_001, 1 << 24, 1 << 30, MOST, LEAST)
NUMBERS: Final = tuple(struct.pack("=d", number) for number in (np.nan, np.inf, -np.inf, 1e308, 5e-324, -0.0))
TEXTS: Final = (
    *(b"", b" ", b"\0", b"Initializing", b" model : a , b : c , ", b'{"numbers": [29, 79], "pbc": true}', b'{"numbers": null}'),
    *(b" batch_size:%d" % size for size in (0, 1, 2, 3, 4, 5, -1, 1024, 1025, 10**9, 2**31 - 1, 2**31)),
    *(b"batch_size:" + b"9" * 50, b"batch_size:NaN", b"batch_size:1e400", b"batch_size:4_0", b"batch_size:\xd9\xa4", b"batch_size"),
    *(b"[" * 64, b'{"a":' * 12, b'{"batch_size": 3}', b'{"batch_size": [1]}', b'{"batch_size": 1e999}', b'{"batch_size": true}'),
    *(b"\xff\xfe\xfd", b",:,:,::,", b"species: Cu3Au(H2O)2", b"species: Cu99999999999", b"species: ((((", b"x" * 64, b"x" * 65),
)
EXTRAS: Final = (
    *(b"", b" ", b"\0", b'{"a": 1}', b'{"b": [1, 2]}', b'{"raw": 1}', b'{"r\\u0061w": 1}', b"123", b"[1]", b"null", b'"a"', b"\xff"),
    *(b'{"a": NaN}', b'{"a": 1e999}', b'{"a": -Infinity}', b'{"a": "\\ud800"}', b'{"a": 1', b"{a: 1}", b'{"a": 01}', b"x" * 48, b"x" * 49),
    *(b'{"a":' * 300 + b"1" + b"}" * 300, b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}", b'{"a":' + b"9" * 5000 + b"}"),
)
GOOD = b'{"a": 1}'  # in all right answers: keys stay the same in a session
Case = dict[str, Any]
Thing = TypeVar("Thing")


@cache
def frame(size: int, atoms: int) -> PosData | PosBatch:
    """Return a good frame; size 0 or 1 is a single one."""
    rng = np.random.default_rng(atoms)
    if size < 2:
        return PosData(9 * np.eye(3), rng.normal(size=(atoms, 3)))
    return PosBatch(np.stack([9 * np.eye(3)] * size), rng.normal(size=(size, atoms, 3)))


@cache
def answer(size: int, atoms: int, extras: bytes = GOOD) -> ForceReady | ForceBatch:
    """Return an answer; size 0 or 1 is a single one."""
    if size < 2:
        return ForceReady(-1.0, np.ones((atoms, 3)), np.eye(3), extras)
    return ForceBatch(np.zeros(size), np.ones((size, atoms, 3)), np.ones((size, 3, 3)), (extras,) * size)


@cache
def init(size: int) -> bytes:
    """Return the INIT that announces a batch size."""
    return encode(Init(1, b" model : a , batch_size:%d" % size if size > 1 else b" "))


def names(group: str) -> bytes:
    """Return the names of six segments as they travel."""
    return b"".join(struct.pack("=i", len(name)) + name.encode() for name in (PREFIX + group + kind for kind in KINDS))


@cache
def talk(role: str, dialect: str, size: int, atoms: int, classic: bool) -> tuple[bytes, ...]:
    """Return what one peer says in a conversation in which nothing is wrong."""
    words = {word: encode(word()) for word in (Status, GetForce, NeedInit, Ready, HaveData)}
    layout = SINGLE if dialect == "single" or size == 1 else Batched(size)
    if role == "driver":
        frames = [layout.pack_posdata(frame(0 if dialect == "single" else size, atoms))] * 3
        if dialect == "shared":
            bare = b"POSDATA     " + struct.pack("=i", atoms)
            frames = [bare + names("good_"), bare, bare]
        start = [words[Status], init(size if dialect != "single" else 1), words[Status]]
        middle = [words[Status]] if classic else []
        return tuple(start + [part for one in frames for part in (one, *middle, words[GetForce], words[Status])])
    reply = layout.pack_forceready(answer(0 if dialect == "single" else size, atoms))
    if dialect == "shared":
        reply = b"FORCEREADY  " + (struct.pack("=i", len(GOOD)) + GOOD) * size
    cycle = [words[Ready], words[HaveData], reply] if classic else [words[Ready], reply]
    return (words[NeedInit], *cycle, *cycle, words[NeedInit], *cycle)


def scraps() -> Iterator[bytes]:
    """Yield single messages, good, odd and hopeless."""
    yield from (encode(word()) for word in (Status, GetForce, Exit, NeedInit, Ready, HaveData))
    yield from (b"BUSY        ", b"status      ", b"STATUS\0\0\0\0\0\0", struct.pack("=iii", 1, 4, 16), b"POSDATA     ", b"FORCEREADY  ")
    for text in TEXTS:
        yield b"INIT        " + struct.pack("=ii", 7, len(text)) + text
    for size, atoms in ((0, 1), (0, 4), (0, 5), (3, 2), (2, 2), (4, 4), (5, 1)):
        layout = Batched(size) if size else SINGLE
        yield layout.pack_posdata(frame(size, atoms))
        yield from (layout.pack_forceready(answer(size, atoms, extras)) for extras in EXTRAS[:21])
    bare = b"POSDATA     " + struct.pack("=i", 2)
    yield from (bare, *(bare + names(group) for group in ("good_", "nan_", "tiny_", "cut_", "none_")))
    yield bare + names("good_").replace(b"pos", b"../")
    yield b"FORCEREADY  " + struct.pack("=i", 0)


SCRAPS: Final = tuple(scraps())


def pick(rng: random.Random, things: Sequence[Thing]) -> Thing:
    """Return one of `things`; what `rng.choice` does, in a third of the time."""
    return things[int(rng.random() * len(things))]


def spoil(rng: random.Random, data: bytes) -> bytes:
    """Return `data` with something wrong in it."""
    spoilt = bytearray(data)
    place = pick(rng, (12, 16, 20, 24, 156, 160, rng.randrange(len(data) + 1)))
    kind = rng.randrange(7)
    if kind == 0 and data:
        spoilt[rng.randrange(len(data))] = rng.getrandbits(8)
    elif kind == 1:
        spoilt[place : place + 4] = struct.pack("=i", pick(rng, COUNTS))
    elif kind == 2:
        spoilt[place : place + 8] = pick(rng, NUMBERS)
    elif kind == 3:
        del spoilt[place : place + rng.randrange(1, 30)]
    elif kind == 4:
        spoilt[place:place] = rng.randbytes(rng.randrange(1, 30))
    elif kind == 5:
        spoilt += spoilt[place : place + 100]
    else:
        del spoilt[place:]
    return bytes(spoilt)


def spliced(rng: random.Random, parts: list[bytes]) -> list[bytes]:
    """Return a conversation with messages lost, repeated, swapped, spoilt, or slipped in."""
    for _ in range(rng.randrange(1, 4)):
        kind, place = rng.randrange(5), rng.randrange(len(parts) + 1)
        if kind == 0:
            parts[place : place + 1] = []
        elif kind == 1:
            parts[place:place] = parts[place - 1 : place + 1]
        elif kind == 2:
            parts[place:place] = [pick(rng, SCRAPS)]
        elif parts:
            place = min(place, len(parts) - 1)
            parts[place] = spoil(rng, parts[place])
    return parts


def make_case(rng: random.Random) -> Case:
    """Return the next input: the bytes, how they are cut, and a number that decides all that the caller does."""
    role, dialect = pick(rng, ("driver", "engine")), pick(rng, DIALECTS)
    size, atoms, classic = rng.randrange(1 + (dialect == "batched"), 5), rng.randrange(1, 5), rng.random() < 0.4
    limits = pick(rng, ("small", "small", "small", "tight", "default"))
    kind = rng.choices(("valid", "spliced", "scraps", "noise", "flood"), (5, 55, 20, 20, 0.02))[0]
    parts = list(talk(role, dialect, size, atoms, classic))
    if kind == "valid":
        limits = "small"
    elif kind == "spliced":
        start = int(rng.random() * 3)
        parts = spliced(rng, parts[start : start + 2 + int(rng.random() * 4)])
    elif kind == "scraps":
        parts = rng.choices(SCRAPS, k=1 + int(rng.random() * 3))
    elif kind == "noise":
        parts = [pick(rng, (b"", *SCRAPS[:14])), rng.randbytes(rng.randrange(200))]
    else:
        scrap = pick(rng, SCRAPS)
        parts = [scrap] * (3_000_000 // len(scrap))
    data = b"".join(parts)
    return {
        "kind": kind, "role": role, "dialect": dialect, "size": size, "atoms": atoms, "classic": classic, "limits": limits,
        "expected": pick(rng, (None, atoms) if kind == "valid" else (None, None, None, atoms, 2)),
        "caller": rng.getrandbits(62), "chunks": chunking(rng, data), "data": data,
    }  # fmt: skip


def chunking(rng: random.Random, data: bytes) -> tuple[int, ...]:
    """Return sizes of pieces; the last one is repeated to the end."""
    kind, size = rng.randrange(64), len(data)
    if kind < 24 or size > 10_000:
        return (size or 1,)
    if kind == 24:
        return (1,) if size < 200 else (13,)
    if kind < 28:
        return (pick(rng, (5, 7, 11, 12, 13)),) if size < 200 else (100,)
    return (*(pick(rng, (1, 3, 11, 12, 13, rng.randrange(1, 400))) for _ in range(rng.randrange(1, 4))), size or 1)
