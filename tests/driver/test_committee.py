"""The committee in the extras: one mean with what is served, members that are potentials, and the spread of the posterior."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import units
from tumbaga.driver.answers import extras
from tumbaga.driver.backends import registry
from tumbaga.driver.backends.toy import LennardJones
from tumbaga.driver.errors import ConfigError, PotentialError
from tumbaga.driver.evaluator import Evaluator
from tumbaga.driver.pool import Job, Pool
from tumbaga.driver.slot import BASE, Answer, Mix, Slot
from tumbaga.driver.structures import read_frame
from tumbaga.online import ramp, versions
from tumbaga.online.records import Array, Frame, Members, Prediction
from tumbaga.online.testing import ToyTrainable
from tumbaga.online.uncertainty import force_std
from tumbaga.online.versions import LastLayer
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.extras import check_extras

SERVED = (BASE, BASE, 1.0)
ROUNDING = 1e-13  # relative: the mean of numbers that were shifted to have that mean
STEP = 1e-4  # Å, or strain
TEMPLATE = Path(configs.__file__).parent / "data" / "cuau-water.xyz"
KEYS = {"committee_pot", "committee_force", "committee_virial"}


class Toy(ToyTrainable):
    """Remembers which readouts it was asked for, and how many atoms at once."""

    def predict(self, frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        self.__dict__.setdefault("asked", []).append((sum(map(len, frames)), readouts))
        return super().predict(frames, readouts)


def weights(seed: int) -> Array:
    drawn: Array = np.random.default_rng(seed).standard_normal(16)
    return drawn


def spread(seed: int) -> Array:
    root = np.random.default_rng(seed).standard_normal((16, 16))
    covariance: Array = 0.01 * root @ root.T
    return covariance


@pytest.fixture
def toy() -> Toy:
    return Toy(elements=(1, 8), weights=weights(0), n_gaussians=4)


@pytest.fixture
def slot(toy: Toy, tmp_path: Path) -> Slot:
    """Version 0 under its prior, and versions 1 and 2 with posteriors of their own."""
    made = Slot(toy)
    for number in (1, 2):
        layer = LastLayer(weights(number), spread(number))
        made.load(number, tmp_path / versions.write(tmp_path, number, {"readout": weights(number)}, layer, {}).path, (1,))
    return made


def water(seed: int = 0, waters: int = 1) -> Frame:
    rng = np.random.default_rng(seed)
    places = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])
    positions = np.concatenate([places + 2.9 * k * np.eye(3)[0] for k in range(waters)])
    return Frame(np.array([8, 1, 1] * waters), positions + 0.1 * rng.standard_normal(positions.shape))


def ice() -> Frame:
    return replace(water(3, 2), cell=np.array([[5.8, 0.0, 0.0], [0.4, 4.1, 0.0], [-0.3, 0.5, 4.4]]), periodic=True)


def said(slot: Slot, frame: Frame, mix: Mix = SERVED, members: int = 4) -> Answer:
    return slot.answer([frame], [mix], members)[0]


def committee(answer: Answer) -> Members:
    assert answer.members is not None
    return answer.members


def told(answer: Answer, mix: Mix = SERVED) -> Members:
    """What an engine reads in the extras, in our units."""
    text = extras("0-base", ramp.Mix(*mix), 0.1, 0, 0.0, (committee(answer), answer.prediction))
    check_extras(text)
    found = json.loads(text)
    pot, force, virial = (np.array(found[f"committee_{what}"]) for what in ("pot", "force", "virial"))
    return Members(pot * units.HARTREE, units.forces_from_wire(force), units.virial_from_wire(virial))


def packaged(dtype: str = "float32") -> Slot:
    return Slot(registry.load("painn:cuau-water", "cpu", dtype))


def check_mean(members: Members, served: Prediction) -> None:
    for numbers, expected in (
        (members.energies, np.array(served.energy)),
        (members.forces, served.forces),
        (members.virials, served.virial),
    ):
        scale = np.abs(numbers).max()
        np.testing.assert_allclose(numbers.mean(axis=0), expected, rtol=0, atol=ROUNDING * scale)


@pytest.mark.parametrize("mix", [SERVED, (1, 1, 1.0), (0, 1, 0.3), (1, 2, 0.999)])
@pytest.mark.parametrize("frame", [water(), ice()], ids=["cluster", "crystal"])
def test_the_mean_is_what_is_served(slot: Slot, frame: Frame, mix: Mix) -> None:
    """Energy, forces and virial that i-PI moves atoms by are those of a run without a committee, to a rounding; in a ramp too."""
    answer = said(slot, frame, mix)
    alone = slot.answer([frame], [mix])[0]

    assert answer.prediction.energy == alone.prediction.energy
    np.testing.assert_array_equal(answer.prediction.forces, alone.prediction.forces)
    check_mean(told(answer, mix), answer.prediction)
    assert committee(answer).energies.std() > 0.0


def test_the_mean_is_what_is_served_in_single_precision() -> None:
    """The members of the packaged potential, which computes in float32, are shifted by its rounding only, and then agree to the last digit."""
    answer = said(packaged(), read_frame(TEMPLATE), members=8)
    raw = committee(answer)

    assert abs(raw.energies.mean() - answer.prediction.energy) < 1e-4
    assert np.abs(raw.forces.mean(axis=0) - answer.prediction.forces).max() < 1e-4
    check_mean(told(answer), answer.prediction)


@pytest.mark.parametrize("frame", [water(), ice()], ids=["cluster", "crystal"])
def test_a_member_is_a_conservative_potential(slot: Slot, frame: Frame) -> None:
    """The forces and the virial of each member are derivatives of its own energy, in a ramp too."""
    mix = (1, 2, 0.4)
    members = told(said(slot, frame, mix), mix)

    def slope(plus: Frame, minus: Frame) -> Array:
        high, low = (told(said(slot, one, mix), mix).energies for one in (plus, minus))
        found: Array = (high - low) / (2 * STEP)
        return found

    for atom, axis in ((0, 0), (1, 1), (2, 2)):
        push = np.zeros_like(frame.positions)
        push[atom, axis] = STEP
        moved = [replace(frame, positions=frame.positions + sign * push) for sign in (1, -1)]
        np.testing.assert_allclose(-slope(*moved), members.forces[:, atom, axis], atol=1e-5)
    for axis, other in ((0, 0), (0, 1), (2, 1)):
        strain = np.zeros((3, 3))
        strain[axis, other] += 0.5 * STEP
        strain[other, axis] += 0.5 * STEP
        strained = [
            replace(frame, positions=frame.positions @ (np.eye(3) + sign * strain), cell=frame.cell @ (np.eye(3) + sign * strain))
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(-slope(*strained), members.virials[:, axis, other], atol=1e-5)


def test_members_are_the_same_potentials_from_call_to_call_and_after_a_restart(slot: Slot, toy: Toy, tmp_path: Path) -> None:
    """Asked again, in another batch, or of an evaluator that read the same files, each member says the same."""
    first = committee(said(slot, water(), (1, 1, 1.0)))
    again = Slot(toy)
    again.load(1, next(tmp_path.rglob("*1-*.safetensors")), ())

    batch = slot.answer([water(5, 2), water()], [(2, 2, 1.0), (1, 1, 1.0)], 4)
    for other in (committee(batch[1]), committee(said(again, water(), (1, 1, 1.0)))):
        np.testing.assert_array_equal(other.energies, first.energies)
        np.testing.assert_array_equal(other.forces, first.forces)


@pytest.mark.parametrize("version", [0, 1])
def test_the_variance_over_the_members_is_that_of_the_posterior(slot: Slot, toy: Toy, version: int) -> None:
    """With many members the variances (ddof 1) of the energy and of each force approach the exact ones of the force rows."""
    many, frame = 1000, water(1, 2)
    members = committee(said(slot, frame, (version, version, 1.0), many))
    model, covariance = toy.force_rows(frame), slot.covariance(version)
    within = 5 * np.sqrt(2 / (many - 1))  # five standard errors of a variance

    assert members.energies.var(ddof=1) == pytest.approx(model.phi @ covariance @ model.phi, rel=within)
    forces = members.forces.var(axis=0, ddof=1).sum(axis=1)
    np.testing.assert_allclose(forces, force_std(model.rows, covariance) ** 2, rtol=within)


def test_the_variance_over_few_members_is_not_too_small(slot: Slot, toy: Toy) -> None:
    """Taking the sum out of the deviations costs no variance on average: K - 1 of K squares are left, and ddof 1 divides by as many."""
    whitened = []
    for members in range(2, 12):
        said(slot, water(), SERVED, members)
        readouts = toy.__dict__["asked"][-1][1]
        np.testing.assert_allclose(readouts.mean(axis=0), weights(0), atol=1e-12)
        whitened.append(readouts.var(axis=0, ddof=1) / slot.covariance(BASE).diagonal())
    # 10 committees of 16 weights; a variance of K members has a variance of 2 / (K - 1)
    error = np.sqrt(sum(2 / (members - 1) for members in range(2, 12)) / 16) / 10
    assert np.mean(whitened) == pytest.approx(1.0, abs=4 * error)


def test_the_packaged_potential_spreads_as_its_posterior_says() -> None:
    """64 members of the packaged potential, in float32: the forces' spread is the exact one within the error of 64 samples."""
    slot, frame, many = packaged(), read_frame(TEMPLATE), 64
    potential = registry.load("painn:cuau-water", "cpu", "float32")
    members = committee(said(slot, frame, members=many))
    exact = force_std(potential.force_rows(frame).rows, slot.covariance(BASE))  # type: ignore[attr-defined]

    ratio = np.sqrt(members.forces.var(axis=0, ddof=1).sum(axis=1)) / exact
    assert np.abs(ratio - 1).max() < 4 / np.sqrt(2 * (many - 1))
    assert abs(ratio.mean() - 1) < 0.1


def test_members_move_with_a_ramp(slot: Slot) -> None:
    """A member of the old version becomes that of the new one evenly: no force call sees a step, so the spread has none either."""
    old, new = (committee(said(slot, water(), (number, number, 1.0))) for number in (1, 2))
    for weight in (0.0, 0.25, 1.0):
        mixed = committee(said(slot, water(), (1, 2, weight)))
        np.testing.assert_allclose(mixed.energies, (1 - weight) * old.energies + weight * new.energies, atol=1e-11)
        np.testing.assert_allclose(mixed.forces, (1 - weight) * old.forces + weight * new.forces, atol=1e-11)


def test_a_small_change_of_the_posterior_is_a_small_change_of_the_members(slot: Slot, tmp_path: Path) -> None:
    """Directions of equal variance have no order, and the members do not depend on one: a prior changed by 1e-9 has the same members."""
    noise = np.random.default_rng(8).standard_normal((16, 16))
    nearly = slot.covariance(BASE) * (np.eye(16) + 1e-9 * (noise + noise.T))
    slot.load(3, tmp_path / versions.write(tmp_path, 3, {"readout": weights(0)}, LastLayer(weights(0), nearly), {}).path, ())
    before, after = committee(said(slot, water())), committee(said(slot, water(), (3, 3, 1.0)))

    np.testing.assert_allclose(after.energies, before.energies, atol=1e-6)


def test_a_version_that_is_loaded_anew_has_new_members(slot: Slot, tmp_path: Path) -> None:
    """Members are drawn once a version, and again when its file is another one."""
    before = committee(said(slot, water(), (1, 1, 1.0)))
    layer = LastLayer(weights(1), 4 * spread(1))
    slot.load(1, tmp_path / versions.write(tmp_path, 1, {"readout": weights(1)}, layer, {}).path, ())
    after = committee(said(slot, water(), (1, 1, 1.0)))

    assert after.energies.std() == pytest.approx(2 * before.energies.std(), rel=1e-6)


def test_many_members_are_evaluated_in_pieces(slot: Slot, toy: Toy) -> None:
    """What is evaluated at once has a bound in atoms, and each answer gets its own members all the same."""
    frames = [water(k, 1 + 3 * k) for k in range(3)]
    together = slot.answer(frames, [SERVED] * 3, 200)

    sizes = [atoms for atoms, _ in toy.__dict__["asked"][1:]]
    assert max(sizes) <= 2048
    assert sum(sizes) == 200 * sum(map(len, frames))
    for frame, answer in zip(frames, together, strict=True):
        assert committee(answer).forces.shape == (200, len(frame), 3)
        np.testing.assert_array_equal(committee(answer).energies, committee(said(slot, frame, members=200)).energies)


@pytest.mark.parametrize("all_of_it", [False, True])
def test_a_member_that_is_not_finite_is_refused(toy: Toy, all_of_it: bool) -> None:
    """i-PI hangs on a committee with holes: the frame is refused instead, and a prediction that is broken itself is left to the guards."""

    def broken(frames: Sequence[Frame], readouts: Array | None = None) -> list[Prediction]:
        right = ToyTrainable.predict(toy, frames, readouts)
        served = len(frames) == 1  # the members of one frame come together
        return right if served and not all_of_it else [*right[:-1], replace(right[-1], energy=float("nan"))]

    slot = Slot(toy_with(broken))
    if all_of_it:
        assert not said(slot, water()).prediction.finite
    else:
        with pytest.raises(PotentialError, match="committee"):
            said(slot, water())


def toy_with(predict: object) -> ToyTrainable:
    made = ToyTrainable(elements=(1, 8), weights=weights(0), n_gaussians=4)
    object.__setattr__(made, "predict", predict)
    return made


def test_there_is_no_committee_without_the_option(slot: Slot) -> None:
    """No key of it, no cost of it."""
    answer = slot.answer([water()], [SERVED])[0]

    assert answer.members is None
    assert not KEYS & set(json.loads(extras("0-base", ramp.Mix(*SERVED), 0.1, 0, 0.0)))


def test_one_member_is_refused() -> None:
    """A spread takes two; so does a number below zero fail."""
    with pytest.raises(ConfigError, match=r"^serve.committee: is 1; a committee has at least 2 members, 0 is for none$"):
        configs.parse("serve.committee = 1", "t")
    with pytest.raises(ConfigError, match=r"^serve.committee: is -2"):
        configs.parse("serve.committee = -2", "t")
    assert configs.parse("serve.committee = 2", "t").serve.committee == 2


def test_a_potential_without_a_readout_has_no_committee(slot: Slot) -> None:
    """Lennard-Jones is told off by name at the start; a potential with a readout is not."""
    slot.need_committee(4)
    with pytest.raises(ConfigError, match=r"^serve.committee: is 4, but toy:lj.* has no linear readout"):
        Slot(LennardJones()).need_committee(4)


class Wire:
    """Both ends of the line between a gateway and its evaluator."""

    def __init__(self) -> None:
        self.queue: list[tuple[bus.AnyMessage, list[bytes]]] = []

    def send(self, message: bus.AnyMessage, buffers: Sequence[np.ndarray] = (), to: str = "") -> bool:
        self.queue.append((message, [np.ascontiguousarray(one).tobytes() for one in buffers]))
        return True

    def receive(self) -> list[tuple[bus.AnyMessage, list[bytes]]]:
        taken, self.queue = self.queue, []
        return taken


def test_each_frame_of_a_batch_gets_its_own_committee(slot: Slot) -> None:
    """Frames of several sizes and versions, through the pool and the evaluator: every outcome has the members of its own frame."""
    wire = Wire()
    evaluator, pool = Evaluator(slot, wire, "e", None), Pool(wire, lambda: 0.0, members=3)  # type: ignore[arg-type]
    evaluator.announce()
    ((ready, _),) = wire.receive()
    assert isinstance(ready, bus.EvaluatorReady)
    pool.ready("e", ready)
    frames, mixes = [water(0), water(1, 3), ice(), water(2)], [SERVED, (1, 1, 1.0), (0, 2, 0.5), (1, 1, 1.0)]
    for index, (frame, mix) in enumerate(zip(frames, mixes, strict=True)):
        pool.add(Job("s", 0, frame, mix, index=index))
    pool.dispatch()
    evaluator.turn()
    ((message, buffers),) = wire.receive()
    assert isinstance(message, bus.Evaluated)

    outcomes = pool.done("e", message, buffers)
    assert [outcome.job.index for outcome in outcomes] == [0, 1, 2, 3]
    for outcome, frame, mix in zip(outcomes, frames, mixes, strict=True):
        expected = committee(said(slot, frame, mix, 3))
        assert outcome.members is not None
        np.testing.assert_array_equal(outcome.members.energies, expected.energies)
        np.testing.assert_array_equal(outcome.members.forces, expected.forces)
        np.testing.assert_array_equal(outcome.members.virials, expected.virials)
