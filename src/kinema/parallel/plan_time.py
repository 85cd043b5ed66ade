"""How long a step takes under a plan: computing, what devices send to each other, and how long they wait.

A model on paper. Its assumptions are constants here, and docs/scaling.md says what follows from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kinema.parallel.devices import Cluster
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan_memory import LONG, OUTSIDE, Model, Pass, local
from kinema.parallel.schedule import Schedule, orders

MFU = 0.4
"""Share of a device's rated speed that a transformer's step reaches where nothing is sent."""
OVERLAP = 0.8
"""Share of the sending of weights, of gradients and between stages that computing can hide. What sequence and tensor
parallel send is waited for."""
ALL_REDUCES = 2
"""Of tensor parallel, a block and pass: after attention and after the feed-forward network."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step by dimension of the mesh, for one device.

    What collectives are given: the whole tensors of all-reduces, the results of all-gathers, what goes into
    reduce-scatters and all-to-alls, and what is sent to the next stage.
    """

    replicate_reduce: float = 0.0
    shard_gather: float = 0.0
    shard_scatter: float = 0.0
    sp_exchange: float = 0.0
    tp_reduce: float = 0.0
    pp_send: float = 0.0

    def wire(self, sizes: Sizes) -> dict[str, float]:
        """What leaves one device, by dimension, where collectives go around a ring."""
        shards, copies = sizes.weight_shards, replicas(sizes)
        around = {
            "dp_shard": (shards - 1) / shards * (self.shard_gather + self.shard_scatter),
            "dp_replicate": 2 * (copies - 1) / copies * self.replicate_reduce,
            "sp": (sizes.sp - 1) / sizes.sp * self.sp_exchange,
            "tp": 2 * (sizes.tp - 1) / sizes.tp * self.tp_reduce,
            "pp": self.pp_send,
        }
        return {name: sent for name, sent in around.items() if sent}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    compute: float
    exposed: float
    """Sending that computing does not hide."""
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


def traffic(model: Model, one: Pass, sizes: Sizes, micro_batches: int) -> Traffic:
    """What one device sends in a step of ``micro_batches``."""
    share = 1 / sizes.pp  # weights outside of the blocks are few
    passes = 3 if reruns(one) else 2
    sharded = sizes.weight_shards > 1
    gradients, flags, whole, whole_gradients = _totals(model, sizes)
    blocks = sum(segment.block != OUTSIDE for segment in one.forward)
    attention, carried = one.sum("attention"), max(segment.carried for segment in one.forward)
    return Traffic(
        replicate_reduce=share * (gradients + (0 if sharded else flags)) if replicas(sizes) > 1 else 0.0,
        shard_gather=share * 2 * micro_batches * whole if sharded else 0.0,
        shard_scatter=share * micro_batches * whole_gradients if sharded else 0.0,
        sp_exchange=share * passes * micro_batches * attention / sizes.sp / sizes.tp if sizes.sp > 1 else 0.0,
        tp_reduce=share * passes * micro_batches * ALL_REDUCES * blocks * carried / sizes.sp if sizes.tp > 1 else 0.0,
        pp_send=2 * micro_batches * carried / sizes.sp if sizes.pp > 1 else 0.0,
    )


def step_time(
    model: Model, one: Pass, sizes: Sizes, micro_batches: int, cluster: Cluster, mfu: float = MFU
) -> StepTime:
    """How long a step takes."""
    compute = one.flops * micro_batches / (sizes.sp * sizes.tp * sizes.pp) / (cluster.device.flops * mfu)
    spans = {"tp": sizes.tp, "sp": sizes.tp * sizes.sp}
    spans["dp_shard"] = spans["sp"] * sizes.dp_shard
    spans["dp_replicate"] = spans["dp_shard"] * sizes.dp_replicate
    spans["pp"] = sizes.total
    wire = traffic(model, one, sizes, micro_batches).wire(sizes)
    sending = {name: sent / cluster.bandwidth(spans[name]) for name, sent in wire.items()}
    waited = sum(sending.get(name, 0.0) for name in ("sp", "tp"))
    hidden = sum(sending.values()) - waited
    exposed = waited + max((1 - OVERLAP) * hidden, hidden - compute)
    bubble = bubble_of(model.schedule, sizes.pp, model.stages_per_rank, micro_batches)
    return StepTime(compute, exposed, bubble, sending)


def bubble_of(schedule: Schedule, pp: int, per_rank: int, micro_batches: int) -> float:
    """Share of the time that the devices of a pipeline stand idle."""
    if schedule != "zero_bubble" or pp == 1:
        return (pp - 1) / (per_rank * micro_batches + pp - 1)
    simulated = min(micro_batches, LONG * pp)  # what is idle stays as long, however many come in between
    idle = orders(schedule, pp, per_rank, simulated).bubble
    return idle * simulated / (idle * simulated + (1 - idle) * micro_batches)


def reruns(one: Pass) -> bool:
    """Whether blocks run again in the backward pass, which then computes three times what the forward pass does."""
    forward, backward = (sum(segment.flops for segment in part) for part in (one.forward, one.backward))
    return backward > 2.6 * forward


@cache
def _totals(model: Model, sizes: Sizes) -> tuple[float, float, float, float]:
    """Of all weights: a device's gradients, the flags sent with them; and whole, as FSDP2 pads them, weights and
    gradients."""
    gradients = flags = whole = whole_gradients = 0.0
    for weight in model.weights:
        share = local(weight, sizes)
        gradients += share * weight.gradient
        flags += weight.tensors * weight.gradient / weight.elements if weight.gradient else 0
        whole += share * sizes.weight_shards * weight.bytes
        whole_gradients += share * sizes.weight_shards * weight.gradient
    return gradients, flags, whole, whole_gradients
