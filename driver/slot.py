"""The versions an evaluator holds: which weights serve a frame, and what the last-layer score of its atoms is. Pure numpy, no sockets."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tumbaga.driver.errors import ConfigError, PotentialError
from tumbaga.online import versions
from tumbaga.online.errors import VersionError
from tumbaga.online.last_layer import fit
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Array, Frame, Members, Prediction
from tumbaga.online.uncertainty import AtomScore, species_index

BASE = 0
_KIND = ("architecture", "hyper")  # of a potential's metadata: what its weights mean
_PIECE = 2048  # atoms that the members are evaluated with at once
Mix = tuple[int, int, float]


@dataclass(frozen=True, eq=False)
class Answer:
    """What one frame gets.

    Attributes:
        prediction: energy, forces, virial under the frame's mix of versions.
        step: E(second version) - E(first version), eV; 0 outside a ramp.
        lpr: last-layer score of each atom, shape (n_atoms,), float64; NaN where the potential has no readout.
        members: what a committee drawn from the posterior of the readout says, if one was asked for; their mean is the prediction to
            the rounding of the potential.
    """

    prediction: Prediction
    step: float
    lpr: Array
    members: Members | None = None


class Slot:
    """One potential with any number of last layers beside each other.

    Args:
        potential: any potential; version 0 is its own readout, and the only one where it has none.
    """

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self._trainable = potential if isinstance(potential, Trainable) and potential.spec.n_hidden else None
        self._readouts: dict[int, Array] = {}
        self._scores: dict[int, AtomScore] = {}
        self._covariances: dict[int, Array] = {}
        self._deviations: dict[int, Array] = {}
        if self._trainable is not None:
            own = self._trainable.readout()
            # no label yet: the prior alone says how unsure the readout is
            self._put(BASE, own, fit([], own, mean_h2=self._trainable.spec.mean_h2 or 1.0).covariance)

    @functools.cached_property
    def _network(self) -> str:
        """What lies before the readout, as version files tell it."""
        assert self._trainable is not None
        return versions.fingerprint(self._trainable.state(), self._trainable.readout())

    @property
    def held(self) -> tuple[int, ...]:
        """The versions that can serve now."""
        return tuple(sorted(self._readouts)) if self._readouts else (BASE,)

    def covariance(self, version: int) -> Array:
        """Posterior covariance of a version's readout, shape (n_columns, n_columns), float64, eV^2."""
        return self._covariances[version]

    def load(self, version: int, path: Path, keep: Sequence[int]) -> None:
        """Read a version file and hold it beside the others; those outside `keep` are let go.

        Raises:
            VersionError: the file must not serve; nothing has changed then.
        """
        if self._trainable is None:
            raise VersionError(str(path), f"cannot serve: {self.potential.spec.name} has no linear readout")
        layer = versions.read(path)
        if layer.readout.shape != (self._trainable.spec.n_columns,):
            raise VersionError(
                str(path), f"has {layer.readout.size} readout weights; {self.potential.spec.name} has {self._trainable.spec.n_columns}"
            )
        own = self._trainable.metadata
        for key in (key for key in _KIND if key in own and layer.metadata.get(key) != own[key]):
            # other elements, most often: as many weights mean something else there
            told = f"is of another potential: its {key} is {layer.metadata.get(key, 'not told')}, that of {self.potential.spec.name} {own[key]}"
            raise VersionError(str(path), told)
        if layer.metadata.get(versions.NETWORK, self._network) != self._network:
            told = f"was learnt behind other weights than those of {self.potential.spec.name}; begin a new run directory with these"
            raise VersionError(str(path), told)
        self._put(version, layer.readout, layer.covariance)
        for old in set(self._readouts) - {version, BASE, *keep}:
            del self._readouts[old], self._scores[old], self._covariances[old]
            self._deviations.pop(old, None)

    def _put(self, version: int, readout: Array, covariance: Array) -> None:
        self._readouts[version], self._covariances[version] = readout, covariance
        self._scores[version] = AtomScore(covariance, len(self.potential.spec.elements))
        self._deviations.pop(version, None)

    def need_committee(self, members: int) -> None:
        """Find out at the start whether there can be a committee.

        Raises:
            ConfigError: the potential has no readout to draw its members from.
        """
        if self._trainable is None:
            name = self.potential.spec.name
            why = f"{name} has no linear readout to draw a committee from"
            raise ConfigError("serve.committee", f"is {members}, but {why}; set it to 0, as --committee 0 does")

    def _deviation(self, version: int, members: int) -> Array:
        """Readouts of the members less that of the version, shape (members, n_columns), float64; their sum is 0.

        Drawn from the posterior once and for all, so that each member is one potential as long as the version serves. With the sum taken
        out, the variance over the members (ddof 1) is that of the posterior on average. The same normal numbers for all versions and the
        symmetric root, which unlike others is unique, make a member of one version the successor of that of the one before.
        """
        held = self._deviations.get(version)
        if held is None or len(held) != members:
            values, vectors = np.linalg.eigh(self._covariances[version])
            drawn = np.random.default_rng(members).standard_normal((members, len(values)))
            drawn -= drawn.mean(axis=0)
            held = self._deviations[version] = drawn @ (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
        return held

    def _with_members(
        self, frames: Sequence[Frame], served: Array, mixes: Sequence[Mix], answers: list[Answer], members: int
    ) -> list[Answer]:
        """Return the answers with a committee each; in a ramp its members move with the mix, as what is served does.

        Raises:
            PotentialError: a prediction is finite and a member's is not.
        """
        deviations = [(1.0 - weight) * self._deviation(old, members) + weight * self._deviation(new, members) for old, new, weight in mixes]
        readouts = (served[:, None] + np.stack(deviations)).reshape(len(frames) * members, -1)
        said = self._in_pieces([frame for frame in frames for _ in range(members)], readouts)
        committees = [_members(said[start : start + members]) for start in range(0, len(said), members)]
        for answer, committee in zip(answers, committees, strict=True):
            if answer.prediction.finite and not committee.finite:
                # JSON knows no such number, and i-PI hangs when it is not told all of them
                raise PotentialError(self.potential.spec.name, "a member of its committee gives a number that is not finite")
        return [replace(answer, members=committee) for answer, committee in zip(answers, committees, strict=True)]

    def _in_pieces(self, frames: Sequence[Frame], readouts: Array) -> list[Prediction]:
        """Evaluate in batches of a bounded number of atoms: a committee multiplies them, and memory is finite."""
        said: list[Prediction] = []
        while len(said) < len(frames):
            start = len(said)
            atoms = np.cumsum([len(frame) for frame in frames[start:]])
            end = start + max(1, int(np.searchsorted(atoms, _PIECE, side="right")))
            said += self.potential.predict(frames[start:end], readouts[start:end])
        return said

    def answer(self, frames: Sequence[Frame], mixes: Sequence[Mix], members: int = 0) -> list[Answer]:
        """Evaluate frames as one batch, each under its own mix of versions, and with a committee of so many members beside it.

        Raises:
            KeyError: a mix names a version that is not held.
            PotentialError: a member's numbers are not finite where the prediction is.
        """
        if self._trainable is None:
            return [Answer(p, 0.0, np.full(len(f), np.nan)) for f, p in zip(frames, self.potential.predict(frames), strict=True)]
        served = np.stack([(1.0 - weight) * self._readouts[old] + weight * self._readouts[new] for old, new, weight in mixes])
        predictions = self._trainable.predict(frames, served)
        answers = [self._answer(*one) for one in zip(frames, predictions, mixes, strict=True)]
        return self._with_members(frames, served, mixes, answers, members) if members else answers

    def _answer(self, frame: Frame, prediction: Prediction, mix: Mix) -> Answer:
        features, old, new = prediction.features, mix[0], mix[1]
        if features is None:
            return Answer(prediction, 0.0, np.full(len(frame), np.nan))
        elements = species_index(frame.numbers, self.potential.spec.elements)
        step = 0.0
        if old != new:
            change = (self._readouts[new] - self._readouts[old]).reshape(-1, self.potential.spec.n_hidden)
            step = float(np.einsum("nh,nh->", features, change[elements]))
        return Answer(prediction, step, self._scores[new](features, elements))


def _members(said: Sequence[Prediction]) -> Members:
    return Members(np.array([p.energy for p in said]), np.stack([p.forces for p in said]), np.stack([p.virial for p in said]))
