"""Exponential moving average of weights, sharded as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kinema.optim.gradients import local_part

PIECE_BYTES = 2**28
"""Weights in a shorter type than the averages are converted in pieces of about this size."""


class Ema:
    """average <- decay_n average + (1 - decay_n) weight, with decay_n = min(decay, (1 + n) / (10 + n)) after n steps.

    The warm-up is that of TensorFlow's ExponentialMovingAverage. Averages are kept in float32 at least. Make it after
    ``kinema.parallel.data.shard``: each rank averages its own shard, without communication.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.parameters = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        self.averages: dict[str, Tensor] = {
            name: parameter.detach().clone().to(torch.promote_types(parameter.dtype, torch.float32))
            for name, parameter in self.parameters.items()
        }
        self.swapped_in = False

    def decay_at(self, step: int) -> float:
        """The decay of the update after ``step`` optimiser steps."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step number ``step`` (counted from 1)."""
        assert not self.swapped_in, "the network holds the averages"
        averages = [local_part(average) for average in self.averages.values()]
        weights = [local_part(weight) for weight in self.parameters.values()]
        for piece in _pieces(averages):
            converted = [weight.to(a.dtype) for a, weight in zip(averages[piece], weights[piece], strict=True)]
            torch._foreach_lerp_(averages[piece], converted, 1.0 - self.decay_at(step))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The network holds the averages inside, and its own weights, to the bit, afterwards."""
        saved = self._exchange_in()
        self.swapped_in = True
        try:
            yield
        finally:
            self.swapped_in = False
            self._exchange_out(saved)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name, by reference: a checkpoint saves them and loads into them in place."""
        assert not self.swapped_in, "the network holds the averages"
        return dict(self.averages)

    @torch.no_grad()
    def _exchange_in(self) -> dict[str, Tensor]:
        """Swap in place, one tensor at a time. Weights in a shorter type cannot hold the averages: those are saved."""
        saved: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            weight, average = local_part(parameter), local_part(self.averages[name])
            mine = weight.clone()
            weight.copy_(average)
            if weight.dtype == average.dtype:
                average.copy_(mine)
            else:
                saved[name] = mine
        return saved

    @torch.no_grad()
    def _exchange_out(self, saved: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            weight, average = local_part(parameter), local_part(self.averages[name])
            if name in saved:
                weight.copy_(saved[name])
            else:
                mine = weight.clone()
                weight.copy_(average)
                average.copy_(mine)


def _pieces(tensors: list[Tensor]) -> Iterator[slice]:
    """Runs of neighbours of at most PIECE_BYTES together, or of one tensor."""
    start = filled = 0
    for i, tensor in enumerate(tensors):
        if i > start and filled + tensor.nbytes > PIECE_BYTES:
            yield slice(start, i)
            start, filled = i, 0
        filled += tensor.nbytes
    if tensors:
        yield slice(start, len(tensors))
