"""What an engine sees of the policies: waits that end well, in vain, or with the engine; closed connections; and neighbours that notice nothing."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.units
import numpy as np
import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.testing import Program, until
from tumbaga.online.labels.testing import read_journal
from tumbaga.online.records import Array, Reason
from tumbaga.online.store import FILE, Store
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine, Forces

pytestmark = pytest.mark.slow
TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
TIMEOUT = 60.0
NEVER_SURE = 1e-3  # eV/Å, of which the potential is never sure
ONCE_UNSURE = 0.4  # critical is 1.0: of the first frame it says 1.1, and 0.9 once that is learnt
ALWAYS_SURE = 1e3


@pytest.fixture
def served(tmp_path: Path, start: Callable[..., Program]) -> Callable[..., Program]:
    """Start a server for sockets, with a policy; the labels are of Lennard-Jones."""

    def begin(
        names: list[str], policy: configs.Policy, label: str = "test:lj", force_error: float = NEVER_SURE, budget: int = 200
    ) -> Program:
        settings = configs.Config(
            serve=configs.Serve(connect=tuple(f"unix:{name}" for name in names), max_refusals=100),
            potential=configs.Potential("painn:cuau-water", str(TEMPLATE)),
            flag=configs.Flag(force_error=force_error, audit_every=10**9),
            label=configs.Label(method=label, budget=budget),
            policy=policy,
        )
        run = tmp_path / "run"
        run.mkdir()
        (run / configs.FILE).write_text(configs.dumps(settings))
        return start("serve", "--quiet")

    return begin


def places(seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    start: Array = structures.read_frame(TEMPLATE).positions
    return (start + 0.02 * rng.standard_normal(start.shape)) / ase.units.Bohr


def told(answer: Forces) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.extras)["tumbaga"]
    return found


def labels_begun(journal: Path) -> int:
    return sum(kind == "start" for kind, _, _ in read_journal(journal))


@contextlib.contextmanager
def aside(work: Callable[[], Any]) -> Any:
    """Work in a thread of its own; gives a list that holds its result once it is done."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(work()))
    thread.start()
    try:
        yield done
    finally:
        thread.join(TIMEOUT)


def test_an_engine_waits_for_its_label_and_its_neighbour_does_not(
    tmp_path: Path, served: Callable[..., Program], socket_name: Callable[[], str]
) -> None:
    """The answer comes after the label, from a version that knows it, and says so; the work of the change is in the extras."""
    journal, names = tmp_path / "journal", [socket_name()]
    with listen(Address.unix(names[0])) as listener:
        program = served(names, configs.Policy(critical="stall"), f"test:lj?delay=1.5&journal={journal}", force_error=ONCE_UNSURE)
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine:
            began = time.monotonic()
            answer = told(engine.forces(places()))
            assert time.monotonic() - began >= 1.5
            assert labels_begun(journal) == 1
            assert answer["policy"] == "stall"
            number = int(answer["version"].partition("-")[0])
            assert number >= 1
            assert answer["swap_work"] != 0.0
            # the next frames are nearly copies: not one of them waits
            for step in range(4):
                assert told(engine.forces(places(step + 1)))["policy"] == "continue"
            assert labels_begun(journal) == 1
            stalls = program.until(lambda status: status["stalls"]["all"] == 1 and not status["stalls"]["now"], "the wait to be over")[
                "stalls"
            ]
            assert stalls["in_vain"] == 0
            assert stalls["longest_s"] >= 1.5
    assert program.stop() == 0, program.output
    with contextlib.closing(Store(program.run_dir / FILE, read_only=True)) as store:
        assert next(store.reason(label.frame_id) for label in store.labels()) is Reason.STALLED


def test_others_are_answered_while_one_waits(tmp_path: Path, served: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """DESIGN.md §2, invariant 1: a wait is a matter of its own frame."""
    journal, names = tmp_path / "journal", [socket_name(), socket_name()]
    with listen(Address.unix(names[0])) as first, listen(Address.unix(names[1])) as second:
        program = served(names, configs.Policy(critical="stall"), f"test:lj?delay=4.0&journal={journal}")
        with BlockingEngine.accept(first, timeout=TIMEOUT) as waiting, BlockingEngine.accept(second, timeout=TIMEOUT) as going_on:
            told(going_on.forces(places(9)))  # its first frame: it has waited itself, and the next ones are nearly copies
            with aside(lambda: told(waiting.forces(places()))) as done:
                program.until(lambda status: status["stalls"]["now"] == 1, "a wait")
                states = {one["name"]: one["state"] for one in program.status()["sessions"]}
                assert "waiting for a label" in states.values()
                answers = [told(going_on.forces(places(step)))["policy"] for step in range(3)]
                assert done == []
            assert answers == ["continue"] * 3
            assert done[0]["policy"] in ("stall", "unsettled")
    assert program.stop() == 0, program.output


def test_a_wait_has_a_limit(tmp_path: Path, served: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """What was there before is given then, and says of itself that it was not settled; the label goes on."""
    journal, name = tmp_path / "journal", socket_name()
    with listen(Address.unix(name)) as listener:
        program = served([name], configs.Policy(critical="stall", max_stall=1.0), f"test:lj?delay=6.0&journal={journal}")
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine:
            until(lambda: program.status().get("labels"), TIMEOUT, "a learner")
            began = time.monotonic()
            answer = told(engine.forces(places()))
            assert 1.0 <= time.monotonic() - began < 5.0
            assert answer["policy"] == "unsettled"
            program.until(lambda status: status["stalls"]["in_vain"] == 1, "it to be told")
            assert any("policy.max_stall" in sentence for sentence in program.status()["errors"])
            program.until(lambda status: status["labels"]["converged"] == 1, "the label")
    assert program.stop() == 0, program.output


def test_nobody_waits_for_a_label_that_will_not_come(served: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """The first label fails; the second frame finds the budget spent."""
    name = socket_name()
    with listen(Address.unix(name)) as listener:
        program = served([name], configs.Policy(critical="stall"), "test:raise", budget=1)
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine:
            marks = [told(engine.forces(places(step)))["policy"] for step in range(40)]
            assert marks[0] == "unsettled"
            assert set(marks) == {"unsettled", "continue"}
            ended = "every wait to be in vain, and be told of"
            status = program.until(lambda status: 2 <= status["stalls"]["all"] == status["stalls"]["in_vain"], ended)
            said = " ".join(status["errors"])
            assert "the label failed" in said
            assert "the budget is spent" in said
    assert program.stop() == 0, program.output


def test_a_learner_that_is_killed_is_asked_again(tmp_path: Path, served: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """DESIGN.md §2, invariants 3 and 4: the wait outlives it, and the label is neither lost nor begun again."""
    journal, name = tmp_path / "journal", socket_name()
    with listen(Address.unix(name)) as listener:
        program = served([name], configs.Policy(critical="stall"), f"test:lj?delay=2.0&journal={journal}")
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine:
            with aside(lambda: told(engine.forces(places()))) as done:
                until(lambda: journal.exists() and labels_begun(journal) == 1, TIMEOUT, "the label to begin")
                program.restarted("learner", program.kill("learner"))
            assert done[0]["policy"] in ("stall", "unsettled")
            assert int(done[0]["version"].partition("-")[0]) >= 1
            assert labels_begun(journal) == 1
    assert program.stop() == 0, program.output


def test_an_engine_that_leaves_waits_no_longer(tmp_path: Path, served: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """The next conversation has its own first frame; the label of the last one is learnt all the same."""
    journal, name = tmp_path / "journal", socket_name()
    with listen(Address.unix(name)) as listener:
        program = served([name], configs.Policy(critical="stall"), f"test:lj?delay=2.0&journal={journal}")
        engine = BlockingEngine.accept(listener, timeout=TIMEOUT)
        program.until(lambda status: status["sessions"][0]["state"] == "connected", "the connection")
        engine._talk.timeout = 1.0  # the engine's own limit
        with engine, pytest.raises(TimeoutError):
            engine.forces(places())
        program.until(lambda status: status["stalls"]["all"] == 1 and not status["stalls"]["now"], "the wait to end")
        program.until(lambda status: status["labels"]["converged"] == 1, "the label")
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as again:
            assert told(again.forces(places(3)))["policy"] in ("stall", "unsettled")
    assert program.stop() == 0, program.output


def test_reject_closes_the_connection_and_keeps_what_led_there(served: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """A frame that does not follow from those before: the engine gets no number, the frame before is labelled, the next conversation works."""
    name = socket_name()
    with listen(Address.unix(name)) as listener:
        program = served([name], configs.Policy(critical="reject"), force_error=ALWAYS_SURE)
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine:
            rng, path = np.random.default_rng(0), places()
            for _ in range(260):
                path = path + 0.002 * rng.standard_normal(path.shape)
                assert told(engine.forces(path))["policy"] == "continue"
            jumped = path.copy()
            jumped[-1, 2] += 0.8 / ase.units.Bohr
            with pytest.raises(ConnectionError):
                engine.forces(jumped)
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as again:
            assert told(again.forces(path))["policy"] == "continue"
        status = program.until(lambda status: status["refused"] == 1 and status["labels"]["converged"] >= 2, "the labels")
        assert any("the policy is to end the session" in sentence for sentence in status["errors"])
    assert program.stop() == 0, program.output
    with contextlib.closing(Store(program.run_dir / FILE, read_only=True)) as store:
        assert Reason.PRECURSOR in {store.reason(label.frame_id) for label in store.labels()}


@pytest.mark.parametrize("engine", ["ipi", "ase"])
def test_real_engines_wait(engine: str, start: Callable[..., Program]) -> None:
    """i-PI and ASE sit through waits of seconds, and end with all their steps; the extras of i-PI's frames are there as ever."""
    told = ("--label", "test:lj?delay=2.0", "--labels", "2", "--force-error", str(NEVER_SURE), "--critical", "stall")
    program = start("run", "cuau-water", "--engine", engine, *told, "--steps", "120", "--quiet")
    assert program.end() == 0, program.output
    status = program.status()
    assert status["state"] == "finished"
    assert status["stalls"]["longest_s"] >= 2.0
    assert status["engine"]["step"] == 120
    assert status["engine"]["finite"]
    assert status["call_ms"]["max"] < 2000.0  # a wait is no slow call, and is told of by itself
    assert "waited for their labels" in program.output
