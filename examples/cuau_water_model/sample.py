"""Make the data set behind painn:cuau-water: sample Cu–Au/water clusters with xTB, label them with GFN2-xTB.

Every job (one composition, one start) is seeded by its own name, so jobs can run in any order and in several processes.
Finished jobs are kept in --parts and skipped the next time; --merge packs all parts into one file.

    python examples/cuau_water_model/sample.py --parts parts            # about 20 minutes on one core
    python examples/cuau_water_model/sample.py --parts parts --model painn:first.safetensors
    python examples/cuau_water_model/sample.py --parts parts --merge    # writes data/cuau-water.npz

The second line is the second round: MD under a potential trained on the first round visits what that potential believes in,
and GFN2 tells it where it is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from ase.data import atomic_numbers, covalent_radii
from moving import MAX_FORCE, XTB, ForcesOf, Served, langevin

from tumbaga.driver.backends.painn import PaiNN, load
from tumbaga.online.records import Array

HERE = Path(__file__).parent


class Plan(NamedTuple):
    """How one composition is sampled."""

    formula: str  # metals, then the number of waters
    starts: int  # independent random structures; 300 K and 600 K in turn
    frames: int  # MD frames a start
    stride: int  # MD steps between frames, 1 fs each
    distorted: int  # rattled, scaled and pushed frames a start


# the running cluster of the main job first and most; Cu4Au2(H2O)3 is never trained on
PLANS = (
    Plan("CuAu(H2O)2", 12, 90, 20, 40),
    Plan("CuAu(H2O)1", 6, 50, 20, 20),
    Plan("(H2O)1", 2, 25, 10, 25),
    Plan("(H2O)2", 4, 30, 20, 15),
    Plan("(H2O)4", 6, 50, 20, 15),
    Plan("CuAu(H2O)4", 8, 55, 20, 15),
    Plan("Cu2Au2(H2O)2", 8, 45, 18, 15),
    Plan("Cu2(H2O)3", 4, 60, 20, 15),
    Plan("Au2(H2O)3", 4, 60, 20, 15),
    Plan("Cu4Au4(H2O)2", 6, 35, 12, 8),
    Plan("Cu2Au4(H2O)4", 6, 40, 12, 8),
    Plan("Cu4Au2(H2O)3", 4, 35, 15, 0),
    Plan("(H2O)8", 4, 40, 15, 5),
    Plan("Cu2Au4(H2O)8", 4, 25, 10, 3),
    # more metal: without these the unseen composition fared badly (225 meV/Å)
    Plan("Cu3Au3(H2O)3", 6, 35, 12, 5),
    Plan("Cu5Au1(H2O)2", 4, 30, 12, 5),
    Plan("Cu4(H2O)3", 4, 30, 12, 5),
    Plan("Au4(H2O)2", 4, 30, 12, 5),
    Plan("Cu3Au1(H2O)3", 4, 35, 12, 5),
    Plan("Cu1Au3(H2O)2", 4, 35, 12, 5),
)
# the second round: frames a start and stride only; "distorted" is not used
MODEL_PLANS = (
    Plan("CuAu(H2O)2", 2, 60, 40, 0),
    Plan("CuAu(H2O)1", 2, 40, 40, 0),
    Plan("(H2O)4", 2, 40, 40, 0),
    Plan("CuAu(H2O)4", 2, 50, 40, 0),
    Plan("Cu2Au2(H2O)2", 2, 40, 40, 0),
    Plan("Cu2(H2O)3", 2, 40, 40, 0),
    Plan("Au2(H2O)3", 1, 40, 40, 0),
    Plan("Cu4Au4(H2O)2", 1, 30, 30, 0),
    Plan("Cu2Au4(H2O)4", 1, 30, 30, 0),
    Plan("(H2O)8", 1, 30, 40, 0),
    Plan("Cu2Au4(H2O)8", 1, 30, 30, 0),
    Plan("Cu3Au3(H2O)3", 1, 30, 30, 0),
    Plan("Cu5Au1(H2O)2", 1, 30, 30, 0),
    Plan("Cu4(H2O)3", 1, 30, 30, 0),
    Plan("Au4(H2O)2", 1, 30, 30, 0),
    Plan("Cu3Au1(H2O)3", 1, 30, 30, 0),
)


@dataclass
class Sampled:
    """One labelled frame: Å, eV, eV/Å; kind says how it was made, trajectory and step where it stands."""

    numbers: npt.NDArray[np.int64]
    positions: Array
    energy: float
    forces: Array
    kind: str
    trajectory: str
    step: int


def composition(formula: str) -> npt.NDArray[np.int64]:
    """Atomic numbers of "Cu2Au4(H2O)4": metals first, then O, H, H of each water."""
    metals, _, waters = formula.partition("(")
    numbers: list[int] = []
    for symbol, count in re.findall(r"([A-Z][a-z]?)(\d*)", metals):
        numbers += [atomic_numbers[symbol]] * int(count or 1)
    return np.array(numbers + [8, 1, 1] * int(waters.partition(")")[2] or 0), dtype=np.int64)


def random_start(numbers: npt.NDArray[np.int64], rng: np.random.Generator) -> Array:
    """A compact random cluster: each metal atom, then each whole water, is put at the closest free place of 200 tries."""
    water = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])
    placed = np.zeros((0, 3))
    n_metals = int((numbers > 20).sum())
    blocks = [np.zeros((1, 3))] * n_metals + [water] * ((len(numbers) - n_metals) // 3)
    for block in blocks:
        best, best_radius = None, np.inf
        for _ in range(200):
            rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            trial = block @ rotation + rng.normal(size=3) * (1.2 * len(placed) ** (1 / 3) + 0.1)
            gap = 2.45 if len(block) == 1 else 2.2
            free = not len(placed) or np.linalg.norm(trial[:, None] - placed[None], axis=2).min() > gap
            radius = float(np.linalg.norm(trial.mean(axis=0) - (placed.mean(axis=0) if len(placed) else 0)))
            if free and radius < best_radius:
                best, best_radius = trial, radius
        if best is None:
            raise RuntimeError("no free place found; use another seed")
        placed = np.concatenate([placed, best])
    centred: Array = placed - placed.mean(axis=0)
    return centred


def relax(positions: Array, forces_of: ForcesOf, steps: int = 60) -> Array:
    """Take the worst strain out of a random start: damped steepest descent with steps of at most 0.1 Å."""
    for _ in range(steps):
        forces = forces_of(positions)[1]
        step = 0.02 * forces
        positions = positions + step * min(1.0, 0.1 / max(np.linalg.norm(step, axis=1).max(), 1e-9))
    return positions


def distort(numbers: npt.NDArray[np.int64], positions: Array, rng: np.random.Generator) -> tuple[str, Array]:
    """Rattle, scale, or push one random pair together: what MD at 600 K does not visit, but a failing run would."""
    how = rng.integers(3)
    if how == 0 or len(numbers) < 3:
        return "rattle", positions + rng.normal(size=positions.shape) * rng.uniform(0.03, 0.22)
    if how == 1:
        return "scale", positions * rng.uniform(0.88, 1.15) + rng.normal(size=positions.shape) * 0.02
    distances = np.linalg.norm(positions[:, None] - positions[None], axis=2) / (
        covalent_radii[numbers][:, None] + covalent_radii[numbers][None]
    ) + 9.0 * np.eye(len(numbers))
    a, b = _near_pair(distances, rng)
    target = rng.uniform(0.65, 1.1) / distances[a, b]
    moved = positions.copy()
    shift = 0.5 * (1 - target) * (positions[b] - positions[a])
    moved[a] += shift
    moved[b] -= shift
    return "push", moved


def _near_pair(distances: Array, rng: np.random.Generator) -> tuple[int, int]:
    a = int(rng.integers(len(distances)))
    near = np.argsort(distances[a])[:6]
    return a, int(rng.choice(near[near != a]))


class Labeller:
    """GFN2 labels; each from a cold start, so that a label does not depend on the one before."""

    def __init__(self) -> None:
        self.dropped = 0

    def __call__(self, numbers: npt.NDArray[np.int64], positions: Array, kind: str, trajectory: str, step: int) -> Sampled | None:
        """Return the labelled frame, or None where GFN2 does not converge or the forces are beyond MAX_FORCE."""
        positions = (positions - positions.mean(axis=0)).astype(np.float32).astype(np.float64)  # as it will be stored
        try:
            energy, forces = XTB("GFN2-xTB", numbers, cold=True)(positions)
        except RuntimeError:
            self.dropped += 1
            return None
        if not np.isfinite(forces).all() or np.linalg.norm(forces, axis=1).max() > MAX_FORCE:
            self.dropped += 1
            return None
        return Sampled(numbers, positions, energy, forces, kind, trajectory, step)


def cluster_job(plan: Plan, start: int, label: Labeller) -> list[Sampled]:
    """Sample one start of one composition. GFN1 moves the atoms in two starts of three, GFN2 itself in the third."""
    name = f"{plan.formula}/{start}"
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    numbers = composition(plan.formula)
    kelvin = 300.0 if start % 2 == 0 else 600.0
    positions = relax(random_start(numbers, rng), XTB("GFN1-xTB", numbers))
    mover = XTB("GFN2-xTB" if start % 3 == 2 else "GFN1-xTB", numbers)
    found, visited = followed(numbers, positions, mover, kelvin, plan, (f"md{kelvin:.0f}", name), label, rng)
    for number in range(plan.distorted):
        kind, positions = distort(numbers, visited[rng.integers(len(visited))], rng)
        found.append(label(numbers, positions, kind, name + "/distorted", number))
    return [frame for frame in found if frame is not None]


def model_job(plan: Plan, start: int, label: Labeller, potential: PaiNN) -> list[Sampled]:
    """Label what MD under a potential visits: from a random start, at 300 K, 600 K and 450 K in turn."""
    name = f"{plan.formula}/{start}/model"
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    numbers = composition(plan.formula)
    positions = relax(random_start(numbers, rng), XTB("GFN1-xTB", numbers))
    found, _ = followed(numbers, positions, Served(potential, numbers), (300.0, 600.0, 450.0)[start % 3], plan, ("model", name), label, rng)
    return [frame for frame in found if frame is not None]


def followed(
    numbers: npt.NDArray[np.int64],
    positions: Array,
    mover: ForcesOf,
    kelvin: float,
    plan: Plan,
    names: tuple[str, str],
    label: Labeller,
    rng: np.random.Generator,
) -> tuple[list[Sampled | None], list[Array]]:
    """Run one trajectory; return its labelled frames and all positions it visited. names: the kind and the trajectory."""
    found: list[Sampled | None] = []
    visited = [positions]
    trajectory = langevin(numbers, positions, mover, kelvin, rng)
    try:
        for step, (here, _) in enumerate(islice(trajectory, (plan.frames + 5) * plan.stride), 1):
            if step % plan.stride == 0 and step > 5 * plan.stride:
                found.append(label(numbers, here, names[0], names[1], step))
                visited.append(here)
    except RuntimeError as error:
        print(f"  {names[1]}: the sampler failed at frame {len(visited)} ({error}); keeping what there is")
    return found, visited


def dimer_job(label: Labeller) -> list[Sampled]:
    """Free atoms, and scans of all pairs of elements from 0.6 to 2.2 of the sum of covalent radii; doublets where the electron count is odd."""
    found = [label(np.array([z], dtype=np.int64), np.zeros((1, 3)), "atom", f"atom/{z}", 0) for z in (1, 8, 29, 79)]
    for a, b in [(x, y) for k, x in enumerate((1, 8, 29, 79)) for y in (1, 8, 29, 79)[k:]]:
        numbers = np.array([a, b], dtype=np.int64)
        contact = covalent_radii[a] + covalent_radii[b]
        for step, factor in enumerate(np.linspace(0.6, 2.2, 25)):
            positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, factor * contact]])
            found.append(label(numbers, positions, "dimer", f"dimer/{a}-{b}", step))
    return [frame for frame in found if frame is not None]


def merge(parts: list[Path], target: Path) -> None:
    """Pack the frames of all parts as flat arrays (see README of the model card for the layout)."""
    frames: dict[str, list[npt.NDArray[np.generic]]] = {}
    for part in sorted(parts):
        with np.load(part) as arrays:
            for key in arrays.files:
                frames.setdefault(key, []).append(arrays[key])
    np.savez_compressed(target, **{key: np.concatenate(values) for key, values in frames.items()})  # type: ignore[arg-type]
    print(f"{target}: {len(np.concatenate(frames['energy']))} frames, {target.stat().st_size / 1e6:.2f} MB")


def save(frames: list[Sampled], path: Path) -> None:
    """Write ragged frames: counts (n_frames,), numbers, positions and forces of all atoms in order; energies in float64."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez_compressed(
        temporary,
        counts=np.array([len(f.numbers) for f in frames], dtype=np.int32),
        numbers=np.concatenate([f.numbers for f in frames]).astype(np.uint8),
        positions=np.concatenate([f.positions for f in frames]).astype(np.float32),
        forces=np.concatenate([f.forces for f in frames]).astype(np.float32),
        energy=np.array([f.energy for f in frames]),
        kind=np.array([f.kind for f in frames], dtype="U8"),
        trajectory=np.array([f.trajectory for f in frames], dtype="U32"),
        step=np.array([f.step for f in frames], dtype=np.int32),
    )
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, required=True, help="directory of finished jobs")
    parser.add_argument("--merge", action="store_true", help="pack the parts and stop")
    parser.add_argument("--output", type=Path, default=HERE / "data" / "cuau-water.npz")
    parser.add_argument("--model", default="", help="second round: sample with this potential, e.g. painn:first.safetensors")
    parser.add_argument("--shard", default="0/1", help="k/n: do every n-th job, beginning with the k-th")
    args = parser.parse_args()
    args.parts.mkdir(parents=True, exist_ok=True)
    if args.merge:
        merge(list(args.parts.glob("*.npz")), args.output)
        return
    shard, shards = (int(x) for x in args.shard.split("/"))
    potential = load(args.model, device="cpu") if args.model else None
    jobs = planned(MODEL_PLANS) if potential else [None, *planned(PLANS)]
    begin = time.perf_counter()
    for number, job in enumerate(jobs):
        path = args.parts / ("dimers.npz" if job is None else f"{job[0].formula}-{job[1]}{'-model' if potential else ''}.npz")
        if number % shards != shard or path.exists():
            continue
        label, since = Labeller(), time.perf_counter()
        frames = dimer_job(label) if job is None else model_job(*job, label, potential) if potential else cluster_job(*job, label)
        if frames:
            save(frames, path)
        print(
            f"{number + 1}/{len(jobs)} {path.stem}: {len(frames)} frames, {label.dropped} dropped, "
            f"{time.perf_counter() - since:.1f} s, total {time.perf_counter() - begin:.0f} s"
        )
        sys.stdout.flush()


def planned(plans: tuple[Plan, ...]) -> list[tuple[Plan, int] | None]:
    """All jobs, round robin over compositions, so that an early stop leaves a balanced set."""
    return [(plan, start) for start in range(max(p.starts for p in plans)) for plan in plans if start < plan.starts]


if __name__ == "__main__":
    main()
