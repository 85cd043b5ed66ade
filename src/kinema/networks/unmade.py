"""Tensors whose values are made when somebody asks for them.

Weights of a file may have to be multiplied by scales or put together from pieces, and get other names, cuts and orders
before a network takes them. `Unmade` stands for such a tensor: what torch's functions make of one is another, so a
conversion runs on shapes alone, and `made` gives the values of one result at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

T = TypeVar("T")


class Unmade(Tensor):
    """A shape and a type, on the meta device, and what makes the values. Nothing may change one in place, and nothing
    that looks at values can be asked of it."""

    make: Callable[[], Tensor]

    @classmethod
    def of(cls, make: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Unmade:
        """What ``make`` returns, of this shape and type, in memory of its own."""
        return cls._around(torch.empty(shape, dtype=dtype, device="meta"), make)

    @classmethod
    def _around(cls, outline: Tensor, make: Callable[[], Tensor]) -> Unmade:
        found: Unmade = outline.as_subclass(cls)
        found.make = make
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        assert name != "__setitem__" and (name.startswith("__") or not name.endswith("_")), f"{name} of what is unmade"
        named = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*tree_map(_outline, args), **tree_map(_outline, named))
        leaves, structure = tree_flatten(result)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return result  # a size, a type, a number of dimensions
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[number] = cls._around(leaf, partial(_applied, func, args, named, number))
        return tree_unflatten(leaves, structure)


def made(value: Tensor) -> Tensor:
    """The values of a tensor that is unmade; any other tensor as it is."""
    return value.make() if isinstance(value, Unmade) else value


def _outline(value: T) -> T | Tensor:
    if isinstance(value, Unmade):
        return value.as_subclass(Tensor)
    return value.to("meta") if isinstance(value, Tensor) else value


def _applied(func: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any], number: int) -> Tensor:
    """One of the tensors that a function gives."""
    result: Tensor = tree_flatten(func(*tree_map(_made, args), **tree_map(_made, named)))[0][number]
    return result


def _made(value: T) -> T | Tensor:
    return made(value) if isinstance(value, Tensor) else value
