"""Suite L: learning while serving, against falcon-md in the same run. Cu-Au clusters of 13 and 38 atoms, and EMT as the teacher.

    python benchmarks/learning.py [--quick] [--json FILE] [--plot FILE] [--only PART] [--go-on FILE]      --setup makes .venv-falcon

Both sides move the same atoms (Langevin, 600 K, 5 fs, friction 0.02, open cell) from the same start with the same noise, and have the same
teacher, which takes 0, 2 or 60 s a label. FALCON (falcon-md 1.3.0, its default GPR, accuracy_e 0.1 eV and for the curves 0.05 and 0.2) has an
environment of its own, pinned in constraints-falcon.txt, and begins with ten rattled copies (0.05 Å) of the start, labelled. Tumbaga:
  scratch  a network of the embedded potential's shape, new weights, trained on the same ten; they count as labels
  biased   the same network pre-trained on 60 frames of a wrong teacher (EMT 3 % too large and a fifth too soft), no label of the right one
It is used as a user would: `serve` in an ASE script, `flag.force_error` 0.15 eV/Å, a frame in 100 steps at most, labels up to a budget of
80, or fewer so that there are never more than FALCON had; labels that were set aside count. A cluster that has come apart is set back to the
start with other velocities, on both sides. The packaged painn:cuau-water is no start here: bare metal clusters are outside of
what it has seen, and the guards refuse its forces within five steps; its error on the frames below is told all the same.

A row of tumbaga goes on past its steps until the budget is spent and no fine-tune is under way, at most as long as a row may last: its steps
take milliseconds, a fine-tune takes a minute. FALCON's steps wait for labels and trainings; where a label takes seconds it does only the few
steps that are told, which shows its longest call and nothing of its accuracy.

Judged on 200 frames of the teacher's own dynamics from another seed, the same for both: force RMSE over components; FALCON's model as it is
in the end, tumbaga's last version that served. "own" is the error of the forces that moved the atoms on the side's own trajectory.
Pass: no call of tumbaga of 100 ms or more, and none that grows with the delay; `scratch` at delay 0 has a smaller error than FALCON with no
more labels, at 13 and at 38 atoms.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy and torch are imported

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _learning_teacher as teacher
from _learning_rows import ACCURACY, BIASED, FALCON, HEAD, SCRATCH, Length, Row, line, missed, name_of, plot
from _machine import described
from ase import Atoms
from ase.io import write

from tumbaga.driver import datasets, evaluating, plots, transferring
from tumbaga.driver.backends import registry
from tumbaga.online.training import finish
from tumbaga.online.training.loop import Sets
from tumbaga.online.versions import write_whole

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent / ".venv-falcon"
PINS = HERE.parent / "constraints-falcon.txt"
PEER = ("falcon-md==1.3.0", "agox==3.11.1")
SHAPE = "painn:cuau-water"  # whose network is trained from new weights
SEED, OTHER_SEED = 0, 1
BUDGET, FORCE_ERROR, SPACING = 80, 0.15, 100
BIASED_FRAMES = 60
BATCH_ATOMS = 64
FALCON_SLOW_STEPS = {2.0: 20, 60.0: 3}  # steps of FALCON where a label takes so many seconds


FULL = Length((13, 38), (0.0, 2.0, 60.0), (ACCURACY, 0.05, 0.2), 2000, 900.0, 1000, 200)
QUICK = Length((13,), (0.0, 2.0), (ACCURACY,), 300, 75.0, 300, 200)


def jobs(length: Length) -> list[tuple[str, int, float, float]]:
    """Side, size, delay and accuracy of all rows; FALCON before tumbaga, whose budget follows from it."""
    found: list[tuple[str, int, float, float]] = []
    for size in length.sizes:
        for delay in length.delays:
            found += [(FALCON, size, delay, accuracy) for accuracy in (length.accuracies if not delay else length.accuracies[:1])]
            found += [(side, size, delay, 0.0) for side in (SCRATCH, BIASED)]
    return found


# -- what both begin with --------------------------------------------------------------------------------------------------------------


class Ground:
    """Frames and first potentials, made when first asked for and kept in the folder of the work."""

    def __init__(self, folder: Path, length: Length) -> None:
        self.folder, self._length = folder, length

    def apart(self, size: int) -> Path:
        """The frames that judge."""
        path = self.folder / f"apart-{size}.extxyz"
        if not path.exists():
            _kept(path, teacher.teachers_own(size, OTHER_SEED, self._length.apart))
        return path

    def model(self, side: str, size: int) -> Path:
        """The potential that tumbaga begins with."""
        path = self.folder / f"{side}-{size}.safetensors"
        if path.exists():
            return path
        frames = self.folder / f"{side}-{size}.extxyz"
        _kept(frames, teacher.labels_of(teacher.rattled(size, SEED)) if side == SCRATCH else teacher.wrong_ones(size, SEED, BIASED_FRAMES))
        data = datasets.read(str(frames))
        start, sets = registry.load(SHAPE, "cpu"), Sets(train=data, valid=())
        tunable = transferring.opened(start, SHAPE, {})
        batches = math.ceil(len(data) / max(1, BATCH_ATOMS // size))
        epochs = max(1, round(self._length.training / batches))
        settings = transferring.settings_for(tunable, sets, True, {"seed": SEED, "epochs": epochs, "patience": 0})
        plan = transferring.Plan(tunable, sets, [], settings, from_scratch=True, compare=False)
        finish.write(path, transferring.carry_out(plan, self.folder / f"{side}-{size}").potential)
        return path


def _kept(path: Path, frames: Sequence[Atoms]) -> None:
    whole = path.with_suffix(".part")
    write(whole, list(frames), format="extxyz")
    whole.rename(path)


def untuned(apart: Path) -> float:
    """Force RMSE of the packaged potential as it is, eV/Å."""
    judged, _ = evaluating.judge(registry.load(SHAPE, "cpu"), datasets.read(str(apart)))
    return teacher.force_rmse([one.forces for one in judged], [_labelled(one) for one in judged])


def _labelled(one: Any) -> Atoms:
    return teacher.with_forces(Atoms(one.frame.numbers, one.frame.positions), one.label.energy, one.label.forces)


# -- the two sides ---------------------------------------------------------------------------------------------------------------------


def set_up() -> Path:
    """Make the environment of falcon-md if there is none; it needs no torch."""
    python = ENVIRONMENT / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", "import falcon_md, agox"], capture_output=True, check=False).returncode == 0:
        return python
    print(f"making {ENVIRONMENT.name} with {' and '.join(PEER)}: some minutes, agox is compiled", flush=True)
    subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *PEER, "-c", PINS], check=True)
    return python


def measured(job: tuple[str, int, float, float], ground: Ground, length: Length, budget: int, imported: bool) -> Row:
    """Carry out one row in a process of its own."""
    side, size, delay, accuracy = job
    task: dict[str, Any] = {"size": size, "seed": SEED, "delay": delay, "seconds": length.seconds, "apart": str(ground.apart(size))}
    if side == FALCON:
        steps = min(length.steps, FALCON_SLOW_STEPS.get(delay, length.steps))
        task |= {"steps": steps, "accuracy_e": accuracy, "train_start": 10}
    else:
        begun = teacher.RATTLED if side == SCRATCH else 0
        first = str(ground.model(side, size).with_suffix(".extxyz")) if begun and imported else ""
        task |= {"steps": length.steps, "model": f"painn:{ground.model(side, size)}", "begun": begun, "known": 0 if first else begun}
        task |= {"first": first, "budget": budget - begun, "force_error": FORCE_ERROR, "spacing": SPACING}
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as folder:
        lines = _ran(side, task, Path(folder))
    *points, last = lines
    curve = [(point["labels"], point["rmse"]) for point in points]
    named = {key: last.pop(key) for key in ("steps", "seconds", "within_68", "within_90", "ended")}
    times = {"own": last.pop("own_rmse"), "p50": last.pop("p50_ms"), "p99": last.pop("p99_ms"), "longest": last.pop("max_ms")}
    return Row(
        side,
        size,
        delay,
        accuracy,
        labels=last.get("paid", curve[-1][0]),
        rmse=curve[-1][1],
        load=os.getloadavg()[0],
        curve=curve,
        more=last,
        **named,
        **times,
    )


def _ran(side: str, task: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Run the script of a side and return the lines that it wrote."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))}
    if side == FALCON:
        python, script = set_up(), "_learning_falcon.py"
        environment |= {"PYTHONPATH": str(HERE), "HOME": str(folder)}
    else:
        python, script, task = Path(sys.executable), "_learning_tumbaga.py", {**task, "run": str(folder / "run")}
    (folder / "task.json").write_text(json.dumps(task))
    done = subprocess.run(
        [python, HERE / script, "task.json", "lines.jsonl"], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{script} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in (folder / "lines.jsonl").read_text().splitlines()]


# -- what is told ----------------------------------------------------------------------------------------------------------------------


def keep(path: Path | None, rows: Sequence[Row], length: Length, packaged: dict[str, float], commands: Sequence[str]) -> None:
    """Write the figures, whole or not at all."""
    if path is not None:
        found = evaluating.finite(told(rows, length, packaged, commands))
        write_whole(path, (json.dumps(found, indent=1) + "\n").encode())


def told(rows: Sequence[Row], length: Length, packaged: dict[str, float], commands: Sequence[str]) -> dict[str, Any]:
    peer = json.loads(subprocess.run([set_up(), "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout)
    return {
        "machine": described(),
        "peer": peer,
        "commands": list(commands),
        "length": asdict(length),
        "settings": {"budget": BUDGET, "force_error": FORCE_ERROR, "spacing": SPACING, "biased_frames": BIASED_FRAMES, "seed": SEED},
        "untuned_rmse": packaged,
        "missed": missed(rows, length),
        "rows": [asdict(row) for row in rows],
    }


_VERSIONS = (
    "import importlib.metadata as m, json; print(json.dumps({k: m.version(k) for k in ('falcon-md', 'agox', 'ase', 'numpy', 'ray')}))"
)


def earlier(paths: Sequence[Path]) -> tuple[list[Row], list[str], dict[str, float]]:
    """Rows, commands and errors of the packaged potential of earlier --json files; of two rows of a name the first is taken."""
    rows: dict[str, Row] = {}
    commands: list[str] = []
    packaged: dict[str, float] = {}
    for kept in (json.loads(path.read_text()) for path in paths if path.exists()):
        for row in (Row(**row) for row in kept["rows"]):
            rows.setdefault(row.name, row)
        commands += kept["commands"]
        packaged |= kept["untuned_rmse"]
    return list(rows.values()), list(dict.fromkeys(commands)), packaged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="13 atoms, no delay of 60 s, fewer steps, shorter trainings; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there, anew after each row")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the curves there, a PNG; needs matplotlib")
    parser.add_argument("--only", metavar="PART", default="", help="rows with this in their names, e.g. scratch-13 or falcon-38-0-0.1")
    parser.add_argument(
        "--go-on", metavar="FILE", type=Path, action="append", default=[], help="take the rows of an earlier --json; can be repeated"
    )
    parser.add_argument("--seconds", metavar="N", type=float, help="that a row may take, instead of 900")
    parser.add_argument("--work", metavar="DIR", type=Path, help="keep frames and first potentials there, and take those that are there")
    parser.add_argument("--import-first", action="store_true", help="hand the ten labels to the run of `scratch` as well (tumbaga import)")
    parser.add_argument("--setup", action="store_true", help="make the environment of falcon-md and stop")
    options = parser.parse_args()
    set_up()
    if options.setup:
        return 0
    length = QUICK if options.quick else FULL
    if options.seconds:
        length = Length(**{**asdict(length), "seconds": options.seconds})
    rows, commands, packaged = earlier(options.go_on)
    typed = {
        "--quick": options.quick,
        "--import-first": options.import_first,
        "--only": options.only,
        "--seconds": options.seconds and f"{options.seconds:g}",
    }
    said = [f"{name} {value}" if isinstance(value, str) else name for name, value in typed.items() if value]
    command = " ".join(["python benchmarks/learning.py", *said])  # where files lie is nobody's business
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        ground = Ground(work, length)
        print(HEAD, flush=True)
        for job in jobs(length):
            known, name, size = {row.name: row for row in rows}, name_of(*job), job[1]
            if options.only not in name or name in known:
                continue
            if str(size) not in packaged:
                packaged[str(size)] = untuned(ground.apart(size))
            theirs = known.get(name_of(FALCON, size, 0.0, length.accuracies[0]))
            rows.append(measured(job, ground, length, min(BUDGET, theirs.labels) if theirs else BUDGET, options.import_first))
            print(line(rows[-1]), flush=True)
            commands = list(dict.fromkeys([*commands, command]))
            keep(options.json, rows, length, packaged, commands)
    keep(options.json, rows, length, packaged, commands)
    print("\n".join([HEAD, *map(line, rows)]))
    print(f"RMSE and own in meV/Å; packaged {SHAPE} as it is: " + ", ".join(f"{1000 * e:.0f} at {n} atoms" for n, e in packaged.items()))
    if options.plot and plots.available():
        plots.write(options.plot.parent, {options.plot.name: plot(rows, length)}, "--plot")
    if faults := missed(rows, length):
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    print("passed: smaller errors than falcon-md with no more labels, and no force call that waits for a label or a training")
    return 0


if __name__ == "__main__":
    sys.exit(main())
