"""Plans: how a training may be laid over a cluster, what each would take, and which are the fastest that fit."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import cast

from kinema.config.memory import Checkpointing
from kinema.parallel.devices import Cluster
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan_memory import MARGIN, copied, forecast
from kinema.parallel.plan_model import DEFAULT, NOTHING, Memory, Model, Offloading, Pass, Sharding
from kinema.parallel.plan_offload import offloaded
from kinema.parallel.plan_time import MFU, StepTime, Traffic, shared_out, step_time, traffic

LARGEST_TP = 8
LARGEST_SP = 16
LARGEST_PP = 16
"""Beyond these what is sent, or the bubble, outgrows what is gained."""
ALIKE = 0.03
"""Plans whose times differ by no more than about this share count as equally fast: the model is no better."""


@dataclass(frozen=True)
class Batch:
    """What one device does of a step."""

    total: int
    """Samples of the step, over all devices."""
    micro: int
    """Samples at once."""
    micro_batches: int


Kind = bool | str | int | tuple[tuple[str, float], ...]
"""``training.activation_checkpointing``, a table as its items."""
KINDS: tuple[Kind, ...] = (False, True, "nested")
"""Those that a search tries."""


def kind_of(configured: Checkpointing) -> Kind:
    """``training.activation_checkpointing`` as plans have it."""
    return tuple(sorted(configured.items())) if isinstance(configured, Mapping) else configured


def as_configured(kind: Kind) -> Checkpointing:
    """The way back."""
    return dict(kind) if isinstance(kind, tuple) else cast("Checkpointing", kind)


@dataclass(frozen=True)
class Candidate:
    """A plan."""

    sizes: Sizes
    checkpointing: Kind
    sharding: Sharding = DEFAULT
    offloading: Offloading = NOTHING


@dataclass(frozen=True)
class Forecast:
    """What a plan takes."""

    plan: Candidate
    batch: Batch
    memory: Memory
    time: StepTime
    traffic: Traffic

    @property
    def samples_a_second(self) -> float:
        return self.batch.total / self.time.total

    def fits(self, cluster: Cluster) -> bool:
        """Whether devices have the memory, and their machines that which they lend."""
        return self.memory.total <= cluster.device.memory and self.memory.lent <= cluster.host_memory


@dataclass(frozen=True)
class Workload:
    """What is to be laid out: the model, its passes and its batch, for any plan."""

    model: Model
    passes: Callable[[Kind, int, int, int], Pass]
    """(activation checkpointing, samples at once, sp, tp) -> a micro-batch on one device."""
    batch: Callable[[Sizes], Batch]
    splits: bool = False
    """Whether a search may take fewer samples at once than it says, and more micro-batches."""
    encoders: float = 0.0
    """Bytes of the encoders that every device has beside what trains."""
    copies: bool = False
    """Whether checkpoints are written from copies in the machine's memory."""

    def forecast(
        self, plan: Candidate, cluster: Cluster, mfu: float = MFU, micro: int | None = None, at_best: bool = False
    ) -> Forecast:
        """What one plan takes, with ``micro`` samples at once if that is given. ``at_best``: from the pass of one
        device alone, as if those that share sequences and matrices had nothing twice, which is quicker to find."""
        batch, sizes = self.batch(plan.sizes), plan.sizes
        if micro is not None:
            batch = replace(batch, micro=micro, micro_batches=-(-batch.micro * batch.micro_batches // micro))
        if at_best:
            one = shared_out(self.passes(plan.checkpointing, batch.micro, 1, 1), sizes.sp, sizes.tp)
        else:
            one = self.passes(plan.checkpointing, batch.micro, sizes.sp, sizes.tp)
        count = batch.micro_batches
        hosted = offloaded(self.model, one, plan.offloading, count)
        model, one = hosted.model, hosted.one
        memory = forecast(model, one, sizes, count, plan.sharding, cluster.on_gpu)
        margin = memory.margin + (MARGIN * self.encoders if cluster.on_gpu else 0.0)
        memory = replace(memory, host=memory.host + hosted.bytes, encoders=self.encoders, margin=margin)
        if self.copies and cluster.on_gpu:
            memory = replace(memory, copies=copied(self.model, sizes, plan.sharding))
        sent = traffic(model, one, sizes, count, plan.sharding)
        sent = replace(sent, host=sent.host + hosted.sent * count)
        time = step_time(model, one, sizes, count, cluster, mfu, plan.sharding, sent, hosted.updated)
        return Forecast(plan, batch, memory, time, sent)

    def fitting(self, plan: Candidate, cluster: Cluster, mfu: float = MFU, at_best: bool = False) -> Forecast:
        """With as many samples at once as fit, where their number is free, and one where none do."""
        whole = self.forecast(plan, cluster, mfu, None, at_best)
        count = whole.batch.micro
        fewer = [count >> times for times in range(1, count.bit_length())]
        if not (self.splits and fewer) or whole.fits(cluster):
            return whole
        tried: dict[int, Forecast] = {}

        def fits(micro: int) -> bool:
            tried[micro] = self.forecast(plan, cluster, mfu, micro, at_best)
            return tried[micro].fits(cluster)

        place = bisect_left(fewer, True, key=fits)
        return tried[fewer[min(place, len(fewer) - 1)]]


@dataclass
class Found:
    """What a search has found."""

    best: list[Forecast]
    refused: dict[str, str]
    """What was left out of the search: (such as "tp = 8", the reason)."""
    tried: int
    smallest: Forecast | None
    """The one that takes least memory, where none fits."""
    plainer: list[Forecast] = field(default_factory=list)
    """What would be faster, or as fast and plainer, than the first that fits, and does not fit."""


def layouts(cluster: Cluster) -> Iterator[Sizes]:
    """All meshes over the devices of a cluster that are worth a look. Matrices are shared within a node."""
    count = cluster.count
    dividers = [n for n in range(1, count + 1) if count % n == 0]
    for pp, tp, sp in itertools.product(
        [n for n in dividers if n <= LARGEST_PP],
        [n for n in dividers if n <= min(LARGEST_TP, cluster.per_node)],
        [n for n in dividers if n <= LARGEST_SP],
    ):
        if count % (pp * tp * sp):
            continue
        dp = count // (pp * tp * sp)
        yield from (Sizes(pp, dp // shard, shard, sp, tp) for shard in dividers if dp % shard == 0)


def candidates(
    cluster: Cluster, kinds: Iterable[Kind] = KINDS, offloading: Offloading = NOTHING
) -> Iterator[Candidate]:
    """All plans that are worth a look, those with shards in the machines' own memory left out."""
    for sizes, kind in itertools.product(layouts(cluster), tuple(kinds)):
        for zero in (3, 2, 1) if sizes.dp_shard > 1 else (3,):
            yield Candidate(sizes, kind, Sharding(zero), offloading)


Order = tuple[int, int, float]
"""Of plans, the best first."""
Refusal = Callable[[Candidate], tuple[str, str] | None]
"""Of a plan that cannot be: what of it, and why."""


def search(
    workload: Workload,
    cluster: Cluster,
    refusal: Refusal,
    mfu: float = MFU,
    count: int = 3,
    among: Iterable[Candidate] | None = None,
) -> Found:
    """The fastest plans that fit, of equally fast ones the plainest; where none does, those that keep weights in the
    machines' own memory. ``among``: the plans that are looked at; all."""
    looked_at = list(candidates(cluster) if among is None else among)
    found = _search(workload, cluster, refusal, mfu, count, looked_at)
    if not found.best:
        offloaded = [
            replace(one, sharding=Sharding(offload=True))
            for one in looked_at
            if one.sizes.dp_shard > 1 and one.sharding == DEFAULT
        ]
        last = _search(workload, cluster, refusal, mfu, count, offloaded)
        if last.best:
            best = last.best
            return replace(found, best=best, smallest=None, refused=found.refused | last.refused)
    return found


def _search(
    workload: Workload, cluster: Cluster, refusal: Refusal, mfu: float, count: int, looked_at: Iterable[Candidate]
) -> Found:
    refused: dict[str, str] = {}
    at_best: list[Forecast] = []
    for plan in looked_at:
        reason = refusal(plan)
        if reason is not None:
            refused.setdefault(*reason)
            continue
        at_best.append(workload.fitting(plan, cluster, mfu, at_best=True))
    fastest = max((one.samples_a_second for one in at_best), default=1.0)
    ordered = sorted(((_order(one, fastest), one) for one in at_best), key=itemgetter(0))
    found: list[tuple[Order, Forecast]] = []
    others = [(order, one) for order, one in ordered if not one.fits(cluster)]
    for order, likely in ordered:
        if not likely.fits(cluster):
            continue
        # At best a plan is faster than it is: with what it really takes, one behind it may be better.
        if len(found) >= count and order > found[count - 1][0]:
            break
        one = workload.fitting(likely.plan, cluster, mfu)
        if one.fits(cluster):
            insort(found, (_order(one, fastest), one), key=itemgetter(0))
        else:
            others.append((order, one))
    best = [one for _, one in found[:count]]
    plainer = [one for order, one in sorted(others, key=itemgetter(0)) if best and order < found[0][0]]
    smallest = None
    if others and not best:
        least = min((one for _, one in others), key=lambda one: one.memory.total)
        smallest = workload.fitting(least.plan, cluster, mfu)
    return Found(best, refused, len(at_best), smallest, plainer)


def _order(one: Forecast, fastest: float) -> Order:
    """The faster plan first, of about equally fast ones the plainer; ``fastest``: samples a second."""
    sizes, slower = one.plan.sizes, fastest / one.samples_a_second
    ways = sum(n > 1 for n in (sizes.pp, sizes.dp_replicate, sizes.dp_shard, sizes.sp, sizes.tp))
    ways += sum(n > 1 for n in (sizes.pp, sizes.sp, sizes.tp))  # replicas and shards are plainer than these
    ways += one.plan.sharding.zero != DEFAULT.zero
    return round(math.log(slower) / math.log1p(ALIKE)), ways, slower
