"""Memory that stands for a GPU's host where there is no GPU: what lies there does not count as the device's."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from kinema.config.memory import MemoryConfig
from kinema.families.base import Family
from kinema.memory.activations import offload_activations
from kinema.memory.block_swap import BlockSwap, host_weights
from kinema.memory.dry_run import LiveBytes
from kinema.optim.host_state import HostState

SMALLEST = 2**16
"""Bytes from which an activation is moved, of a small network."""


class Elsewhere:
    """A `CopyEngine`, and the `Copies` of an optimiser's state, whose copies are done at once.

    A process has one memory; ``tell`` takes what these gave out as the host's out of a count of it.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.count: LiveBytes | None = None
        self._hosts: list[weakref.ref[Tensor]] = []

    def tell(self, count: LiveBytes) -> None:
        count.exclude(tensor for one in self._hosts if (tensor := one()) is not None)
        self.count = count

    def host(self, shape: tuple[int, ...], dtype: torch.dtype, lasting: bool = False) -> Tensor:
        with _disable_current_modes():  # no count sees it come
            tensor = torch.empty(shape, dtype=dtype)
        self._hosts.append(weakref.ref(tensor, self._hosts.remove))
        if self.count is not None:
            self.count.exclude([tensor])
        return tensor

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def wait(self, ticket: Any) -> None:
        """Copies are done at once."""

    wait_here = wait

    def fetch(self, away: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        here = [one.clone() for one in away]
        return lambda: here

    def send(self, here: Sequence[Tensor], away: Sequence[Tensor | None]) -> list[Tensor]:
        places = [
            self.host(tuple(one.shape), one.dtype) if place is None else place
            for one, place in zip(here, away, strict=True)
        ]
        return [place.copy_(one) for one, place in zip(here, places, strict=True)]

    def finish(self) -> None:
        """What was sent is there."""


def move(memory: MemoryConfig, family: Family, network: Any, engine: Elsewhere) -> list[Tensor]:
    """Move what ``[memory]`` asks for; returns the blocks' places on the device."""
    blocks, places = family.blocks(network), []
    if memory.offload_blocks:
        swap = BlockSwap(blocks, host_weights(network, blocks, int(memory.offload_blocks)), engine)
        places = swap.slots
    if memory.offload_activations:
        offload_activations(blocks, engine, SMALLEST)
    return places


def move_state(
    optimizers: Iterable[torch.optim.Optimizer], engine: Elsewhere, part_bytes: int
) -> list[torch.optim.Optimizer]:
    return [HostState(optimizer, engine, part_bytes) for optimizer in optimizers]
