"""Checks of a potential that learns: that its energy is linear in its readout, as declared."""

from __future__ import annotations

import numpy as np

from tumbaga.online.conformance.subject import Subject, demand, near, near_energy
from tumbaga.online.records import Array


def the_readout_is_what_serves(subject: Subject) -> None:
    """The readout has n_columns weights in float64, and a prediction without one is the prediction with it."""
    model, readout = subject.trainable, subject.trainable.readout()
    claim = "the readout has n_columns weights in float64"
    demand(claim, readout.shape == (model.spec.n_columns,) and readout.dtype == np.float64, f"found {readout.shape}, {readout.dtype}")
    given = model.predict(subject.frames, np.tile(readout, (len(subject.frames), 1)))
    for one, own in zip(given, model.predict(subject.frames), strict=True):
        near_energy("a prediction without a readout is that with its own (eV)", one.energy, own.energy, subject.tolerances.same)
        near("a prediction without a readout is that with its own (eV/Å)", one.forces, own.forces, subject.tolerances.same)


def features_are_those_of_the_energy(subject: Subject) -> None:
    """phi is the features of a plain prediction, summed over the atoms of each element, and zero in the blocks of absent ones."""
    model = subject.trainable
    for frame, said in zip(subject.frames, model.predict(subject.frames), strict=True):
        phi, features = model.force_rows(frame).phi, said.features
        demand("phi has shape (n_columns,)", phi.shape == (model.spec.n_columns,), f"it has {phi.shape}")
        assert features is not None
        blocks = np.concatenate([features[frame.numbers == z].sum(axis=0) for z in model.spec.elements])
        near("phi is the features summed in element blocks", blocks, phi, subject.tolerances.same)


def features_and_readout_give_the_energy(subject: Subject) -> None:
    """E = phi · w + energy_fixed, for its own weights and for any others of their size."""
    model = subject.trainable
    for frame in subject.frames:
        rows = model.force_rows(frame)
        for w in _readouts(subject):
            said = model.predict([frame], w[None])[0]
            scale = 0.01 * abs(said.energy) + 0.1 * float(np.abs(rows.phi) @ np.abs(w))  # rounding is relative to what is added up
            near("E = phi · w + energy_fixed (eV)", float(rows.phi @ w) + rows.energy_fixed, said.energy, subject.tolerances.same, scale)


def force_rows_give_the_forces(subject: Subject) -> None:
    """F = rows @ w + forces_fixed, for its own weights and for any others; columns of absent elements are zero."""
    model = subject.trainable
    for frame in subject.frames:
        rows, shape = model.force_rows(frame), (3 * len(frame), model.spec.n_columns)
        demand("rows have shape (3 * n_atoms, n_columns)", rows.rows.shape == shape, f"they have {rows.rows.shape}")
        absent = [k for k, z in enumerate(model.spec.elements) if z not in frame.numbers]
        blocks = rows.rows.reshape(len(rows.rows), len(model.spec.elements), model.spec.n_hidden)
        demand("rows are zero in the blocks of absent elements", not blocks[:, absent].any(), "they are not")
        for w in _readouts(subject):
            linear = (rows.rows @ w).reshape(-1, 3) + rows.forces_fixed
            near("F = rows @ w + forces_fixed (eV/Å)", linear, model.predict([frame], w[None])[0].forces, subject.tolerances.same)


def each_frame_is_served_by_its_own_readout(subject: Subject) -> None:
    """In one batch frames may have different weights, as in a ramp: none gets those of another."""
    model, frames = subject.trainable, [*subject.frames, *subject.frames]
    weights = np.stack([w for w in _readouts(subject) for _ in subject.frames])
    for frame, w, together in zip(frames, weights, model.predict(frames, weights), strict=True):
        alone = model.predict([frame], w[None])[0]
        near_energy("each frame is served by its own readout (eV)", together.energy, alone.energy, subject.tolerances.same)
        near("each frame is served by its own readout (eV/Å)", together.forces, alone.forces, subject.tolerances.same)
        near("each frame is served by its own readout (virial, eV)", together.virial, alone.virial, subject.tolerances.same)


def _readouts(subject: Subject) -> list[Array]:
    """Its own weights, and others of the same size: the rounding of a float32 back end is relative to them."""
    own = subject.trainable.readout()
    size = float(np.abs(own).mean()) or 1.0
    return [own, own + size * np.random.default_rng(0).standard_normal(own.shape)]
