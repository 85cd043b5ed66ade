"""Sharded trainings at every level that must give what one process gives, and what they send and leave gathered.

Cases and models are those of `pipeline_cases`. `main` runs them on several processes, of which rank 0 leaves
each result in the directory. The key ``as_stored`` in a case gathers everything in
the type that it is stored in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pipeline_cases import SAMPLES, Plan, Result, configured, share, trainer_of, whole
from ranks import run_cases
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.objectives.base import Draws
from kinema.parallel import fsdp
from kinema.parallel.mesh import World
from kinema.runs.trained import named_trainables
from kinema.training.checkpoint import Checkpointer
from kinema.training.evaluation import evaluate
from kinema.training.loop import Trainer, compute_loss, train_step
from kinema.training.networks import evaluating
from kinema.training.state import load_training_state, training_state


class Sent(TorchDispatchMode):
    """Numbers and bytes that collectives carry, by kind; a few numbers, such as a norm, left out."""

    OPERATORS: ClassVar = {
        torch.ops.c10d.allreduce_.default: ("all_reduce", 0),
        torch.ops.c10d._allgather_base_.default: ("all_gather", 0),
        torch.ops.c10d._reduce_scatter_base_.default: ("reduce_scatter", 1),
    }

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.OPERATORS:
            kind, place = self.OPERATORS[func]
            for one in torch.utils._pytree.tree_leaves(args[place]):
                if one.numel() > 16:
                    self.numbers[kind] += one.numel()
                    self.bytes[kind] += one.nbytes
        return func(*args, **(kwargs or {}))


@contextmanager
def as_stored() -> Iterator[None]:
    """Nothing travels in another type than it is stored in."""
    short, fsdp.short_parameters = fsdp.short_parameters, lambda block, dtype: set()
    try:
        yield
    finally:
        fsdp.short_parameters = short


def gathered(networks: dict[str, nn.Module]) -> list[str]:
    """Groups of parameters that are whole although no step is under way."""
    groups = [m for network in networks.values() for m in network.modules() if isinstance(m, FSDPModule)]
    states = [group for module in groups for group in module._get_fsdp_state()._fsdp_param_groups]
    return [str(state._module_fqn) for state in states if not state.is_sharded]


def averaged_loss(trainer: Trainer, batch: Any, world: World) -> float:
    """Of a batch held out, with the averages in the networks, as a run's evaluation does it."""
    networks = trainer.networks["student"].networks  # type: ignore[attr-defined]
    assert trainer.ema is not None
    enabled = trainer.compute_dtype != torch.float32
    with trainer.ema.swapped(), evaluating(networks.values()), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return evaluate("set", [batch], trainer.objective, trainer.networks, 5, world)["set/loss"]


def restored(world: World, trainer: Trainer, plan: Plan, root: Path) -> None:
    """Save everything, change it, load it again."""
    networks = dict(trainer.networks["student"].networks)  # type: ignore[attr-defined]
    checkpointer = Checkpointer(root / f"{plan.name}.checkpoints", 1, True, world)
    checkpointer.save(2, training_state(networks, trainer.optimizers, trainer.ema), {})
    checkpointer.wait()
    with torch.no_grad():
        for parameter in trainer.parameters.values():
            parameter.add_(1.0)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
    found = checkpointer.latest()
    assert found is not None
    load_training_state(checkpointer, found.path, networks, trainer.optimizers, trainer.ema)
    checkpointer.close()


def broken_off(trainer: Trainer, batch: Any) -> None:
    """A micro-batch that an error ends before its backward pass."""
    if trainer.pipeline is None:
        with pytest.raises(KeyError), trainer.accumulating(False):
            compute_loss(trainer, batch, Draws(0, 0))
            raise KeyError


def train(world: World, plan: Plan, root: Path) -> Result:
    """Three steps; after each, an evaluation of the averages; after the second, all is saved and loaded again."""
    stored = dict(plan.settings).get("as_stored", False)
    plan = replace(plan, settings=tuple(pair for pair in plan.settings if pair[0] != "as_stored"))
    config, family = configured(plan, root)
    if stored:
        with as_stored():
            trainer = trainer_of(world, config, family)
    else:
        trainer = trainer_of(world, config, family)
    networks = dict(trainer.networks["student"].networks)  # type: ignore[attr-defined]
    samples = torch.load(root / f"{plan.model}.pt", weights_only=True)
    if config.model.train:
        encoded = [name for name in samples[0] if name.startswith(("text", "pooled"))]
        samples = [{name: one[name] for name in one if name not in encoded} for one in samples]
    losses, norms, averaged, left, sent = [], [], [], [], Sent()
    for step in range(plan.steps):
        work = share(world, samples, config)
        with sent if step == 1 else Sent():
            result = train_step(trainer, work, 0)
        trainer.progress = trainer.progress.after_step(SAMPLES, 0.0)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        left += gathered(networks) if world.is_sharded else []
        averaged.append(averaged_loss(trainer, work.batch, world))
        left += gathered(networks) if world.is_sharded else []
        if step == 1:
            restored(world, trainer, plan, root)
    if world.is_sharded:
        broken_off(trainer, share(world, samples, config).batch)
        left += gathered(networks)
    if config.parallel.cpu_offload:
        assert all(p.device.type == "cpu" for p in trainer.parameters.values())
    trained = named_trainables(networks)
    return {
        "losses": losses,
        "norms": norms,
        "averaged": averaged,
        "left": left,
        "numbers": dict(sent.numbers),
        "bytes": dict(sent.bytes),
        "whole": sum(p.numel() for p in trained.values() if not isinstance(p, DTensor)),
        "weights": whole(world, {name: p.detach() for name, p in trained.items()}, networks),
    }


def main(root: Path, cases: list[str]) -> None:
    def run(world: World, name: str, root: Path) -> Result:
        return train(world, Plan.of(name), root)

    run_cases(root, cases, lambda name, _: Plan.of(name).mesh(), run)
