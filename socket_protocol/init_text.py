"""What the free text of INIT says. It comes from the user's input file by way of the engine, so nothing in it can be an error here.

tumbaga reads `species` (a formula in the order of the atoms) and `pbc` there as well: `<parameters>{species: Cu3Au(H2O)2}</parameters>`.

Source: i-PI writes `<parameters>{...}</parameters>` as " k : v , k : v , " and appends "batch_size:B" for batches; ASE sends one NUL;
CP2K sends "Initializing"; Rootstock sends a JSON object with `numbers` and `pbc`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_MOST_FRAMES = 2**31 - 1
_MOST_PAIRS = 256  # looked at; a text of commas must not keep anybody waiting


@dataclass(frozen=True, slots=True)
class InitInfo:
    """What was understood of an INIT text.

    Attributes:
        numbers: atomic numbers in the order of the positions, or None where the text does not tell.
        pbc: periodicity along the three lattice vectors, or None where the text does not tell.
        species: a formula whose elements are in the order of the positions, not read here; empty where the text does not tell.
        batch_size: frames in one message; 1 is the plain layout.
    """

    numbers: tuple[int, ...] | None = None
    pbc: tuple[bool, bool, bool] | None = None
    batch_size: int = 1
    species: str = ""


def parse_init(text: bytes) -> InitInfo:
    """Return what can be understood of the text of INIT; never raises, and junk gives `InitInfo()`.

    >>> parse_init(b" model : abc , , batch_size:4")
    InitInfo(numbers=None, pbc=None, batch_size=4, species='')
    >>> parse_init(b'{"numbers": [29, 79], "pbc": [false, false, true]}')
    InitInfo(numbers=(29, 79), pbc=(False, False, True), batch_size=1, species='')
    >>> parse_init(b" species : Cu3Au , pbc : true , ").species
    'Cu3Au'
    """
    plain = text.decode("utf-8", "replace").strip(" \0\t\r\n")
    try:
        described = json.loads(plain)
    except (ValueError, RecursionError):
        described = None
    if isinstance(described, dict):
        species = described.get("species", "")
        size = _batch_size(described.get("batch_size", 1))
        return InitInfo(_numbers(described.get("numbers")), _pbc(described.get("pbc")), size, species if isinstance(species, str) else "")
    # i-PI appends the batch size at the end, however long the rest is
    tokens = (*plain.split(",", _MOST_PAIRS)[:_MOST_PAIRS], plain.rpartition(",")[2])
    pairs = {key.strip(): value.strip() for key, _, value in (token.partition(":") for token in tokens)}
    pbc = _WORDS.get(pairs.get("pbc", "").lower())
    return InitInfo(None, None if pbc is None else (pbc,) * 3, _batch_size(pairs.get("batch_size", 1)), pairs.get("species", ""))


_WORDS = {"true": True, "t": True, "1": True, "yes": True, "false": False, "f": False, "0": False, "no": False}


def _numbers(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list) or not value or not all(type(number) is int and 0 < number < 200 for number in value):
        return None
    return tuple(value)


def _pbc(value: Any) -> tuple[bool, bool, bool] | None:
    if isinstance(value, bool):
        return (value, value, value)
    if not isinstance(value, list) or len(value) != 3 or not all(flag in (0, 1) for flag in value):
        return None
    return (bool(value[0]), bool(value[1]), bool(value[2]))


def _batch_size(value: Any) -> int:
    try:
        size = int(value)
    except (TypeError, ValueError, OverflowError):
        return 1
    return size if 1 <= size <= _MOST_FRAMES else 1
