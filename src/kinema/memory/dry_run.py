"""A step without values: what code on the meta device would hold in memory and compute, found by running it.

`DryRun` counts the storages that are alive, and the floating point operations, while a forward and a backward pass run
on tensors that have shapes and no data. Small tensors made of nothing but constants (masks of text, positions, lengths)
are computed beside, so that code may ask for their values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

LARGEST_VALUE = 2**22
"""Elements up to which a tensor that follows from constants is computed beside."""
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators inside make, from their making to their end.

    ``device``: of the tensors that count. ``live`` and ``peak`` are in bytes; what existed before does not count. Views
    count once. What kernels take for themselves and give back is not seen.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.live = 0
        self.peak = 0
        self.set_aside = 0
        """Bytes that `release` took out of ``live`` since the last `mark`."""
        self.peak_with_aside = 0
        """The peak of both together."""
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count(args)
        self.count(result)
        return result

    def count(self, values: Any) -> None:
        """Take note of the tensors among ``values``."""
        for value in tree_leaves(values):
            # A DTensor is a wrapper without storage: the operators on what it holds come here by themselves.
            plain = isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)
            if plain and value.device.type == self.device:
                self._watch(value)

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        """These existed before: they never count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._sizes[storage._cdata] = 0
            self._watched[storage._cdata] = weakref.ref(storage, self._forget(storage._cdata))

    def release(self, tensor: Tensor) -> None:
        """This tensor's storage counts no longer: somebody else's book has it."""
        key = tensor.untyped_storage()._cdata
        size = self._sizes.get(key, 0)
        if size:
            self._sizes[key] = 0
            self.live -= size
            self.set_aside += size

    def resized(self, storage: torch.UntypedStorage) -> None:
        """This storage has another size than before."""
        known, size = self._sizes.get(storage._cdata, 0), storage.nbytes()
        if storage._cdata in self._sizes and size != known:
            self._sizes[storage._cdata] = size
            self._grow(size - known)

    def mark(self) -> None:
        """Peaks are those from here on."""
        self.peak, self.set_aside, self.peak_with_aside = self.live, 0, self.live

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            self._watched[key] = weakref.ref(storage, self._forget(key))
        if known is None or (known and size != known):  # a storage may be resized, as FSDP2 does
            self._sizes[key] = size
            self._grow(size - (known or 0))

    def _grow(self, by: int) -> None:
        self.live += by
        self.peak = max(self.peak, self.live)
        self.peak_with_aside = max(self.peak_with_aside, self.live + self.set_aside)

    def _forget(self, key: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self.live -= self._sizes.pop(key, 0)
            self._watched.pop(key, None)

        return gone


class DryRun(LiveBytes):
    """`LiveBytes` of the meta device, with the values of small constants, and ``flops``.

    What data decide is decided for them: a single truth is false, a mask is true for ``mask_share`` of its elements,
    such as the tokens that one of four experts gets.
    """

    def __init__(self, mask_share: float = 0.25) -> None:
        super().__init__("meta")
        self.mask_share = mask_share
        self.flops = 0
        self._values = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self._all_meta(func, args, kwargs or {})
        known = self._known(func, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and (known is not None or args[0].dtype == torch.bool):
            return known() if known is not None else False
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [self._positions(index) for index in _flat_masks(args[1])])
        try:
            result = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            if known is None:
                raise
            result = tree_map(lambda one: one.to("meta") if isinstance(one, Tensor) else one, value := known())
            self._keep(result, value)
        else:
            if known is not None and _is_small(result):
                self._keep(result, known())
        self.count(result)
        formula = flop_registry.get(func._overloadpacket) or _FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result

    def _all_meta(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Tables that a network has as real tensors, where they meet tensors without values: as the latter."""
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if not any(one.is_meta for one in tensors) or not any(one.ndim and not one.is_meta for one in tensors):
            return args, kwargs

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_meta or value.ndim == 0:
                return value
            there = value.to("meta")
            self._values[there] = value
            return there

        return tree_map(moved, args), tree_map(moved, kwargs)

    def value(self, tensor: Tensor) -> Tensor:
        """The real values of a tensor that follows from constants alone."""
        return self._values[tensor] if tensor.is_meta else tensor

    def _known(self, func: Any, args: Any, kwargs: Any) -> Callable[[], Any] | None:
        """How to compute the operator's real result, where everything that goes in is known."""
        if func._overloadpacket in _WITHOUT_VALUES:
            return None
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value.is_meta and value not in self._values:
                return None

        def real(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._values[value] if value.is_meta else value
            return torch.device("cpu") if isinstance(value, torch.device) else value

        return lambda: func(*tree_map(real, args), **tree_map(real, kwargs))

    def _keep(self, result: Any, value: Any) -> None:
        for one, its in zip(tree_leaves(result), tree_leaves(value), strict=True):
            if isinstance(one, Tensor) and one.is_meta:
                self._values[one] = its

    def _positions(self, index: Tensor | None) -> Tensor | None:
        """A mask among indices as the positions where it is true."""
        if index is None or index.dtype != torch.bool or not index.is_meta:
            return index
        if index in self._values:
            return self._values[index].nonzero()[:, 0].to("meta")
        return index.new_empty(round(index.numel() * self.mask_share), dtype=torch.long)


def _flat_masks(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    found = list(indices)
    assert all(index is None or index.dtype != torch.bool or index.ndim == 1 for index in found), "a mask of many axes"
    return found


def _is_small(result: Any) -> bool:
    return all(not isinstance(one, Tensor) or one.numel() <= LARGEST_VALUE for one in tree_leaves(result))


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    batch, heads, tokens, width = query.shape
    return 2 * batch * heads * tokens * key.shape[2] * (width + value.shape[3])


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Five products of matrices where the forward pass has two: scores again, and four gradients."""
    return _attention_flops(query, key, value) * 5 // 2


_FLOPS: Mapping[Any, Callable[..., int]] = {
    ATTENTION: _attention_flops,
    _ATTENTION_BACKWARD: _attention_backward_flops,
}
_RANDOM = """
rand randn randint randperm normal_ uniform_ bernoulli bernoulli_ native_dropout empty empty_like empty_strided
new_empty
"""
_WITHOUT_VALUES = {getattr(torch.ops.aten, name) for name in _RANDOM.split()}
