"""Data sets in LMDB files: fairchem's ASE rows as compressed JSON (.aselmdb), and OC20's pickled S2EF frames (.lmdb).

OC20's frames are pickles of torch_geometric's `Data`. They are read without that package, and by an unpickler that knows a handful of
names of tensors and containers and refuses all others: a pickle then makes data, and runs nothing.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from tumbaga.driver.datasets_raw import Raw
from tumbaga.driver.errors import DataError

_log = logging.getLogger(__name__)
_MAX_BYTES: Final = 256 * 2**20  # of one frame, unpacked


def ase_rows(path: Path) -> Iterator[Raw]:
    """Read ASE rows in the order of their numbers.

    Raises:
        DataError: lmdb is not installed, or the file is damaged or something else.
    """
    for number, (key, value) in enumerate(_values(path)):
        try:
            row = _unpacked(value)
            more = {**row.get("data", {}), **row.get("key_value_pairs", {})}
            results = {**more, **{name: value for name, value in row.items() if name not in ("data", "key_value_pairs", "constraints")}}
            yield Raw(row["numbers"], row["positions"], row["cell"], row["pbc"], results)
        except (zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(str(path), f"the entry {key} is no ASE row ({type(error).__name__}: {error})", number) from error


def oc20(path: Path) -> Iterator[Raw]:
    """Read S2EF frames: `y` the referenced energy, eV, `force`, `pos`, `cell`, `atomic_numbers`. Periodic unless `pbc` says otherwise.

    Raises:
        DataError: lmdb is not installed, the file is damaged, or a pickle asks for more than tensors and containers.
    """
    _log.warning("%s holds pickles; they are read as tensors and containers alone, and whatever else is in them is refused", path)
    for number, (key, value) in enumerate(_values(path)):
        try:
            data = _Unpickler(io.BytesIO(value)).load()
            fields = _fields(data)
        except Exception as error:  # damaged pickles raise anything
            raise DataError(str(path), f"the entry {key} cannot be read ({type(error).__name__}: {error!s:.160})", number) from error
        if missing := [name for name in ("pos", "atomic_numbers", "cell") if name not in fields]:
            yield Raw([], [], [], [], broken=f"has no {missing[0]}")
            continue
        numbers = np.asarray(fields["atomic_numbers"]).astype(np.int64)
        cell = np.reshape(np.asarray(fields["cell"]), (-1, 3))
        pbc = np.ravel(np.asarray(fields.get("pbc", [True, True, True])))
        energy = next((fields[name] for name in ("y", "y_relaxed", "energy") if fields.get(name) is not None), None)
        forces = next((fields[name] for name in ("force", "forces") if fields.get(name) is not None), None)
        results = {"energy": energy, "forces": forces, "stress": fields.get("stress")}
        yield Raw(numbers, fields["pos"], cell, pbc, {name: value for name, value in results.items() if value is not None})


# -- LMDB ------------------------------------------------------------------------------------------------------------------------------


def _values(path: Path) -> Iterator[tuple[str, bytes]]:
    """Keys that are numbers, in their order, with their values; keys such as "length" and "nextid" are bookkeeping."""
    try:
        import lmdb
    except ImportError as error:
        raise DataError(str(path), "reading it needs the package lmdb: pip install 'tumbaga[data]'") from error
    try:
        # without a lock nothing is left beside the file, and a read-only folder will do
        with lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False) as held, held.begin() as view:
            keys = sorted((key for key in view.cursor().iternext(keys=True, values=False) if key.isdigit()), key=int)
            for key in keys:
                yield key.decode(), view.get(key, b"")
    except lmdb.Error as error:
        raise DataError(str(path), f"cannot be read as LMDB; it is damaged or something else ({error})") from error


# -- ASE rows --------------------------------------------------------------------------------------------------------------------------


def _unpacked(value: bytes) -> dict[str, Any]:
    machine = zlib.decompressobj()
    text = machine.decompress(value, _MAX_BYTES)
    if machine.unconsumed_tail:
        raise ValueError(f"more than {_MAX_BYTES // 2**20} MB unpacked")
    row = json.loads(text, object_hook=_array)
    if not isinstance(row, dict):
        raise TypeError("not an object")
    # ASE stores what a user adds to a row as JSON within the JSON
    for name in ("data", "key_value_pairs"):
        if isinstance(row.get(name), str):
            row[name] = json.loads(row[name], object_hook=_array)
    return row


def _array(found: dict[str, Any]) -> Any:
    """ASE's own form of an array, {"__ndarray__": [shape, dtype, numbers]}; lists, as fairchem writes them, stay."""
    if "__ndarray__" not in found:
        return found.get("array", found) if found.get("__ase_objtype__") == "cell" else found
    shape, dtype, numbers = found["__ndarray__"]
    return np.array(numbers, dtype=np.dtype(dtype)).reshape(shape)


# -- pickles ---------------------------------------------------------------------------------------------------------------------------


class _Held:
    """Stands for torch_geometric's `Data` and its parts: whatever state the pickle gives, and nothing that acts."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _storage(data: bytes) -> Any:
    """The memory of a tensor, as torch writes it into a pickle: an archive of its own, read as tensors alone."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


def _tensor(*arguments: Any) -> Any:
    import torch

    return torch._utils._rebuild_tensor_v2(*arguments)  # type: ignore[no-untyped-call]


_HERE: Final[dict[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}
_NUMPY: Final = ("dtype", "ndarray", "scalar", "_reconstruct", "_frombuffer")  # what arrays and numbers are rebuilt with


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch_geometric.data"):
            return _Held
        if (module, name) in _HERE:
            return _HERE[module, name]
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric") and name in _NUMPY:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is neither a tensor nor a container")


def _fields(data: Any) -> dict[str, Any]:
    """The named tensors of a `Data` of any age: in its state (before torch_geometric 2), or in the mapping of its store."""
    state = data.state if isinstance(data, _Held) else data
    if isinstance(state, dict) and isinstance(state.get("_store"), _Held):
        state = state["_store"].state
    if isinstance(state, dict) and isinstance(state.get("_mapping"), dict):
        state = state["_mapping"]
    if not isinstance(state, dict):
        raise TypeError("it is no frame of torch_geometric")
    return {str(name): value for name, value in state.items() if value is not None}
