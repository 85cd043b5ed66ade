"""What blocks save for the backward pass waits in the host's memory.

A block's saved tensors are copied out while the next blocks compute, and come back while the block behind them runs
its backward pass: there are those of two blocks on the device at a time. With activation checkpointing these are the
blocks' inputs. The last block's stay, as its backward pass comes at once.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kinema.memory.around import around_calls, blocks_here
from kinema.memory.copy_engine import CopyEngine, Ticket

SMALLEST = 2**20
"""Bytes from which a tensor is worth a copy."""
AT_ONCE = 2
"""Blocks whose storages may be on the device at once: what the second waits for is the copy of the first."""


def offload_activations(blocks: Mapping[str, nn.ModuleList], engine: CopyEngine, smallest: int) -> ActivationOffload:
    """Offload what the blocks save, in place. Call it after all else that changes blocks, see `around_calls`."""
    offload = ActivationOffload(blocks_here(blocks), engine, smallest)
    around_calls(blocks, offload)
    return offload


class ActivationOffload:
    """Around the calls of a network's blocks. ``smallest``: bytes from which a tensor is moved."""

    def __init__(self, blocks: list[nn.Module], engine: CopyEngine, smallest: int) -> None:
        self.blocks, self.engine, self.smallest = blocks, engine, smallest
        self.moved_bytes = 0
        """Copied out since this was made."""
        self._newest: weakref.ref[Group] | None = None
        self._leaving: deque[Group] = deque()
        """Groups whose storages are kept on the device until they are copied."""
        self._seen: dict[int, Seen] = {}
        """Of storages that are alive, by their address."""
        self._groups = self._storages = 0

    def __call__(self, number: int, call: Callable[[], Any], inputs: Any) -> Any:
        if not torch.is_grad_enabled() or number == len(self.blocks) - 1:
            return call()
        group = Group(self.engine, self._groups, self._newest)
        self._groups, self._newest = self._groups + 1, weakref.ref(group)
        self._leaving.append(group)
        while len(self._leaving) > AT_ONCE:
            self._leaving.popleft().leave()
        weights: set[int] = set()

        def pack(tensor: Tensor) -> Any:
            if not weights:  # FSDP2 has gathered them, and a block that was elsewhere is here by now
                weights.update(_storages(self.blocks[number]))
            return self._pack(group, weights, tensor)

        with saved_tensors_hooks(pack, _unpack):
            return call()

    def _pack(self, group: Group, weights: set[int], tensor: Tensor) -> Any:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != self.engine.device.type:
            return tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if storage.nbytes() < self.smallest or key in weights:
            return tensor
        seen = self._seen.get(key)
        if seen is None:
            self._storages += 1
            alive = weakref.ref(storage, lambda _: self._seen.pop(key, None))
            seen = self._seen[key] = Seen(alive, group.number, self._storages)
        elif seen.group != group.number:
            return tensor  # all blocks have it: there is nothing to gain until the first is done
        content = seen.serial, tensor._version
        moved = group.moved(content)
        if moved is None:
            moved = group.move(storage, content)
            self.moved_bytes += storage.nbytes()
        return Packed(group, moved, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())


Content = tuple[int, int]
"""What a storage held: its serial number and its version."""


@dataclass(frozen=True)
class Seen:
    """A storage that blocks have saved: the group that did so first, and its number among all storages that ever were,
    for what is freed gives its address to another."""

    alive: weakref.ref[Any]
    group: int
    serial: int


@dataclass(eq=False)
class Moved:
    """A storage in the host's memory, what it was copied from, and where it is wanted again, on the device."""

    host: Tensor
    out: Ticket
    source: Tensor | None
    device: Tensor | None = None
    back: Ticket = None


class Group:
    """What one call of a block has saved. ``before``: that of the block before, which is wanted next."""

    def __init__(self, engine: CopyEngine, number: int, before: weakref.ref[Group] | None) -> None:
        self.engine, self.number, self.before = engine, number, before
        self._moved: dict[Content, weakref.ref[Moved]] = {}  # what autograd lets go of is to be freed
        self._leaving: list[Moved] = []

    def moved(self, content: Content) -> Moved | None:
        known = self._moved.get(content)
        return None if known is None else known()

    def move(self, storage: torch.UntypedStorage, content: Content) -> Moved:
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        host = self.engine.lend(source.numel())
        moved = Moved(host, self.engine.copy(source, host), source)
        self._moved[content] = weakref.ref(moved)
        self._leaving.append(moved)
        return moved

    def leave(self) -> None:
        """Let the device go on once the storages are copied, and let go of them."""
        for moved in self._leaving:
            self.engine.wait(moved.out)
            moved.source = None
        self._leaving.clear()

    def bring(self) -> None:
        """Begin to copy everything back that is not on its way."""
        self.leave()
        for known in self._moved.values():
            moved = known()
            if moved is not None and moved.device is None:
                moved.device = self.engine.on_device(tuple(moved.host.shape), torch.uint8)
                moved.back = self.engine.copy(moved.host, moved.device)
                weakref.finalize(moved, self.engine.wait, moved.back).atexit = False  # if nobody asks for it


@dataclass(eq=False)
class Packed:
    """What autograd holds in place of a tensor: a view of a storage that was moved."""

    group: Group
    moved: Moved
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


def _unpack(saved: Any) -> Tensor:
    if not isinstance(saved, Packed):
        return saved  # type: ignore[no-any-return]
    group, moved = saved.group, saved.moved
    group.bring()
    before = None if group.before is None else group.before()
    if before is not None:
        before.bring()
    group.engine.wait(moved.back)
    assert moved.device is not None
    empty = torch.empty(0, dtype=saved.dtype, device=moved.device.device)
    return empty.set_(moved.device.untyped_storage(), saved.offset, saved.size, saved.stride)


def _storages(block: nn.Module) -> set[int]:
    """The storages of a block's parameters and buffers."""
    found = set()
    for tensor in (*block.parameters(), *block.buffers()):
        local = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        if type(local) in (Tensor, nn.Parameter):
            found.add(local.untyped_storage()._cdata)
    return found
