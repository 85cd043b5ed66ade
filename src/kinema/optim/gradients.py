"""This rank's parts of tensors and of gradients, whether plain tensors or DTensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Place = tuple[Any, Any, torch.device, torch.dtype]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing memory with it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradients(parameters: Iterable[nn.Parameter]) -> dict[Place, list[Tensor]]:
    """This rank's parts of all gradients, grouped by (mesh, placements, device, dtype); mesh None for plain tensors.

    The tensors share memory with the gradients.
    """
    groups: dict[Place, list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            local = gradient.to_local()
            place = (gradient.device_mesh, gradient.placements, local.device, local.dtype)
        else:
            local, place = gradient, (None, None, gradient.device, gradient.dtype)
        groups.setdefault(place, []).append(local)
    return groups
