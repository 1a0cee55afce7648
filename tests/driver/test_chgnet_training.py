"""CHGNet opened for training: its parts by name, new weights, files, and elements made of others. What all potentials promise, the suite asks."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tumbaga.driver.backends import registry
from tumbaga.driver.backends.painn import DATA
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.structures import read_frame
from tumbaga.online.ports import Tunable
from tumbaga.online.records import Frame

NAME = "chgnet:0.3.0?elements=Cu,Au,O,H"
WATER = read_frame(DATA / "cuau-water.xyz")
CELL = np.array([[3.9, 0.0, 0.0], [0.2, 3.8, 0.0], [0.0, -0.1, 4.1]])
CRYSTAL = Frame(np.array([29, 79]), np.array([[0.1, 0.0, 0.0], [1.9, 2.0, 2.1]]), CELL, periodic=True)
FAR = Frame(np.array([29, 79]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 3.7]]))  # a pair, no angle
ALONE = Frame(np.array([8]), np.zeros((1, 3)))
FRAMES = [FAR, WATER, ALONE, CRYSTAL]
EXACT = 1e-9


@pytest.fixture(scope="module")
def package() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("chgnet.model")


@pytest.fixture(scope="module")
def double(package: None) -> Any:
    return registry.load(NAME, "cpu", "float64")


@pytest.mark.parametrize("name", [NAME, "chgnet:0.2.0?elements=Cu,Au,O,H"])
def test_training_sees_what_is_served(package: None, name: str) -> None:
    """Energies, forces and virials of a batch are those of predict; 0.2.0 has biases that act only on frames with angles."""
    model: Any = registry.load(name, "cpu", "float64")
    assert isinstance(model, Tunable)
    for frames in (FRAMES, [FAR, ALONE], [ALONE]):
        tuning = model.tuning()
        said, start = tuning.evaluate([tuning.prepare(frame) for frame in frames], virials=True, create_graph=False), 0
        for k, (frame, served) in enumerate(zip(frames, model.predict(frames), strict=True)):
            reference = sum(tuning.reference[model.spec.elements.index(z)] for z in frame.numbers.tolist())
            assert float(said.energies[k]) == pytest.approx(served.energy - reference, abs=EXACT)
            np.testing.assert_allclose(said.forces[start : start + len(frame)], served.forces, atol=EXACT)
            np.testing.assert_allclose(said.virials[k], served.virial, atol=EXACT)
            start += len(frame)


def test_forces_can_be_differentiated_in_every_parameter(double: Any) -> None:
    """The slope of a sum of squared forces is that of finite differences, for one number of each parameter that has one."""
    tuning, rng = double.tuning(), np.random.default_rng(0)
    prepared = [tuning.prepare(frame) for frame in (WATER, CRYSTAL)]

    def value(graph: bool) -> Any:
        return (tuning.evaluate(prepared, create_graph=graph).forces ** 2).sum()

    torch.autograd.backward(value(True))
    checked = 0
    for name, parameter in tuning.module.named_parameters():
        if parameter.grad is None or not parameter.grad.any():
            continue
        place = tuple(np.argwhere(parameter.grad.numpy())[rng.integers(int((parameter.grad != 0).sum()))])
        found, h, kept = float(parameter.grad[place]), 1e-5, float(parameter.detach()[place])
        sides = []
        for shift in (h, -h):
            with torch.no_grad():
                parameter[place] = kept + shift
            sides.append(float(value(False)))
        with torch.no_grad():
            parameter[place] = kept
        assert found == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-3, abs=1e-3), name
        checked += 1
    assert checked > 100


def test_parts_have_the_names_of_all_potentials(double: Any) -> None:
    """Embedding, four layers, head and readout hold all parameters once; the angles of a layer are the layer's own."""
    tuning = double.tuning()
    named = [name for names in tuning.groups.values() for name in names]

    assert sorted(named) == sorted(name for name, _ in tuning.module.named_parameters())
    assert set(tuning.groups) == {"embedding", *(f"interactions.{k}" for k in range(4)), "head", "readout"}
    assert "network.angle_layers.1.twoBody_bond.bn1.weight" in tuning.groups["interactions.1"]
    assert tuning.groups["readout"] == ("readout",)


def test_a_trained_potential_goes_through_a_file(double: Any, tmp_path: Path) -> None:
    """What was changed is in the file that is loaded by name, facts among it; the potential that was opened is as before."""
    before, tuning = double.predict(FRAMES), double.tuning()
    with torch.no_grad():
        tuning.module.readout[0] += 0.1
        tuning.module.network.mlp.layers[0].weight *= 1.01
    new = tuning.trained(tuning.reference + 1.0, {"mean_h2": 4.0, "level": "mine", "epochs": 3})
    save_file(dict(new.state()), tmp_path / "new.safetensors", dict(new.metadata))
    loaded = registry.load(f"chgnet:{tmp_path}/new.safetensors", "cpu", "float64")

    assert (loaded.spec.mean_h2, loaded.spec.level, loaded.spec.licence) == (4.0, "mine", double.spec.licence)
    assert isinstance(loaded, Tunable)
    assert loaded.metadata == new.metadata
    for one, other, old, again in zip(loaded.predict(FRAMES), new.predict(FRAMES), before, double.predict(FRAMES), strict=True):
        assert one.energy == other.energy != old.energy
        np.testing.assert_array_equal(one.forces, other.forces)
        np.testing.assert_array_equal(again.forces, old.forces)


def test_new_weights_are_those_of_the_seed(double: Any) -> None:
    """A seed makes the same untrained network each time, another seed another, and the process's own random numbers stay."""
    state = torch.random.get_rng_state()
    first, again, other = (double.tuning(seed) for seed in (5, 5, 6))

    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.reference.any()
    for (name, one), (_, two) in zip(first.module.named_parameters(), again.module.named_parameters(), strict=True):
        assert torch.equal(one, two), name
    rows = [tuning.module.network.atom_embedding.embedding.weight for tuning in (first, other, double.tuning())]
    assert (rows[0] - rows[1]).abs().max() > 0.1
    assert (rows[0] - rows[2]).abs().max() > 0.1


def test_a_new_element_starts_as_the_old_one(double: Any) -> None:
    """Platinum made of gold: a frame with platinum in the place of gold has the energy and the forces that it had; others stay."""
    more = double.with_elements({78: 79})
    platinum = Frame(np.where(CRYSTAL.numbers == 79, 78, CRYSTAL.numbers), CRYSTAL.positions, CRYSTAL.cell, periodic=True)
    (own,), (made,), (water,) = more.predict([platinum]), double.predict([CRYSTAL]), more.predict([WATER])

    assert more.spec.elements == (1, 8, 29, 78, 79)
    assert own.energy == made.energy
    np.testing.assert_array_equal(own.forces, made.forces)
    np.testing.assert_array_equal(water.forces, double.predict([WATER])[0].forces)
    assert double.spec.elements == (1, 8, 29, 79)


def test_elements_may_change_places(double: Any) -> None:
    """A map is read at once, not one line after the other: copper and gold exchanged in model and frame are as before."""
    swapped = Frame(CRYSTAL.numbers[::-1], CRYSTAL.positions, CRYSTAL.cell, periodic=True)
    (one,), (other,) = double.with_elements({29: 79, 79: 29}).predict([swapped]), double.predict([CRYSTAL])

    assert one.energy == pytest.approx(other.energy, abs=EXACT)
    np.testing.assert_allclose(one.forces, other.forces, atol=EXACT)


def test_what_cannot_be_trained_says_why(double: Any) -> None:
    """Without named elements, from an unknown one, or beyond the rows of the network."""
    serving: Any = registry.load("chgnet:0.3.0", "cpu")
    with pytest.raises(PotentialError, match="is trained for named elements; write for example chgnet"):
        serving.tuning()
    with pytest.raises(PotentialError, match="name those that are to change"):
        serving.with_elements({32: 14})
    with pytest.raises(PotentialError, match="cannot start Ge from Si, which it does not know; it knows H, O, Cu, Au"):
        double.with_elements({32: 14})
    with pytest.raises(PotentialError, match="cannot start Am from Au: it has rows up to Pu only"):
        double.with_elements({95: 79})
