"""The moving average of the weights: what a noisy descent circles about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of the parameters of a module: a <- m a + (1 - m) p with m = min(memory, (1 + t) / (10 + t)) at step t.

    Young averages forget faster, or they would remember the start for ever.

    Args:
        module: whose parameters are averaged, and whose values now are the start.
        memory: m, a step; 0 keeps the parameters as they are.
    """

    def __init__(self, module: nn.Module, memory: float) -> None:
        self._memory = memory
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}

    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters after a step, counted from 0."""
        memory = min(self._memory, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in module.named_parameters():
                if value.requires_grad:  # what is frozen stays to the bit
                    self.values[name].lerp_(value, 1.0 - memory)

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        """Have the module hold the averages for a while."""
        own = {name: value.detach().clone() for name, value in module.named_parameters()}
        put(module, self.values)
        try:
            yield
        finally:
            put(module, own)


def put(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into the parameters of a module, by name."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(values[name])
