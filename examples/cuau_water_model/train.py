"""Train painn:cuau-water from scratch, on one core.

    python examples/cuau_water_model/train.py --output driver/data/cuau-water.safetensors

An interrupted training goes on from its checkpoint (--checkpoint) when the same command is given again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import dataset
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from torch import Tensor

from tumbaga.driver.backends.painn import ARCHITECTURE, PaiNN, load
from tumbaga.driver.backends.painn_net import Hyper, Network
from tumbaga.driver.backends.painn_pairs import Core, pairs
from tumbaga.online.records import Array

HERE = Path(__file__).parent
ELEMENTS = (1, 8, 29, 79)
LEVEL = "GFN2-xTB"
FORCE_SCALE = 1.5  # eV/Å: frames with larger rms forces count less, or a few crushed ones would rule
HUBER = 0.3  # eV/Å
AVERAGE = 0.998  # memory of the moving average of the weights, a step
ENERGY_WEIGHT = 4.0  # on (dE)^2 / N against mean squared force components


class Item(NamedTuple):
    """A frame ready for training: what the fixed part explains is taken off already."""

    species: Tensor
    first: Tensor
    second: Tensor
    vectors: Tensor
    energy: float
    forces: Tensor
    weight: float


@dataclass
class Settings:
    """Knobs of the training."""

    batch: int
    steps: int
    rate: float
    seed: int


def reference_energies(data: dataset.DataSet, rows: npt.NDArray[np.int64]) -> Array:
    """Energy of each element, eV, float64: the free atom's plus the smallest least-squares correction over MD frames.

    Without the free atoms hydrogen and oxygen, which MD knows as water only, would share their energies absurdly.
    """
    free = {int(data.frames[k].numbers[0]): data.energies[k] for k in np.flatnonzero(data.kinds == "atom")}
    atoms = np.array([free[z] for z in ELEMENTS])
    rows = rows[np.char.startswith(data.kinds[rows], "md")]
    counts = np.array([[np.sum(data.frames[k].numbers == z) for z in ELEMENTS] for k in rows], dtype=np.float64)
    found: Array = atoms + np.linalg.lstsq(counts, data.energies[rows] - counts @ atoms, rcond=1e-6)[0]
    return found


def prepare(data: dataset.DataSet, rows: npt.NDArray[np.int64], hyper: Hyper, reference: Array) -> list[Item]:
    """Neighbour lists once for all epochs, and labels less the fixed part."""
    core, items = Core(ELEMENTS), []
    for k in rows:
        frame, found = data.frames[k], pairs(data.frames[k], hyper.cutoff)
        species = np.searchsorted(ELEMENTS, frame.numbers)
        energies, gradients = core(species[found.first], species[found.second], found.vectors)
        forces = data.forces[k].copy()
        np.subtract.at(forces, found.first, gradients)
        np.add.at(forces, found.second, gradients)
        # of what the network has to explain or of the label, whichever is larger
        rms = np.sqrt(max((data.forces[k] ** 2).mean(), (forces**2).mean()))
        items.append(
            Item(
                torch.tensor(species),
                torch.tensor(found.first),
                torch.tensor(found.second),
                torch.tensor(found.vectors, dtype=torch.float32),
                float(data.energies[k] - reference[species].sum() - energies.sum()),
                torch.tensor(forces, dtype=torch.float32),
                float(1.0 / (1.0 + (rms / FORCE_SCALE) ** 2)),
            )
        )
    return items


class Model(torch.nn.Module):
    """Network and readout, as one thing to optimise."""

    def __init__(self, hyper: Hyper) -> None:
        super().__init__()
        self.network = Network(hyper)
        self.readout = torch.nn.Parameter(torch.randn(len(hyper.elements), hyper.n_hidden) * 0.1)

    def loss(self, batch: list[Item]) -> tuple[Tensor, float, float]:
        """Loss to descend, and (for the log) mean squared force component error and mean squared energy error per atom."""
        sizes = [len(item.species) for item in batch]
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        first = torch.cat([item.first + start for item, start in zip(batch, starts, strict=True)])
        second = torch.cat([item.second + start for item, start in zip(batch, starts, strict=True)])
        species = torch.cat([item.species for item in batch])
        vectors = torch.cat([item.vectors for item in batch]).requires_grad_()
        atoms = (self.network(vectors, first, second, species) * self.readout[species]).sum(dim=1)
        (gradients,) = torch.autograd.grad(atoms.sum(), vectors, create_graph=True)
        forces = torch.zeros(len(species), 3).index_add(0, first, gradients).index_add(0, second, gradients, alpha=-1)
        frame_of = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(sizes))
        energies = torch.zeros(len(batch)).index_add(0, frame_of, atoms)
        weights = torch.tensor([item.weight for item in batch])
        error = forces - torch.cat([item.forces for item in batch])
        huber = torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=HUBER)
        off = energies - torch.tensor([item.energy for item in batch])
        count = torch.tensor(sizes, dtype=torch.float32)
        energy_term = torch.nn.functional.huber_loss(off / count.sqrt(), torch.zeros_like(off), reduction="none", delta=0.3)
        loss = 2.0 * (huber * weights[frame_of, None]).mean() + 2.0 * ENERGY_WEIGHT * (energy_term * weights).mean()
        return loss, float((error.detach() ** 2).mean()), float(((off.detach() / count) ** 2).mean())


def train(model: Model, items: list[Item], held: list[Item], settings: Settings, checkpoint: Path) -> Model:
    """AdamW with a cosine schedule; returns the exponential moving average of the weights."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=1e-4)
    average = copy.deepcopy(model)
    begin = _resume(checkpoint, model, average, optimiser)
    since, sums = time.perf_counter(), np.zeros(3)
    for step in range(begin, settings.steps):
        # every epoch is a permutation of its own, known from the seed and the step alone: a resumed run sees the same batches
        epoch, place = divmod(step * settings.batch, len(items) // settings.batch * settings.batch)
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(items))[place : place + settings.batch]
        ramp = min(1.0, (step + 1) / 500) * 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * max(ramp, 1e-3)
        loss, force, energy = model.loss([items[k] for k in order])
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - min(AVERAGE, (1 + step) / (10 + step)))
        sums += (float(loss.detach()), force, energy)
        if (step + 1) % 500 == 0:
            _report(step, begin, settings.steps, since, sums / 500, average, held)
            sums[:] = 0
        if (step + 1) % 2000 == 0:
            torch.save(
                {"step": step + 1, "model": model.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()},
                checkpoint,
            )
    return average


def _resume(checkpoint: Path, model: Model, average: Model, optimiser: torch.optim.Optimizer) -> int:
    if not checkpoint.exists():
        return 0
    held = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(held["model"])
    average.load_state_dict(held["average"])
    optimiser.load_state_dict(held["optimiser"])
    print(f"going on from step {held['step']} of {checkpoint}")
    return int(held["step"])


def _report(step: int, begin: int, steps: int, since: float, means: Array, model: Model, held: list[Item]) -> None:
    _, force, energy = model.loss(held)
    pace = (time.perf_counter() - since) / (step + 1 - begin)
    print(
        f"step {step + 1}/{steps}  loss {means[0]:.5f}  train F {1e3 * means[1] ** 0.5:.0f} E/N {1e3 * means[2] ** 0.5:.1f}  "
        f"held-out F {1e3 * force**0.5:.0f} meV/Å E/N {1e3 * energy**0.5:.1f} meV  {1e3 * pace:.0f} ms/step  "
        f"{(steps - step - 1) * pace / 60:.1f} min left",
        flush=True,
    )


def started(hyper: Hyper, start: Path | None) -> Model:
    """A new model, or one with the weights of a file. Its reference energies are fitted again, so the readout has to follow a little."""
    model = Model(hyper)
    if start is not None:
        tensors = load(f"painn:{start}", device="cpu").state()
        model.network.load_state_dict({key: torch.tensor(tensors[key]) for key in model.network.state_dict()})
        model.readout.data = torch.tensor(tensors["readout"], dtype=torch.float32).reshape(model.readout.shape)
    return model


def mean_row_norm(potential: PaiNN, data: dataset.DataSet, rows: npt.NDArray[np.int64], count: int = 150) -> float:
    """Mean squared norm of a force row over some MD frames of the training set, Å^-2: the prior of the last-layer update needs it."""
    rows = rows[np.char.startswith(data.kinds[rows], "md")]
    chosen = np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False)
    return float(np.mean(np.concatenate([(potential.force_rows(data.frames[k]).rows ** 2).sum(axis=1) for k in chosen])))


def write(
    model: Model, hyper: Hyper, reference: Array, data: dataset.DataSet, rows: npt.NDArray[np.int64], path: Path, facts: dict[str, object]
) -> None:
    """Write the weights file, its facts completed by the mean squared force row."""
    tensors = {key: np.ascontiguousarray(value.detach().numpy()) for key, value in model.network.state_dict().items()}
    tensors["readout"] = model.readout.detach().numpy().reshape(-1).astype(np.float64)
    tensors["reference"] = reference
    metadata = {"architecture": ARCHITECTURE, "hyper": json.dumps(asdict(hyper)), "facts": json.dumps(facts)}
    facts = {**facts, "mean_h2": mean_row_norm(PaiNN("painn:new", tensors, metadata), data, rows)}
    metadata["facts"] = json.dumps(facts, sort_keys=True)
    save_file(tensors, path, metadata)
    path.chmod(0o644)  # safetensors writes for the owner only, and a package is for all
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, {metadata['facts']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=dataset.DATA)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, default=None, help="default: the output with .checkpoint")
    parser.add_argument("--start", type=Path, help="weights to start from, instead of random ones")
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    settings = Settings(args.batch, args.steps, args.rate, args.seed)
    hyper = Hyper(ELEMENTS, channels=args.channels, layers=args.layers)
    data = dataset.read(args.data)
    sets = dataset.splits(data)
    print({key: len(rows) for key, rows in sets.items()})
    reference = reference_energies(data, sets["train"])
    items = prepare(data, sets["train"], hyper, reference)
    held = prepare(data, sets["block"], hyper, reference)
    model = train(started(hyper, args.start), items, held, settings, args.checkpoint or args.output.with_suffix(".checkpoint"))
    facts: dict[str, object] = {
        "level": LEVEL,
        "licence": "MIT",
        "data_sha256": dataset.content_hash(args.data),
        "frames": len(items),
        **asdict(settings),
    }
    write(model, hyper, reference, data, sets["train"], args.output, facts)


if __name__ == "__main__":
    main()
