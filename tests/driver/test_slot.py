"""Versions beside each other on the exact toy: mixes, steps, and files that must not serve."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver.backends.toy import LennardJones
from tumbaga.driver.slot import BASE, Slot
from tumbaga.online import versions
from tumbaga.online.errors import VersionError
from tumbaga.online.records import Array, Frame
from tumbaga.online.testing import ToyTrainable
from tumbaga.online.uncertainty import atom_lpr, species_index
from tumbaga.online.versions import LastLayer

TIGHT = 1e-11  # eV, eV/Å: sums in another order
ELEMENTS = (1, 8)


def weights(seed: int) -> Array:
    drawn: Array = np.random.default_rng(seed).standard_normal(8)
    return drawn


@pytest.fixture
def toy() -> ToyTrainable:
    return ToyTrainable(elements=ELEMENTS, weights=weights(0), n_gaussians=2)


@pytest.fixture
def slot(toy: ToyTrainable) -> Slot:
    return Slot(toy)


def frame(seed: int = 0, waters: int = 1) -> Frame:
    rng = np.random.default_rng(seed)
    places = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])
    positions = np.concatenate([places + 2.9 * k * np.eye(3)[0] for k in range(waters)])
    return Frame(np.array([8, 1, 1] * waters), positions + 0.1 * rng.standard_normal(positions.shape))


def file(folder: Path, number: int, readout: Array, covariance: Array | None = None) -> Path:
    layer = LastLayer(readout, np.eye(readout.size) * number if covariance is None else covariance)
    return folder / versions.write(folder, number, {"readout": readout}, layer, {}).path


def test_a_mix_is_the_weighted_sum_of_two_versions(slot: Slot, toy: ToyTrainable, tmp_path: Path) -> None:
    """Weight λ serves (1 - λ) E_old + λ E_new, the same for forces and virial, and the step is E_new - E_old; each frame its own."""
    slot.load(1, file(tmp_path, 1, weights(1)), ())
    slot.load(2, file(tmp_path, 2, weights(2)), (1, 2))
    frames = [frame(k, 1 + k) for k in range(4)]
    mixes = [(1, 2, 0.25), (0, 1, 0.0), (2, 0, 1.0), (2, 2, 1.0)]
    answers = slot.answer(frames, mixes)

    for one, (old, new, weight), answer in zip(frames, mixes, answers, strict=True):
        before, after = (toy.with_readout(weights(version)).predict([one])[0] for version in (old, new))
        assert answer.prediction.energy == pytest.approx((1 - weight) * before.energy + weight * after.energy, abs=TIGHT)
        np.testing.assert_allclose(answer.prediction.forces, (1 - weight) * before.forces + weight * after.forces, atol=TIGHT)
        np.testing.assert_allclose(answer.prediction.virial, (1 - weight) * before.virial + weight * after.virial, atol=TIGHT)
        assert answer.step == pytest.approx(after.energy - before.energy, abs=TIGHT)


def test_the_score_is_that_of_the_new_version(slot: Slot, toy: ToyTrainable, tmp_path: Path) -> None:
    """During a ramp the uncertainty of an atom is read from the covariance of the version that fades in."""
    root = np.random.default_rng(3).standard_normal((8, 8))
    slot.load(1, file(tmp_path, 1, weights(1), root @ root.T), ())
    one = frame()
    (answer,) = slot.answer([one], [(0, 1, 0.1)])
    features = toy.predict([one])[0].features
    blocks = np.stack([(root @ root.T)[start : start + 4, start : start + 4] for start in (0, 4)])

    assert features is not None
    np.testing.assert_allclose(answer.lpr, atom_lpr(features, species_index(one.numbers, ELEMENTS), blocks), rtol=1e-6)


def test_the_energy_is_as_sure_as_the_new_version_says(slot: Slot, toy: ToyTrainable, tmp_path: Path) -> None:
    """√(xᵀCx) of the summed features of each element and the atoms of each; not known of the base; of another width it is refused."""
    root = np.random.default_rng(4).standard_normal((10, 10))
    layer = LastLayer(weights(1), np.eye(8), energy_covariance=root @ root.T)
    slot.load(1, tmp_path / versions.write(tmp_path, 1, {"readout": weights(1)}, layer, {}).path, ())
    one = frame(waters=2)
    base, ramped = slot.answer([one, one], [(0, 0, 1.0), (0, 1, 0.1)])
    inputs = np.append(toy.force_rows(one).phi, [4.0, 2.0])

    assert math.isnan(base.energy_std)
    assert ramped.energy_std == pytest.approx(float(np.linalg.norm(inputs @ root)))
    wide = LastLayer(weights(2), np.eye(8), energy_covariance=np.eye(11))
    with pytest.raises(VersionError, match="another number of elements"):
        slot.load(2, tmp_path / versions.write(tmp_path, 2, {"readout": weights(2)}, wide, {}).path, ())
    assert slot.held == (0, 1)


def test_the_base_serves_before_any_version(slot: Slot, toy: ToyTrainable) -> None:
    """Version 0 is the potential's own readout, exactly, with a spread above zero on every atom and no step."""
    one = frame()
    (answer,) = slot.answer([one], [(BASE, BASE, 1.0)])

    assert slot.held == (BASE,)
    assert answer.prediction.energy == pytest.approx(toy.predict([one])[0].energy, abs=TIGHT)
    assert answer.step == 0.0
    assert (answer.lpr > 0).all()


def test_an_unknown_version_is_a_key_error(slot: Slot) -> None:
    """A mix with a version that is not held raises, for the old one as for the new one."""
    for mix in ((0, 7, 0.5), (7, 0, 0.5), (7, 7, 1.0)):
        with pytest.raises(KeyError):
            slot.answer([frame()], [mix])


def test_versions_that_are_not_kept_are_let_go(slot: Slot, tmp_path: Path) -> None:
    """Loading keeps the base, the new version and those named; the others are gone."""
    for number in (1, 2, 3):
        slot.load(number, file(tmp_path, number, weights(number)), (number - 1,))

    assert slot.held == (0, 2, 3)
    slot.load(4, file(tmp_path, 4, weights(4)), ())
    assert slot.held == (0, 4)
    np.testing.assert_array_equal(slot.covariance(4), 4.0 * np.eye(8))


@pytest.mark.parametrize("fault", ["missing", "truncated", "another size", "not finite"])
def test_a_version_that_must_not_serve_changes_nothing(slot: Slot, tmp_path: Path, fault: str) -> None:
    """A file that is refused leaves the versions that are held, and what they say, as they were."""
    slot.load(1, file(tmp_path, 1, weights(1)), ())
    before = slot.answer([frame()], [(0, 1, 0.5)])[0]
    bad = file(tmp_path, 2, np.full(8, np.nan) if fault == "not finite" else weights(2)[: 6 if fault == "another size" else 8])
    if fault == "missing":
        bad.unlink()
    elif fault == "truncated":
        bad.write_bytes(bad.read_bytes()[:-9])

    with pytest.raises(VersionError):
        slot.load(2, bad, ())
    assert slot.held == (0, 1)
    after = slot.answer([frame()], [(0, 1, 0.5)])[0]
    assert after.prediction.energy == before.prediction.energy
    np.testing.assert_array_equal(after.lpr, before.lpr)


def test_a_potential_without_a_readout_serves_itself_only(tmp_path: Path) -> None:
    """Lennard-Jones ignores mixes, has no step and no spread, and takes no version."""
    slot = Slot(LennardJones())
    (answer,) = slot.answer([frame()], [(3, 4, 0.5)])

    assert answer.prediction.energy == LennardJones().predict([frame()])[0].energy
    assert answer.step == 0.0
    assert np.isnan(answer.lpr).tolist() == [True] * 3
    assert slot.held == (BASE,)
    with pytest.raises(VersionError, match="has no linear readout"):
        slot.load(1, file(tmp_path, 1, weights(1)), ())


def test_a_readout_of_another_network_is_refused(tmp_path: Path) -> None:
    """What was learnt before a potential was trained further does not serve after it, though its shape fits; precision does not matter."""
    network = {"first": np.linspace(0.0, 1.0, 5, dtype=np.float32)}

    class Deep(ToyTrainable):
        def state(self, readout: Array | None = None) -> dict[str, np.ndarray]:
            return {"readout": self.readout() if readout is None else readout, **network}

    slot = Slot(Deep(elements=ELEMENTS, weights=weights(0), n_gaussians=2))
    layer = LastLayer(weights(1), np.eye(8))
    same = {"readout": weights(1), "first": network["first"].astype(np.float64)}
    other = {"readout": weights(1), "first": np.linspace(0.0, 2.0, 5, dtype=np.float32)}

    slot.load(1, tmp_path / versions.write(tmp_path, 1, same, layer, {}).path, ())
    with pytest.raises(VersionError, match=r"was learnt behind other weights than those of .*; begin a new run directory"):
        slot.load(2, tmp_path / versions.write(tmp_path, 2, other, layer, {}).path, (1,))
    assert slot.held == (0, 1)
