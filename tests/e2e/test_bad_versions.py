"""DESIGN.md §2, invariants 2 and 5: a version file that must not serve is refused with a sentence, and the old version goes on serving."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.units
import numpy as np
import pytest
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.backends import registry
from tumbaga.driver.backends.painn import PaiNN
from tumbaga.driver.testing import Program, until
from tumbaga.online import versions
from tumbaga.online.records import Array
from tumbaga.online.store import FILE, Store, StoredVersion
from tumbaga.online.versions import LastLayer, VersionFile
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.streams import Address, Listener, listen
from tumbaga.socket_protocol.testing import BlockingEngine

pytestmark = pytest.mark.slow
TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
MODEL = "painn:cuau-water"
TIMEOUT = 60.0
GOOD, SPREAD = 1, 1e-4  # number of the version that serves; eV^2, of its readout


@pytest.fixture(scope="module")
def potential() -> PaiNN:
    made = registry.load(MODEL, "cpu", "float64")
    assert isinstance(made, PaiNN)
    return made


class Versions:
    """Writes versions of the packaged potential into a run directory, sound ones and others.

    Args:
        run_dir: where.
        potential: whose.
    """

    def __init__(self, run_dir: Path, potential: PaiNN) -> None:
        self._run_dir, self._potential = run_dir, potential

    def readout(self, number: int) -> Array:
        """Near the potential's own, and another one for each number."""
        own = self._potential.readout()
        near: Array = own + 0.01 * np.random.default_rng(number).standard_normal(own.size)
        return near

    def write(self, number: int, readout: Array | None = None, **metadata: str) -> VersionFile:
        """A sound file, as the learner writes it, unless told otherwise."""
        sound = self.readout(number)
        weights = sound if readout is None else readout
        layer = LastLayer(weights, SPREAD * np.eye(weights.size), {"parent": 0})
        state = self._potential.state(weights if weights.shape == sound.shape else sound)
        return versions.write(self._run_dir, number, state, layer, {**self._potential.metadata, **metadata})

    def spoilt(self, number: int, fault: str) -> VersionFile:
        """A file that must not serve."""
        sound = self.readout(number)
        if fault == "another size":
            return self.write(number, sound[:-1])
        if fault == "not finite":
            return self.write(number, np.where(np.arange(sound.size) == 7, np.nan, sound))
        if fault == "other species":
            hyper: dict[str, Any] = json.loads(self._potential.metadata["hyper"])
            return self.write(number, hyper=json.dumps({**hyper, "elements": [2, 10, 18, 36][: len(hyper["elements"])]}))
        made = self.write(number)
        path = self._run_dir / made.path
        data = bytearray(path.read_bytes())
        if fault == "corrupt":
            data[len(data) // 2] ^= 1
        path.write_bytes(data[: len(data) // 2] if fault == "truncated" else data)
        if fault == "missing":
            path.unlink()
        return made


SENTENCES = {
    "missing": "No such file",
    "truncated": "cannot be read",
    "corrupt": "has changed since it was written",
    "another size": "readout weights",
    "not finite": "not finite",
}


class PlayedLearner:
    """The learner's end of the bus; without --no-learn a real one would be there. The working directory is the run directory."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._endpoint = bus.Endpoint(self._context, zmq.DEALER, bus.LEARNER, bind=False, identity=bus.LEARNER)

    def offer(self, version: VersionFile) -> None:
        """Say that a version should serve."""
        assert self._endpoint.send(bus.Serve(version.number, version.path, None, 2.0))

    def heard(self) -> bus.NowServing | None:
        """What the gateway says to that, if it has said something."""
        while (received := self._endpoint.receive()) is not None:
            if isinstance(received[1], bus.NowServing):
                return received[1]
            assert isinstance(received[1], (bus.Journal, bus.Alarm))
        return None

    def close(self) -> None:
        self._endpoint.close()
        self._context.term()


@pytest.fixture
def served(
    tmp_path: Path, start: Callable[..., Program], socket_name: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Program, Listener]]:
    """A server without a learner, where a session moves to a new version at once; the test works in the run directory, as processes do."""
    name = socket_name()
    run = settle(tmp_path, name, enabled=False)
    with listen(Address.unix(name)) as listener:
        program = start("serve", "--quiet")
        monkeypatch.chdir(run)
        yield program, listener


def settle(tmp_path: Path, name: str, *, enabled: bool) -> Path:
    """Make a run directory with settings."""
    settings = configs.Config(
        serve=configs.Serve(connect=(f"unix:{name}",)),
        potential=configs.Potential(MODEL, str(TEMPLATE)),
        label=configs.Label(method="test:lj", budget=0),
        learn=configs.Learn(enabled=enabled, ramp_steps=1, ramp_pause=0),
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / configs.FILE).write_text(configs.dumps(settings))
    return run


class Watched:
    """An engine that asks for the same few frames over and over, and knows what it was told.

    Args:
        engine: connected.
    """

    def __init__(self, engine: BlockingEngine) -> None:
        self._engine = engine
        places = structures.read_frame(TEMPLATE).positions / ase.units.Bohr
        self._frames = [places + np.random.default_rng(seed).normal(scale=0.02, size=places.shape) for seed in range(3)]
        self.version = ""

    def answers(self) -> list[bytes]:
        """Every bit of all answers, the extras aside."""
        told = []
        for frame in self._frames:
            got = self._engine.forces(frame)
            self.version = json.loads(got.extras)["tumbaga"]["version"]
            told.append(b"".join((np.float64(got.energy).tobytes(), got.forces.tobytes(), got.virial.tobytes())))
        return told


def published(learner: PlayedLearner, version: VersionFile, watched: Watched) -> bus.NowServing:
    """Offer a version and have forces computed until the gateway has said what became of it."""
    learner.offer(version)
    deadline = time.monotonic() + TIMEOUT
    while (told := learner.heard()) is None or told.version != version.number:
        watched.answers()
        assert time.monotonic() < deadline, f"nothing was heard of version {version.number}"
    return told


def test_bad_versions_are_refused_under_load(served: tuple[Program, Listener], potential: PaiNN) -> None:
    """The session gets the forces of the version before to the last bit, the sentences are in the status, and the next good one serves."""
    program, listener = served
    made = Versions(program.run_dir, potential)
    with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine, contextlib.closing(PlayedLearner()) as learner:
        watched = Watched(engine)
        base = watched.answers()
        good = made.write(GOOD)
        assert published(learner, good, watched).error == ""
        before = watched.answers()
        assert before != base
        assert watched.version == f"{GOOD}-{good.hash[:8]}"

        for number, (fault, sentence) in enumerate(SENTENCES.items(), GOOD + 1):
            told = published(learner, made.spoilt(number, fault), watched)
            assert sentence in told.error
            for _ in range(5):
                assert watched.answers() == before, fault
                assert watched.version == f"{GOOD}-{good.hash[:8]}"
        refused = program.until(lambda status: len(status["errors"]) == len(SENTENCES), "the sentences")["errors"]
        for number, (told_of, sentence) in enumerate(zip(refused, SENTENCES.values(), strict=True), GOOD + 1):
            assert told_of.startswith(f"version {number} was refused: ")
            assert sentence in told_of
        program.until(lambda status: status["serving_version"] == GOOD, "the good version to be told of")

        last = made.write(GOOD + 1 + len(SENTENCES))
        assert published(learner, last, watched).error == ""
        assert watched.answers() not in (before, base)
        assert watched.version == f"{last.number}-{last.hash[:8]}"
    assert program.stop() == 0, program.output
    assert program.status()["evaluator_restarts"] == 0


def test_a_version_for_other_species_is_refused(served: tuple[Program, Listener], potential: PaiNN) -> None:
    """As many elements, and so as many weights, but others: what the file itself says of them is looked at."""
    program, listener = served
    made = Versions(program.run_dir, potential)
    with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine, contextlib.closing(PlayedLearner()) as learner:
        watched = Watched(engine)
        before = watched.answers()
        assert published(learner, made.spoilt(1, "other species"), watched).error != ""
        assert watched.answers() == before


CALLS = 100


def unphysical(served: tuple[Program, Listener], potential: PaiNN) -> tuple[list[bytes], list[list[bytes]]]:
    """Have a good version serve, then one with weights that are finite and give no frame a force fit to be served; return the answers of both."""
    program, listener = served
    made = Versions(program.run_dir, potential)
    with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine, contextlib.closing(PlayedLearner()) as learner:
        watched = Watched(engine)
        assert published(learner, made.write(GOOD), watched).error == ""
        before = watched.answers()
        published(learner, made.write(2, 1e6 * made.readout(2)), watched)
        return before, [watched.answers() for _ in range(CALLS)]


def test_unphysical_weights_never_reach_the_engine(served: tuple[Program, Listener], potential: PaiNN) -> None:
    """Every answer is one of a version that was good, and the sentence is in the status; the session goes on."""
    before, after = unphysical(served, potential)
    program, _ = served
    limit = 1000.0 * ase.units.Bohr / ase.units.Ha  # the guards' own, eV/Å
    atoms = len(structures.read_frame(TEMPLATE))
    for answer in (one for answers in (before, *after) for one in answers):
        numbers = np.frombuffer(answer, np.float64)
        assert np.isfinite(numbers).all()
        assert np.abs(numbers[1 : 1 + 3 * atoms]).max() < limit
    status = program.until(lambda status: status["errors"], "the sentence")
    assert "evaluated again with version" in " ".join(status["errors"])
    assert status["refused"] == 0


def test_unphysical_weights_leave_the_version_before_at_work(served: tuple[Program, Listener], potential: PaiNN) -> None:
    """DESIGN.md §2, invariant 2: it is the last good version that answers, bit for bit, and not an older one."""
    before, after = unphysical(served, potential)
    assert [answers == before for answers in after] == [True] * CALLS


def test_unphysical_weights_do_not_fill_the_log(served: tuple[Program, Listener], potential: PaiNN) -> None:
    """Weeks of it would fill the disk; what happens again and again is told at 1, 2, 4, 8 … times elsewhere."""
    unphysical(served, potential)
    program, _ = served
    assert program.stop() == 0
    lines = (program.run_dir / "log" / "gateway.jsonl").read_text().splitlines()
    assert len(lines) < CALLS


@pytest.mark.parametrize("fault", ["corrupt", "truncated"])
def test_a_version_that_rotted_on_disk_does_not_serve_after_a_restart(
    fault: str, tmp_path: Path, start: Callable[..., Program], socket_name: Callable[[], str], potential: PaiNN
) -> None:
    """The newest file of a run directory is damaged: learner and gateway say so, and the version before it serves."""
    name = socket_name()
    run = settle(tmp_path, name, enabled=True)
    made = Versions(run, potential)
    files = [made.write(0, potential.readout()), made.write(1), made.spoilt(2, fault)]
    store = Store(run / FILE)
    for file in files:
        store.add_version(StoredVersion(file.number, file.hash, file.number - 1 if file.number else None, file.path, "served", 0, {}))
    store.close()
    serving = {"version": 2, "path": files[2].path, "lpr_scale": None, "quantile": 2.0}
    (run / versions.FOLDER / versions.SERVING).write_text(json.dumps(serving))

    with listen(Address.unix(name)) as listener:
        program = start("serve", "--quiet")
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine:
            watched = Watched(engine)
            until(lambda: watched.answers() and watched.version.startswith("1-"), TIMEOUT, "version 1 to serve")
            frame = structures.read_frame(TEMPLATE)
            truth = potential.predict([frame], made.readout(1)[None])[0]
            got = engine.forces(frame.positions / ase.units.Bohr)
            np.testing.assert_allclose(got.forces * ase.units.Ha / ase.units.Bohr, truth.forces, atol=2e-4)  # float32 serves
            status = program.until(lambda status: status["errors"] and status["serving_version"] == 1, "the sentence")
            assert any("version 2 was refused" in sentence and SENTENCES[fault] in sentence for sentence in status["errors"]), status
    assert program.stop() == 0, program.output
    assert "version refused" in (run / "log" / "learner.jsonl").read_text()
    with contextlib.closing(Store(run / FILE, read_only=True)) as read:
        assert [version.state for version in read.versions()] == ["served", "served", "refused"]
