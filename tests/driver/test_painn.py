"""The embedded potential: its mathematics on a small untrained network in float64, its files, and the packaged weights."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from dataclasses import asdict
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ase import units
from ase.data import atomic_masses, covalent_radii
from safetensors.numpy import save_file

from tumbaga.driver.backends import painn_pairs
from tumbaga.driver.backends.painn import ARCHITECTURE, DATA, PaiNN, UnknownElementError, load, load_backend
from tumbaga.driver.backends.painn_net import Hyper, Network
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.structures import read_frame
from tumbaga.online.conformance import CHECKS, Check, Subject, as_test
from tumbaga.online.records import Frame

ELEMENTS = (1, 8, 29, 79)


def potential(dtype: str = "float64", layers: int = 2, seed: int = 0) -> PaiNN:
    hyper = Hyper(ELEMENTS, cutoff=4.0, channels=16, layers=layers, n_radial=8, n_hidden=8)
    generator = torch.random.get_rng_state()
    torch.manual_seed(seed)
    tensors = {key: value.numpy().copy() for key, value in Network(hyper).state_dict().items()}
    torch.random.set_rng_state(generator)
    rng = np.random.default_rng(seed)
    tensors |= {"readout": rng.normal(size=32), "reference": np.array([-10.0, -100.0, -110.0, -120.0])}
    metadata = {"architecture": ARCHITECTURE, "hyper": json.dumps(asdict(hyper)), "facts": json.dumps({"level": "none", "mean_h2": 2.5})}
    return PaiNN("painn:test", tensors, metadata, dtype=dtype)


def cluster(n_atoms: int = 9, seed: int = 1, spread: float = 2.4) -> Frame:
    """Random atoms, some pairs close enough for the core to act."""
    rng = np.random.default_rng(seed)
    return Frame(rng.choice(ELEMENTS, n_atoms), rng.uniform(-spread, spread, (n_atoms, 3)))


def few(numbers: list[int], positions: npt.ArrayLike) -> Frame:
    return Frame(np.array(numbers, dtype=np.int64), np.array(positions, dtype=np.float64))


def crystal(seed: int = 2) -> Frame:
    rng = np.random.default_rng(seed)
    cell = np.array([[4.6, 0.0, 0.0], [0.7, 4.9, 0.0], [-0.4, 0.9, 5.1]])
    return Frame(rng.choice(ELEMENTS, 6), rng.uniform(0.0, 1.0, (6, 3)) @ cell, cell, periodic=True)


def moved(frame: Frame, positions: np.ndarray) -> Frame:
    return Frame(frame.numbers, positions, frame.cell, frame.periodic)


@pytest.fixture(
    scope="module", params=[(1, "float64"), (2, "float64"), (3, "float64"), (2, "float32")], ids=lambda one: f"{one[0]}-layers-{one[1]}"
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The untrained network, from a file, with frames in which the core acts and atoms see their own images."""
    layers, dtype = request.param
    model, path = potential(layers=layers), tmp_path_factory.mktemp("painn") / "untrained.safetensors"
    save_file(model.state(), path, model.metadata)
    return Subject.loaded(load_backend, str(path), [cluster(), crystal(), cluster(1), cluster(5, seed=5)], dtype=dtype)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_the_untrained_network_keeps_its_promises(check: Check, subject: Subject) -> None:
    """Every promise of the port, for one, two and three layers, and in single precision."""
    check(subject)


test_the_packaged_potential = as_test(lambda: Subject.loaded(load_backend, "cuau-water"))
test_the_packaged_potential_in_single_precision = as_test(lambda: Subject.loaded(load_backend, "cuau-water", dtype="float32"))


def test_a_mirror_changes_nothing() -> None:
    """Reflections, which the port leaves open, turn the forces and leave the energy."""
    model, frame, mirror = potential(), cluster(), np.diag([1.0, -1.0, 1.0])
    plain, seen = model.predict([frame, moved(frame, frame.positions @ mirror)])

    assert seen.energy == pytest.approx(plain.energy, abs=1e-6)
    np.testing.assert_allclose(seen.forces, plain.forces @ mirror, atol=1e-7)


def test_unwrapped_positions_are_the_same_crystal() -> None:
    """Atoms that ran 100 cells away give the energy and forces of the wrapped ones."""
    model, frame = potential(), crystal()
    images = np.random.default_rng(8).integers(-100, 101, (len(frame), 3))
    near, far = model.predict([frame, moved(frame, frame.positions + images @ frame.cell)])

    assert far.energy == pytest.approx(near.energy, abs=1e-7)
    np.testing.assert_allclose(far.forces, near.forces, atol=1e-6)


def test_both_neighbour_lists_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small clusters take a dense list, large ones vesin: same pairs, same vectors."""
    frame = cluster(30, spread=5.0)
    dense = painn_pairs.pairs(frame, 4.0)
    monkeypatch.setattr(painn_pairs, "DENSE_LIMIT", 0)
    listed = painn_pairs.pairs(frame, 4.0)

    np.testing.assert_array_equal(dense.first, listed.first)
    np.testing.assert_array_equal(dense.second, listed.second)
    np.testing.assert_allclose(dense.vectors, listed.vectors, atol=1e-12)


def test_coinciding_atoms_give_no_finite_lie() -> None:
    """Two atoms in one place are answered with non-finite numbers, not with an exception."""
    assert not potential().predict([few([1, 8], np.zeros((2, 3)))])[0].finite


@pytest.mark.parametrize("edge", [painn_pairs.CORE_INNER, painn_pairs.CORE_OUTER])
def test_the_core_is_smooth_where_it_is_switched(edge: float) -> None:
    """Energy, slope and curvature have no step at either end of the switch."""
    core, contact = painn_pairs.Core(ELEMENTS), covalent_radii[29] + covalent_radii[8]
    r = contact * edge + np.array([-1e-6, 1e-6])
    second, first = np.full(2, 1), np.full(2, 2)
    energies, gradients = core(first, second, np.stack([r, 0 * r, 0 * r], axis=1))
    beyond = core(first, second, np.stack([r + 1e-4, 0 * r, 0 * r], axis=1))[1]
    before = core(first, second, np.stack([r - 1e-4, 0 * r, 0 * r], axis=1))[1]

    slope = abs(gradients).max() + 1.0
    assert abs(energies[1] - energies[0]) < 1e-5 * slope
    assert abs(gradients[1, 0] - gradients[0, 0]) < 1e-3 * slope
    assert np.ptp(np.concatenate([beyond, before])[:, 0]) < 0.02 * slope


@pytest.mark.parametrize(("a", "b"), list(combinations_with_replacement(ELEMENTS, 2)))
def test_every_pair_repels_at_short_distance(a: int, b: int) -> None:
    """The packaged potential: between 0.5 and 0.65 of the sum of covalent radii every pair is pushed apart, ever harder inwards than at 0.65."""
    model, contact = load("painn:cuau-water", device="cpu"), covalent_radii[a] + covalent_radii[b]
    scan = np.linspace(0.5, 1.0, 26)
    said = model.predict([few([a, b], [[0.0, 0.0, 0.0], [factor * contact, 0.0, 0.0]]) for factor in scan])
    push = np.array([p.forces[1, 0] for p in said])
    energies = np.array([p.energy for p in said])

    assert np.isfinite(push).all()
    assert push[scan <= 0.66].min() > 1.0
    assert energies[0] > energies.min() + 5.0
    assert energies.argmin() >= 5  # no hole near the nucleus


def test_an_unknown_element_is_refused_with_a_sentence() -> None:
    """The error names the element and the known ones, and survives pickling."""
    with pytest.raises(UnknownElementError, match="it does not know Pt; it knows H, O, Cu, Au") as caught:
        potential().predict([few([1, 78], [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])])
    with pytest.raises(UnknownElementError):
        potential().force_rows(few([78], [[0, 0, 0]]))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_files_that_do_not_serve_are_refused_with_a_sentence(tmp_path: Path) -> None:
    """Missing, damaged, foreign and incomplete files each say what is wrong."""
    with pytest.raises(PotentialError, match=r"there is no file .* packaged potential .painn:cuau-water"):
        load("painn:" + str(tmp_path / "none.safetensors"))
    damaged = tmp_path / "damaged.safetensors"
    whole = tmp_path / "whole.safetensors"
    model = potential()
    save_file(model.state(), whole, model.metadata)
    damaged.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(PotentialError, match="cannot be read as safetensors; it is damaged"):
        load(f"painn:{damaged}")
    foreign = tmp_path / "foreign.safetensors"
    save_file(model.state(), foreign, {"architecture": "schnet"})
    with pytest.raises(PotentialError, match="declares the architecture 'schnet'"):
        load(f"painn:{foreign}")
    lacking = tmp_path / "lacking.safetensors"
    save_file({k: v for k, v in model.state().items() if k != "embedding"}, lacking, model.metadata)
    with pytest.raises(PotentialError, match="lacks the tensor 'embedding'"):
        load(f"painn:{lacking}")
    with pytest.raises(PotentialError, match="has shape"):
        model.with_state({**model.state(), "embedding": np.zeros((2, 2))})


def test_saved_and_loaded_is_the_same_potential(tmp_path: Path) -> None:
    """State and metadata round-trip bit for bit, beside tensors of others; `with_state` takes a new readout."""
    model, path, frame = potential("float32"), tmp_path / "v.safetensors", cluster()
    save_file({**model.state(), "last_layer.covariance": np.eye(32)}, path, {**model.metadata, "tumbaga": "{}"})
    again = load(f"painn:{path}", device="cpu")
    changed = model.with_state({**model.state(), "readout": 2 * model.readout()})

    assert again.spec.mean_h2 == 2.5
    assert again.predict([frame])[0].energy == model.predict([frame])[0].energy
    np.testing.assert_array_equal(again.predict([frame])[0].forces, model.predict([frame])[0].forces)
    np.testing.assert_array_equal(changed.predict([frame])[0].forces, model.predict([frame], 2 * model.readout()[None])[0].forces)


_DIGEST = """
import hashlib, numpy as np, torch
from tumbaga.driver.backends.painn import load
from tumbaga.online.records import Frame
torch.set_num_threads(1)
rng = np.random.default_rng(9)
frames = [Frame(rng.choice((1, 8, 29, 79), n), rng.uniform(-3, 3, (n, 3))) for n in (8, 17, 120)]
digest = hashlib.sha256()
model = load("painn:cuau-water", device="cpu")
for said in model.predict(frames) + model.predict(frames):
    for part in (said.energy, said.forces, said.virial, said.features):
        digest.update(np.asarray(part).tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_two_processes_agree_to_the_last_bit() -> None:
    """A restarted evaluator continues the trajectory that the killed one began: same batch, same bits."""
    children = [subprocess.Popen([sys.executable, "-c", _DIGEST], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate()[0].strip() for child in children]

    assert said[0] == said[1]
    assert len(said[0]) == hashlib.sha256().digest_size * 2


def test_the_packaged_potential_declares_itself() -> None:
    """Elements, cutoff, level of theory, licence and the prior's scale stand in the weights file."""
    spec = load("painn:cuau-water").spec

    assert spec.elements == ELEMENTS
    assert (spec.n_hidden, spec.cutoff, spec.level, spec.licence, spec.dtype) == (32, 5.0, "GFN2-xTB", "MIT", "float32")
    assert spec.mean_h2 > 0


def test_energy_is_conserved_without_a_thermostat() -> None:
    """Fifty femtoseconds of NVE at 300 K in float32, pairs crossing the cutoff and all: the total energy stays within 1 meV an atom."""
    model = load("painn:cuau-water", device="cpu")
    frame = read_frame(DATA / "cuau-water.xyz")
    masses, step = atomic_masses[frame.numbers][:, None], 0.25 * units.fs
    velocities = np.random.default_rng(10).normal(size=frame.positions.shape) * np.sqrt(units.kB * 300.0 / masses)
    positions, said = frame.positions, model.predict([frame])[0]
    totals = []
    for _ in range(200):
        velocities = velocities + 0.5 * step * said.forces / masses
        positions = positions + step * velocities
        said = model.predict([Frame(frame.numbers, positions)])[0]
        velocities = velocities + 0.5 * step * said.forces / masses
        totals.append(said.energy + float(0.5 * (masses * velocities**2).sum()))

    assert np.ptp(totals) < 1e-3 * len(frame)
    assert abs(np.mean(totals[150:]) - np.mean(totals[:50])) < 2e-4 * len(frame)
