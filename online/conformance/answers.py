"""Checks of what a potential says of itself and of the form of what it answers."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from ase.data import chemical_symbols

from tumbaga.online.conformance.subject import Subject, agree, demand, near
from tumbaga.online.ports import PotentialSpec, Trainable
from tumbaga.online.records import Frame

DTYPES = ("float32", "float64")
_ALL = frozenset(range(1, 119))


def unknown_elements(spec: PotentialSpec) -> list[int]:
    """Atomic numbers that a potential declares not to know, ascending; none where it declares no elements."""
    return sorted(_ALL - set(spec.elements)) if spec.elements else []


def it_declares_itself(subject: Subject) -> None:
    """The declaration is one that can be worked with: a name, known elements in ascending order, a range, a dtype."""
    spec = subject.potential.spec
    demand("spec.name is what the user wrote", bool(spec.name), "it is empty")
    demand("spec.elements are atomic numbers in ascending order", _ascending(spec.elements), f"they are {spec.elements}")
    demand("spec.cutoff is a length", spec.cutoff >= 0, f"it is {spec.cutoff}")
    demand("spec.n_hidden is a width", spec.n_hidden >= 0, f"it is {spec.n_hidden}")
    demand("a potential with a readout names its elements", bool(spec.elements) or not spec.n_hidden, "there are none")
    demand("spec.dtype is float32 or float64", spec.dtype in DTYPES, f"it is {spec.dtype!r}")


def it_gives_a_sound_prediction_of_each_frame(subject: Subject) -> None:
    """As many predictions as frames, none for none, all finite, in float64 and of the right shapes; the frames stay as they were."""
    potential, frames = subject.potential, subject.frames
    demand("no frames give no predictions", potential.predict([]) == [], "they give some")
    keys = [frame.key for frame in frames]
    said = potential.predict(frames)
    demand("each frame gets one prediction", len(said) == len(frames), f"{len(frames)} frames got {len(said)}")
    demand("frames are not changed by a prediction", keys == [frame.key for frame in frames], "one was")
    for frame, one in zip(frames, said, strict=True):
        demand("the energy is a float", isinstance(one.energy, float), f"it is a {type(one.energy).__name__}")
        _array("forces have shape (n_atoms, 3) and are float64", one.forces, (len(frame), 3))
        _array("the virial has shape (3, 3) and is float64", one.virial, (3, 3))
        demand("predictions of sound frames are finite", one.finite, f"one of {len(frame)} atoms is not")
        near("the virial is symmetric", one.virial, one.virial.T, subject.tolerances.same)
        if potential.spec.n_hidden:
            demand("features come with every prediction", one.features is not None, "they are None")
        if one.features is not None:
            _array("features have shape (n_atoms, n_hidden) and are float64", one.features, (len(frame), potential.spec.n_hidden))


def a_batch_says_what_its_frames_say_alone(subject: Subject) -> None:
    """Frames of different sizes in one batch do not feel one another, whatever their order."""
    claim, frames = "a batch says what its frames say alone", subject.frames
    alone = [subject.predict(frame) for frame in frames]
    for batch, order in ((frames, 1), (frames[::-1], -1)):
        for together, one in zip(subject.potential.predict(batch), alone[::order], strict=True):
            agree(claim, together, one, subject.tolerances.same)
            if one.features is not None and together.features is not None:
                near(f"{claim} (features)", together.features, one.features, subject.tolerances.same)


def earlier_calls_change_nothing(subject: Subject) -> None:
    """A frame gets the same answer again after others, and after its atoms have moved a little and back: nothing kept goes stale."""
    for frame in subject.frames:
        before = subject.predict(frame)
        for size in (1e-3, 0.3):
            subject.predict(
                replace(frame, positions=frame.positions + size * np.random.default_rng(0).uniform(-1, 1, frame.positions.shape))
            )
            agree("earlier calls change nothing", subject.predict(frame), before, subject.tolerances.same)


def an_unknown_element_is_refused(subject: Subject) -> None:
    """A frame with an element outside the declared ones raises one sentence that names it, and the error survives pickling."""
    known = subject.potential.spec.elements[0]
    strangers = unknown_elements(subject.potential.spec)
    for z in {strangers[0], strangers[-1]}:
        frame = Frame(np.array([known, z]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 2.5]]))
        _refused(lambda one: subject.potential.predict([subject.frames[0], one]), frame, z)
        if isinstance(subject.potential, Trainable):
            _refused(subject.potential.force_rows, frame, z)


def strange_geometries_do_not_raise(subject: Subject) -> None:
    """Atoms in one place, nearly so, or very far apart get an answer, finite or not: a batch of others must not die of them."""
    claim, numbers = "strange geometries do not raise", np.resize(np.array(subject.elements), 2)
    for distance in (0.0, 1e-3, 0.1, 1e5):
        frame = Frame(numbers, np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]]))
        try:
            said = subject.predict(frame)
        except Exception as error:  # noqa: BLE001 - whatever it raises, the promise is broken
            told = f"two atoms {distance:g} Å apart gave {type(error).__name__}: {error}"
            demand(claim, False, told)
        else:
            demand(claim, said.forces.shape == (2, 3), f"two atoms {distance:g} Å apart got forces of shape {said.forces.shape}")


def float32_follows_float64(subject: Subject) -> None:
    """Loaded in float32 and in float64 it says the same to single precision, and declares the dtype that it was asked for."""
    assert subject.load is not None
    single, double = (subject.load(subject.rest, "cpu", dtype) for dtype in DTYPES)
    demand("loaded in float64, it computes in float64", double.spec.dtype == "float64", f"spec.dtype is {double.spec.dtype!r}")
    for one, two in zip(single.predict(subject.frames), double.predict(subject.frames), strict=True):
        agree("float32 follows float64", one, two, subject.tolerances.single)


def _ascending(elements: tuple[int, ...]) -> bool:
    return set(elements) <= _ALL and list(elements) == sorted(set(elements))


def _array(claim: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    demand(claim, array.shape == shape and array.dtype == np.float64, f"found {array.shape}, {array.dtype}")


def _refused(ask: Callable[[Frame], object], frame: Frame, z: int) -> None:
    claim = "an unknown element is refused with a sentence that names it"
    symbol = chemical_symbols[z]
    try:
        ask(frame)
    except Exception as error:  # noqa: BLE001 - back ends have errors of their own
        told = str(error)
        sentence = "\n" not in told and len(told.split()) >= 3 and re.search(rf"\b({symbol}|{z})\b", told)
        demand(claim, bool(sentence), f"for {symbol} ({z}) it says {told!r}")
        again = pickle.loads(pickle.dumps(error))
        demand("the error of an unknown element survives pickling", str(again) == told, f"it then says {str(again)!r}")
    else:
        demand(claim, False, f"{symbol} ({z}) got an answer")
