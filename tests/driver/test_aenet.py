"""The back end for ænet: fingerprints and networks against plain loops, the port's promises, committees, training, elements, files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from safetensors.numpy import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tumbaga.driver.backends import registry
from tumbaga.driver.backends.aenet import Aenet, from_networks, load_backend
from tumbaga.driver.backends.aenet_descriptors import Fingerprint
from tumbaga.driver.backends.aenet_files import Basis, ElementNetwork, Window, spins, write_network
from tumbaga.driver.backends.aenet_training import created
from tumbaga.driver.backends.aenet_xsf import read_xsf
from tumbaga.driver.backends.flat import UnknownElementError
from tumbaga.driver.backends.painn import DATA
from tumbaga.driver.backends.painn_pairs import pairs
from tumbaga.driver.errors import PotentialError
from tumbaga.driver.slot import Slot
from tumbaga.online import versions
from tumbaga.online.conformance import Subject, as_test, check_trainable
from tumbaga.online.ports import Potential, Tunable
from tumbaga.online.records import Array, Frame, Label, LabelledFrame, Prediction
from tumbaga.online.training.loop import Sets, Training
from tumbaga.online.training.settings import Settings

ELEMENTS = (1, 8, 29, 79)
SYMBOLS = {1: "H", 8: "O", 29: "Cu", 79: "Au"}
ENVIRONMENT = ("Cu", "Au", "O", "H")  # not the order of the elements
BASIS = Basis(4.0, 5, 3.2, 4)
EXACT = 1e-9  # float64 sums in another order
SINGLE = 2e-4  # eV and eV/Å: float32 inside the network
CELL = np.array([[3.6, 0.0, 0.0], [0.5, 3.9, 0.0], [-0.4, 0.7, 4.1]])  # narrower than the cutoff


def network(z: int, hidden: tuple[int, ...] = (6, 5), seed: int = 0, activations: tuple[int, ...] = (1, 1)) -> ElementNetwork:
    rng = np.random.default_rng(1000 * seed + z)
    width = 2 * BASIS.width
    sizes = (width, *hidden, 1)
    average = rng.normal(size=width)
    return ElementNetwork(
        element=SYMBOLS[z],
        environment=ENVIRONMENT,
        basis=BASIS,
        weights=tuple(rng.normal(size=(n, m)) / m**0.5 for m, n in pairwise(sizes)),
        biases=tuple(0.3 * rng.normal(size=n) for n in sizes[1:]),
        activations=(*activations, 0),
        lowest=average - 1.0,
        highest=average + 1.0,
        average=average,
        squares=average**2 + rng.uniform(1.0, 4.0, width),
        window=Window(1.2 + 0.1 * seed, -4.0, -5.0, -3.0, -4.0),
        species=("Au", "Cu", "H", "O"),
        atomic=(-190.0, -48.0, -13.6, -432.5),
    )


def networks(seed: int = 0) -> list[ElementNetwork]:
    """One member; oxygen has a narrower last layer, and every kind of activation occurs."""
    widths = {1: (6, 5), 8: (4, 3), 29: (6, 5), 79: (6, 5)}
    kinds = {1: (1, 2), 8: (3, 4), 29: (1, 1), 79: (0, 1)}
    return [network(z, widths[z], seed, kinds[z]) for z in ELEMENTS]


def potential(members: int = 1, dtype: str = "float64") -> Aenet:
    return from_networks("aenet:test", [networks(seed) for seed in range(members)], "cpu", dtype)


def few(numbers: list[int], positions: npt.ArrayLike) -> Frame:
    return Frame(np.array(numbers, dtype=np.int64), np.array(positions, dtype=np.float64))


def frame(n_atoms: int, seed: int, periodic: bool = False) -> Frame:
    """Atoms no nearer than 1.3 Å."""
    rng = np.random.default_rng(seed)
    cell = CELL if periodic else np.zeros((3, 3))
    images = [np.array(k) @ cell for k in product((-1, 0, 1), repeat=3)] if periodic else [np.zeros(3)]
    placed: list[Array] = []
    while len(placed) < n_atoms:
        one = rng.uniform(0.0, 1.0, 3) @ (cell if periodic else np.eye(3) * 4.5)
        if all(np.linalg.norm(one + image - other) > 1.3 for other in placed for image in images):
            placed.append(one)
    return Frame(rng.choice(ELEMENTS, n_atoms), np.array(placed), cell, periodic)


FRAMES = [frame(7, 1), few([8], np.zeros((1, 3))), frame(4, 3, periodic=True), frame(4, 4)]


def shown(said: Prediction) -> Array:
    assert said.features is not None
    return said.features


# -- against plain loops ---------------------------------------------------------------------------------------------------------------


def plain_descriptors(given: Frame, basis: Basis, weights: dict[int, float] | None) -> Array:
    """The definition, term by term: cosines of multiples of an angle, pairs of neighbours j < k; no list, no recurrence, no harmonics."""
    images = [np.array(k) @ given.cell for k in product(range(-3, 4), repeat=3)] if given.periodic else [np.zeros(3)]

    def cut(r: float, reach: float) -> float:
        return 0.5 * (np.cos(np.pi * r / reach) + 1.0) if r < reach else 0.0

    def sums(around: list[tuple[Array, float]]) -> Array:
        radial, angular = np.zeros(basis.n_radial + 1), np.zeros(basis.n_angular + 1)
        for v, s in around:
            r = float(np.linalg.norm(v))
            radial += s * cut(r, basis.radial_cutoff) * np.cos(np.arange(len(radial)) * np.arccos(2 * r / basis.radial_cutoff - 1))
        for (v, s), (u, t) in combinations(around, 2):
            a, b = float(np.linalg.norm(v)), float(np.linalg.norm(u))
            angle = np.arccos(np.clip(v @ u / (a * b), -1.0, 1.0))
            angular += s * t * cut(a, basis.angular_cutoff) * cut(b, basis.angular_cutoff) * np.cos(np.arange(len(angular)) * angle)
        return np.concatenate([radial, angular])

    found = []
    for i in range(len(given)):
        around = [
            (v, int(z))
            for j, z in enumerate(given.numbers)
            for image in images
            if 1e-9 < np.linalg.norm(v := given.positions[j] + image - given.positions[i]) < basis.radial_cutoff
        ]
        blocks = [sums([(v, 1.0) for v, _ in around])]
        if weights is not None:
            blocks.append(sums([(v, weights[z]) for v, z in around]))
        found.append(np.concatenate(blocks))
    return np.array(found)


def fingerprints(given: Frame, basis: Basis, weights: dict[int, float], weighted: bool) -> Array:
    table = np.array([[weights[z] for z in ELEMENTS]] * len(ELEMENTS))
    found, species = pairs(given, basis.radial_cutoff), np.searchsorted(ELEMENTS, given.numbers)
    fingerprint = Fingerprint(basis, table, weighted)
    return np.asarray(fingerprint(*(torch.tensor(a) for a in (found.vectors, found.first, found.second, species))).numpy())


WEIGHTS = {z: spins(ENVIRONMENT)[SYMBOLS[z]] for z in ELEMENTS}


@pytest.mark.parametrize("given", FRAMES, ids=["cluster", "atom", "crystal", "small"])
@pytest.mark.parametrize("basis", [BASIS, Basis(4.0, 0, 4.0, 0), Basis(3.5, 12, 2.5, 11)], ids=["usual", "lowest", "high"])
def test_fingerprints_are_those_of_the_definition(given: Frame, basis: Basis) -> None:
    """Radial, angular, weighted radial, weighted angular, to 1e-10, in cells narrower than the cutoff, too."""
    plain = plain_descriptors(given, basis, WEIGHTS)

    np.testing.assert_allclose(fingerprints(given, basis, WEIGHTS, True), plain, rtol=0, atol=1e-10)
    np.testing.assert_allclose(fingerprints(given, basis, WEIGHTS, False), plain[:, : basis.width], rtol=0, atol=1e-10)


def test_atoms_on_the_axes_are_not_special() -> None:
    """Harmonics have no poles: a linear chain along z, and one across it, have finite forces and the fingerprints of the definition."""
    for axis in np.eye(3):
        chain = few([29, 79, 8, 1], np.outer([0.0, 2.0, 3.5, 5.0], axis))
        np.testing.assert_allclose(fingerprints(chain, BASIS, WEIGHTS, True), plain_descriptors(chain, BASIS, WEIGHTS), rtol=0, atol=1e-10)
        assert potential().predict([chain])[0].finite


def plain_energy(given: Frame, nets: list[ElementNetwork]) -> float:
    """What ænet does with its files: the sum of all atoms' networks over the scale, plus shift and atomic energy."""
    functions: dict[int, Callable[[Array], Array]] = {
        0: lambda x: x,
        1: np.tanh,
        2: lambda x: 1.0 / (1.0 + np.exp(-x)),
        3: lambda x: 1.7159 * np.tanh(2.0 / 3.0 * x),
        4: lambda x: 1.7159 * np.tanh(2.0 / 3.0 * x) + 0.1 * x,
    }
    total = 0.0
    for z, descriptors in zip(given.numbers, plain_descriptors(given, BASIS, WEIGHTS), strict=True):
        net = next(one for one in nets if one.element == SYMBOLS[int(z)])
        values = (descriptors - net.average) / np.sqrt(net.squares - net.average**2)
        for weight, bias, kind in zip(net.weights, net.biases, net.activations, strict=True):
            values = functions[kind](weight @ values + bias)
        total += float(values[0]) / net.window.scale + net.window.shift + net.atomic[net.species.index(net.element)]
    return total


@pytest.mark.parametrize("given", FRAMES, ids=["cluster", "atom", "crystal", "small"])
def test_energies_are_those_of_the_files(given: Frame) -> None:
    """One network and the mean of a committee, all activation functions, normalisation of energies and atomic energies undone."""
    each = [plain_energy(given, networks(seed)) for seed in range(3)]

    assert potential().predict([given])[0].energy == pytest.approx(each[0], abs=1e-8)
    assert potential(3).predict([given])[0].energy == pytest.approx(np.mean(each), abs=1e-8)


def test_the_order_of_species_is_that_of_the_file() -> None:
    """Networks whose files name the neighbours in another order weigh them by that order."""
    changed = [replace(one, environment=("H", "O", "Au", "Cu")) if one.element == "Cu" else one for one in networks()]
    mixed = from_networks("aenet:test", [changed], "cpu", "float64")

    weights = mixed.state()["fingerprint.spins"].tolist()
    assert weights[ELEMENTS.index(29)] == [-2.0, -1.0, 2.0, 1.0]
    assert weights[ELEMENTS.index(79)] == [2.0, 1.0, -2.0, -1.0]
    assert abs(mixed.predict([FRAMES[0]])[0].energy - potential().predict([FRAMES[0]])[0].energy) > 1e-3


@pytest.mark.skipif("AENET_PYTORCH" not in os.environ, reason="AENET_PYTORCH does not name a copy of github.com/atomisticnet/aenet-PyTorch")
def test_the_shipped_example_comes_out_as_its_authors_printed_it(tmp_path: Path) -> None:
    """TiO2 of ænet-PyTorch: energies of its 100 test structures to 5e-6 eV an atom, forces to 1e-5 eV/Å, as far as they were printed."""
    example = Path(os.environ["AENET_PYTORCH"]) / "example"
    with tarfile.open(example / "dir_xsf.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    rows = [line.split() for line in (example / "02-train/output/energies.test").read_text().splitlines()]
    given = [read_xsf(tmp_path / "dir_xsf" / Path(row[5]).name) for row in rows]
    model = registry.load(f"aenet:{example / '02-train/output'}", "cpu", "float64")
    said = [mine for start in range(0, len(given), 10) for mine in model.predict([one.frame for one in given[start : start + 10]])]
    atomic = {22: -1604.604515075, 8: -432.503149303}
    for row, one, mine in zip(rows, given, said, strict=True):
        cohesive = mine.energy - sum(atomic[int(z)] for z in one.frame.numbers)
        assert cohesive / len(one.frame) == pytest.approx(float(row[4]), abs=5e-6)
    # structures of the second file are in another order: an atom is found by its reference force
    forces = {
        tuple(np.round(reference, 6)): own
        for one, mine in zip(given, said, strict=True)
        if one.forces is not None
        for reference, own in zip(one.forces, mine.forces, strict=True)
    }
    printed = np.loadtxt(example / "02-train/output/forces.test")
    found = [(forces[key], row[5:]) for row in printed if (key := tuple(np.round(row[2:5], 6))) in forces]
    assert len(found) > 400
    np.testing.assert_allclose([own for own, _ in found], [theirs for _, theirs in found], rtol=0, atol=1e-5)


class _Largest(TorchDispatchMode):
    """Remembers how many numbers the largest new tensor has."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else (found,):
            self.seen = max(self.seen, one.numel() if isinstance(one, torch.Tensor) else 0)
        return found


@pytest.mark.parametrize("n_atoms", [30, 60])
def test_the_cost_is_linear_in_the_number_of_neighbours(n_atoms: int) -> None:
    """With all atoms in reach of all, no tensor of a prediction outgrows pairs times harmonics: pairs of neighbours are never listed."""
    crowd = Frame(np.full(n_atoms, 29), np.random.default_rng(0).uniform(0.0, 1.5, (n_atoms, 3)))
    model, watch = potential(), _Largest()
    with watch:
        model.predict([crowd])

    n_pairs = n_atoms * (n_atoms - 1)
    assert n_pairs < watch.seen <= n_pairs * ((BASIS.n_angular + 1) ** 2 + 1)


# -- the port --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A potential as ænet's files."""
    path = tmp_path_factory.mktemp("aenet")
    potential().write(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_keeps_every_promise_of_its_port(dtype: str, folder: Path) -> None:
    """The conformance suite, with files of ænet, in either dtype."""
    one = load_backend(str(folder), "cpu", dtype)
    check_trainable(one, FRAMES, load=load_backend, rest=str(folder))


test_a_committee_keeps_them_too = as_test(lambda: Subject.of(potential(3), FRAMES))


def test_coinciding_atoms_give_no_finite_lie() -> None:
    """Two atoms in one place are answered with non-finite numbers, not with an exception."""
    assert not potential().predict([few([1, 8], np.zeros((2, 3)))])[0].finite


def test_unknown_elements_are_refused_with_a_sentence() -> None:
    """The error names the element and the known ones, and survives pickling."""
    with pytest.raises(UnknownElementError, match="it does not know Pt; it knows H, O, Cu, Au") as caught:
        potential().predict([few([1, 78], [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]])])
    with pytest.raises(UnknownElementError):
        potential().force_rows(few([78], [[0.0, 0.0, 0.0]]))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_says_the_same() -> None:
    """Energies, forces, features and force rows of both devices agree to float32."""
    here = potential(2, "float32")
    there = from_networks("aenet:test", [networks(0), networks(1)], "cuda")
    for mine, said in zip(here.predict(FRAMES), there.predict(FRAMES), strict=True):
        assert said.energy == pytest.approx(mine.energy, abs=SINGLE)
        np.testing.assert_allclose(said.forces, mine.forces, atol=SINGLE)
        np.testing.assert_allclose(shown(said), shown(mine), atol=SINGLE)
    np.testing.assert_allclose(there.force_rows(FRAMES[0]).rows, here.force_rows(FRAMES[0]).rows, atol=SINGLE)


# -- committees ------------------------------------------------------------------------------------------------------------------------


def test_a_committee_is_the_mean_of_its_members() -> None:
    """Energy, forces and virial of the committee are the means of what its members say by themselves."""
    whole = potential(3).predict(FRAMES)
    each = [from_networks("aenet:one", [networks(seed)], "cpu", "float64").predict(FRAMES) for seed in range(3)]
    for k, said in enumerate(whole):
        assert said.energy == pytest.approx(np.mean([one[k].energy for one in each]), abs=1e-8)
        np.testing.assert_allclose(said.forces, np.mean([one[k].forces for one in each], axis=0), atol=EXACT)
        np.testing.assert_allclose(said.virial, np.mean([one[k].virial for one in each], axis=0), atol=EXACT)


def test_each_member_is_served_by_a_readout_of_its_own() -> None:
    """Under its member readout a frame has the forces of that member's files; the mean of these readouts is the committee's."""
    committee, given = potential(3), FRAMES[0]
    readouts = committee.member_readouts()
    said = committee.predict([given] * 3, readouts)

    np.testing.assert_allclose(readouts.mean(axis=0), committee.readout(), atol=1e-14)
    for seed, one in enumerate(said):
        alone = from_networks("aenet:one", [networks(seed)], "cpu", "float64").predict([given])[0]
        np.testing.assert_allclose(one.forces, alone.forces, atol=EXACT)
        np.testing.assert_allclose(one.virial, alone.virial, atol=EXACT)


@pytest.mark.parametrize("members", [1, 3])
def test_what_is_written_for_aenet_is_the_same_potential(members: int, tmp_path: Path) -> None:
    """Files written and loaded again give the same predictions; a committee becomes a folder for each member."""
    one = potential(members)
    one.write(tmp_path)
    again = registry.load(f"aenet:{tmp_path}", "cpu", "float64")

    assert len(list(tmp_path.glob("**/*.nn.ascii"))) == 4 * members
    for mine, theirs in zip(one.predict(FRAMES), again.predict(FRAMES), strict=True):
        assert theirs.energy == pytest.approx(mine.energy, abs=1e-8)
        np.testing.assert_allclose(theirs.forces, mine.forces, atol=EXACT)


def test_members_can_be_taken_apart_and_put_together() -> None:
    """A committee of some members of another: its forces are the mean of theirs."""
    whole = potential(3)
    two = from_networks("aenet:two", [whole.networks()[k] for k in (0, 2)], "cpu", "float64")
    each = whole.predict([FRAMES[0]] * 3, whole.member_readouts())

    np.testing.assert_allclose(two.predict([FRAMES[0]])[0].forces, 0.5 * (each[0].forces + each[2].forces), atol=EXACT)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([[*networks(), network(29)]], "two networks for Cu; put the members of a committee into a folder each"),
        ([networks(), networks(1)[:3]], "member 2 of the committee has no network for Au"),
        ([networks()[:3], networks(1)], "the members of the committee have other elements"),
        ([[replace(networks()[0], environment=("H", "Cu")), networks()[1]]], "the network of H knows the neighbours H, Cu, not O"),
        ([[networks()[0], replace(networks()[1], basis=Basis(4.5, 5, 3.2, 4))]], "have other cutoffs or orders; all must have the same"),
        ([networks(), [network(z) for z in ELEMENTS]], "have other layers or species in other members"),
    ],
)
def test_networks_that_do_not_belong_together_are_refused(members: list[list[ElementNetwork]], told: str) -> None:
    """A sentence says why."""
    with pytest.raises(PotentialError, match=told):
        from_networks("aenet:test", members, "cpu")


# -- training --------------------------------------------------------------------------------------------------------------------------


def test_training_sees_what_is_served() -> None:
    """Energies less the references, forces and virials of a batch are those of predict, free atoms and cells included."""
    one = potential(2)
    tuning = one.tuning()
    said = tuning.evaluate([tuning.prepare(given) for given in FRAMES], virials=True)
    served, reference = one.predict(FRAMES), one.state()["reference"]

    assert isinstance(one, Tunable)
    assert said.forces is not None
    assert said.virials is not None
    for k, given in enumerate(FRAMES):
        offset = float(reference[np.searchsorted(ELEMENTS, given.numbers)].sum())
        assert float(said.energies[k].detach()) == pytest.approx(served[k].energy - offset, abs=1e-8)
        np.testing.assert_allclose(said.virials[k].detach().numpy(), served[k].virial, atol=EXACT * (1 + np.abs(served[k].virial).max()))
    np.testing.assert_allclose(said.forces.detach().numpy(), np.concatenate([p.forces for p in served]), atol=EXACT)


def test_a_free_atom_alone_can_be_trained_on() -> None:
    """A batch without a single pair has zero forces and a virial of zero."""
    tuning = potential().tuning()
    said = tuning.evaluate([tuning.prepare(FRAMES[1])], virials=True)

    assert said.forces is not None
    assert said.virials is not None
    assert said.forces.abs().max() == said.virials.abs().max() == 0
    torch.autograd.backward(said.energies.sum() + said.forces.sum())


def test_looking_keeps_no_graph() -> None:
    """Without create_graph nothing is differentiable, and the numbers are the same; energies alone need no slopes."""
    tuning = potential().tuning()
    prepared = [tuning.prepare(given) for given in FRAMES]
    looked, trained = tuning.evaluate(prepared, virials=True, create_graph=False), tuning.evaluate(prepared)
    bare = tuning.evaluate(prepared, forces=False)

    assert looked.forces is not None
    assert looked.virials is not None
    assert trained.forces is not None
    assert not any(one.requires_grad for one in (looked.energies, looked.forces, looked.virials))
    assert all(one.requires_grad for one in (trained.energies, trained.forces, bare.energies))
    assert bare.forces is None
    torch.testing.assert_close(looked.forces, trained.forces.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(bare.energies, trained.energies, rtol=0, atol=1e-12)


def test_forces_can_be_differentiated_in_every_parameter() -> None:
    """The slope of a sum of squared forces is that of finite differences, for one number of each parameter."""
    tuning = potential().tuning()
    prepared = [tuning.prepare(given) for given in (FRAMES[0], FRAMES[2])]
    rng = np.random.default_rng(0)

    def squares(create_graph: bool) -> torch.Tensor:
        forces = tuning.evaluate(prepared, create_graph=create_graph).forces
        assert forces is not None
        found: torch.Tensor = (forces * forces).sum()
        return found

    torch.autograd.backward(squares(True))
    for name, parameter in tuning.module.named_parameters():
        place = tuple(int(rng.integers(n)) for n in parameter.shape)
        kept, sides = float(parameter.detach()[place]), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] = kept + sign * 1e-5
            sides.append(float(squares(False)))
        with torch.no_grad():
            parameter[place] = kept
        assert parameter.grad is not None
        assert float(parameter.grad[place]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-6), name


def test_every_parameter_is_in_one_group() -> None:
    """Groups cover all parameters once; a group is one layer of all elements, and the readout."""
    tuning = potential().tuning()
    named = [name for names in tuning.groups.values() for name in names]

    assert sorted(named) == sorted(name for name, _ in tuning.module.named_parameters())
    assert list(tuning.groups) == ["interactions.0", "interactions.1", "readout"]
    assert {"network.networks.Cu.weights.1", "network.networks.O.biases.1"} < set(tuning.groups["interactions.1"])


def test_untrained_it_comes_back_as_it_was() -> None:
    """Opened and closed without training, all tensors are the same to the bit; facts are replaced by name, and the hyper string stays."""
    one = potential(2)
    back = one.tuning().trained(one.state()["reference"], {"mean_h2": 4.0, "epochs": 3})

    for key, value in one.state().items():
        np.testing.assert_array_equal(back.state()[key], value)
    assert back.spec.mean_h2 == 4.0
    assert json.loads(back.metadata["facts"])["epochs"] == 3
    assert back.metadata["hyper"] == one.metadata["hyper"]


def test_training_keeps_the_statistics_of_the_descriptors() -> None:
    """A step of an optimiser changes weights, not what descriptors are standardised with; the potential that was opened is as before."""
    one = potential()
    before, tuning = one.state(), one.tuning()
    optimiser = torch.optim.Adam(tuning.module.parameters(), lr=0.01)
    forces = tuning.evaluate([tuning.prepare(FRAMES[0])]).forces
    assert forces is not None
    torch.autograd.backward((forces * forces).sum())
    optimiser.step()
    after = tuning.trained(before["reference"], {}).state()

    assert np.abs(after["networks.Cu.weights.0"] - before["networks.Cu.weights.0"]).max() > 1e-3
    assert np.abs(after["readout"] - before["readout"]).max() > 1e-3
    for key in ("average", "scale", "lowest", "highest"):
        np.testing.assert_array_equal(after[key], before[key])
    np.testing.assert_array_equal(one.state()["networks.Cu.weights.0"], before["networks.Cu.weights.0"])


def test_a_seed_gives_new_weights_of_the_same_shape() -> None:
    """The same seed the same ones, with references of zero and the old statistics; torch's own random numbers stay as they are."""
    one = potential(2)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (one.tuning(seed) for seed in (1, 1, 2))
    said = torch.rand(1)
    tensors = [tuning.trained(tuning.reference, {}).state() for tuning in (first, second, other)]

    assert torch.equal(said, expected)
    np.testing.assert_array_equal(tensors[0]["readout"], tensors[1]["readout"])
    assert np.abs(tensors[0]["readout"] - tensors[2]["readout"]).max() > 1e-3
    np.testing.assert_array_equal(first.reference, np.zeros(4))
    np.testing.assert_array_equal(tensors[0]["average"], one.state()["average"])
    members = tensors[0]["networks.Cu.weights.0"]
    assert np.abs(members[0] - members[1]).max() > 1e-3


def test_a_potential_can_be_made_from_frames_alone() -> None:
    """Its descriptors have mean 0 and variance 1 over the frames of its elements; an element that never occurs is refused."""
    frames = [frame(9, seed) for seed in range(6)]
    tensors, metadata = created([*frames, few([18], np.zeros((1, 3)))], ELEMENTS, BASIS, widths=(8,), members=2, seed=3)
    one = Aenet("aenet:new", tensors, metadata, dtype="float64")
    copper = np.concatenate([plain_descriptors(f, BASIS, {1: -2, 8: -1, 29: 1, 79: 2})[f.numbers == 29] for f in frames])
    standard = (copper - tensors["average"][0, 2]) * tensors["scale"][0, 2]

    np.testing.assert_allclose(standard.mean(axis=0), 0.0, atol=1e-9)
    np.testing.assert_allclose(standard.std(axis=0), 1.0, atol=1e-9)
    assert (one.hyper.members, one.spec.n_hidden) == (2, 16)
    assert one.predict([frames[0]])[0].finite
    assert np.abs(one.predict([frames[0]])[0].forces).max() > 1e-3
    with pytest.raises(PotentialError, match="no frame holds Pt"):
        created(frames, (*ELEMENTS, 78), BASIS)


def emt(count: int, seed: int) -> list[LabelledFrame]:
    """Rattled clusters of copper and gold, some of one element alone, with the energies and forces of effective medium theory."""
    rng = np.random.default_rng(seed)
    grid = 2.6 * np.array(list(product((0, 1), repeat=3)))
    found = []
    for k in range(count):
        n = int(rng.integers(4, 9))
        numbers = np.full(n, (29, 79)[k % 3]) if k % 3 < 2 else rng.choice((29, 79), n)
        atoms = Atoms(numbers, grid[:n] + rng.normal(0.0, 0.15, (n, 3)), calculator=EMT())
        label = Label(atoms.get_potential_energy(), atoms.get_forces(), "emt", 0.0)
        found.append(LabelledFrame(Frame(numbers, atoms.positions), label))
    return found


@pytest.mark.slow
def test_the_trainer_teaches_it(tmp_path: Path) -> None:
    """Some epochs on effective medium theory take 40 % of the force error on unseen frames away; a frozen layer stays as it was."""
    train, valid = emt(24, 1), emt(8, 2)
    tensors, metadata = created([one.frame for one in train], (29, 79), Basis(5.0, 6, 4.0, 3), widths=(16, 8), members=2)
    start = Aenet("aenet:new", tensors, metadata, dtype="float64")
    settings = Settings(epochs=20, rate=1e-2, batch_atoms=32, warmup=3, average=0.9, frozen=("interactions.1",))
    taught = Training(start, Sets(train, valid), settings, tmp_path).run().potential

    def error(one: Potential) -> float:
        said = one.predict([each.frame for each in valid])
        return float(np.sqrt(np.mean(np.concatenate([(s.forces - d.label.forces).ravel() ** 2 for s, d in zip(said, valid, strict=True)]))))

    assert error(taught) < 0.6 * error(start)
    np.testing.assert_array_equal(taught.state()["networks.Cu.weights.1"], start.state()["networks.Cu.weights.1"])
    assert np.abs(taught.state()["networks.Cu.weights.0"] - start.state()["networks.Cu.weights.0"]).max() > 1e-3


# -- elements --------------------------------------------------------------------------------------------------------------------------


def swapped(given: Frame, old: int, new: int) -> Frame:
    return replace(given, numbers=np.where(given.numbers == old, new, given.numbers))


def test_a_new_element_starts_as_a_known_one() -> None:
    """Silver that starts as copper is copper, wherever it stands; all else is as before."""
    one, given = potential(2), FRAMES[0]
    more = one.with_elements({47: 29})

    assert more.spec.elements == (1, 8, 29, 47, 79)
    assert 29 in given.numbers
    for other in (
        given,
        swapped(given, 29, 47),
        Frame(np.where(np.arange(7) == np.argmax(given.numbers == 29), 47, given.numbers), given.positions),
    ):
        said, mine = more.predict([other])[0], one.predict([given])[0]
        assert said.energy == pytest.approx(mine.energy, abs=1e-9)
        np.testing.assert_allclose(said.forces, mine.forces, atol=1e-12)
    check_trainable(more, [swapped(given, 29, 47), given])


def test_training_parts_elements_that_started_as_one(tmp_path: Path) -> None:
    """Weights of species are parameters only where two of them are the same or none of ænet's; they move apart, and are frozen by name."""
    one = potential()
    more = one.with_elements({47: 29})
    tuning = more.tuning()
    assert "embedding" not in one.tuning().groups
    assert tuning.groups["embedding"] == ("network.fingerprint.spins",)

    mixed = Frame(np.array([29, 47, 29, 47, 1]), FRAMES[0].positions[:5])
    train = [LabelledFrame(mixed, Label(1.0, np.random.default_rng(0).normal(size=(5, 3)), "any", 0.0))]
    same, other = (
        Training(more, Sets(train), Settings(epochs=3, rate=1e-2, warmup=0, average=0.0, frozen=frozen), tmp_path / str(len(frozen)))
        .run()
        .potential
        for frozen in (("embedding",), ())
    )
    assert same.state()["fingerprint.spins"][0, 2] == same.state()["fingerprint.spins"][0, 3]
    parted = other.state()["fingerprint.spins"]
    assert np.abs(parted[:, 2] - parted[:, 3]).max() > 1e-4
    assert "embedding" in other.tuning().groups
    assert other.predict([mixed])[0].energy != other.predict([swapped(mixed, 47, 29)])[0].energy


def test_a_new_element_may_weigh_otherwise_as_a_neighbour() -> None:
    """With a weight of its own its atoms are seen as something else; alone it still is what it started from."""
    one = potential()
    more = one.with_elements({47: 29}, {47: 3.0})
    silver = swapped(FRAMES[0], 29, 47)

    assert more.state()["fingerprint.spins"][:, 3].tolist() == [3.0] * 5
    assert abs(more.predict([silver])[0].energy - one.predict([FRAMES[0]])[0].energy) > 1e-4
    atoms = more.predict([few([47], np.zeros((1, 3))), few([29], np.zeros((1, 3)))])
    assert atoms[0].energy == atoms[1].energy


def test_a_known_element_can_start_again_from_another() -> None:
    """Gold takes over copper's network and reference, and stays gold to its neighbours."""
    one = potential()
    made = one.with_elements({79: 29})
    before, after = one.state(), made.state()

    np.testing.assert_array_equal(after["networks.Au.weights.0"], before["networks.Cu.weights.0"])
    np.testing.assert_array_equal(after["average"][:, 3], before["average"][:, 2])
    np.testing.assert_array_equal(after["readout"].reshape(4, -1)[3], before["readout"].reshape(4, -1)[2])
    assert after["reference"][3] == before["reference"][2]
    np.testing.assert_array_equal(after["fingerprint.spins"], before["fingerprint.spins"][[0, 1, 2, 2]])
    assert abs(made.predict([FRAMES[0]])[0].energy - one.predict([FRAMES[0]])[0].energy) > 1e-3


def test_an_element_takes_the_place_of_another_in_files_of_aenet(tmp_path: Path) -> None:
    """Copper to silver, without copper: the same forces for silver, from files that name silver where copper was."""
    one, given = potential(), FRAMES[0]
    silver = one.with_elements({47: 29}).with_only((1, 8, 47, 79))
    silver.write(tmp_path)
    said = registry.load(f"aenet:{tmp_path}", "cpu", "float64").predict([swapped(given, 29, 47)])[0]

    assert silver.networks()[0][2].environment == ("Ag", "Au", "O", "H")
    np.testing.assert_allclose(said.forces, one.predict([given])[0].forces, atol=EXACT)


def test_what_aenet_cannot_express_is_not_written(tmp_path: Path) -> None:
    """Two species of one weight, or weights between those of an order."""
    one = potential()
    for strange in (one.with_elements({47: 29}), one.with_elements({47: 29}, {47: 0.5})):
        with pytest.raises(PotentialError, match=r"cannot be written for ænet: the weights of its species \(.*Ag.*\) follow from no order"):
            strange.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_elements_that_are_not_known_cannot_be_started_from() -> None:
    """A sentence names both, and the known ones."""
    one = potential()
    with pytest.raises(PotentialError, match="cannot start Ag from Pt, which it does not know; it knows H, O, Cu, Au"):
        one.with_elements({47: 78})
    with pytest.raises(PotentialError, match="it does not know Pt; it knows H, O, Cu, Au"):
        one.with_only((29, 78))
    with pytest.raises(PotentialError, match="needs an element"):
        one.with_only(())
    with pytest.raises(PotentialError, match="a weight is given for Pt, which it would not know"):
        one.with_elements({47: 29}, {78: 1.0})


# -- files -----------------------------------------------------------------------------------------------------------------------------


def test_a_version_serves_in_a_slot_and_by_itself(tmp_path: Path) -> None:
    """A version file gives its readout to the potential it belongs to, and is a potential of its own."""
    one = potential(2, "float32")
    readout = 1.01 * one.readout()
    layer = versions.LastLayer(readout, 1e-6 * np.eye(one.spec.n_columns))
    path = tmp_path / versions.write(tmp_path, 1, one.state(readout), layer, one.metadata).path
    slot = Slot(one)
    slot.load(1, path, ())
    (answer,) = slot.answer([FRAMES[0]], [(1, 1, 0.0)])
    alone = registry.load(f"aenet:{path}", "cpu")

    assert np.isfinite(answer.lpr).all()
    np.testing.assert_array_equal(alone.predict([FRAMES[0]])[0].forces, answer.prediction.forces)


def test_float64_weights_survive_a_weights_file(tmp_path: Path) -> None:
    """State and metadata round-trip bit for bit."""
    one = potential(2)
    save_file(one.state(), tmp_path / "mine.safetensors", one.metadata)
    again = registry.load(f"aenet:{tmp_path}/mine.safetensors", "cpu", "float64")

    assert isinstance(again, Aenet)
    assert (again.hyper, again.metadata) == (one.hyper, one.metadata)
    for mine, theirs in zip(one.predict(FRAMES), again.predict(FRAMES), strict=True):
        assert theirs.energy == mine.energy
        np.testing.assert_array_equal(theirs.forces, mine.forces)


def test_files_that_are_something_else_are_refused_with_a_sentence(tmp_path: Path) -> None:
    """Damaged, of another architecture, or with a tensor that is missing or has another shape."""
    one = potential()
    (tmp_path / "damaged.safetensors").write_bytes(b"no tensors at all")
    lacking = {key: value for key, value in one.state().items() if key != "scale"}
    save_file(lacking, tmp_path / "lacking.safetensors", one.metadata)
    save_file({**one.state(), "readout": np.zeros(3)}, tmp_path / "short.safetensors", one.metadata)
    save_file({**one.state(), "average": np.zeros((1, 4, 3))}, tmp_path / "other.safetensors", one.metadata)
    save_file(one.state(), tmp_path / "strange.safetensors", {**one.metadata, "hyper": '{"elements": [1]}'})
    for name, told in (
        ("damaged", "cannot be read as safetensors"),
        ("lacking", "lacks the tensor 'scale'"),
        ("short", "lacks the tensor 'readout' of 20 numbers"),
        ("other", r"'average' has shape \(1, 4, 3\), expected"),
        ("strange", "metadata of the file are damaged"),
    ):
        with pytest.raises(PotentialError, match=told):
            registry.load(f"aenet:{tmp_path}/{name}.safetensors", "cpu")
    with pytest.raises(PotentialError, match="declares the architecture 'tumbaga-painn-1', but this back end reads 'aenet-1'"):
        registry.load(f"aenet:{DATA / 'cuau-water.safetensors'}", "cpu")
    with pytest.raises(PotentialError, match="float16"):
        Aenet("aenet:test", one.state(), one.metadata, dtype="float16")


def test_files_of_other_descriptors_are_refused_by_name(tmp_path: Path) -> None:
    """The sentence says which descriptors a file has and which are supported."""
    write_network(tmp_path / "Cu.nn.ascii", network(29))
    text = (tmp_path / "Cu.nn.ascii").read_text()
    (tmp_path / "Cu.nn.ascii").write_text(text.replace("Chebyshev", "Behler2011"))
    with pytest.raises(PotentialError, match="its descriptors are of type 'Behler2011'; only Chebyshev is supported"):
        registry.load(f"aenet:{tmp_path}", "cpu")


def test_looking_up_a_name_imports_no_torch(folder: Path) -> None:
    """The gateway and the command line look names up."""
    code = (
        f"import sys; from tumbaga.driver.backends import registry; registry.weights_file('aenet:{folder}'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
