"""Weights that stay in their files until it is known which of them a process keeps.

Inside `leaving_weights_mapped` networks are loaded with placeholders for parameters: values wait in mapped files, whose
pages all processes of a machine share. What lays a network over processes asks for one value at a time (`value`,
`taken`) or for those of one block (`settle`), so that a process never has more memory of its own than its share and
a block. Placeholders have the final shape and type, and no memory: they are NaN everywhere, so that one that was
forgotten cannot pass for a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

_allowed: ContextVar[bool] = ContextVar("leaving_weights_mapped", default=False)


@dataclass(eq=False)
class _Waiting:
    make: Callable[[], Tensor]
    places: list[tuple[ReferenceType[nn.Module], str]]
    """Modules, and names in them: several where a parameter is shared."""


_waiting: WeakKeyDictionary[nn.Module, dict[str, _Waiting]] = WeakKeyDictionary()
"""Parameters and buffers of modules that wait, by their names in the module."""


@contextmanager
def leaving_weights_mapped() -> Iterator[None]:
    """Loaders may leave weights in their files inside this context; the caller sees to `settle`."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def may_wait() -> bool:
    """Whether weights may be left in their files here."""
    return _allowed.get()


def placeholder(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What stands for a tensor that waits."""
    missing = float("nan") if dtype.is_floating_point else 0
    return torch.full((), missing, dtype=dtype).expand(shape)


def wait(network: nn.Module, makers: Mapping[str, Callable[[], Tensor]]) -> None:
    """Register what makes the tensors of a network, by their names in it; `placeholder`s are in their places, and where
    they are shared."""
    if not makers:
        return
    by_tensor: dict[Tensor, _Waiting] = {}
    for name, make in makers.items():
        where, _, own = name.rpartition(".")
        by_tensor[getattr(network.get_submodule(where), own)] = _Waiting(make, [])
    for module in network.modules():
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None and (waiting := by_tensor.get(tensor)) is not None:
                waiting.places.append((ref(module), name))
                _waiting.setdefault(module, {})[name] = waiting


def value(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of this very module: made now, if it waits, and not kept."""
    waiting = _waiting.get(module, {}).get(name)
    if waiting is not None:
        return waiting.make()
    found: Tensor = getattr(module, name)
    return found.detach()


def taken(module: nn.Module, name: str) -> Tensor:
    """As `value`, for a caller that puts something else in its place."""
    found = value(module, name)
    _waiting.get(module, {}).pop(name, None)
    return found


def settle(root: nn.Module) -> None:
    """Make what waits in a module and below it, in place, each tensor in memory of its own. Parameters stay the same
    objects."""
    for module in root.modules():
        for name, waiting in list(_waiting.get(module, {}).items()):
            if name in module._parameters:
                getattr(module, name).data = waiting.make()
            else:
                module._buffers[name] = waiting.make()
            for place, own in waiting.places:
                if (shares := place()) is not None:
                    _waiting.get(shares, {}).pop(own, None)


def tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what ``state_dict`` would hold, one at a time, those that wait too."""
    for prefix, module in network.named_modules():
        own = module._parameters | {
            name: buffer for name, buffer in module._buffers.items() if name not in module._non_persistent_buffers_set
        }
        for name, tensor in own.items():
            if tensor is not None:
                yield (f"{prefix}.{name}" if prefix else name), value(module, name)
