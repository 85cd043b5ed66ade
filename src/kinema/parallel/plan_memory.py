"""How much memory of one device a plan takes, from what a step without values has shown.

A step is a walk through segments: each block, and what lies between blocks, forward and then backward. At every moment
there are the weights with what belongs to them, what the backward pass still needs, what the segment itself takes, and
the gradients so far. The largest sum counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from kinema.parallel.data import BUCKET_BYTES
from kinema.parallel.mesh import Sizes
from kinema.parallel.plan_model import DEFAULT, OUTSIDE, Memory, Model, Pass, Sharding, Weight
from kinema.parallel.plan_stages import Stage, moments_of, passes_of, stages_of

MARGIN = 0.06
"""Share of the whole that an allocator loses to fragments and libraries take as workspace."""
CONTEXT = 0.7e9
"""Bytes that CUDA and NCCL take for themselves."""
PINNED = 1.44
"""torch rounds pieces of pinned memory up to powers of two: 1 / ln 2 times as much, if all sizes are as likely."""


@dataclass(frozen=True)
class Laid:
    """How weights are laid out, and how many micro-batches go through them in a step."""

    sizes: Sizes
    how: Sharding
    micro_batches: int

    @property
    def sharded(self) -> bool:
        return self.sizes.weight_shards > 1

    @property
    def accumulates(self) -> bool:
        """Whether a step has several backward passes."""
        return self.micro_batches > 1


def local(weight: Weight, sizes: Sizes) -> float:
    """The share of a weight that one device has. FSDP2 pads the first dimension."""
    share = 1 / (sizes.tp if weight.splits else 1)
    if weight.stays:
        return share
    shards, rows = sizes.weight_shards, weight.rows / (sizes.tp if weight.splits == "rows" else 1)
    return share * -(-rows // shards) / rows if rows else share / shards


def forecast(
    model: Model, one: Pass, sizes: Sizes, micro_batches: int, how: Sharding = DEFAULT, on_gpu: bool = True
) -> Memory:
    """The memory that a plan takes on its fullest device.

    ``one``: a micro-batch of the size that one device takes, as one of those does it that share its sequences and
    matrices. With ``on_gpu``, the margins of an allocator and of the libraries count too.
    """
    laid = Laid(sizes, how, micro_batches)
    ranks = range(sizes.pp)
    fullest = max((_of_rank(model, one, laid, rank, on_gpu) for rank in ranks), key=lambda memory: memory.total)
    if not on_gpu:
        return fullest
    return replace(fullest, margin=CONTEXT + MARGIN * fullest.total)


def _of_rank(model: Model, one: Pass, laid: Laid, rank: int, on_gpu: bool) -> Memory:
    sizes = laid.sizes
    blocks = _blocks_of_rank(model, sizes, rank)
    sums = _standing(model, laid, blocks)
    stages = stages_of(model, sizes.pp)[rank :: sizes.pp]
    last = len(stages) * sizes.pp - 1
    ends = [rank + turn * sizes.pp == last for turn in range(len(stages))]
    passes = list(passes_of(model, one, sizes.pp, rank))
    if laid.sharded:
        passes = [_with_short_weights(model, part) for part in passes]
    arrives = [one.handed_on if rank + turn else 0.0 for turn in range(len(stages))]
    # What is there when a pass is over, such as tables of positions, is there once.
    lasting = max(0.0, one.sums.kept)
    let_go = min(0.0, one.forward[-1].kept)  # the objective's own, when a forward pass ends
    kept = [
        sum(s.kept for s in part.forward) - lasting + more + (0.0 if end else let_go)
        for part, more, end in zip(passes, arrives, ends, strict=True)
    ]
    total = _gradients_at_once(model, sums["gradient"], laid)
    rows: list[tuple[float, float, float]] = [(0.0, total, _being_reduced(total, laid)[1])]
    schedule = moments_of(model.schedule, sizes.pp, model.stages_per_rank, laid.micro_batches)
    for turn, part in enumerate(passes):
        walks = {
            False: _forward(model, part, laid, blocks, total),
            True: _backward(model, part, laid, blocks, total, 0.0 if ends[turn] else one.handed_on),
        }
        waits: dict[bool, float] = {}
        for moment in schedule[rank]:
            if moment.stage == turn:
                waiting = sum(count * size for count, size in zip(moment.waiting, kept, strict=True))
                waits[moment.backward] = max(waits.get(moment.backward, 0.0), waiting)
        for backward, waiting in waits.items():
            more = waiting + arrives[turn]
            rows += [(level + more, gradients, gathered) for level, gradients, gathered in walks[backward]]
    # The first row is the update. State that waits on the host is on the device then, and in passes that update.
    hosted, updating = model.visiting_state is not None and on_gpu, sums["state"]
    if hosted:
        updating = min(updating, model.visiting_state or 0.0)
    passing = 0.0 if hosted and model.largest_gradient is None else updating
    states = [updating] + [passing] * (len(rows) - 1)

    def there(place: int) -> float:
        activations, gradients, gathered = rows[place]
        return activations + gathered + states[place] + (0.0 if laid.how.offload else gradients)

    fullest = max(range(len(rows)), key=there)
    activations, gradients, gathered = rows[fullest]
    memory = Memory(sums["bytes"], gradients, states[fullest], sums["average"], activations, gathered)
    if laid.how.offload:
        pinned = PINNED if on_gpu else 1.0
        host = pinned * (sums["bytes"] + sums["gradient"]) + sums["state"] + sums["average"]
        memory = replace(memory, weights=0.0, gradients=0.0, optimizer=0.0, average=0.0, host=host)
    elif hosted:
        memory = replace(memory, host=sums["state"])
    return replace(memory, weights=memory.weights + model.buffers)


def copied(model: Model, sizes: Sizes, how: Sharding) -> float:
    """Bytes of what a device with the most of it has in a checkpoint: weights that train, state and averages."""
    laid = Laid(sizes, how, 1)
    return max(_standing(model, laid, _blocks_of_rank(model, sizes, rank))["copied"] for rank in range(sizes.pp))


def _blocks_of_rank(model: Model, sizes: Sizes, rank: int) -> Stage:
    return frozenset().union(*stages_of(model, sizes.pp)[rank :: sizes.pp])


@cache
def _standing(model: Model, laid: Laid, blocks: Stage) -> dict[str, float]:
    """Bytes on one device of all weights of some blocks and of those outside, and of what belongs to them."""
    names = ("bytes", "gradient", "state", "average")
    found = dict.fromkeys((*names, "copied"), 0.0)
    for weight in model.weights:
        if weight.block == OUTSIDE or weight.block in blocks:
            share = local(weight, laid.sizes) if laid.sharded else local(replace(weight, stays=True), laid.sizes)
            for name in names:
                found[name] += share * getattr(weight, name)
            found["copied"] += share * (weight.trains * weight.bytes + weight.state + weight.average)
    return found


@cache
def _whole(model: Model, tp: int) -> tuple[list[float], list[float]]:
    """Bytes of each block's sharded weights once they are gathered, and the share of their gradients' bytes that these
    have before they are summed; the last is OUTSIDE."""
    found, gradients, raw = ([0.0] * (model.blocks + 1) for _ in range(3))
    for weight in model.weights:
        if not weight.stays:
            share = 1 / (tp if weight.splits else 1)
            found[weight.block] += share * weight.whole
            gradients[weight.block] += share * weight.gradient
            raw[weight.block] += share * weight.gradient * weight.whole / weight.bytes
    return found, [r / g if g else 1.0 for r, g in zip(raw, gradients, strict=True)]


def _being_reduced(total: float, laid: Laid) -> tuple[float, float]:
    """What gradients of replicas take besides while they are put together in buckets and sent: during a backward pass,
    and when all are there."""
    if laid.sharded or laid.sizes.dp_replicate * laid.sizes.sp == 1:
        return 0.0, 0.0
    bucket = min(BUCKET_BYTES, total)
    return (bucket if total > BUCKET_BYTES and laid.sizes.pp == 1 else 0.0), bucket


def _gradients_at_once(model: Model, total: float, laid: Laid) -> float:
    """Bytes of the gradients that are there when most are: all of them, or where each is let go when its weight is
    updated, the largest. Replicas have a bucket that fills, one that is sent and one that is used."""
    if model.largest_gradient is None:
        return total
    buckets = 2 * BUCKET_BYTES if laid.sizes.dp_replicate * laid.sizes.sp > 1 else 0
    return min(total, model.largest_gradient + buckets)


def _forward(model: Model, part: Pass, laid: Laid, blocks: Stage, total: float) -> list[tuple[float, float, float]]:
    """(activations, gradients, gathered) in every segment of a forward pass."""
    whole = _whole(model, laid.sizes.tp)[0]
    everything = whole[OUTSIDE] + sum(whole[block] for block in blocks)
    whole_until_the_end = laid.accumulates and laid.how.zero == 1
    before = total if laid.accumulates and not whole_until_the_end else 0.0
    frees = _frees_casts(part)
    found = []
    level = casts = so_far = 0.0
    buffer = whole[OUTSIDE]
    for segment in part.forward:
        casts += segment.casts if segment.block in frees and not laid.sharded else 0.0
        activations = level + segment.peak + casts
        if laid.sharded:
            # FSDP2 holds the buffer that a group came in until the next group has been copied from its own.
            own = whole[segment.block] if segment.block != OUTSIDE else 0.0
            so_far = own if laid.how.zero == 3 else so_far + own
            earlier = before if laid.how.zero == 3 else 0.0  # below, a step's first micro-batch gathers for all
            if own:
                found.append((level, earlier, whole[OUTSIDE] + so_far + buffer + own))
                buffer = own
            found.append((activations, earlier, whole[OUTSIDE] + so_far + buffer))
        if not laid.sharded:
            found.append((activations, before, 0.0))
        elif laid.how.zero < 3 and laid.accumulates:
            waiting = _whole_gradients(model, laid, blocks) if whole_until_the_end else 0.0
            found.append((activations, before, everything + waiting))
        level += segment.kept
    return found


def _backward(
    model: Model, part: Pass, laid: Laid, blocks: Stage, total: float, arrives: float
) -> list[tuple[float, float, float]]:
    """Likewise of a backward pass, which begins with what the forward pass has left, and gradients that arrive."""
    whole, raw = _whole(model, laid.sizes.tp)
    everything = whole[OUTSIDE] + sum(whole[block] for block in blocks)
    shards, along = laid.sizes.weight_shards, _being_reduced(total, laid)[0]
    level = sum(segment.kept for segment in part.forward) + arrives
    done, freed, found = 0.0, 0.0, []
    for segment in part.backward:
        own = segment.gradients
        made = own * raw[segment.block]  # before they are cast to be summed
        if laid.sharded and laid.how.zero == 3:
            # The weights before it are fetched ahead; then whole gradients, and once more in the order of sending.
            here, before = _gathered(whole, segment.block, ahead=True), _gathered(whole, segment.block, ahead=False)
            found.append((level, total if laid.accumulates else done, _arriving(whole, segment.block)))
            found.append(
                (level + segment.peak, total if laid.accumulates else done, max(here + made, before + made + own))
            )
        elif laid.sharded and laid.how.zero == 1 and laid.accumulates:
            # Before the last micro-batch, and in it: what is summed over devices is whole no more.
            waiting = _whole_gradients(model, laid, blocks)
            found.append((level + segment.peak, 0.0, everything + waiting + made))
            found.append((level + segment.peak, done, everything - freed + waiting - done * shards + max(made, own)))
        elif laid.sharded:
            # Gradients as they come, then once more in the order of sending, when what the block kept is gone. The last
            # micro-batch's pass leaves a block's shards alone behind it, before it sends.
            while_made = level + segment.peak + (segment.own_peak - segment.peak) * raw[segment.block]
            when_sent = level + segment.kept + made + own
            summed = total if laid.accumulates else done
            block = whole[segment.block] if segment.block != OUTSIDE else 0.0
            found.append((while_made, summed, everything - freed))
            found.append((when_sent, summed, everything - freed - block))
            if laid.accumulates:
                summed = total if laid.micro_batches > 2 else done
                found += [(while_made, summed, everything), (when_sent, summed, everything)]
        elif laid.accumulates:
            found.append((level + segment.peak, total, along))
        else:
            own_too = done + segment.own_peak - segment.peak
            found.append((level + segment.peak, own_too if model.largest_gradient is None else total, along))
        done = min(total, done + own / shards)
        freed += whole[segment.block] if segment.block != OUTSIDE else 0.0
        level += segment.kept
    return found


@cache
def _with_short_weights(model: Model, part: Pass) -> Pass:
    """A pass over weights that come in the type of computing, of one that casts them: casts are not there."""
    short = {weight.block for weight in model.weights if weight.cast is not None}
    if not short or not any(segment.casts for segment in part.forward):
        return part
    frees, casts = _frees_casts(part), dict.fromkeys(short, 0.0)
    forward, backward = [], []
    for segment in part.forward:
        less = segment.casts if segment.block in short else 0.0
        if less:
            casts[segment.block] += less
        kept = segment.kept - (0.0 if segment.block in frees else less)
        forward.append(replace(segment, casts=segment.casts - less, kept=kept, peak=segment.peak - less))
    for segment in part.backward:
        less = segment.casts if segment.block in short else 0.0  # where blocks run again
        kept = segment.kept + (0.0 if segment.block in frees else casts.pop(segment.block, 0.0))
        peak, own_peak = segment.peak - less, segment.own_peak - less
        backward.append(replace(segment, casts=segment.casts - less, kept=kept, peak=peak, own_peak=own_peak))
    return Pass(tuple(forward), tuple(backward))


def _whole_gradients(model: Model, laid: Laid, blocks: Stage) -> float:
    """Bytes of the gradients of sharded weights, whole."""
    return sum(
        weight.gradient / (laid.sizes.tp if weight.splits else 1)
        for weight in model.weights
        if not weight.stays and (weight.block == OUTSIDE or weight.block in blocks)
    )


def _frees_casts(one: Pass) -> set[int]:
    """The blocks whose cast weights are freed before the backward pass: where they run again, autocast alone holds
    them."""
    casts = {segment.block: segment.casts for segment in one.forward}
    again = {segment.block: segment.casts for segment in one.backward}
    return {block for block, size in casts.items() if again.get(block, 0.0) > 0.5 * size > 0}


def _arriving(whole: Sequence[float], block: int) -> float:
    """Whole weights while those of a block are copied to their places from the buffer in which they came."""
    return whole[OUTSIDE] + (2 if block != OUTSIDE else 1) * whole[block]


def _gathered(whole: Sequence[float], block: int, ahead: bool) -> float:
    """Whole weights on the device while a block computes backward: those outside of blocks stay for the whole pass;
    ``ahead``: those of the block that comes next too."""
    blocks = [number for number in (block, block - ahead) if number >= 0] if block != OUTSIDE else []
    return whole[OUTSIDE] + sum(whole[number] for number in dict.fromkeys(blocks))
