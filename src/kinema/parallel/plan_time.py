"""How long a step takes under a plan: computing, what devices send to each other, and how long they wait.

A model on paper. Its assumptions are constants here, and docs/scaling.md says what follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache

from kinema.parallel.devices import Cluster
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan_memory import local
from kinema.parallel.plan_model import DEFAULT, OUTSIDE, Model, Pass, Segment, Sharding
from kinema.parallel.plan_stages import Stage, in_short, passes_of, stages_of
from kinema.parallel.schedule import Schedule, orders

MFU = 0.4
"""Share of a device's rated speed that a transformer's step reaches where nothing is sent."""
OVERLAP = 0.8
"""Share of the sending of weights, of gradients and between stages that computing can hide. What sequence and tensor
parallel send is waited for."""
ALL_REDUCES = 2
"""Of tensor parallel, a block and pass, where no step has been run under it: after attention and after the feed-forward
network."""
HOST_BYTES = 25e9
"""Bytes a second that the processors of a machine read and write for each of its devices while they update weights."""


SUMMED = ("gradients", "exchanged", "reduced", "gathered")
"""Of a pass's segments, what its traffic follows from."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step by dimension of the mesh, for one device.

    What collectives are given: the whole tensors of all-reduces, the results of all-gathers, what goes into
    reduce-scatters and all-to-alls, and what is sent to the next stage.
    """

    replicate_reduce: float = 0.0
    shard_gather: float = 0.0
    shard_scatter: float = 0.0
    small_reduce: float = 0.0
    """Gradients of what stays whole where other weights are sharded."""
    sp_exchange: float = 0.0
    tp_reduce: float = 0.0
    tp_gather: float = 0.0
    pp_send: float = 0.0
    pp_reduce: float = 0.0
    """Gradients of what every stage of a pipeline has."""
    host: float = 0.0
    """Between the device and the machine's memory."""

    def wire(self, sizes: Sizes) -> dict[str, float]:
        """What leaves one device, by dimension, where collectives go around a ring."""
        shards, copies = sizes.weight_shards, replicas(sizes)
        every = sizes.dp_replicate * shards
        around = {
            "dp_shard": (shards - 1) / shards * (self.shard_gather + self.shard_scatter)
            + 2 * (every - 1) / every * self.small_reduce,
            "dp_replicate": 2 * (copies - 1) / copies * self.replicate_reduce,
            "sp": (sizes.sp - 1) / sizes.sp * self.sp_exchange,
            "tp": (sizes.tp - 1) / sizes.tp * (2 * self.tp_reduce + self.tp_gather),
            "pp": self.pp_send + 2 * (sizes.pp - 1) / sizes.pp * self.pp_reduce,
            "host": self.host,
        }
        return {name: sent for name, sent in around.items() if sent}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    compute: float
    exposed: float
    """Sending that computing does not hide, and updates in the machine's memory."""
    bubble: float
    """Share of the time that the pipeline's devices stand idle."""
    sending: dict[str, float]
    """Seconds of sending by dimension, hidden or not."""

    @property
    def total(self) -> float:
        return (self.compute + self.exposed) / (1 - self.bubble)


def replicas(sizes: Sizes) -> int:
    """Devices over which gradients are all-reduced: with FSDP2 the copies of the shards, else all that share samples or
    sequences."""
    return sizes.dp_replicate if sizes.weight_shards > 1 else sizes.dp_replicate * sizes.sp


@cache
def shared_out(one: Pass, sp: int, tp: int) -> Pass:
    """A pass as one of ``sp`` x ``tp`` devices would do it at best, of the pass of one alone: each holds its share of
    everything. `kinema.training.dry_step` runs it instead."""
    if sp * tp == 1:
        return one
    passes = 3 if one.reruns else 2

    def share(segment: Segment, forward: bool) -> Segment:
        in_block = forward and segment.block != OUTSIDE
        return replace(
            segment,
            kept=segment.kept / (sp * tp),
            peak=segment.peak / (sp * tp),
            own_peak=segment.peak / (sp * tp) + (segment.own_peak - segment.peak) / tp,
            flops=segment.flops / (sp * tp),
            gradients=segment.gradients / tp,
            made=segment.made / sp,
            exchanged=passes * segment.attention / (sp * tp) if sp > 1 else 0.0,
            reduced=passes * ALL_REDUCES * segment.made / sp if tp > 1 and in_block else 0.0,
        )

    return Pass(tuple(share(s, True) for s in one.forward), tuple(share(s, False) for s in one.backward))


def traffic(model: Model, one: Pass, sizes: Sizes, micro_batches: int, how: Sharding = DEFAULT) -> Traffic:
    """The most that a device sends in a step of ``micro_batches``; ``one`` is its own part of them, in all stages."""
    of_ranks = [_traffic_of(model, one, sizes, micro_batches, how, rank) for rank in range(sizes.pp)]
    if len(of_ranks) == 1:
        return of_ranks[0]
    return Traffic(**{name.name: max(getattr(each, name.name) for each in of_ranks) for name in fields(Traffic)})


def _traffic_of(model: Model, one: Pass, sizes: Sizes, micro_batches: int, how: Sharding, rank: int) -> Traffic:
    """Likewise of one process of a pipeline. What lies outside of blocks is counted on every one."""
    sharded = sizes.weight_shards > 1
    blocks = frozenset[int]().union(*stages_of(model, sizes.pp)[rank :: sizes.pp])
    passes = passes_of(model, one, sizes.pp, rank)
    sums = {name: sum(getattr(part.sums, name) for part in passes) for name in SUMMED}
    of = _totals(model, sizes, blocks)
    gathers = 2 * micro_batches if how.zero == 3 else 1
    backward = (segment.block for part in passes for segment in part.backward if segment.block != OUTSIDE)
    reached = min(backward, default=0)
    whole = micro_batches * (of.whole + _gathered_again(model, sizes, blocks, reached)) if how.zero == 3 else of.whole
    used = min(1.0, sums["gradients"] / of.made) if of.made else 0.0  # of some outputs nothing follows
    scatters = 1 if how.zero == 1 else micro_batches
    held = of.weights * gathers + of.gradients * scatters
    return Traffic(
        replicate_reduce=of.gradients + (0 if sharded else of.flags) if replicas(sizes) > 1 else 0.0,
        shard_gather=whole if sharded else 0.0,
        shard_scatter=scatters * used * of.whole_gradients if sharded else 0.0,
        small_reduce=of.small if sharded else 0.0,
        sp_exchange=micro_batches * sums["exchanged"] if sizes.sp > 1 else 0.0,
        tp_reduce=micro_batches * sums["reduced"] if sizes.tp > 1 else 0.0,
        tp_gather=micro_batches * sums["gathered"] if sizes.tp > 1 else 0.0,
        pp_send=_hand_overs(sizes.pp, model.stages_per_rank, rank) * micro_batches * one.handed_on,
        pp_reduce=of.outside if sizes.pp > 1 else 0.0,
        host=held if how.offload and sharded else 0.0,
    )


def _hand_overs(pp: int, per_rank: int, rank: int) -> int:
    """How often a process of a pipeline sends on a micro-batch: each stage forward and back, but for the ends."""
    if pp == 1:
        return 0
    return 2 * per_rank - (rank == 0) - (rank == pp - 1)


def step_time(
    model: Model,
    one: Pass,
    sizes: Sizes,
    micro_batches: int,
    cluster: Cluster,
    mfu: float = MFU,
    how: Sharding = DEFAULT,
    sent: Traffic | None = None,
    updated: float = 0.0,
) -> StepTime:
    """How long a step takes; ``one`` is a device's own part of a micro-batch. ``sent``: its traffic, if more than the
    plan's own; ``updated``: bytes that its machine reads and writes in an update besides."""
    compute = one.flops * micro_batches / sizes.pp / (cluster.device.flops * mfu)
    spans = {"tp": sizes.tp, "sp": sizes.tp * sizes.sp}
    spans["dp_shard"] = spans["sp"] * sizes.dp_shard
    spans["dp_replicate"] = spans["dp_shard"] * sizes.dp_replicate
    spans["pp"] = sizes.total
    wire = (sent or traffic(model, one, sizes, micro_batches, how)).wire(sizes)
    to_host = wire.pop("host", 0.0)
    sending = {name: sent / cluster.bandwidth(spans[name]) for name, sent in wire.items()}
    if to_host:
        sending["host"] = to_host / cluster.device.host
    waited = sum(sending.get(name, 0.0) for name in (("tp",) if model.ring else ("sp", "tp")))
    hidden = sum(sending.values()) - waited
    exposed = waited + max((1 - OVERLAP) * hidden, hidden - compute)
    if how.offload and sizes.weight_shards > 1:
        updated += _totals(model, sizes).updated / sizes.pp
    exposed += updated / HOST_BYTES
    if model.visiting_state is not None and cluster.on_gpu:  # it travels while weights are updated, not before
        exposed += 2 * _totals(model, sizes).state / sizes.pp / cluster.device.host
    bubble = bubble_of(model.schedule, sizes.pp, model.stages_per_rank, micro_batches)
    return StepTime(compute, exposed, bubble, sending)


def bubble_of(schedule: Schedule, pp: int, per_rank: int, micro_batches: int) -> float:
    """Share of the time that the devices of a pipeline stand idle."""
    in_rounds = per_rank == 1 or micro_batches % pp == 0
    if pp == 1 or (schedule != "zero_bubble" and in_rounds):
        return (pp - 1) / (per_rank * micro_batches + pp - 1)
    simulated = in_short(micro_batches, pp)  # what is idle stays as long, however many come in between
    idle = orders(schedule, pp, per_rank, simulated).bubble
    return idle * simulated / (idle * simulated + (1 - idle) * micro_batches)


@cache
def _gathered_again(model: Model, sizes: Sizes, blocks: Stage, first: int) -> float:
    """Bytes of the weights that FSDP2 gathers for a backward pass: of blocks from the ``first`` that it reaches, as
    nothing trains before, and of the one before it, which is fetched ahead; where a pipeline mixes passes, in most."""
    shards = sizes.weight_shards
    return sum(
        local(weight, sizes) * shards * weight.whole
        for weight in model.weights
        if not weight.stays and (weight.block == OUTSIDE or (weight.block in blocks and weight.block >= first - 1))
    )


@dataclass
class _Totals:
    """Bytes of weights of a network: on one device, and whole, as FSDP2 pads them."""

    weights: float = 0.0
    gradients: float = 0.0
    flags: float = 0.0
    """Sent with the gradients of replicas."""
    small: float = 0.0
    """Gradients, with their flags, of what stays whole where others are sharded."""
    whole: float = 0.0
    whole_gradients: float = 0.0
    outside: float = 0.0
    """Gradients, with their flags, of what lies outside of blocks."""
    made: float = 0.0
    """All gradients, as one of the devices that share matrices makes them."""
    state: float = 0.0
    """Of the optimiser."""
    updated: float = 0.0
    """Read and written in an update: weights, state and averages twice, gradients once."""


@cache
def _totals(model: Model, sizes: Sizes, blocks: Stage | None = None) -> _Totals:
    """``blocks``: with what lies outside of them; all."""
    found = _Totals()
    for weight in model.weights:
        if blocks is not None and weight.block != OUTSIDE and weight.block not in blocks:
            continue
        flags = weight.tensors * weight.gradient / weight.elements if weight.gradient else 0
        stays = weight.stays and sizes.weight_shards > 1
        share = local(weight if stays else replace(weight, stays=False), sizes)
        found.made += local(replace(weight, stays=True), sizes) * weight.gradient
        if weight.block == OUTSIDE:
            found.outside += share * weight.gradient + flags
        if stays:
            found.small += share * weight.gradient + flags
            continue
        shards = sizes.weight_shards
        found.weights += share * weight.bytes
        found.gradients += share * weight.gradient
        found.flags += flags
        found.whole += share * shards * weight.whole
        found.whole_gradients += share * shards * weight.gradient
        if weight.trains:
            found.state += share * weight.state
            found.updated += share * (2 * (weight.bytes + weight.state + weight.average) + weight.gradient)
    return found
