"""Labels under faults, all in one run: `benchmarks/label_drills.py` does the same in numbers, with the learner and the disk, and times the forces."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tumbaga.driver import config as configs
from tumbaga.driver import structures
from tumbaga.driver.testing import Program, until
from tumbaga.online.labels.testing import read_journal
from tumbaga.online.store import FILE, Store
from tumbaga.socket_protocol.streams import Address, listen
from tumbaga.socket_protocol.testing import BlockingEngine

pytestmark = pytest.mark.slow
TEMPLATE = Path(structures.__file__).parent / "data" / "cuau-water.xyz"
KILLS = int(os.environ.get("TUMBAGA_KILLS", "6"))
TIMEOUT = 120.0
LABELLER = """
import os, time
import numpy as np
from tumbaga.online.labels.testing import lennard_jones
from tumbaga.online.records import Frame

def note(journal, what, frame):
    with open(journal, "a") as file:
        file.write(f"{what} {frame.key} {os.getpid()}\\n")

def label(atoms, folder):
    frame, journal = Frame(atoms.numbers, atoms.positions), os.path.join(folder, "journal")
    note(journal, "start", frame)
    for fault in ("hang", "memory"):
        try:
            os.unlink(os.path.join(folder, fault))
        except FileNotFoundError:
            continue
        note(journal, fault, frame)
        eaten = []
        while True:
            time.sleep(0.01)
            if fault == "memory":
                eaten.append(np.ones(5_000_000))
    time.sleep(0.3)
    energy, forces = lennard_jones(frame, 0.2)
    note(journal, "end", frame)
    return energy, forces
"""


@pytest.mark.drill
def test_no_label_is_lost_or_done_twice_by_faults(tmp_path: Path, start: Callable[..., Program], socket_name: Callable[[], str]) -> None:
    """Workers killed at random, a label that hangs and one that eats memory: every other label is computed once and stored once, the two are
    failures with their reasons, tried once, and the engine is served all the while."""
    (tmp_path / "mine.py").write_text(LABELLER)
    name, journal, chance = socket_name(), tmp_path / "journal", random.Random(1)
    settings = configs.Config(
        serve=configs.Serve(connect=(f"unix:{name}",)),
        potential=configs.Potential(template=str(TEMPLATE)),
        flag=configs.Flag(force_error=1e-4, spacing=1),
        label=configs.Label(
            method=f"call:{tmp_path / 'mine.py'}:label",
            options={"folder": str(tmp_path)},
            budget=10_000,
            time_limit=12.0,
            memory_gb=0.6,
            attempts=100,
        ),
        learn=configs.Learn(finetune_every=0),
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / configs.FILE).write_text(configs.dumps(settings))
    positions = structures.read_frame(TEMPLATE).positions / 0.529177

    def count(what: str) -> int:
        return sum(said == what for said, _, _ in read_journal(journal))

    with listen(Address.unix(name)) as listener:
        program = start("serve", "--quiet")
        with BlockingEngine.accept(listener, timeout=TIMEOUT) as engine:
            calls = 0

            def served(condition: Callable[[], object], what: str) -> None:
                """Ask for frames, each a new one, until something has come about."""

                def asked() -> object:
                    nonlocal calls
                    calls += 1
                    engine.forces(positions + 1e-3 * (calls % 1000))
                    engine.forces(positions * (1.0 + 1e-5 * (calls % 1000)))
                    return condition()

                until(asked, TIMEOUT, what)

            for _ in range(KILLS):
                goal, wait = count("start") + 1, chance.randrange(30)
                served(lambda goal=goal: count("start") >= goal, "a label to begin")
                for _ in range(wait):
                    engine.forces(positions)
                if chance.random() < 0.5:
                    dead = program.kill("label-0")
                    served(lambda dead=dead: program.pid("label-0") not in (0, dead), "the worker to be started again")
                else:
                    os.kill(read_journal(journal)[-1][2], signal.SIGKILL)
            for fault in ("hang", "memory"):
                (tmp_path / fault).touch()
                failed = program.status()["labels"]["failed"]
                served(lambda failed=failed: program.status()["labels"]["failed"] > failed, f"the failure of a label ({fault})")
            goal = count("end") + 2
            served(lambda: count("end") >= goal, "more labels")
            os.kill(program.pid("learner"), signal.SIGUSR1)
            served(lambda: not program.status()["labels"]["running"], "the last label to be stored")
            assert program.stop() == 0, program.output
    lines = read_journal(journal)
    with Store(program.run_dir / FILE, read_only=True) as store:
        stored = Counter(one.frame.key for one in store.labels()) + Counter(one.stored.frame.key for one in store.quarantined())
        failures = {store.frame(frame).key: reason for frame, reason in store.failures()}
    faulty = {what: key for what, key, _ in lines if what in ("hang", "memory")}
    since = {what: [line[:2] for line in lines[place:]] for place, (what, _, _) in enumerate(lines) if what in faulty}

    assert stored == Counter(key for what, key, _ in lines if what == "end")
    assert set(stored.values()) == {1}
    assert failures == {
        faulty["hang"]: "took longer than label.time_limit = 12 s and was killed",
        faulty["memory"]: "needed more memory than label.memory_gb = 0.6 and was killed",
    }
    # before, it may have been begun by workers that were killed; after it was seen to be faulty nobody tries it again
    assert not any(("start", key) in since[what] for what, key in faulty.items())
    assert program.status()["evaluator_restarts"] == 0
