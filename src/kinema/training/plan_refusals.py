"""Which plans of a configuration cannot be, by the checks that a training makes when it starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from kinema.config.schema import Config
from kinema.config.section import QUANTIZED
from kinema.errors import UserError
from kinema.families.base import Family
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan import Candidate, Kind, Refusal, Workload, as_configured

if TYPE_CHECKING:
    from torch import nn


def refusals(config: Config, family: Family, workload: Workload) -> Refusal:
    """What cannot be with the optimiser, or with blocks that travel, before what the model or the batch cannot do."""
    from kinema.training.memory_checks import check_block_swap
    from kinema.training.optimizer_checks import why_not_laid_out

    refusal = _of_model_and_batch(config, family, workload)

    def all_of_them(plan: Candidate) -> tuple[str, str] | None:
        asked = _asked(config, cpu_offload=True) if plan.sharding.offload else config
        if reason := why_not_laid_out(asked, plan.sizes):
            return reason.partition(":")[0].partition(" and ")[0], reason
        try:
            check_block_swap(config, plan.offloading.blocks, workload.model.blocks, plan.sizes)
        except UserError as error:
            return "plans that memory.offload_blocks is not for", str(error)
        return refusal(plan)

    return all_of_them


def _of_model_and_batch(config: Config, family: Family, workload: Workload) -> Refusal:
    """What the model or the batch cannot do, by the checks that a training makes when it starts."""
    from kinema.parallel.sequence import check_sequence_parallel
    from kinema.parallel.tensor import check_tensor_parallel
    from kinema.training.networks import check_one_type

    @cache
    def of(name: str, size: int) -> str | None:
        if name == "sp":
            return _message(lambda: check_sequence_parallel(size, "parallel.sp", family, family.trained_parts()))
        return _message(lambda: check_tensor_parallel(_asked(config, tp=size), family))

    @cache
    def of_shards() -> str | None:
        return _quantized(config, family) or _message(lambda: check_one_type(_asked(config, dp_shard=2), family))

    of_pipeline = _of_pipeline(config, family)

    def refusal(plan: Candidate) -> tuple[str, str] | None:
        sizes = plan.sizes
        for name in ("tp", "sp"):
            size = getattr(sizes, name)
            if size > 1 and (reason := of(name, size)):
                return f"{name} = {size}", reason
        # Sizes above 1 are one to these checks.
        about = sizes.pp, min(sizes.tp, 2), min(sizes.dp_shard, 2), plan.checkpointing
        if sizes.pp > 1 and (reason := of_pipeline(*about)):
            return f"pp = {sizes.pp}" + _besides(reason, plan), reason
        if sizes.dp_shard > 1 and (reason := of_shards()):
            return "dp_shard > 1", reason
        total = workload.batch(sizes).total
        if total < sizes.dp:
            reason = f"a batch of {total} samples leaves {sizes.dp - total} of {sizes.dp} shares without one."
            return f"dp_replicate x dp_shard above {total}", reason
        return None

    return refusal


def _of_pipeline(config: Config, family: Family) -> Callable[[int, int, int, Kind], str | None]:
    """Why a pipeline of so many stages cannot be, with sizes of tp and of dp_shard and a kind of checkpointing."""
    from kinema.training.preflight import check_pipeline

    @cache
    def empty(part: str) -> nn.Module:
        network: nn.Module = family.load(part, "meta", None)
        return network

    @cache
    def refused(pp: int, tp: int, dp_shard: int, checkpointing: Kind) -> str | None:
        training = config.training.model_copy(update={"activation_checkpointing": as_configured(checkpointing)})
        wanted = _asked(config, pp=pp, tp=tp, dp_shard=dp_shard).model_copy(update={"training": training})
        sizes = Sizes(pp=pp, dp_shard=dp_shard, tp=tp)
        return _message(lambda: check_pipeline(wanted, family, sizes, empty))

    return refused


def _message(check: Callable[[], object]) -> str | None:
    """What a check has to say against it."""
    try:
        check()
    except UserError as error:
        return str(error)
    return None


def _asked(config: Config, **sizes: int) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=sizes)})


def _quantized(config: Config, family: Family) -> str | None:
    stored = {part: getattr(config.model, part).dtype for part in family.trained_parts()}
    part = next((part for part, dtype in stored.items() if dtype in QUANTIZED), None)
    if part is None:
        return None
    return f'model.{part}.dtype = "{stored[part]}": FSDP2 shards blocks whose weights have one type.'


def _besides(reason: str, plan: Candidate) -> str:
    """What of a pipeline's plan the reason speaks of, besides the stages."""
    if "activation_checkpointing" in reason and plan.checkpointing:
        return " with checkpointing"
    return " with dp_shard or tp" if "parallel.dp_shard or parallel.tp" in reason else ""
