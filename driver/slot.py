"""The versions an evaluator holds: which weights serve a frame, and what the last-layer score of its atoms is. Pure numpy, no sockets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tumbaga.driver.errors import ConfigError, PotentialError
from tumbaga.driver.networks import Networks, Opener
from tumbaga.online import versions
from tumbaga.online.energies import energy_std
from tumbaga.online.errors import VersionError
from tumbaga.online.last_layer import fit
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Array, Frame, Ints, Members, Prediction
from tumbaga.online.uncertainty import AtomScore, species_index

BASE = 0
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
        energy_std: of the total energy up to a constant for each element, eV; NaN where it is not known.
    """

    prediction: Prediction
    step: float
    lpr: Array
    members: Members | None = None
    energy_std: float = math.nan


class Slot:
    """One potential with any number of versions beside each other: other readouts, and other networks of the same kind.

    Args:
        potential: any potential; version 0 is its own readout, and the only one where it has none.
        opened: loads a version file as a potential by itself; without it, versions that a fine-tune brought are refused.
    """

    def __init__(self, potential: Potential, opened: Opener | None = None) -> None:
        self.potential = potential
        self._trainable = potential if isinstance(potential, Trainable) and potential.spec.n_hidden else None
        self._networks: Networks | None = None
        self._network: dict[int, str] = {}
        self._last: Frame | None = None
        self._readouts: dict[int, Array] = {}
        self._scores: dict[int, AtomScore] = {}
        self._covariances: dict[int, Array] = {}
        self._energies: dict[int, Array | None] = {}  # covariances that tell how sure energies are
        self._deviations: dict[int, Array] = {}
        if self._trainable is not None:
            self._networks = Networks(self._trainable, opened)
            own = self._trainable.readout()
            # no label yet: the prior alone says how unsure the readout is
            self._put(BASE, own, fit([], own, mean_h2=self._trainable.spec.mean_h2 or 1.0).covariance, None, "")

    @property
    def networks(self) -> Networks:
        """The networks behind the versions.

        Raises:
            PotentialError: the potential has no readout, and so no versions.
        """
        if self._networks is None:
            raise PotentialError(self.potential.spec.name, "has no linear readout, and so no versions")
        return self._networks

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
        if self._networks is None:
            raise VersionError(str(path), f"cannot serve: {self.potential.spec.name} has no linear readout")
        layer = versions.read(path)
        network = self._networks.behind(path, layer, self._last)
        of_energies = layer.energy_covariance
        if of_energies is not None and len(of_energies) != layer.readout.size + len(self.potential.spec.elements):
            raise VersionError(str(path), "holds an uncertainty of energies for another number of elements")
        self._put(version, layer.readout, layer.covariance, of_energies, "" if network == self._networks.base else network)
        for old in set(self._readouts) - {version, BASE, *keep}:
            del self._readouts[old], self._scores[old], self._covariances[old], self._energies[old], self._network[old]
            self._deviations.pop(old, None)
        self._networks.keep(set(self._network.values()))

    def _put(self, version: int, readout: Array, covariance: Array, of_energies: Array | None, network: str) -> None:
        self._readouts[version], self._covariances[version], self._network[version] = readout, covariance, network
        self._energies[version] = of_energies
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
        self, potential: Potential, frames: Sequence[Frame], served: Array, mixes: Sequence[Mix], answers: list[Answer], members: int
    ) -> list[Answer]:
        """Return the answers with a committee each; in a ramp its members move with the mix, as what is served does.

        Raises:
            PotentialError: a prediction is finite and a member's is not.
        """
        deviations = [(1.0 - weight) * self._deviation(old, members) + weight * self._deviation(new, members) for old, new, weight in mixes]
        readouts = (served[:, None] + np.stack(deviations)).reshape(len(frames) * members, -1)
        said = _in_pieces(potential, [frame for frame in frames for _ in range(members)], readouts)
        committees = [_members(said[start : start + members]) for start in range(0, len(said), members)]
        for answer, committee in zip(answers, committees, strict=True):
            if answer.prediction.finite and not committee.finite:
                # JSON knows no such number, and i-PI hangs when it is not told all of them
                raise PotentialError(self.potential.spec.name, "a member of its committee gives a number that is not finite")
        return [replace(answer, members=committee) for answer, committee in zip(answers, committees, strict=True)]

    def answer(self, frames: Sequence[Frame], mixes: Sequence[Mix], members: int = 0) -> list[Answer]:
        """Evaluate frames as one batch, each under its own mix of versions, and with a committee of so many members beside it.

        Raises:
            KeyError: a mix names a version that is not held.
            PotentialError: a member's numbers are not finite where the prediction is.
        """
        if self._networks is None:
            return [Answer(p, 0.0, np.full(len(f), np.nan)) for f, p in zip(frames, self.potential.predict(frames), strict=True)]
        if frames:
            self._last = frames[0]
        names = {self._network[version] for mix in mixes for version in mix[:2]}
        if len(names) <= 1:
            return self._behind(names.pop() if names else "", frames, mixes, members)
        return self._behind_several(frames, mixes, members)

    def _behind_several(self, frames: Sequence[Frame], mixes: Sequence[Mix], members: int) -> list[Answer]:
        """Evaluate a batch whose versions have different networks: a frame between two of them is evaluated by both."""
        asked: dict[str, list[tuple[int, Mix]]] = {}
        for k, (old, new, weight) in enumerate(mixes):
            if self._network[old] == self._network[new]:
                asked.setdefault(self._network[old], []).append((k, (old, new, weight)))
            else:
                for version in (old, new):
                    asked.setdefault(self._network[version], []).append((k, (version, version, 1.0)))
        found: dict[tuple[int, str], Answer] = {}
        for name, asks in asked.items():
            said = self._behind(name, [frames[k] for k, _ in asks], [mix for _, mix in asks], members)
            found.update({(k, name): one for (k, _), one in zip(asks, said, strict=True)})
        answers = []
        for k, (old, new, weight) in enumerate(mixes):
            first, second = found[k, self._network[old]], found[k, self._network[new]]
            answers.append(second if first is second else _between(first, second, weight))
        return answers

    def _behind(self, name: str, frames: Sequence[Frame], mixes: Sequence[Mix], members: int) -> list[Answer]:
        """Evaluate frames whose versions have the same network as one batch."""
        potential = self.networks[name]
        served = np.stack([(1.0 - weight) * self._readouts[old] + weight * self._readouts[new] for old, new, weight in mixes])
        predictions = potential.predict(frames, served)
        answers = [self._answer(*one) for one in zip(frames, predictions, mixes, strict=True)]
        return self._with_members(potential, frames, served, mixes, answers, members) if members else answers

    def _answer(self, frame: Frame, prediction: Prediction, mix: Mix) -> Answer:
        features, old, new = prediction.features, mix[0], mix[1]
        if features is None:
            return Answer(prediction, 0.0, np.full(len(frame), np.nan))
        elements = species_index(frame.numbers, self.potential.spec.elements)
        step = 0.0
        if old != new:
            change = (self._readouts[new] - self._readouts[old]).reshape(-1, self.potential.spec.n_hidden)
            step = float(np.einsum("nh,nh->", features, change[elements]))
        return Answer(prediction, step, self._scores[new](features, elements), energy_std=self._energy_std(new, features, elements))

    def _energy_std(self, version: int, features: Array, elements: Ints) -> float:
        covariance = self._energies[version]
        if covariance is None:
            return math.nan
        of_each = np.equal.outer(np.arange(len(self.potential.spec.elements)), elements).astype(np.float64)
        return energy_std((of_each @ features).ravel(), of_each.sum(axis=1), covariance)


def _in_pieces(potential: Potential, frames: Sequence[Frame], readouts: Array) -> list[Prediction]:
    """Evaluate in batches of a bounded number of atoms: a committee multiplies them, and memory is finite."""
    said: list[Prediction] = []
    while len(said) < len(frames):
        start = len(said)
        atoms = np.cumsum([len(frame) for frame in frames[start:]])
        end = start + max(1, int(np.searchsorted(atoms, _PIECE, side="right")))
        said += potential.predict(frames[start:end], readouts[start:end])
    return said


def _between(old: Answer, new: Answer, weight: float) -> Answer:
    """What serves between two networks: (1 - weight) V_old + weight V_new, which is one conservative potential; the score is the new one's."""
    keep, before, after = 1.0 - weight, old.prediction, new.prediction
    mixed = Prediction(
        keep * before.energy + weight * after.energy,
        keep * before.forces + weight * after.forces,
        keep * before.virial + weight * after.virial,
    )
    members = None
    if old.members is not None and new.members is not None:
        one, two = old.members, new.members
        members = Members(
            keep * one.energies + weight * two.energies, keep * one.forces + weight * two.forces, keep * one.virials + weight * two.virials
        )
    return Answer(mixed, after.energy - before.energy, new.lpr, members, new.energy_std)


def _members(said: Sequence[Prediction]) -> Members:
    return Members(np.array([p.energy for p in said]), np.stack([p.forces for p in said]), np.stack([p.virial for p in said]))
