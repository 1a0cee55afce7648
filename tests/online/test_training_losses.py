"""The losses of a training by hand: from the energies and forces that the potential serves, and by finite differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from tumbaga.driver.backends import painn_training
from tumbaga.driver.backends.painn import ARCHITECTURE, PaiNN
from tumbaga.driver.backends.painn_net import Hyper
from tumbaga.online.ports import Trial
from tumbaga.online.records import Array, Frame, LabelledFrame
from tumbaga.online.testing import label_from
from tumbaga.online.training.dataset import Sample, Targets, samples, targets
from tumbaga.online.training.losses import Sums, consistency, supervised
from tumbaga.online.training.settings import Settings

ELEMENTS = (1, 8)
SETTINGS = Settings(epochs=1, huber=0.0)
SEED = (4, 17)


@pytest.fixture(scope="module")
def one() -> PaiNN:
    hyper = Hyper(ELEMENTS, cutoff=3.5, channels=8, layers=2, n_radial=6, n_hidden=4)
    metadata = {"architecture": ARCHITECTURE, "hyper": json.dumps(asdict(hyper)), "facts": "{}"}
    return PaiNN("painn:tiny", painn_training.fresh(hyper, 0), metadata, dtype="float64")


@pytest.fixture(scope="module")
def batch(one: PaiNN) -> list[Sample]:
    rng = np.random.default_rng(1)
    grid = 1.5 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    frames = [Frame(rng.choice(ELEMENTS, n), grid[:n] + 0.2 * rng.standard_normal((n, 3))) for n in (3, 5)]
    return samples(one.tuning(), ELEMENTS, [LabelledFrame(each, label_from(one, each)) for each in frames], np.zeros(2))


def displacements(batch: list[Sample], size: float) -> list[list[Array]]:
    """What the losses draw: first for all frames, then second."""
    rng = np.random.default_rng(list(SEED))
    return [[rng.uniform(-size, size, (len(sample.frame), 3)) for sample in batch] for _ in range(2)]


def moved(frame: Frame, by: Array) -> Frame:
    return replace(frame, positions=frame.positions + by)


def by_hand(one: PaiNN, batch: list[Sample], settings: Settings) -> float:
    """The two losses from what predict says, frame by frame."""
    first, second = displacements(batch, settings.work_step)
    total = 0.0
    for sample, to, via in zip(batch, first, second, strict=True):
        here, there, between = one.predict([sample.frame, moved(sample.frame, to), moved(sample.frame, via)])
        total += settings.pitc * (there.energy - (here.energy - (here.forces * to).sum())) ** 2
        total += settings.pisc * (there.energy - (between.energy - (between.forces * (to - via)).sum())) ** 2
    return total / len(batch)


@pytest.mark.parametrize(("pitc", "pisc"), [(1.2, 0.0), (0.0, 0.7), (1.2, 0.7)])
def test_work_losses_are_those_of_the_formula(one: PaiNN, batch: list[Sample], pitc: float, pisc: float) -> None:
    """PITC and PISC equal their formulas written out with served energies and forces, summed per frame."""
    settings = replace(SETTINGS, pitc=pitc, pisc=pisc, work_step=0.2)
    tuning = one.tuning()
    said = tuning.evaluate([sample.prepared for sample in batch])
    loss = consistency(tuning, batch, said, settings, SEED)

    expected = by_hand(one, batch, settings)
    assert expected > 1e-10
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_work_losses_fall_with_the_fourth_power(one: PaiNN, batch: list[Sample]) -> None:
    """Forces are the slope of the energy, so the residual is of second order: a tenth of the displacement gives a ten-thousandth of the loss."""
    tuning = one.tuning()
    said = tuning.evaluate([sample.prepared for sample in batch])
    wide, narrow = (float(consistency(tuning, batch, said, replace(SETTINGS, pitc=1.0, work_step=s), SEED).detach()) for s in (0.02, 0.002))

    assert narrow / wide == pytest.approx(1e-4, rel=0.2)


@pytest.mark.parametrize("terms", [{"pitc": 1.0}, {"pisc": 1.0}])
def test_work_losses_have_the_right_slope(one: PaiNN, batch: list[Sample], terms: dict[str, float]) -> None:
    """The slope in a parameter is that of finite differences, through forces as well as energies."""
    settings, tuning = replace(SETTINGS, work_step=0.3, **terms), one.tuning()

    def value() -> torch.Tensor:
        return consistency(tuning, batch, tuning.evaluate([sample.prepared for sample in batch]), settings, SEED)

    _check_slope(tuning.module.readout, value)


@pytest.mark.parametrize("huber", [0.0, 0.05])
def test_the_supervised_loss_has_the_right_slope(one: PaiNN, batch: list[Sample], huber: float) -> None:
    """The slope of the loss in a parameter, forces included, is that of finite differences."""
    settings, tuning = replace(SETTINGS, huber=huber), one.tuning()
    off = [replace(sample, energy=sample.energy + 0.3, forces=sample.forces + 0.2) for sample in batch]

    def value() -> torch.Tensor:
        return supervised(tuning.evaluate([sample.prepared for sample in off]), targets(off, tuning.module.readout), settings)

    _check_slope(tuning.module.readout, value)


def _check_slope(parameter: torch.Tensor, value: Callable[[], torch.Tensor]) -> None:
    (found,) = torch.autograd.grad(value(), parameter)
    sides, h = [], 1e-4
    for sign in (1, -1):
        with torch.no_grad():
            parameter[1, 2] += sign * h
        sides.append(float(value().detach()))
        with torch.no_grad():
            parameter[1, 2] -= sign * h
    assert abs(float(found[1, 2])) > 1e-9
    assert float(found[1, 2]) == pytest.approx((sides[0] - sides[1]) / (2 * h), rel=1e-4)


def two_frames(weights: tuple[float, float] = (1.0, 1.0)) -> tuple[Trial, Targets]:
    """Frames of 1 and 2 atoms with round errors: energies 0.3 and -0.8 eV, force components 0.1 on the first, 0.2 on the others."""

    def floats(value: object) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64)

    forces = floats([[0.1] * 3, [0.2] * 3, [0.2] * 3])
    virials = torch.stack([0.5 * torch.ones(3, 3).double(), 4.0 * torch.ones(3, 3).double()])
    wanted = Targets(
        energies=floats([0.0, 0.0]),
        forces=torch.zeros(3, 3).double(),
        virials=torch.zeros(2, 3, 3).double(),
        with_virial=floats([0.0, 1.0]),
        atoms=floats([1.0, 2.0]),
        weights=floats(weights),
        frame_of=torch.tensor([0, 1, 1]),
    )
    return Trial(floats([0.3, -0.8]), forces, virials), wanted


@pytest.mark.parametrize(
    ("changes", "weights", "expected"),
    [
        ({"energy_weight": 0.0, "virial_weight": 0.0}, (1.0, 1.0), (0.01 + 2 * 0.04) / 3),
        ({"energy_weight": 0.0, "virial_weight": 0.0}, (1.0, 0.5), (0.01 + 2 * 0.5 * 0.04) / 3),
        ({"force_weight": 0.0, "energy_weight": 2.0, "virial_weight": 0.0}, (1.0, 1.0), 2.0 * (0.3**2 + 0.4**2) / 2),
        ({"force_weight": 0.0, "energy_weight": 2.0, "virial_weight": 0.0}, (0.0, 1.0), 2.0 * 0.4**2 / 2),
        ({"force_weight": 0.0, "energy_weight": 1e-12, "virial_weight": 3.0}, (1.0, 1.0), 3.0 * 4.0),
        # beyond 0.1 Huber's loss, twice, is 0.1 (2 e - 0.1)
        ({"energy_weight": 0.0, "virial_weight": 0.0, "huber": 0.1}, (1.0, 1.0), (0.01 + 2 * 0.1 * 0.3) / 3),
    ],
)
def test_the_supervised_loss_is_as_described(changes: dict[str, float], weights: tuple[float, float], expected: float) -> None:
    """Means over components of forces, energies per atom and virials per atom, by frame weight, virials only where there are any."""
    said, wanted = two_frames(weights)

    assert float(supervised(said, wanted, replace(SETTINGS, **changes))) == pytest.approx(expected, abs=1e-9)


def test_errors_are_added_up_over_batches() -> None:
    """The figures of an epoch are those of all its frames together."""
    sums, (said, wanted) = Sums(), two_frames()
    sums.add(2.0, said, wanted)
    sums.add(4.0, said, wanted)

    found = sums.means()
    assert found["loss"] == 3.0
    assert found["force_rmse"] == pytest.approx(np.sqrt((0.01 + 2 * 0.04) / 3))
    assert found["energy_rmse"] == pytest.approx(np.sqrt((0.09 + 0.16) / 2))
