"""One fine-tune from its order to its result: train, give the candidate its last layer, ask the gate. Everything heavy is imported here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tumbaga.driver import config as configs
from tumbaga.driver import finetuning, transferring
from tumbaga.driver.backends import registry
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.finetuning import Order, Result
from tumbaga.online import accuracy, gate
from tumbaga.online.errors import TrainingError
from tumbaga.online.gate_records import Evidence, Known
from tumbaga.online.ports import Potential, Tunable
from tumbaga.online.records import Frame, LabelledFrame, Role
from tumbaga.online.store import FILE, Store
from tumbaga.online.store.labels import StoredLabel
from tumbaga.online.training import checkpoints, finetune, finish, replay
from tumbaga.online.training.loop import Sets

REPLAY, REPLAY_WEIGHT = 1.0, 0.1  # replay frames a label, and the weight of each where what was known before is as good as this:
_GOOD: Final = 0.05  # eV/Å, median over the labels
_NOT_WORTH: Final = 0.02  # a weight below which nothing is replayed
_REPLAY_LEAST, _REPLAY_MOST = 20, 200
_RECENT: Final = 20  # flagged frames, for replay and shadow MD
_JUDGED: Final = 40  # frames on which forgetting is looked for

Observe = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Material:
    """What an order needs, from the run directory.

    Attributes:
        serving: the version to start from. original: what the run began with.
        train, held_out: labels. recent: frames that were flagged last, newest first.
    """

    serving: Tunable
    original: Potential
    train: list[StoredLabel]
    held_out: list[StoredLabel]
    recent: list[Frame]


def material(run_dir: Path, order: Order, settings: configs.Config) -> Material:
    """Read what an order needs.

    Raises:
        PotentialError: the version cannot be loaded, or its back end has no training half.
    """
    wanted = settings.potential

    def opened(path: str) -> Potential:
        return registry.of_version(wanted.model, run_dir / path, settings.learn.finetune_device, wanted.dtype)

    serving = opened(order.path)
    if not isinstance(serving, Tunable):
        raise PotentialError(wanted.model, "cannot be fine-tuned, its back end has no training half; set learn.finetune_every to 0")
    with Store(run_dir / FILE, read_only=True) as store:
        labels = {one.id: one for one in store.labels(order.method)}
        recent = [store.frame(frame_id) for frame_id in store.flagged_last(_RECENT)]
    train = [labels[number] for number in order.train if number in labels]
    return Material(serving, opened(order.base), train, [labels[number] for number in order.held_out if number in labels], recent)


def carry_out(run_dir: Path, order: Order, settings: configs.Config, observe: Observe, stop: Callable[[], bool]) -> Result:
    """Carry out an order, or go on with it where a process died at it.

    Args:
        run_dir: the run directory.
        order: the order.
        settings: of the run.
        observe: told what is being done.
        stop: asked often; True ends with TrainingStoppedError.

    Raises:
        PotentialError: see `material`.
        TrainingStoppedError: it was told to stop.
    """
    began, folder = time.monotonic(), order.folder(run_dir)
    found = material(run_dir, order, settings)
    learnt = [LabelledFrame(one.frame, one.label) for one in found.train]
    worth = replay_weight((found.original, found.serving), [*learnt, *(LabelledFrame(one.frame, one.label) for one in found.held_out)])
    count = min(_REPLAY_MOST, max(_REPLAY_LEAST, round(REPLAY * len(learnt)))) if worth else 0
    sets = Sets(learnt, (), finetune.replayed(found.serving, learnt, found.recent, count, order.number) if count else ())
    chosen: dict[str, Any] = {"seed": order.number, "replay": REPLAY if count else 0.0, "replay_weight": worth, "patience": 0}
    if settings.learn.finetune_frozen:
        chosen["frozen"] = settings.learn.finetune_frozen
    training = transferring.settings_for(found.serving, sets, False, chosen, settings.learn.finetune_steps)

    def told(line: dict[str, Any]) -> None:
        observe({"doing": "training", "epoch": line["epoch"] + 1, "epochs": training.epochs, "force_rmse": line.get("train_force_rmse")})

    try:
        tuned = finetune.fine_tuned(found.serving, sets, training, folder, observe=told, stop=stop)
    except TrainingError as error:
        return Result(order, False, f"no candidate: {error}")
    path = folder / finetuning.CANDIDATE
    finish.write(path, tuned)
    checks = gate.gate(
        tuned, found.serving, found.original, _evidence(found, path, settings), progress=lambda name: observe({"doing": name})
    )
    passed = gate.passed(checks)
    reason = "passed all checks" if passed else "; ".join(gate.refusals(checks))
    metrics = {"seconds": round(time.monotonic() - began, 1), "epochs": len(checkpoints.lines(folder)), **_errors(found, tuned)}
    return Result(order, passed, reason, tuple(checks), metrics)


def replay_weight(potentials: Sequence[Potential], labels: Sequence[LabelledFrame]) -> float:
    """Return the weight in the loss of a frame that the serving potential has labelled itself, where a label has 1; 0 for no such frames.

    What it says elsewhere is worth keeping as far as it is right: a pseudo-label has its variance. Where no label is, it says what the original
    said, so that one is asked as well: a version that has learnt from these labels is right at them, and no better elsewhere. The measure is the
    median over labels, so that frames of a new kind, where it is wrong, do not have it forget the others.

    Args:
        potentials: the original and the serving one; the worse counts.
        labels: all that are in hand.
    """
    weight = REPLAY_WEIGHT * min(1.0, (_GOOD / max(*(_median_error(one, labels) for one in potentials), 1e-9)) ** 2)
    return weight if weight >= _NOT_WORTH else 0.0


def _median_error(potential: Potential, labels: Sequence[LabelledFrame]) -> float:
    """Median over labels of the force RMSE (component), eV/Å."""
    said = potential.predict([one.frame for one in labels])
    with np.errstate(over="ignore"):  # there is nothing to keep then
        return float(np.median([np.sqrt(np.mean((p.forces - one.label.forces) ** 2)) for p, one in zip(said, labels, strict=True)]))


def _evidence(found: Material, path: Path, settings: configs.Config) -> Evidence:
    labels = [
        Known(one.frame, one.label, role, (composition(one.frame),))
        for role, ones in ((Role.TRAIN, found.train), (Role.HOLDOUT, found.held_out))
        for one in ones
    ]
    frames = [one.frame for one in labels] + found.recent
    judged = replay.pseudo_labelled(found.original, replay.generated(frames, _JUDGED, seed=1)) if frames else []
    other = "float64" if settings.potential.dtype == "float32" else "float32"
    twin = registry.of_version(settings.potential.model, path, settings.learn.finetune_device, other)
    return Evidence(labels, judged, found.recent, twin=twin)


def _errors(found: Material, tuned: Potential) -> dict[str, Any]:
    """Force RMSE before and after on both parts of the labels, eV/Å."""
    told: dict[str, Any] = {"labels": len(found.train), "held_out": len(found.held_out)}
    for name, ones in (("train", found.train), ("holdout", found.held_out)):
        for when, potential in (("before", found.serving), ("after", tuned)):
            said = potential.predict([one.frame for one in ones]) if ones else []
            judged = [accuracy.Judged(one.frame, one.label, p.energy, p.forces) for one, p in zip(ones, said, strict=True)]
            told[f"{name}_rmse_{when}"] = accuracy.force_error(judged).rmse if judged else None
    return told


def composition(frame: Frame) -> str:
    """The atoms of a frame as a class to be judged in, e.g. "1:4 8:2 29:1 79:1" by atomic numbers."""
    return " ".join(f"{z}:{(frame.numbers == z).sum()}" for z in sorted({int(z) for z in frame.numbers}))


def one_thread() -> None:
    """Take one core: the simulation has the others."""
    torch.set_num_threads(1)
