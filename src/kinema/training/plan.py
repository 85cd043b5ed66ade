"""``kinema plan``: what a configuration takes on a cluster, found on the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from kinema.config.model import PartConfig
from kinema.config.schema import Config
from kinema.config.section import QUANTIZED
from kinema.data.batch_sizes import batch_sizes, sizes_of_tables, tokens_of
from kinema.data.buckets import Bucket, bucket_groups
from kinema.data.encode import reads_files
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.families.base import Family
from kinema.families.registry import open_family
from kinema.memory.checkpointing import chosen_blocks
from kinema.parallel.devices import Cluster, memory_of
from kinema.parallel.mesh import Sizes, sizes_of
from kinema.parallel.plan import (
    KINDS,
    Batch,
    Candidate,
    Forecast,
    Found,
    Kind,
    Refusal,
    Workload,
    as_configured,
    candidates,
    kind_of,
    search,
)
from kinema.parallel.plan_model import Model, Offloading, Pass, Sharding, merged
from kinema.parallel.plan_time import MFU
from kinema.training.plan_refusals import refusals

if TYPE_CHECKING:
    from kinema.config.memory import OfBlock
    from kinema.memory.dry_arithmetic import Rules
    from kinema.training.dry_step import DryNetworks


@dataclass(frozen=True)
class Report:
    """What ``kinema plan`` says."""

    config: Config
    title: str
    cluster: Cluster
    mfu: float
    bucket: Bucket
    precision: str
    given: Forecast | None
    """The plan of the configuration; None where it cannot be."""
    problem: str
    """Why it cannot."""
    found: Found
    encoders: dict[str, float]
    """Bytes of the encoders that are loaded at once while the cache is filled, by encoding."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Prospect:
    """What is known of a configuration before it is laid out: what plans are made of."""

    networks: DryNetworks
    bucket: Bucket
    precision: str
    workload: Workload
    refusal: Refusal


def prospect(
    config: Config, family: Family, sizes: Sizes, text_tokens: int | None = None, rules: Rules = "cuda"
) -> Prospect:
    """Read a configuration for planning; ``sizes``: the mesh by which its heaviest bucket is chosen; ``rules``: the
    device by whose autocast it computes."""
    from kinema.training.dry_step import DryNetworks

    precision = "bf16" if config.training.precision == "auto" else config.training.precision
    networks = DryNetworks(config, family, precision, rules)
    parallel = config.parallel
    model = Model(
        merged(networks.weights), networks.buffers, networks.blocks, parallel.schedule, parallel.stages_per_rank,
        parallel.partition, tuple(parallel.split), networks.units, networks.unit_of,
        parallel.attention == "ring", *of_updates(config, networks),
    )  # fmt: skip
    bucket = heaviest(config, family, sizes)
    passes, batches = passes_of(networks, bucket, text_tokens), _batches(config, family, bucket)
    splits = config.training.micro_batch_size is None and not config.optimizer.gradient_release
    workload = Workload(
        model,
        passes,
        batches,
        splits=splits,
        encoders=online_bytes(config, family, precision),
        copies=config.checkpoint.asynchronous,
    )
    refusal = refusals(config, family, workload)
    return Prospect(networks, bucket, precision, workload, refusal)


def of_updates(config: Config, networks: DryNetworks) -> tuple[float | None, float | None]:
    """The largest gradient where they are let go one by one, and the state that a device has at once where the rest
    waits in the host's memory; None for what is not so."""
    from kinema.optim.host_state import at_once

    weights, optimizer = [weight for weight in networks.weights if weight.trains], config.optimizer
    largest = max((weight.gradient for weight in weights), default=0) if optimizer.gradient_release else None
    sizes = [(weight.bytes, weight.state) for weight in weights]
    visiting = at_once(sizes, optimizer.gradient_release) if optimizer.state_on_cpu else None
    return largest, visiting


def make_report(config: Config, cluster: Cluster, mfu: float = MFU, text_tokens: int | None = None) -> Report:
    """Forecast the plan of a configuration and search for better ones. Reads no weights and no data, fetches nothing.

    UserError where the model's configuration is nowhere at hand, and for what the meta device cannot run.
    """
    family = planning_family(config)
    if config.memory.budget is not None:
        budget = min(memory_of(config.memory.budget), cluster.device.memory)
        cluster = replace(cluster, device=replace(cluster.device, memory=budget))
    given, problem = None, ""
    sizes = Sizes(dp_replicate=cluster.count)
    try:
        sizes = sizes_of(config.parallel, cluster.count)
    except UserError as error:
        problem = str(error)
    known = prospect(config, family, sizes, text_tokens)
    sharding = Sharding(config.parallel.zero, config.parallel.cpu_offload)
    offloading = offloading_of(config)
    plan = Candidate(sizes, kind_of(config.training.activation_checkpointing), sharding, offloading)
    if not problem and (reason := known.refusal(plan)):
        problem = reason[1]
    if not problem:
        settled = with_fewest_blocks(known, cluster, plan) if config.memory.offload_blocks == "auto" else plan
        given = known.workload.forecast(settled, cluster, mfu)
    plans: Iterable[Candidate] = candidates(cluster, kinds(config), offloading)
    if searches_offloading(config):
        plans = with_offloading(config, known, cluster, plans)
    return Report(
        config=config,
        title=_title(config, family, known.networks),
        cluster=cluster,
        mfu=mfu,
        bucket=known.bucket,
        precision=known.precision,
        given=given,
        problem=problem,
        found=search(known.workload, cluster, known.refusal, mfu, among=plans),
        encoders=encoder_bytes(config, family, known.precision),
        notes=_notes(config),
    )


def kinds(config: Config) -> tuple[Kind, ...]:
    """The kinds of activation checkpointing that a search tries: also the one that is given."""
    return tuple(dict.fromkeys((*KINDS, kind_of(config.training.activation_checkpointing))))


def offloading_of(config: Config) -> Offloading:
    """What ``[memory]`` moves to the host; ``offload_blocks = "auto"`` counts as none until it is settled."""
    memory = config.memory
    return Offloading(memory.offload_activations, 0 if memory.offload_blocks == "auto" else memory.offload_blocks)


def searches_offloading(config: Config) -> bool:
    """Whether the configuration leaves open what waits in the host's memory."""
    return config.memory.budget is not None or config.memory.offload_blocks == "auto"


def with_offloading(
    config: Config, known: Prospect, cluster: Cluster, plans: Iterable[Candidate]
) -> Iterator[Candidate]:
    """Each plan with what the configuration lets wait in the host's memory, and with what it leaves open there: the
    activations too, if it has a budget and says nothing of them, and as few blocks as make it fit."""
    memory = config.memory
    any_activations = memory.budget is not None and "offload_activations" not in memory.model_fields_set
    any_blocks = memory.offload_blocks == "auto" or "offload_blocks" not in memory.model_fields_set
    for plan in plans:
        for activations in (False, True) if any_activations and cluster.on_gpu else (plan.offloading.activations,):
            one = replace(plan, offloading=Offloading(activations, plan.offloading.blocks))
            yield one
            if any_blocks and (fewest := with_fewest_blocks(known, cluster, one)) != one:
                yield fewest


def with_fewest_blocks(known: Prospect, cluster: Cluster, plan: Candidate) -> Candidate:
    """A plan with as few blocks in the host's memory as make it fit, with all of them if not even that does: it takes
    least. The plan itself where none can travel."""
    from kinema.memory.block_swap import SLOTS, blocks_to_offload

    def travelling(number: int) -> Candidate:
        return replace(plan, offloading=replace(plan.offloading, blocks=number))

    def fits(number: int) -> bool:
        return known.workload.fitting(travelling(number), cluster, at_best=True).fits(cluster)

    count = known.workload.model.blocks
    if not cluster.on_gpu or count <= SLOTS or known.refusal(travelling(SLOTS + 1)) is not None:
        return plan
    number = blocks_to_offload(fits, count)
    return travelling(count if number is None else number)


def planning_family(config: Config) -> Family:
    """The family of a configuration, with nothing that would be loaded or fetched: a published model, and a run that
    has yet to be made, are known by the configuration that ships with kinema."""
    from kinema.families.loading import is_hub_id

    model, absent = config.model, not_there(config)
    changes: dict[str, object] = {"random_weights": True}
    if model.variant is not None and (is_hub_id(model.path) or "path" in absent):
        changes["path"] = None
    changes |= {part: getattr(model, part).model_copy(update={"path": None}) for part in absent if part != "path"}
    return open_family(model.model_copy(update=changes), config.run.seed)


def not_there(config: Config) -> dict[str, str]:
    """Paths of a model whose variant is given that do not exist, such as runs whose turn is still to come: by the names
    of parts, and "path" for the whole model's."""
    from kinema.families.loading import is_hub_id

    if config.model.variant is None:
        return {}
    paths = {name: part.path for name, part in config.model if isinstance(part, PartConfig)}
    paths["path"] = config.model.path
    return {name: path for name, path in paths.items() if path and not is_hub_id(path) and not Path(path).exists()}


def heaviest(config: Config, family: Family, sizes: Sizes) -> Bucket:
    """The bucket of which one device gets the most tokens at once."""
    settings = [source.buckets for source in config.data.sources if source.buckets is not None]
    groups = [group for one in settings for group in bucket_groups(one, family.grid, family.lengths)]
    buckets = list(dict.fromkeys(bucket for group in groups for bucket in group.buckets))

    def load(bucket: Bucket) -> tuple[int, int]:
        tokens = tokens_of(bucket, family.grid, family.lengths)
        return tokens * _batch(config, family, bucket, sizes).micro, tokens

    return max(buckets, key=load)


def _batch(config: Config, family: Family, bucket: Bucket, sizes: Sizes) -> Batch:
    (size,) = batch_sizes(
        config.training, [bucket], grid=family.grid, lengths=family.lengths, ranks=sizes.dp,
        table=sizes_of_tables(config.data.sources, family.grid),
    )  # fmt: skip
    share = -(-size.total // sizes.dp)
    limits = [config.training.micro_batch_size, size.device, share]
    micro = min(limit for limit in limits if limit is not None)
    if sizes.pp > 1 and config.training.micro_batch_size is None:
        micro = max(1, min(micro, share // sizes.pp))  # a pipeline without micro-batches stands idle
    return Batch(size.total, micro, -(-share // micro))


def _batches(config: Config, family: Family, bucket: Bucket) -> Callable[[Sizes], Batch]:
    return lambda sizes: _batch(config, family, bucket, sizes)


def passes_of(
    networks: DryNetworks, bucket: Bucket, text_tokens: int | None = None
) -> Callable[[Kind, int, int, int], Pass]:
    """Passes of any number of samples: on the line through those of one and of two."""

    @cache
    def run(checkpointing: Kind, samples: int, sp: int, tp: int) -> Pass:
        if isinstance(checkpointing, bool | str):
            return networks.run(bucket, samples, cast("OfBlock", checkpointing), text_tokens, sp, tp)
        again = chosen_blocks(networks.lists, as_configured(checkpointing))
        return run(False, samples, sp, tp).mixed(run(True, samples, sp, tp), again)

    @cache
    def at(checkpointing: Kind, samples: int, sp: int, tp: int) -> Pass:
        one = run(checkpointing, 1, sp, tp)
        return one if samples == 1 else one.at(run(checkpointing, 2, sp, tp), samples)

    return at


def encoder_bytes(config: Config, family: Family, precision: str) -> dict[str, float]:
    """What the encoders weigh that are loaded at once, by encoding."""
    found = {one.name: _weigh(config, family, precision, one.parts) for one in family.encodings()}
    return {name: size for name, size in found.items() if size}


def online_bytes(config: Config, family: Family, precision: str) -> float:
    """What the encoders of `data.online` weigh: all of them stay on every device, each once."""
    kinds = config.data.online
    online = [one for one in family.encodings() if ("media" if reads_files(one) else "text") in kinds]
    return _weigh(config, family, precision, {part for one in online for part in one.parts})


def _weigh(config: Config, family: Family, precision: str, parts: Iterable[str]) -> float:
    """Bytes of the weights of these parts, as published."""
    from kinema.families.catalog import SIZES

    published = json.loads(SIZES.read_text(encoding="utf-8")).get(family.name, {}).get(family.variant.name, {})
    total = 0.0
    for part in parts:
        if part in published:
            size = family.part_dtype(part, torch_dtype(precision)).itemsize
            total += published[part] * QUANTIZED.get(getattr(config.model, part).dtype or "", size)
    return total


def _title(config: Config, family: Family, networks: DryNetworks) -> str:
    total = sum(w.elements for w in networks.weights if not w.adapts)
    trained = sum(w.elements for w in networks.weights if w.trains)
    what = "all of it" if config.adapter is None else f"{config.adapter.type} of {trained / 1e6:.0f}M parameters"
    return f"{family.name} {family.variant.name}, {total / 1e9:.2f}B parameters, trains {what}"


def _notes(config: Config) -> tuple[str, ...]:
    notes = []
    if config.training.batch_size == "auto" and config.training.token_budget is None:
        notes.append('batch_size = "auto" is found by trial when a run starts: planned with one sample on each device.')
    if config.training.compile is True:
        notes.append("training.compile: what a compiler fuses takes less memory and time than is forecast here.")
    if config.data.online:
        kinds = " and ".join(config.data.online)
        notes.append(
            f"data.online: the encoders of {kinds} lie on every device, and are counted; what they compute is not."
        )
    for name, path in not_there(config).items():
        key = "model.path" if name == "path" else f"model.{name}.path"
        notes.append(
            f"{key}: {path} is not there (yet): planned with the published {config.model.variant} in its place."
        )
    return tuple(notes)
