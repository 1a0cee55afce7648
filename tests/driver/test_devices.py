"""How many evaluators a run has."""

from __future__ import annotations

import pytest

from tumbaga.driver import devices
from tumbaga.driver.config import Config, Label, Learn, Potential, Serve


def run(engines: int, device: str = "auto", *, learns: bool = False, workers: int = 1, connections: int = 1) -> Config:
    serve = Serve(connect=tuple(f"unix:{n}" for n in range(engines)), connections=connections)
    return Config(serve=serve, potential=Potential(device=device), learn=Learn(enabled=learns), label=Label(workers=workers))


@pytest.mark.parametrize(
    ("settings", "cores", "count"),
    [
        (run(1), 16, 1),
        (run(4), 16, 4),
        (run(16), 2, 2),
        (run(16), 64, 8),
        (run(1, connections=8), 4, 4),
        (run(4, learns=True), 4, 3),
        (run(4, learns=True, workers=8), 4, 1),
        (run(0), 4, 1),
    ],
)
def test_without_a_gpu_evaluators_take_the_free_cores(settings: Config, cores: int, count: int) -> None:
    """One for each core that label workers leave, and not more than engines, nor than is sensible for memory."""
    assert devices.chosen(settings, cores, gpu=False) == ("auto",) * count


def test_a_gpu_has_one_evaluator() -> None:
    assert devices.chosen(run(16), 64, gpu=True) == ("auto",)


@pytest.mark.parametrize("gpu", [False, True])
def test_what_the_user_says_holds(gpu: bool) -> None:
    assert devices.chosen(run(16, "cpu"), 64, gpu) == ("cpu",)
    assert devices.chosen(run(1, "cuda:0, cuda:1"), 64, gpu) == ("cuda:0", "cuda:1")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_hidden_gpu_is_none(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)

    assert not devices.has_gpu()
