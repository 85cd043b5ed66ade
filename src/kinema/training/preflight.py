"""What is decided and checked when a training starts, before anything expensive."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kinema.config.schema import Config
from kinema.dtypes import torch_dtype
from kinema.errors import ConfigError, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kinema.families.base import Family
    from kinema.parallel.mesh import Sizes, World


def repeat_exactly(config: Config) -> None:
    """Let GPUs do what they do to the same bits, if ``run.deterministic`` asks for it. Before processes join: NCCL
    chooses its algorithms as its communicators are made."""
    import torch

    if not (config.run.deterministic and torch.cuda.is_available()):
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself with a fixed workspace
    os.environ.setdefault("NCCL_ALGO", "^NVLS")  # switches that add up do so in any order
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every buffer, at every step, for nothing that is read
    torch.backends.cudnn.benchmark = False


def keep_within(budget: str | None, device: torch.device) -> None:
    """Hold torch's allocator to ``memory.budget`` on a GPU: before it takes more, it gives back what lies unused, and
    trials of batch sizes end there."""
    if budget is None or device.type != "cuda":
        return
    import torch

    from kinema.parallel.devices import memory_of
    from kinema.parallel.plan_memory import CONTEXT

    _, total = torch.cuda.mem_get_info(device)
    lent = memory_of(budget) - CONTEXT  # which the allocator does not count
    if 0 < lent < total:
        torch.cuda.set_per_process_memory_fraction(lent / total, device)


def resolve(config: Config, device: torch.device) -> Config:
    """The configuration with everything decided that depends on the machine, and torch set up accordingly."""
    import torch

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    if config.training.precision != "auto":
        return config
    precision = "bf16" if computes_in_bf16(device) else "fp32"
    return config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices itself; where it does not, bf16 is slower than fp32 by far."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def check_shares(config: Config, world: World) -> None:
    """UserError for a global batch that leaves devices without a sample."""
    training = config.training
    given = [(f"training.batch_sizes.{i}.size", rule.size) for i, rule in enumerate(training.batch_sizes)]
    if training.batch_size != "auto" and training.token_budget is None:
        given.insert(0, ("training.batch_size", training.batch_size))
    for key, size in given:
        if size < world.dp_size:
            raise UserError(
                f"{key} = {size} is the batch over all devices, and this run has {world.dp_size}: "
                f"{world.dp_size - size} of them would have nothing to do. Set it to a multiple of {world.dp_size}."
            )


def check_pipeline(
    config: Config, family: Family, sizes: Sizes, empty: Callable[[str], nn.Module] | None = None
) -> None:
    """ConfigError for pipeline stages that cannot be made of this network, or with the rest of this configuration.
    ``empty``: gives a part on the meta device, for who asks more than once."""
    from kinema.families.pipeline_plans import pipeline_units
    from kinema.parallel.pipeline_stages import starts_of
    from kinema.plugins import OBJECTIVES

    parallel = config.parallel
    if sizes.pp == 1:
        return
    for refused, what, why in _pipeline_refusals(config, sizes):
        if refused:
            raise ConfigError(f"parallel.pp = {sizes.pp}: not with {what}: {why}")
    roles = OBJECTIVES.load(config.objective.type)(config.objective, family).roles
    if tuple(roles) != ("student",):
        raise ConfigError(
            f'parallel.pp = {sizes.pp}: not with objective.type = "{config.objective.type}", which runs several '
            f"networks for a loss ({', '.join(roles)}). Use parallel.dp_shard."
        )
    for part in family.trained_parts():
        if part.startswith("network"):
            network = family.load(part, "meta", None) if empty is None else empty(part)
            starts_of(network, pipeline_units(network, family.blocks(network)), parallel)


def _pipeline_refusals(config: Config, sizes: Sizes) -> list[tuple[bool, str, str]]:
    """What does not go together with a pipeline: (whether this configuration asks for it, its name, the reason and what
    to do). The table of docs/guides/parallel.md."""
    training, zero_bubble = config.training, config.parallel.schedule == "zero_bubble"
    again = 'use parallel.schedule = "1f1b".'
    return [
        (
            training.batch_size == "auto" and training.token_budget is None,
            'training.batch_size = "auto"',
            "a trial sees one micro-batch, and a stage keeps several. Give a number, and training.micro_batch_size.",
        ),
        (
            zero_bubble and bool(training.activation_checkpointing),
            'schedule = "zero_bubble" and training.activation_checkpointing',
            f"a block's second run is one with its whole backward pass; {again}",
        ),
        (
            zero_bubble and training.compile is True,
            'schedule = "zero_bubble" and training.compile',
            f"a compiled block's backward pass cannot be taken apart; {again}",
        ),
        (
            zero_bubble and (sizes.dp_shard > 1 or sizes.tp > 1),
            'schedule = "zero_bubble" and parallel.dp_shard or parallel.tp',
            f"weights that are in pieces have no gradients apart from their inputs'; {again}",
        ),
    ]


def check_compute(config: Config, family: Family, world: World) -> None:
    """ConfigError for kernels and types of computing that cannot be had here, or not with the rest of this
    configuration. Loads packages of kernels, and no weights."""
    from kinema.memory.attention import check_attention
    from kinema.memory.float8_compute import check_float8
    from kinema.memory.fusion import check_fusion

    training, parallel = config.training, config.parallel
    attention, dtype = training.attention, torch_dtype(training.precision)
    if attention != "sdpa" and parallel.sp > 1 and parallel.attention == "ring":
        raise ConfigError(
            f'training.attention = "{attention}": not with parallel.attention = "ring", which merges what torch\'s own '
            'kernels find in each piece. Set parallel.attention = "ulysses".'
        )
    deterministic = config.run.deterministic
    check_attention(attention, "training.attention", world.device, dtype, trains=True, deterministic=deterministic)
    check_float8(config, family, world.device)
    if not training.fuse_qkv:
        return
    for refused, what, why in (
        (config.adapter is not None, "[adapter]", "it changes queries, keys and values each by itself"),
        (parallel.tp > 1, f"parallel.tp = {parallel.tp}", "no device has a whole layer"),
    ):
        if refused:
            raise ConfigError(f"training.fuse_qkv = true: not with {what}: {why}. Leave fuse_qkv out.")
    check_fusion(family, "training.fuse_qkv", family.trained_parts())


def make_writable(directory: Path) -> None:
    """Make the run directory; UserError where nothing can be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"run.dir: cannot write to {directory} ({error.strerror}). Choose another with --run.dir."
        ) from None
