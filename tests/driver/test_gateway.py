"""What travels with every force, and what the gateway outlives."""

import json
import uuid
from pathlib import Path

import numpy as np
import pytest
import zmq

from tumbaga.driver import config as configs
from tumbaga.driver.answers import extras
from tumbaga.driver.gateway import Gateway
from tumbaga.driver.process import Reporter
from tumbaga.driver.rollout import hash_of, read_serving
from tumbaga.driver.species import Species
from tumbaga.online.ramp import Mix
from tumbaga.socket_protocol import bus
from tumbaga.socket_protocol.extras import check_extras
from tumbaga.socket_protocol.streams import Address, dial, listen
from tumbaga.socket_protocol.testing import BlockingEngine

MIXES = [Mix(0, 0, 1.0), Mix(0, 1, 0.25), Mix(1, 1, 1.0)]


@pytest.mark.parametrize("mix", MIXES)
def test_every_force_is_traceable(mix: Mix) -> None:
    """DESIGN.md §2, invariant 6: version with its hash, uncertainty, policy and ramp stand in the extras of an answer."""
    serve = bus.Serve(1, "versions/000001-9f3a21c0.safetensors", None, 2.0)
    told = json.loads(extras(f"{mix.new}-{hash_of(serve)}", mix, 0.08, 5, -0.002, energy_std=0.03))

    assert told["tumbaga"] == {
        "version": f"{mix.new}-9f3a21c0",
        "force_std": 0.08,
        "force_std_atom": 5,
        "energy_std": 0.03,
        "policy": "continue",
        "ramp": mix.weight,
        "swap_work": -0.002,
    }
    columns = [told[f"tumbaga_{name}"] for name in ("force_std", "energy_std", "version", "swap_work")]
    assert columns == [0.08, 0.03, mix.new, -0.002]


def test_extras_have_the_same_keys_in_and_out_of_a_ramp() -> None:
    """An engine that asks for a key by name finds it in every answer, and none of them is one that i-PI dies of."""
    keys = {check_extras(extras("0-base", mix, 1e6, -1, 0.0)) for mix in MIXES}
    # an energy of which nothing is known is a number, too
    assert {json.loads(extras("0-base", mix, 1e6, -1, 0.0))["tumbaga_energy_std"] for mix in MIXES} == {1e6}

    assert len(keys) == 1


def test_word_of_an_engine_whose_conversation_an_answer_has_just_ended_is_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both come in the same round of the selector: STATUS of one engine, and the evaluation that could not be served to it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / bus.FOLDER).mkdir()
    address = Address.unix(f"tumbaga-test-{uuid.uuid4().hex}")
    settings = configs.Config(serve=configs.Serve(connect=(f"unix:{address.path}",), prefix=""))
    template = Species(np.array([29, 29]), False, "")
    with listen(address) as listener, zmq.Context[zmq.Socket[bytes]]() as context:
        gateway = Gateway(settings, {"": template}, context, Reporter(context, "gateway"), read_serving(tmp_path))
        (session,) = gateway.sessions.values()
        gateway._connected(session, dial(address))
        with BlockingEngine.accept(listener, "classic", timeout=5.0):
            gateway._refuse(session, "the potential returned a number that is not finite")
            gateway._engine_event(session)

            assert session.stream is None
            assert session.faults == 1
        gateway.close()
        context.destroy(linger=0)
