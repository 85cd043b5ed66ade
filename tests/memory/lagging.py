"""A copy engine without a device: copies are late, and whoever uses what has not arrived gets NaN."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor


class Lent:
    """A tensor that somebody else keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = weakref.ref(tensor.untyped_storage())
        self._place = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

    def get(self) -> Tensor:
        storage, (dtype, *place) = self._storage(), self._place
        assert storage is not None, "let go of while it was copied"
        return torch.empty(0, dtype=dtype).set_(storage, *place)


class Late:
    """A copy that has begun."""

    def __init__(self, source: Tensor, target: Tensor) -> None:
        self.source, self.target = Lent(source), Lent(target)
        self.then = source.clone()
        self.done = False


class LaggingCopies:
    """Copies happen when they are waited for. Until then the target is NaN, and the source must stay as it is; whoever
    asked for the copy has to keep both.

    ``live`` and ``peak`` count the bytes of "the device" that the engine gave out; ``log``: what was asked of it.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.live = self.peak = 0
        self.log: list[str] = []
        self.hosts: list[weakref.ref[Tensor]] = []
        self.pending: list[Late] = []

    def host(self, shape: tuple[int, ...], dtype: torch.dtype, lasting: bool = False) -> Tensor:
        return _nothing(torch.empty(shape, dtype=dtype))

    def lend(self, size: int) -> Tensor:
        return self.host((size,), torch.uint8)

    def on_device(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = _nothing(torch.empty(shape, dtype=dtype))
        size = tensor.nbytes
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(tensor.untyped_storage(), self._freed, size)
        return tensor

    def copy(self, source: Tensor, target: Tensor) -> Any:
        assert source.shape == target.shape and source.dtype == target.dtype
        for one in self.pending:
            one.source.get()
            late = one.target.get()
            assert source.untyped_storage()._cdata != late.untyped_storage()._cdata, "copied before it arrived"
        ticket = Late(source, target)
        _nothing(target)
        self.pending.append(ticket)
        return ticket

    def wait(self, ticket: Any) -> None:
        if ticket.done:
            return
        assert torch.equal(ticket.source.get(), ticket.then), "the source has changed while it was copied"
        ticket.target.get().copy_(ticket.then)
        ticket.done = True
        self.pending.remove(ticket)

    wait_here = wait

    def _freed(self, size: int) -> None:
        self.live -= size


def _nothing(tensor: Tensor) -> Tensor:
    """Every bit set: NaN in all floating point types."""
    tensor.view(torch.uint8).fill_(255)
    return tensor


def late_copies(monkeypatch: pytest.MonkeyPatch) -> list[LaggingCopies]:
    """Runs on this CPU behave as on a GPU whose copies are late; returns the engines that they make."""
    made: list[LaggingCopies] = []

    def engine_of(_: torch.device) -> LaggingCopies:
        made.append(LaggingCopies())
        return made[-1]

    monkeypatch.setattr("kinema.memory.copy_engine.engine_of", engine_of)
    monkeypatch.setattr("kinema.memory.activations.SMALLEST", 256)
    monkeypatch.setattr("kinema.training.train.check_memory", lambda *_: None)
    return made
