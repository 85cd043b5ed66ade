"""Updates of weights in a short type: nothing lost on average (stochastic rounding) or at all (Kahan summation).

bf16 has 8 significant bits: to a weight of 1, an update below 0.004 rounds to nothing, at every step again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinema.randomness import derive_seed

Rounding = Literal["none", "stochastic", "kahan"]
COMPENSATION = "compensation"
"""The key of Kahan's buffer in an optimiser's state."""


def is_short(weight: Tensor) -> bool:
    """Whether updates of this weight are lost in rounding."""
    return weight.dtype in (torch.bfloat16, torch.float16)


@torch.no_grad()
def add_updates(
    weights: Sequence[Tensor],
    updates: Sequence[Tensor],
    rounding: Rounding,
    compensations: Sequence[Tensor | None] = (),
    draws: Sequence[Callable[[], Tensor]] = (),
) -> None:
    """w <- round(w + u) in place, for weights of any types and updates in float32 (which are used up).

    ``kahan`` (Kahan 1965): t = u + c;  w' = round(w + t);  c <- t - (w' - w), with c, in the weight's type, what was
    rounded off before. ``stochastic``: up or down by chance, so that the mean is right; ``draws`` give each weight's
    random integers (`noise`). Weights in float32 or longer are simply added to.
    """
    for number, (weight, update) in enumerate(zip(weights, updates, strict=True)):
        if not is_short(weight) or rounding == "none":
            weight.copy_(update.add_(weight))
        elif rounding == "kahan":
            compensation = compensations[number]
            assert compensation is not None, "Kahan summation needs its buffer"
            before = weight.float()
            total = update.add_(compensation)
            weight.copy_(before + total)
            compensation.copy_(total.sub_(weight.float().sub_(before)))
        else:
            weight.copy_(round_by_chance(update.add_(weight), draws[number]()))


def round_by_chance(values: Tensor, draws: Tensor) -> Tensor:
    """float32 to bf16, away from zero with the probability that the bits to be cut off are of the last that stays.

    ``draws``: int32 in [0, 2^16), of the same shape.
    """
    bits = (values.view(torch.int32) + draws).bitwise_and_(-0x10000)
    return bits.view(torch.float32).bfloat16()


def noise(parameter: Tensor, *key: int | str) -> Tensor:
    """Random integers in [0, 2^16) for this rank's part of a parameter, int32.

    Each is a hash of the key and of the element's place in the whole parameter: shards draw what the whole would.
    """
    first, second = (_wrapped(derive_seed(*key, half)) for half in ("first", "second"))
    x = _places(parameter) * _wrapped(0x9E3779B1) + first
    x = (x ^ _shifted(x, 16)) * _wrapped(0x85EBCA6B)  # Murmur3's finaliser, keyed in its middle
    x = x ^ second
    x = (x ^ _shifted(x, 13)) * _wrapped(0xC2B2AE35)
    return (x ^ _shifted(x, 16)).bitwise_and_(0xFFFF)


def _places(parameter: Tensor) -> Tensor:
    """The place of each element in the whole parameter, row by row, modulo 2^32, as int32."""
    shape, offsets = tuple(parameter.shape), (0,) * parameter.ndim
    device = parameter.device
    if isinstance(parameter, DTensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offsets = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        device = parameter.to_local().device
    places = torch.zeros(shape, dtype=torch.int32, device=device)
    stride = 1
    for dimension in reversed(range(parameter.ndim)):
        along = torch.arange(shape[dimension], dtype=torch.int32, device=device) + offsets[dimension]
        view = [1] * parameter.ndim
        view[dimension] = -1
        places += (along * _wrapped(stride)).view(view)
        stride *= parameter.shape[dimension]
    return places


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int32."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _wrapped(number: int) -> int:
    """A number modulo 2^32, as int32 has it."""
    return (number + 2**31) % 2**32 - 2**31
