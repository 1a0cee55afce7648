"""What the water suite does with one temperature and seed: frames of the teacher's own, a run that learns, what it is compared with, and MD.

The run is an ASE script with a server of its own, as a user has it; the labels come from GFN1-xTB as from any ASE calculator. Needs the extra xtb.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import _survival
import numpy as np
from _learning_tumbaga import counted, served, spread
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.constraints import Hookean
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution

from tumbaga.driver import config as configs
from tumbaga.driver import evaluating, finetuning, structures, transferring
from tumbaga.driver.backends import registry
from tumbaga.driver.serving import ServedCalculator, ServingError, serve
from tumbaga.online import accuracy
from tumbaga.online.labels.factory import make_labeller
from tumbaga.online.ports import Potential
from tumbaga.online.records import Frame, LabelledFrame
from tumbaga.online.training.dataset import held_out
from tumbaga.online.training.loop import Sets

METHOD: Final = "ase:tblite.ase:TBLite?method=GFN1-xTB&verbosity=0"
TEMPLATE: Final = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
WALL = 5.0  # Å about the origin: atoms further out are pushed back
STEP_FS = _survival.TIMESTEP_FS
FRICTION = _survival.FRICTION
SETTLE, STRIDE = 300, 20  # steps dropped at the start of the teacher's dynamics, and between its frames
SETTLED_S, LOOK = 8.0, 25  # seconds without news after which learning has come to an end; steps between two looks
TUMBAGA, ONE_SHOT, SCRATCH, UNTUNED = "tumbaga", "one-shot", "scratch", "untuned"
_TRAINED = {transferring.TUNED: ONE_SHOT, transferring.SCRATCH: SCRATCH}
_TEACHER, _RUN, _RANDOM, _MD, _OWN = range(5)  # what a stream of random numbers is for


@dataclass(frozen=True)
class Length:
    """How much is done for one potential.

    Attributes:
        steps: of the run that learns, 1 fs each, at least. seconds: that it goes on for, at most, until all is learnt.
        labels: it may ask for. force_error: to hold, eV/Å.
        finetune_every: labels. finetune_steps: of each fine-tune, and of the trainings that it is compared with.
        frames: of the teacher's own dynamics, to judge by.
        runs: of MD under each potential in the end. horizon: of each, fs. own: the same under what the run has learnt.
    """

    steps: int
    seconds: float
    labels: int
    force_error: float
    finetune_every: int
    finetune_steps: int
    frames: int
    runs: int
    horizon: float
    own: float


# -- the teacher -----------------------------------------------------------------------------------------------------------------------


def start(kelvin: float, stream: list[int]) -> Atoms:
    """Return the packaged cluster about the origin, in its wall, with velocities of the temperature."""
    first = structures.read_frame(TEMPLATE)
    atoms = Atoms(first.numbers, first.positions - first.positions.mean(axis=0))
    atoms.set_constraint([Hookean(a1=i, a2=(0.0, 0.0, 0.0), k=_survival.WALL_STIFFNESS, rt=WALL) for i in range(len(atoms))])
    MaxwellBoltzmannDistribution(atoms, temperature_K=kelvin, rng=np.random.default_rng([*stream, 0]))
    return atoms


def dynamics(atoms: Atoms, kelvin: float, stream: list[int]) -> Langevin:
    return Langevin(
        atoms,
        STEP_FS * units.fs,
        temperature_K=kelvin,
        friction=FRICTION / units.fs,
        fixcm=False,
        rng=np.random.default_rng([*stream, 1]),
    )


def frame_of(atoms: Atoms) -> Frame:
    return Frame(np.asarray(atoms.numbers, dtype=np.int64), atoms.get_positions())


def teachers_own(kelvin: float, seed: int, count: int) -> list[LabelledFrame]:
    """Frames of MD by the teacher, labelled."""
    from tblite.ase import TBLite

    stream, labeller, found = [seed, int(kelvin), _TEACHER], make_labeller(METHOD), []
    atoms = start(kelvin, stream)
    atoms.calc = TBLite(method="GFN1-xTB", verbosity=0)
    for step, _ in enumerate(dynamics(atoms, kelvin, stream).irun(SETTLE + STRIDE * count)):
        if step > SETTLE and (step - SETTLE) % STRIDE == 0:
            frame = frame_of(atoms)
            found.append(LabelledFrame(frame, labeller.label(frame)))
    return found


# -- the run that learns -----------------------------------------------------------------------------------------------------------------


class Walk:
    """MD of the cluster that is set back to the start where `_survival.Rules` end it; counts how each end came.

    Args:
        calculator: whose forces move it.
        kelvin: temperature.
        stream: of random numbers.
    """

    def __init__(self, calculator: Any, kelvin: float, stream: list[int]) -> None:
        self._calculator, self._kelvin, self._stream = calculator, kelvin, stream
        self.ends: dict[str, int] = {}
        self.atoms = start(kelvin, stream)

    def steps(self) -> Iterator[int]:
        """Yield after each step."""
        done = 0
        while True:
            self.atoms.set_positions(start(self._kelvin, self._stream).positions)
            MaxwellBoltzmannDistribution(self.atoms, temperature_K=self._kelvin, rng=np.random.default_rng([*self._stream, 2, done]))
            self.atoms.calc = self._calculator
            rules = _survival.Rules(frame_of(self.atoms), self._kelvin)
            for _ in dynamics(self.atoms, self._kelvin, [*self._stream, done]).irun(10_000_000):
                yield done
                done += 1
                end = rules(self.atoms.positions, self.atoms.get_velocities(), self.atoms.get_forces(apply_constraint=False))
                if end:
                    self.ends[end] = self.ends.get(end, 0) + 1
                    break


class Enough:
    """Whether all has been learnt that will be: no label, version or fine-tune is new for a while, and none is under way."""

    def __init__(self, calculator: ServedCalculator) -> None:
        self._calculator, self._seen, self._since = calculator, (), time.monotonic()

    def __call__(self) -> bool:
        status, run = self._calculator.status(), self._calculator.run_dir
        orders = len(list((run / finetuning.FOLDER).glob("*")))
        labels = status["labels"]
        seen: Any = (tuple(labels.values()), orders, status["versions"], status["serving_version"])
        if seen != self._seen or finetuning.under_way(run) or labels["running"]:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since > SETTLED_S


def learnt(run: Path, model: str, kelvin: float, seed: int, length: Length) -> dict[str, Any]:
    """A run that learns; steps, ends, and what the server says of it."""
    settings = configs.Config(
        potential=configs.Potential(model=model, device="cpu"),
        flag=configs.Flag(force_error=length.force_error),
        label=configs.Label(method=METHOD, budget=length.labels),
        learn=configs.Learn(finetune_every=length.finetune_every, finetune_steps=length.finetune_steps),
        seed=seed,
    )
    run.mkdir(parents=True)
    (run / configs.FILE).write_text(configs.dumps(settings))
    stream, began, problem, step = [seed, int(kelvin), _RUN], time.monotonic(), "", 0
    atoms = start(kelvin, stream)
    with serve(atoms, run_dir=run) as calculator:
        walk, enough = Walk(calculator, kelvin, stream), Enough(calculator)
        try:
            for step in walk.steps():
                if step % LOOK or step < length.steps:
                    continue
                if time.monotonic() - began > length.seconds or enough():
                    break
        except ServingError as error:
            problem = str(error)
    told = {"steps": step, "seconds": round(time.monotonic() - began, 1), "ends": walk.ends, "problem": problem}
    return told | counted(run, {"known": 0})


def curve(run: Path, model: str, apart: list[LabelledFrame]) -> list[dict[str, Any]]:
    """Labels so far and force RMSE, eV/Å, of some of the versions that served."""
    found = []
    for version in spread(served(run)):
        judged, _ = evaluating.judge(registry.of_version(model, run / version.file, "cpu"), apart)
        found.append({"labels": version.labels, "version": version.number, "rmse": accuracy.force_error(judged).rmse})
    return found


def promise(potential: Potential, file: Path, apart: list[LabelledFrame], frames: int) -> dict[str, Any]:
    """How the uncertainties of the last version fit the errors, as `tumbaga evaluate` has it."""
    report, _ = evaluating.evaluate(potential, apart, evaluating.last_layer_of(potential, file), frames)
    found = report.uncertainty
    assert found is not None
    return {"promised": found.frame_coverage.promised, "found": found.frame_coverage.found, "q": found.multiplier, "factor": found.factor}


# -- what it is compared with --------------------------------------------------------------------------------------------------------------


class Frozen(Calculator):  # type: ignore[misc] # ASE has no types
    """Forces of a potential in this process."""

    implemented_properties = ("energy", "forces")

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self._potential = potential

    def calculate(self, *arguments: Any, **more: Any) -> None:
        """One frame."""
        super().calculate(*arguments, **more)
        (said,) = self._potential.predict([frame_of(self.atoms)])
        self.results = {"energy": said.energy, "forces": said.forces}


def at_random(potential: Potential, kelvin: float, stream: list[int], steps: int, count: int) -> list[LabelledFrame]:
    """Frames drawn at random from MD under a potential that stays as it is, labelled; those that the teacher cannot label are drawn again."""
    rng, labeller, found = np.random.default_rng([*stream, 3]), make_labeller(METHOD), []
    walk, frames = Walk(Frozen(potential), kelvin, stream), []
    for step in walk.steps():
        frames.append(frame_of(walk.atoms))
        if step >= steps:
            break
    for k in rng.permutation(len(frames)):
        try:
            found.append(LabelledFrame(frames[k], labeller.label(frames[k])))
        except Exception:  # noqa: BLE001, S112 - whatever a teacher says of a frame that is none
            continue
        if len(found) == count:
            break
    return found


def trained(model: str, data: list[LabelledFrame], seed: int, steps: int, folder: Path) -> dict[str, Potential]:
    """What `tumbaga transfer` makes of the labels at once, and the same network from new weights."""
    begun = transferring.opened(registry.load(model, "cpu"), model, {})
    train, valid = held_out(data, 0.1, seed)
    sets = Sets(train, valid)
    plan = transferring.Plan(begun, sets, (), transferring.settings_for(begun, sets, False, {"seed": seed, "patience": 0}, steps))
    result = transferring.carry_out(plan, folder)
    return {_TRAINED[arm.name]: arm.outcome.potential for arm in result.arms if arm.outcome is not None}


# -- all of it -----------------------------------------------------------------------------------------------------------------------------


def md(potential: Potential, kelvin: float, seed: int, runs: int, horizon: float) -> list[tuple[str, float]]:
    """How MD under a potential ended, and after how many fs, run by run."""
    stream = [seed, int(kelvin), _MD]
    begin = frame_of(start(kelvin, stream))
    noise = int(np.random.default_rng(stream).integers(1 << 31))
    return _survival.runs(potential, [begin] * runs, [kelvin] * runs, horizon, noise, WALL)


def judged(potential: Potential, arm: str, apart: list[LabelledFrame], kelvin: float, seed: int, length: Length) -> dict[str, Any]:
    """Error and MD of one potential."""
    found, lost = evaluating.judge(potential, apart)
    rmse = accuracy.force_error(found).rmse if not lost else math.inf
    horizon = length.own if arm == TUMBAGA else length.horizon
    return {"arm": arm, "rmse": rmse, "ends": md(potential, kelvin, seed, length.runs, horizon)}


def job(model: str, kelvin: float, seed: int, length: Length) -> dict[str, Any]:
    """Everything of one temperature and seed."""
    began, apart = time.monotonic(), teachers_own(kelvin, seed, length.frames)
    origin = registry.load(model, "cpu")
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as made:
        run = Path(made) / "run"
        told = learnt(run, model, kelvin, seed, length)
        last = run / served(run)[-1].file
        own = registry.of_version(model, last, "cpu")
        fresh = at_random(own, kelvin, [seed, int(kelvin), _OWN], STRIDE * length.frames, length.frames)
        told |= {"curve": curve(run, model, apart)}
        told |= {"promise": promise(own, last, fresh, length.frames), "promise_apart": promise(own, last, apart, length.frames)}
        labels = told["labels_converged"]
        data = at_random(origin, kelvin, [seed, int(kelvin), _RANDOM], length.steps, labels)
        others = trained(model, data, seed, length.finetune_steps, Path(made) / "training") if labels > 1 else {}
        arms = {TUMBAGA: own, **others, UNTUNED: origin}
        rows = [judged(potential, arm, apart, kelvin, seed, length) for arm, potential in arms.items()]
    seconds = round(time.monotonic() - began, 1)
    plain: dict[str, Any] = json.loads(
        json.dumps(evaluating.finite({"kelvin": kelvin, "seed": seed, **told, "arms": rows, "seconds": seconds}))
    )
    return plain | {"length": asdict(length)}
