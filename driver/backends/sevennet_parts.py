"""A SevenNet model taken apart: the network up to the features, and the last linear layer as readout and reference energies.

    E_i = s[z_i] (w · f_i + b) + e[z_i]

with f the input of the last linear layer (w, b) and the scale s and shift e of each element: the readout of an element is s w, its reference
energy s b + e. Knows files and the package sevenn, which is imported when it is needed; knows no frames.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tumbaga.driver.backends.guest import READOUT, REFERENCE, array_of, quiet
from tumbaga.driver.backends.guest_names import Wanted
from tumbaga.driver.backends.sevennet_files import PACKAGED
from tumbaga.driver.errors import PotentialError
from tumbaga.online.records import Array

ARCHITECTURE: Final = "sevennet-1"
_LEVEL: Final = "PBE, PBE+U (MPtrj)"
_LEVELS: Final = {"7net-0": _LEVEL, "7net-0_22may2024": _LEVEL, "7net-l3i5": _LEVEL}
_LICENCE: Final = "MIT"  # of the package, which the weights are a part of
CONSTANTS: Final = (
    "denominator",
    "basis_function.coeffs",
)  # endings of names: constants of the model, although torch calls them parameters
_LAST, _RESCALE, _ONEHOT = "reduce_hidden_to_energy", "rescale_atomic_energy", "onehot_idx_to_onehot"


class Parts(NamedTuple):
    """A model taken apart.

    Attributes:
        network: from a graph to the features, under `key`; float32.
        key: of the features in what the network returns.
        types: what the network calls each of `elements`.
        elements: atomic numbers, ascending.
        readout: shape (n_elements, n_hidden), float64, eV.
        reference: shape (n_elements,), float64, eV.
        config: what sevenn builds the model from.
        facts: what a version file says of it beside, JSON-compatible: "level" of theory, "licence" of the weights, how it was made.
    """

    network: Any
    key: str
    types: tuple[int, ...]
    elements: tuple[int, ...]
    readout: Array
    reference: Array
    config: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def cutoff(self) -> float:
        """Up to which length there are pairs, Å."""
        return float(self.config["cutoff"])

    @property
    def hyper(self) -> dict[str, Any]:
        """What a version file says of its shape: "elements", and what of "model" JSON can say."""
        return {"elements": self.elements, "model": {key: one for key, one in self.config.items() if _is_json(one)}}


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
    from sevenn.checkpoint import _config_cp_routine  # what its own loader does with a configuration, without its unpickling
    from sevenn.scripts.backward_compatibility import patch_state_dict_if_old

    try:
        with torch.serialization.safe_globals(_array_globals()):
            held = torch.load(asked.path, map_location="cpu", weights_only=True)
        config = _config_cp_routine(held["config"])
        tensors = held["model_state_dict"]
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PotentialError(
            asked.name, f"the file {str(asked.path)!r} is no SevenNet checkpoint of tensors and settings alone ({told:.160})"
        ) from error
    model = _built(asked.name, config)
    _fill(asked.name, model, patch_state_dict_if_old(tensors, config, model))
    known = tuple(sorted(model.type_map))
    if strange := sorted(set(asked.elements) - set(known)):
        named = ", ".join(chemical_symbols[z] for z in strange)
        raise PotentialError(asked.name, f"it does not know {named}; it knows {', '.join(chemical_symbols[z] for z in known)}")
    elements = asked.elements or known
    readout, reference = _last_layer(model, [model.type_map[z] for z in elements])
    facts = {"level": _LEVELS.get(asked.model, ""), "licence": _LICENCE if asked.model in PACKAGED else ""}
    return _parts(model, elements, readout, reference, config, facts)


def _of_version(asked: Wanted) -> Parts:
    try:
        with safe_open(asked.path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            metadata = file.metadata() or {}
        if metadata.get("architecture") != ARCHITECTURE:
            raise ValueError(f"it declares the architecture {metadata.get('architecture')!r}, not {ARCHITECTURE!r}")
        hyper, facts = json.loads(metadata["hyper"]), json.loads(metadata["facts"])
        config, elements = hyper["model"], tuple(hyper["elements"])
        config["_type_map"] = {int(z): kind for z, kind in config["_type_map"].items()}  # JSON has no numbers for keys
        readout, reference = tensors[READOUT].reshape(len(elements), -1), tensors[REFERENCE]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PotentialError(asked.name, f"the file {str(asked.path)!r} is no version of a SevenNet potential ({error})") from error
    if asked.elements not in ((), elements):
        raise PotentialError(asked.name, "the file says itself which elements it learns; leave out ?elements")
    parts = _parts(_built(asked.name, config), elements, readout, reference, config, facts)
    _fill(asked.name, parts.network, {key: torch.tensor(tensors[key]) for key in parts.network.state_dict() if key in tensors})
    return parts


def untrained(name: str, parts: Parts) -> Any:
    """A network like that of the parts, with new weights and the same constants; random numbers are torch's."""
    network = _parts(_built(name, parts.config), parts.elements, parts.readout, parts.reference, parts.config, parts.facts).network
    # a checkpoint's settings do not tell the mean number of neighbours, by which sums are divided
    kept = {key: value for key, value in parts.network.state_dict().items() if key.endswith(CONSTANTS)}
    network.load_state_dict({**network.state_dict(), **kept})
    return network


def _built(name: str, config: Mapping[str, Any]) -> Any:
    """The model with all its modules, untrained.

    Raises:
        PotentialError: it cannot be taken apart into features and a linear readout.
    """
    from sevenn.model_build import build_E3_equivariant_model

    if config.get("use_modality"):
        levels = ", ".join(config.get("_modal_map") or ())
        raise PotentialError(name, f"is a model of several levels of theory ({levels}), which is not supported; take one of a single level")
    model = build_E3_equivariant_model(dict(config))
    if _LAST not in model._modules or not hasattr(model._modules[_RESCALE], "scale"):
        raise PotentialError(name, "has no linear readout; models with readout_as_fcn are not supported")
    return model


def _fill(name: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise PotentialError(name, f"its tensors do not fit its settings ({' '.join(str(error).split()):.160})") from error


def _last_layer(model: Any, types: Sequence[int]) -> tuple[Array, Array]:
    """Readout (n_elements, n_hidden) and reference energies (n_elements,) of these types, float64, from the last linear layer and the scales."""
    last, rescale = model._modules[_LAST], model._modules[_RESCALE]
    layer = last.linear.double()
    with torch.no_grad():
        # asked, not read: the norm of its weights is its own affair
        zero = torch.zeros(1, last.irreps_in.dim, dtype=torch.float64)
        bias = layer(zero)[0, 0]
        slope = layer(zero + torch.eye(last.irreps_in.dim, dtype=torch.float64))[:, 0] - bias
    scale, shift = (array_of(one).reshape(-1) for one in (rescale.scale, rescale.shift))
    each = np.array(types) if scale.size > 1 else np.zeros(len(types), dtype=np.int64)
    return scale[each, None] * array_of(slope), scale[each] * float(bias) + shift[each]


def _parts(
    model: Any, elements: tuple[int, ...], readout: Array, reference: Array, config: Mapping[str, Any], facts: Mapping[str, Any]
) -> Parts:
    """Cut the model off before its last layer; elements are given to it as types, and slopes are taken outside."""
    key, names = model._modules[_LAST].key_input, list(model._modules)
    for name in names[names.index(_LAST) :]:
        model.delete_module_by_key(name)
    model.eval_type_map, model.key_grad = False, None
    model._modules[_ONEHOT].register_forward_hook(_same_dtype)
    types = tuple(model.type_map[z] for z in elements)
    return Parts(model.eval().requires_grad_(False), key, types, elements, readout, reference, config, facts)


def _same_dtype(module: nn.Module, given: Any, data: Any) -> Any:
    """The one-hot encoding is always float32: give it the dtype of the vectors, so that the network can run in float64."""
    for key in ("x", "node_attr"):
        data[key] = data[key].to(data["edge_vec"].dtype)
    return data


def _array_globals() -> list[Any]:
    """What a checkpoint holds beside tensors: settings as numpy arrays, written by numpy 1 or 2."""
    rebuild = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    old: list[Any] = [(rebuild, "numpy.core.multiarray._reconstruct")]
    return [*old, rebuild, np.ndarray, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType, np.dtypes.Int64DType]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
