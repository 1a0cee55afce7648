"""The potentials of ænet as files: the network of one element each as text (".nn.ascii", Chebyshev set-ups). numpy only, no torch.

Written after what ænet and ænet-PyTorch read and write; no code of theirs is in here. Numbers may stand in as many lines as they like, as
for a Fortran program that reads them. Structures (".xsf") are in ``aenet_xsf``.

Source:
    N. Artrith, A. Urban, Comput. Mater. Sci. 114, 135 (2016); J. López-Zorrilla et al., J. Chem. Phys. 158, 164105 (2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from ase.data import atomic_numbers

from tumbaga.driver.errors import PotentialError
from tumbaga.online.records import Array

CHEBYSHEV: Final = "Chebyshev"
FLAT: Final = 1e-10  # a descriptor that varies less than this in the training set is left out: its scale is 0
_LARGEST: Final = 100_000  # of any count in a foreign file
_PARAMETERS: Final = 4  # numbers a descriptor function has in a file


@dataclass(frozen=True)
class Basis:
    """The Chebyshev expansion of a neighbourhood.

    Attributes:
        radial_cutoff: Å.
        n_radial: highest order of the radial polynomials.
        angular_cutoff: Å, at most the radial one.
        n_angular: highest order of the angular polynomials.
    """

    radial_cutoff: float = 6.5
    n_radial: int = 20
    angular_cutoff: float = 5.0
    n_angular: int = 6

    @property
    def width(self) -> int:
        """Number of polynomials; a set-up with several species has twice as many descriptors."""
        return self.n_radial + self.n_angular + 2


class Window(NamedTuple):
    """How energies were normalised in training: E_norm = (E / n_atoms - shift) * scale, of cohesive energies E; eV and 1/eV.

    `lowest`, `highest` and `average` are cohesive energies per atom of the training set, eV.
    """

    scale: float = 1.0
    shift: float = 0.0
    lowest: float = 0.0
    highest: float = 0.0
    average: float = 0.0


@dataclass(frozen=True, eq=False)
class ElementNetwork:
    """One ".nn.ascii" file: the network of one element, its descriptors, and what they were in training.

    Attributes:
        element: symbol.
        environment: symbols of the neighbours; their order sets the weights of the species.
        basis: of the descriptors.
        weights: of each layer, shapes (n_out, n_in), float64; the last has one output.
        biases: of each layer, shapes (n_out,).
        activations: of each layer: 0 linear, 1 tanh, 2 sigmoid, 3 scaled tanh, 4 the same with a linear term; the last is 0.
        lowest, highest, average, squares: of each descriptor over the training set, shapes (n_descriptors,); `squares` is the mean square.
        window: how energies were normalised.
        species, atomic: all elements of the training set, symbols, and energies of their atoms, eV.
        description: one line.
        r_min: shortest distance of the training set, Å.
        source: file name of the training set.
        n_atoms, n_structures: of the training set.
        n_evaluations: how many neighbourhoods the statistics are over.
    """

    element: str
    environment: tuple[str, ...]
    basis: Basis
    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    activations: tuple[int, ...]
    lowest: Array
    highest: Array
    average: Array
    squares: Array
    window: Window
    species: tuple[str, ...]
    atomic: tuple[float, ...]
    description: str = "tumbaga"
    r_min: float = 0.0
    source: str = "tumbaga"
    n_atoms: int = 0
    n_structures: int = 0
    n_evaluations: int = 0

    @property
    def atomic_energy(self) -> float:
        """Energy of an atom of its element, eV."""
        return self.atomic[self.species.index(self.element)]

    @property
    def scales(self) -> Array:
        """What descriptors less their average are multiplied by; 0 for those that never vary."""
        deviation = np.sqrt(np.maximum(self.squares - self.average**2, 0.0))
        return np.where(deviation > FLAT, 1.0 / np.maximum(deviation, FLAT), 0.0)


def spins(environment: Sequence[str]) -> dict[str, float]:
    """Return the weights of the species: from -(n // 2) upwards in the order of the environment, without 0 where n is even.

    >>> spins(["Cu", "Au"]), spins(["H", "O", "Cu"])
    ({'Cu': -1.0, 'Au': 1.0}, {'H': -1.0, 'O': 0.0, 'Cu': 1.0})
    """
    half, odd = divmod(len(environment), 2)
    ladder = [float(s) for s in range(-half, half + 1) if s or odd]
    return dict(zip(environment, ladder, strict=True))


class _Text:
    """Lines of a file, read as Fortran reads them: a list takes as many lines as it needs, the next item starts on a new one."""

    def __init__(self, path: Path) -> None:
        try:
            self._lines = iter(path.read_text(encoding="utf-8", errors="replace").splitlines())
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror})") from error

    def line(self, what: str) -> str:
        found = next(self._lines, None)
        if found is None:
            raise ValueError(f"ends before {what}")
        return found.strip()

    def words(self, what: str, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            found += self.line(what).split()
        if len(found) > count:
            raise ValueError(f"has {len(found)} words where {count} of {what} belong")
        return found

    def floats(self, what: str, count: int) -> Array:
        try:
            found = np.array([float(word.lower().replace("d", "e")) for word in self.words(what, count)])
        except ValueError as error:
            raise ValueError(f"has something else where {what} belongs ({error})") from error
        if not np.isfinite(found).all():
            raise ValueError(f"has a number in {what} that is not finite")
        return found

    def number(self, what: str) -> float:
        return float(self.floats(what, 1)[0])

    def integers(self, what: str, count: int) -> list[int]:
        words = self.words(what, count)
        try:
            found = [int(word) for word in words]
        except ValueError as error:
            raise ValueError(f"has something else where {what} belongs ({error})") from error
        if any(not 0 <= one <= _LARGEST for one in found):
            raise ValueError(f"has a number out of range in {what}")
        return found

    def count(self, what: str) -> int:
        return self.integers(what, 1)[0]


def read_network(path: str | Path) -> ElementNetwork:
    """Read a ".nn.ascii" file.

    Raises:
        PotentialError: the file is missing, damaged, or its descriptors are not of Chebyshev type.
    """
    try:
        return _network(_Text(Path(path)))
    except ValueError as error:
        raise PotentialError(f"aenet:{path}", f"the file {error}; it is no network of ænet in text form (.nn.ascii)") from error
    except _OtherDescriptorsError as error:
        (kind,) = error.args
        raise PotentialError(
            f"aenet:{path}",
            f"its descriptors are of type {kind!r}; only {CHEBYSHEV} is supported (BASIS type=Chebyshev in the set-up file)",
        ) from error


class _OtherDescriptorsError(Exception):
    """The file is sound, but of another set-up."""


def _network(text: _Text) -> ElementNetwork:
    weights, biases, activations = _layers(text)
    description, element = text.line("the description"), text.words("the element", 1)[0]
    environment = tuple(text.words("the species of the environment", text.count("their number")))
    if unknown := [s for s in (element, *environment) if not atomic_numbers.get(s)]:
        raise ValueError(f"names {unknown[0]!r}, which is no element")
    if len(set(environment)) < len(environment):
        raise ValueError("names a species of the environment twice")
    r_min, _ = text.number("the shortest distance"), text.number("the cutoff")
    kind = text.line("the type of the descriptors")
    if kind.lower() != CHEBYSHEV.lower():
        raise _OtherDescriptorsError(kind)
    width, each = text.count("the number of descriptors"), text.count("the number of parameters")
    text.integers("the kinds of the descriptors", width)
    basis = _basis(text.floats("the parameters of the descriptors", each * width))
    text.integers("the species of the descriptors", 2 * width)
    if width != basis.width * min(len(environment), 2) or weights[0].shape[1] != width:
        raise ValueError(f"has a network of {weights[0].shape[1]} inputs and {width} descriptors, which do not belong to its set-up")
    n_evaluations = int(text.number("the number of neighbourhoods"))
    lowest, highest, average, squares = (text.floats("the statistics of the descriptors", width) for _ in range(4))
    return ElementNetwork(
        element=element,
        environment=environment,
        basis=basis,
        weights=weights,
        biases=biases,
        activations=activations,
        lowest=lowest,
        highest=highest,
        average=average,
        squares=squares,
        **_training_set(text, element),
        description=description,
        r_min=r_min,
        n_evaluations=n_evaluations,
    )


def _layers(text: _Text) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[int, ...]]:
    n_layers = text.count("the number of layers")
    if not 2 <= n_layers <= 20:
        raise ValueError(f"announces {n_layers} layers")
    text.count("the size of the largest layer")
    total, _ = text.integers("the number of weights", 1)[0], text.count("the number of values")
    sizes = text.integers("the sizes of the layers", n_layers)
    activations = tuple(text.integers("the activation functions", n_layers - 1))
    for _ in range(2):
        text.integers("the places of the layers", n_layers)
    pairs = list(pairwise(sizes))
    if total != sum((n_in + 1) * n_out for n_in, n_out in pairs) or sizes[-1] != 1 or min(sizes) < 1:
        raise ValueError(f"announces {total} weights for layers of {sizes} nodes")
    if max(activations) > 4 or activations[-1] != 0:
        raise ValueError(f"has activation functions {list(activations)}; known are 0 to 4, and 0 of the last layer")
    flat, start = text.floats("the weights", total), 0
    weights, biases = [], []
    for n_in, n_out in pairs:
        block = flat[start : start + (n_in + 1) * n_out].reshape(n_in + 1, n_out).T  # columns one after the other, the bias last
        weights.append(np.ascontiguousarray(block[:, :-1]))
        biases.append(block[:, -1].copy())
        start += block.size
    return tuple(weights), tuple(biases), activations


def _basis(parameters: Array) -> Basis:
    if len(parameters) < _PARAMETERS:
        raise ValueError("has too few parameters of the descriptors")
    radial, n_radial, angular, n_angular = (float(p) for p in parameters[:_PARAMETERS])
    if not (0 < angular <= radial and n_radial.is_integer() and n_angular.is_integer() and 0 <= min(n_radial, n_angular) <= _LARGEST):
        raise ValueError(f"has descriptors with cutoffs {radial:g} and {angular:g} Å (the angular one may not be larger)")
    return Basis(radial, int(n_radial), angular, int(n_angular))


def _training_set(text: _Text, element: str) -> dict[str, Any]:
    source, _ = text.line("the name of the training set"), text.line("whether energies are normalised")
    scale, shift = text.number("the scale of the energies"), text.number("the shift of the energies")
    if scale <= 0:
        raise ValueError(f"has the energy scale {scale:g}, which must be positive")
    species = tuple(text.words("the species", text.count("the number of species")))
    if element not in species:
        raise ValueError(f"has no atomic energy of {element}")
    atomic = tuple(float(e) for e in text.floats("the atomic energies", len(species)))
    n_atoms, n_structures = (int(text.number("the size of the training set")) for _ in range(2))
    range_of = text.floats("the range of the energies", 3)
    return {
        "window": Window(scale, shift, *map(float, range_of)),
        "species": species,
        "atomic": atomic,
        "source": source,
        "n_atoms": n_atoms,
        "n_structures": n_structures,
    }


def write_network(path: str | Path, network: ElementNetwork) -> None:
    """Write a ".nn.ascii" file, which ænet and ænet-PyTorch read; all numbers survive to the last bit."""
    Path(path).write_text("\n".join(_lines(network)) + "\n", encoding="utf-8")


def _lines(net: ElementNetwork) -> Iterator[str]:
    sizes = [w.shape[1] for w in net.weights] + [1]
    blocks = [np.concatenate([w, b[:, None]], axis=1).T.reshape(-1) for w, b in zip(net.weights, net.biases, strict=True)]
    values = [n + 1 for n in sizes[:-1]]
    width = len(net.average)
    parameters = np.zeros(_PARAMETERS * width)
    parameters[:_PARAMETERS] = net.basis.radial_cutoff, net.basis.n_radial, net.basis.angular_cutoff, net.basis.n_angular
    integers = (
        [len(sizes)], [max(sizes)], [sum(b.size for b in blocks)], [sum(values) + 1], sizes, net.activations,
        np.cumsum([0] + [b.size for b in blocks]), np.cumsum([0, *values]),
    )  # fmt: skip
    yield from (_joined(one) for one in integers)
    yield _reals(np.concatenate(blocks))
    yield from (net.description or "tumbaga", net.element, f"{len(net.environment):17d}", " ".join(net.environment))
    yield from (_reals([net.r_min]), _reals([net.basis.radial_cutoff]), CHEBYSHEV, f"{width:17d}", f"{_PARAMETERS:17d}")
    yield from (_joined([0] * width), _reals(parameters), _joined([0] * 2 * width), f"{net.n_evaluations:17d}")
    yield from (_reals(one) for one in (net.lowest, net.highest, net.average, net.squares))
    normalised = net.window.scale != 1.0 or net.window.shift != 0.0
    yield from (net.source or "tumbaga", str(normalised), _reals([net.window.scale]), _reals([net.window.shift]))
    yield from (f"{len(net.species):17d}", " ".join(net.species), _reals(net.atomic), f"{net.n_atoms:17d}", f"{net.n_structures:17d}")
    yield _reals([net.window.lowest, net.window.highest, net.window.average])


def _joined(numbers: Sequence[int] | Array) -> str:
    return " ".join(f"{int(one):17d}" for one in numbers)


def _reals(numbers: Sequence[float] | Array) -> str:
    return " ".join(f"{one:24.16e}" for one in numbers)
