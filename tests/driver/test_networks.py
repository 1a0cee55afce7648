"""Versions behind different networks beside each other: what fine-tunes bring. On the embedded potential and changed copies of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import units
from ase.data import atomic_masses

from tumbaga.driver.backends import painn, registry
from tumbaga.driver.backends.painn import PaiNN
from tumbaga.driver.slot import Answer, Slot
from tumbaga.online import versions
from tumbaga.online.errors import VersionError
from tumbaga.online.ramp import Mix, RampState, swap_work, weight_step
from tumbaga.online.records import Frame
from tumbaga.online.versions import LastLayer, VersionFile

TIGHT = 1e-9  # eV, eV/Å
ATOMS = (29, 79, 8, 1, 1)


def frame(seed: int) -> Frame:
    places = np.array([[0.0, 0.0, 0.0], [2.4, 0.0, 0.0], [-1.9, 0.6, 0.0], [-2.5, 0.0, 0.7], [-2.4, 1.3, -0.3]])
    return Frame(np.array(ATOMS), places + 0.05 * np.random.default_rng(seed).standard_normal(places.shape))


@pytest.fixture(scope="module")
def base() -> PaiNN:
    loaded = registry.load("painn:cuau-water", "cpu", "float64")
    assert isinstance(loaded, PaiNN)
    return loaded


def tuned(base: PaiNN, seed: int) -> PaiNN:
    """The same with other weights everywhere, as a fine-tune leaves it."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: one * (1.0 + 0.02 * rng.standard_normal(one.shape)) if np.issubdtype(one.dtype, np.floating) else one
        for name, one in base.state().items()
    }
    return PaiNN("painn:tuned", tensors, base.metadata, "cpu", "float64")


def written(folder: Path, number: int, potential: PaiNN, origin: PaiNN | None) -> VersionFile:
    layer = LastLayer(potential.readout(), np.eye(potential.spec.n_columns) * 1e-4 * number)
    name = versions.fingerprint(origin.state(), origin.readout()) if origin is not None else ""
    return versions.write(folder, number, potential.state(), layer, potential.metadata, name)


def opened(path: Path) -> PaiNN:
    return painn.load(str(path), dtype="float64")


def near(answer: Answer, energy: float, forces: np.ndarray, virial: np.ndarray) -> None:
    assert answer.prediction.energy == pytest.approx(energy, abs=TIGHT)
    np.testing.assert_allclose(answer.prediction.forces, forces, atol=TIGHT)
    np.testing.assert_allclose(answer.prediction.virial, virial, atol=TIGHT)


@pytest.mark.parametrize("members", [0, 4])
def test_a_frame_between_two_networks_gets_the_weighted_sum_of_both(base: PaiNN, tmp_path: Path, members: int) -> None:
    """Each frame of a batch has its own two networks, and energy, forces, virial, step and committee are theirs in these parts."""
    slot = Slot(base, opened)
    others = [tuned(base, 1), tuned(base, 2)]
    for number, one in enumerate(others, start=1):
        slot.load(number, tmp_path / written(tmp_path, number, one, base).path, (1, 2))
    models = {0: base, 1: others[0], 2: others[1]}
    mixes = [(0, 1, 0.25), (1, 2, 0.7), (2, 2, 1.0), (0, 0, 1.0), (1, 1, 1.0)]
    frames = [frame(seed) for seed in range(len(mixes))]
    answers = slot.answer(frames, mixes, members)

    for one, (old, new, weight), answer in zip(frames, mixes, answers, strict=True):
        (before,), (after,) = models[old].predict([one]), models[new].predict([one])
        energy, forces, virial = (
            (1 - weight) * getattr(before, name) + weight * getattr(after, name) for name in ("energy", "forces", "virial")
        )
        near(answer, energy, forces, virial)
        assert answer.step == pytest.approx(after.energy - before.energy, abs=TIGHT)
        if answer.members is not None:
            np.testing.assert_allclose(answer.members.energies.mean(), energy, atol=1e-8)
            np.testing.assert_allclose(answer.members.forces.mean(axis=0), forces, atol=1e-8)
        assert (answer.members is not None) == bool(members)
    assert not np.allclose(answers[2].prediction.forces, base.predict([frames[2]])[0].forces, atol=1e-4)


def test_scores_between_two_networks_are_those_of_the_new_one(base: PaiNN, tmp_path: Path) -> None:
    """Uncertainty belongs to the features it was learnt on."""
    slot = Slot(base, opened)
    slot.load(1, tmp_path / written(tmp_path, 1, tuned(base, 1), base).path, ())
    alone, between = slot.answer([frame(0), frame(0)], [(1, 1, 1.0), (0, 1, 0.5)])

    np.testing.assert_allclose(between.lpr, alone.lpr, rtol=1e-12)


def test_a_network_is_let_go_with_its_last_version(base: PaiNN, tmp_path: Path) -> None:
    """A run of weeks sees many fine-tunes: what no version needs is not kept, and what one needs stays."""
    slot = Slot(base, opened)
    for number in range(1, 5):
        slot.load(number, tmp_path / written(tmp_path, number, tuned(base, number), base).path, (number - 1,))
        assert slot.held == tuple(sorted({0, number - 1, number}))
        assert len(slot.networks) == len({0, number - 1, number})
    with pytest.raises(KeyError):
        slot.answer([frame(0)], [(2, 2, 1.0)])


def test_a_network_of_another_beginning_is_refused(base: PaiNN, tmp_path: Path) -> None:
    """A version counts as a fine-tune only of the weights with which its run began."""
    slot = Slot(base, opened)
    for number, origin in ((1, None), (2, tuned(base, 9))):
        with pytest.raises(VersionError, match=r"learnt behind other weights than those of painn:cuau-water"):
            slot.load(number, tmp_path / written(tmp_path, number, tuned(base, 1), origin).path, ())
    assert slot.held == (0,)


def test_a_network_that_is_not_sound_is_refused_and_the_old_goes_on(base: PaiNN, tmp_path: Path) -> None:
    """NaN weights, a network that does not match its name, and a process that cannot load networks: a sentence, and nothing has changed."""
    slot = Slot(base, opened)
    before = slot.answer([frame(0)], [(0, 0, 1.0)])[0].prediction
    broken = tuned(base, 1)
    tensors = {
        key: np.full_like(one, np.nan) if key.startswith("layers.0") or "embed" in key else one for key, one in broken.state().items()
    }
    layer = LastLayer(broken.readout(), np.eye(broken.spec.n_columns))
    origin = versions.fingerprint(base.state(), base.readout())
    bad = versions.write(tmp_path, 1, tensors, layer, broken.metadata, origin)
    with pytest.raises(VersionError, match="not finite"):
        slot.load(1, tmp_path / bad.path, ())
    good = tmp_path / written(tmp_path, 2, tuned(base, 2), base).path
    with pytest.raises(VersionError, match="another network than the one that it names"):
        Slot(base, lambda path: tuned(base, 3)).load(2, good, ())
    with pytest.raises(VersionError, match="cannot be loaded beside"):
        Slot(base).load(2, good, ())
    assert slot.held == (0,)
    assert slot.answer([frame(0)], [(0, 0, 1.0)])[0].prediction.energy == before.energy


def test_readouts_learnt_behind_a_fine_tune_share_its_network(base: PaiNN, tmp_path: Path) -> None:
    """A last-layer update of a fine-tuned version loads no second copy, and a ramp between the two costs one evaluation."""
    slot = Slot(base, opened)
    one = tuned(base, 1)
    slot.load(1, tmp_path / written(tmp_path, 1, one, base).path, ())
    origin = versions.fingerprint(base.state(), base.readout())
    readout = one.readout() * 1.01
    layer = LastLayer(readout, np.eye(readout.size) * 1e-4)
    slot.load(2, tmp_path / versions.write(tmp_path, 2, one.state(readout), layer, one.metadata, origin).path, (1,))
    (answer,) = slot.answer([frame(0)], [(1, 2, 0.5)])
    (wanted,) = one.predict([frame(0)], 0.5 * (one.readout() + readout)[None])

    near(answer, wanted.energy, wanted.forces, wanted.virial)
    assert len(slot.networks) == 2


def test_other_elements_are_another_potential(base: PaiNN, tmp_path: Path) -> None:
    """A file of the right shape for other elements is refused before its network is looked at."""
    slot = Slot(base, opened)
    file = written(tmp_path, 1, tuned(base, 1), base)
    layer = versions.read(tmp_path / file.path)
    other = {**layer.metadata, "hyper": layer.metadata["hyper"].replace("79", "78")}
    again = versions.write(tmp_path, 2, tuned(base, 1).state(), replace(layer, metadata={}), other)
    with pytest.raises(VersionError, match="is of another potential: its hyper"):
        slot.load(2, tmp_path / again.path, ())


@pytest.mark.parametrize("steps", [1, 100])
def test_the_work_of_a_swap_between_networks_balances_the_energy(base: PaiNN, tmp_path: Path, steps: int) -> None:
    """Constant energy through a swap to another network, hard or over a ramp: less the work that was told, it drifts no more than without."""
    slot = Slot(base, opened)
    slot.load(1, tmp_path / written(tmp_path, 1, tuned(base, 1), base).path, ())
    state = RampState(0, n=steps)
    before, swapped = ledger(slot, RampState(0), 300), ledger(slot, state.publish(1), 300)

    spread = np.ptp(swapped[:, 0] - swapped[:, 1])
    assert spread < 1.5 * np.ptp(before[:, 0]) + 1e-5
    assert abs(swapped[-1, 1]) > 20.0 * spread  # there was something to balance


def ledger(slot: Slot, state: RampState, steps: int) -> np.ndarray:
    """Total energy and work told so far after each step of velocity Verlet from one start, eV, shape (steps, 2); 0.25 fs."""
    one = frame(5)
    step, masses = 0.25 * units.fs, atomic_masses[one.numbers][:, None]
    velocities = np.random.default_rng(0).standard_normal(one.positions.shape) * np.sqrt(300 * units.kB / masses)
    forces, last, work, found = None, None, 0.0, []
    for _ in range(steps):
        if forces is not None:
            velocities = velocities + 0.5 * step * forces / masses
            one = Frame(one.numbers, one.positions + step * velocities)
        state, mix = state.advance()
        (answer,) = slot.answer([one], [mix])
        work += swap_work(weight_step(last or Mix(mix.old, mix.old, 1.0), mix), answer.step, 0.0)
        last, forces = mix, answer.prediction.forces
        if found:
            velocities = velocities + 0.5 * step * forces / masses
        found.append((answer.prediction.energy + 0.5 * float((masses * velocities**2).sum()), work))
    return np.array(found)
