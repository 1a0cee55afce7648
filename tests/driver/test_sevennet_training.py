"""SevenNet opened for training: the numbers of training are those that are served, its parts by name, and the way through a file."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tumbaga.driver.backends import registry
from tumbaga.driver.backends.painn import DATA
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.structures import read_frame
from tumbaga.online.ports import Tunable
from tumbaga.online.records import Frame, Label, LabelledFrame
from tumbaga.online.training import finish
from tumbaga.online.training.loop import Sets, Training
from tumbaga.online.training.settings import Settings

SINGLE = 1e-4  # eV and eV/Å: float32 inside the network


@pytest.fixture(scope="module")
def one() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sevenn")
        return registry.load("sevennet:7net-0?elements=Cu,Au,O,H", "cpu")


def cluster(seed: int) -> Frame:
    frame = read_frame(DATA / "cuau-water.xyz")
    return replace(frame, positions=frame.positions + np.random.default_rng(seed).normal(0.0, 0.08, frame.positions.shape))


FRAMES = [
    cluster(1),
    Frame(np.array([29]), np.zeros((1, 3))),
    Frame(np.array([29, 79]), np.array([[0.0, 0, 0], [1.2, 1.9, 1.7]]), 4.0 * np.eye(3), True),
]


def test_training_sees_what_is_served(one: Any) -> None:
    """Energies with the references added, forces and virials of a batch are those of predict: clusters, an atom alone, a cell."""
    tuning = one.tuning()
    said = tuning.evaluate([tuning.prepare(given) for given in FRAMES], virials=True)
    served = one.predict(FRAMES)

    assert isinstance(one, Tunable)
    for k, given in enumerate(FRAMES):
        reference = sum(tuning.reference[one.spec.elements.index(z)] for z in given.numbers.tolist())
        assert float(said.energies[k].detach()) + reference == pytest.approx(served[k].energy, abs=SINGLE)
        np.testing.assert_allclose(said.virials[k].detach().numpy(), served[k].virial, atol=10 * SINGLE)
    np.testing.assert_allclose(said.forces.detach().numpy(), np.concatenate([p.forces for p in served]), atol=SINGLE)


def test_looking_keeps_no_graph(one: Any) -> None:
    """Without create_graph nothing is differentiable, virials as little as forces; with it all are."""
    tuning = one.tuning()
    for graph in (False, True):
        said = tuning.evaluate([tuning.prepare(FRAMES[2])], virials=True, create_graph=graph)
        assert [what.requires_grad for what in (said.energies, said.forces, said.virials)] == [graph] * 3


def test_every_parameter_is_in_one_group(one: Any) -> None:
    """Groups cover all parameters once; what is a constant of the model asks for no gradient."""
    tuning = one.tuning()
    named = [name for names in tuning.groups.values() for name in names]
    still = [name for name, value in tuning.module.named_parameters() if not value.requires_grad]

    assert sorted(named) == sorted(name for name, _ in tuning.module.named_parameters())
    assert set(tuning.groups) == {"embedding", *(f"interactions.{k}" for k in range(5)), "head", "readout"}
    assert len(still) == 6
    assert all(name.endswith(("denominator", "coeffs")) for name in still)


@pytest.mark.slow
def test_it_learns_and_goes_through_a_file(one: Any, tmp_path: Path) -> None:
    """A few steps lower the error of their labels; the file is loaded by name, says the same, and knows the scale of its features."""
    frames = [cluster(k) for k in (3, 4)]
    # a level of theory with forces 1.2 times as large
    data = [LabelledFrame(f, Label(1.2 * p.energy, 1.2 * p.forces, "stiff", 0.0)) for f, p in zip(frames, one.predict(frames), strict=True)]
    settings = Settings(epochs=6, rate=1e-3, warmup=2, frozen=("embedding", "interactions.0"), average=0.0)
    outcome = Training(one, Sets(data), settings, tmp_path).run()
    new = finish.completed(outcome.potential, outcome.reference, frames[:1], {"level": "stiff"})
    finish.write(tmp_path / "new.safetensors", new)
    loaded = registry.load(f"sevennet:{tmp_path}/new.safetensors", "cpu")
    before, after = one.tuning().module.state_dict(), new.tuning().module.state_dict()

    assert outcome.history[-1]["train_force_rmse"] < 0.7 * outcome.history[0]["train_force_rmse"]
    np.testing.assert_allclose(loaded.predict(frames)[0].forces, new.predict(frames)[0].forces, atol=SINGLE)
    assert loaded.spec.level == "stiff"
    assert loaded.spec.mean_h2 == pytest.approx(json.loads(new.metadata["facts"])["mean_h2"])
    for name, value in before.items():
        frozen = name.startswith(("network.onehot", "network.0_")) or name.endswith(("denominator", "coeffs"))
        if frozen:
            assert torch.equal(value, after[name]), name


def test_without_named_elements_it_is_not_trained() -> None:
    """A model that serves only says how to name its elements, and that none need be mapped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sevenn")
        serving: Any = registry.load("sevennet:7net-0", "cpu")
    with pytest.raises(PotentialError, match="elements=Cu,Au,O,H"):
        serving.tuning()
    with pytest.raises(PotentialError, match="instead of mapping"):
        serving.with_elements({79: 29})


@pytest.mark.slow
def test_from_scratch_it_has_new_weights(one: Any) -> None:
    """A seed gives weights of the same shape that are not the model's, and the same ones again."""
    own, first, again = (one.tuning(seed).module.state_dict() for seed in (None, 2, 2))
    name = "network.1_self_interaction_1.linear.weight"

    assert {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in first.items()}
    assert torch.equal(first[name], again[name])
    assert not torch.allclose(first[name], own[name])


def test_from_scratch_its_numbers_are_finite(one: Any) -> None:
    """New weights give energies and forces to train from: what is no weight is the model's, such as the mean number of neighbours."""
    tuning = one.tuning(3)
    trial = tuning.evaluate([tuning.prepare(frame) for frame in FRAMES], create_graph=False)

    assert trial.forces is not None
    assert torch.isfinite(trial.energies).all()
    assert torch.isfinite(trial.forces).all()
    assert float(trial.forces.abs().max()) > 0.0
