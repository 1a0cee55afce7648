"""For tests of any room or back end: an exact toy potential with a linear readout, and labels made by it.

Numpy only. The toy is slow and exact to rounding: the reference that everything else is held against. The checks of the ports are in
``tumbaga.online.conformance``; their names are here, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tumbaga.online.conformance import ConformanceError, Tolerances, check_potential, check_trainable
from tumbaga.online.errors import BadFrameError
from tumbaga.online.ports import ForceRows, Potential, PotentialSpec
from tumbaga.online.records import Array, Frame, Ints, Label, Prediction

__all__ = ["ConformanceError", "Tolerances", "ToyTrainable", "check_potential", "check_trainable", "label_from"]


@dataclass(frozen=True, eq=False)
class ToyTrainable:
    """Sums of Gaussians of pair distances, weighted by a readout; a repulsive core stays outside the readout.

    f_i[z, k] = sum over neighbours j of species z of g_k(r_ij) * c(r_ij), with g_k a Gaussian and c = (1 - (r / cutoff)²)³ a cut-off.
    The weights of atom i's species multiply f_i, so n_hidden = n_elements * n_gaussians. Centres of the Gaussians depend on the species of
    i: otherwise O-H and H-O pairs would have the same features and no label could tell their weights apart.

    Attributes:
        elements: atomic numbers, the order of the readout's blocks.
        weights: the readout, shape (n_columns,), float64, eV; None means zeros.
        cutoff: Å.
        n_gaussians: for each pair of species, spread evenly between 0.5 Å and the cut-off.
        core: strength of the fixed pair repulsion core * exp(-4 r / Å) * c(r), eV.
    """

    elements: tuple[int, ...] = (1, 8, 29, 79)
    weights: Array | None = None
    cutoff: float = 4.0
    n_gaussians: int = 4
    core: float = 50.0
    spec: PotentialSpec = field(init=False)

    def __post_init__(self) -> None:
        n_hidden = len(self.elements) * self.n_gaussians
        object.__setattr__(self, "spec", PotentialSpec("toy:pairs", self.elements, self.cutoff, n_hidden, "exact toy"))
        weights = np.zeros(self.spec.n_columns) if self.weights is None else np.array(self.weights, dtype=np.float64)
        if weights.shape != (self.spec.n_columns,):
            raise BadFrameError("readout", f"has shape {weights.shape}, expected {(self.spec.n_columns,)}")
        object.__setattr__(self, "weights", weights)

    def with_readout(self, weights: Array) -> ToyTrainable:
        """Return the same potential with other weights, shape (n_columns,), eV."""
        return ToyTrainable(self.elements, weights, self.cutoff, self.n_gaussians, self.core)

    def readout(self) -> Array:
        """Return its weights, shape (n_columns,), eV; a copy."""
        return np.zeros(self.spec.n_columns) if self.weights is None else self.weights.copy()

    @property
    def metadata(self) -> dict[str, str]:
        """Nothing: its tensor says it all."""
        return {}

    def state(self, readout: Array | None = None) -> Mapping[str, np.ndarray]:
        """Return its only tensor, or the given one."""
        return {"readout": self.readout() if readout is None else readout.copy()}

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        """Evaluate frames one by one.

        Raises:
            BadFrameError: an element is not known.
        """
        weights = np.broadcast_to(self.readout(), (len(frames), self.spec.n_columns)) if readouts is None else readouts
        return [self._predict(frame, weight) for frame, weight in zip(frames, weights, strict=True)]

    def force_rows(self, frame: Frame) -> ForceRows:
        """Return the linear model of one frame, from analytic derivatives.

        Raises:
            BadFrameError: an element is not known.
        """
        with np.errstate(all="ignore"):
            pairs = _Pairs.of(frame, self.elements, self.cutoff)
            values, slopes = self._basis(pairs)
            phi = np.zeros((len(self.elements) * len(self.elements), self.n_gaussians))
            kinds = pairs.kinds(len(self.elements))
            np.add.at(phi, kinds, values)
            rows = np.zeros((len(frame), len(phi), 3, self.n_gaussians))
            # dr/dR_i = -unit and dr/dR_j = +unit for the pair from i to j, and rows are -dphi/dR
            pushes = pairs.units[:, :, None] * slopes[:, None, :]
            np.add.at(rows, (pairs.first, kinds), pushes)
            np.add.at(rows, (pairs.second, kinds), -pushes)
            energy, core_slopes = self._core(pairs.lengths)
            fixed = np.zeros((len(frame), 3))
            np.add.at(fixed, pairs.first, core_slopes[:, None] * pairs.units)
            np.add.at(fixed, pairs.second, -core_slopes[:, None] * pairs.units)
        return ForceRows(phi.ravel(), rows.transpose(0, 2, 1, 3).reshape(3 * len(frame), -1), energy, fixed)

    def _predict(self, frame: Frame, weights: Array) -> Prediction:
        model = self.force_rows(frame)
        with np.errstate(all="ignore"):
            pairs = _Pairs.of(frame, self.elements, self.cutoff)
            values, slopes = self._basis(pairs)
            features = np.zeros((len(frame), len(self.elements), self.n_gaussians))
            np.add.at(features, (pairs.first, pairs.second_kind), values)
            table = weights.reshape(-1, self.n_gaussians)[pairs.kinds(len(self.elements))]
            pull = np.einsum("pk,pk->p", slopes, table) + self._core(pairs.lengths)[1]
            virial = -np.einsum("p,pa,pb->ab", pull * pairs.lengths, pairs.units, pairs.units)
            energy = float(model.phi @ weights) + model.energy_fixed
            forces = (model.rows @ weights).reshape(-1, 3) + model.forces_fixed
        return Prediction(energy, forces, virial, features.reshape(len(frame), -1))

    def _basis(self, pairs: _Pairs) -> tuple[Array, Array]:
        """Values and derivatives of the Gaussians times the cut-off, shape (n_pairs, n_gaussians)."""
        width = (self.cutoff - 0.5) / self.n_gaussians
        centres = 0.5 + width * (np.arange(self.n_gaussians) + pairs.first_kind[:, None] / len(self.elements))
        away = (pairs.lengths[:, None] - centres) / width
        bells = np.exp(-0.5 * away**2)
        cut, cut_slope = self._cut(pairs.lengths)
        return bells * cut[:, None], bells * (cut_slope[:, None] - cut[:, None] * away / width)

    def _core(self, lengths: Array) -> tuple[float, Array]:
        """Energy of the fixed repulsion and its derivative for each ordered pair: half of a pair's each."""
        cut, cut_slope = self._cut(lengths)
        half = 0.5 * self.core * np.exp(-4.0 * lengths)
        return float((half * cut).sum()), half * (cut_slope - 4.0 * cut)

    def _cut(self, lengths: Array) -> tuple[Array, Array]:
        inside = 1.0 - (lengths / self.cutoff) ** 2
        return inside**3, -6.0 * inside**2 * lengths / self.cutoff**2


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Ordered pairs within the cut-off, periodic images included."""

    first: Ints
    second: Ints
    first_kind: Ints
    second_kind: Ints
    lengths: Array
    units: Array

    @classmethod
    def of(cls, frame: Frame, elements: tuple[int, ...], cutoff: float) -> _Pairs:
        unknown = set(frame.numbers.tolist()) - set(elements)
        if unknown:
            raise BadFrameError("numbers", f"hold {sorted(unknown)}, which this potential does not know")
        kinds = np.array([elements.index(int(z)) for z in frame.numbers])
        shifts = _image_shifts(frame, cutoff)
        vectors = frame.positions[None, None, :, :] + shifts[:, None, None, :] - frame.positions[None, :, None, :]
        lengths = np.linalg.norm(vectors, axis=-1)
        near = lengths < cutoff
        itself = np.flatnonzero((shifts == 0).all(axis=1))[0]
        near[itself] &= ~np.eye(len(frame), dtype=bool)
        image, first, second = np.nonzero(near)
        length = lengths[image, first, second]
        return cls(first, second, kinds[first], kinds[second], length, vectors[image, first, second] / length[:, None])

    def kinds(self, n_elements: int) -> Ints:
        """Index of each pair's (species of the centre, species of the neighbour)."""
        return self.first_kind * n_elements + self.second_kind


def _image_shifts(frame: Frame, cutoff: float) -> Array:
    if not frame.periodic:
        return np.zeros((1, 3))
    inverse = np.linalg.inv(frame.cell)
    # positions need not be wrapped: their spread in fractional coordinates adds to the reach
    spread = np.ptp(frame.positions @ inverse, axis=0)
    reach = np.ceil(cutoff * np.linalg.norm(inverse, axis=0) + spread).astype(int)
    grid = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), axis=-1).reshape(-1, 3)
    shifts: Array = grid @ frame.cell
    return shifts


def label_from(potential: Potential, frame: Frame, offsets: Mapping[int, float] | None = None, method: str = "toy") -> Label:
    """Return the label that a potential would give as a reference method, with per-element energy offsets (eV) added."""
    said = potential.predict([frame])[0]
    offset = sum((offsets or {}).get(int(z), 0.0) for z in frame.numbers)
    return Label(said.energy + offset, said.forces, method, 0.0)
