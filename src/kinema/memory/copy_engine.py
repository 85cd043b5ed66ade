"""Copies between the device and the host's memory beside what the device computes."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from kinema.pinned import Pool, pinned

Ticket = Any
"""One copy, to be waited for."""


class CopyEngine(Protocol):
    """Copies in the background.

    A copy begins when everything that the device was asked to compute before is done: what it reads is ready then, and
    what it writes over is used no more. Nothing may change its source, use its target, or let go of either, before
    `wait`: what comes after that in the device's work may have their memory.
    """

    device: torch.device

    def host(self, shape: tuple[int, ...], dtype: torch.dtype, lasting: bool = False) -> Tensor:
        """Memory of the host that copies are fast from and to. ``lasting``: kept for the whole run."""

    def lend(self, size: int) -> Tensor:
        """So many bytes of such memory, for what comes again at every step: it goes back when the tensor is let go of,
        which nothing else may share its memory with."""

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the device."""

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        """Begin a copy; one of the two is on the device, the other is of the host."""

    def wait(self, ticket: Ticket) -> None:
        """What the device computes from here on comes after the copy."""

    def wait_here(self, ticket: Ticket) -> None:
        """The host goes on once the copy is done."""


@cache
def engine_of(device: torch.device) -> CopyEngine:
    """What copies to and from a device, for all networks. A CPU has nothing to copy: its memory is the host's."""
    assert device.type == "cuda", f"copies to {device}"
    return CudaCopies(device)


class CudaCopies:
    """Copies on two streams of a GPU, one for each direction, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inward = torch.cuda.Stream(device)
        self._outward = torch.cuda.Stream(device)
        self._pool = Pool(
            lambda size: pinned((size,), torch.uint8, "memory.offload_activations"),
            lambda: torch.cuda.synchronize(device),
        )

    def host(self, shape: tuple[int, ...], dtype: torch.dtype, lasting: bool = False) -> Tensor:
        if not lasting:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return pinned(shape, dtype, "memory.offload_blocks")

    def lend(self, size: int) -> Tensor:
        return self._pool.take(size)

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        stream = self._outward if source.is_cuda else self._inward
        stream.wait_stream(torch.cuda.current_stream(self.device))
        # No `record_stream`: the host is far ahead of the device, and memory would count as in use until the device has
        # come to where it was let go of.
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def wait(self, ticket: Ticket) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def wait_here(self, ticket: Ticket) -> None:
        ticket.synchronize()
