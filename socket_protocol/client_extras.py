"""What the extras of a client's answer say. They are the client's own words: nothing in them can be an error here.

What we send ourselves is checked in `extras.py`; this file is for what others send to our server role.

Source: ASE sends one NUL, LAMMPS and CP2K nothing, i-PI's Python driver and QE sometimes JSON, Rootstock JSON with a key `error`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MOST_BYTES: Final = 1 << 20  # beyond this nothing is parsed, and of the text only the beginning is kept
_MOST_SAID: Final = 400  # characters of an error in a log line


@dataclass(frozen=True)
class ClientExtras:
    """What was understood.

    Attributes:
        values: the keys of a JSON object, NaN and infinities as None; empty for everything else.
        text: the whole as text, without blanks and NULs around it.
        error: what the client says went wrong, or None.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    error: str | None = None


NOTHING: Final = ClientExtras()


def read_extras(extras: bytes) -> ClientExtras:
    """Return what can be understood of the extras of a FORCEREADY; never raises.

    >>> read_extras(b"\\0")
    ClientExtras(values={}, text='', error=None)
    >>> read_extras(b'{"dipole": [0, 0, 1]}').values
    {'dipole': [0, 0, 1]}
    >>> read_extras(b'{"error": "SCF failed"}').error
    'SCF failed'
    """
    text = extras[:MOST_BYTES].decode("utf-8", "replace").strip(" \0\t\r\n")
    if not text:
        return NOTHING
    values: dict[str, Any] = {}
    if text.startswith("{") and len(extras) <= MOST_BYTES:
        try:
            values = _DECODER.decode(text)
        except (ValueError, RecursionError):
            values = {}
    return ClientExtras(values, text, _error(values))


def _error(values: Mapping[str, Any]) -> str | None:
    """An empty error is none: some clients send the same keys each time."""
    said = values.get("error")
    if not said:
        return None
    text = said if isinstance(said, str) else repr(said)
    return text.strip()[-_MOST_SAID:] or None  # the end of a traceback says what happened


def _finite(number: str) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=lambda _constant: None)
