"""Matrix products in float8, forward and backward, by torchao (Micikevicius et al. 2022, arXiv 2209.05433).

Inputs, weights and gradients are rounded when they are multiplied, each with a scale from its largest number, for the
whole matrix or for each row. The weights themselves stay in their type, with their names: checkpoints, exports and
optimisers know nothing of it.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import nn

from kinema.config.section import QUANTIZED
from kinema.errors import ConfigError
from kinema.networks.quantized import is_sensitive

if TYPE_CHECKING:
    import torch

    from kinema.config.schema import Config
    from kinema.families.base import Family

Recipe = Literal["tensorwise", "rowwise"]
MULTIPLE = 16
"""Both sizes of a matrix have to be a multiple of it."""
_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}
_GPUS = {"tensorwise": "an Ada, Hopper or newer GPU", "rowwise": "a Hopper or newer GPU"}


def check_float8(config: Config, family: Family, device: torch.device) -> None:
    """ConfigError if ``training.float8`` cannot be had here. Loads nothing."""
    import torch

    recipe = config.training.float8
    if recipe == "none":
        return
    key = f'training.float8 = "{recipe}"'
    if config.adapter is not None:
        stored = [part for part in family.trained_parts() if getattr(config.model, part).dtype not in QUANTIZED]
        advice = f' model.{stored[0]}.dtype = "fp8" stores a frozen base in float8.' if stored else ""
        raise ConfigError(
            f"{key}: torchao's layers compute the gradients of frozen weights too, so that an adapter would train "
            f'slower than without. Set training.float8 = "none".{advice}'
        )
    if config.training.fuse_qkv:
        raise ConfigError(f"{key}: not with training.fuse_qkv, whose products are kinema's own. Choose one of them.")
    if config.parallel.tp > 1:
        raise ConfigError(
            f"{key}: not with parallel.tp = {config.parallel.tp}. Share the network by parallel.dp_shard."
        )
    if recipe == "rowwise" and config.training.precision in ("fp32", "fp16"):
        raise ConfigError(
            f'{key}: not with training.precision = "{config.training.precision}": products with a scale for each row '
            'come out in bf16 alone. Set training.precision = "bf16".'
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY[recipe]:
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(f'{key} needs {_GPUS[recipe]}, and this is {here}. Set training.float8 = "none".')
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"{key} needs torchao. Install it: pip install 'kinema[quant]'.")


def compute_in_float8(blocks: Mapping[str, nn.ModuleList], recipe: Recipe, *, emulate: bool = False) -> int:
    """Let the linear layers of a family's lists of blocks compute in float8, in place; returns how many do. Those of
    norms, modulation and embeddings do not: few products, which act on every token.

    Call it before activation checkpointing and compilation. ``emulate``: round as float8 does and multiply in float32,
    for devices without it. Sharded weights are gathered in their own type. ConfigError where no layer has sizes for it.
    """
    with _quietly():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        # Tokens of a batch are the inner size of the product that makes a weight's gradient: any number of them.
        config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=not emulate)
        count = 0

        def chosen(layer: nn.Module, name: str) -> bool:
            nonlocal count
            assert isinstance(layer, nn.Linear)
            fits = layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0 and not is_sensitive(name)
            count += fits
            return fits

        for group in blocks.values():
            convert_to_float8_training(group, module_filter_fn=chosen, config=config)
    if count == 0:
        raise ConfigError(
            f'training.float8 = "{recipe}": no linear layer of the blocks has sizes that are multiples of {MULTIPLE}. '
            'Set training.float8 = "none".'
        )
    return count


@contextmanager
def _quietly() -> Iterator[None]:
    """torchao tells of kernels that it has not found, which are others."""
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
