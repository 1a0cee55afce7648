"""A CHGNet model taken apart: the network up to the features, and the last linear layer as readout and reference energies.

    E_i = w · f_i + b + e[z_i]

with f the input of the last linear layer (w, b), which is the same for all elements, and e the package's table of energies of the elements.
The package gives energies an atom, the mean of these; they are summed here. Knows files and the package chgnet, which is imported when it is
needed; knows no frames.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tumbaga.driver.backends.chgnet_files import PACKAGED
from tumbaga.driver.backends.chgnet_net import Network
from tumbaga.driver.backends.guest import READOUT, REFERENCE, array_of, quiet
from tumbaga.driver.backends.guest_names import Wanted
from tumbaga.driver.errors import PotentialError
from tumbaga.online.records import Array

ARCHITECTURE: Final = "chgnet-1"
_LEVELS: Final = {
    "0.3.0": "PBE, PBE+U, MP2020 corrections (MPtrj)",
    "0.2.0": "PBE, PBE+U, MP2020 corrections (MPtrj)",
    "r2scan": "r2SCAN (MP-r2SCAN)",
}
_LICENCE: Final = "BSD-3-Clause-LBNL"  # of the package, which the weights are a part of
_UNSEEN: Final = (84, 85, 86, 87, 88)  # Po, At, Rn, Fr, Ra: the network has rows for them, but no structure of MPtrj holds any
_TABLE: Final = "composition_model.fc.weight"


class Parts(NamedTuple):
    """A model taken apart.

    Attributes:
        network: from a graph to the features; float64, not to be trained.
        elements: atomic numbers, ascending.
        readout: shape (n_elements, n_hidden), float64, eV.
        reference: shape (n_elements,), float64, eV.
        config: what chgnet builds the model from.
        facts: what a version file says of it beside, JSON-compatible: "level" of theory, "licence" of the weights, how it was made.
    """

    network: Network
    elements: tuple[int, ...]
    readout: Array
    reference: Array
    config: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def cutoff(self) -> float:
        """Up to which length there are pairs, Å."""
        return self.network.cutoff

    @property
    def hyper(self) -> dict[str, Any]:
        """What a version file says of its shape: "elements" and "model"."""
        return {"elements": self.elements, "model": self.config}


def taken_apart(asked: Wanted) -> tuple[Parts, bool]:
    """Read a checkpoint or a version file; return its parts, and whether it is to learn.

    A checkpoint is a pickle of foreign origin: it is read with torch's `weights_only`, so nothing in it is executed.

    Raises:
        PotentialError: the file is damaged or something else, or the model cannot be taken apart; the sentence says which.
    """
    version = asked.path.suffix == ".safetensors"
    with quiet():
        return (_of_version(asked) if version else _of_checkpoint(asked)), version or bool(asked.elements)


def _of_checkpoint(asked: Wanted) -> Parts:
    try:
        with torch.serialization.safe_globals(_number_globals()):
            held = torch.load(asked.path, map_location="cpu", weights_only=True)["model"]
        # the package's loader tells it by the name of the model, which a copied file has not
        biased = "atom_conv_layers.0.mlp_out.layers.1.bias" in held["state_dict"]
        config = json.loads(json.dumps({"mlp_out_bias": biased, **held["model_args"]}))  # as a version file gives them back
        tensors = {key: value.double() for key, value in held["state_dict"].items()}
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PotentialError(
            asked.name, f"the file {str(asked.path)!r} is no CHGNet checkpoint of tensors and settings alone ({told:.160})"
        ) from error
    table = _table(asked.name, tensors)
    model = _built(asked.name, config)
    _fill(asked.name, model, {key: value for key, value in tensors.items() if key != _TABLE})
    known = tuple(z for z in range(1, len(table) + 1) if asked.model not in PACKAGED or z not in _UNSEEN)
    if strange := sorted(set(asked.elements) - set(known)):
        named = ", ".join(chemical_symbols[z] for z in strange)
        raise PotentialError(asked.name, f"it does not know {named}; it knows {', '.join(chemical_symbols[z] for z in known)}")
    elements = asked.elements or known
    last = getattr(model.mlp, "layers", model.mlp)[-1]
    readout = np.tile(array_of(last.weight), (len(elements), 1))
    reference = table[np.array(elements) - 1] + float(last.bias)
    facts = {"level": _LEVELS[asked.model], "licence": _LICENCE} if asked.model in PACKAGED else {}
    return Parts(_network(model), elements, readout, reference, config, facts)


def _of_version(asked: Wanted) -> Parts:
    try:
        with safe_open(asked.path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            metadata = file.metadata() or {}
        if metadata.get("architecture") != ARCHITECTURE:
            raise ValueError(f"it declares the architecture {metadata.get('architecture')!r}, not {ARCHITECTURE!r}")
        hyper, facts = json.loads(metadata["hyper"]), json.loads(metadata["facts"])
        config, elements = hyper["model"], tuple(hyper["elements"])
        readout, reference = tensors[READOUT].reshape(len(elements), -1), tensors[REFERENCE]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PotentialError(asked.name, f"the file {str(asked.path)!r} is no version of a CHGNet potential ({error})") from error
    if asked.elements not in ((), elements):
        raise PotentialError(asked.name, "the file says itself which elements it learns; leave out ?elements")
    network = _network(_built(asked.name, config))
    _fill(asked.name, network, {key: torch.tensor(tensors[key]) for key in network.state_dict() if key in tensors})
    return Parts(network, elements, readout, reference, config, facts)


def untrained(name: str, parts: Parts) -> Network:
    """A network like that of the parts, with new weights; random numbers are torch's."""
    with quiet():
        return _network(_built(name, parts.config))


def _table(name: str, tensors: Mapping[str, Tensor]) -> Array:
    """The energies of the elements from hydrogen on, eV; zeros where the model has none.

    Raises:
        PotentialError: it has something else than a table.
    """
    if any(key.startswith("composition_model.") and key != _TABLE for key in tensors):
        raise PotentialError(
            name, "has energies of the elements that are no table; composition models other than AtomRef are not supported"
        )
    return array_of(tensors[_TABLE]).reshape(-1) if _TABLE in tensors else np.zeros(len(tensors["atom_embedding.embedding.weight"]))


def _built(name: str, config: Mapping[str, Any]) -> Any:
    """The model with all its modules but the table, untrained, float64.

    Raises:
        PotentialError: it cannot be built, or its energy is not a sum of linear functions of features of atoms.
    """
    from chgnet.model.model import CHGNet

    try:
        # float64, so that weights of either kind survive; it tells how many parameters it has, which nobody asked
        with contextlib.redirect_stdout(io.StringIO()):
            model = CHGNet(**{**config, "composition_model": None}).double()
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise PotentialError(name, f"cannot be built from its settings ({error})") from error
    if not model.mlp_first or not model.is_intensive:
        raise PotentialError(name, "has no linear readout of atoms; models with mlp_first or is_intensive off are not supported")
    return model


def _fill(name: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise PotentialError(name, f"its tensors do not fit its settings ({' '.join(str(error).split()):.160})") from error


def _network(model: Any) -> Network:
    return Network(model).eval().requires_grad_(False)


def _number_globals() -> list[Any]:
    """What a checkpoint of the package's trainer may hold beside tensors and plain numbers: numpy's, written by numpy 1 or 2."""
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    old: list[Any] = [(scalar, "numpy.core.multiarray.scalar")]
    return [*old, scalar, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType, np.dtypes.Int64DType]
