"""From a potential's name to the potential, or to a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tumbaga.driver.backends import registry
from tumbaga.driver.errors import PotentialError


@pytest.mark.parametrize("name", ["", "lj", "magic:lj", ":", "TOY:lj"])
def test_an_unknown_potential_is_a_sentence(name: str) -> None:
    """A name of no known kind is refused by both doors, with the kinds that are known."""
    for ask in (registry.load, registry.weights_file):
        with pytest.raises(PotentialError, match="known are painn, sevennet, toy"):
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
    for name, path in registry.PACKAGED.items():
        assert registry.weights_file(name) == path
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
