"""Pretrain, transfer and fine-tune offline: what `tumbaga transfer` does, for programs. Prints nothing; the trainer is ``online.training``.

plan = transferring.Plan(registry.load("painn:cuau-water", "cpu"), sets, test, settings)
result = transferring.carry_out(plan, Path("runs/mine"))
result.potential.predict([frame])
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from tumbaga.driver import evaluating
from tumbaga.driver.errors import ConfigError, PotentialError
from tumbaga.online import accuracy
from tumbaga.online.accuracy import EnergyError, ForceError, Judged
from tumbaga.online.errors import TrainingError
from tumbaga.online.ports import Potential, Tunable
from tumbaga.online.records import LabelledFrame
from tumbaga.online.training import checkpoints, finish, offsets
from tumbaga.online.training.dataset import epoch_order, in_batches, samples
from tumbaga.online.training.loop import REFERENCE, Outcome, Sets, Training
from tumbaga.online.training.settings import Settings
from tumbaga.online.versions import write_whole

TUNED, SCRATCH, UNTUNED = "tuned", "from scratch", "untuned"  # names of the arms
RESULT: Final = "result.json"
LARGE: Final = 200_000  # parameters: from here on a model is a foundation model, slow a step and easily spoilt
STEPS: Final = 1000  # of a training by default; epochs follow from it
STEPS_LARGE: Final = 150  # a step of a foundation model costs seconds on a CPU core
LEAST_EPOCHS, MOST_EPOCHS = 10, 400
RATES: Final = {"small": 1e-3, "large": 3e-4, SCRATCH: 5e-3}
Observe = Callable[[str, dict[str, Any]], None]  # name of the arm, line of its log


@dataclass(frozen=True, eq=False)
class Plan:
    """One transfer.

    Attributes:
        start: the potential that is tuned, elements already mapped.
        sets: what is learnt, what chooses the best epoch, what is not to be forgotten.
        test: what the arms are compared on; may be empty.
        settings: of the training.
        from_scratch: new weights instead of those of `start`.
        compare: train from scratch beside it, on the same labels for the same epochs.
        facts: JSON-compatible, for the metadata of the file, e.g. {"level": "PBE"}.
    """

    start: Tunable
    sets: Sets
    test: Sequence[LabelledFrame]
    settings: Settings
    from_scratch: bool = False
    compare: bool = True
    facts: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Arm:
    """How one way of getting a potential did.

    Attributes:
        name: TUNED, SCRATCH or UNTUNED (with reference energies fitted to the labels).
        forces, energies: its errors on the test frames; None without any.
        slope: of predicted against labelled forces there, through the origin; nan without any.
        replay: its force error on the replay frames; None without any.
        judged: the test frames with its predictions.
        outcome: of its training; None where it had none.
    """

    name: str
    forces: ForceError | None
    energies: EnergyError | None
    slope: float
    replay: ForceError | None
    judged: list[Judged]
    outcome: Outcome | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """What came out: the potential, complete with its facts, and the arms, what was asked for first."""

    potential: Tunable
    arms: list[Arm]


def opened(potential: Potential, name: str, like: dict[int, int]) -> Tunable:
    """Return the potential as one that can be trained, with elements mapped.

    Raises:
        PotentialError: it cannot be trained, or an element has nothing to start from.
    """
    if not isinstance(potential, Tunable):
        raise PotentialError(name, "cannot be trained here, its back end has no training half; painn:… can")
    return potential.with_elements(like) if like else potential


def element_map(texts: Sequence[str]) -> dict[int, int]:
    """Read "Au=Cu", or several with commas between: gold starts from copper.

    Raises:
        ConfigError: something cannot be understood.
    """
    found: dict[int, int] = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        new, _, old = part.partition("=")
        if not (atomic_numbers.get(new) and atomic_numbers.get(old)):
            raise ConfigError("--map", f"cannot read {part!r}; write NEW=OLD in symbols, e.g. Au=Cu for gold that starts from copper")
        found[int(atomic_numbers[new])] = int(atomic_numbers[old])
    return found


def check_elements(potential: Potential, data: Sequence[LabelledFrame]) -> None:
    """Find frames that the potential has no weights for.

    Raises:
        ConfigError: with the way to add the element.
    """
    known = set(potential.spec.elements)
    strange = sorted({int(z) for one in data for z in one.frame.numbers} - known) if known else []
    if strange:
        symbols = ", ".join(chemical_symbols[z] for z in strange)
        near = chemical_symbols[min(known, key=lambda z: abs(z - strange[0]))]
        told = f"hold {symbols}, which {potential.spec.name} does not know; start each from a similar element"
        raise ConfigError("DATA", f"{told}, e.g. --map {chemical_symbols[strange[0]]}={near}")


def settings_for(start: Tunable, sets: Sets, from_scratch: bool, chosen: dict[str, Any], steps: int = 0) -> Settings:
    """Return settings: what was chosen, and for the rest what suits the size of the model and the number of labels.

    A training has 1000 steps (150 for a foundation model) if `steps` is 0, so few labels get many epochs; `patience` is a third of the
    epochs, at least 30.

    Raises:
        ConfigError: a setting is out of range.
    """
    large = is_large(start)
    rate = RATES[SCRATCH] if from_scratch else RATES["large" if large else "small"]
    try:
        first = Settings(**{"epochs": 1, "rate": rate, **chosen})
    except TrainingError as error:
        raise ConfigError(f"--{error.what.replace('_', '-')}", error.problem) from error
    if "epochs" not in chosen:
        # the first epoch stands for all: how frames fall into batches changes little
        tuning, reference = start.tuning(), np.zeros(len(start.spec.elements))
        new, old = (samples(tuning, start.spec.elements, data, reference) for data in (sets.train, sets.replay))
        an_epoch = len(in_batches(epoch_order(new, old, first.replay, first.seed, 0), first.batch_atoms))
        wanted = steps or (STEPS_LARGE if large and not from_scratch else STEPS)
        first = replace(first, epochs=min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(wanted / max(1, an_epoch)))))
    return first if "patience" in chosen else replace(first, patience=max(30, first.epochs // 3))


def is_large(start: Tunable) -> bool:
    """Whether a potential has as many parameters as foundation models have."""
    return bool(sum(value.numel() for value in start.tuning().module.parameters()) > LARGE)


def carry_out(plan: Plan, folder: Path, observe: Observe | None = None, stop: Callable[[], bool] | None = None) -> Result:
    """Train, compare, and write checkpoints, logs and result.json; a folder of the same plan is gone on with.

    Raises:
        ConfigError: a setting does not fit the potential, or the folder is of another training.
        TrainingStoppedError: it was told to stop; what was done is in the folder.
    """
    main = SCRATCH if plan.from_scratch else TUNED
    outcome = _trained(plan, main, folder, observe, stop)
    facts = {**(plan.facts or {}), "training": _facts(plan, outcome)}
    frames = [one.frame for one in plan.sets.train]
    potential = finish.completed(outcome.potential, outcome.reference, frames, facts, plan.settings.seed)
    arms = [_arm(main, potential, plan, outcome)]
    if plan.compare:
        arms.append(_arm(UNTUNED, _untuned(plan), plan))
        if not plan.from_scratch:
            other = _trained(plan, SCRATCH, folder, observe, stop)
            arms.append(_arm(SCRATCH, other.potential, plan, other))
    result = Result(potential, arms)
    write_whole(folder / RESULT, (json.dumps(evaluating.finite(_plain(plan, result)), indent=1) + "\n").encode())
    return result


def begun(folder: Path) -> bool:
    """Whether a folder holds a training."""
    return any((folder / _folder(name) / checkpoints.FILE).exists() for name in (TUNED, SCRATCH))


# -- parts -----------------------------------------------------------------------------------------------------------------------------


def _folder(name: str) -> str:
    return name.replace(" ", "-")


def _trained(plan: Plan, name: str, folder: Path, observe: Observe | None, stop: Callable[[], bool] | None) -> Outcome:
    scratch = name == SCRATCH
    settings, sets = plan.settings, plan.sets
    if scratch and not plan.from_scratch:
        # nothing to keep frozen and nothing to remember; a rate at which new weights get somewhere
        settings, sets = replace(settings, frozen=(), rate=max(settings.rate, RATES[SCRATCH])), replace(sets, replay=())

    def told(line: dict[str, Any]) -> None:
        if observe is not None:
            observe(name, line)

    try:
        return Training(plan.start, sets, settings, folder / _folder(name), scratch=scratch, observe=told, stop=stop).run()
    except TrainingError as error:
        raise ConfigError(error.what, error.problem) from error


def _untuned(plan: Plan) -> Tunable:
    """The start with reference energies of the labels' level, without which its energies could not be compared."""
    tuning = plan.start.tuning()
    if REFERENCE in plan.settings.frozen:
        return tuning.trained(tuning.reference, {})
    return tuning.trained(offsets.reference_for(tuning, plan.start.spec.elements, plan.sets.train), {})


def _arm(name: str, potential: Tunable, plan: Plan, outcome: Outcome | None = None) -> Arm:
    judged = evaluating.judge(potential, plan.test)[0] if plan.test else []
    old = evaluating.judge(potential, plan.sets.replay)[0] if plan.sets.replay else []
    return Arm(
        name,
        accuracy.force_error(judged) if judged else None,
        accuracy.energy_error(judged) if judged else None,
        accuracy.slope(judged).origin.value if judged else math.nan,
        accuracy.force_error(old) if old else None,
        judged,
        outcome,
    )


def _facts(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    counts = {"labels": len(plan.sets.train), "validation_frames": len(plan.sets.valid), "replay_frames": len(plan.sets.replay)}
    start = "nothing" if plan.from_scratch else plan.start.spec.name
    return {"start": start, **counts, "epochs_done": outcome.epochs, "best_epoch": outcome.best, **asdict(plan.settings)}


def _plain(plan: Plan, result: Result) -> dict[str, Any]:
    arms = [
        {
            "name": arm.name,
            "forces": arm.forces and asdict(arm.forces),
            "energies": arm.energies and asdict(arm.energies),
            "slope": arm.slope,
            "replay_forces": arm.replay and asdict(arm.replay),
            "epochs": arm.outcome and arm.outcome.epochs,
            "best_epoch": arm.outcome and arm.outcome.best,
        }
        for arm in result.arms
    ]
    first = result.arms[0].outcome
    return {"schema": 1, "test": len(plan.test), "training": first and _facts(plan, first), "arms": arms}
