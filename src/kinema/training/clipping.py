"""The global norm of gradients and clipping by it, for plain tensors and DTensors of any meshes together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kinema.optim.gradients import Place, local_gradients

if TYPE_CHECKING:
    from kinema.parallel.pipeline import Pipeline


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], max_norm: float | None, pipeline: Pipeline | None = None
) -> Tensor:
    """Scale all gradients in place so that their global 2-norm is at most ``max_norm`` (None: leave them).

    Returns the norm before clipping: a scalar (float32, or float64 where all gradients are), the same on all ranks.
    If it is not finite the gradients are of no use and the step must be skipped. Replicated gradients must be summed
    over ranks already, as they are after the last ``kinema.parallel.data.accumulate``. Of the parameters of a
    ``pipeline``, those that every stage has count once.
    """
    parameters = list(parameters)
    counted = parameters if pipeline is None else [p for p in parameters if pipeline.counts(p)]
    squares = [_squared_norm(place, gradients) for place, gradients in local_gradients(counted).items()]
    if pipeline is not None:
        squares = [pipeline.add_over_stages(squares)]
    if not squares:
        return torch.zeros(())
    device = squares[0].device
    squares = [square.to(device) for square in squares]
    norm = torch.stack(squares).sum().sqrt() if len({s.dtype for s in squares}) == 1 else sum(squares).sqrt()
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for (_, _, where, dtype), gradients in local_gradients(parameters).items():
            torch._foreach_mul_(gradients, factor.to(where, dtype))
    return norm


def _squared_norm(place: Place, gradients: list[Tensor]) -> Tensor:
    mesh, placements, _, dtype = place
    norms = torch._foreach_norm(gradients, 2, dtype=torch.promote_types(dtype, torch.float32))
    square = torch.stack(norms).square().sum()
    if mesh is not None:
        square = square.to(mesh.device_type)  # of shards in the host's memory too: the device's links are the fast ones
        for dimension, placement in enumerate(placements):
            assert not placement.is_partial(), "gradients are summed before they are clipped"
            if not placement.is_replicate() and mesh.size(dimension) > 1:
                dist.all_reduce(square, group=mesh.get_group(dimension))
    return square
