"""The gradients of weights apart from those of inputs (Qi et al. 2023, "Zero Bubble Pipeline Parallelism").

Inside `deferring`, linear layers whose input has a gradient leave out their own in the backward pass, and keep what it
takes to compute it later. Only inputs' gradients are what the stage before waits for. Everything else (norms, biases of
attention, convolutions) has little to compute and gets its gradient as always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Later = list[Callable[[], None]]
"""What is to be computed once there is time."""


@contextmanager
def deferring(later: Later) -> Iterator[None]:
    """Linear layers that run inside put the gradients of their weights into ``later`` when their backward runs."""
    with _LinearLayers(later):
        yield


class _LinearLayers(TorchFunctionMode):
    def __init__(self, later: Later) -> None:
        super().__init__()
        self.later = later

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and torch.is_grad_enabled():
            return _linear(self.later, *args, **kwargs)
        return func(*args, **kwargs)


def _linear(later: Later, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (input.requires_grad and weight.requires_grad and weight.is_leaf):
        return torch.nn.functional.linear(input, weight, bias)
    dtype = None
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input = input.to(dtype)
    return _Linear.apply(input, weight, bias, dtype, later)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """y = x W^T + b; its backward gives the gradient of x and puts off those of W and b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None, later: Later
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.dtype, ctx.later = weight, bias, dtype, later
        with torch.autocast(x.device.type, enabled=False):
            return torch.nn.functional.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        weight, bias = ctx.weight, ctx.bias

        def compute() -> None:
            rows = gradient.flatten(0, -2)
            _add(weight, rows.T @ x.flatten(0, -2))
            if bias is not None and bias.requires_grad:
                _add(bias, rows.sum(0))

        ctx.later.append(compute)
        return gradient @ weight.to(ctx.dtype), None, None, None, None


@torch.no_grad()
def _add(parameter: Tensor, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
