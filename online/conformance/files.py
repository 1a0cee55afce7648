"""Checks of version files: a potential that learns can be written down whole, read again, and nothing in the file is executed."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tumbaga.online import versions
from tumbaga.online.conformance.subject import Subject, agree, demand, near
from tumbaga.online.ports import Potential, Trainable
from tumbaga.online.records import Array

_DECLARED = ("elements", "cutoff", "n_hidden", "level", "mean_h2", "licence")
_UNPICKLED: list[list[str]] = []  # of each watch that is on
_HOOKED: list[bool] = []


def the_state_is_plain_numbers(subject: Subject) -> None:
    """The state is arrays of numbers by name, the metadata is text: what safetensors holds without any pickle."""
    model = subject.trainable
    state = model.state()
    demand("the state is not empty", bool(state), "it is")
    for name, array in state.items():
        plain = isinstance(name, str) and isinstance(array, np.ndarray) and array.dtype.kind in "fiub"
        demand(
            "the state is arrays of numbers by name",
            plain,
            f"{name!r} is a {type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}",
        )
    for key, value in model.metadata.items():
        told = f"{key!r} is a {type(value).__name__}"
        demand("the metadata are text", isinstance(key, str) and isinstance(value, str), told)


def the_state_is_a_copy(subject: Subject) -> None:
    """Whoever writes into a state or a readout that it was given does not change the potential; nor does a state with another readout."""
    model = subject.trainable
    before = model.predict(subject.frames)
    for array in [*model.state().values(), *model.state(2.0 * model.readout()).values(), model.readout()]:
        if array.flags.writeable:
            array[...] = 1
    for one, other in zip(model.predict(subject.frames), before, strict=True):
        agree("state and readout are copies", one, other, subject.tolerances.same)


def a_version_is_a_potential_by_itself(subject: Subject) -> None:
    """A version file with another readout, given to the loader as a path, is the potential with that readout and the same declaration."""
    model, readout = subject.trainable, _other_readout(subject)
    again = _reloaded(subject)
    for key in _DECLARED:
        own, its = getattr(model.spec, key), getattr(again.spec, key)
        demand(f"a version declares the same {key}", its == own, f"{its!r} instead of {own!r}")
    demand("a version of a potential that learns learns", isinstance(again, Trainable), "it is no Trainable")
    assert isinstance(again, Trainable)
    near("a version holds its readout (eV)", again.readout(), readout, subject.tolerances.same)
    before, after = versions.fingerprint(model.state(), model.readout()), versions.fingerprint(model.state(readout), readout)
    demand("a readout changes no other tensor of the state", before == after, "versions of it would be refused as those of another network")
    served = model.predict(subject.frames, np.tile(readout, (len(subject.frames), 1)))
    for one, other in zip(again.predict(subject.frames), served, strict=True):
        agree("a version says what the potential says with its readout", one, other, subject.tolerances.same)


def a_version_unpickles_nothing(subject: Subject) -> None:
    """To load a version no pickle is opened that names a class or a function: such a file could do anything."""
    with _watched() as unpickled:
        _reloaded(subject)
    demand("a version unpickles nothing", not unpickled, f"{len(unpickled)} names were looked up for a pickle, {unpickled[:1]} first")


def _other_readout(subject: Subject) -> Array:
    own = subject.trainable.readout()
    return own + 0.1 * (float(np.abs(own).mean()) or 1.0) * np.cos(np.arange(own.size))


def _reloaded(subject: Subject) -> Potential:
    assert subject.load is not None
    model, readout = subject.trainable, _other_readout(subject)
    layer = versions.LastLayer(readout, 1e-6 * np.eye(readout.size))
    with tempfile.TemporaryDirectory(prefix="tumbaga-conformance-") as made:
        file = versions.write(Path(made), 1, model.state(readout), layer, model.metadata)
        return subject.load(str(Path(made) / file.path), "cpu", model.spec.dtype)


@contextlib.contextmanager
def _watched() -> Iterator[list[str]]:
    """Collect the names that pickles look up meanwhile, whoever opens them and by whichever import.

    By an audit hook of the interpreter, which once there cannot be removed; it does nothing while nobody watches.
    """
    if not _HOOKED:
        sys.addaudithook(_hook)
        _HOOKED.append(True)
    seen: list[str] = []
    _UNPICKLED.append(seen)
    try:
        yield seen
    finally:
        _UNPICKLED.remove(seen)


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        for seen in _UNPICKLED:
            seen.append(".".join(map(str, arguments)))
