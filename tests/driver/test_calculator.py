"""The in-process ASE calculator: the numbers of the slot and of a real server, the sign of the stress, and what it refuses."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.io import read, write
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS

from tumbaga.driver import calculator, structures
from tumbaga.driver import config as configs
from tumbaga.driver.backends import registry
from tumbaga.driver.calculator import RefusedError, Tumbaga
from tumbaga.driver.errors import ConfigError, PotentialError, RunDirError
from tumbaga.driver.evaluator import warm_up
from tumbaga.driver.slot import Slot
from tumbaga.driver.testing import Program
from tumbaga.online import versions
from tumbaga.online.versions import LastLayer
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine

TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
MODEL = "painn:cuau-water"
SAME = 1e-10  # relative: two changes of units
SERVED = 3


@pytest.fixture
def atoms() -> Atoms:
    return read(TEMPLATE)


def shaken(seed: int) -> Atoms:
    moved = read(TEMPLATE)
    moved.rattle(0.05, seed=seed)
    return moved


def crystal() -> Atoms:
    made = bulk("Cu", a=3.9, cubic=True) * (2, 2, 2)
    made.numbers[::3] = 79
    made.rattle(0.1, seed=1)
    made.set_cell(made.cell.array @ (np.eye(3) + np.array([[0.02, 0.01, 0.0], [0.0, -0.01, 0.03], [0.0, 0.0, 0.01]])), scale_atoms=True)
    return made


def as_run(folder: Path, dtype: str = "float64", scale: float | None = 0.7) -> Path:
    """A run directory as learning leaves it: settings, base, two versions, and a note of the one that serves."""
    folder.mkdir()
    potential = configs.Potential(model=MODEL, template=str(TEMPLATE), dtype=dtype)
    settings = configs.Config(potential=potential, learn=configs.Learn(enabled=False))
    (folder / configs.FILE).write_text(configs.dumps(settings))
    painn = registry.load(MODEL, "cpu", dtype)
    covariance = Slot(painn).covariance(0)
    for number in (0, 2, SERVED):
        change = 0.0 if number == 0 else 0.01 * np.random.default_rng(number).standard_normal(painn.spec.n_columns)
        root = np.random.default_rng(number).standard_normal((len(covariance) + 4, 9))
        layer = LastLayer(painn.readout() + change, covariance / (1.0 + number), energy_covariance=1e-6 * root @ root.T if number else None)
        file = versions.write(folder, number, painn.state(layer.readout), layer, painn.metadata)
    told = {"version": SERVED, "path": file.path, "lpr_scale": scale, "quantile": 2.0}
    (folder / versions.FOLDER / versions.SERVING).write_text(json.dumps(told))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return as_run(tmp_path / "run")


@pytest.fixture
def socket_name() -> Iterator[str]:
    name = f"tumbaga-test-{uuid.uuid4().hex}"
    yield name
    assert not os.path.lexists(f"/tmp/ipi_{name}")


# -- the same numbers ------------------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_slot(atoms: Atoms) -> None:
    """Energy and forces bit for bit, and the uncertainty that the server would tell with this template."""
    slot = Slot(registry.load(MODEL, "cpu"))
    calc = Tumbaga(MODEL, device="cpu", template=atoms)
    for seed in range(3):
        moved = shaken(seed)
        moved.calc = calc
        (answer,) = slot.answer([structures.from_atoms(moved)], [(0, 0, 1.0)])
        assert moved.get_potential_energy() == answer.prediction.energy
        assert moved.get_potential_energy(force_consistent=True) == answer.prediction.energy
        np.testing.assert_array_equal(moved.get_forces(), answer.prediction.forces)
        scale = warm_up(slot, structures.from_atoms(atoms))
        assert scale is not None
        assert calc.results["force_std"] == scale * answer.lpr.max()
        assert calc.results["force_std_atom"] == answer.lpr.argmax()
        assert calc.results["version"] == calc.version == "0-base"


def test_the_estimate_is_exact_on_the_frame_it_was_measured_on(atoms: Atoms) -> None:
    """Without a template the first frame is one: its largest estimate is its largest exact standard deviation."""
    calc = Tumbaga()
    atoms.calc = calc
    atoms.get_forces()
    assert "force_stds" not in calc.results
    for one in (atoms, molecule("H2O")):
        exact = calc.get_property("force_stds", one)
        assert exact.shape == (len(one),)
        assert calc.get_property("force_std", one) == pytest.approx(exact.max())


def test_the_standard_deviation_of_a_force_is_that_of_the_last_layer(run: Path, atoms: Atoms) -> None:
    """Readouts drawn from a version's posterior move the forces by as much as `force_stds` says."""
    painn, frame = registry.load(MODEL, "cpu", "float64"), structures.from_atoms(atoms)
    slot = Slot(painn)
    (path,) = (run / versions.FOLDER).glob("000003-*")
    slot.load(SERVED, path, ())
    drawn = np.random.default_rng(0).multivariate_normal(np.zeros(painn.spec.n_columns), slot.covariance(SERVED), 400)
    moved = np.stack([p.forces for p in painn.predict([frame] * len(drawn), painn.readout() + drawn)]) - painn.predict([frame])[0].forces
    seen = np.sqrt((moved**2).sum(axis=2).mean(axis=0))

    np.testing.assert_allclose(Tumbaga(run=run).get_property("force_stds", atoms), seen, rtol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.7, None])
def test_the_numbers_are_those_of_a_server(tmp_path: Path, socket_name: str, scale: float | None) -> None:
    """A real server and the calculator on one run directory: energy, forces, virial, version and uncertainty of the same frames."""
    run = as_run(tmp_path / "run", scale=scale)
    calc = Tumbaga(run=run)
    with (
        listen(Address.unix(socket_name)) as door,
        Program(run, "serve", "-u", "-a", socket_name, "--no-learn", "--quiet", scratch=tmp_path / "scratch") as server,
    ):
        with BlockingEngine.accept(door) as engine:
            for seed in range(4):
                moved = shaken(seed)
                got = engine.forces(moved.positions / ase.units.Bohr)
                told = json.loads(got.extras)["tumbaga"]
                moved.calc = calc
                assert got.energy * ase.units.Ha == pytest.approx(moved.get_potential_energy(), rel=SAME)
                served = got.forces * ase.units.Ha / ase.units.Bohr
                np.testing.assert_allclose(served, moved.get_forces(), rtol=SAME, atol=SAME * np.abs(served).max())
                assert told["version"] == calc.results["version"]
                assert told["version"].startswith("3-")
                assert told["force_std"] == pytest.approx(calc.results["force_std"], rel=SAME)
                assert told["force_std_atom"] == calc.results["force_std_atom"]
                assert told["energy_std"] == pytest.approx(calc.results["energy_std"], rel=SAME)
        assert server.stop() == 0


@pytest.mark.slow
def test_the_stress_is_that_of_a_server(tmp_path: Path, socket_name: str) -> None:
    """A crystal over the socket: the server's virial, over the volume and with ASE's sign, is the calculator's stress."""
    run, solid = as_run(tmp_path / "run"), crystal()
    write(tmp_path / "solid.traj", solid)
    settings = configs.load(run)
    changed = configs.Potential(model=MODEL, template=str(tmp_path / "solid.traj"), dtype="float64")
    (run / configs.FILE).write_text(configs.dumps(configs.Config(potential=changed, learn=settings.learn)))
    solid.calc = Tumbaga(run=run)
    with (
        listen(Address.unix(socket_name)) as door,
        Program(run, "serve", "-u", "-a", socket_name, "--no-learn", "--quiet", scratch=tmp_path / "scratch") as server,
    ):
        with BlockingEngine.accept(door) as engine:
            got = engine.forces(solid.positions / ase.units.Bohr, solid.cell.array / ase.units.Bohr)
        assert server.stop() == 0
    stress = -got.virial * ase.units.Ha / solid.get_volume()
    np.testing.assert_allclose(stress, solid.get_stress(voigt=False), rtol=SAME, atol=SAME * np.abs(stress).max())
    assert json.loads(got.extras)["tumbaga"]["force_std"] == pytest.approx(solid.calc.results["force_std"], rel=SAME)


def test_the_stress_is_the_slope_of_the_energy(run: Path) -> None:
    """dE/dstrain over the volume, by finite differences, for all six components in ASE's order."""
    solid = crystal()
    solid.calc = Tumbaga(run=run, version=0)
    stress, step = solid.get_stress(), 1e-5
    for place, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))):
        energies = []
        for sign in (1.0, -1.0):
            strain = np.eye(3)
            strain[i, j] += 0.5 * sign * step
            strain[j, i] += 0.5 * sign * step
            strained = solid.copy()
            strained.set_cell(solid.cell.array @ strain, scale_atoms=True)
            strained.calc = solid.calc
            energies.append(strained.get_potential_energy())
        slope = (energies[0] - energies[1]) / (2.0 * step) / solid.get_volume()
        assert stress[place] == pytest.approx(slope, abs=1e-6 * np.abs(stress).max())


# -- run directories -------------------------------------------------------------------------------------------------------------------


def test_a_run_gives_its_newest_version_or_any(run: Path, atoms: Atoms) -> None:
    """The version that serves by default, with the learner's scale; others by number; version 0 is the potential as it was."""
    newest, second, base = Tumbaga(run=run), Tumbaga(run=run, version=2), Tumbaga(run=run, version=0)
    energies = [calc.get_potential_energy(atoms) for calc in (newest, second, base, Tumbaga(MODEL, dtype="float64"))]

    assert newest.version.startswith("3-")
    assert second.version.startswith("2-")
    assert base.version == "0-base"
    assert len(set(energies)) == 3
    assert energies[2] == energies[3]
    with pytest.raises(RunDirError, match=r"has no version 7; it has 0, 2, 3"):
        Tumbaga(run=run, version=7)


def test_a_run_is_only_read(run: Path, atoms: Atoms) -> None:
    """No file of the run directory is made, changed or taken away."""

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    before = state()
    Tumbaga(run=run).get_potential_energy(atoms)
    assert state() == before


def test_a_copied_run_works_without_the_files_it_was_made_of(run: Path, atoms: Atoms, tmp_path: Path) -> None:
    """Where the model's file and the template are gone, version 0 is the potential."""
    settings = configs.load(run)
    gone = configs.Potential(model="painn:/nowhere/weights.safetensors", template="/nowhere/t.xyz", dtype="float64")
    (run / configs.FILE).write_text(configs.dumps(configs.Config(potential=gone, learn=settings.learn)))

    assert Tumbaga(run=run, version=0).get_potential_energy(atoms) == pytest.approx(
        Tumbaga(MODEL, dtype="float64").get_potential_energy(atoms), abs=1e-12
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"run": "nowhere"}, "is this a run directory?"),
        ({"model": MODEL, "run": "x"}, "leave out either model or run"),
        ({"version": 3}, "belongs to a run"),
        ({"model": "painn:none.safetensors"}, "there is no file 'none.safetensors'"),
        ({"model": "magic"}, "there is no back end 'magic'"),
        ({"device": "gpu"}, "cannot run on device 'gpu'"),
        ({"dtype": "float16"}, "is not float32 or float64"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: dict[str, str], said: str) -> None:
    with pytest.raises((ConfigError, PotentialError)) as told:
        Tumbaga(**arguments)
    assert said in str(told.value)
    assert "\n" not in str(told.value)


# -- in ASE ----------------------------------------------------------------------------------------------------------------------------


def test_the_potential_is_loaded_once(atoms: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calculators of the same model, device and dtype share it; they do not share their results."""
    loads: list[str] = []
    real = registry.load
    monkeypatch.setattr(registry, "load", lambda *told: loads.append(told[0]) or real(*told))
    calculator._loaded.cache_clear()
    first, second, other = Tumbaga(), Tumbaga(), Tumbaga(dtype="float64")

    assert len(loads) == 2
    assert first._slot.potential is second._slot.potential is not other._slot.potential
    assert first.get_potential_energy(atoms) != second.get_potential_energy(shaken(1))
    assert first.results["energy"] != second.results["energy"]


def test_results_are_kept_until_something_changes(atoms: Atoms) -> None:
    """Energy, forces and uncertainty of a frame are one evaluation; magnetic moments and charges change nothing, a position does."""
    calc = Tumbaga()
    calls: list[int] = []
    real = calc._slot.answer
    calc._slot.answer = lambda *told: calls.append(1) or real(*told)  # type: ignore[method-assign]
    atoms.calc = calc
    atoms.get_potential_energy()
    calls.clear()
    atoms.get_forces()
    atoms.set_initial_magnetic_moments(np.ones(len(atoms)))
    calc.get_property("force_std", atoms)
    assert calls == []
    atoms.positions[0, 0] += 1e-3
    atoms.get_forces()
    assert calls == [1]


def test_dynamics_conserve_energy(atoms: Atoms) -> None:
    """100 steps of 0.25 fs from rest, in float64: the total energy stays."""
    atoms.rattle(0.02, seed=1)
    atoms.calc = Tumbaga(dtype="float64")
    start, dynamics = atoms.get_total_energy(), VelocityVerlet(atoms, 0.25 * ase.units.fs)
    dynamics.run(100)
    assert atoms.get_kinetic_energy() > 0.01
    assert atoms.get_total_energy() == pytest.approx(start, abs=2e-3)


def test_langevin_and_optimisers_run_and_are_written(atoms: Atoms, tmp_path: Path) -> None:
    """Trajectories and extxyz files take the results; the optimiser ends where the forces are small."""
    atoms.rattle(0.1, seed=2)
    atoms.calc = Tumbaga(dtype="float64")
    with Langevin(
        atoms, 0.5 * ase.units.fs, temperature_K=300, friction=0.01, fixcm=False, trajectory=str(tmp_path / "md.traj")
    ) as dynamics:
        dynamics.run(5)
    with BFGS(atoms, logfile=None, trajectory=str(tmp_path / "opt.traj")) as optimiser:
        assert optimiser.run(fmax=0.05, steps=200)
    write(tmp_path / "last.xyz", atoms)

    assert len(read(tmp_path / "md.traj", index=":")) == 6
    assert read(tmp_path / "last.xyz").get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert "force_std" not in atoms.get_properties(["energy", "forces"])


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_a_band_relaxes(atoms: Atoms, shared: bool) -> None:
    """NEB with a calculator for each image, or one for all: its forces fall, and the images differ."""
    last = atoms.copy()
    last.positions[-1] += [0.0, 0.3, 0.1]
    images = [atoms, *(atoms.copy() for _ in range(3)), last]
    one = Tumbaga()
    for image in images:
        image.calc = one if shared else Tumbaga()
    band = NEB(images, allow_shared_calculator=shared, method="improvedtangent")
    band.interpolate()
    before = np.abs(band.get_forces()).max()
    with BFGS(band, logfile=None) as optimiser:
        optimiser.run(fmax=0.05, steps=10)

    assert np.abs(band.get_forces()).max() < before
    assert len({image.get_potential_energy() for image in images}) == 5


# -- what it refuses -------------------------------------------------------------------------------------------------------------------


def test_an_unknown_element_is_named(atoms: Atoms) -> None:
    atoms.numbers[0] = 26
    with pytest.raises(PotentialError) as told:
        Tumbaga().get_potential_energy(atoms)
    assert str(told.value) == "potential painn:cuau-water: it does not know Fe; it knows H, O, Cu, Au"


def test_partly_periodic_atoms_are_refused(atoms: Atoms) -> None:
    atoms.set_cell([20.0, 20.0, 20.0])
    atoms.pbc = (True, True, False)
    with pytest.raises(ConfigError, match="atoms: is periodic in some directions only"):
        Tumbaga().get_potential_energy(atoms)


def test_a_cluster_has_no_stress(atoms: Atoms) -> None:
    """Also with a cell, as long as nothing repeats; a sentence says why, and the other results stay."""
    atoms.set_cell([20.0, 20.0, 20.0])
    atoms.calc = Tumbaga()
    energy = atoms.get_potential_energy()
    with pytest.raises(PropertyNotImplementedError, match="the atoms are not periodic"):
        atoms.get_stress()
    assert atoms.get_potential_energy() == energy


def test_what_the_server_would_not_answer_is_refused(atoms: Atoms) -> None:
    """Overlapping atoms, and numbers that are not finite: a sentence and no number."""
    near = atoms.copy()
    near.positions[1] = near.positions[0] + 0.1
    with pytest.raises(RefusedError, match="atoms 0 and 1 are"):
        Tumbaga().get_forces(near)
    calc = Tumbaga("toy:nan?after=1")
    assert np.isfinite(calc.get_forces(atoms)).all()
    with pytest.raises(RefusedError, match="not finite"):
        calc.get_forces(shaken(1))
    assert "energy" not in calc.results


def test_an_unknown_uncertainty_is_not_a_number(atoms: Atoms) -> None:
    """A potential without a readout has none: NaN where the extras would say 1000000."""
    calc = Tumbaga("toy:lj?epsilon=0.05&sigma=0.85")
    calc.get_potential_energy(atoms)

    assert np.isnan(calc.results["force_std"])
    assert calc.results["force_std_atom"] == -1
    assert np.isnan(calc.get_property("force_stds", atoms)).all()
