"""Version files: exact, checked against the hash in their name, and never half written."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from tumbaga.online import versions
from tumbaga.online.errors import VersionError
from tumbaga.online.versions import LastLayer, VersionFile


def layer(n: int = 4) -> LastLayer:
    rng = np.random.default_rng(1)
    root = rng.standard_normal((n, n))
    return LastLayer(rng.standard_normal(n) * 1e3, root @ root.T, {"parent": 2, "labels": 5})


def written(run_dir: Path, made: LastLayer | None = None, number: int = 12) -> VersionFile:
    tensors = {"net.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "readout": np.zeros(4)}
    return versions.write(run_dir, number, tensors, made or layer(), {"architecture": "toy"})


def test_a_last_layer_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    """Readout, covariance and facts are what was written, and the facts know the number."""
    made = layer()
    file = written(tmp_path, made)
    found = versions.read(tmp_path / file.path)

    assert found.readout.tobytes() == made.readout.tobytes()
    assert found.covariance.tobytes() == made.covariance.tobytes()
    assert found.facts == {"parent": 2, "labels": 5, "number": 12}


def test_what_is_known_of_energies_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    """It stands in the file where there is something to know, and files of before have none."""
    made = replace(layer(), energy_covariance=np.random.default_rng(2).standard_normal((6, 6)))
    found = versions.read(tmp_path / written(tmp_path, made).path)

    assert found.energy_covariance is not None
    assert found.energy_covariance.tobytes() == made.energy_covariance.tobytes()
    assert versions.read(tmp_path / written(tmp_path).path).energy_covariance is None


@pytest.mark.parametrize("unsound", [np.eye(4), np.ones((5, 6)), np.ones(25), np.full((5, 5), np.nan)])
def test_unsound_uncertainties_of_energies_are_refused(tmp_path: Path, unsound: np.ndarray) -> None:
    """No wider than the readout, not square, or not finite."""
    with pytest.raises(VersionError, match="uncertainty of energies of the wrong shape or with numbers that are not finite"):
        versions.read(tmp_path / written(tmp_path, replace(layer(), energy_covariance=unsound)).path)


def test_a_version_is_named_by_number_and_content(tmp_path: Path) -> None:
    """Equal contents have equal names, other contents have others, and the name begins with the number."""
    one, same, other = written(tmp_path), written(tmp_path), written(tmp_path, layer(3))

    assert one == same
    assert one.hash != other.hash
    assert one.path == f"versions/000012-{one.hash[:8]}.safetensors"
    assert sorted(os.listdir(tmp_path / versions.FOLDER)) == sorted({Path(one.path).name, Path(other.path).name})


def test_a_version_holds_the_whole_potential(tmp_path: Path) -> None:
    """Any program that reads safetensors finds all tensors, in their own dtype, in one file."""
    found = load_file(tmp_path / written(tmp_path).path)

    assert set(found) == {"net.weight", "readout", "last_layer.readout", "last_layer.covariance"}
    assert found["net.weight"].dtype == np.float32
    assert found["net.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_arrays_need_not_be_contiguous(tmp_path: Path) -> None:
    """A transposed covariance and a strided readout are written as what they are."""
    made = layer(6)
    odd = LastLayer(np.repeat(made.readout, 2)[::2], np.asfortranarray(made.covariance), {})
    found = versions.read(tmp_path / written(tmp_path, odd).path)

    np.testing.assert_array_equal(found.readout, made.readout)
    np.testing.assert_array_equal(found.covariance, made.covariance)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A version whose file is gone is refused with its path."""
    with pytest.raises(VersionError, match=r"000001-abcdef01\.safetensors cannot be read"):
        versions.read(tmp_path / "000001-abcdef01.safetensors")


def test_any_truncation_is_refused(tmp_path: Path) -> None:
    """Every proper beginning of a version file is refused."""
    path = tmp_path / written(tmp_path).path
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(VersionError):
            versions.read(path)


def test_any_changed_byte_is_refused(tmp_path: Path) -> None:
    """A file that differs from what was written in one byte is refused, and with no other error."""
    path = tmp_path / written(tmp_path).path
    whole = path.read_bytes()
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        with pytest.raises(VersionError):
            versions.read(path)


def test_a_renamed_file_is_refused(tmp_path: Path) -> None:
    """A sound file under the name of another content is refused."""
    path = tmp_path / written(tmp_path).path
    other = path.with_name("000012-00000000.safetensors")
    path.rename(other)

    with pytest.raises(VersionError, match="does not match the hash in its name"):
        versions.read(other)


@pytest.mark.parametrize(
    ("readout", "covariance"),
    [
        (np.array([1.0, np.nan]), np.eye(2)),
        (np.array([1.0, np.inf]), np.eye(2)),
        (np.ones(2), np.full((2, 2), np.nan)),
        (np.ones(2), np.eye(3)),
        (np.ones(2), np.ones(4)),
    ],
)
def test_unsound_numbers_are_refused(tmp_path: Path, readout: np.ndarray, covariance: np.ndarray) -> None:
    """A last layer with numbers that are not finite, or of a wrong shape, is refused though its hash is right."""
    with pytest.raises(VersionError, match="wrong shape or with numbers that are not finite"):
        versions.read(tmp_path / written(tmp_path, LastLayer(readout, covariance)).path)


def test_weights_without_a_last_layer_are_refused(tmp_path: Path) -> None:
    """Weights of a potential that no run wrote are no version."""
    path = tmp_path / "weights-.safetensors"
    path.write_bytes(save({"net.weight": np.zeros(3)}))

    with pytest.raises(VersionError, match="it is not a version file"):
        versions.read(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full the old file stays as it was and no part of the new one lies beside it."""
    path = tmp_path / "status.json"
    versions.write_whole(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        versions.write_whole(path, b"new")

    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["status.json"]


REWRITER = """
import sys
from pathlib import Path
from tumbaga.online.versions import write_whole

k = 0
while True:
    k += 1
    write_whole(Path(sys.argv[1]), bytes([65 + k % 26]) * 200_000)
    print(k, flush=True)
"""


def test_a_kill_leaves_a_whole_file(tmp_path: Path) -> None:
    """A file that is rewritten again and again is one of its versions after SIGKILL, never a mixture."""
    path = tmp_path / "whole"
    with subprocess.Popen([sys.executable, "-c", REWRITER, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        seen = [writer.stdout.readline() for _ in range(20)]
        writer.kill()
    data = path.read_bytes()

    assert len(seen) == 20
    assert len(data) == 200_000
    assert len(set(data)) == 1
