"""What the ablations of learning share: a loop of dynamics, flags, labels and updates in one process, and what its end is judged by.

The parts are those of a run: the embedded potential, `tumbaga.online.learner.Learner` on a store of its own, GFN1-xTB as the teacher. Only the
processes are missing, so that an arm takes seconds and is the same for the same seed. Needs the extra xtb.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

from tumbaga.driver import structures
from tumbaga.driver.backends import registry
from tumbaga.online import last_layer
from tumbaga.online.calibration import error_ratio
from tumbaga.online.guards import COVALENT_RADII
from tumbaga.online.labels.factory import make_labeller
from tumbaga.online.learner import Learner, Proposal
from tumbaga.online.records import Array, Frame, Label, LabelledFrame, Reason, Role
from tumbaga.online.selection import Limits
from tumbaga.online.store import FILE, Store
from tumbaga.online.uncertainty import force_std

MODEL: Final = "painn:cuau-water"
TEACHER, KNOWN = "GFN1-xTB", "GFN2-xTB"  # the teacher of the run, and that of the network
TEMPLATE: Final = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
KELVIN, STEP_FS, FRICTION = 500.0, 0.5, 0.02
WINDOW, STRIDE = 40, 8  # steps between two labels; the frames of these steps that a flag may pick
AUDITS = 4  # every so many labels one is of a frame picked at random
ELEMENTS = (1, 8, 29, 79)
SETTINGS: Final = last_layer.Settings()
RATIOS = np.linspace(0.5, 0.9, 17)  # of the sum of covalent radii


@dataclass(frozen=True)
class Arm:
    """A way to learn.

    Attributes:
        name: of the arm.
        settings: of the update.
        audits: whether frames are picked at random as well.
        guarded: whether labels are held against each other, and updates against held-out labels and their step.
        poisoned: number of the label whose forces are turned round; none if negative.
    """

    name: str
    settings: last_layer.Settings = SETTINGS
    audits: bool = True
    guarded: bool = True
    poisoned: int = -1


class Unguarded(Learner):
    """Learns from whatever it is told."""

    def _judge(self) -> None:
        pass


class Served(Calculator):  # type: ignore[misc] # ASE has no types
    """Forces of a potential under the readout that serves.

    Args:
        potential: the network.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self, potential: Any) -> None:
        super().__init__()
        self._potential, self.readout = potential, potential.readout()

    def calculate(self, *arguments: Any, **more: Any) -> None:
        """One frame."""
        super().calculate(*arguments, **more)
        (said,) = self._potential.predict([frame_of(self.atoms)], self.readout[None])
        self.results = {"energy": said.energy, "forces": said.forces}


def frame_of(atoms: Atoms) -> Frame:
    return Frame(np.asarray(atoms.numbers, dtype=np.int64), atoms.get_positions())


def start(seed: int) -> Atoms:
    """Return the packaged cluster with velocities of the temperature."""
    first = structures.read_frame(TEMPLATE)
    atoms = Atoms(first.numbers, first.positions)
    MaxwellBoltzmannDistribution(atoms, temperature_K=KELVIN, rng=np.random.default_rng([seed, 1]))
    return atoms


def dynamics(atoms: Atoms, seed: int) -> Langevin:
    return Langevin(atoms, STEP_FS * units.fs, temperature_K=KELVIN, friction=FRICTION, fixcm=False, rng=np.random.default_rng([seed, 2]))


class Ground:
    """What all arms of a seed share: the network, the teacher, frames of the teacher's own dynamics, and frames of another kind.

    Args:
        seed: of velocities and noise.
        frames: of the teacher's dynamics.
        teacher: a method of tblite.
    """

    def __init__(self, seed: int, frames: int, teacher: str = TEACHER) -> None:
        self.seed, self._teacher = seed, teacher
        self.potential: Any = registry.load(MODEL, "cpu", "float64")
        self.labeller = make_labeller(f"ase:tblite.ase:TBLite?method={teacher}&verbosity=0")
        self.apart = [self.labelled(frame) for frame in self._moved(frames)]
        self.elsewhere = [self.labelled(frame) for frame in others(seed)]

    def labelled(self, frame: Frame) -> LabelledFrame:
        return LabelledFrame(frame, self.labeller.label(frame))

    def _moved(self, count: int) -> list[Frame]:
        from tblite.ase import TBLite

        atoms, found = start(self.seed + 1000), []
        atoms.calc = TBLite(method=self._teacher, verbosity=0)
        for step, _ in enumerate(dynamics(atoms, self.seed + 1000).irun(400 + 20 * count)):
            if step > 400 and step % 20 == 0:
                found.append(frame_of(atoms))
        return found


def others(seed: int) -> list[Frame]:
    """Frames that no label of the run is like: water alone, metal alone, and one of each, distorted."""
    water = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    kinds = [
        (np.array([8, 1, 1, 8, 1, 1]), np.concatenate([water, water + np.array([0.3, -0.4, 2.9])])),
        (np.array([29, 29, 79]), np.array([[0.0, 0.0, 0.0], [2.3, 0.0, 0.0], [1.1, 2.3, 0.0]])),
        (np.array([29, 8, 1, 1]), np.concatenate([[[-2.0, -0.4, 0.2]], water])),
    ]
    rng = np.random.default_rng([seed, 3])
    return [Frame(numbers, places + 0.06 * rng.standard_normal(places.shape)) for numbers, places in kinds for _ in range(10)]


class Loop:
    """One arm: dynamics under what is learnt, a label after each window, an update after each label.

    Args:
        folder: for the store.
        ground: shared with the other arms.
        arm: how to learn.
    """

    def __init__(self, folder: Path, ground: Ground, arm: Arm) -> None:
        self._ground, self._arm = ground, arm
        self._store = Store(folder / FILE)
        limits = Limits(force_error=1e-6, budget=10_000)  # every frame that is picked is labelled
        kind = Learner if arm.guarded else Unguarded
        self.learner = kind(ground.potential, self._store, limits, ground.labeller.method, arm.settings)
        self._served, self._random = Served(ground.potential), np.random.default_rng([ground.seed, 4])
        self.readouts = [self._served.readout]  # of each version
        self.restarts = self.refused = 0

    def close(self) -> None:
        self._store.close()

    def run(self, labels: int) -> None:
        """Move until so many labels have been learnt from."""
        moving = self._begun()
        for number in range(labels):
            window = []
            for step in range(WINDOW):
                next(moving)
                if self._broken():
                    self.restarts += 1
                    moving = self._begun()
                elif step % STRIDE == 0:
                    window.append(frame_of(self._atoms))
            self._learn(number, window)

    def _begun(self) -> Any:
        self._atoms = start(self._ground.seed + self.restarts)
        self._atoms.calc = self._served
        moving = dynamics(self._atoms, self._ground.seed + self.restarts).irun(10_000_000)
        next(moving)
        return moving

    def _broken(self) -> bool:
        apart = self._atoms.get_all_distances() + 1e3 * np.eye(len(self._atoms))
        hot = self._atoms.get_temperature() > 4 * KELVIN
        return bool(hot or not np.isfinite(apart).all() or apart.min() < 0.5 or apart.min(axis=1).max() > 4.0)

    def _learn(self, number: int, window: list[Frame]) -> None:
        audit = self._arm.audits and number % AUDITS == AUDITS - 1
        spreads = [float(force_std(self._ground.potential.force_rows(frame).rows, self.learner.covariance).max()) for frame in window]
        frame = window[int(self._random.integers(len(window)))] if audit else window[int(np.argmax(spreads))]
        (said,) = self._ground.potential.predict([frame], self._served.readout[None])
        reason = Reason.AUDIT if audit else Reason.UNCERTAIN
        self.learner.candidate(frame, session="s", step=number, reason=reason, score=0.5, version=0, energy=said.energy, forces=said.forces)
        chosen = self.learner.next_frame()
        if chosen is None:
            return
        label = self._ground.labeller.label(self._store.frame(chosen.frame))
        if number == self._arm.poisoned:
            label = Label(label.energy, -label.forces, label.method, label.seconds)
        task = self._store.start_task(chosen.frame, "label-0", 1, chosen.role)
        self.learner.label(task, chosen.frame, label)
        made = self.learner.update()
        if isinstance(made, Proposal):
            self.learner.serve(made.readout, made.covariance, made.ratios)
            self._served.readout = made.readout
            self._served.reset()
            self.readouts.append(made.readout)
        else:
            self.refused += 1

    @property
    def aside(self) -> int:
        """Labels in quarantine."""
        return len(list(self._store.quarantined()))

    def train(self) -> list[LabelledFrame]:
        """What it has learnt from."""
        return [LabelledFrame(one.frame, one.label) for one in self._store.labels(self._ground.labeller.method) if one.role is Role.TRAIN]

    # -- what it is judged by --------------------------------------------------------------------------------------------------------

    def error(self) -> float:
        """Force RMSE (component) on frames of the teacher's dynamics, eV/Å."""
        return force_error(self._ground.potential, self._ground.apart, self._served.readout)

    def covered(self) -> float:
        """Share of the same frames whose largest error is below what is promised for 0.9 of them."""
        apart = self._ground.apart
        told = self._ground.potential.predict([one.frame for one in apart], np.repeat(self._served.readout[None], len(apart), axis=0))
        ratios = [
            error_ratio(
                one.label.forces, said.forces, force_std(self._ground.potential.force_rows(one.frame).rows, self.learner.covariance)
            )
            for one, said in zip(apart, told, strict=True)
        ]
        return float(np.mean(np.array(ratios) <= self.learner.quantile.q))

    def walls_lost(self) -> int:
        """Pairs of elements that were pushed apart by the first version, at distances where this one pushes less than half as much."""
        potential = self._ground.potential
        return lost(pushes(potential, self.readouts[0]), pushes(potential, self._served.readout))


def force_error(potential: Any, labels: list[LabelledFrame], readout: Array | None = None) -> float:
    """Force RMSE (component) on labels, eV/Å."""
    readouts = None if readout is None else np.repeat(readout[None], len(labels), axis=0)
    said = potential.predict([one.frame for one in labels], readouts)
    errors = [one.label.forces - p.forces for one, p in zip(labels, said, strict=True)]
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def lost(before: Array, now: Array) -> int:
    """How many pairs were pushed apart before, at a distance where they are less than half as much now."""
    return int(((before > 1.0) & (now < 0.5 * before)).any(axis=1).sum())


def pushes(potential: Any, readout: Array) -> Array:
    """Force on the second of two atoms away from the first, shape (n_pairs, n_distances), eV/Å."""
    pairs = [(one, two) for index, one in enumerate(ELEMENTS) for two in ELEMENTS[index:]]
    frames = [
        Frame(np.array(pair), np.array([[0.0, 0.0, 0.0], [ratio * COVALENT_RADII[list(pair)].sum(), 0.0, 0.0]]))
        for pair in pairs
        for ratio in RATIOS
    ]
    said = potential.predict(frames, np.repeat(readout[None], len(frames), axis=0))
    return np.array([one.forces[1, 0] for one in said]).reshape(len(pairs), len(RATIOS))
