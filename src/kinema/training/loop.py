"""The one training loop: read down this file to see a whole step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kinema.data.batch import Batch
from kinema.errors import UserError
from kinema.objectives.base import Denoiser, Draws, Objective
from kinema.optim.optimizers import set_lr
from kinema.optim.schedule import lr_factor
from kinema.randomness import derive_seed
from kinema.training.clipping import clip_gradients
from kinema.training.progress import Progress
from kinema.training.requests import QUIT, Requests

if TYPE_CHECKING:
    import torch

    from kinema.config.schema import Config
    from kinema.optim.ema import Ema
    from kinema.optim.scale import LossScale
    from kinema.parallel.mesh import World

NON_FINITE_LIMIT = 20


@dataclass(frozen=True)
class Work:
    """What a rank does in one step."""

    batch: Batch
    """Its share of the global batch."""
    examples: int
    """Samples in the global batch."""
    micro_batch_size: int | None
    """Samples per forward pass; None: the whole share."""
    epochs: float
    """Passes over the data once the step is done."""


@dataclass
class Trainer:
    """Everything that a step touches."""

    config: Config
    world: World
    networks: Mapping[str, Denoiser]
    """By role, as the objective asks for them."""
    parameters: Mapping[str, torch.nn.Parameter]
    """What trains, by canonical name."""
    objective: Objective
    optimizers: list[torch.optim.Optimizer]
    compute_dtype: torch.dtype
    progress: Progress
    total_steps: int = 0
    ema: Ema | None = None
    scale: LossScale | None = None
    accumulating: Callable[[bool], AbstractContextManager[None]] = lambda last: contextlib.nullcontext()
    """Context of one micro-batch; gradients are summed over devices in the last one."""
    before_update: Callable[[], None] = lambda: None
    """Called before weights change: a checkpoint that is being written must have its copy by then."""
    non_finite: int = field(default=0)
    """Steps in a row whose gradient was not finite."""


@dataclass
class StepResult:
    """Scalars of one optimiser step over the global batch."""

    loss: float
    grad_norm: float
    lr: float
    asked: int
    """What signals and files asked for, on any rank."""
    metrics: dict[str, float]


def run_steps(
    trainer: Trainer,
    batches: Iterator[Work],
    requests: Requests,
    after_step: Callable[[Progress, StepResult, float], None],
) -> None:
    """Step until the end of the run or until asked to quit.

    ``after_step(before, result, seconds)`` logs, evaluates, previews, exports and saves.
    """
    while trainer.progress.step < trainer.total_steps:
        started = time.perf_counter()
        work = next(batches)
        result = train_step(trainer, work, requests.take(trainer.world.is_main))
        before, trainer.progress = trainer.progress, trainer.progress.after_step(work.examples, work.epochs)
        after_step(before, result, time.perf_counter() - started)
        if result.asked & QUIT:
            return


def train_step(trainer: Trainer, work: Work, asked: int) -> StepResult:
    """One optimiser step on a global batch, of which ``work`` is this rank's share."""
    import torch

    t, world, training = trainer, trainer.world, trainer.config.training
    step = t.progress.step
    factor = lr_factor(t.config.schedule, step - t.progress.lr_start, t.total_steps - t.progress.lr_start)
    lr = set_lr(t.optimizers, factor)

    micro_batches = split(work.batch, work.micro_batch_size, -(-work.examples // world.dp_size))
    loss_sum, sums = accumulate_gradients(t, micro_batches, Draws(t.config.run.seed, step))

    parameters = [p for p in t.parameters.values() if p.grad is not None]
    if t.scale is not None:
        t.scale.unscale(parameters)
    grad_norm = clip_gradients(parameters, training.clip_norm)
    shared = torch.stack([loss_sum, loss_sum.new_tensor(asked & 1), loss_sum.new_tensor(asked & 2), *sums.values()])
    loss_value, save, quit_, *metrics = world.all_reduce_sum(shared).tolist()

    norm = float(grad_norm)
    finite = math.isfinite(norm)  # the norm is over all ranks, so they all take this step or all skip it
    if t.scale is not None:
        t.scale.update(finite)
    t.before_update()
    if finite:
        for optimizer in t.optimizers:
            optimizer.step()
        if t.ema is not None:
            t.ema.update(step + 1)
    for parameter in t.parameters.values():
        parameter.grad = None
    _count_non_finite(t, finite, step)
    asked = (save > 0) * 1 + (quit_ > 0) * 2
    return StepResult(loss_value, norm, lr, asked, dict(zip(sums, metrics, strict=True)))


def accumulate_gradients(
    trainer: Trainer, micro_batches: Sequence[Batch], draws: Draws, exchange: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward; returns this rank's sums of the loss and of the metrics. ``exchange`` False: gradients of
    replicated weights are not summed over ranks."""
    import torch

    t, world = trainer, trainer.world
    loss_sum = torch.zeros((), device=world.device, dtype=torch.float64)
    sums: dict[str, torch.Tensor] = {}
    for i, micro in enumerate(micro_batches):
        # Dropout layers draw from the global generators: seeding them here makes a resumed step repeat itself.
        torch.manual_seed(derive_seed(draws.seed, draws.step, micro.indices[0], "dropout"))
        with t.accumulating(exchange and i == len(micro_batches) - 1):
            # The cache would keep casts of all weights, which sharding is there to avoid.
            cached, enabled = world.dp_shard == 1, t.compute_dtype != torch.float32
            with torch.autocast(world.device.type, t.compute_dtype, enabled=enabled, cache_enabled=cached):
                loss = t.objective(micro.to(world.device), t.networks, draws)
            (loss.total if t.scale is None else loss.total * t.scale.value).backward()
        loss_sum += loss.total.detach()
        for name, value in loss.metrics.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return loss_sum, sums


def split(batch: Batch, micro_batch_size: int | None, share: int) -> list[Batch]:
    """Micro-batches of a rank's batch. Their number follows from ``share``, the largest share of any rank, so that
    all ranks run the same number; a rank with less repeats a sample with weight 0."""
    size = micro_batch_size or share
    rows = [list(range(start, min(start + size, len(batch)))) for start in range(0, len(batch), size)]
    micro_batches = [batch.select(r) for r in rows]
    for _ in range(-(-share // size) - len(micro_batches)):
        padding = batch.select([0])
        padding.weights = [0.0]
        micro_batches.append(padding)
    return micro_batches


def _count_non_finite(trainer: Trainer, finite: bool, step: int) -> None:
    trainer.non_finite = 0 if finite else trainer.non_finite + 1
    # A loss scale that is still large is only on its way down to where gradients fit.
    if trainer.non_finite >= NON_FINITE_LIMIT and (trainer.scale is None or trainer.scale.value < 1):
        raise UserError(
            f"The gradient was not finite in {trainer.non_finite} steps in a row, up to step {step + 1}; those updates "
            "were skipped. Lower optimizer.lr, keep training.clip_norm at 1, or train in bf16 or fp32; then "
            "resume from the newest checkpoint."
        )


def describe(result: StepResult, seconds: float, extra: Mapping[str, Any]) -> dict[str, float]:
    """The row of ``metrics.jsonl``."""
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "seconds": seconds,
        **result.metrics,
        **extra,
    }
