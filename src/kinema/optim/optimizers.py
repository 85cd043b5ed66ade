"""Optimisers from the configuration: torch's own, with parameter groups made here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kinema.config.schema import OptimizerConfig

if TYPE_CHECKING:
    import torch

Parameters = Mapping[str, "torch.nn.Parameter"]


def build_optimizers(
    parameters: Parameters, block_matrices: set[str], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """Optimisers over the trained parameters (name -> parameter); together they take each exactly once.

    ``block_matrices`` names the 2-D weights inside the network's blocks, which Muon takes. Every group carries
    ``peak_lr``; the loop sets ``lr = peak_lr * lr_factor``. Vectors have no weight decay.
    """
    return BUILDERS[config.type](parameters, block_matrices, config)


def is_vector(parameter: torch.nn.Parameter) -> bool:
    """Whether all elements lie along one dimension: biases, scales of norms, factors of IA3 ([out, 1])."""
    return parameter.ndim < 2 or parameter.numel() == max(parameter.shape)


def _adamw(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    import torch

    decayed = [p for p in parameters.values() if not is_vector(p)]
    plain = [p for p in parameters.values() if is_vector(p)]
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay, "peak_lr": config.lr}
        for params, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if params
    ]
    fused = all(p.dtype in (torch.float32, torch.float64) or p.is_cuda for p in parameters.values())
    return [torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)]


def _muon(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    from kinema.optim.muon import Muon

    matrices = [p for name, p in parameters.items() if name in block_matrices]
    rest = {name: p for name, p in parameters.items() if name not in block_matrices}
    optimizers: list[torch.optim.Optimizer] = _adamw(rest, set(), config) if rest else []
    if matrices:
        peak = config.matrix_lr or config.lr
        groups = [{"params": matrices, "peak_lr": peak}]
        optimizers.append(Muon(groups, lr=peak, momentum=config.momentum, weight_decay=config.weight_decay))
    return optimizers


BUILDERS: dict[str, Callable[[Parameters, set[str], OptimizerConfig], list[torch.optim.Optimizer]]] = {
    "adamw": _adamw,
    "muon": _muon,
}


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> float:
    """Set every group's learning rate to its peak times ``factor``; returns the first group's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return optimizers[0].param_groups[0]["lr"]
