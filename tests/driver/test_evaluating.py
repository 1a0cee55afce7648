"""The judge judged: figures of the real potential recomputed by hand, a softening that is known, and labels that are noise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tumbaga.driver import evaluating, evaluating_text, softening
from tumbaga.driver.backends import painn, registry
from tumbaga.driver.errors import ConfigError, PotentialError
from tumbaga.online import last_layer, versions
from tumbaga.online.accuracy import Judged
from tumbaga.online.records import Frame, Label, LabelledFrame
from tumbaga.online.testing import ToyTrainable, label_from

DATA = Path(__file__).parents[2] / "examples" / "cuau_water_model" / "data" / "cuau-water.npz"
MODEL = "painn:cuau-water"


@pytest.fixture(scope="module")
def few() -> list[LabelledFrame]:
    """Every 400th frame of the data set behind the embedded potential: 18 of all kinds, from one atom to thirty."""
    with np.load(DATA) as held:
        ends = np.cumsum(held["counts"])
        made = []
        for k in range(0, len(ends), 400):
            rows = slice(ends[k] - held["counts"][k], ends[k])
            label = Label(float(held["energy"][k]), held["forces"][rows].astype(np.float64), "gfn2-xtb", 0.0)
            made.append(LabelledFrame(Frame(held["numbers"][rows], held["positions"][rows].astype(np.float64)), label, f"cuau#{k}"))
    return made


@pytest.fixture(scope="module")
def potential() -> painn.PaiNN:
    return painn.load(MODEL, "cpu", "float64")


@pytest.fixture(scope="module")
def report(potential: painn.PaiNN, few: list[LabelledFrame]) -> evaluating.Report:
    return evaluating.evaluate(potential, few, evaluating.last_layer_of(potential, None), seed=3)[0]


def test_force_errors_are_those_of_single_calls(potential: painn.PaiNN, few: list[LabelledFrame], report: evaluating.Report) -> None:
    """RMSE and MAE, all and by element, are what a loop over frames, atoms and directions finds."""
    errors: dict[int, list[float]] = {}
    for one in few:
        forces = potential.predict([one.frame])[0].forces
        for atom, z in enumerate(one.frame.numbers):
            errors.setdefault(int(z), []).extend(float(forces[atom, c] - one.label.forces[atom, c]) for c in range(3))

    every = [error for held in errors.values() for error in held]
    assert report.frames == len(few) == 18
    assert report.not_finite == 0
    assert report.forces.rmse == pytest.approx(math.sqrt(sum(error**2 for error in every) / len(every)), rel=1e-9)
    assert report.forces.mae == pytest.approx(sum(abs(error) for error in every) / len(every), rel=1e-9)
    for symbol, z in (("H", 1), ("O", 8), ("Cu", 29), ("Au", 79)):
        found = report.by_element[symbol]
        assert found.atoms == len(errors[z]) // 3
        assert found.rmse == pytest.approx(math.sqrt(sum(error**2 for error in errors[z]) / len(errors[z])), rel=1e-9)


def test_force_errors_by_size(potential: painn.PaiNN, few: list[LabelledFrame], report: evaluating.Report) -> None:
    """Each bin holds the atoms whose labelled force has that norm."""
    said = [potential.predict([one.frame])[0].forces for one in few]
    for low, high, found in report.by_magnitude:
        errors = [
            forces[atom] - one.label.forces[atom]
            for one, forces in zip(few, said, strict=True)
            for atom in range(len(one.frame))
            if low <= math.dist((0, 0, 0), one.label.forces[atom]) < high
        ]
        assert found.atoms == len(errors)
        if errors:
            assert found.mae == pytest.approx(np.mean(np.abs(errors)), rel=1e-9)
    assert sum(found.atoms for _, _, found in report.by_magnitude) == sum(len(one.frame) for one in few)


def test_energy_errors_raw_and_with_offsets(potential: painn.PaiNN, few: list[LabelledFrame], report: evaluating.Report) -> None:
    """Raw errors are per atom; the offsets are a solution of the normal equations of that error, and lower it."""
    energies = np.array([potential.predict([one.frame])[0].energy for one in few])
    labels, sizes = np.array([one.label.energy for one in few]), np.array([len(one.frame) for one in few])
    shares = np.array([[(one.frame.numbers == z).sum() for z in report.offsets.elements] for one in few]) / sizes[:, None]

    gaps = (labels - energies) / sizes
    assert report.energies_raw.rmse == pytest.approx(math.sqrt((gaps**2).mean()), rel=1e-9)
    left = gaps - shares @ np.array(report.offsets.energies)
    np.testing.assert_allclose(shares.T @ left, 0.0, atol=1e-9)
    assert report.energies is not None
    assert report.energies.rmse == pytest.approx(math.sqrt((left**2).mean()), rel=1e-6)
    assert report.energies.mae == pytest.approx(np.abs(left).mean(), rel=1e-6)
    assert report.energies.rmse < report.energies_raw.rmse


def test_the_slope_is_that_of_a_fit(potential: painn.PaiNN, few: list[LabelledFrame], report: evaluating.Report) -> None:
    """Through the origin and with an intercept, as numpy fits them, within their intervals."""
    said = np.concatenate([potential.predict([one.frame])[0].forces.ravel() for one in few])
    true = np.concatenate([one.label.forces.ravel() for one in few])

    line, intercept = np.polyfit(true, said, 1)
    assert report.slope.origin.value == pytest.approx(np.linalg.lstsq(true[:, None], said)[0][0], rel=1e-9)
    assert report.slope.line.value == pytest.approx(line, rel=1e-6)
    assert report.slope.intercept == pytest.approx(intercept, abs=1e-9)
    assert report.slope.origin.low < report.slope.origin.value < report.slope.origin.high


@pytest.mark.slow
def test_the_coverage_is_that_of_the_prior(potential: painn.PaiNN, few: list[LabelledFrame], report: evaluating.Report) -> None:
    """Stds are force rows times the prior's width: 90 % intervals hold as many components as a loop over rows counts."""
    width = last_layer.Settings().prior_force / math.sqrt(potential.spec.mean_h2)
    inside, total, frames_inside = 0, 0, 0
    for one in few:
        errors = (potential.predict([one.frame])[0].forces - one.label.forces).ravel()
        stds = width * np.linalg.norm(potential.force_rows(one.frame).rows, axis=1)
        inside += int((np.abs(errors) <= 1.6448536269514722 * stds).sum())
        total += errors.size
        sizes, spreads = (np.linalg.norm(part.reshape(-1, 3), axis=1) for part in (errors, stds))
        frames_inside += bool((sizes <= 2.0 * spreads + 1e-9).all())

    found = report.uncertainty
    assert found is not None
    assert found.frames == 18
    assert {one.promised: one.found for one in found.components}[0.9] == pytest.approx(inside / total)
    assert (found.multiplier, found.frame_coverage.promised) == (2.0, 0.9)
    assert found.frame_coverage.found == pytest.approx(frames_inside / 18)
    assert "prior" in found.told


@pytest.mark.slow
def test_uncertainties_of_a_sample(potential: painn.PaiNN, few: list[LabelledFrame]) -> None:
    """As many frames as were asked for get force rows, others none; none at all where no layer is given."""
    layer = evaluating.last_layer_of(potential, None)

    report, judged = evaluating.evaluate(potential, few, layer, uncertain_frames=4)
    assert report.uncertainty is not None
    assert report.uncertainty.frames == 4
    assert sum(one.stds is not None for one in judged) == 4
    assert evaluating.evaluate(potential, few)[0].uncertainty is None


def test_a_version_brings_its_own_posterior_and_multiplier(tmp_path: Path, potential: painn.PaiNN) -> None:
    """Of a run's version the covariance is that of its file, and the multiplier that of the run while it serves this very version."""
    readout, n = potential.readout() * 1.01, potential.spec.n_columns
    layer = versions.LastLayer(readout, 1e-4 * np.eye(n))
    file = versions.write(tmp_path, 1, potential.state(readout), layer, potential.metadata)
    path = tmp_path / file.path
    learnt = painn.load(f"painn:{path}", "cpu", "float64")

    found = evaluating.last_layer_of(learnt, path)
    assert found is not None
    np.testing.assert_array_equal(found.covariance, 1e-4 * np.eye(n))
    assert found.multiplier == 2.0
    told = {"version": 1, "path": file.path, "lpr_scale": None, "quantile": 3.25}
    (path.parent / versions.SERVING).write_text(json.dumps(told))
    served = evaluating.last_layer_of(learnt, path)
    assert served is not None
    assert served.multiplier == 3.25
    (path.parent / versions.SERVING).write_text(json.dumps({**told, "path": "versions/000002-ffffffff.safetensors"}))
    other = evaluating.last_layer_of(learnt, path)
    assert other is not None
    assert other.multiplier == 2.0
    began = versions.LastLayer(readout, 1e-4 * np.eye(n), {versions.QUANTILE: 4.5})
    before = evaluating.last_layer_of(
        learnt, tmp_path / versions.write(tmp_path, 2, potential.state(readout), began, potential.metadata).path
    )
    assert before is not None
    assert (before.multiplier, before.told) == (4.5, "the version's posterior; the multiplier is that with which it began")


@pytest.mark.slow
def test_energies_of_a_version_have_a_coverage_of_their_own(tmp_path: Path, potential: painn.PaiNN, few: list[LabelledFrame]) -> None:
    """Shares of frames whose energy, offsets added, is within so many of its standard deviations; nothing of a version of before."""
    readout, n = potential.readout(), potential.spec.n_columns
    root = 0.02 * np.random.default_rng(0).standard_normal((n + len(potential.spec.elements), 40)) / math.sqrt(n)
    layer = versions.LastLayer(readout, 1e-4 * np.eye(n), energy_covariance=root @ root.T)
    file = versions.write(tmp_path, 1, potential.state(readout), layer, potential.metadata)
    found, judged = evaluating.evaluate(potential, few, evaluating.last_layer_of(potential, tmp_path / file.path))
    assert found.uncertainty is not None

    added, inside, ratios = found.offsets, 0, []
    for one in judged:
        phi, counts = potential.force_rows(one.frame).phi, [float((one.frame.numbers == z).sum()) for z in potential.spec.elements]
        std = float(np.linalg.norm(np.append(phi, counts) @ root))
        ratios.append(abs(one.energy + added.of(one.frame) - one.label.energy) / std)
        inside += ratios[-1] <= 1.6448536269514722
    assert {one.promised: one.found for one in found.uncertainty.energies}[0.9] == pytest.approx(inside / len(judged))
    assert found.uncertainty.energy_factor == pytest.approx(math.sqrt(math.pi / 2) * float(np.mean(ratios)))
    assert any("energies, offsets added, within" in line for line in evaluating_text.sentences(found))
    before, _ = evaluating.evaluate(potential, few, evaluating.last_layer_of(potential, None))
    assert before.uncertainty is not None
    assert before.uncertainty.energies == []


def test_a_potential_without_a_readout_has_no_uncertainty(few: list[LabelledFrame]) -> None:
    """A toy of Lennard-Jones atoms is judged as well, without uncertainties; frames for which it is not finite are counted."""
    toy = registry.load("toy:nan?after=1")
    frame = Frame(np.array([18, 18]), np.array([[0.0, 0, 0], [1.1, 0, 0]]))
    data = [LabelledFrame(frame, label_from(registry.load("toy:lj"), frame))] * 2

    assert evaluating.last_layer_of(toy, None) is None
    report, judged = evaluating.evaluate(toy, data, batch_atoms=2)
    assert (report.frames, report.not_finite, len(judged)) == (1, 1, 1)
    assert report.energies is None  # one frame, one offset: nothing is left to be wrong
    with pytest.raises(PotentialError, match="gives finite energies and forces for none of the 2 frames"):
        evaluating.evaluate(toy, data)


def test_an_unknown_element_is_named(potential: painn.PaiNN) -> None:
    """The element, the frame and the way round it stand in the sentence."""
    frame = Frame(np.array([78]), np.zeros((1, 3)))

    with pytest.raises(PotentialError, match=r"does not know Pt, which slab.extxyz#7 holds; leave such frames out with --only H,O,Cu,Au"):
        evaluating.evaluate(potential, [LabelledFrame(frame, Label(0.0, np.zeros((1, 3)), "test", 0.0), "slab.extxyz#7")])


def test_memory_that_does_not_suffice_is_a_sentence() -> None:
    """A back end that runs out of memory is asked for fewer atoms at once by the user."""
    frame = Frame(np.array([18] * 4), 4.0 * np.arange(12).reshape(4, 3))
    data = [LabelledFrame(frame, Label(0.0, np.zeros((4, 3)), "test", 0.0))]

    class Full(type(registry.load("toy:lj"))):  # type: ignore[misc]
        def predict(self, frames, readouts=None):  # type: ignore[no-untyped-def]
            raise MemoryError

    with pytest.raises(PotentialError, match=r"1 frames of 4 atoms at once; evaluate fewer with --batch-atoms"):
        evaluating.evaluate(Full(), data)


def test_the_report_is_json(report: evaluating.Report) -> None:
    """Everything becomes plain JSON without NaN, and says what was added to the energies."""
    plain = json.loads(json.dumps(report.plain(), allow_nan=False))

    assert plain["forces"]["rmse"] == report.forces.rmse
    assert plain["by_magnitude"][-1]["to"] is None
    assert set(plain["offsets"]["eV_per_atom"]) == {"H", "O", "Cu", "Au"}
    assert "least squares" in plain["offsets"]["method"]


# -- softening -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def soft() -> ToyTrainable:
    """A toy whose forces are all from the readout."""
    return ToyTrainable(weights=0.8 * np.random.default_rng(0).standard_normal(64), core=0.0)


def clusters(many: int, seed: int = 1) -> list[Frame]:
    rng = np.random.default_rng(seed)
    places = 2.2 * np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    return [Frame(np.array([29, 79, 8, 1]), places + 0.2 * rng.standard_normal((4, 3))) for _ in range(many)]


def judged_by(toy: ToyTrainable, labels: list[LabelledFrame]) -> list[Judged]:
    return evaluating.judge(toy, labels)[0]


def with_noise(labels: list[LabelledFrame], size: float, of: float = 1.0) -> list[LabelledFrame]:
    rng = np.random.default_rng(5)
    noisy = [of * one.label.forces + size * rng.standard_normal(one.label.forces.shape) for one in labels]
    return [LabelledFrame(one.frame, replace(one.label, forces=forces)) for one, forces in zip(labels, noisy, strict=True)]


def test_a_known_softening_is_found_and_mended(soft: ToyTrainable, tmp_path: Path) -> None:
    """A teacher of 1.25 times the student's readout: slope 0.8, scale 1.25 from one label, accepted, and written as the teacher."""
    teacher = soft.with_readout(1.25 * soft.readout())
    data = [LabelledFrame(frame, label_from(teacher, frame)) for frame in clusters(24)]

    report, judged = evaluating.evaluate(soft, data)
    assert report.slope.origin.value == pytest.approx(0.8, abs=1e-9)
    assert report.slope.line.value == pytest.approx(0.8, abs=1e-6)
    fix = softening.try_scale(soft, judged)
    assert fix.accepted
    assert fix.scale == pytest.approx(1.25, abs=1e-9)
    assert (fix.labels, fix.held_out) == (1, 12)
    assert fix.after == pytest.approx(0.0, abs=1e-9)
    assert fix.before == pytest.approx(0.2 * math.sqrt(np.mean([one.label.forces**2 for one in judged])), rel=0.5)
    name = softening.write(soft, fix, tmp_path / "stiff.safetensors")
    assert name == f"toy:{tmp_path / 'stiff.safetensors'}"
    from safetensors.numpy import load_file

    np.testing.assert_allclose(load_file(tmp_path / "stiff.safetensors")["readout"], teacher.readout(), rtol=1e-9)


def test_the_fixed_part_is_not_scaled(soft: ToyTrainable) -> None:
    """With a repulsive core outside the readout the scale is still that of the readout."""
    student = replace(soft, core=80.0)
    teacher = replace(soft, weights=1.25 * soft.readout(), core=80.0)
    data = [LabelledFrame(frame, label_from(teacher, frame)) for frame in clusters(24)]

    fix = softening.try_scale(student, judged_by(student, data))

    assert fix.scale == pytest.approx(1.25, abs=1e-9)
    assert fix.after == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_softening(soft: ToyTrainable, seed: int) -> None:
    """Labels that differ from the potential by noise alone: whatever one of them asks for is refused."""
    exact = [LabelledFrame(frame, label_from(soft, frame)) for frame in clusters(40)]

    fix = softening.try_scale(soft, judged_by(soft, with_noise(exact, 0.3)), seed=seed)

    assert not fix.accepted
    assert fix.scale != 1.0
    assert "refused, " in fix.told


def test_labels_of_something_else_are_no_softening(soft: ToyTrainable) -> None:
    """Labels that have nothing to do with the potential would be best served by no forces at all: such a scale is refused."""
    exact = [LabelledFrame(frame, label_from(soft, frame)) for frame in clusters(40)]

    fix = softening.try_scale(soft, judged_by(soft, with_noise(exact, 0.05, of=0.0)), labels=20)

    assert not fix.accepted
    assert fix.change.high < 0  # the held-out error falls, and still it is no softening
    assert "a scale outside 0.5 to 2 is not softening" in fix.told


def test_a_scale_that_few_frames_judge_is_refused(soft: ToyTrainable) -> None:
    """With fewer than eight held-out frames nothing is accepted, however good it looks."""
    teacher = soft.with_readout(1.25 * soft.readout())
    data = [LabelledFrame(frame, label_from(teacher, frame)) for frame in clusters(14)]

    fix = softening.try_scale(soft, judged_by(soft, data))

    assert fix.held_out == 7
    assert not fix.accepted
    assert "at least 8 held-out frames" in fix.told


def test_the_fix_needs_a_readout_and_labels(soft: ToyTrainable) -> None:
    """A potential without a readout, and more labels than there are, are sentences."""
    with pytest.raises(ConfigError, match="toy:zero has no linear readout"):
        softening.check(registry.load("toy:zero"), 10, 1)
    with pytest.raises(ConfigError, match="--labels: is 6, and the half of the data that is not held out has 5 frames"):
        softening.check(soft, 10, 6)
    with pytest.raises(ConfigError, match="--labels: is 1, and the half of the data that is not held out has 0 frames"):
        softening.check(soft, 1, 1)
