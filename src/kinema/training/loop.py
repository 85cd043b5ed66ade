"""The one training loop: read down this file to see a whole step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from kinema.data.batch import Batch
from kinema.errors import UserError
from kinema.objectives.base import Denoiser, Draws, Loss, Objective
from kinema.optim.optimizers import found_lr, set_lr
from kinema.optim.schedule import lr_factor
from kinema.randomness import derive_seed
from kinema.training.clipping import clip_gradients
from kinema.training.progress import Progress
from kinema.training.requests import QUIT, Requests

if TYPE_CHECKING:
    import torch

    from kinema.config.schema import Config
    from kinema.optim.ema import Ema
    from kinema.optim.release import GradientRelease
    from kinema.optim.scale import LossScale
    from kinema.parallel.mesh import World
    from kinema.parallel.pipeline import Pipeline

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
    release: GradientRelease | None = None
    """Updates weights within the backward pass; None: all of them after it."""
    pipeline: Pipeline | None = None
    """Runs the networks where they are cut into stages."""
    accumulating: Callable[[bool], AbstractContextManager[None]] = lambda last: contextlib.nullcontext()
    """Context of one micro-batch; gradients are summed over devices in the last one."""
    at: Callable[[str], None] = lambda phase: None
    """Told how far the step has come, for whoever watches over the processes."""
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
        trainer.at(f"step {trainer.progress.step + 1}: the next batch")
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
    lr = set_lr(t.optimizers, factor, t.config.optimizer.lr)

    t.at(f"step {step + 1}: forward and backward")
    micro_batches = split(work.batch, work.micro_batch_size, -(-work.examples // world.dp_size))
    if t.release is not None:
        t.before_update()
    with contextlib.nullcontext() if t.release is None else t.release.updating():
        loss_sum, sums = accumulate_gradients(t, micro_batches, Draws(t.config.run.seed, step))

    parameters = [p for p in t.parameters.values() if p.grad is not None]
    if t.scale is not None:
        t.scale.unscale(parameters)
    grad_norm = clip_gradients(parameters, training.clip_norm, t.pipeline)
    shared = torch.stack([loss_sum, loss_sum.new_tensor(asked & 1), loss_sum.new_tensor(asked & 2), *sums.values()])
    loss_value, save, quit_, *metrics = world.all_reduce_sum(shared).tolist()

    t.at(f"step {step + 1}: update")
    norm = float(grad_norm) if t.release is None else t.release.norm
    finite = math.isfinite(norm)  # the norm is over all ranks, so they all take this step or all skip it
    if t.scale is not None:
        t.scale.update(finite)
    t.before_update()
    if finite and t.release is None:
        torch.manual_seed(derive_seed(t.config.run.seed, step, "optimizer"))  # some of libraries draw
        for optimizer in t.optimizers:
            optimizer.step()
    if t.ema is not None and (finite or t.release is not None):  # released, other weights have changed all the same
        t.ema.update(step + 1)
    for parameter in t.parameters.values():
        parameter.grad = None
    _count_non_finite(t, finite, step)
    asked = (save > 0) * 1 + (quit_ > 0) * 2
    named = dict(zip(sums, metrics, strict=True)) | found_lr(t.optimizers)
    if t.release is not None:
        named["skipped_updates"] = float(t.release.skipped)
    return StepResult(loss_value, norm, lr, asked, named)


def accumulate_gradients(
    trainer: Trainer, micro_batches: Sequence[Batch], draws: Draws, exchange: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward; returns this rank's sums of the loss and of the metrics. ``exchange`` False: gradients of
    replicated weights are not summed over ranks."""
    import torch

    t, world = trainer, trainer.world
    loss_sum = torch.zeros((), device=world.device, dtype=torch.float64)
    sums: dict[str, torch.Tensor] = {}
    factor = 1 / world.sizes.sp  # peers in a sequence see the same samples, each a part of them
    if t.scale is not None:
        factor *= t.scale.value
    losses: Iterable[Loss]
    if t.pipeline is not None:
        losses = t.pipeline.run([partial(compute_loss, t, micro, draws) for micro in micro_batches], factor)
        with t.accumulating(exchange):  # no backward pass is left to sum gradients beside
            pass
        t.pipeline.sum_shared()
    else:
        losses = _one_by_one(t, micro_batches, draws, factor, exchange)
    for loss in losses:
        loss_sum += loss.total.detach()
        for name, value in loss.metrics.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return loss_sum, sums if t.pipeline is None else t.pipeline.with_all_names(sums, loss_sum)


def _one_by_one(
    trainer: Trainer, micro_batches: Sequence[Batch], draws: Draws, factor: float, exchange: bool
) -> Iterator[Loss]:
    place = f"step {trainer.progress.step + 1}"
    for i, micro in enumerate(micro_batches):
        with trainer.accumulating(exchange and i == len(micro_batches) - 1):
            trainer.at(f"{place}: forward {i + 1} of {len(micro_batches)}")
            loss = compute_loss(trainer, micro, draws)
            trainer.at(f"{place}: backward {i + 1} of {len(micro_batches)}")
            (loss.total * factor).backward()
        yield loss


def compute_loss(trainer: Trainer, micro: Batch, draws: Draws) -> Loss:
    """The forward pass of one micro-batch."""
    import torch

    t, world = trainer, trainer.world
    # Dropout layers draw from the global generators: seeding them here makes a resumed step repeat itself.
    torch.manual_seed(derive_seed(draws.seed, draws.step, micro.indices[0], "dropout"))
    cached, enabled = keeps_casts(t.config, world), t.compute_dtype != torch.float32
    with torch.autocast(world.device.type, t.compute_dtype, enabled=enabled, cache_enabled=cached):
        return t.objective(micro.to(world.device), t.networks, draws)


def keeps_casts(config: Config, world: World) -> bool:
    """Whether autocast keeps the weights that it has cast: not where weights are on the device a few at a time."""
    return not (world.is_sharded or config.memory.offload_blocks)


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
        clip = "keep training.clip_norm at 1, " if trainer.release is None else ""
        raise UserError(
            f"The gradient was not finite in {trainer.non_finite} steps in a row, up to step {step + 1}; those updates "
            f"were skipped. Lower optimizer.lr, {clip}or train in bf16 or fp32; then "
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
