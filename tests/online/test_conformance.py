"""The conformance suite: the exact toy keeps every promise, and for each promise there is a potential that breaks it and is told so."""

from __future__ import annotations

import pickle
import unittest
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tumbaga.online import conformance, testing
from tumbaga.online.conformance import CHECKS, ConformanceError, Subject
from tumbaga.online.ports import ForceRows, Trial
from tumbaga.online.records import Array, Frame, Prediction
from tumbaga.online.testing import ToyTrainable

ELEMENTS = (1, 8)
WEIGHTS = np.random.default_rng(20).standard_normal(8)
TOY = ToyTrainable(ELEMENTS, WEIGHTS, n_gaussians=2)
Spoil = Callable[[Frame, int, Prediction], Prediction]  # (frame, frames in the batch, what is right)


def altered(toy: ToyTrainable = TOY, **changed: Any) -> Any:
    """A toy with some of its parts replaced."""
    parts = ("spec", "predict", "readout", "force_rows", "metadata", "state")
    return SimpleNamespace(**{name: getattr(toy, name) for name in parts} | changed)


def spoilt(spoil: Spoil) -> Any:
    """The toy with its predictions changed on the way out."""

    def predict(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        return [spoil(frame, len(frames), said) for frame, said in zip(frames, TOY.predict(frames, readouts), strict=True)]

    return altered(predict=predict)


def shown(change: Callable[[Frame], Frame]) -> Any:
    """The toy with other frames shown to it than it is asked about."""
    return altered(predict=lambda frames, readouts=None: TOY.predict([change(frame) for frame in frames], readouts))


def load(rest: str, device: str, dtype: str) -> Any:
    """The toy, or a version of it; in float32 its numbers are rounded."""
    toy = ToyTrainable(ELEMENTS, load_file(rest)["readout"] if rest else WEIGHTS, n_gaussians=2)
    if dtype == "float64":
        return toy
    spec = replace(toy.spec, dtype="float32")
    return altered(toy, spec=spec, predict=lambda frames, readouts=None: [rounded(p, np.float32) for p in toy.predict(frames, readouts)])


def rounded(said: Prediction, dtype: type[np.floating[Any]]) -> Prediction:
    features = None if said.features is None else said.features.astype(dtype).astype(np.float64)
    return Prediction(float(dtype(said.energy)), said.forces.astype(dtype).astype(float), said.virial.astype(dtype).astype(float), features)


class Weights(torch.nn.Module):
    """The toy's readout as the one parameter of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = torch.nn.Parameter(torch.tensor(WEIGHTS))


def prepared(frame: Frame) -> tuple[ForceRows, Array, Array]:
    """The linear model of one frame, virial included: energy and forces, virials of unit readouts (n_columns, 3, 3), fixed virial."""
    units = np.concatenate([np.zeros((1, WEIGHTS.size)), np.eye(WEIGHTS.size)])
    virials = np.stack([said.virial for said in TOY.predict([frame] * len(units), units)])
    return TOY.force_rows(frame), virials[1:] - virials[0], virials[0]


def opened(**changed: Any) -> Any:
    """The toy opened for training, with some of its parts replaced."""
    module = Weights()

    def evaluate(batch: Sequence[Any], *, forces: bool = True, virials: bool = False, create_graph: bool = True) -> Trial:
        w = module.readout
        energies = torch.stack([torch.tensor(rows.phi) @ w + rows.energy_fixed for rows, _, _ in batch])
        pulls = torch.cat([(torch.tensor(rows.rows) @ w).reshape(-1, 3) + torch.tensor(rows.forces_fixed) for rows, _, _ in batch])
        strains = torch.stack([torch.einsum("kab,k->ab", torch.tensor(slopes), w) + torch.tensor(fixed) for _, slopes, fixed in batch])
        return Trial(energies, pulls, strains if virials else None)

    def trained(reference: Array, facts: dict[str, Any]) -> Any:
        spec = replace(TOY.spec, level=facts.get("level", TOY.spec.level))
        return altered(TOY.with_readout(module.readout.detach().numpy().copy()), spec=spec)

    parts = {"module": module, "groups": {"readout": ("readout",)}, "reference": np.zeros(2), "prepare": prepared}
    return SimpleNamespace(**{**parts, "evaluate": evaluate, "trained": trained, **changed})


def tunable(opening: Callable[[], Any] = opened, **changed: Any) -> Any:
    return altered(tuning=lambda seed=None: opening(), with_elements=lambda like: TOY, **changed)


def scaled(name: str) -> Any:
    """Opened for training with one of energies, forces and virials a little off."""
    right = opened()

    def evaluate(batch: Sequence[Any], **asked: Any) -> Trial:
        said: Trial = right.evaluate(batch, **asked)
        number = getattr(said, name)
        return said if number is None else replace(said, **{name: 1.01 * number})

    return SimpleNamespace(**{**vars(right), "evaluate": evaluate})


def cut_off() -> Any:
    """Opened for training, with forces that are not differentiable in the parameters."""
    right = opened()

    def evaluate(batch: Sequence[Any], **asked: Any) -> Trial:
        said: Trial = right.evaluate(batch, **asked)
        assert said.forces is not None
        return replace(said, forces=said.forces.detach())

    return SimpleNamespace(**{**vars(right), "evaluate": evaluate})


def stuck() -> Any:
    """Opened for training, and what comes out has the old parameters."""
    return opened(trained=lambda reference, facts: altered(spec=replace(TOY.spec, level=facts.get("level", ""))))


def living() -> Any:
    """A potential that serves with the very parameters that are trained."""
    one = opened()

    def predict(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        own = np.tile(one.module.readout.detach().numpy(), (len(frames), 1))
        return TOY.predict(frames, own if readouts is None else readouts)

    return tunable(lambda: one, predict=predict)


# -- what is right ---------------------------------------------------------------------------------------------------------------------

test_the_toy = conformance.as_test(lambda: Subject.loaded(load))
test_the_toy_opened_for_training = conformance.as_test(lambda: Subject.of(tunable()))
test_the_toy_in_float32 = conformance.as_test(lambda: Subject.loaded(load, dtype="float32"))


def test_checks_that_do_not_apply_are_skipped_and_say_why() -> None:
    """Without a loader, or without a readout, the checks that need them neither pass nor fail."""
    spec = replace(TOY.spec, n_hidden=0, elements=(), cutoff=np.inf)
    zero = altered(spec=spec, predict=lambda fs, r=None: [Prediction(0.0, np.zeros((len(f), 3)), np.zeros((3, 3))) for f in fs])
    reasons = set()
    for check in CHECKS:
        try:
            check(Subject.of(zero))
        except unittest.SkipTest as skipped:
            reasons.add(str(skipped))

    told = {"no loader is given", "it has no readout to learn", "it knows all elements", "its cutoff is infinite"}
    assert reasons == told | {"its cutoff is zero or infinite"}
    with pytest.raises(unittest.SkipTest, match="its readout is all that can be trained"):
        CHECKS[-1](Subject.of(TOY))
    conformance.check_potential(zero)


def test_all_at_once_is_the_same_suite() -> None:
    """`check_potential` and `check_trainable` pass what is right, tell the first broken promise, and go by their old names as well."""
    conformance.check_potential(TOY, load=load)
    conformance.check_trainable(TOY, load=load)
    with pytest.raises(ConformanceError, match="a version holds its readout"):
        conformance.check_potential(TOY, load=forgetful)
    with pytest.raises(ConformanceError, match=r"a trainable potential has a readout: spec\.n_hidden is 0"):
        conformance.check_trainable(altered(spec=replace(TOY.spec, n_hidden=0)))
    assert testing.check_potential is conformance.check_potential
    assert testing.check_trainable is conformance.check_trainable


def test_the_frames_it_makes_are_sound() -> None:
    """For any elements: an atom, a pair, a cluster and a crystal, no two atoms near one another, all chosen elements in use."""
    for elements in ((), (1,), (8, 29), tuple(range(1, 95))):
        frames = conformance.sample_frames(elements)
        assert [len(frame) for frame in frames] == [1, 2, 7, 4]
        assert [frame.periodic for frame in frames] == [False, False, False, True]
        assert {int(z) for frame in frames for z in frame.numbers} <= set(elements or range(1, 119))
        for frame in frames[1:]:
            between = np.linalg.norm(frame.positions[:, None] - frame.positions, axis=-1)[np.triu_indices(len(frame), 1)]
            assert between.min() > 0.6


def test_every_check_has_a_promise_and_a_name() -> None:
    """The list of the documentation is made of them."""
    assert len({str(check) for check in CHECKS}) == len(CHECKS)
    assert all(check.promise.endswith(".") and "\n" not in check.promise for check in CHECKS)


# -- what is broken --------------------------------------------------------------------------------------------------------------------


def growing() -> Any:
    """A potential that adds to the energy with every call."""
    calls = [0]

    def predict(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        calls[0] += 1
        return [replace(said, energy=said.energy + 1e-3 * calls[0]) for said in TOY.predict(frames, readouts)]

    return altered(predict=predict)


def fragile(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
    if any(len(frame) > 1 and np.linalg.norm(frame.positions[1] - frame.positions[0]) < 1e-2 for frame in frames):
        raise FloatingPointError("division by zero")
    return TOY.predict(frames, readouts)


def ignorant(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
    """Takes every element that it does not know for hydrogen."""
    return TOY.predict([replace(frame, numbers=np.where(np.isin(frame.numbers, ELEMENTS), frame.numbers, 1)) for frame in frames], readouts)


def tongue_tied(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
    """Refuses an element with a number for a sentence."""
    known = dict.fromkeys(ELEMENTS, True)
    assert all(known[int(z)] for frame in frames for z in frame.numbers)
    return TOY.predict(frames, readouts)


def counted(frame: Frame, n: int, said: Prediction) -> Prediction:
    """A step in the energy for each pair that is nearer than the cutoff."""
    between = np.linalg.norm(frame.positions[:, None] - frame.positions, axis=-1)[np.triu_indices(len(frame), 1)]
    return replace(said, energy=said.energy + 1e-3 * int((between < TOY.spec.cutoff).sum()))


def deaf(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
    """Serves the whole batch with the readout of its first frame."""
    return TOY.predict(frames, readouts if readouts is None else np.tile(readouts[0], (len(frames), 1)))


def stubborn(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
    return TOY.predict(frames, np.tile(1.1 * WEIGHTS, (len(frames), 1)) if readouts is None else readouts)


def rows(**factors: float) -> Any:
    """The toy with parts of its linear model multiplied."""

    def force_rows(frame: Frame) -> ForceRows:
        right = TOY.force_rows(frame)
        return replace(right, **{name: factor * getattr(right, name) for name, factor in factors.items()})

    return altered(force_rows=force_rows)


def shared() -> Any:
    """A potential that hands out its own weights, not a copy."""
    weights = WEIGHTS.copy()

    def predict(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        return TOY.predict(frames, np.tile(weights, (len(frames), 1)) if readouts is None else readouts)

    return altered(predict=predict, readout=lambda: weights)


def forgetful(rest: str, device: str, dtype: str) -> Any:
    """Loads the first weights whatever file it is given."""
    return load("", device, dtype)


def coarse(rest: str, device: str, dtype: str) -> Any:
    made = load(rest, device, dtype)
    return (
        made
        if dtype == "float64"
        else altered(predict=lambda frames, readouts=None: [rounded(said, np.float16) for said in made.predict(frames)])
    )


def pickled(rest: str, device: str, dtype: str) -> Any:
    return pickle.loads(pickle.dumps(load(rest, device, dtype)))


def single_only(rest: str, device: str, dtype: str) -> Any:
    return load(rest, device, "float32")


def careless(rest: str, device: str, dtype: str) -> Any:
    """Has a tensor that is no readout and goes with it."""
    made = load(rest, device, dtype)
    return altered(made, state=lambda readout=None: {**made.state(readout), "sum": made.state(readout)["readout"].sum(keepdims=True)})


def crashing(rest: str, device: str, dtype: str) -> Any:
    raise KeyError("readout")


BROKEN: list[tuple[str, str, Callable[[], Any]]] = [
    ("it_declares_itself", "elements are atomic numbers in ascending order", lambda: altered(spec=replace(TOY.spec, elements=(8, 1)))),
    ("it_declares_itself", "dtype is float32 or float64", lambda: altered(spec=replace(TOY.spec, dtype="half"))),
    (
        "it_gives_a_sound_prediction_of_each_frame",
        "forces .* are float64",
        lambda: spoilt(lambda f, n, p: replace(p, forces=p.forces.astype("f4"))),
    ),
    ("it_gives_a_sound_prediction_of_each_frame", "are finite", lambda: spoilt(lambda f, n, p: replace(p, energy=float("nan")))),
    ("it_gives_a_sound_prediction_of_each_frame", "features come with", lambda: spoilt(lambda f, n, p: replace(p, features=None))),
    ("it_gives_a_sound_prediction_of_each_frame", "virial is symmetric", lambda: spoilt(lambda f, n, p: replace(p, virial=np.tri(3)))),
    ("it_gives_a_sound_prediction_of_each_frame", "each frame gets one", lambda: altered(predict=lambda fs, r=None: TOY.predict(fs[:-1]))),
    ("a_batch_says_what_its_frames_say_alone", "a batch says", lambda: spoilt(lambda f, n, p: replace(p, energy=p.energy + n))),
    ("earlier_calls_change_nothing", "earlier calls change nothing", growing),
    ("an_unknown_element_is_refused", r"He \(2\) got an answer", lambda: altered(predict=ignorant)),
    ("an_unknown_element_is_refused", r"He \(2\) it says '2'", lambda: altered(predict=tongue_tied)),
    ("strange_geometries_do_not_raise", "0 Å apart gave FloatingPointError: division by zero", lambda: altered(predict=fragile)),
    ("float32_follows_float64", "float32 follows float64", lambda: Subject.loaded(coarse)),
    ("float32_follows_float64", "it computes in float64", lambda: Subject.loaded(single_only)),
    ("forces_are_the_slope_of_the_energy", "forces are -dE/dR", lambda: spoilt(lambda f, n, p: replace(p, forces=1.001 * p.forces))),
    ("the_virial_is_the_slope_along_strain", "the virial is -dE/dstrain", lambda: spoilt(lambda f, n, p: replace(p, virial=-p.virial))),
    (
        "a_translation_changes_nothing",
        "translation",
        lambda: spoilt(lambda f, n, p: replace(p, energy=p.energy + 1e-6 * f.positions.sum())),
    ),
    ("a_rotation_turns_forces_and_virial", "rotation", lambda: spoilt(lambda f, n, p: replace(p, forces=p.forces * [1, 1, 1.01]))),
    ("the_order_of_the_atoms_does_not_matter", "order", lambda: spoilt(lambda f, n, p: replace(p, forces=p.forces[::-1]))),
    ("the_net_force_is_zero", "the net force is zero", lambda: spoilt(lambda f, n, p: replace(p, forces=p.forces + 1e-5))),
    ("an_atom_alone_feels_nothing", "feels no force", lambda: spoilt(lambda f, n, p: replace(p, forces=p.forces + (len(f) == 1)))),
    (
        "an_atom_alone_feels_nothing",
        "finite energy",
        lambda: spoilt(lambda f, n, p: replace(p, energy=p.energy / (1 if len(f) > 1 else np.nan))),
    ),
    ("a_wide_box_changes_nothing", "a wide box", lambda: spoilt(lambda f, n, p: replace(p, energy=p.energy + 1e-6 * f.periodic))),
    ("wrapping_changes_nothing", "wrapping", lambda: shown(lambda f: replace(f, periodic=False))),
    ("a_supercell_is_its_cells", "a supercell is its cells", lambda: shown(lambda f: replace(f, periodic=False))),
    ("energies_of_what_is_far_apart_add_up", "far apart", lambda: spoilt(lambda f, n, p: replace(p, energy=p.energy + 1e-6 * len(f) ** 2))),
    ("nothing_jumps_at_the_cutoff", "the energy does not jump", lambda: spoilt(counted)),
    ("the_readout_is_what_serves", "without a readout", lambda: altered(predict=stubborn)),
    ("the_readout_is_what_serves", "has n_columns weights", lambda: altered(readout=lambda: WEIGHTS[1:])),
    ("features_are_those_of_the_energy", "phi is the features", lambda: rows(phi=1.01)),
    ("features_and_readout_give_the_energy", "E = phi · w", lambda: rows(energy_fixed=1.1)),
    ("force_rows_give_the_forces", "F = rows @ w", lambda: rows(rows=1.001)),
    ("force_rows_give_the_forces", "F = rows @ w", lambda: rows(forces_fixed=0.0)),
    ("each_frame_is_served_by_its_own_readout", "each frame is served by its own readout", lambda: altered(predict=deaf)),
    (
        "the_state_is_plain_numbers",
        "the state is arrays",
        lambda: altered(state=lambda readout=None: {"readout": np.array([TOY], dtype=object)}),
    ),
    ("the_state_is_plain_numbers", "the state is not empty", lambda: altered(state=lambda readout=None: {})),
    ("the_state_is_plain_numbers", "the metadata are text", lambda: altered(metadata={"layers": 3})),
    ("the_state_is_a_copy", "state and readout are copies", shared),
    ("a_version_is_a_potential_by_itself", "a version holds its readout", lambda: Subject.loaded(forgetful)),
    ("a_version_is_a_potential_by_itself", "changes no other tensor", lambda: Subject.loaded(careless)),
    ("a_version_is_a_potential_by_itself", "raised KeyError: 'readout'", lambda: replace(Subject.loaded(load), load=crashing)),
    ("a_version_unpickles_nothing", "a version unpickles nothing: .*ToyTrainable", lambda: Subject.loaded(pickled)),
    ("every_parameter_is_in_one_group", "every parameter is in one group", lambda: tunable(lambda: opened(groups={"readout": ()}))),
    ("every_parameter_is_in_one_group", "the readout is a group", lambda: tunable(lambda: opened(groups={"all": ("readout",)}))),
    ("training_sees_what_serves", "sees what serves .energy", lambda: tunable(lambda: opened(reference=np.ones(2)))),
    ("training_sees_what_serves", "sees what serves .forces", lambda: tunable(lambda: scaled("forces"))),
    ("training_sees_what_serves", "sees what serves .virial", lambda: tunable(lambda: scaled("virials"))),
    ("a_loss_has_its_gradient", "the gradient of a loss is its slope", lambda: tunable(cut_off)),
    ("training_touches_nothing_that_serves", "touches nothing that serves", living),
    ("training_touches_nothing_that_serves", "facts go along", lambda: tunable(lambda: opened(trained=lambda reference, facts: TOY))),
    ("training_touches_nothing_that_serves", "trained parameters serve", lambda: tunable(stuck)),
]


@pytest.mark.parametrize(("name", "sentence", "make"), BROKEN, ids=[f"{name}-{k}" for k, (name, _, _) in enumerate(BROKEN)])
def test_a_broken_promise_is_told(name: str, sentence: str, make: Callable[[], Any]) -> None:
    """The check of a promise raises the sentence that names it when a potential breaks that one."""
    made = make()
    subject = made if isinstance(made, Subject) else Subject.of(made)

    with pytest.raises(ConformanceError, match=sentence):
        next(check for check in CHECKS if str(check) == name)(subject)


def test_every_check_was_seen_to_fail() -> None:
    """No check is there that nothing can break."""
    assert {name for name, _, _ in BROKEN} == {str(check) for check in CHECKS}
