"""How wrong a version of a run is for frames whose labels are known, whether it serves or not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tumbaga.driver import config as configs
from tumbaga.driver.backends import registry
from tumbaga.online import versions
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.store import Store, StoredVersion


def largest(
    store: Store, run_dir: Path, wanted: configs.Potential, version: StoredVersion, frame_ids: Sequence[int], method: str, held: Trainable
) -> list[float]:
    """The largest force error of a version for each of some frames, eV/Å.

    Args:
        store: of the run.
        run_dir: the run directory.
        wanted: the potential of the run.
        version: which one.
        frame_ids: frames with labels.
        method: of the labels.
        held: a potential in memory, which saves reading the version's network where it is the same.

    Raises:
        VersionError: its file must not serve.
        PotentialError: its file cannot be loaded.
    """
    labels = [store.label_of(frame_id, method) for frame_id in frame_ids]
    frames = [store.frame(frame_id) for frame_id in frame_ids]
    layer = versions.read(run_dir / version.file)
    potential: Potential = held
    if layer.metadata.get(versions.NETWORK, "") != versions.fingerprint(held.state(), held.readout()):
        potential = registry.of_version(wanted.model, run_dir / version.file, "cpu", wanted.dtype)
    said = potential.predict(frames, np.stack([layer.readout] * len(frames)))
    return [
        float(np.linalg.norm(label.label.forces - one.forces, axis=1).max())
        for label, one in zip(labels, said, strict=True)
        if label is not None
    ]
