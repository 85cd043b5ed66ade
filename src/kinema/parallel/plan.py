"""Plans: how a training may be laid over a cluster, what each would take, and which are the fastest that fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kinema.parallel.devices import Cluster
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan_memory import Memory, Model, Pass, forecast
from kinema.parallel.plan_time import MFU, StepTime, Traffic, step_time, traffic

LARGEST_TP = 8
LARGEST_SP = 16
LARGEST_PP = 16
"""Beyond these what is sent, or the bubble, outgrows what is gained."""
ALIKE = 0.03
"""Plans whose times differ by no more than about this share count as equally fast: the model is no better."""
MOST_TRIED = 200
"""Plans whose memory is forecast, the fastest first."""


@dataclass(frozen=True)
class Batch:
    """What one device does of a step."""

    total: int
    """Samples of the step, over all devices."""
    micro: int
    """Samples at once."""
    micro_batches: int


@dataclass(frozen=True)
class Candidate:
    """A plan."""

    sizes: Sizes
    checkpointing: bool


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
        return self.memory.total <= cluster.device.memory


@dataclass(frozen=True)
class Workload:
    """What is to be laid out: the model, its passes and its batch, for any plan."""

    model: Model
    passes: Callable[[bool, int], Pass]
    """(activation checkpointing, samples at once) -> a micro-batch on one device."""
    batch: Callable[[Sizes], Batch]
    splits: bool = False
    """Whether a search may take fewer samples at once than it says, and more micro-batches."""

    def forecast(self, plan: Candidate, cluster: Cluster, mfu: float = MFU, micro: int | None = None) -> Forecast:
        """What one plan takes, with ``micro`` samples at once if that is given."""
        batch = self.batch(plan.sizes)
        if micro is not None:
            batch = replace(batch, micro=micro, micro_batches=-(-batch.micro * batch.micro_batches // micro))
        one = self.passes(plan.checkpointing, batch.micro)
        memory = forecast(self.model, one, plan.sizes, batch.micro_batches)
        time = step_time(self.model, one, plan.sizes, batch.micro_batches, cluster, mfu)
        return Forecast(plan, batch, memory, time, traffic(self.model, one, plan.sizes, batch.micro_batches))


@dataclass
class Found:
    """What a search has found."""

    best: list[Forecast]
    refused: dict[str, str]
    """What was left out of the search: (such as "tp = 8", the reason)."""
    tried: int
    smallest: Forecast | None
    """The one that takes least memory, where none fits."""


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


def search(
    workload: Workload,
    cluster: Cluster,
    refusal: Callable[[Sizes], tuple[str, str] | None],
    mfu: float = MFU,
    count: int = 3,
) -> Found:
    """The fastest plans that fit, with and without activation checkpointing; of equally fast ones the plainest.

    ``refusal``: of a mesh that the model cannot be laid over, what of it and why.
    """
    refused: dict[str, str] = {}
    timed: list[tuple[float, int, Candidate]] = []
    for sizes in layouts(cluster):
        reason = refusal(sizes)
        if reason is not None:
            refused.setdefault(*reason)
            continue
        batch = workload.batch(sizes)
        for checkpointing in (False, True):
            one = workload.passes(checkpointing, batch.micro)
            time = step_time(workload.model, one, sizes, batch.micro_batches, cluster, mfu)
            ways = sum(n > 1 for n in (sizes.pp, sizes.dp_replicate, sizes.dp_shard, sizes.sp, sizes.tp))
            timed.append((time.total / batch.total, ways, Candidate(sizes, checkpointing)))
    fastest = min((time for time, _, _ in timed), default=1.0)
    timed.sort(key=lambda entry: (round(math.log(entry[0] / fastest) / math.log1p(ALIKE)), *entry[1::-1]))
    best: list[Forecast] = []
    smallest: Forecast | None = None
    for _, _, plan in timed[:MOST_TRIED]:
        one_forecast = workload.forecast(plan, cluster, mfu)
        while workload.splits and one_forecast.batch.micro > 1 and not one_forecast.fits(cluster):
            one_forecast = workload.forecast(plan, cluster, mfu, one_forecast.batch.micro // 2)
        if one_forecast.fits(cluster):
            best.append(one_forecast)
        if smallest is None or one_forecast.memory.total < smallest.memory.total:
            smallest = one_forecast
        if len(best) == count:
            break
    return Found(best, refused, len(timed), None if best else smallest)
