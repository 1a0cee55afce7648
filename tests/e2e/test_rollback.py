"""DESIGN.md §2, invariants 5 and 6, in whole runs: every force is traced, any version is gone back to at once, and a bad one leaves by itself."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ase.units
import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import provenance, rolling_back, structures
from tumbaga.driver.backends import registry
from tumbaga.driver.backends.painn import PaiNN
from tumbaga.driver.testing import Program, command
from tumbaga.online import versions
from tumbaga.online.guards import MAX_FORCE
from tumbaga.online.records import Array
from tumbaga.online.store import FILE, Store, StoredVersion
from tumbaga.online.versions import LastLayer, VersionFile
from tumbaga.socket_protocol.streams import Address, Listener, listen
from tumbaga.socket_protocol.testing import BlockingEngine

pytestmark = pytest.mark.slow
TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
MODEL = "painn:cuau-water"
TIMEOUT = 120.0
CANARY_CALLS = 30
STATES = ("served", "served", "accepted")


def settle(tmp_path: Path, *names: str, **label: Any) -> Path:
    """Make a run directory with settings: short ramps, and labels wanted all the time."""
    settings = configs.Config(
        serve=configs.Serve(connect=tuple(f"unix:{name}" for name in names)),
        potential=configs.Potential(MODEL, str(TEMPLATE)),
        flag=configs.Flag(force_error=0.02, spacing=5),
        label=configs.Label(method="test:lj", **label),
        learn=configs.Learn(ramp_steps=15, ramp_pause=10, canary_calls=CANARY_CALLS, finetune_every=0),
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / configs.FILE).write_text(configs.dumps(settings))
    return run


class Walker:
    """An engine that asks for one frame after the other, and keeps what it was told of each.

    Args:
        listener: where the server comes to.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener, self._random = listener, np.random.default_rng(3)
        self._start = structures.read_frame(TEMPLATE).positions / ase.units.Bohr
        self.told: list[dict[str, Any]] = []  # of every call: version, ramp, swap_work …
        self.largest = 0.0  # force, eV/Å
        self._engine: BlockingEngine | None = None

    def connect(self) -> None:
        """Begin a conversation, the old one ends."""
        self.close()
        self._engine = BlockingEngine.accept(self._listener, timeout=TIMEOUT)

    def calls(self, number: int) -> None:
        """So many more force calls."""
        assert self._engine is not None
        for _ in range(number):
            got = self._engine.forces(self._start + self._random.normal(scale=0.03, size=self._start.shape))
            assert np.isfinite(got.forces).all()
            self.largest = max(self.largest, float(np.linalg.norm(got.forces, axis=1).max() * ase.units.Ha / ase.units.Bohr))
            self.told.append(json.loads(got.extras)["tumbaga"])

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Force calls until something has come about."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}; last told {self.told[-1:]}"
            self.calls(5)

    @property
    def version(self) -> int:
        """The number of the version of the last call."""
        return int(self.told[-1]["version"].partition("-")[0]) if self.told else -1

    @property
    def alone(self) -> bool:
        """Whether it served alone."""
        return bool(self.told and self.told[-1]["ramp"] == 1.0)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


@pytest.mark.drill
@pytest.mark.timeout(600)  # many commands, each with a start of its own
def test_every_force_is_traced_and_a_version_is_gone_back_to(
    tmp_path: Path, start: Callable[..., Program], socket_name: Callable[[], str]
) -> None:
    """What each answer said of its version is what trace says of it, over ramps, a rollback, a killed learner and a second conversation."""
    name = socket_name()
    run = settle(tmp_path, name)
    with listen(Address.unix(name)) as listener, contextlib.closing(Walker(listener)) as walker:
        program = start("serve", "--quiet")
        walker.connect()
        walker.until(lambda: walker.version >= 2 and walker.alone, "two versions to be learnt")

        said = command("rollback", str(run), "1", seconds=TIMEOUT)
        assert said.returncode == 0, said.stderr
        assert "back to version 1; it is pinned" in said.stdout
        walker.calls(2)
        assert walker.version == 1 or not walker.alone  # at once: the ramp of a new version may end first
        walker.until(lambda: walker.version == 1 and walker.alone, "version 1 to serve")
        pinned = program.until(lambda status: status["pinned"] == 1, "the pin to be told of")
        walker.connect()
        walker.until(lambda: program.status()["labels"]["converged"] > pinned["labels"]["converged"], "labels to come while it is pinned")
        walker.calls(40)
        assert walker.version == 1
        assert program.status()["versions"] == pinned["versions"]
        assert "version 1 is pinned" in command("status", str(run)).stdout

        dead = program.kill("learner")
        assert command("rollback", str(run), "--release", "--timeout", "60", seconds=TIMEOUT).returncode == 0
        program.restarted("learner", dead)
        walker.until(lambda: walker.version > 1 and walker.alone, "a newer version after the release")
        walker.close()
        time_to_tell(program)
    assert program.stop() == 0, program.output

    copy = tmp_path / "elsewhere"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("bus"))
    with Store(copy / FILE, read_only=True) as store:
        held = provenance.conversations(store)
        assert sum(one.calls for one in held) == len(walker.told)
        for number, told in enumerate(walker.told):
            traced = provenance.trace(store, *provenance.find(store, None, call=number))
            assert (traced["version"], pytest.approx(traced["weight"])) == (told["version"], told["ramp"]), number
        last = store.versions()[-1]
        labels = {one.label for one in store.taught(last.number)}
        assert labels == {one.id for one in store.labels() if one.id in labels}
        work = sum(ramp.work_ev or 0.0 for ramp in store.ramps())
        assert work == pytest.approx(walker.told[-1]["swap_work"], abs=1e-9)
    shown = command("trace", str(copy), "--call", str(len(walker.told) - 1), "--json")
    traced = json.loads(shown.stdout)
    assert traced["version"] == walker.told[-1]["version"]
    assert [one["number"] for one in traced["lineage"]][-1] == 0
    assert {one["label"] for one in traced["lineage"][0]["labels"]} == {
        one for version in [int(traced["version"].partition("-")[0])] for one in _labels(copy, version)
    }
    said = command("trace", str(copy), "3", "--conversation", "1")
    assert said.stdout.startswith("step 3, force call 3 of unix:"), said
    table = command("versions", str(copy)).stdout
    assert table.count("withdrawn") >= 1
    assert json.loads(command("versions", str(copy), "--json").stdout)["pinned"] is None
    assert command("rollback", str(copy), "0").stdout.startswith(f"{copy}: from version {last.number} back to version 0; it is pinned")
    assert "version 0 is pinned" in command("status", str(copy)).stdout


def _labels(run: Path, version: int) -> list[int]:
    with Store(run / FILE, read_only=True) as store:
        return store.version_labels(version)


def time_to_tell(program: Program) -> None:
    """The learner has noted all conversations that are over; it is told of them with the next report."""

    def noted() -> bool:
        with Store(program.run_dir / FILE, read_only=True) as store:
            return all(one.over for one in provenance.conversations(store))

    program.until(lambda status: noted(), "the store to know of the end of the conversation")


def test_a_step_is_that_of_i_pi(start: Callable[..., Program], table: Callable[[Program], np.ndarray]) -> None:
    """What was served at a step that trace names is what i-PI wrote for that step, before and after a restart from where it was stopped."""
    # every fifth step is flagged, and i-PI writes every tenth
    options = ("run", "cuau-water", "--label", "test:lj", "--force-error", "0.02", "--set", "flag.spacing=5", "--steps", "1000000")
    least = 110  # i-PI keeps its state every 100 steps
    for _ in range(2):
        program = start(*options)
        program.until(lambda status: status["state"] == "running" and status["steps"] >= least, f"{least} steps", TIMEOUT)  # noqa: B023
        assert program.stop() == 0, program.output
        least = program.status()["steps"] + 50
    potentials = {int(row[0]): float(row[4]) for row in table(program)}
    with Store(program.run_dir / FILE, read_only=True) as store:
        held = provenance.conversations(store)
        assert len(held) == 2
        assert [one.over for one in held] == [True, True]
        assert held[0].step == 0
        assert held[1].step is not None
        assert held[1].step % 100 == 0
        assert 100 <= held[1].step < held[0].calls  # the forces of the step that it goes on from are asked for again
        flags = {flag.step: flag.energy for flag in store.flags_between(held[0].session, 0, 10**9)}
        checked = [0, 0]
        for step, energy in potentials.items():
            conversation, call = provenance.find(store, step)
            number = conversation.first_call + call
            if number in flags:
                assert flags[number] == pytest.approx(energy, rel=5e-7), step  # i-PI has another Hartree in its last digits
                checked[conversation.number - 1] += 1
        assert min(checked) >= 2
        with pytest.raises(provenance.TraceError, match="there is no step"):
            provenance.find(store, held[1].step + held[1].calls)


@pytest.fixture(scope="module")
def potential() -> PaiNN:
    made = registry.load(MODEL, "cpu", "float64")
    assert isinstance(made, PaiNN)
    return made


def written(run: Path, potential: PaiNN, number: int, readout: Array) -> VersionFile:
    layer = LastLayer(readout, 1e-4 * np.eye(readout.size), {"parent": number - 1 if number else None})
    return versions.write(run, number, potential.state(readout), layer, potential.metadata)


def add(store: Store, file: VersionFile, state: str) -> None:
    store.add_version(StoredVersion(file.number, file.hash, file.number - 1 if file.number else None, file.path, state, 0, {}))


def with_next(run: Path, potential: PaiNN, readout: Array, states: Sequence[str] = STATES) -> list[VersionFile]:
    """Have version 1 serve and version 2, with a readout, come next; the store knows as many as there are states."""
    own = potential.readout()
    readouts = [own, own + 0.01 * np.random.default_rng(1).standard_normal(own.size), readout]
    files = [written(run, potential, number, readout) for number, readout in enumerate(readouts)]
    with Store(run / FILE) as store:
        for file, state in zip(files, states, strict=False):
            add(store, file, state)
    serving = {"version": 1, "path": files[1].path, "lpr_scale": None, "quantile": 2.0}
    (run / versions.FOLDER / versions.SERVING).write_text(json.dumps(serving))
    return files


def withdrawn(run: Path) -> bool:
    with Store(run / FILE, read_only=True) as read:
        return read.versions()[2].state == "withdrawn"


def test_a_poisoned_version_is_withdrawn_by_itself(
    tmp_path: Path, start: Callable[..., Program], socket_name: Callable[[], str], potential: PaiNN
) -> None:
    """A version that the gate let pass and whose forces are beyond the guards: no such number leaves, and the version before serves again."""
    name = socket_name()
    run = settle(tmp_path, name, budget=0)
    files = with_next(run, potential, 1e6 * potential.readout())

    with listen(Address.unix(name)) as listener, contextlib.closing(Walker(listener)) as walker:
        program = start("serve", "--quiet")
        walker.connect()
        walker.until(lambda: withdrawn(run), "the poisoned version to be withdrawn")
        walker.until(lambda: program.status()["serving_version"] == 1, "the one before to serve again")
        walker.calls(60)
        assert {told["version"] for told in walker.told[-40:]} == {f"1-{files[1].hash[:8]}"}
        assert all(told["ramp"] == 1.0 for told in walker.told[-40:])
    assert walker.largest < MAX_FORCE
    assert program.stop() == 0, program.output
    status = program.status()
    assert (status["refused"], status["serving_version"], status["versions"]) == (0, 1, 3)
    with Store(run / FILE, read_only=True) as read:
        assert [version.state for version in read.versions()] == ["served", "served", "withdrawn"]
        (event,) = read.events(rolling_back.EVENT)
        for number, told in enumerate(walker.told):
            traced = provenance.trace(read, *provenance.find(read, None, call=number))
            assert (traced["version"], pytest.approx(traced["weight"])) == (told["version"], told["ramp"]), number
    assert (event["before"], event["after"], event["by"]) == (2, 1, "alarm")
    assert "not fit to be served" in event["reason"]


@pytest.mark.parametrize("bad", [False, True], ids=["good", "poisoned"])
def test_of_two_engines_one_tries_a_version_first(
    bad: bool, tmp_path: Path, start: Callable[..., Program], socket_name: Callable[[], str], potential: PaiNN
) -> None:
    """The other has a good version when the first was served by it for a while, and never sees anything of a poisoned one."""
    names = [socket_name(), socket_name()]
    run = settle(tmp_path, *names, budget=0)
    own = potential.readout()
    files = with_next(
        run, potential, 1e6 * own if bad else own + 0.01 * np.random.default_rng(2).standard_normal(own.size), states=STATES[:2]
    )
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listen(Address.unix(name))) for name in names]
        first, other = (stack.enter_context(contextlib.closing(Walker(listener))) for listener in listeners)
        program = start("serve", "--quiet")
        for walker in (first, other):
            walker.connect()
            walker.calls(5)
        first.calls(5)  # it is the livelier one
        program.until(lambda status: status["sessions"][0]["forces"] == 10, "the calls to be counted")
        with Store(run / FILE) as store:
            add(store, files[2], STATES[2])
        program.kill("learner")  # the next one finds the version and wants it

        def tried() -> bool:
            return first.version == 2 and first.alone

        if bad:
            first.until(lambda: other.calls(1) or withdrawn(run), "the version to be withdrawn")
        else:
            first.until(tried, "the version to be tried")
            other.calls(20)
            first.until(lambda: program.status()["serving_version"] == 2, "the version to be for all")
        other.calls(40)
        program.until(lambda status: status["sessions"][1]["forces"] >= 45, "the calls to be counted")
    assert program.stop() == 0, program.output
    seen = [told["version"].partition("-")[0] for told in other.told]
    assert seen[:25] == ["1"] * 25
    assert set(seen[-20:]) == {"1" if bad else "2"}
    assert all(told["ramp"] == 1.0 for told in other.told) == bad
    if bad:
        log = [json.loads(line) for line in (run / "log" / "gateway.jsonl").read_text().splitlines()]
        assert {line["session"] for line in log if line["event"] == "evaluated again"} == {program.status()["sessions"][0]["name"]}
    else:
        alone = [told for told in first.told if told["version"].startswith("2-") and told["ramp"] == 1.0]
        assert len(alone) >= CANARY_CALLS
    with Store(run / FILE, read_only=True) as read:
        assert read.versions()[2].state == ("withdrawn" if bad else "served")
    assert max(first.largest, other.largest) < MAX_FORCE
