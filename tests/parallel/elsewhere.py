"""Memory that stands for a GPU's host where there is no GPU: what lies there does not count as the device's.

Nothing runs beside a CPU's computing, so copies are done at once. What leaves the device is held for as long as a copy
may take that runs beside it: until the next block is done, or the next part of an optimiser's state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kinema.config.memory import MemoryConfig
from kinema.families.base import Family
from kinema.memory.activations import offload_activations
from kinema.memory.around import around_calls, before_backward
from kinema.memory.block_swap import BlockSwap, Home, host_weights
from kinema.memory.dry_run import LiveBytes
from kinema.optim.ema import Ema
from kinema.optim.host_state import HostState

SMALLEST = 2**10
"""Bytes from which an activation is moved: as little of a small network's as 1 MiB is of a real one's."""
PIECE_BYTES = 2**18
"""Weights that are updated at once, and whose state travels together: as little of a small network as the usual 64 MB
are of a real one."""


class Elsewhere:
    """A `CopyEngine`, and the `Copies` of an optimiser's state.

    A process has one memory; ``tell`` takes what is the host's out of a count of it. ``book`` counts that instead.
    """

    def __init__(self, part_bytes: int = PIECE_BYTES) -> None:
        """``part_bytes``: weights whose state travels together."""
        self.part_bytes = part_bytes
        self.device = torch.device("cpu")
        self.places: list[Tensor] = []
        """On the device, of blocks that travel."""
        self.homes: list[Home] = []
        self.book = LiveBytes("cpu")
        self._count: LiveBytes | None = None
        self._hosts: list[weakref.ref[Tensor]] = []
        self._leaving: list[list[Tensor]] = [[], []]
        """What is copied out of the device: of the block before, and of this one."""

    def tell(self, count: LiveBytes) -> None:
        """What is on the host, and what will be, is none of ``count``'s."""
        count.exclude(tensor for one in self._hosts if (tensor := one()) is not None)
        self._count = count
        self.book.mark()

    def give(self, tensors: Iterable[Tensor]) -> None:
        """These are in the host's memory."""
        for tensor in tensors:
            self._hosts.append(weakref.ref(tensor, self._hosts.remove))
            if self._count is not None:
                self._count.exclude([tensor])
            self.book.count([tensor])

    def next_block(self, *_: Any) -> None:
        """What the block before has sent has arrived."""
        self._leaving = [self._leaving[1], []]

    # -- copies of blocks and of activations

    def host(self, shape: tuple[int, ...], dtype: torch.dtype, lasting: bool = False) -> Tensor:
        with _disable_current_modes():  # no count sees it come
            tensor = torch.empty(shape, dtype=dtype)
        self.give([tensor])
        return tensor

    def lend(self, size: int) -> Tensor:
        return self.host((size,), torch.uint8)

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)
        self._leaving[1].append(source)

    def wait(self, ticket: Any) -> None:
        """Copies are done at once."""

    def wait_here(self, ticket: Any) -> None:
        self._leaving = [[], []]

    # -- copies of an optimiser's state

    def fetch(self, away: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        here = [one.clone() for one in away]
        return lambda: here

    def send(self, here: Sequence[Tensor], away: Sequence[Tensor | None]) -> list[Tensor]:
        places = [
            self.host(tuple(one.shape), one.dtype) if place is None else place
            for one, place in zip(here, away, strict=True)
        ]
        self._leaving = [[], list(here)]
        return [place.copy_(one) for one, place in zip(here, places, strict=True)]

    def finish(self) -> None:
        self._leaving = [[], []]


def move(memory: MemoryConfig, family: Family, network: Any, engine: Elsewhere) -> None:
    """Move what ``[memory]`` asks for."""
    blocks = family.blocks(network)
    if memory.offload_blocks:
        engine.homes = host_weights(network, blocks, int(memory.offload_blocks))
        engine.places = BlockSwap(blocks, engine.homes, engine).slots
    if memory.offload_activations:
        offload_activations(blocks, engine, SMALLEST)
    if memory.offload_blocks or memory.offload_activations:
        around_calls(blocks, partial(_turning, engine))


def _turning(engine: Elsewhere, number: int, call: Callable[[], Any], inputs: Any) -> Any:
    engine.next_block()
    output = call()
    if torch.is_grad_enabled():
        before_backward(output, inputs, engine.next_block)
    return output


def move_state(optimizers: Iterable[torch.optim.Optimizer], engine: Elsewhere) -> list[torch.optim.Optimizer]:
    return [HostState(optimizer, engine, engine.part_bytes) for optimizer in optimizers]


def give_what_trains_there(engine: Elsewhere, optimizers: Iterable[torch.optim.Optimizer], ema: Ema | None) -> None:
    """What belongs to weights that train on the host is there too: the optimiser's state, the moving averages."""
    training = {parameter for home in engine.homes for parameter in home.parameters if parameter.requires_grad}
    for optimizer in optimizers:
        for parameter in training & optimizer.state.keys():
            engine.give(value for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
    if ema is not None:
        engine.give(ema.averages[name] for name, parameter in ema.parameters.items() if parameter in training)
