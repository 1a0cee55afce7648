"""From a potential's name to the potential, or to a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tumbaga.driver.backends import painn_files, registry
from tumbaga.driver.errors import PotentialError


@pytest.mark.parametrize("name", ["", "lj", "magic:lj", ":", "TOY:lj"])
def test_an_unknown_potential_is_a_sentence(name: str) -> None:
    """A name of no known kind is refused by both doors, with the kinds that are known."""
    for ask in (registry.load, registry.weights_file):
        with pytest.raises(PotentialError, match=r"known are .*painn, sevennet, toy"):
            ask(name)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    """A path that is not there is named, with the packaged potentials."""
    with pytest.raises(PotentialError, match=r"there is no file .*none\.safetensors.*painn:cuau-water"):
        registry.weights_file(f"painn:{tmp_path}/none.safetensors")


@pytest.mark.parametrize("name", ["toy", "toy:spring", "toy:lj?epsilom=1"])
def test_a_misspelt_toy_is_seen_before_anything_starts(name: str) -> None:
    """The door that a run goes through first refuses a toy, or an option, that there is not."""
    with pytest.raises(PotentialError, match="known are"):
        registry.weights_file(name)


def test_packaged_weights_are_there() -> None:
    """Every packaged potential has its file."""
    for name, path in painn_files.PACKAGED.items():
        assert registry.weights_file(f"painn:{name}") == path
        assert path.is_file()


def test_a_toy_has_no_weights() -> None:
    """A potential without a file has none."""
    assert registry.weights_file("toy:lj") is None


def test_names_cost_no_torch() -> None:
    """Looking up a name, or loading a toy, imports no torch."""
    code = (
        "import sys; from tumbaga.driver.backends import registry; registry.weights_file('painn:cuau-water'); registry.load('toy:lj'); "
        "sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package with two kinds of potential, one of which cannot be imported, and one that would replace ours."""
    (tmp_path / "other_potential.py").write_text(
        "from tumbaga.driver.backends.toy import Zero\n\n\ndef make(rest, device, dtype):\n    return Zero()\n"
    )
    told = tmp_path / "other_potential-1.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: other-potential\nVersion: 1.0\n")
    points = ("other = other_potential:make", "broken = other_potential:nothing", "toy = other_potential:make")
    (told / "entry_points.txt").write_text("\n".join((f"[{registry.GROUP}]", *points)) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_of_others", registry._of_others.__wrapped__)


@pytest.mark.usefixtures("another_package")
def test_another_package_brings_a_potential(tmp_path: Path) -> None:
    """A kind of the entry points is loaded by its name, its file is found, and one that is ours stays ours."""
    file = tmp_path / "weights"
    file.touch()

    assert registry.load("other:anything").spec.name == "toy:zero"
    assert registry.weights_file(f"other:{file}") == file
    assert registry.weights_file("other:anything") is None
    with pytest.raises(PotentialError, match="there is no toy"):
        registry.load("toy:anything")
    with pytest.raises(PotentialError, match=r"known are .*broken, .*other, painn, sevennet, toy"):
        registry.load("none:anything")


@pytest.mark.usefixtures("another_package")
def test_a_broken_package_is_a_sentence() -> None:
    """A loader that cannot be imported is named."""
    with pytest.raises(PotentialError, match=r"its loader other_potential:nothing cannot be imported: .*nothing"):
        registry.load("broken:anything")
