"""Steps of which one process alone has a gradient that is not finite: what all of them make of it.

A case is ``SIZES KIND``: the last process has a sample of NaN in the second step (``sample``; its own copy of it, where
processes see the same samples), or a gradient that is infinite in one weight of the last block (``weight``; released:
``release``). `main` runs them on several processes, and the tests in one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pipeline_cases import SAMPLES, Plan, Result, configured, share, trainer_of, whole
from ranks import run_cases
from torch import Tensor

from kinema.optim.gradients import local_part
from kinema.optim.release import GradientRelease
from kinema.parallel.data import accumulate
from kinema.parallel.mesh import World
from kinema.training.loop import Trainer, train_step

MODEL = "wan-t2v-1.3b"
STEPS, BAD = 3, 1
SETTINGS: dict[str, tuple[tuple[str, Any], ...]] = {
    "sample": (),
    "weight": (),
    "release": (
        ("training.clip_norm", None),
        ("training.micro_batch_size", SAMPLES),
        ("optimizer.gradient_release", True),
    ),
}


def plan_of(case: str) -> Plan:
    sizes, _, kind = case.partition(" ")
    return Plan(MODEL, sizes, steps=STEPS, settings=SETTINGS[kind])


def train(world: World, case: str, root: Path) -> Result:
    """Three steps, of which the second is bad; of each its loss and norm, and whether it changed anything, on every
    process."""
    plan, kind = plan_of(case), case.partition(" ")[2]
    config, family = configured(plan, root)
    trainer = trainer_of(world, config, family)
    networks = dict(trainer.networks["student"].networks)  # type: ignore[attr-defined]
    if kind == "release":
        trainer = released(trainer, networks["network"])
    last = f"network.blocks.{len(networks['network'].blocks) - 1}.ffn.net.2.weight"
    unlucky = world.rank == world.size - 1
    if kind != "sample" and unlucky:
        trainer.parameters[last].register_hook(lambda gradient: gradient / (trainer.progress.step != BAD))
    samples = torch.load(root / f"{plan.model}.pt", weights_only=True)
    seen: Result = {"losses": [], "norms": [], "skipped": [], "changed": []}
    for step in range(STEPS):
        work = share(world, samples, config)
        if kind == "sample" and unlucky and step == BAD:
            work.batch.tensors["latents"][-1] = torch.full_like(work.batch.tensors["latents"][-1], torch.nan)
        before = state_of(trainer)
        result = train_step(trainer, work, 0)
        trainer.progress = trainer.progress.after_step(SAMPLES, 0.0)
        after = state_of(trainer)
        same = [name for name in before if torch.equal(before[name], after[name])]
        seen["losses"].append(result.loss)
        seen["norms"].append(world.gather_objects(result.grad_norm))
        seen["skipped"].append(world.gather_objects(result.metrics.get("skipped_updates")))
        seen["changed"].append(world.gather_objects((len(after) - len(same), len(after), same)))
    weights = whole(world, {name: p.detach() for name, p in trainer.parameters.items()}, networks)
    return seen | {"weights": weights, "non_finite": world.gather_objects(trainer.non_finite), "last": last}


def released(trainer: Trainer, network: torch.nn.Module) -> Trainer:
    """As a run makes it."""
    release = GradientRelease(trainer.optimizers, hooks=trainer.world.size == 1)
    return replace(trainer, release=release, accumulating=lambda last: accumulate(network, last, release.update))


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of this process's part of weights, averages and the optimiser's state."""
    assert trainer.ema is not None
    names = {parameter: name for name, parameter in trainer.parameters.items()}
    state = {f"networks.{name}": parameter for parameter, name in names.items()}
    state |= {f"ema.{name}": value for name, value in trainer.ema.state().items()}
    for optimizer in trainer.optimizers:
        for parameter, kept in optimizer.state.items():
            state |= {f"optimizer.{names[parameter]}.{key}": value for key, value in kept.items()}
    parts = {name: local_part(value).clone() for name, value in state.items()}
    return {name: part for name, part in parts.items() if part.numel()}  # a shard may have nothing of it


def main(root: Path, cases: list[str]) -> None:
    run_cases(root, cases, lambda case, _: plan_of(case).mesh(), train)
