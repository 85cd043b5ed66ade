"""``training.batch_size = "auto"``: for each bucket the most samples with which a whole step fits the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kinema.data.batch import Batch
from kinema.data.buckets import Bucket
from kinema.errors import UserError
from kinema.objectives.base import Draws
from kinema.sizes import readable_bytes
from kinema.training.clipping import clip_gradients
from kinema.training.loop import Trainer, accumulate_gradients
from kinema.training.state import make_optimizer_state
from kinema.training.trial_memory import TrialMemory, allocates, processes_here

if TYPE_CHECKING:
    import torch
    from torch import nn

    from kinema.parallel.mesh import World

FIRST_GUESS = 8
"""Where the search begins for a bucket of which nothing is known, and as far as a careful one goes on the word of two
trials."""
RECKLESS = 1.25
"""Share of the memory up to which a trial is made that may fail without harm: forecasts are not exact."""


def largest(fits: Callable[[int], bool], guess: int, limit: int) -> int:
    """The largest n from 1 to ``limit`` with ``fits(n)``, or 0. ``fits`` holds up to some n and for none above.

    From ``guess``, doubling or halving until an end is found, then bisection.
    """
    low, high = 0, limit + 1  # fits(low), and not fits(high)
    probe = min(max(guess, 1), limit)
    while low + 1 < high:
        if fits(probe):
            low = probe
        else:
            high = probe
        probe = min(2 * low, limit) if high > limit else (low + high) // 2
    return low


@dataclass
class Trials:
    """What batches of one bucket take, tried at most once each.

    ``run(n)`` gives the share of the memory that n samples take, above 1 where they do not fit. With ``fixed``, the
    share that is taken whatever the number, it is careful: nothing is tried that is expected not to fit.
    """

    run: Callable[[int], float]
    fixed: float | None = None
    shares: dict[int, float] = field(init=False)

    def __post_init__(self) -> None:
        self.shares = {} if self.fixed is None else {0: self.fixed}

    @property
    def reach(self) -> float:
        """Numbers that are expected to take more are not tried."""
        return RECKLESS if self.fixed is None else 1.0

    def fits(self, count: int) -> bool:
        if count not in self.shares:
            if self.forecast(count) > self.reach:
                return False
            self.shares[count] = self.run(count)
        return self.shares[count] <= 1

    def forecast(self, count: int) -> float:
        """The share of ``count`` samples, along the line through the largest number that was measured and one of at
        most half of it: between neighbours the slope would be what allocators round."""
        known = sorted(n for n, share in self.shares.items() if math.isfinite(share))
        if len(known) < 2:
            return self.fixed or 0.0
        high = known[-1]
        low = max((n for n in known if 2 * n <= high), default=known[0])
        slope = max(0.0, (self.shares[high] - self.shares[low]) / (high - low))
        return self.shares[high] + slope * (count - high)


def find_batch_sizes(
    trainer: Trainer,
    networks: Mapping[str, nn.Module],
    buckets: Sequence[Bucket],
    sample_of: Callable[[Bucket], Batch],
    *,
    tokens: Callable[[Bucket], int],
    most: Callable[[Bucket], int],
    say: Callable[[str], None],
    memory: int | None = None,
) -> dict[str, int]:
    """How many samples of each bucket fit one device, by the name of the bucket; the same on all ranks.

    A trial is a whole step, forward and backward, with the optimiser's state in place; nothing of the run is changed by
    it: weights, optimiser, gradients, random generators and the loss scale are what they were. ``sample_of`` gives a
    batch of one real sample, ``tokens`` the length of one, ``most`` the number above which a larger batch is of no use.
    Buckets of one length in frames and in tokens, such as a size and the same turned on its side, are tried as one.
    ``memory``: bytes to stay within, default what is left on the device. UserError where not even one sample fits.
    """
    alike: dict[tuple[int, int], list[Bucket]] = {}
    for bucket in buckets:
        alike.setdefault((tokens(bucket), bucket.frames), []).append(bucket)
    samples = {key: sample_of(group[0]) for key, group in alike.items()}  # loads encoders that work on line
    found: dict[str, int] = {}
    room: int | None = None  # tokens of the batch that fitted in the bucket before
    with _untouched(trainer, networks):
        device = TrialMemory(trainer.world.device, memory, processes_here())
        fixed = _fixed_share(trainer, device) if _careful(trainer) else None
        for key, group in sorted(alike.items(), reverse=True):
            length, run = key[0], _runner(trainer, samples[key], device, group[0])
            if not found:
                run(1)  # libraries take memory of their own once
            trials = Trials(run, fixed)
            guess, limit = FIRST_GUESS if room is None else room // length, max(map(most, group))
            size = search(trials, guess, limit)
            if size == 0:
                raise _nothing_fits(group[0], trials.shares.get(1, trials.forecast(1)), device.budget)
            found |= {str(bucket): min(size, most(bucket)) for bucket in group}
            room = size * length
            taken, whole = trials.shares[size] * device.budget, readable_bytes(device.budget)
            enough = ", all that an epoch has" if size == limit else ""
            names = ", ".join(map(str, group))
            say(f"Batch size of {names}: {size} on each device ({readable_bytes(taken)} of {whole}{enough})")
        device.release()
        device.forget_peak()
    return found


def search(trials: Trials, guess: int, limit: int) -> int:
    """The largest number up to ``limit`` that fits, tried itself; 0 where one sample does not."""
    if trials.fixed is not None:
        guess = min(guess, FIRST_GUESS)
    if not trials.fits(1):
        return 0
    trials.fits(min(2, limit))
    while True:
        size = largest(trials.fits, guess, limit)
        # What was passed over on the word of small batches may look better now.
        if size == limit or size + 1 in trials.shares or trials.forecast(size + 1) > trials.reach:
            return size
        guess = size


def _careful(trainer: Trainer) -> bool:
    """Whether a trial that takes too much is to be avoided: the system kills a process that takes all of a CPU's
    memory, and a rank that fails between two collectives leaves the others waiting."""
    return trainer.world.device.type == "cpu" or _in_step(trainer.world)


def _in_step(world: World) -> bool:
    """Whether processes talk to each other within a forward pass."""
    return world.is_sharded or world.sizes.sp * world.sizes.tp > 1


def _runner(trainer: Trainer, sample: Batch, memory: TrialMemory, bucket: Bucket) -> Callable[[int], float]:
    """``run`` of `Trials`: the largest share of any rank."""
    world = trainer.world
    compiled = trainer.config.training.compile is True

    def run(count: int) -> float:
        for _ in range(1 + compiled):  # a compiler needs memory too, the first time
            share = memory.share_of(lambda: _whole_step(trainer, sample, count))
        if _in_step(world) and not math.isfinite(share):
            raise UserError(
                f'training.batch_size = "auto": process {world.rank} ran out of memory at {count} samples of {bucket}, '
                "where less was expected; the others, which share its work, cannot go on without it. Give a number "
                f"below {count * world.dp_size} instead, or training.token_budget."
            )
        return max(world.gather_objects(share))

    return run


def _whole_step(trainer: Trainer, sample: Batch, count: int) -> None:
    """Forward and backward over ``count`` copies of a sample, and what clipping takes. No update."""
    batch = sample.select([0] * count)
    batch.indices, batch.weights = list(range(count)), [1 / count] * count
    draws = Draws(trainer.config.run.seed, "batch size")
    try:
        # Only sharded networks have to talk to each other; a rank alone may fail without the others noticing.
        accumulate_gradients(trainer, [batch], draws, exchange=trainer.world.is_sharded)
        clip_gradients(
            [p for p in trainer.parameters.values() if p.grad is not None], trainer.config.training.clip_norm
        )
    finally:
        for parameter in trainer.parameters.values():
            parameter.grad = None


@contextmanager
def _untouched(trainer: Trainer, networks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the optimisers hold the state that their first step makes; afterwards all is as it was before."""
    import torch

    assert all(parameter.grad is None for parameter in trainer.parameters.values())
    device = trainer.world.device
    had = [set(optimizer.state) for optimizer in trainer.optimizers]
    groups = [_settings(optimizer) for optimizer in trainer.optimizers]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            names = {f"optimizer.{name}.state" for name in trainer.parameters}
            if not allocates(lambda: make_optimizer_state(networks, trainer.optimizers, names)):
                raise UserError(
                    "The optimiser's state does not fit the device beside the network. Train an [adapter], shard over "
                    "more devices with parallel.dp_shard, or choose an optimizer.type that keeps less."
                )
            yield
        finally:
            for optimizer, before, settings in zip(trainer.optimizers, had, groups, strict=True):
                for parameter in set(optimizer.state) - before:
                    del optimizer.state[parameter]
                for group, values in zip(optimizer.param_groups, settings, strict=True):
                    for key in set(group) - set(values) - {"params"}:
                        del group[key]
                    group.update(values)
            if trainer.config.training.compile is True:
                torch._dynamo.reset()  # sizes met in trials would make every later compilation a dynamic one


def _fixed_share(trainer: Trainer, device: TrialMemory) -> float:
    """What every step takes, whatever its batch: what is there already, and the gradients."""
    from kinema.optim.gradients import local_part

    here = trainer.world.device.type  # shards and their gradients may be in the host's memory
    parts = [local_part(parameter) for parameter in trainer.parameters.values()]
    gradients = sum(part.nbytes for part in parts if part.device.type == here)
    return max(trainer.world.gather_objects((device.held() + gradients) / device.budget))


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def _nothing_fits(bucket: Bucket, share: float, budget: int) -> UserError:
    takes = f"takes {readable_bytes(share * budget)}" if math.isfinite(share) else "takes more than there is"
    return UserError(
        f'training.batch_size = "auto": not even one sample of {bucket} fits: its step {takes}, and '
        f"{readable_bytes(budget)} may be taken. Set training.activation_checkpointing = true, train an [adapter], "
        "shard over more devices with parallel.dp_shard, or take smaller data.buckets."
    )
