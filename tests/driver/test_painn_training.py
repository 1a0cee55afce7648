"""The embedded potential opened for training: the same numbers as when it serves, its parts by name, files, and elements made of others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from tumbaga.driver.backends import painn_training
from tumbaga.driver.backends.painn import ARCHITECTURE, PaiNN, load
from tumbaga.driver.backends.painn_net import Hyper
from tumbaga.driver.errors import PotentialError
from tumbaga.online.ports import Tunable
from tumbaga.online.records import Array, Frame

ELEMENTS = (1, 8, 29)
HYPER = Hyper(ELEMENTS, cutoff=4.0, channels=8, layers=3, n_radial=6, n_hidden=4)
EXACT = 1e-9  # float64 sums in another order
CELL = np.array([[6.0, 0.0, 0.0], [1.0, 6.5, 0.0], [-0.5, 0.8, 7.0]])


def potential(seed: int = 0, dtype: str = "float64") -> PaiNN:
    tensors = painn_training.fresh(HYPER, seed) | {"reference": np.array([-10.0, -100.0, -110.0])}
    metadata = {"architecture": ARCHITECTURE, "hyper": json.dumps(asdict(HYPER)), "facts": json.dumps({"level": "none", "mean_h2": 2.5})}
    return PaiNN("painn:test", tensors, metadata, dtype=dtype)


def frame(n_atoms: int, seed: int, periodic: bool = False) -> Frame:
    """Random atoms, some so close that the core acts."""
    rng = np.random.default_rng(seed)
    cell = CELL if periodic else np.zeros((3, 3))
    return Frame(rng.choice(ELEMENTS, n_atoms), rng.uniform(-2.2, 2.2, (n_atoms, 3)), cell, periodic)


FRAMES = [frame(7, 1), frame(1, 2), frame(9, 3, periodic=True), frame(4, 4)]


def offset(one: PaiNN, given: Frame) -> float:
    reference: Array = one.state()["reference"]
    return float(sum(reference[ELEMENTS.index(z)] for z in given.numbers.tolist()))


def test_training_sees_what_is_served() -> None:
    """Energies less the references, forces and virials of a batch are those of predict, free atoms, cells and the core included."""
    one = potential()
    tuning = one.tuning()
    said = tuning.evaluate([tuning.prepare(given) for given in FRAMES], virials=True)
    served = one.predict(FRAMES)

    assert isinstance(one, Tunable)
    for k, given in enumerate(FRAMES):
        assert float(said.energies[k].detach()) == pytest.approx(served[k].energy - offset(one, given), abs=1e-8)
        np.testing.assert_allclose(said.virials[k].detach().numpy(), served[k].virial, atol=EXACT * (1 + np.abs(served[k].virial).max()))
    forces = np.concatenate([p.forces for p in served])
    np.testing.assert_allclose(said.forces.detach().numpy(), forces, atol=EXACT * np.abs(forces).max())


def test_a_free_atom_alone_can_be_trained_on() -> None:
    """A batch without a single pair has zero forces and a virial of zero."""
    tuning = potential().tuning()
    said = tuning.evaluate([tuning.prepare(FRAMES[1])], virials=True)

    assert said.forces.abs().max() == 0
    assert said.virials.abs().max() == 0
    torch.autograd.backward(said.energies.sum() + said.forces.sum())


def test_looking_keeps_no_graph() -> None:
    """Without create_graph nothing is differentiable, and the numbers are the same; energies alone need no slopes."""
    tuning = potential().tuning()
    prepared = [tuning.prepare(given) for given in FRAMES]
    looked, trained = (tuning.evaluate(prepared, virials=True, create_graph=graph) for graph in (False, True))
    bare = tuning.evaluate(prepared, forces=False)

    assert not any(one.requires_grad for one in (looked.energies, looked.forces, looked.virials))
    assert all(one.requires_grad for one in (trained.energies, trained.forces, trained.virials, bare.energies))
    assert bare.forces is None
    torch.testing.assert_close(looked.virials, trained.virials.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(looked.forces, trained.forces.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(bare.energies, trained.energies, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_forces_can_be_differentiated_in_every_parameter() -> None:
    """The slope of a sum of squared forces is that of finite differences, for one number of each parameter."""
    tuning = potential().tuning()
    prepared = [tuning.prepare(given) for given in (FRAMES[0], FRAMES[2])]
    rng = np.random.default_rng(0)

    def value() -> torch.Tensor:
        forces = tuning.evaluate(prepared).forces
        return (forces * forces).sum() / (forces.detach() ** 2).sum()

    def numerator() -> float:
        forces = tuning.evaluate(prepared, create_graph=False).forces
        return float((forces * forces).sum())

    torch.autograd.backward(value())
    scale = numerator()
    for name, parameter in tuning.module.named_parameters():
        place = tuple(int(rng.integers(n)) for n in parameter.shape)
        found, h, kept = float(parameter.grad[place]), 1e-5, float(parameter.detach()[place])
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] = kept + sign * h
            sides.append(numerator())
        with torch.no_grad():
            parameter[place] = kept
        assert found == pytest.approx((sides[0] - sides[1]) / (2 * h * scale), rel=1e-3, abs=1e-7), name


def test_every_parameter_is_in_one_group() -> None:
    """Groups cover all parameters once, a layer's filters are the layer's own, and all layers have a group."""
    tuning = potential().tuning()
    named = [name for names in tuning.groups.values() for name in names]

    assert sorted(named) == sorted(name for name, _ in tuning.module.named_parameters())
    assert list(tuning.groups) == ["embedding", "interactions.0", "interactions.1", "interactions.2", "head", "readout"]
    assert "filters.1" in tuning.groups["interactions.1"]


def test_untrained_it_comes_back_as_it_was() -> None:
    """Opened and closed without training, all tensors are the same to the bit; facts are replaced by name, and the hyper string stays."""
    one = potential()
    back = one.tuning().trained(one.state()["reference"], {"mean_h2": 4.0, "epochs": 3})

    for key, value in one.state().items():
        np.testing.assert_array_equal(back.state()[key], value)
    assert (back.spec.mean_h2, back.spec.level) == (4.0, "none")
    assert json.loads(back.metadata["facts"])["epochs"] == 3
    assert back.metadata["hyper"] == one.metadata["hyper"]


def test_a_trained_potential_goes_through_a_file(tmp_path: Path) -> None:
    """What was changed in training is in the file that is loaded by name, and the potential that was opened is as before."""
    one = potential()
    before = one.predict(FRAMES)[0]
    tuning = one.tuning()
    with torch.no_grad():
        tuning.module.readout += 0.1
        tuning.module.filters[1] *= 1.5
    new = tuning.trained(np.array([1.0, 2.0, 3.0]), {})
    save_file(new.state(), tmp_path / "new.safetensors", new.metadata)
    loaded = load(f"painn:{tmp_path}/new.safetensors", dtype="float64")

    assert loaded.predict(FRAMES)[0].energy == pytest.approx(new.predict(FRAMES)[0].energy, abs=1e-9)
    assert abs(new.predict(FRAMES)[0].energy - before.energy) > 1e-3
    np.testing.assert_array_equal(one.predict(FRAMES)[0].forces, before.forces)


def test_new_weights_are_those_of_the_seed() -> None:
    """A seed makes the same untrained network each time, another seed another, and the process's own random numbers stay."""
    state = torch.random.get_rng_state()
    first, again, other = (painn_training.fresh(HYPER, seed) for seed in (5, 5, 6))

    assert torch.equal(torch.random.get_rng_state(), state)
    opened = potential().tuning(5)

    for key, value in first.items():
        np.testing.assert_array_equal(value, again[key])
    assert np.abs(first["embedding"] - other["embedding"]).max() > 0.1
    np.testing.assert_array_equal(opened.module.tensors()["embedding"], first["embedding"])
    assert not opened.reference.any()


def test_a_new_element_starts_as_the_old_one() -> None:
    """Gold made of copper: a frame with gold in the place of copper has the forces it had, but for the core, whose nuclei differ."""
    one = potential()
    more = one.with_elements({79: 29})
    apart = Frame(np.array([8, 29, 29, 1]), np.array([[0.0, 0, 0], [2.6, 0.2, 0], [0.1, 2.9, 0.3], [-1.6, 0.1, 0.4]]))
    gold = Frame(np.where(apart.numbers == 29, 79, apart.numbers), apart.positions)

    assert more.spec.elements == (1, 8, 29, 79)
    np.testing.assert_allclose(more.predict([gold])[0].forces, one.predict([apart])[0].forces, atol=EXACT)
    assert more.predict([gold])[0].energy == pytest.approx(one.predict([apart])[0].energy, abs=1e-9)
    np.testing.assert_allclose(more.predict([FRAMES[0]])[0].forces, one.predict([FRAMES[0]])[0].forces, atol=EXACT)


def test_an_old_element_can_be_started_anew() -> None:
    """Mapping a known element replaces its row, block and reference, and leaves all others and the given tensors alone."""
    one = potential()
    given = one.state()
    before = {key: value.copy() for key, value in given.items()}
    hyper, made = painn_training.with_elements("painn:test", HYPER, given, {8: 29})

    assert hyper == HYPER
    np.testing.assert_array_equal(made["embedding"][1], given["embedding"][2])
    np.testing.assert_array_equal(made["embedding"][[0, 2]], given["embedding"][[0, 2]])
    np.testing.assert_array_equal(made["readout"].reshape(3, -1)[1], given["readout"].reshape(3, -1)[2])
    assert made["reference"].tolist() == [-10.0, -110.0, -110.0]
    for key, value in before.items():
        np.testing.assert_array_equal(given[key], value)


def test_elements_may_change_places() -> None:
    """A map is read at once, not one line after the other: two elements can be exchanged."""
    _, made = painn_training.with_elements("painn:test", HYPER, potential().state(), {8: 29, 29: 8})

    assert made["reference"].tolist() == [-10.0, -110.0, -100.0]


def test_nothing_starts_from_an_unknown_element() -> None:
    """An element to start from must be known; the sentence says which are."""
    with pytest.raises(PotentialError, match="cannot start Ge from Si, which it does not know; it knows H, O, Cu"):
        potential().with_elements({32: 14})
