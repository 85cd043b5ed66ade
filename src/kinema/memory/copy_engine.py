"""Copies between the device and the host's memory beside what the device computes."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from kinema.errors import UserError
from kinema.sizes import readable_bytes

Ticket = Any
"""One copy, to be waited for."""


class CopyEngine(Protocol):
    """Copies in the background.

    A copy begins when everything that the device was asked to compute before is done: what it reads is ready then, and
    what it writes over is used no more. Nothing may change its source, or use its target, before `wait`.
    """

    device: torch.device

    def host(self, shape: tuple[int, ...], dtype: torch.dtype, lasting: bool = False) -> Tensor:
        """Memory of the host that copies are fast from and to. ``lasting``: kept for the whole run."""

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the device."""

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        """Begin a copy; one of the two is on the device, the other is of the host."""

    def wait(self, ticket: Ticket) -> None:
        """What the device computes from here on comes after the copy."""

    def wait_here(self, ticket: Ticket) -> None:
        """The host goes on once the copy is done."""


def engine_of(device: torch.device) -> CopyEngine:
    """What copies to and from a device. On a CPU there is nothing to copy: its memory is the host's."""
    assert device.type == "cuda", f"copies to {device}"
    return CudaCopies(device)


class CudaCopies:
    """Copies on two streams of a GPU, one for each direction, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inward = torch.cuda.Stream(device)
        self._outward = torch.cuda.Stream(device)

    def host(self, shape: tuple[int, ...], dtype: torch.dtype, lasting: bool = False) -> Tensor:
        if not lasting:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        # torch's own pinned memory is given out anew at once, but in powers of two: too much for weights.
        memory = torch.empty(shape, dtype=dtype)
        if memory.nbytes:
            runtime = torch.cuda.cudart()
            failed = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
            if failed:
                raise UserError(
                    f"the host would not pin {readable_bytes(memory.nbytes)} of its memory for a block that travels "
                    f"(CUDA's error {failed}). Raise the limit of locked memory (ulimit -l, or --ulimit memlock=-1 of "
                    "a container), or lower memory.offload_blocks."
                )
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        stream = self._outward if source.is_cuda else self._inward
        # What of the two is on the device lies in memory that the computing stream has given, and frees: a source may
        # be freed while it is copied, and so may a target that nobody waits for, as after an error.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            (source if source.is_cuda else target).record_stream(stream)
            return stream.record_event()

    def wait(self, ticket: Ticket) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)

    def wait_here(self, ticket: Ticket) -> None:
        ticket.synchronize()
