"""One fine-tune on a run directory made by hand: the embedded potential learns from a teacher like it, whose totals are 1e4 eV away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import finetuning, trainer
from tumbaga.driver.backends import registry
from tumbaga.driver.backends.painn import PaiNN
from tumbaga.driver.finetuning import Order
from tumbaga.online import versions
from tumbaga.online.errors import TrainingStoppedError
from tumbaga.online.ports import Potential
from tumbaga.online.records import Frame, Label, LabelledFrame, Reason, Role
from tumbaga.online.store import FILE, Store, StoredVersion
from tumbaga.online.versions import LastLayer

pytestmark = pytest.mark.slow
METHOD, TOTAL = "test:teacher", -1e4  # eV, of each atom
PLACES = np.array([[0.0, 0.0, 0.0], [2.4, 0.0, 0.0], [-1.9, 0.6, 0.0], [-2.5, 0.0, 0.7], [-2.4, 1.3, -0.3]])
SETTINGS = configs.changed(configs.Config(), ["learn.finetune_steps=120", "potential.dtype=float64"])


def frame(seed: int) -> Frame:
    return Frame(np.array([29, 79, 8, 1, 1]), PLACES + 0.08 * np.random.default_rng(seed).standard_normal(PLACES.shape))


@pytest.fixture(scope="module")
def base() -> PaiNN:
    loaded = registry.load("painn:cuau-water", "cpu", "float64")
    assert isinstance(loaded, PaiNN)
    return loaded


@pytest.fixture(scope="module")
def teacher(base: PaiNN) -> PaiNN:
    """Other weights everywhere, so that a readout alone cannot follow."""
    rng = np.random.default_rng(3)
    tensors = {key: one * (1.0 + 0.05 * rng.standard_normal(one.shape)) for key, one in base.state().items()}
    return PaiNN("painn:teacher", tensors, base.metadata, "cpu", "float64")


Make = Callable[..., tuple[Path, Order]]


@pytest.fixture
def made(tmp_path: Path, base: PaiNN, teacher: PaiNN) -> Make:
    """A run directory with version 0 and labels of the teacher, and the order of a fine-tune; `wrong` spoils labels to learn from."""

    def make(name: str = "run", train: int = 6, held_out: int = 3, wrong: float = 1.0) -> tuple[Path, Order]:
        run_dir = tmp_path / name
        run_dir.mkdir()
        layer = LastLayer(base.readout(), np.eye(base.spec.n_columns) * 1e-4)
        file = versions.write(run_dir, 0, base.state(), layer, base.metadata)
        ids: dict[Role, list[int]] = {role: [] for role in Role}
        with Store(run_dir / FILE) as store:
            store.add_version(StoredVersion(0, file.hash, None, file.path, "served", 0, {}))
            for k in range(train + held_out):
                role = Role.HOLDOUT if k >= train else Role.TRAIN
                one = frame(k)
                (said,), (served,) = teacher.predict([one]), base.predict([one])
                scale = wrong if role is Role.TRAIN else 1.0
                frame_id = store.add_flag(
                    one, session="s", step=k, reason=Reason.UNCERTAIN, score=0.2, version=0, energy=served.energy, forces=served.forces
                )
                store.enqueue(frame_id, Reason.UNCERTAIN, role, 0.2)
                task = store.start_task(frame_id, "label-0", 1)
                store.add_label(task, Label(said.energy + TOTAL * len(one), scale * said.forces, METHOD, 0.1))
            ids = {role: store.label_ids(METHOD, role) for role in Role}
        order = Order(1, 0, file.path, file.path, tuple(ids[Role.TRAIN]), tuple(ids[Role.HOLDOUT]), METHOD)
        finetuning.put_order(run_dir, order)
        return run_dir, order

    return make


def quiet(told: dict[str, Any]) -> None:
    del told


def error(potential: Potential, teacher: PaiNN, seeds: range) -> float:
    frames = [frame(seed) for seed in seeds]
    missed = [one.forces - two.forces for one, two in zip(potential.predict(frames), teacher.predict(frames), strict=True)]
    return float(np.sqrt(np.mean(np.square(missed))))


def test_a_fine_tune_passes_the_gate_and_is_better_where_it_was_not_taught(made: Make, base: PaiNN, teacher: PaiNN) -> None:
    """Errors fall on frames that nobody saw, the engine's energies keep their zero, and all of it stands in the result."""
    run_dir, order = made(train=20, held_out=5)
    told: list[dict[str, Any]] = []
    result = trainer.carry_out(run_dir, order, SETTINGS, told.append, lambda: False)

    assert result.passed, result.reason
    assert {check.name for check in result.checks} >= {"finite", "consistency", "audits", "replay", "short range", "shadow MD"}
    path = result.candidate(run_dir)
    assert path is not None
    tuned = registry.of_version(SETTINGS.potential.model, path, "cpu", "float64")
    assert error(tuned, teacher, range(100, 110)) < 0.8 * error(base, teacher, range(100, 110))
    frames = [frame(seed) for seed in range(20)]
    shift = np.mean([one.energy - two.energy for one, two in zip(tuned.predict(frames), base.predict(frames), strict=True)])
    assert abs(shift) < 1e-6
    assert result.metrics is not None
    assert result.metrics["holdout_rmse_after"] < result.metrics["holdout_rmse_before"]
    assert any(one["doing"] == "training" for one in told)
    assert any(one["doing"] == "shadow MD" for one in told)


def test_a_fine_tune_that_was_cut_short_ends_as_if_it_had_not_been(made: Make) -> None:
    """Told to stop after some epochs, then carried out by another process: the same candidate."""
    (cut, order), (whole, _) = made("cut"), made("whole")
    seen: list[dict[str, Any]] = []
    with pytest.raises(TrainingStoppedError):
        trainer.carry_out(cut, order, SETTINGS, seen.append, lambda: sum(one["doing"] == "training" for one in seen) >= 4)
    assert finetuning.open_order(cut) == order
    results = [trainer.carry_out(run_dir, order, SETTINGS, quiet, lambda: False) for run_dir in (cut, whole)]
    paths = [result.candidate(run_dir) for result, run_dir in zip(results, (cut, whole), strict=True)]
    potentials = [registry.of_version(SETTINGS.potential.model, path, "cpu", "float64") for path in paths if path is not None]
    frames = [frame(seed) for seed in range(4)]
    for one, two in zip(*(potential.predict(frames) for potential in potentials), strict=True):
        np.testing.assert_allclose(one.forces, two.forces, atol=1e-9)


def test_labels_that_contradict_the_held_out_ones_do_not_get_through(made: Make) -> None:
    """Forces of the wrong sign to learn from, the right ones to judge by: the gate refuses and says which check did."""
    run_dir, order = made(wrong=-1.0)
    result = trainer.carry_out(run_dir, order, SETTINGS, quiet, lambda: False)

    assert not result.passed
    assert "audits" in result.reason
    assert result.candidate(run_dir) is not None


def test_a_training_that_goes_astray_is_a_result_too(made: Make) -> None:
    """A loss that is no number any more: no candidate, and the sentence says what happened."""
    run_dir, order = made(wrong=1e300)  # beyond float32
    single = configs.changed(SETTINGS, ["potential.dtype=float32"])
    result = trainer.carry_out(run_dir, order, single, quiet, lambda: False)

    assert not result.passed
    assert result.reason.startswith("no candidate: ")
    assert result.candidate(run_dir) is None


def test_a_back_end_without_a_training_half_says_so(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with the setting that mends it."""
    run_dir, order = made(train=1, held_out=0)

    class Half:
        def __init__(self, whole: PaiNN) -> None:
            self._whole = whole

        def __getattr__(self, name: str) -> Any:
            if name in ("tuning", "with_elements"):
                raise AttributeError(name)
            return getattr(self._whole, name)

    load = registry.of_version
    monkeypatch.setattr(registry, "of_version", lambda *given: Half(load(*given)))
    with pytest.raises(Exception, match=r"set learn\.finetune_every to 0"):
        trainer.carry_out(run_dir, replace(order), SETTINGS, quiet, lambda: False)


@pytest.mark.parametrize(
    ("off", "weight"),
    [([0.0] * 4, 0.1), ([0.05] * 4, 0.1), ([0.1] * 4, 0.025), ([0.15] * 4, 0.0), ([0.02, 0.02, 9.0], 0.1), ([0.15, 0.15, 0.0], 0.0)],
)
def test_what_is_wrong_is_not_kept(off: list[float], weight: float, base: PaiNN) -> None:
    """Replay counts by how right it is on most labels, and not at all where it is mostly wrong."""
    frames = [frame(k) for k in range(len(off))]
    said = base.predict(frames)
    labels = [LabelledFrame(one, Label(p.energy, p.forces + e, METHOD, 0.1)) for one, p, e in zip(frames, said, off, strict=True)]
    assert trainer.replay_weight((base, base), labels) == pytest.approx(weight)


def test_what_was_wrong_before_it_was_taught_is_not_kept(base: PaiNN, teacher: PaiNN) -> None:
    """A version that is right at the labels since it has learnt them says elsewhere what the original said: that one's errors count as well."""
    frames = [frame(k) for k in range(4)]
    labels = [LabelledFrame(one, Label(p.energy, p.forces, METHOD, 0.1)) for one, p in zip(frames, teacher.predict(frames), strict=True)]
    assert trainer.replay_weight((teacher, teacher), labels) == pytest.approx(trainer.REPLAY_WEIGHT)
    assert trainer.replay_weight((base, teacher), labels) == 0.0
