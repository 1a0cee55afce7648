"""From a trained potential to a weights file that serves and learns like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save

from tumbaga.online.labelled import mean_row_norm2
from tumbaga.online.ports import Tunable
from tumbaga.online.records import Array, Frame
from tumbaga.online.versions import write_whole

_ROWS: Final = 64  # frames whose force rows are looked at


def completed(potential: Tunable, reference: Array, frames: Sequence[Frame], facts: Mapping[str, Any], seed: int = 0) -> Tunable:
    """Return the potential with facts, and with the mean squared force row of its new features: the prior of last-layer updates.

    Args:
        potential: as trained.
        reference: its reference energies, shape (n_elements,), eV.
        frames: it was trained on; at most 64 of them, chosen by the seed, are evaluated.
        facts: JSON-compatible.
        seed: of the choice.
    """
    found = dict(facts)
    if potential.spec.n_hidden:
        chosen = np.random.default_rng([seed, len(frames)]).permutation(len(frames))[:_ROWS]
        found["mean_h2"] = mean_row_norm2([potential.force_rows(frames[k]).rows for k in sorted(chosen)])
    return potential.tuning().trained(reference, found)


def write(path: Path, potential: Tunable) -> None:
    """Write a weights file (safetensors), whole or not at all."""
    tensors = {key: np.ascontiguousarray(value) for key, value in potential.state().items()}
    write_whole(path, save(tensors, dict(potential.metadata)))
