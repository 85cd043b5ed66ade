"""Muon (Jordan et al. 2024): momentum whose matrix updates are orthogonalised by a Newton-Schulz iteration.

torch's own class iterates in bf16, one matrix after the other; most CPUs have no bf16 arithmetic, and a network's
blocks repeat a few shapes. This one iterates in fp32 off the GPU and takes many matrices of one shape at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from kinema.optim.gradients import local_part

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic X <- a X + (b X X^T + c (X X^T)^2) X, chosen by Jordan for the steepest slope at zero."""
PIECE_BYTES = 2**28
"""Matrices that are stacked at once, counted in fp32: the iteration needs a few times this."""


def orthogonalise(matrices: Tensor, iterations: int = 5, eps: float = 1e-7) -> Tensor:
    """Bring the singular values of each matrix of a stack [N, rows, columns] near 1 (about 0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for 2-D parameters.

    m <- mu m + (1 - mu) g;  u = (1 - mu) g + mu m;  w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) orth(u).
    The factor 0.2 sqrt(max(rows, columns)) gives the update the size of AdamW's (Liu et al. 2025, "Muon is Scalable
    for LLM Training"), so that both take one learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
    ) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations))
        for group in self.param_groups:
            for p in group["params"]:
                assert p.ndim == 2, f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for p in parameters:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [local_part(self.state[p]["momentum"]) for p in parameters]
        torch._foreach_lerp_(buffers, [local_part(p.grad) for p in parameters], 1 - group["momentum"])
        torch._foreach_mul_([local_part(p) for p in parameters], 1 - group["lr"] * group["weight_decay"])

        by_shape: dict[tuple[torch.Size, Any], list[Tensor]] = defaultdict(list)
        for p in parameters:
            by_shape[p.shape, getattr(p, "device_mesh", None)].append(p)
        for (shape, _), members in by_shape.items():
            count = max(1, PIECE_BYTES // (4 * shape.numel()))
            for start in range(0, len(members), count):
                self._step_piece(members[start : start + count], group)

    def _step_piece(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape, given their momenta."""
        buffers = [self.state[p]["momentum"] for p in parameters]
        updates = torch._foreach_lerp([p.grad for p in parameters], buffers, group["momentum"])
        stacked = torch.stack([_whole(update) for update in updates])
        scale = -group["lr"] * 0.2 * max(stacked.shape[1:]) ** 0.5
        for p, update in zip(parameters, orthogonalise(stacked, group["iterations"]), strict=True):
            p.add_(_laid_out_like(update, p), alpha=scale)


def _whole(update: Tensor) -> Tensor:
    """On the mesh's device, where shards are sent from and matrices multiplied, also of shards in the host's memory."""
    if isinstance(update, DTensor):
        return update.to(update.device_mesh.device_type).full_tensor()
    return update


def _laid_out_like(update: Tensor, parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return update.to(parameter.device)
