"""A user's words for a subset of a data set: "Cu,Au", "H>=2", "-4.1:-3.9", a formula; and the subset. Knows ASE's symbols, nothing of files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from ase.data import atomic_numbers
from ase.formula import Formula

from tumbaga.driver.errors import ConfigError
from tumbaga.online import last_layer, subsets
from tumbaga.online.errors import BadFrameError
from tumbaga.online.ports import Potential
from tumbaga.online.records import Array, Ints, LabelledFrame

Measure: TypeAlias = Literal["farthest", "log-det"]
_BATCH_ATOMS = 2048


@dataclass(frozen=True)
class Subset:
    """What is used of a data set: first all frames that meet the criteria, of these some by chance, of these the most different.

    Attributes:
        criteria: what a frame must be like.
        by_chance: how many by chance; None means all.
        different: how many of different last-layer features; None means all.
        measure: what different means; see `most_different`.
        seed: of the choice by chance.
    """

    criteria: subsets.Criteria = field(default_factory=subsets.Criteria)
    by_chance: int | None = None
    different: int | None = None
    measure: Measure = "farthest"
    seed: int = 0


def criteria(
    present: str = "", only: str = "", counts: Sequence[str] = (), energy: str = "", max_force: float | None = None
) -> subsets.Criteria:
    """Make criteria of a user's words.

    Args:
        present: elements that must be there, "Cu,Au".
        only: elements of which nothing else may be there, likewise.
        counts: "Cu>=2", "atoms<=40", or a whole formula, "CuAu(H2O)2".
        energy: lowest and highest energy per atom in eV, "-4.1:-3.9"; either side may be left out.
        max_force: eV/Å.

    Raises:
        ConfigError: something cannot be understood; names the option.
    """
    if max_force is not None and not max_force > 0:
        raise ConfigError("--max-force", f"is {max_force:g}; it must be a positive number of eV/Å")
    found = [count for text in counts for count in _counts(text)]
    ceiling = math.inf if max_force is None else max_force
    return subsets.Criteria(_elements("--with", present), _elements("--only", only), tuple(found), _window(energy), ceiling)


def choose(data: Sequence[LabelledFrame], subset: Subset, potential: Potential | None = None) -> list[LabelledFrame]:
    """Return the subset; the potential is needed where frames of different features are asked for.

    Raises:
        ConfigError: no frame meets the criteria, or the potential has no features.
    """
    kept = [one for one in data if subset.criteria(one)]
    if data and not kept:
        raise ConfigError("subset", f"none of the {len(data)} frames meets the conditions")
    if subset.by_chance is not None:
        kept = [kept[k] for k in subsets.by_chance(len(kept), subset.by_chance, subset.seed)]
    if subset.different is None:
        return kept
    if potential is None or not potential.spec.n_hidden:
        name = "" if potential is None else f" {potential.spec.name}"
        raise ConfigError("--different", f"needs a potential with a linear readout, which tells frames apart;{name} has none")
    return [kept[k] for k in np.sort(most_different(kept, subset.different, potential, subset.measure))]


def most_different(
    data: Sequence[LabelledFrame],
    size: int,
    potential: Potential,
    measure: Measure = "farthest",
    progress: Callable[[int], None] | None = None,
) -> Ints:
    """Return the indices of the frames that differ most in the potential's last-layer features, in the order of choice.

    Args:
        data: the frames.
        size: how many at most.
        potential: one with a linear readout.
        measure: "farthest" takes the frame farthest from all taken, "log-det" the one whose energy tells most about the readout.
        progress: told how many more frames are done.

    Raises:
        ConfigError: its features cannot be used.
    """
    features: list[Array] = []
    for part in batches(data):
        said = potential.predict([one.frame for one in part])
        try:
            features += [subsets.frame_features(one.frame, p, potential.spec.elements) for one, p in zip(part, said, strict=True)]
        except BadFrameError as error:
            raise ConfigError("--different", f"cannot be done with {potential.spec.name}: {error}") from error
        if progress is not None:
            progress(len(part))
    if measure == "farthest":
        return subsets.farthest_points(np.array(features), size)
    settings = last_layer.Settings()
    prior = last_layer.fit([], np.zeros(potential.spec.n_columns), settings, potential.spec.mean_h2 or 1.0).covariance
    return subsets.log_det([row[None] for row in features], size, prior, settings.sigma_energy)


def batches(data: Sequence[LabelledFrame], atoms: int = _BATCH_ATOMS) -> list[Sequence[LabelledFrame]]:
    """Cut data into runs of at most so many atoms each, or of one frame where that has more."""
    ends = np.cumsum([len(one.frame) for one in data])
    found, start = [], 0
    while start < len(data):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + atoms, side="right")))
        found.append(data[start:end])
        start = end
    return found


# -- words -----------------------------------------------------------------------------------------------------------------------------


def _elements(option: str, text: str) -> tuple[int, ...]:
    return tuple(_element(option, part.strip()) for part in text.split(",") if part.strip())


def _element(option: str, symbol: str) -> int:
    if atomic_numbers.get(symbol, 0) < 1:
        raise ConfigError(option, f"there is no element {symbol!r}; write symbols with commas between them, e.g. Cu,Au")
    return int(atomic_numbers[symbol])


def _counts(text: str) -> list[subsets.Count]:
    """One condition, or those of a formula: so many of each of its elements, and no more atoms."""
    parts = re.fullmatch(r"\s*([A-Za-z]+)\s*(>=|<=|=|>|<)\s*(\d+)\s*", text)
    if parts is not None:
        symbol, comparison, value = parts.groups()
        number = 0 if symbol == "atoms" else _element("--count", symbol)
        return [subsets.Count(number, comparison, int(value))]
    try:
        formula: Counter[str] = Counter(Formula(text.strip()).count())
    except ValueError as error:
        raise ConfigError("--count", f"{text!r} is neither a condition (Cu>=2, atoms<=40) nor a formula (CuAu(H2O)2)") from error
    whole = subsets.Count(0, "=", formula.total())
    return [whole, *(subsets.Count(_element("--count", symbol), "=", number) for symbol, number in formula.items())]


def _window(text: str) -> tuple[float, float]:
    if not text:
        return -math.inf, math.inf
    low, colon, high = text.partition(":")
    try:
        found = (float(low) if low else -math.inf, float(high) if high else math.inf)
    except ValueError as error:
        raise ConfigError("--energy", f"is {text!r}; write the lowest and the highest eV per atom, e.g. -4.1:-3.9") from error
    if not colon or not found[0] < found[1]:
        raise ConfigError("--energy", f"is {text!r}; write the lowest and the highest eV per atom, e.g. -4.1:-3.9")
    return found
