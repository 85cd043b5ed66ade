"""Optimisers from the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kinema.config.optimizer import OptimizerConfig, library_of
from kinema.errors import ConfigError
from kinema.optim.groups import grouped, is_vector, peak_lr, weight_decay_of
from kinema.plugins import OPTIMIZERS

if TYPE_CHECKING:
    import torch

__all__ = ["build_optimizers", "found_lr", "is_vector", "peak_lr", "set_lr", "weight_decay_of"]

Parameters = Mapping[str, "torch.nn.Parameter"]


def build_optimizers(
    parameters: Parameters, block_matrices: set[str], config: OptimizerConfig, seed: int = 0
) -> list[torch.optim.Optimizer]:
    """Optimisers over the trained parameters (``{part}.{name}`` -> parameter); together they take each exactly once.

    None for no parameters: a stage of a pipeline may hold nothing that trains.

    ``block_matrices`` names the 2-D weights inside the network's blocks, which Muon takes. Every group carries
    ``peak_lr``, which is `peak_lr`'s; the loop sets ``lr = peak_lr * lr_factor``. Vectors have no weight decay.
    ``seed``, the run's, is in every group too: with a parameter's name and its count of steps it is the key of what an
    optimiser draws; and ``built``, its settings as they are now, from which checkpoints tell what changes in it.
    """
    if not parameters:
        return []
    if library_of(config.type) is not None:
        from kinema.optim.library import named_class

        optimizers = named_class(parameters, block_matrices, config)
    else:
        optimizers = OPTIMIZERS.load(config.type)(parameters, block_matrices, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["seed"] = seed
            group["built"] = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    return optimizers


def adamw(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """torch's AdamW; kinema's where updates of short weights are not simply rounded."""
    import torch

    if config.rounding != "none":
        return _lean_adamw(parameters, config, 32)
    settings = grouped(parameters, config)
    fused = all(p.dtype in (torch.float32, torch.float64) or p.is_cuda for p in parameters.values())
    return [torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)]


def adamw8bit(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW whose moments take a byte each."""
    return _lean_adamw(parameters, config, 8)


def _lean_adamw(parameters: Parameters, config: OptimizerConfig, bits: Any) -> list[torch.optim.Optimizer]:
    from kinema.optim.adam import AdamW

    check_rounding(parameters, config)
    settings = grouped(parameters, config)
    return [AdamW(settings, config.lr, config.betas, config.eps, rounding=config.rounding, bits=bits)]


def automagic(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Automagic, which starts each weight at its group's peak learning rate."""
    from kinema.optim.automagic import Automagic

    check_rounding(parameters, config)
    own = {"min_lr": config.min_lr, "max_lr": config.max_lr, "lr_bump": config.lr_bump}
    return [Automagic(grouped(parameters, config), lr=config.lr, rounding=config.rounding, **own)]


def muon(parameters: Parameters, block_matrices: set[str], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon over the blocks' matrices, AdamW over the rest. A part's own learning rate holds for both."""
    from kinema.optim.muon import Muon, Orthogonal

    matrices = {name: p for name, p in parameters.items() if name in block_matrices}
    rest = {name: p for name, p in parameters.items() if name not in block_matrices}
    optimizers: list[torch.optim.Optimizer] = adamw(rest, set(), config) if rest else []
    if matrices:
        lr = config.matrix_lr or config.lr
        how = Orthogonal(config.variant or "muon", config.orthogonalisation, config.betas[1], config.eps)
        optimizers.append(Muon(grouped(matrices, config, lr), lr=lr, momentum=config.momentum, how=how))
    return optimizers


def check_rounding(parameters: Parameters, config: OptimizerConfig) -> None:
    """ConfigError for weights that cannot be rounded as `optimizer.rounding` says."""
    import torch

    if config.rounding != "stochastic":
        return
    for name, parameter in parameters.items():
        if parameter.dtype == torch.float16:
            raise ConfigError(
                f'optimizer.rounding = "stochastic" is for weights in bf16, and {name} is in fp16. Use "kahan".'
            )


def found_lr(optimizers: list[torch.optim.Optimizer]) -> dict[str, float]:
    """``{"found_lr": ...}``: what an optimiser that looks for its learning rate (Prodigy's d) has found, before ``lr``
    multiplies it; {} of others."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return {"found_lr": float(groups[0]["d"])} if groups and "d" in groups[0] else {}


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float, lr: float) -> float:
    """Set every group's learning rate to its peak times ``factor``; returns the first group's, without groups that of
    the peak ``lr``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return optimizers[0].param_groups[0]["lr"] if optimizers else lr * factor
