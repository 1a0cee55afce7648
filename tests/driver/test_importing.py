"""Labels that were computed elsewhere: one level of theory, nothing twice, and a run learns from them when it starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from tumbaga.driver import cli, learner_process
from tumbaga.driver import config as configs
from tumbaga.driver.errors import RunDirError
from tumbaga.driver.learner_process import LearnerProcess
from tumbaga.driver.rundir import RunDir
from tumbaga.online.records import Frame, Label, Reason, Role
from tumbaga.online.store import FILE, Store
from tumbaga.online.testing import ToyTrainable
from tumbaga.socket_protocol import bus

METHOD = "test:lj/epsilon0.2/offset-1000"  # as the method of SETTINGS names itself
SETTINGS = configs.Config(potential=configs.Potential(model="painn:cuau-water"), label=configs.Label(method="test:lj"))
Tumbaga = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tumbaga(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tumbaga:
    """Runs the command line in this process, in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tumbaga", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


def frames(n: int, first: int = 0, symbols: str = "OH2") -> list[Atoms]:
    """Molecules with labels of about -5e4 eV an atom."""
    made = []
    for seed in range(first, first + n):
        rng = np.random.default_rng(seed)
        positions = np.array([[0.0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]) + 0.1 * rng.standard_normal((3, 3))
        atoms = Atoms(symbols, positions)
        atoms.calc = SinglePointCalculator(atoms, energy=-53210.1 * 3 + rng.standard_normal(), forces=rng.standard_normal((3, 3)))
        made.append(atoms)
    return made


def exported(tumbaga: Tumbaga, run: str, n: int = 6, method: str = METHOD) -> Path:
    """A file of a run's labels, every third held out."""
    Path(run).mkdir()
    with Store(Path(run) / FILE) as store:
        for seed in range(n):
            one = Frame(np.array([8, 1, 1]), np.random.default_rng(seed).standard_normal((3, 3)))
            flagged = store.add_flag(
                one, session="s", step=0, reason=Reason.INITIAL, score=0.0, version=0, energy=0.0, forces=np.zeros((3, 3))
            )
            store.enqueue(flagged, Reason.INITIAL, Role.TRAIN if seed % 3 else Role.HOLDOUT, 1.0)
            label = Label(-53210.123456789 * 3 + seed / 3, np.random.default_rng([seed, 1]).standard_normal((3, 3)), method, 2.5)
            store.add_label(store.start_task(flagged, "w", 1), label)
    assert tumbaga("export", run, "--to", "extxyz")[0] == 0
    return Path(f"{run}-labels.extxyz")


def stored(run: str) -> list[tuple[str, float, str, str]]:
    with Store(Path(run) / FILE, read_only=True) as store:
        return [(one.frame.key, one.label.energy, one.label.method, one.role.value) for one in store.labels()]


def begun(run: str, settings: configs.Config = SETTINGS) -> None:
    """The directory of a run that has been started before."""
    Path(run).mkdir()
    (Path(run) / configs.FILE).write_text(configs.dumps(settings))


def test_labels_of_one_run_are_labels_of_another(tumbaga: Tumbaga) -> None:
    """An export that is imported gives the same frames, energies, methods and roles to the last bit; a second time it gives nothing."""
    file = exported(tumbaga, "first")
    code, said, _ = tumbaga("import", "second", str(file))

    assert code == 0
    assert f"second: 6 labels of {METHOD} taken (4 to learn from, 2 held out)" in said
    assert "the run that is started with --run-dir second learns from them" in said
    assert stored("second") == stored("first")
    with Store(Path("second") / FILE, read_only=True) as store:
        label = store.labels()[0].label
        assert (label.seconds, label.details) == (2.5, {"imported": f"{file}#0"})
        assert store.spent() == (0, 0.0)
    code, said, _ = tumbaga("import", "second", str(file))
    assert code == 0
    assert said == f"second: 0 labels of {METHOD} taken; 6 were known already\n"
    assert stored("second") == stored("first")


def test_a_file_of_others_needs_the_level_of_theory(tumbaga: Tumbaga) -> None:
    """A file that does not say its method is taken with --method only, every fourth frame held out."""
    write("train.extxyz", frames(8))
    code, _, error = tumbaga("import", "run", "train.extxyz")

    assert code == 2
    assert "--method: must say the level of theory of these labels: train.extxyz#0 does not" in error
    assert tumbaga("import", "run", "train.extxyz", "--method", "vasp:pbe")[0] == 0
    assert [role for *_, role in stored("run")] == ["train", "holdout", "train", "train", "train", "holdout", "train", "train"]
    assert {method for _, _, method, _ in stored("run")} == {"vasp:pbe"}


@pytest.mark.parametrize("role", ["train", "holdout"])
def test_what_they_are_for_can_be_said(tumbaga: Tumbaga, role: str) -> None:
    """--role goes before what the file says."""
    file = exported(tumbaga, "first")
    tumbaga("import", "second", str(file), "--role", role)

    assert {found for *_, found in stored("second")} == {role}


def test_levels_of_theory_are_not_mixed(tumbaga: Tumbaga) -> None:
    """Labels of another method than the run's are refused, nothing is stored, and --as is the way for whoever knows better, on record."""
    begun("run")
    write("train.extxyz", frames(3))
    code, _, error = tumbaga("import", "run", "train.extxyz", "--method", "vasp:pbe")

    assert code == 2
    assert f"train.extxyz#0 is of 'vasp:pbe', but this run's labels are of '{METHOD}', and levels of theory are never mixed" in error
    assert stored("run") == []
    assert tumbaga("import", "run", "train.extxyz", "--method", "vasp:pbe", "--as", METHOD)[0] == 0
    with Store(Path("run") / FILE, read_only=True) as store:
        assert [(one.label.method, one.label.details["method_said"]) for one in store.labels()] == [(METHOD, "vasp:pbe")] * 3
    code, _, error = tumbaga("import", "run", "train.extxyz", "--as", "vasp:pbe")
    assert code == 2
    assert f"--as: is 'vasp:pbe', but this run's labels are of '{METHOD}'" in error


def test_a_directory_that_has_not_begun_has_one_level_of_theory_as_well(tumbaga: Tumbaga) -> None:
    """The first labels decide; a file that holds two methods, or says another one than the command, is refused whole."""
    first, other = exported(tumbaga, "first"), exported(tumbaga, "other", method="test:b")
    Path("both.extxyz").write_text(first.read_text() + other.read_text().replace("2.5", "2.6"))

    assert "both.extxyz#6 is of 'test:b', but the labels before it are of" in tumbaga("import", "run", "both.extxyz")[2]
    assert "--method: is 'test:c', but first-labels.extxyz#0 says" in tumbaga("import", "run", str(first), "--method", "test:c")[2]
    assert stored("run") == []
    tumbaga("import", "run", str(first))
    assert "is of 'test:b', but this run's labels are of" in tumbaga("import", "run", str(other))[2]
    assert stored("run") == stored("first")


def test_a_run_that_goes_on_is_left_alone(tumbaga: Tumbaga) -> None:
    """While somebody holds the directory nothing is imported, and the sentence says how to stop the run."""
    begun("run")
    write("train.extxyz", frames(3))
    held = RunDir(Path("run"))
    held.hold()
    try:
        code, _, error = tumbaga("import", "run", "train.extxyz", "--method", METHOD)
    finally:
        held.release()

    assert code == 2
    assert "is in use by process" in error
    assert "stop that run first (tumbaga stop" in error
    assert not (Path("run") / FILE).exists()
    assert tumbaga("import", "run", "train.extxyz", "--method", METHOD)[0] == 0


def test_frames_that_the_potential_does_not_know(tumbaga: Tumbaga) -> None:
    """A frame of other elements would end the learner: it is named before anything is stored, and can be left out."""
    begun("run")
    write("train.extxyz", [*frames(2), *frames(1, 2, "OHCl"), *frames(1, 3)])
    code, _, error = tumbaga("import", "run", "train.extxyz", "--method", METHOD)

    assert code == 2
    assert "data train.extxyz#2: holds Cl, which the run's potential does not know; choose frames with --only" in error
    assert stored("run") == []
    assert tumbaga("import", "run", "train.extxyz", "--method", METHOD, "--only", "O,H")[0] == 0
    assert len(stored("run")) == 3


def test_what_waits_for_its_label_needs_none_any_more(tumbaga: Tumbaga) -> None:
    """A frame of the queue whose label is imported is labelled; nobody computes it again."""
    begun("run")
    one = Frame(np.array([8, 1, 1]), frames(1)[0].positions)
    with Store(Path("run") / FILE) as store:
        number = store.add_flag(
            one, session="s", step=0, reason=Reason.UNCERTAIN, score=0.0, version=0, energy=0.0, forces=np.zeros((3, 3))
        )
        store.enqueue(number, Reason.UNCERTAIN, Role.TRAIN, 1.0)
    write("train.db", frames(1))  # ASE's text has eight decimals, which make another frame of it
    tumbaga("import", "run", "train.db", "--method", METHOD)

    with Store(Path("run") / FILE, read_only=True) as store:
        assert store.label_state(one.key) == (number, "labelled")
        assert store.pending() == []
        assert len(store.labels(METHOD)) == 1


def test_damaged_frames_stop_an_import_or_are_left_out(tumbaga: Tumbaga) -> None:
    """Without --skip-bad a bad frame stops everything before anything is stored."""
    bad = frames(3)
    bad[1].calc.results["forces"][0, 0] = np.nan
    write("train.extxyz", bad)

    assert tumbaga("import", "run", "train.extxyz", "--method", METHOD)[0] == 2
    assert not Path("run").exists()
    code, _, error = tumbaga("import", "run", "train.extxyz", "--method", METHOD, "--skip-bad")
    assert code == 0
    assert "left out 1 frame" in error
    assert len(stored("run")) == 2


class Reporter:
    """Takes log lines and states."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def log(self, level: str, event: str, **detail: Any) -> None:
        self.events.append(event)

    def state(self, **state: Any) -> None:
        pass


def test_a_run_learns_from_what_was_imported(tumbaga: Tumbaga, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that were there before the first start, and others that came between two starts, each give a version."""
    weights = np.random.default_rng(0).standard_normal(8)
    monkeypatch.setattr(learner_process, "_trainable", lambda _: ToyTrainable((1, 8), weights, n_gaussians=2))
    run = Path("run").absolute()
    run.mkdir()
    bus.make_folder(run)
    versions = []
    for first in (0, 20):
        write("train.extxyz", frames(20, first))
        assert tumbaga("import", "run", "train.extxyz", "--method", METHOD)[0] == 0
        monkeypatch.chdir(run)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        learner = LearnerProcess(run, SETTINGS, context, Reporter())  # type: ignore[arg-type]
        try:
            learner.turn()
            versions.append([(one.number, one.labels) for one in learner._store.versions()])
            assert learner._learner.n_labels == 20 + first
        finally:
            learner.close()
            learner.gateway.close()
            learner.workers.close()
            context.term()
        monkeypatch.chdir(run.parent)

    assert versions == [[(0, 0), (1, 20)], [(0, 0), (1, 20), (2, 40)]]


def test_a_potential_that_came_later_and_does_not_know_them(tumbaga: Tumbaga, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that were imported before anybody said which potential it would be: the learner says what is wrong instead of dying of it."""
    monkeypatch.setattr(learner_process, "_trainable", lambda _: ToyTrainable((1, 8), np.zeros(8), n_gaussians=2))
    write("train.extxyz", frames(2, 0, "OHCl"))
    assert tumbaga("import", "run", "train.extxyz", "--method", METHOD)[0] == 0

    with pytest.raises(
        RunDirError, match=r"holds labels with Cl, which toy.* does not know; choose another directory, and import with --only"
    ):
        LearnerProcess(Path("run"), SETTINGS, None, Reporter())  # type: ignore[arg-type]


def test_the_command_line_of_export(tumbaga: Tumbaga) -> None:
    """It says where the file is and of what; a bad prefix and a run without a store are sentences."""
    exported(tumbaga, "first")
    code, said, _ = tumbaga("export", "first", "--to", "ase-db", "--role", "holdout")

    assert (code, said) == (0, f"first-labels-holdout.db: 2 frames, {METHOD}\n")
    assert "first-labels-holdout.db is there already" in tumbaga("export", "first", "--to", "ase-db", "--role", "holdout")[2]
    assert tumbaga("export", "first", "--to", "ase-db", "--role", "holdout", "--force")[0] == 0
    assert "--prefix: is 'a b'" in tumbaga("export", "first", "--to", "extxyz", "--prefix", "a b")[2]
    assert "run directory nowhere: has no store.sqlite" in tumbaga("export", "nowhere", "--to", "extxyz")[2]
