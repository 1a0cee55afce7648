"""A MACE model taken from its file: the network up to the features, readout and reference energies, and the settings to build it again.

A `.model` file is a pickle of the whole module: to open it is to run it, and the user is told so. Only its tensors and settings are kept; what
serves is built from them by mace's own classes, here as from a version file, and must say what the pickled model says. Knows no frames.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tumbaga.driver.backends.flat import DTYPES
from tumbaga.driver.backends.guest import READOUT, REFERENCE, quiet
from tumbaga.driver.backends.mace_files import Wanted
from tumbaga.driver.backends.mace_net import Network, Readout, UnfitError, cut
from tumbaga.driver.errors import PotentialError
from tumbaga.online.records import Array

ARCHITECTURE: Final = "mace-1"
_UNSAFE: Final = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_AGREE: Final = 1e-6  # of the energy: float64 sums in another order differ by far less, another architecture by far more
_IRREPS: Final = ("hidden_irreps", "MLP_irreps", "edge_irreps")
_PROBE: Final = np.array([[0.0, 0.0, 0.0], [1.4, 0.0, 0.0], [0.1, 1.7, 0.0], [0.3, 0.5, 1.9]])  # Å; all within any cutoff in use
_log = logging.getLogger(__name__)


class Parts(NamedTuple):
    """A model taken apart.

    Attributes:
        network: from pairs to the features; float64.
        types: what the network calls each of `elements`.
        elements: atomic numbers, ascending.
        readout: shape (n_elements, n_hidden), float64, eV.
        reference: shape (n_elements,), float64, eV.
        scale: of the network's pair repulsion.
        config: what mace builds the model from, JSON-compatible.
        head: that speaks; empty where there is one only.
        facts: what a version file says of it beside, JSON-compatible: "level" of theory and "licence" of the weights, empty if unknown.
    """

    network: Network
    types: tuple[int, ...]
    elements: tuple[int, ...]
    readout: Array
    reference: Array
    scale: float
    config: Mapping[str, Any]
    head: str
    facts: Mapping[str, Any] = MappingProxyType({"level": "", "licence": ""})

    @property
    def cutoff(self) -> float:
        """Up to which length there are pairs, Å."""
        return float(self.config["r_max"])

    @property
    def hyper(self) -> dict[str, Any]:
        """What a version file says of its shape: "elements", "head" and "model"."""
        return {"elements": self.elements, "head": self.head, "model": self.config}


def taken_apart(asked: Wanted) -> tuple[Parts, bool]:
    """Read a `.model` or a version file; return its parts, and whether it is to learn.

    Raises:
        PotentialError: the file is damaged or something else, or the model cannot be taken apart; the sentence says which.
    """
    version = asked.path.suffix == ".safetensors"
    with quiet():
        return (_of_version(asked) if version else _of_pickle(asked)), version or bool(asked.elements)


def _of_pickle(asked: Wanted) -> Parts:
    pickled = _unpickled(asked)
    config, tensors = _settings(asked.name, pickled), pickled.state_dict()
    head = _head(asked.name, config["heads"], asked.head)
    index = config["heads"].index(head)
    model = _built(asked.name, config)
    _fill(asked.name, model, tensors, {key for key, _ in model.named_parameters()})
    known = tuple(sorted(config["atomic_numbers"]))
    if strange := sorted(set(asked.elements) - set(known)):
        named = ", ".join(chemical_symbols[z] for z in strange)
        raise PotentialError(asked.name, f"it does not know {named}; it knows {', '.join(chemical_symbols[z] for z in known)}")
    elements = asked.elements or known
    network, last = _cut(asked.name, model, index)
    readout = np.tile(last.slope, (len(elements), 1))
    parts = _parts(network, elements, readout, _reference(config, elements, index, last), last.scale, config, head)
    _compare(asked.name, pickled, parts)
    return parts


def _of_version(asked: Wanted) -> Parts:
    try:
        with safe_open(asked.path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            metadata = file.metadata() or {}
        if metadata.get("architecture") != ARCHITECTURE:
            raise ValueError(f"it declares the architecture {metadata.get('architecture')!r}, not {ARCHITECTURE!r}")
        hyper, facts = json.loads(metadata["hyper"]), json.loads(metadata["facts"])
        config, elements, head = hyper["model"], tuple(hyper["elements"]), str(hyper["head"])
        readout, reference = tensors[READOUT].reshape(len(elements), -1), tensors[REFERENCE]
        index = config["heads"].index(head)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PotentialError(asked.name, f"the file {str(asked.path)!r} is no version of a MACE potential ({error})") from error
    if asked.elements not in ((), elements) or asked.head not in ("", head):
        raise PotentialError(
            asked.name, "the file says itself which elements it learns, and which head speaks; leave out ?elements and ?head"
        )
    network, last = _cut(asked.name, _built(asked.name, config), index)
    own = network.state_dict()
    _fill(asked.name, network, {key: torch.tensor(tensors[key]).reshape(own[key].shape) for key in own if key in tensors}, set(own))
    parts = _parts(network, elements, readout, reference, last.scale, config, head)
    return parts._replace(facts={key: str(facts.get(key, "")) for key in ("level", "licence")})


def _parts(
    network: Network, elements: tuple[int, ...], readout: Array, reference: Array, scale: float, config: Mapping[str, Any], head: str
) -> Parts:
    types = tuple(config["atomic_numbers"].index(z) for z in elements)
    return Parts(network.eval().requires_grad_(False), types, elements, readout, reference, scale, config, head)


def _unpickled(asked: Wanted) -> Any:
    """The model of a `.model` file, on the CPU; a MACE is made the ScaleShiftMACE that it is, of scale 1 and shift 0."""
    _warn(asked.path)
    models = _package()
    try:
        pickled = torch.load(asked.path, map_location="cpu", weights_only=False)
    except Exception as error:  # foreign code runs here: it may raise anything
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PotentialError(asked.name, f"the file {str(asked.path)!r} is no pickled MACE model ({told:.160})") from error
    if type(pickled) is models.MACE:
        heads = len(getattr(pickled, "heads", None) or ["Default"])
        pickled.scale_shift, pickled.__class__ = models.ScaleShiftBlock([1.0] * heads, [0.0] * heads), models.ScaleShiftMACE
    if type(pickled) is not models.ScaleShiftMACE:
        raise PotentialError(
            asked.name,
            f"the file {str(asked.path)!r} holds a {type(pickled).__name__}; supported are MACE and ScaleShiftMACE, as saved by mace",
        )
    return pickled


@functools.cache
def _warn(path: Path) -> None:
    """Once for each file and process."""
    _log.warning("%s is a pickle: opening it runs code that it holds. Use files only of a source that you trust", path)


def _settings(name: str, pickled: Any) -> dict[str, Any]:
    """What mace builds the model from, JSON-compatible: classes and functions by name, arrays as lists.

    Raises:
        PotentialError: it wants to know more of a frame than species, positions and cell, or mace cannot tell.
    """
    from mace.tools.scripts_utils import extract_config_mace_model

    try:
        held = {key: _plain(one) for key, one in extract_config_mace_model(pickled).items()}
    except (AttributeError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise PotentialError(name, f"the installed mace-torch cannot tell how the model is built ({error!s:.160})") from error
    if held.pop("embedding_specs") is not None:
        raise PotentialError(name, "is a model that wants to know charge, spin or the like of each frame, which is not supported")
    del held["use_embedding_readout"], held["cueq_config"]
    return {**held, "dtype": str(next(pickled.parameters()).dtype).removeprefix("torch.")}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if hasattr(value, "__name__"):
        return value.__name__
    return str(value) if type(value).__name__ == "Irreps" else value


def _built(name: str, config: Mapping[str, Any]) -> Any:
    """The model with all its modules, untrained, in the dtype that it was saved in: constants of its code are rounded to it."""
    models = _package()
    from e3nn.o3 import Irreps

    given = dict(config)
    try:
        dtype = DTYPES[given.pop("dtype")]
        for key in ("interaction_cls", "interaction_cls_first"):
            given[key] = models.interaction_classes[given[key]]
        given["readout_cls"] = models.readout_classes[given["readout_cls"]]
        given["gate"] = models.gate_dict[str(given["gate"])]
        given.update({key: Irreps(given[key]) for key in _IRREPS if given[key] is not None})
        given["atomic_energies"] = np.array(given["atomic_energies"])
        with torch.random.fork_rng(devices=[]), _default_dtype(dtype):
            return models.ScaleShiftMACE(**given).double()
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise PotentialError(name, f"cannot be built from its settings by the installed mace-torch ({error!s:.160})") from error


def _fill(name: str, model: nn.Module, tensors: Mapping[str, Tensor], needed: set[str]) -> None:
    """Copy tensors into a model. Buffers beside the needed ones come and go with the versions of mace: what they mean shows in the energy."""
    try:
        if lacking := sorted(needed - set(tensors)):
            raise RuntimeError(f"{lacking[0]} is missing")
        model.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:
        raise PotentialError(name, f"its tensors do not fit its settings ({' '.join(str(error).split()):.160})") from error


def _cut(name: str, model: Any, head: int) -> tuple[Network, Readout]:
    try:
        return cut(model, head)
    except UnfitError as error:
        raise PotentialError(name, str(error)) from error


def _head(name: str, heads: Sequence[str], asked: str) -> str:
    """The head that speaks: the named one, the only one, or the one called default, as in mace's own calculator."""
    found = [one for one in heads if one == asked] if asked else [one for one in heads if len(heads) == 1 or one.lower() == "default"]
    if not found:
        raise PotentialError(name, f"has the heads {', '.join(heads)}; choose one of them, for example ?head={heads[0]}")
    return found[0]


def _reference(config: Mapping[str, Any], elements: Sequence[int], head: int, last: Readout) -> Array:
    energies = np.atleast_2d(np.array(config["atomic_energies"], dtype=np.float64))
    return np.array([energies[head, config["atomic_numbers"].index(z)] + last.constant for z in elements])


def _compare(name: str, pickled: Any, parts: Parts) -> None:
    """Hold the model that was built against the one that was saved, on four atoms.

    Raises:
        PotentialError: they differ, or the saved one does not run.
    """
    kinds = np.resize(np.arange(len(parts.elements)), len(_PROBE))
    first, second = np.nonzero(~np.eye(len(_PROBE), dtype=bool))
    species = torch.eye(len(parts.config["atomic_numbers"]), dtype=torch.float64)[np.array(parts.types)[kinds]]
    pairs, positions = torch.tensor(np.stack([first, second])), torch.tensor(_PROBE)
    nothing = torch.zeros(len(first), 3, dtype=torch.float64)
    data = {
        "positions": positions.clone(),
        "node_attrs": species,
        "edge_index": pairs,
        "shifts": nothing,
        "unit_shifts": nothing,
        "cell": torch.zeros(3, 3, dtype=torch.float64),
        "batch": torch.zeros(len(_PROBE), dtype=torch.int64),
        "ptr": torch.tensor([0, len(_PROBE)]),
        "head": torch.tensor([parts.config["heads"].index(parts.head)]),
    }
    try:
        saved = float(pickled.double()(data, compute_force=False)["energy"])
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise PotentialError(name, f"the installed mace-torch cannot run the saved model ({' '.join(str(error).split()):.160})") from error
    features, repulsion = parts.network(species, pairs, positions[second] - positions[first])
    built = float((features.numpy() * parts.readout[kinds]).sum() + parts.reference[kinds].sum())
    if repulsion is not None:
        built += parts.scale * float(repulsion.sum())
    if not abs(built - saved) <= _AGREE * (1.0 + abs(saved)):
        raise PotentialError(name, f"the model built from its settings gives {built:.6f} eV for a test frame, the saved one {saved:.6f} eV")


def _package() -> Any:
    """The module mace.modules. Its import prints, and has all later torch.load of the process run what a pickle asks for: both are undone."""
    before = os.environ.get(_UNSAFE)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from mace import modules
    finally:
        if before is None:
            os.environ.pop(_UNSAFE, None)
        else:
            os.environ[_UNSAFE] = before
    return modules


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
