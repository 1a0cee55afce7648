"""Which atoms an engine moves: i-PI and ASE never say. From a structure file, or from the text of INIT; checked before anything is computed."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from tumbaga.driver.errors import ConfigError
from tumbaga.online.records import Ints
from tumbaga.socket_protocol.init_text import InitInfo

_MOST = 100_000  # atoms in a formula: it comes from the network, and a frame may have no more
_DEEPEST = 20  # brackets in brackets
_TOKEN = re.compile(r"([A-Z][a-z]?|\(|\))([1-9]\d{0,6})?")


@dataclass(frozen=True, eq=False)
class Species:
    """The atoms of a session, in the order of the engine.

    Attributes:
        numbers: atomic numbers, shape (n_atoms,), int64.
        periodic: whether all three directions repeat; None takes it from the cells that the engine sends.
        source: where this comes from, for sentences.
    """

    numbers: Ints
    periodic: bool | None
    source: str

    def __len__(self) -> int:
        return int(self.numbers.size)


def from_formula(formula: str) -> Ints:
    """Return the atomic numbers of a formula read from left to right, shape (n_atoms,), int64.

    Raises:
        ConfigError: it is no formula, or one of too many atoms.

    >>> from_formula("Cu2Au(H2O)2").tolist()
    [29, 29, 79, 1, 1, 8, 1, 1, 8]
    """
    text = formula.replace(" ", "")
    # bytes, and no group that is made to be thrown away: the gateway reads this, and nobody may wait for a text that took long to think out
    stack: list[bytes] = [b""]
    place = 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ConfigError("species", f"{formula[:60]!r} is no formula at {text[place : place + 10]!r}; write for example Cu3Au(H2O)2")
        word, count = found.group(1), int(found.group(2) or 1)
        place = found.end()
        if word == "(":
            if found.group(2) or len(stack) > _DEEPEST:
                raise ConfigError("species", f"{formula[:60]!r} has a bracket that cannot be read; write for example Cu3Au(H2O)2")
            stack.append(b"")
            continue
        if word == ")":
            if len(stack) == 1:
                raise ConfigError("species", f"{formula[:60]!r} closes a bracket that was not opened")
            group = stack.pop()
        elif atomic_numbers.get(word):
            group = bytes((atomic_numbers[word],))
        else:
            raise ConfigError("species", f"{formula[:60]!r} has an unknown element {word!r}")
        if len(group) * count + sum(map(len, stack)) > _MOST:
            raise ConfigError("species", f"{formula[:60]!r} has more than {_MOST} atoms")
        stack[-1] += group * count
    if len(stack) != 1 or not stack[0]:
        raise ConfigError("species", f"{formula[:60]!r} is no whole formula; write for example Cu3Au(H2O)2")
    return np.frombuffer(stack[0], np.uint8).astype(np.int64)


def agreed(info: InitInfo, template: Species | None) -> Species | None:
    """Return the species of a session from what INIT says and from its template, if it has one; None where neither tells.

    Raises:
        ConfigError: INIT holds no formula, or they contradict each other.
    """
    told = np.asarray(info.numbers, dtype=np.int64) if info.numbers else from_formula(info.species) if info.species else None
    if told is None:
        return template
    if template is None:
        return Species(told, None if info.pbc is None else any(info.pbc), "INIT")
    if len(told) != len(template):
        raise ConfigError("species", f"INIT lists {len(told)} atoms, {template.source} has {len(template)}; give this engine's structure")
    if not np.array_equal(told, template.numbers):
        place = int(np.flatnonzero(told != template.numbers)[0])
        symbols = chemical_symbols[told[place]], chemical_symbols[template.numbers[place]]
        raise ConfigError(
            "species", f"atom {place} is {symbols[0]} in INIT and {symbols[1]} in {template.source}; give this engine's structure"
        )
    return template


def check_known(species: Species, elements: tuple[int, ...], potential: str) -> None:
    """Refuse elements that the potential does not know; an empty `elements` knows all.

    Raises:
        ConfigError: there is one.
    """
    unknown = sorted(set(species.numbers.tolist()) - set(elements)) if elements else []
    if unknown:
        names = ", ".join(chemical_symbols[number] for number in unknown)
        known = ", ".join(chemical_symbols[number] for number in elements)
        raise ConfigError("species", f"{species.source} has {names}, which {potential} does not know; it knows {known}")
