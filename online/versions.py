"""Version files: one immutable set of weights each, safetensors, named by number and content hash.

A file holds all tensors of the potential, so that it can be loaded by itself, and beside them the last layer as the learner sees it:
the readout (float64) and the precision matrix of the update, from which the uncertainty follows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from tumbaga.online.errors import VersionError
from tumbaga.online.records import Array

FOLDER = "versions"
SERVING = "serving.json"
NETWORK = "network"  # in the metadata: the `fingerprint` of what lies before the readout
QUANTILE = "quantile"  # in the facts: the multiplier of the calibration with which the version began
ORIGIN = "origin"  # in the metadata: that of the network with which the run began, where it is another one
_READOUT, _COVARIANCE, _ENERGIES, _FACTS = "last_layer.readout", "last_layer.covariance", "last_layer.energy_covariance", "tumbaga"


@dataclass(frozen=True, eq=False)
class LastLayer:
    """What a version says of the readout.

    Attributes:
        readout: weights, shape (n_columns,), float64, eV.
        covariance: posterior covariance of the weights, shape (n_columns, n_columns), float64, eV^2.
        facts: number, parent, counts, errors: JSON-compatible.
        metadata: of a file that was read, what the potential says of itself there.
        energy_covariance: of readout and offsets, shape (n_columns + n_species, n_columns + n_species), float64, eV²; None
            where no label has said anything of energies.
    """

    readout: Array
    covariance: Array
    facts: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    energy_covariance: Array | None = None


@dataclass(frozen=True)
class VersionFile:
    """A version on disk; `path` is relative to the run directory."""

    number: int
    hash: str
    path: str


def write(
    run_dir: Path, number: int, tensors: Mapping[str, np.ndarray], layer: LastLayer, metadata: Mapping[str, str], origin: str = ""
) -> VersionFile:
    """Write a version file, whole or not at all, and return its name.

    Args:
        run_dir: the run directory; the file goes to its `versions` folder.
        number: the version's number.
        tensors: all tensors of the potential (the readout among them already the new one).
        layer: readout and covariance.
        metadata: the potential's own metadata, kept beside ours.
        origin: `fingerprint` of the network with which the run began; only told where the version has another.
    """
    facts = json.dumps({**layer.facts, "number": number}, sort_keys=True)
    own = {_READOUT: np.ascontiguousarray(layer.readout), _COVARIANCE: np.ascontiguousarray(layer.covariance)}
    if layer.energy_covariance is not None:
        own[_ENERGIES] = np.ascontiguousarray(layer.energy_covariance)
    told = {**metadata, _FACTS: facts}
    if network := fingerprint(tensors, layer.readout):
        told[NETWORK] = network
        if origin and origin != network:
            told[ORIGIN] = origin
    data = _in_order(save_tensors({**{k: np.ascontiguousarray(v) for k, v in tensors.items()}, **own}, told))
    digest = hashlib.sha256(data).hexdigest()
    path = Path(FOLDER) / f"{number:06d}-{digest[:8]}.safetensors"
    write_whole(run_dir / path, data)
    return VersionFile(number, digest, str(path))


def fingerprint(tensors: Mapping[str, np.ndarray], readout: Array) -> str:
    """Return a hash of all tensors but the readout, empty if there are no others: a readout means nothing behind another network.

    Args:
        tensors: of a potential; floating-point ones count with the digits of float32, so that the precision they run in does not matter.
        readout: the one among them, whatever its name.
    """
    digest = hashlib.sha256()
    others = {name: one for name, one in tensors.items() if not (one.size == readout.size and np.array_equal(one.reshape(-1), readout))}
    for name, one in sorted(others.items()):
        digest.update(f"{name} {one.shape} ".encode())
        digest.update((one.astype(np.float32) if np.issubdtype(one.dtype, np.floating) else one).tobytes())
    return digest.hexdigest()[:16] if others else ""


def read(path: Path) -> LastLayer:
    """Read the last layer of a version file.

    Raises:
        VersionError: the file is missing, truncated, changed since it was written, or holds numbers that are not finite.
    """
    try:
        data = path.read_bytes()
        tensors = load_tensors(data)
        metadata = _metadata(data)
        facts = json.loads(metadata.pop(_FACTS, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise VersionError(str(path), f"cannot be read ({error})") from error
    named = path.stem.rpartition("-")[2]
    if not hashlib.sha256(data).hexdigest().startswith(named):
        raise VersionError(str(path), "has changed since it was written: its content does not match the hash in its name")
    if _READOUT not in tensors or _COVARIANCE not in tensors:
        raise VersionError(str(path), "holds no last layer; it is not a version file")
    readout, covariance = tensors[_READOUT].astype(np.float64), tensors[_COVARIANCE].astype(np.float64)
    if covariance.shape != (readout.size, readout.size) or not (np.isfinite(readout).all() and np.isfinite(covariance).all()):
        raise VersionError(str(path), "holds a last layer of the wrong shape or with numbers that are not finite")
    of_energies = tensors[_ENERGIES].astype(np.float64) if _ENERGIES in tensors else None
    if of_energies is not None and not (_square(of_energies) and len(of_energies) > readout.size and np.isfinite(of_energies).all()):
        raise VersionError(str(path), "holds an uncertainty of energies of the wrong shape or with numbers that are not finite")
    return LastLayer(readout, covariance, facts, metadata, of_energies)


def _square(matrix: Array) -> bool:
    return matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file: 8 bytes of little-endian length, then a JSON header with the key __metadata__."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    return found


def _in_order(data: bytes) -> bytes:
    """The same file with a sorted header, so that equal contents have equal bytes: safetensors writes metadata in any order."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a kill at any instant leaves the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk the part of a file is in the way of everything else
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
