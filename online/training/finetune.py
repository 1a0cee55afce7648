"""The slow half of learning: all weights of the potential that serves, trained on the labels of a run, with what it says elsewhere kept.

The same trainer as offline, with three things added: replay frames labelled by the serving potential itself, reference energies that keep
the zero of the energies that the engine has seen, and the prior of the last-layer updates to come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tumbaga.online.ports import Tunable
from tumbaga.online.records import Frame, LabelledFrame
from tumbaga.online.training import finish, offsets, replay
from tumbaga.online.training.dataset import composition
from tumbaga.online.training.loop import Sets, Training
from tumbaga.online.training.settings import Settings


def replayed(serving: Tunable, train: Sequence[LabelledFrame], recent: Sequence[Frame], count: int, seed: int) -> list[LabelledFrame]:
    """Return distorted copies of labelled and recent frames, and pairs of their elements, labelled by the serving potential itself.

    Args:
        serving: labels them.
        train: what is to be learnt.
        recent: other frames of the run.
        count: how many.
        seed: of the choice and the distortions.
    """
    frames = [*(one.frame for one in train), *recent]
    return replay.pseudo_labelled(serving, replay.generated(frames, count, seed)) if frames else []


def fine_tuned(
    serving: Tunable,
    sets: Sets,
    settings: Settings,
    folder: Path,
    *,
    observe: Callable[[dict[str, Any]], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Tunable:
    """Train the serving potential on new labels; a folder that holds the same training is gone on with.

    Args:
        serving: with the readout that serves; it is not changed.
        sets: new labels, and replay.
        settings: of the training.
        folder: for checkpoints and the log.
        observe, stop: see `Training`.

    Raises:
        TrainingError: see `Training.run`.
        TrainingStoppedError: it was told to stop; what was done is in the folder.
    """
    outcome = Training(serving, sets, settings, folder, observe=observe, stop=stop).run()
    reference = same_zero(serving, outcome.potential, [one.frame for one in sets.train])
    facts = {
        "training": {"start": serving.spec.name, "labels": len(sets.train), "replay_frames": len(sets.replay), "epochs": outcome.epochs}
    }
    return finish.completed(outcome.potential, reference, [one.frame for one in sets.train], facts, settings.seed)


def same_zero(serving: Tunable, tuned: Tunable, frames: Sequence[Frame]) -> np.ndarray:
    """Return reference energies under which the tuned potential gives the serving one's energies on average over frames of each composition.

    Labels count energies from another zero, of nuclei and electrons: an engine that was handed that would see a step of 1e5 eV. Offsets
    exert no force.

    Returns:
        Shape (n_elements,), float64, eV.
    """
    tuning, elements = tuned.tuning(), tuned.spec.elements
    own = tuning.reference
    counts = np.stack([composition(frame, elements) for frame in frames])
    said = np.array([one.energy for one in tuned.predict(frames)]) - counts @ own
    before = np.array([one.energy for one in serving.predict(frames)])
    return offsets.fitted(before, said, counts, _reference(serving))


def _reference(potential: Tunable) -> np.ndarray:
    return np.array(potential.tuning().reference)
