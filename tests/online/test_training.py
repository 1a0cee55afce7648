"""The trainer on a tiny embedded potential in float64: it learns, keeps what is frozen, and what a kill does to it. Labels come from a copy with
other weights and other reference energies."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tumbaga.driver.backends import painn_training
from tumbaga.driver.backends.painn import ARCHITECTURE, PaiNN
from tumbaga.driver.backends.painn_net import Hyper
from tumbaga.online.errors import TrainingError, TrainingStoppedError
from tumbaga.online.records import Frame, Label, LabelledFrame
from tumbaga.online.testing import label_from
from tumbaga.online.training import checkpoints, offsets
from tumbaga.online.training.average import Average
from tumbaga.online.training.dataset import epoch_order, held_out, in_batches, samples
from tumbaga.online.training.loop import Outcome, Sets, Training
from tumbaga.online.training.replay import generated, pseudo_labelled
from tumbaga.online.training.settings import Settings

ELEMENTS = (1, 8)
OFFSETS = {1: -13.0, 8: -2040.0}  # eV, what the labels' level of theory adds to an atom
SAME = 1e-12  # float64, the same operations in the same order
QUICK = Settings(epochs=6, rate=5e-3, batch_atoms=12, warmup=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny operators on several threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def potential(seed: int = 0, noise: float = 0.0) -> PaiNN:
    hyper = Hyper(ELEMENTS, cutoff=3.5, channels=8, layers=2, n_radial=6, n_hidden=4)
    rng = np.random.default_rng(seed + 100)
    tensors = {key: value + noise * rng.standard_normal(value.shape) for key, value in painn_training.fresh(hyper, seed).items()}
    metadata = {"architecture": ARCHITECTURE, "hyper": json.dumps(asdict(hyper)), "facts": "{}"}
    return PaiNN("painn:tiny", tensors, metadata, dtype="float64")


def frames(count: int, seed: int, spread: float = 0.2, gap: float = 1.5) -> list[Frame]:
    """Three to five atoms on a grid, rattled."""
    rng = np.random.default_rng(seed)
    grid = gap * np.array([[x, y, z] for x in range(2) for y in range(2) for z in range(2)])
    sizes = rng.integers(3, 6, count)
    return [Frame(rng.choice(ELEMENTS, n), grid[:n] + spread * rng.standard_normal((n, 3))) for n in sizes]


def labelled(given: Sequence[Frame], teacher: PaiNN, shift: dict[int, float] | None = None) -> list[LabelledFrame]:
    return [LabelledFrame(one, label_from(teacher, one, shift)) for one in given]


START, TEACHER = potential(), potential(noise=0.15)
TRAIN = labelled(frames(12, 1), TEACHER, OFFSETS)
VALID = labelled(frames(4, 2), TEACHER, OFFSETS)


def trained(folder: Path, settings: Settings = QUICK, sets: Sets | None = None, **how: object) -> Outcome:
    return Training(START, sets or Sets(TRAIN, VALID), settings, folder, **how).run()


def force_rmse(one: PaiNN, data: Sequence[LabelledFrame]) -> float:
    said = one.predict([each.frame for each in data])
    return float(np.sqrt(np.mean(np.concatenate([(s.forces - d.label.forces).ravel() ** 2 for s, d in zip(said, data, strict=True)]))))


def without_time(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in history]


def assert_same(one: Outcome, other: Outcome) -> None:
    mine, theirs = one.potential.state(), other.potential.state()
    for key, value in mine.items():
        np.testing.assert_allclose(value, theirs[key], rtol=0, atol=SAME)
    assert (one.epochs, one.best) == (other.epochs, other.best)
    assert without_time(one.history) == without_time(other.history)


# -- learning --------------------------------------------------------------------------------------------------------------------------


def test_the_loss_falls(tmp_path: Path) -> None:
    """Some epochs lower the force error on frames never seen by more than a third, and the log has a line for each epoch."""
    before = force_rmse(START, VALID)
    outcome = trained(tmp_path, replace(QUICK, epochs=40))

    assert force_rmse(outcome.potential, VALID) < 0.65 * before
    assert [line["epoch"] for line in outcome.history] == list(range(40))
    assert outcome.history[-1]["train_loss"] < 0.25 * outcome.history[0]["train_loss"]
    assert outcome.history[outcome.best]["valid_force_rmse"] == pytest.approx(force_rmse(outcome.potential, VALID), rel=1e-9)


def test_what_was_started_from_is_not_changed(tmp_path: Path) -> None:
    """Training works on a copy: the potential that was given says what it said."""
    before = START.state()
    trained(tmp_path)

    for key, value in START.state().items():
        np.testing.assert_array_equal(value, before[key])


def test_seeds_are_reproducible(tmp_path: Path) -> None:
    """The same seed gives the same weights, another seed another order and so others."""
    first, again = trained(tmp_path / "a"), trained(tmp_path / "b")
    other = trained(tmp_path / "c", replace(QUICK, seed=1))

    assert_same(first, again)
    assert np.abs(other.potential.state()["embedding"] - first.potential.state()["embedding"]).max() > 1e-6


def test_from_scratch_nothing_is_taken_over(tmp_path: Path) -> None:
    """Another start with the same shape and seed ends in the same weights: only the labels and the seed count."""
    other = potential(seed=7)
    first = Training(START, Sets(TRAIN), QUICK, tmp_path / "a", scratch=True).run()
    second = Training(other, Sets(TRAIN), QUICK, tmp_path / "b", scratch=True).run()

    assert_same(first, second)


@pytest.mark.slow
def test_virials_are_learnt_where_labels_have_them(tmp_path: Path) -> None:
    """With virials in the loss the error of virials of a cell falls below what energies alone reach."""
    cell = 5.0 * np.eye(3)
    boxes = [Frame(one.numbers, one.positions, cell, True) for one in frames(8, 4)]
    data = [
        LabelledFrame(one, Label(said.energy, said.forces, "toy", 0.0, virial=said.virial))
        for one, said in zip(boxes, TEACHER.predict(boxes), strict=True)
    ]

    def virial_error(weight: float) -> float:
        settings = replace(QUICK, epochs=25, virial_weight=weight, force_weight=0.0, energy_weight=1e-3, rate=1e-2)
        said = trained(tmp_path / str(weight), settings, Sets(data)).potential.predict(boxes)
        return max(float(np.abs(s.virial - d.label.virial).max()) for s, d in zip(said, data, strict=True))

    assert virial_error(10.0) < 0.5 * virial_error(0.0)


@pytest.mark.parametrize("group", ["embedding", "interactions.0", "interactions", "head", "readout"])
def test_frozen_groups_do_not_change_to_the_bit(tmp_path: Path, group: str) -> None:
    """Parameters of a frozen group come out as they went in, whatever decay and averages do; all others have moved."""
    settings = replace(QUICK, frozen=(group,), decay=0.1)
    outcome = trained(tmp_path, settings)
    tuning, new = START.tuning(), outcome.potential.tuning()
    frozen = {name for one, names in tuning.groups.items() if one.startswith(group) for name in names}

    assert frozen
    values = dict(new.module.named_parameters())
    for name, value in tuning.module.named_parameters():
        assert torch.equal(value, values[name]) == (name in frozen), name


def test_frozen_references_stay(tmp_path: Path) -> None:
    """With "reference" frozen the reference energies are those of the start; otherwise they take up the labels' offsets."""
    kept = trained(tmp_path / "a", replace(QUICK, frozen=("reference",)))
    free = trained(tmp_path / "b")

    np.testing.assert_array_equal(kept.potential.state()["reference"], START.state()["reference"])
    np.testing.assert_allclose(free.reference, [OFFSETS[1], OFFSETS[8]], atol=3.0)


def test_early_stopping_ends_and_keeps_the_best(tmp_path: Path) -> None:
    """Where the validation error only rises, training ends after the patience and gives back the best epoch."""
    wrong = labelled(frames(4, 2), potential(noise=0.4), OFFSETS)  # what is learnt moves away from these
    outcome = trained(tmp_path, replace(QUICK, epochs=200, patience=4), Sets(TRAIN, wrong))
    losses = [line["valid_loss"] for line in outcome.history]

    assert outcome.epochs < 200
    assert outcome.best == int(np.argmin(losses)) == outcome.epochs - 1 - 4


def test_a_plateau_halves_the_rate(tmp_path: Path) -> None:
    """With the plateau schedule the rate is halved where the validation error stays, and is constant before."""
    wrong = labelled(frames(4, 2), potential(noise=0.4), OFFSETS)
    settings = replace(QUICK, epochs=30, patience=12, schedule="plateau", warmup=0)
    rates = [line["rate"] for line in trained(tmp_path, settings, Sets(TRAIN, wrong)).history]

    assert rates[0] == settings.rate
    assert min(rates) < 0.3 * settings.rate
    assert all(after in (before, 0.5 * before) for before, after in itertools.pairwise(rates))


@pytest.mark.slow
def test_replay_keeps_old_errors_low(tmp_path: Path) -> None:
    """After learning wide frames of another level, frames of the old kind are forgotten less with replay of own labels than without."""
    old = pseudo_labelled(START, frames(16, 5, gap=1.2))
    judged = pseudo_labelled(START, frames(10, 6, gap=1.2))
    new = labelled(frames(6, 7, gap=1.8), potential(noise=0.3), OFFSETS)
    settings = replace(QUICK, epochs=20, replay=2.0)
    without = force_rmse(trained(tmp_path / "a", settings, Sets(new)).potential, judged)
    with_replay = force_rmse(trained(tmp_path / "b", settings, Sets(new, (), old)).potential, judged)

    assert with_replay < 0.6 * without


def test_replay_of_another_level_needs_no_common_zero(tmp_path: Path) -> None:
    """Replay energies that are off by constants an atom change nothing: they have reference energies of their own."""
    old = pseudo_labelled(START, frames(6, 5))
    moved = [
        LabelledFrame(
            one.frame, Label(one.label.energy + sum(500.0 * z for z in one.frame.numbers.tolist()), one.label.forces, "other", 0.0)
        )
        for one in old
    ]
    one, other = (trained(tmp_path / name, QUICK, Sets(TRAIN, VALID, data)) for name, data in (("a", old), ("b", moved)))

    for key, value in one.potential.state().items():
        np.testing.assert_allclose(value, other.potential.state()[key], atol=1e-6)


# -- kill and resume -------------------------------------------------------------------------------------------------------------------

CHILD = """
import sys
sys.path.insert(0, {folder!r})
import importlib.util
spec = importlib.util.spec_from_file_location("parts", {file!r})
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)
from pathlib import Path
import torch
torch.set_num_threads(1)
steps = 0
def stop():
    global steps
    steps += 1
    print("step", steps, flush=True)
    return False
parts.trained(Path(sys.argv[1]), parts.LONG, save_s=float(sys.argv[2]), stop=stop, observe=lambda line: print("epoch", line["epoch"], flush=True))
"""
LONG = replace(QUICK, epochs=10, pitc=0.1, schedule="plateau", patience=9)


def killed_after(folder: Path, line: str, save_s: float) -> None:
    """Start a training in a process of its own and kill it as soon as it has said this."""
    text = CHILD.format(folder=str(Path(__file__).parent), file=__file__)
    child = subprocess.Popen([sys.executable, "-c", text, str(folder), str(save_s)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        for said in child.stdout:
            if said.strip() == line:
                break
        else:
            pytest.fail(f"the training ended without saying {line!r}")
        child.kill()
    assert child.wait() == -9


@pytest.mark.parametrize(
    "moments", [("epoch 2",), *(pytest.param(told, marks=pytest.mark.slow) for told in (("step 14",), ("step 2", "epoch 4", "step 9")))]
)
def test_killed_and_resumed_is_undisturbed(tmp_path: Path, moments: tuple[str, ...]) -> None:
    """Killed with SIGKILL in or between epochs, once or several times, a training ends with the weights, best epoch and log of one left alone."""
    undisturbed = trained(tmp_path / "whole", LONG)
    for line in moments:
        killed_after(tmp_path / "killed", line, save_s=0.0)
    resumed = trained(tmp_path / "killed", LONG)

    assert_same(resumed, undisturbed)


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_it_starts_again(tmp_path: Path) -> None:
    """With no checkpoint yet, the log's lines are taken back and the end is the same."""
    undisturbed = trained(tmp_path / "whole", LONG)
    killed_after(tmp_path / "killed", "epoch 3", save_s=1e6)

    assert not (tmp_path / "killed" / checkpoints.FILE).exists()
    assert len(checkpoints.lines(tmp_path / "killed")) == 4
    assert_same(trained(tmp_path / "killed", LONG), undisturbed)


def test_told_to_stop_it_leaves_a_checkpoint(tmp_path: Path) -> None:
    """A training that is told to stop after five steps has done five, and goes on to the undisturbed end."""
    asked = iter(range(1000))
    with pytest.raises(TrainingStoppedError, match="can go on"):
        trained(tmp_path / "a", stop=lambda: next(asked) >= 4)
    state = torch.load(tmp_path / "a" / checkpoints.FILE, weights_only=True)

    assert state["progress"]["steps"] == 5
    assert_same(trained(tmp_path / "a"), trained(tmp_path / "b"))


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    """Asked for once more, it gives the same potential without a step."""
    first = trained(tmp_path)
    seen: list[object] = []
    again = trained(tmp_path, observe=seen.append)

    assert not seen
    assert_same(first, again)


def test_a_folder_of_another_training_is_refused(tmp_path: Path) -> None:
    """Other settings, labels or start do not go on with a folder's state."""
    trained(tmp_path)
    for settings, sets in ((replace(QUICK, rate=1e-4), Sets(TRAIN, VALID)), (QUICK, Sets(TRAIN[1:], VALID))):
        with pytest.raises(TrainingError, match="other data, settings or start"):
            trained(tmp_path, settings, sets)
    with pytest.raises(TrainingError, match="other data, settings or start"):
        Training(TEACHER, Sets(TRAIN, VALID), QUICK, tmp_path).run()


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_a_sentence(tmp_path: Path, damage: bytes) -> None:
    """A checkpoint that cannot be read is named, with what to do."""
    (tmp_path / checkpoints.FILE).write_bytes(damage)
    with pytest.raises(TrainingError, match=r"cannot be read.*remove it"):
        trained(tmp_path)


# -- mistakes --------------------------------------------------------------------------------------------------------------------------


def test_an_unknown_group_is_a_sentence(tmp_path: Path) -> None:
    """A group that there is not is refused with those that there are; nothing but "reference" may not be left."""
    with pytest.raises(TrainingError, match=r"'backbone'.*embedding, interactions\.0, interactions\.1, head, readout, reference"):
        trained(tmp_path, replace(QUICK, frozen=("backbone",)))
    with pytest.raises(TrainingError, match="nothing is left to train"):
        trained(tmp_path, replace(QUICK, frozen=("embedding", "interactions", "head", "readout")))


def test_nothing_to_learn_from_is_a_sentence(tmp_path: Path) -> None:
    """Without a frame there is no training."""
    with pytest.raises(TrainingError, match="hold no frame"):
        trained(tmp_path, QUICK, Sets([]))


def test_a_loss_that_runs_away_is_a_sentence(tmp_path: Path) -> None:
    """A rate far too high ends in an error that says so, not in a file of numbers that are not finite."""
    with pytest.raises(TrainingError, match=r"no finite number.*lower rate"):
        trained(tmp_path, replace(QUICK, epochs=50, rate=1e6, clip=1e9, huber=0.0))


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"rate": -1.0}, {"average": 1.0}, {"schedule": "steps"}, {"huber": -0.1}])
def test_settings_out_of_range_are_sentences(wrong: dict[str, object]) -> None:
    """Each setting is checked, by name."""
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        replace(QUICK, **wrong)


# -- parts -----------------------------------------------------------------------------------------------------------------------------


def test_the_average_is_that_of_plain_arithmetic() -> None:
    """The moving average equals its recursion written out with plain numbers, young steps forgetting faster."""
    module = torch.nn.Linear(1, 1, bias=False).double()
    values = [3.0, -1.0, 4.0, 1.0, -5.0, 9.0]
    with torch.no_grad():
        module.weight.fill_(2.0)
    average, plain = Average(module, 0.3), 2.0
    for step, value in enumerate(values):
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(module, step)
        memory = min(0.3, (1 + step) / (10 + step))
        plain = memory * plain + (1 - memory) * value

    assert float(average.values["weight"]) == pytest.approx(plain, abs=1e-14)
    with average.inside(module):
        assert float(module.weight.detach()) == pytest.approx(plain, abs=1e-14)
    assert float(module.weight.detach()) == 9.0


def test_offsets_are_found_exactly() -> None:
    """Labels that are the potential's own energies plus constants an atom give exactly these constants."""
    data = labelled(frames(6, 3), START, OFFSETS)
    found = offsets.reference_for(START.tuning(), ELEMENTS, data)

    np.testing.assert_allclose(found, [OFFSETS[1], OFFSETS[8]], atol=1e-9)


def test_one_composition_shares_its_offset_by_atoms() -> None:
    """With a single composition the sum is right and the correction is in proportion to the numbers of atoms."""
    counts, start = np.tile([4.0, 2.0], (5, 1)), np.array([-1.0, -20.0])
    found = offsets.fitted(np.full(5, -100.0), np.zeros(5), counts, start)

    assert float(counts[0] @ found) == pytest.approx(-100.0, abs=1e-10)
    np.testing.assert_allclose((found - start) / (found - start)[1], [2.0, 1.0])


def test_without_labels_references_stay() -> None:
    """No data, no fit."""
    np.testing.assert_array_equal(offsets.reference_for(START.tuning(), ELEMENTS, []), START.state()["reference"])


def test_batches_hold_so_many_atoms() -> None:
    """Frames are put together in order up to the limit; one that is larger stands alone, and none is lost."""
    made = samples(START.tuning(), ELEMENTS, TRAIN, np.zeros(2))
    for limit in (1, 4, 10, 1000):
        batches = in_batches(made, limit)
        assert [one for batch in batches for one in batch] == made
        assert all(len(batch) == 1 or sum(len(one.frame) for one in batch) <= limit for batch in batches)
        ends = itertools.pairwise(batches)
        assert all(sum(len(one.frame) for one in batch) + len(after[0].frame) > limit for batch, after in ends)


def test_an_epoch_has_all_new_frames_and_its_share_of_replay() -> None:
    """Every new frame comes once an epoch, replay frames at most once, in an order that the seed and the epoch give."""
    made = samples(START.tuning(), ELEMENTS, TRAIN + VALID, np.zeros(2))
    new, old = made[:4], made[4:]
    one = epoch_order(new, old, 1.5, seed=3, epoch=2)

    assert len(one) == 10
    assert len({id(each) for each in one}) == 10
    assert all(any(each is other for other in one) for each in new)
    assert one == epoch_order(new, old, 1.5, seed=3, epoch=2)
    assert one != epoch_order(new, old, 1.5, seed=3, epoch=3)
    assert len(epoch_order(new, old, 100.0, seed=3, epoch=2)) == 16


def test_validation_frames_are_held_out() -> None:
    """A tenth is held out, nothing twice; few frames are all learnt."""
    many = labelled(frames(30, 8), TEACHER)
    kept, held = held_out(many, 0.1, seed=1)

    assert (len(kept), len(held)) == (27, 3)
    assert {id(one) for one in kept} | {id(one) for one in held} == {id(one) for one in many}
    assert held_out(many[:9], 0.1, seed=1) == (many[:9], [])


def test_generated_frames_are_of_the_same_elements() -> None:
    """Distorted copies keep their atoms, every fifth is a pair, and the seed makes them."""
    given = frames(3, 9)
    made = generated(given, 10, seed=2)

    assert [len(one) == 2 for one in made] == [False] * 4 + [True] + [False] * 4 + [True]
    assert all(any(one.numbers.tolist() == other.numbers.tolist() for other in given) for one in made if len(one) > 2)
    assert [one.key for one in made] == [one.key for one in generated(given, 10, seed=2)]
    assert len(pseudo_labelled(START, made)) == 10
