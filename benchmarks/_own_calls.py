"""What each package does by itself for energy, forces and stress: its calculator, and the call of its model inside of it. Imports are lazy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import ase
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Own(NamedTuple):
    """A package's own way.

    Attributes:
        calculator: its ASE calculator, as its documentation has it.
        prepare: from atoms to what the model takes (graph, device), which is not timed.
        call: the model's answer to that: energy, eV, and forces, shape (n_atoms, 3), eV/Å, on the host.
        periodic: whether it needs a cell.
    """

    calculator: Any
    prepare: Callable[[ase.Atoms], Any]
    call: Callable[[Any], tuple[float, Array]]
    periodic: bool = False


def sevennet(rest: str) -> Own:
    import torch
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.calculator import SevenNetCalculator
    from sevenn.train.dataload import unlabeled_atoms_to_graph

    from tumbaga.driver.backends.sevennet_files import wanted

    calculator = SevenNetCalculator(str(wanted(rest).path), device="cpu")

    def prepare(atoms: ase.Atoms) -> Any:
        return AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, calculator.cutoff, with_shift=False)).to(torch.device("cpu"))

    def call(data: Any) -> tuple[float, Array]:
        said = calculator.output_to_results(calculator.model(data))
        return said["energy"], said["forces"]

    return Own(calculator, prepare, call)


def chgnet(rest: str) -> Own:
    from chgnet.model.dynamics import CHGNetCalculator
    from chgnet.model.model import CHGNet
    from pymatgen.io.ase import AseAtomsAdaptor

    from tumbaga.driver.backends.chgnet_files import wanted

    model = CHGNet.from_file(str(wanted(rest).path))
    calculator = CHGNetCalculator(model, use_device="cpu")

    def prepare(atoms: ase.Atoms) -> Any:
        return model.graph_converter(AseAtomsAdaptor.get_structure(atoms))

    def call(graph: Any) -> tuple[float, Array]:
        said = model.predict_graph(graph, task="efs")  # what a back end gives; magnetic moments are not asked for
        return float(said["e"]) * len(said["f"]), said["f"]

    return Own(calculator, prepare, call, periodic=True)


def mace(rest: str) -> Own:
    from mace.calculators import MACECalculator

    from tumbaga.driver.backends.mace_files import wanted

    calculator = MACECalculator(model_paths=str(wanted(rest).path), device="cpu", default_dtype="float32")

    def prepare(atoms: ase.Atoms) -> Any:
        return calculator._atoms_to_batch(atoms).to_dict()

    def call(batch: Any) -> tuple[float, Array]:
        said = calculator.models[0](batch, compute_stress=True)
        return float(said["energy"].detach()), said["forces"].detach().numpy()

    return Own(calculator, prepare, call)


OWN = {"sevennet": sevennet, "chgnet": chgnet, "mace": mace}


def own(model: str) -> Own | None:
    """The own way of the package behind a potential's name; None where there is none but the back end's."""
    kind, _, rest = model.partition(":")
    if kind not in OWN:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the packages call outdated
        return OWN[kind](rest)
