"""What may stand in the extras of our answers, so that no engine that reads them dies of it.

i-PI 3.3 turns a JSON object into its keys plus `raw`; a JSON value that is no object, an object with a key `raw`, or bytes that are not
UTF-8 end its polling thread, after which the run hangs for ever. Keep the text ASCII where you can: some peers count characters.

Source: i-PI `ipi/interfaces/utils.py`, and what was seen when each case was sent.
"""

from __future__ import annotations

import re

import msgspec

from tumbaga.socket_protocol.errors import ExtrasError


def check_extras(extras: bytes) -> frozenset[str]:
    """Return the keys of `extras` (none if blank) after checking that an engine can digest them.

    NaN and Infinity are refused although i-PI would read them: they are no JSON, and no such number may leave on the wire.

    Raises:
        ExtrasError: neither blank nor a JSON object in UTF-8, or an object with the key `raw`, or with a NaN.

    >>> sorted(check_extras(b'{"force_std": 0.1}')), sorted(check_extras(b" "))
    (['force_std'], [])
    """
    if not extras:
        return frozenset()
    try:
        extras.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise ExtrasError(f"are not UTF-8 at byte {problem.start}") from problem
    if not extras.strip(b" \t\r\n"):
        return frozenset()
    try:
        described = _OBJECT.decode(extras)
    except msgspec.ValidationError as problem:
        raise ExtrasError(f"{extras[:40]!r} are JSON, but no object") from problem
    except (msgspec.DecodeError, RecursionError) as problem:
        raise ExtrasError(f"{extras[:40]!r} are not JSON ({problem})") from problem
    if len(extras) > _DIGITS and _LONG_NUMBER.search(extras):
        raise ExtrasError(f"hold a number of more than {_DIGITS} digits, which Python's JSON does not read")
    if "raw" in described:
        raise ExtrasError("have the key 'raw', which i-PI claims for itself")
    return frozenset(described)


_DIGITS = 4300
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % _DIGITS)
# only the keys matter: the values are checked to be JSON and not built
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
