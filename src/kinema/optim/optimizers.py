"""Optimisers from the configuration: torch's own, with parameter groups made here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kinema.config.schema import OptimizerConfig
from kinema.plugins import OPTIMIZERS

if TYPE_CHECKING:
    import torch

Parameters = Mapping[str, "torch.nn.Parameter"]


def build_optimizers(
    parameters: Parameters, block_matrices: set[str], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """Optimisers over the trained parameters (``{part}.{name}`` -> parameter); together they take each exactly once.

    None for no parameters: a stage of a pipeline may hold nothing that trains.

    ``block_matrices`` names the 2-D weights inside the network's blocks, which Muon takes. Every group carries
    ``peak_lr``, which is `peak_lr`'s; the loop sets ``lr = peak_lr * lr_factor``. Vectors have no weight decay.
    """
    return OPTIMIZERS.load(config.type)(parameters, block_matrices, config) if parameters else []


def is_vector(parameter: torch.nn.Parameter) -> bool:
    """Whether all elements lie along one dimension: biases, scales of norms, factors of IA3 ([out, 1])."""
    return parameter.ndim < 2 or parameter.numel() == max(parameter.shape)


def peak_lr(name: str, config: OptimizerConfig, default: float) -> float:
    """The peak learning rate of a parameter ``{part}.{name}``: its part's own, or ``default``."""
    return config.part_lr.get(name.partition(".")[0], default)


def adamw(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """torch's AdamW, one group for each learning rate and weight decay; and for each mesh of devices, as its kernels
    take no tensors of several together."""
    import torch

    groups: dict[tuple[float, float, Any], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = 0.0 if is_vector(parameter) else config.weight_decay
        key = peak_lr(name, config, config.lr), decay, getattr(parameter, "device_mesh", None)
        groups.setdefault(key, []).append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": members, "weight_decay": decay, "peak_lr": peak} for (peak, decay, _), members in groups.items()
    ]
    fused = all(p.dtype in (torch.float32, torch.float64) or p.is_cuda for p in parameters.values())
    return [torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)]


def muon(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon over the blocks' matrices, AdamW over the rest. A part's own learning rate holds for both."""
    from kinema.optim.muon import Muon

    matrices: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if name in block_matrices:
            matrices.setdefault(peak_lr(name, config, config.matrix_lr or config.lr), []).append(parameter)
    rest = {name: p for name, p in parameters.items() if name not in block_matrices}
    optimizers: list[torch.optim.Optimizer] = adamw(rest, set(), config) if rest else []
    if matrices:
        groups = [{"params": members, "peak_lr": peak} for peak, members in matrices.items()]
        lr = config.matrix_lr or config.lr
        optimizers.append(Muon(groups, lr=lr, momentum=config.momentum, weight_decay=config.weight_decay))
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float, lr: float) -> float:
    """Set every group's learning rate to its peak times ``factor``; returns the first group's, without groups that of
    the peak ``lr``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return optimizers[0].param_groups[0]["lr"] if optimizers else lr * factor
