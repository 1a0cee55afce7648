"""What stands where in each message, as data: for the documentation, and for tests that hold it against the encoder.

Sizes are sums of products: `Size` maps "", "N" (atoms), "B" (configurations), "BN" and "L" (bytes of text) to a factor in bytes.
This file encodes and decodes nothing; `codec.py`, `batched.py` and `shm.py` do, and know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

Size: TypeAlias = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a message.

    Attributes:
        name: what the tables call it.
        type: `i4`, `f8` or `bytes`, with its shape.
        size: in bytes.
        unit: empty for pure numbers and text.
        note: what it means.
    """

    name: str
    type: str
    size: Size
    unit: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """A message in one dialect.

    Attributes:
        word: its header.
        dialect: `single`, `batched` or `shared`; empty if it is the same in all.
        fields: what follows the header.
    """

    word: str
    dialect: str
    fields: tuple[Field, ...]

    def placed(self) -> Iterator[tuple[Size, Field]]:
        """Yield each field with its offset from the first byte of the header."""
        offset: dict[str, int] = {"": 12}
        for field in self.fields:
            yield dict(offset), field
            offset = add(offset, field.size)

    @property
    def size(self) -> Size:
        """The size of the whole message."""
        total: dict[str, int] = {"": 12}
        for field in self.fields:
            total = add(total, field.size)
        return total


def add(one: Size, other: Size) -> dict[str, int]:
    """Return the sum of two sizes.

    >>> add({"": 12}, {"": 4, "N": 24})
    {'': 16, 'N': 24}
    """
    return {key: one.get(key, 0) + other.get(key, 0) for key in (*one, *(key for key in other if key not in one))}


def written(size: Size) -> str:
    """Return a size as text.

    >>> written({"": 16, "B": 84, "BN": 24, "L": 1})
    '16 + 84·B + 24·B·N + L'
    """
    parts = [f"{factor}·{'·'.join(key)}" if factor != 1 else key for key, factor in size.items() if factor and key]
    return " + ".join([str(size[""])] * bool(size.get("")) + parts)


def value(size: Size, *, atoms: int = 0, configurations: int = 0, text: int = 0) -> int:
    """Return a size in bytes.

    >>> value({"": 28, "B": 144, "BN": 24}, atoms=3, configurations=2)
    460
    """
    factors = {"": 1, "N": atoms, "B": configurations, "BN": configurations * atoms, "L": text}
    return sum(factor * factors[key] for key, factor in size.items())


_COUNT = Field("N", "i4", {"": 4}, "", "atoms, at least 1")
_CELL = "lattice vectors are the **columns**: `h[:, 0]` is the first"
_INVERSE = Field("second matrix", "f8 (3, 3)", {"": 72}, "1/Bohr", "inverse of h, or its transpose, or zeros: **never read**")
_FORCES = "−dE/dR in the order of the positions"
_VIRIAL = "W = −dE/d(strain), **not** divided by the volume; positive trace: the cell is pushed outwards; send all nine numbers"
_EXTRAS = "see *Extras*"

MESSAGES: Final = (
    Message(
        "INIT",
        "",
        (
            Field("rid", "i4", {"": 4}, "", "i-PI's replica counter; ASE sends 0"),
            Field("length", "i4", {"": 4}, "bytes", "at least 1 when you send; 0 is accepted"),
            Field("text", "bytes", {"L": 1}, "", "see *Text of INIT*"),
        ),
    ),
    Message(
        "POSDATA",
        "single",
        (
            Field("h", "f8 (3, 3)", {"": 72}, "Bohr", _CELL),
            _INVERSE,
            _COUNT,
            Field("positions", "f8 (N, 3)", {"N": 24}, "Bohr", "need not be wrapped into the cell"),
        ),
    ),
    Message(
        "FORCEREADY",
        "single",
        (
            Field("energy", "f8", {"": 8}, "Hartree", "potential energy"),
            _COUNT,
            Field("forces", "f8 (N, 3)", {"N": 24}, "Hartree/Bohr", _FORCES),
            Field("virial", "f8 (3, 3)", {"": 72}, "Hartree", _VIRIAL),
            Field("length", "i4", {"": 4}, "bytes", "may be 0"),
            Field("extras", "bytes", {"L": 1}, "", _EXTRAS),
        ),
    ),
    Message(
        "POSDATA",
        "batched",
        (
            _COUNT,
            Field("h, second matrix", "f8 (B, 2, 3, 3)", {"B": 144}, "Bohr, 1/Bohr", "as above, pair by pair"),
            Field("positions", "f8 (B, N, 3)", {"BN": 24}, "Bohr", "one N for all"),
        ),
    ),
    Message(
        "FORCEREADY",
        "batched",
        (
            Field("energies", "f8 (B,)", {"B": 8}, "Hartree"),
            _COUNT,
            Field("forces", "f8 (B, N, 3)", {"BN": 24}, "Hartree/Bohr", _FORCES),
            Field("virials", "f8 (B, 3, 3)", {"B": 72}, "Hartree", "as above"),
            Field("length, extras", "B × (i4, bytes)", {"B": 4, "L": 1}, "", "one text for each configuration; L: all texts together"),
        ),
    ),
    Message(
        "POSDATA",
        "shared",
        (
            _COUNT,
            Field(
                "length, name",
                "6 × (i4, bytes)",
                {"": 24, "L": 1},
                "",
                "only in the first POSDATA of a session; order: pos, h, ih, pot, force, vir",
            ),
        ),
    ),
    Message("FORCEREADY", "shared", (Field("length, extras", "B × (i4, bytes)", {"B": 4, "L": 1}, "", _EXTRAS),)),
)
"""All messages that are more than a header. `h` travels as 9 numbers, row after row."""

SEGMENTS: Final = (
    ("pos", "f8 (B, 3·N)", "Bohr", "engine"),
    ("h", "f8 (B, 3, 3)", "Bohr", "engine"),
    ("ih", "f8 (B, 3, 3)", "1/Bohr", "engine; never read"),
    ("pot", "f8 (B,)", "Hartree", "driver"),
    ("force", "f8 (B, 3·N)", "Hartree/Bohr", "driver"),
    ("vir", "f8 (B, 3, 3)", "Hartree", "driver"),
)
"""The segments of shared memory: kind, type, unit, who writes. Layout of h, signs and order are those of the single messages."""
