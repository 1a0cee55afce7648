"""The embedded potential on a GPU: right, how fast in batches, and how much faster one server makes 16 engines than a driver for each.

    python benchmarks/gpu.py [--quick] [--json FILE] [--device DEVICE]

Without a CUDA device it says so, measures nothing and ends with 0. `--device cpu` is a test of this program: the same code on the processor, with
the path through torch and autograd, which GPUs take, instead of the one that CPUs have; then only what is said of numbers is judged.

"numbers": the torch path on the device in float64 and float32 against the CPU's own path in float64: largest difference of a force component
(eV/Å), of the energy an atom (eV) and of a virial component (eV), over clusters of all SIZES and a periodic box, in one ragged batch and frame by
frame. The torch path on the CPU is judged beside it: it is the same code, so a difference there is not the device's. "cpu float32" is
what users of CPUs have, for comparison.

"batches": frames a second of `predict`, of 1 to 256 frames of 20 to 55 atoms by turns, positions new in each call, neighbour lists and
transfers included; "ms" is the median of a call. Memory is the largest that torch had allocated during these calls, MiB.

"one frame": milliseconds of a call of one frame of 38 atoms.

"engines": ENGINES raw engines of mixed size (see tenants.py) on one server, and as many private drivers of the same back end, all on the
device, by turns, window after window. Ratios are medians of the ratios within repetitions. "taken" is the device memory that is gone while
the one or the other is there, MiB, contexts included. Private drivers share the GPU by turns, as processes do that nobody has set up otherwise.

Pass: differences of at most LINES; on a GPU, the server makes at least TIMES the steps a second of private drivers.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before numpy and torch are imported

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _machine import described
from _raw_engines import answered, moved, server, system
from tenants import Length, compare, private, tenants, window

from tumbaga.driver.backends.painn import PaiNN, load
from tumbaga.online.records import Frame, Prediction

MODEL = "painn:cuau-water"
SIZES = (13, 20, 38, 55)
BATCHED = (20, 38, 55)
BATCHES = (1, 4, 16, 64, 256)
ONE = 38  # atoms
ENGINES, TIMES = 16, 3.0
LINES = {"float64": (1e-10, 1e-10, 1e-9), "float32": (5e-4, 2e-6, 1e-3)}
"""Of forces (eV/Å), energies (eV an atom) and virials (eV), by dtype: about ten times what float32 does on a CPU, and a thousand times what
another order of the sums does in float64."""
_BOX = 14.0  # Å; longer than twice the cutoff, but atoms see each other through its faces
_WARM = 3


@dataclass(frozen=True)
class Budget:
    """How much is measured.

    Attributes:
        seconds: of each batch size.
        calls: of one frame.
        repetitions: of windows of engines.
        length: of such a window.
    """

    seconds: float
    calls: int
    repetitions: int
    length: Length


@dataclass(frozen=True)
class Differences:
    """How far one way to evaluate is from the CPU's own in float64; see the head of this file for units."""

    who: str
    dtype: str
    force: float
    energy: float
    virial: float


@dataclass(frozen=True)
class Scaling:
    """One batch size."""

    frames: int
    ms: float
    frames_per_s: float
    peak_mib: float | None


def by_torch(device: str, dtype: str) -> PaiNN:
    """The potential with the path that GPUs take, on any device."""
    potential = load(MODEL, device, dtype)
    if not hasattr(potential, "_step"):
        raise RuntimeError("PaiNN has no _step any more, which this program takes away to choose the path; see driver/backends/painn.py")
    potential._step = None  # what a CPU has instead
    return potential


# -- numbers ---------------------------------------------------------------------------------------------------------------------------


def samples() -> list[Frame]:
    """Frames to compare by: clusters of all sizes, and one of them in a box that repeats."""
    found = [Frame(atoms.numbers, one) for atoms in map(system, SIZES) for one in moved(atoms)[:3]]
    atoms = system(BATCHED[0])
    return [*found, Frame(atoms.numbers, atoms.positions, _BOX * np.eye(3), True)]


def differences(who: str, dtype: str, potential: PaiNN, reference: Sequence[Prediction]) -> Differences:
    """Compare all samples, in one batch and one by one; the larger difference counts."""
    frames = samples()
    ways = (potential.predict(frames), [potential.predict([frame])[0] for frame in frames])
    pairs = [(frame, one, true) for said in ways for frame, one, true in zip(frames, said, reference, strict=True)]
    return Differences(
        who,
        dtype,
        # numpy's maximum: unlike Python's it does not overlook what is not a number
        float(np.max([np.abs(one.forces - true.forces).max() for _, one, true in pairs])),
        float(np.max([abs(one.energy - true.energy) / len(frame) for frame, one, true in pairs])),
        float(np.max([np.abs(one.virial - true.virial).max() for _, one, true in pairs])),
    )


def numbers(device: str) -> list[Differences]:
    """Compare both dtypes on the device, and the same code on the CPU."""
    reference = load(MODEL, "cpu", "float64").predict(samples())
    found = [differences("cpu", "float32", load(MODEL, "cpu", "float32"), reference)]
    for where in dict.fromkeys(("cpu", device)):
        found += [differences(f"torch on {where}", dtype, by_torch(where, dtype), reference) for dtype in LINES]
    return found


# -- speed -----------------------------------------------------------------------------------------------------------------------------


def stream() -> Iterator[Frame]:
    """Frames of several sizes by turns, never the same twice in a row."""
    kinds = [(atoms.numbers, moved(atoms, seed)) for seed, atoms in enumerate(map(system, BATCHED))]
    for index in cycle(range(len(kinds[0][1]))):
        for numbers_, positions in kinds:
            yield Frame(numbers_, positions[index])


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call; `predict` returns arrays of numpy, so the device has finished by then."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def scaling(potential: PaiNN, device: str, budget: Budget) -> list[Scaling]:
    """Every batch size."""
    found, on_gpu = [], device != "cpu"
    for number in BATCHES:
        source = stream()
        for _ in range(_WARM):
            potential.predict(list(islice(source, number)))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        took: list[float] = []
        while sum(took) < budget.seconds or len(took) < _WARM:
            frames = list(islice(source, number))
            took.append(timed(lambda frames=frames: potential.predict(frames)))
        peak = round(torch.cuda.max_memory_allocated() / 2**20, 1) if on_gpu else None
        found.append(Scaling(number, round(1000 * float(np.median(took)), 3), round(number * len(took) / sum(took), 1), peak))
    return found


def latency(potential: PaiNN, calls: int) -> dict[str, float]:
    """Milliseconds of one frame."""
    atoms = system(ONE)
    frames = cycle([Frame(atoms.numbers, positions) for positions in moved(atoms)])
    took = [1000 * timed(lambda: potential.predict([next(frames)])) for _ in range(calls + _WARM)][_WARM:]
    p50, p99 = np.quantile(took, (0.5, 0.99)).round(3).tolist()
    return {"p50_ms": p50, "p99_ms": p99}


# -- engines ---------------------------------------------------------------------------------------------------------------------------


def free_mib(device: str) -> float:
    """Memory of the device that nobody has taken; 0 on a CPU."""
    return torch.cuda.mem_get_info()[0] / 2**20 if device != "cpu" else 0.0


def engines(device: str, budget: Budget) -> dict[str, Any]:
    """A server for all engines and a private driver for each, by turns. Both load the potential with "auto", which is the GPU if there is one."""
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        shared, own = tenants(folder, "shared", ENGINES), tenants(folder, "own", ENGINES)
        before = free_mib(device)
        _, served = stack.enter_context(answered([server(MODEL, shared)], shared))
        window(served, budget.length)  # memory is what it is after some work
        between = free_mib(device)
        _, driven = stack.enter_context(answered(private(MODEL, own), own))
        window(driven, budget.length)
        after = free_mib(device)
        compare(served, driven)
        by_server, by_private = [], []
        for repetition in range(budget.repetitions):
            turn = [(by_server, served), (by_private, driven)]
            for rates, asking in turn if repetition % 2 else reversed(turn):
                rates.append(sum(window(asking, budget.length)))
        return {
            "engines": ENGINES,
            "server": round(float(np.median(by_server)), 1),
            "private": round(float(np.median(by_private)), 1),
            "ratio": round(float(np.median(np.divide(by_server, by_private))), 3),
            "server_mib": round(before - between),
            "private_mib": round(between - after),
            "repetitions": {"server": np.round(by_server, 1).tolist(), "private": np.round(by_private, 1).tolist()},
        }


# -- what is told ----------------------------------------------------------------------------------------------------------------------


def tell_numbers(found: Sequence[Differences]) -> None:
    print(f"{'numbers':16} {'dtype':8} {'force eV/Å':>11} {'energy eV':>11} {'virial eV':>11}")
    for one in found:
        print(f"{one.who:16} {one.dtype:8} {one.force:11.1e} {one.energy:11.1e} {one.virial:11.1e}", flush=True)


def tell_speed(found: Sequence[Scaling], one: dict[str, float]) -> None:
    print(f"\n{'batches':>8} {'ms':>9} {'frames/s':>9} {'gain':>6} {'peak MiB':>9}")
    for row in found:
        peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        print(f"{row.frames:8d} {row.ms:9.2f} {row.frames_per_s:9.0f} {row.frames_per_s / found[0].frames_per_s:6.1f} {peak:>9}")
    print(f"\none frame of {ONE} atoms: p50 {one['p50_ms']:.2f} ms, p99 {one['p99_ms']:.2f} ms", flush=True)


def tell_engines(row: dict[str, Any]) -> None:
    print(f"\n{'engines':>8} {'server':>9} {'private':>9} {'ratio':>6} {'taken by server':>16} {'by private':>11}")
    told = f"{row['server_mib']:16d} {row['private_mib']:11d}" if row["private_mib"] else f"{'-':>16} {'-':>11}"
    print(f"{row['engines']:8d} {row['server']:9.1f} {row['private']:9.1f} {row['ratio']:6.2f} {told}", flush=True)


def missed(found: Sequence[Differences], row: dict[str, Any], judged: bool) -> list[str]:
    """The pass lines that were not reached, each in words."""
    faults = []
    for one in found:
        for name, unit, value, line in zip(
            ("force", "energy", "virial"), ("eV/Å", "eV an atom", "eV"), (one.force, one.energy, one.virial), LINES[one.dtype], strict=True
        ):
            if not value <= line:
                faults.append(f"{one.who} in {one.dtype}: a {name} is off by {value:.1e} {unit}, more than {line:g}")
    if judged and row["ratio"] < TIMES:
        faults.append(f"the server makes {row['ratio']:.2f} times the steps of private drivers, not {TIMES:g} ({ENGINES} engines)")
    return faults


def machine(device: str) -> dict[str, str]:
    """The machine with its GPU."""
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)} if device != "cpu" else {}
    return {**described(), **gpu}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a test of this program, without judging its speed")
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here, so nothing was measured and nothing is passed or missed; --device cpu tests this program")
        return 0
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the server and the drivers, which take a GPU where there is one
    torch.set_num_threads(1)
    quick = Budget(0.5, 50, 1, Length(3.0, 0.5))
    budget = quick if options.quick else Budget(5.0, 500, 5, Length(10.0, 2.0))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    found = numbers(device)
    tell_numbers(found)
    potential = by_torch(device, "float32")
    batches, one = scaling(potential, device, budget), latency(potential, budget.calls)
    tell_speed(batches, one)
    del potential
    row = engines(device, budget)
    tell_engines(row)
    faults = missed(found, row, judged=device == "cuda")
    if options.json:
        told = {"machine": machine(device), "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "device": device}
        told |= {"passed": not faults, "missed": faults, "numbers": [asdict(each) for each in found]}
        told |= {"batches": [asdict(each) for each in batches], "one_frame": one, "many_engines": row}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if faults:
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    if device == "cpu":
        print("passed: the torch path gives the numbers of the CPU's own; speed is not judged on a CPU")
    else:
        print(f"passed: the numbers are those of the CPU, and the server makes at least {TIMES:g} times the steps of private drivers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
