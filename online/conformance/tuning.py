"""Checks of a potential all of whose weights can be trained: that training sees what serves, and touches nothing that does. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from tumbaga.online.conformance.subject import Subject, agree, demand, near
from tumbaga.online.ports import Tunable
from tumbaga.online.records import Frame, Prediction

_STEP = 1e-4  # of the largest parameter, for the finite difference of a loss
_SLOPES = {"float64": 1e-4, "float32": 5e-2}  # a loss against its finite difference, of the whole


def every_parameter_is_in_one_group(subject: Subject) -> None:
    """The groups name all parameters of the module, each once, and the readout is a group: what is not frozen is known."""
    tuning = _tunable(subject).tuning()
    named = [name for group in tuning.groups.values() for name in group]
    own = [name for name, _ in tuning.module.named_parameters()]
    demand("every parameter is in one group", sorted(named) == sorted(own), f"parameters {sorted(own)}, in groups {sorted(named)}")
    demand("the readout is a group", "readout" in tuning.groups, f"there are {', '.join(tuning.groups)}")
    demand("groups name parts of the potential", "reference" not in tuning.groups, "reference energies are no part of the module")


def training_sees_what_serves(subject: Subject) -> None:
    """Energies plus reference energies, forces and virials of a batch under training are those of a prediction."""
    model, frames = _tunable(subject), subject.frames
    tuning = model.tuning()
    said = tuning.evaluate([tuning.prepare(frame) for frame in frames], virials=True, create_graph=False)
    energies, forces, virials = (_numpy(one) for one in (said.energies, said.forces, said.virials))
    starts = np.cumsum([0] + [len(frame) for frame in frames])
    for k, (frame, expected) in enumerate(zip(frames, model.predict(frames), strict=True)):
        energy = float(energies[k] + sum(tuning.reference[model.spec.elements.index(int(z))] for z in frame.numbers))
        trial = Prediction(energy, forces[starts[k] : starts[k + 1]], virials[k])
        agree("training sees what serves", trial, expected, subject.tolerances.same)


def a_loss_has_its_gradient(subject: Subject) -> None:
    """The gradient of a loss of energies and forces in the parameters is its slope, by a finite difference along it."""
    model = _tunable(subject)
    tuning = model.tuning()
    prepared = [tuning.prepare(frame) for frame in subject.frames]
    parameters = [value for _, value in tuning.module.named_parameters()]

    def loss(graph: bool) -> Any:
        said = tuning.evaluate(prepared, create_graph=graph)
        assert said.forces is not None
        return sum((one**2).sum() for one in (said.energies, said.forces))

    loss(True).backward()
    given = [value for value in parameters if value.grad is not None]
    gradients = [value.grad.detach().clone() for value in given]
    steepness = float(sum(float((one**2).sum()) for one in gradients)) ** 0.5
    demand("a loss has a gradient", np.isfinite(steepness) and steepness > 0, f"its norm is {steepness}")
    h = _STEP * max(float(value.detach().abs().max()) for value in parameters)
    sides = []
    for sign in (1, -2):
        for value, gradient in zip(given, gradients, strict=True):
            value.data += sign * h / steepness * gradient
        sides.append(float(loss(False).detach()))
    slope = (sides[0] - sides[1]) / (2 * h)
    near("the gradient of a loss is its slope", slope / steepness, 1.0, _SLOPES[model.spec.dtype], 0.0)


def training_touches_nothing_that_serves(subject: Subject) -> None:
    """Untrained it is the same potential; parameters that change later change neither that one nor the first; facts go along."""
    model = _tunable(subject)
    before, tuning = model.predict(subject.frames), model.tuning()
    level = f"{model.spec.level} and the suite"
    same = tuning.trained(tuning.reference, {"level": level})
    demand("facts go along with training", same.spec.level == level, f"spec.level is {same.spec.level!r}, given was {level!r}")
    for value in tuning.module.parameters():
        value.data *= 1.5
    other = tuning.trained(tuning.reference + 1.0, {})
    for one, two, three, frame in zip(before, same.predict(subject.frames), model.predict(subject.frames), subject.frames, strict=True):
        agree("untrained it is the same potential", two, one, subject.tolerances.same)
        agree("training touches nothing that serves", three, one, subject.tolerances.same)
        _moved(frame, one, other.predict([frame])[0])


def _moved(frame: Frame, before: Prediction, after: Prediction) -> None:
    if len(frame) > 1:
        told = "the forces of a cluster are as before"
        demand("trained parameters serve", not np.allclose(after.forces, before.forces, rtol=1e-6, atol=0.0), told)


def _tunable(subject: Subject) -> Tunable:
    assert isinstance(subject.potential, Tunable)
    return subject.potential


def _numpy(tensor: Any) -> Any:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float64)
