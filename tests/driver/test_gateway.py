"""What travels with every force."""

import json

import pytest

from tumbaga.driver.answers import extras
from tumbaga.driver.rollout import hash_of
from tumbaga.online.ramp import Mix
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.extras import check_extras

MIXES = [Mix(0, 0, 1.0), Mix(0, 1, 0.25), Mix(1, 1, 1.0)]


@pytest.mark.parametrize("mix", MIXES)
def test_every_force_is_traceable(mix: Mix) -> None:
    """DESIGN.md §2, invariant 6: version with its hash, uncertainty, policy and ramp stand in the extras of an answer."""
    serve = bus.Serve(1, "versions/000001-9f3a21c0.safetensors", None, 2.0)
    told = json.loads(extras(f"{mix.new}-{hash_of(serve)}", mix, 0.08, 5, -0.002))

    assert told["tumbaga"] == {
        "version": f"{mix.new}-9f3a21c0",
        "force_std": 0.08,
        "force_std_atom": 5,
        "policy": "continue",
        "ramp": mix.weight,
        "swap_work": -0.002,
    }
    assert (told["tumbaga_force_std"], told["tumbaga_version"], told["tumbaga_swap_work"]) == (0.08, mix.new, -0.002)


def test_extras_have_the_same_keys_in_and_out_of_a_ramp() -> None:
    """An engine that asks for a key by name finds it in every answer, and none of them is one that i-PI dies of."""
    keys = {check_extras(extras("0-base", mix, 1e6, -1, 0.0)) for mix in MIXES}

    assert len(keys) == 1
