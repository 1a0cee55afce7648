"""Many engines at one server: steps a second of 1, 4, 8 and 16 engines of mixed size, beside as many private drivers of the same back end.

    python benchmarks/tenants.py [--quick] [--json FILE] [--model MODEL] [--device NAMES] [--engines N ...]

The engines are raw ones (Cu-Au clusters in water, of SIZES in turn): each sends its next frame as soon as it has its answer. All of them live in this
one process, which waits for all sockets at once; as many Python processes would take from those under test the processor that both need.
"server" is one `tumbaga serve` with an address for each engine; "private" is one process for each engine with the back end and the wire in
it, which is how it is done without a server (see _private_driver.py). "bound" is the back end alone: a batch of one frame of each engine,
and the same frames one by one, by turns, in as many processes at once as the server has evaluators, which share the frames. Torch has one
thread in each process. As users have it (--device auto), the server has an evaluator for each core; with --device cpu it has one.

For each number of engines the three are measured by turns, window after window, each REPETITIONS times, in an order that turns; those that
are not measured are idle. Engines ask for a while before a window begins, and all answers are awaited before the next one. Figures are
medians over repetitions, ratios medians of the ratios within repetitions.

Steps a second flatter whoever serves small engines more often: private drivers share the processor, so that an engine of 13 atoms takes
several steps in the time of one of 55, while in a batch all wait for all. The column "by atoms" is the same ratio with each step weighed by
its atoms, and "slowest" is the slowest engine's rate over the mean, for both.

Memory is the PSS of all processes of the server, taken while there is no private driver, and of all private drivers, taken when the server
is gone; what else on the machine has the same libraries loaded lowers both. It is reported and not judged.

Pass: with 8 and 16 engines the server makes at least BOUND of the frames a second that the back end makes in batches; with any number not
fewer steps a second than private drivers, within MARGIN; no engine of the server is slower than SLOWEST of their mean.

--model takes any potential that knows Cu, Au, O and H, a foundation model too: in an environment with the extra sevennet,
`--model sevennet:7net-0`. With a slow one a window lasts until each engine has LEAST answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from _answerers import HERE
from _machine import described
from _raw_engines import PATIENCE_S, RawEngine, Where, answered, moved, place, run_dir, server, system

from tumbaga.driver import config as configs
from tumbaga.driver import devices
from tumbaga.driver.testing import processes_in

BOUND, MARGIN, SLOWEST = 0.9, 0.05, 0.5
SIZES = (13, 20, 38, 55)
ENGINES = (1, 4, 8, 16)
JUDGED = (8, 16)  # by the bound
REPETITIONS = 3
SERVER, PRIVATE, ALONE = "server", "private", "bound"
WHO = (SERVER, PRIVATE, ALONE)
LEAST = 4  # answers of each engine in a window, however slow the potential is
_MOMENT = 0.01  # s
_SAME = 1e-3  # eV/Å: float32 inside, and a batch sums up in another order


@dataclass(frozen=True)
class Length:
    """Seconds of a window, and of asking before it begins."""

    window: float
    warm: float


@dataclass(frozen=True)
class Row:
    """What came of one number of engines: rates a second, memory in MiB; `steps` of each engine in each repetition are for the record."""

    model: str
    engines: int
    server: float
    private: float
    ratio: float
    ratio_by_atoms: float
    batched: float
    single: float
    scaling: float
    share: float
    slowest: float
    slowest_private: float
    server_mib: float
    private_mib: float
    steps: dict[str, list[list[float]]]


def window(engines: Sequence[RawEngine], length: Length) -> list[float]:
    """Have all ask, and again as soon as they are answered; return the steps a second of each once they are warm.

    The window is longer where an engine has not got LEAST answers in it.

    Raises:
        TimeoutError: nobody gets an answer any more, or somebody does not while others do.
    """
    times: dict[RawEngine, list[float]] = {engine: [] for engine in engines}
    with selectors.DefaultSelector() as selector:
        for one in engines:
            selector.register(one, selectors.EVENT_READ, one)
            one.ask()
        begin = time.perf_counter() + length.warm
        end, asking, over = begin + length.window, len(engines), False
        while asking:
            if not (ready := selector.select(PATIENCE_S)):
                raise TimeoutError(f"no engine got an answer within {PATIENCE_S:g} s")
            now = time.perf_counter()
            if now > end + PATIENCE_S:
                raise TimeoutError(f"an engine made fewer than {LEAST} steps within {length.window + PATIENCE_S:g} s")
            for key, _ in ready:
                engine: RawEngine = key.data
                if not engine.take():
                    continue
                if begin <= now and (now < end or len(times[engine]) < LEAST):
                    times[engine].append(now)
                over = over or (now >= end and min(map(len, times.values())) >= LEAST)
                if over:
                    asking -= 1
                else:
                    engine.ask()
    # from answer to answer: in a short window the step that is cut at its end would count
    return [(len(each) - 1) / (each[-1] - each[0]) for each in times.values()]


def pss(pids: Sequence[int]) -> float:
    """MiB of all these processes, pages that several share divided among them."""
    found = [re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE) for pid in pids]
    return sum(int(one.group(1)) for one in found if one) / 1024


class Alone:
    """The back end in processes of its own, which share the frames; see _batch_scaling.py.

    Args:
        model: its name.
        where: the engines' structures.
        processes: how many there may be.
    """

    def __init__(self, model: str, where: Where, processes: int) -> None:
        program = [sys.executable, str(HERE / "_batch_scaling.py"), model]
        shares = [where[start::processes] for start in range(min(processes, len(where)))]
        self._processes = [
            subprocess.Popen(
                [*program, *(str(one.structure) for one, _, _ in share)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=_environment(),
            )
            for share in shares
        ]
        self.rates(_MOMENT)  # waits until they have started, which takes more of the processor than anybody measured here should share

    def rates(self, seconds: float) -> tuple[float, float]:
        """Frames a second of all of them at once, batched and one by one."""
        batched = single = 0.0
        for process in self._processes:
            assert process.stdin is not None
            print(seconds, file=process.stdin, flush=True)
        for process in self._processes:
            assert process.stdout is not None
            told: dict[str, float] = json.loads(process.stdout.readline())
            batched, single = batched + told["batched"], single + told["single"]
        return batched, single

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.communicate()


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def tenants(folder: Path, kind: str, number: int) -> Where:
    """Engines of mixed size, each with a system and frames of its own; those of the same number ask for the same frames whoever answers."""
    made = [system(SIZES[index % len(SIZES)], index) for index in range(number)]
    return [(place(folder, f"{kind}-{index}", atoms), atoms, moved(atoms, index)) for index, atoms in enumerate(made)]


def private(model: str, where: Where) -> list[list[str]]:
    """A driver for each engine."""
    program = str(HERE / "_private_driver.py")
    return [[sys.executable, program, one.address, model, str(one.structure)] for one, _, _ in where]


def compare(one: Sequence[RawEngine], other: Sequence[RawEngine]) -> None:
    """Have both ask for their first frames, which are the same.

    Raises:
        ValueError: the forces differ.
    """
    for engine in (*one, *other):
        engine.begin_again()
        engine.call()
    apart = max(float(np.abs(first.forces() - second.forces()).max()) for first, second in zip(one, other, strict=True))
    if not apart <= _SAME:
        raise ValueError(f"the forces of the server and of private drivers differ by {apart:g} eV/Å")


Rates = dict[str, list[list[float]]]  # of whom, in each repetition: of each engine, or batched and one by one


def turns(served: Sequence[RawEngine], driven: Sequence[RawEngine], alone: Alone, length: Length) -> Rates:
    """Measure all three by turns."""
    does: dict[str, Callable[[], Sequence[float]]] = {
        SERVER: lambda: window(served, length),
        PRIVATE: lambda: window(driven, length),
        ALONE: lambda: alone.rates(length.window),
    }
    rates: Rates = defaultdict(list)
    for repetition in range(REPETITIONS):
        for who in WHO[repetition % 3 :] + WHO[: repetition % 3]:
            rates[who].append(list(does[who]()))
    return rates


def evaluators(device: str, number: int) -> int:
    """How many the server has with so many engines."""
    asked = configs.Config(
        serve=configs.Serve(connect=("unix:any",) * number), potential=configs.Potential(device=device), learn=configs.Learn(enabled=False)
    )
    return len(devices.of_run(asked))


def measured(model: str, device: str, number: int, length: Length) -> Row:
    """One line of the table."""
    with tempfile.TemporaryDirectory(prefix="tumbaga-bench-") as made, contextlib.ExitStack() as last:
        folder = Path(made)
        shared, own = tenants(folder, "shared", number), tenants(folder, "own", number)
        with contextlib.ExitStack() as first:
            _, served = first.enter_context(answered([server(model, shared, device)], shared))
            window(served, length)  # memory is what it is after some work
            server_mib = pss([pid for pid, _ in processes_in(run_dir(shared))])
            pids, driven = last.enter_context(answered(private(model, own), own))
            alone = first.enter_context(contextlib.closing(Alone(model, shared, evaluators(device, number))))
            compare(served, driven)
            rates = turns(served, driven, alone, length)
        # the server and the back end alone are gone
        return summed_up(model, rates, [len(atoms) for _, atoms, _ in own], server_mib, pss(pids))


def summed_up(model: str, rates: Rates, atoms: Sequence[int], server_mib: float, private_mib: float) -> Row:
    """Put the medians over repetitions together."""
    by_server, by_private = np.array(rates[SERVER]), np.array(rates[PRIVATE])  # (repetitions, engines)
    batched, single = np.array(rates[ALONE]).T
    total, total_private = by_server.sum(axis=1), by_private.sum(axis=1)

    def median(values: npt.NDArray[np.float64]) -> float:
        return round(float(np.median(values)), 3)

    return Row(
        model=model,
        engines=len(atoms),
        server=median(total),
        private=median(total_private),
        ratio=median(total / total_private),
        ratio_by_atoms=median(by_server @ atoms / (by_private @ atoms)),
        batched=median(batched),
        single=median(single),
        scaling=median(batched / single),
        share=median(total / batched),
        slowest=median(by_server.min(axis=1) / by_server.mean(axis=1)),
        slowest_private=median(by_private.min(axis=1) / by_private.mean(axis=1)),
        server_mib=round(server_mib, 1),
        private_mib=round(private_mib, 1),
        steps={SERVER: by_server.round(2).tolist(), PRIVATE: by_private.round(2).tolist()},
    )


HEAD = f"{'':7} {'steps/s':^24} {'by':>6} {'in process, frames/s':^28} {'share of':>8} {'slowest/mean':^15} {'memory, MiB':^22}\n" + (
    f"{'engines':>7} {'server':>8} {'private':>8} {'ratio':>6} {'atoms':>6} {'batched':>9} {'one by 1':>9} {'scaling':>8} "
    f"{'bound':>8} {'server':>7} {'private':>7} {'server':>7} {'private':>7} {'ratio':>6}"
)


def line(row: Row) -> str:
    """A line of the table."""
    return (
        f"{row.engines:7d} {row.server:8.1f} {row.private:8.1f} {row.ratio:6.2f} {row.ratio_by_atoms:6.2f} "
        f"{row.batched:9.1f} {row.single:9.1f} {row.scaling:8.2f} {row.share:8.2f} {row.slowest:7.2f} {row.slowest_private:7.2f} "
        f"{row.server_mib:7.0f} {row.private_mib:7.0f} {row.server_mib / row.private_mib:6.2f}"
    )


def missed(rows: Sequence[Row]) -> list[str]:
    """The pass lines that were not reached, each in words."""
    found = []
    for row in rows:
        if row.engines in JUDGED and row.share < BOUND:
            found.append(f"the server reaches {row.share:.2f} of the back end's frames a second in batches, not {BOUND:g}")
            found[-1] += f" ({row.engines} engines)"
        if row.ratio < 1.0 - MARGIN:
            found.append(f"the server makes {row.ratio:.2f} times the steps of private drivers ({row.engines} engines)")
        if row.slowest < SLOWEST:
            found.append(f"an engine of the server has {row.slowest:.2f} of the mean rate, not {SLOWEST:g} ({row.engines} engines)")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter windows; the same checks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--model", metavar="MODEL", default="painn:cuau-water", help="another potential; it must know Cu, Au, O and H")
    parser.add_argument("--engines", metavar="N", type=int, nargs="+", default=ENGINES, help="these numbers only")
    parser.add_argument("--device", metavar="NAMES", default="auto", help="where the evaluators of the server compute: one each")
    options = parser.parse_args()
    length = Length(3.0, 0.5) if options.quick else Length(10.0, 2.0)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that everything started is ended
    rows = []
    print(HEAD)
    for number in options.engines:
        rows.append(measured(options.model, options.device, number, length))
        print(line(rows[-1]), flush=True)
    faults = missed(rows)
    if options.json:
        command = " ".join(["python", "benchmarks/tenants.py", *sys.argv[1:]])
        told = {"machine": described(), "command": command, "passed": not faults, "missed": faults, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if faults:
        print(f"MISSED: {'; '.join(faults)}")
        return 1
    print(f"passed: {BOUND:.0%} of the bound with {JUDGED[0]} engines or more, no fewer steps than private drivers, nobody left behind")
    return 0


if __name__ == "__main__":
    sys.exit(main())
