"""Automagic (Ostris 2024, ai-toolkit): Adafactor's update without momentum, and a learning rate for each weight, which
grows where updates agree in sign with those before and shrinks where they do not."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from kinema.optim.gradients import local_part
from kinema.optim.rounding import COMPENSATION, Rounding, add_updates, is_short, noise
from kinema.optim.stepping import Stepping, with_gradients


class Automagic(Stepping):
    """Of a matrix G (of more dimensions: of each of its last two), with row and column means of squares

    r <- b r + (1 - b) mean_columns(G^2 + eps);  c <- b c + (1 - b) mean_rows(G^2 + eps);
    U = G / sqrt(r c / mean(r));  U <- U / max(1, rms(U) / clip);  w <- round(w - f a (U + decay w)),

    where rms is of the whole parameter, a vector has the average of its squares in the place of r c / mean(r), and
    a = clamp(lr + k bump, min_lr, max_lr) with, for each weight, k one up where U > 0 as in the step before (or U <= 0
    as then), else one down, and kept where a leaves neither bound by more than a bump. f is what the schedule leaves of
    the peak: lr / peak_lr of the group.

    The authors keep a itself, in 8 bits with one scale for each parameter, in which bumps of 1e-6 are lost above
    2.5e-4; k, in 16, is exact. Rows may be sharded: means over rows are summed over ranks.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        min_lr: float = 1e-7,
        max_lr: float = 1e-3,
        lr_bump: float = 1e-6,
        beta2: float = 0.999,
        clip: float = 1.0,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        rounding: Rounding = "none",
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))
        self.min_lr, self.max_lr, self.lr_bump = min_lr, max_lr, lr_bump
        self.beta2, self.clip, self.eps, self.rounding = beta2, clip, eps, rounding

    def update(self) -> None:
        for group in self.param_groups:
            for name, parameter in with_gradients(group):
                self._step_one(name, parameter, group)

    def _make_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["bumps"] = torch.zeros_like(parameter, dtype=torch.int16, requires_grad=False)
            state["was_positive"] = torch.zeros_like(parameter, dtype=torch.bool, requires_grad=False)
            if parameter.ndim > 1:
                state["row"] = _rows_like(parameter)
                state["column"] = _columns_like(parameter)
            else:
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            if self.rounding == "kahan" and is_short(parameter):
                state[COMPENSATION] = torch.zeros_like(parameter, requires_grad=False)
        return state

    def _step_one(self, name: str, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, weight = self._make_state(parameter), local_part(parameter)
        state["step"] += 1
        update = self._update(parameter, local_part(parameter.grad).float(), state)
        lr = self._learning_rates(state, update > 0, group.get("peak_lr", group["lr"]))
        if group["weight_decay"]:
            update.add_(weight, alpha=group["weight_decay"])
        update.mul_(lr).mul_(-group["lr"] / group.get("peak_lr", group["lr"]))

        compensation = local_part(state[COMPENSATION]) if COMPENSATION in state else None
        draw = partial(noise, parameter.detach(), group.get("seed", 0), name, int(state["step"]), "rounding")
        add_updates([weight], [update], self.rounding, [compensation], [draw])

    def _update(self, parameter: nn.Parameter, gradient: Tensor, state: dict[str, Tensor]) -> Tensor:
        """U of this rank's rows, given their gradient in float32, which may be overwritten."""
        squares = gradient.square().add_(self.eps)
        if parameter.ndim > 1:
            row, column = local_part(state["row"]), local_part(state["column"])
            row.lerp_(squares.mean(-1), 1 - self.beta2)
            matrix = parameter.ndim == 2  # whose rows, and so whose mean over rows, may be on several ranks
            sums = squares.sum(-2)
            column.lerp_((_over_ranks(sums, parameter) if matrix else sums) / parameter.shape[-2], 1 - self.beta2)
            mean = row.sum(-1, keepdim=True)
            mean = (_over_ranks(mean, parameter) if matrix else mean) / parameter.shape[-2]
            update = gradient.mul_((row / mean).rsqrt_().unsqueeze(-1)).mul_(column.rsqrt().unsqueeze(-2))
        else:
            average = local_part(state["exp_avg_sq"])
            average.lerp_(squares, 1 - self.beta2)
            update = gradient.mul_(average.rsqrt())
        total = _over_ranks(update.square().sum(), parameter)
        return update.div_(((total / parameter.numel()).sqrt() / self.clip).clamp_(min=1.0))

    def _learning_rates(self, state: dict[str, Tensor], positive: Tensor, start: float) -> Tensor:
        """Move each weight's learning rate by its sign; returns them."""
        bumps, before = local_part(state["bumps"]), local_part(state["was_positive"])
        bumps.add_(torch.where(positive == before, 1, -1).to(torch.int16))
        lowest, highest = (self.min_lr - start) / self.lr_bump, (self.max_lr - start) / self.lr_bump
        bumps.clamp_(min=int(lowest // 1), max=-int(-highest // 1))
        before.copy_(positive)
        return bumps.float().mul_(self.lr_bump).add_(start).clamp_(self.min_lr, self.max_lr)


def _over_ranks(value: Tensor, parameter: Tensor) -> Tensor:
    """The sum of a value over the ranks that share a parameter's rows."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, device = parameter.device_mesh, value.device
    value = value.to(mesh.device_type)  # of shards in the host's memory too
    for dimension, placement in enumerate(parameter.placements):
        if not placement.is_replicate():
            dist.all_reduce(value, group=mesh.get_group(dimension))
    return value.to(device)


def _rows_like(parameter: Tensor) -> Tensor:
    """Zeros in the place of each row of the last dimension, laid out as the parameter is."""
    local = torch.zeros(local_part(parameter).shape[:-1], device=local_part(parameter).device)
    return _laid_out(local, parameter, parameter.shape[:-1])


def _columns_like(parameter: Tensor) -> Tensor:
    """Zeros in the place of each column; whole on each rank where the parameter is a matrix."""
    part = local_part(parameter)
    local = torch.zeros((*part.shape[:-2], part.shape[-1]), device=part.device)
    shape = torch.Size((*parameter.shape[:-2], parameter.shape[-1]))
    return local if parameter.ndim == 2 else _laid_out(local, parameter, shape)


def _laid_out(local: Tensor, parameter: Tensor, shape: torch.Size) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local
    placements = parameter.placements
    assert all(isinstance(one, Replicate) or one == Shard(0) for one in placements), "rows are shared, not cut"
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(local, parameter.device_mesh, placements, run_check=False, shape=shape, stride=stride)
    return whole.to(local.device)
