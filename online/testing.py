"""For tests of any room or back end: an exact toy potential with a linear readout, labels made by it, and the conformance checks of the ports.

Numpy only. The toy is slow and exact to rounding: the reference that everything else is held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tumbaga.online.errors import BadFrameError, OnlineError
from tumbaga.online.ports import ForceRows, Potential, PotentialSpec, Trainable
from tumbaga.online.records import Array, Frame, Ints, Label, Prediction


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
        """Return its weights, shape (n_columns,), eV."""
        return np.zeros(self.spec.n_columns) if self.weights is None else self.weights

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


class ConformanceError(OnlineError, AssertionError):
    """An implementation breaks its port's contract; the message says which sentence of it."""

    def __init__(self, claim: str, worst: float, allowed: float) -> None:
        super().__init__(claim, worst, allowed)
        self.claim, self.worst, self.allowed = claim, worst, allowed

    def __str__(self) -> str:
        return f"{self.claim}: off by {self.worst:.3g}, {self.allowed:.3g} is allowed"


@dataclass(frozen=True)
class Tolerances:
    """What the checks allow; the defaults suit a float64 back end.

    Attributes:
        displacement: step of the finite differences, Å (and strain); raise it to about 1e-2 for a float32 back end.
        gradient: forces (eV/Å) and virials (eV) against finite differences, plus the same fraction of the largest.
        same: energies (eV), forces and virials that must agree because the physics is the same.
    """

    displacement: float = 1e-4
    gradient: float = 1e-5
    same: float = 1e-9


def check_potential(potential: Potential, frames: Sequence[Frame], tolerances: Tolerances | None = None) -> None:
    """Hold a potential against its port on frames of its own elements, best of different sizes.

    Shapes, finite numbers, forces and virial as derivatives of the energy, one batch as several single calls, and invariance under
    translation, rotation and the order of the atoms.

    Raises:
        ConformanceError: the first claim that fails.
    """
    allow = tolerances or Tolerances()
    together = potential.predict(frames)
    _demand("one prediction a frame", abs(len(together) - len(frames)), 0)
    for frame, said in zip(frames, together, strict=True):
        _check_shapes(potential, frame, said)
        _agree("a batch gives what single calls give", potential.predict([frame])[0], said, allow.same)
        _check_symmetries(potential, frame, said, allow.same)
        _check_gradients(potential, frame, said, allow)


def check_trainable(trainable: Trainable, frames: Sequence[Frame], tolerances: Tolerances | None = None, seed: int = 0) -> None:
    """Hold a trainable against its port: all of `check_potential`, and that its readout is linear as declared.

    Raises:
        ConformanceError: the first claim that fails.
    """
    allow = tolerances or Tolerances()
    check_potential(trainable, frames, tolerances)
    weights, spec = trainable.readout(), trainable.spec
    _demand("the readout has n_columns weights", abs(weights.size - spec.n_columns), 0)
    _demand("the state is not empty", 0 if trainable.state() else 1, 0)
    # weights of the same size as its own: a float32 back end's rounding is relative to them
    size = float(np.abs(weights).mean()) or 1.0
    others = weights + size * np.random.default_rng(seed).standard_normal((len(frames), spec.n_columns))
    own = trainable.predict(frames)
    for frame, mine, theirs, other in zip(frames, own, trainable.predict(frames, others), others, strict=True):
        model = trainable.force_rows(frame)
        for readout, said in ((weights, mine), (other, theirs)):
            linear = (model.rows @ readout).reshape(-1, 3) + model.forces_fixed
            scale = 1.0 + float(np.abs(said.forces).max())
            _demand("F = rows @ w + forces_fixed", np.abs(linear - said.forces).max(), allow.same * scale)
            energy = float(model.phi @ readout) + model.energy_fixed
            _demand("E = phi · w + energy_fixed", abs(energy - said.energy), allow.same * (1.0 + abs(energy)))
        if mine.features is None:
            raise ConformanceError("features come with every prediction", np.inf, 0)
        _check_features(mine.features, frame, model, spec, allow.same)


def _check_features(features: Array, frame: Frame, model: ForceRows, spec: PotentialSpec, tolerance: float) -> None:
    blocks = np.concatenate([features[frame.numbers == z].sum(axis=0) for z in spec.elements])
    _demand("phi is the features summed in element blocks", np.abs(blocks - model.phi).max(), tolerance * (1.0 + np.abs(model.phi).max()))


def _check_shapes(potential: Potential, frame: Frame, said: Prediction) -> None:
    _demand("forces have shape (n_atoms, 3)", float(said.forces.shape != (len(frame), 3)), 0)
    _demand("the virial has shape (3, 3)", float(said.virial.shape != (3, 3)), 0)
    _demand("arrays are float64", float(said.forces.dtype != np.float64 or said.virial.dtype != np.float64), 0)
    _demand("predictions of sound frames are finite", float(not said.finite), 0)
    if said.features is not None:
        _demand("features have shape (n_atoms, n_hidden)", float(said.features.shape != (len(frame), potential.spec.n_hidden)), 0)


def _check_symmetries(potential: Potential, frame: Frame, said: Prediction, tolerance: float) -> None:
    moved = replace(frame, positions=frame.positions + np.array([0.31, -0.17, 0.23]))
    _agree("a translation changes nothing", potential.predict([moved])[0], said, tolerance)
    # a quarter turn is exact, so it needs a general rotation on top of it to be a test
    turn = np.linalg.qr(np.array([[1.0, 0.4, -0.2], [0.3, 1.0, 0.5], [-0.6, 0.1, 1.0]]))[0]
    turned = replace(frame, positions=frame.positions @ turn.T, cell=frame.cell @ turn.T)
    expected = Prediction(said.energy, said.forces @ turn.T, turn @ said.virial @ turn.T)
    _agree("a rotation turns forces and virial", potential.predict([turned])[0], expected, tolerance)
    back = np.arange(len(frame))[::-1]
    mirrored = replace(frame, numbers=frame.numbers[back], positions=frame.positions[back])
    expected = Prediction(said.energy, said.forces[back], said.virial)
    _agree("the order of the atoms does not matter", potential.predict([mirrored])[0], expected, tolerance)


def _check_gradients(potential: Potential, frame: Frame, said: Prediction, allow: Tolerances) -> None:
    h = allow.displacement

    def slope(plus: Frame, minus: Frame) -> float:
        one, other = potential.predict([plus, minus])
        return (one.energy - other.energy) / (2 * h)

    scale = 1.0 + float(np.abs(said.forces).max())
    for atom in range(min(len(frame), 3)):
        for axis in range(3):
            push = np.zeros_like(frame.positions)
            push[atom, axis] = h
            plus, minus = replace(frame, positions=frame.positions + push), replace(frame, positions=frame.positions - push)
            _demand("forces are -dE/dR", abs(slope(plus, minus) + said.forces[atom, axis]), allow.gradient * scale)
    scale = 1.0 + float(np.abs(said.virial).max())
    for axis, other in ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (2, 0)):
        strain = np.zeros((3, 3))
        strain[axis, other] += 0.5 * h
        strain[other, axis] += 0.5 * h
        plus, minus = (
            replace(frame, positions=frame.positions @ deformed, cell=frame.cell @ deformed)
            for deformed in (np.eye(3) + strain, np.eye(3) - strain)
        )
        _demand("the virial is -dE/dstrain", abs(slope(plus, minus) + said.virial[axis, other]), allow.gradient * scale)
    _demand("the virial is symmetric", float(np.abs(said.virial - said.virial.T).max()), allow.gradient * scale)


def _agree(claim: str, one: Prediction, other: Prediction, tolerance: float) -> None:
    for mine, theirs in ((one.energy, other.energy), (one.forces, other.forces), (one.virial, other.virial)):
        gap = float(np.abs(np.asarray(mine) - theirs).max())
        _demand(claim, gap, tolerance * (1.0 + float(np.abs(theirs).max())))


def _demand(claim: str, worst: float, allowed: float) -> None:
    if not worst <= allowed:  # nan fails
        raise ConformanceError(claim, float(worst), float(allowed))
