"""What a checkpoint of a training holds: the tensors of networks, optimisers and averages, by name and by reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kinema.config.schema import Config
from kinema.families.base import Family
from kinema.optim.ema import Ema
from kinema.optim.library import averages_now
from kinema.optim.numbers import Numbers, numbers_of, restore_numbers, tensors_of
from kinema.parallel.packing import for_checkpoint
from kinema.runs.checkpoint_load import contents
from kinema.runs.pieces import Pieces
from kinema.runs.trained import configuration, named_trainables
from kinema.training.checkpoint import Checkpointer

StateDict = dict[str, dict[str, Tensor | Pieces]]


def training_state(
    networks: Mapping[str, nn.Module], optimizers: Sequence[Optimizer] = (), ema: Ema | None = None
) -> StateDict:
    """``{"networks": ..., "optimizer": ..., "ema": ...}``, each name -> tensor, for ``Checkpointer.save``.

    Names are ``{network}.{parameter}`` and, for the optimiser's state, ``{network}.{parameter}.{key}``. Of the networks
    only what training changes is there: parameters that require gradients, and persistent buffers. Learning rates and
    the like are not: the configuration and the step determine them. Tensors are references: saving reads them, loading
    writes into them.
    """
    state: StateDict = {"networks": for_checkpoint(networks, _network_tensors(networks))}
    if optimizers:
        state["optimizer"] = for_checkpoint(networks, _optimizer_tensors(networks, optimizers))
    if ema is not None:
        state["ema"] = for_checkpoint(networks, ema.state())
    return state


def what_trains(config: Config, family: Family, networks: Mapping[str, nn.Module]) -> dict[str, Any]:
    """The variant, and the configuration of each part that trains whole: with them in its meta, a checkpoint can be
    started from and drawn with where nothing is left of what its run began with."""
    whole = networks if config.adapter is None else {}
    return {
        "variant": family.variant.name,
        "parts": {part: configuration(network) for part, network in whole.items()},
    }


def load_training_state(
    checkpointer: Checkpointer,
    path: Path,
    networks: Mapping[str, nn.Module],
    optimizers: Sequence[Optimizer] = (),
    ema: Ema | None = None,
) -> dict[str, Any]:
    """Restore in place what ``training_state`` gave, on any number of ranks; returns the checkpoint's ``meta``.

    Optimisers may be fresh: state that they make at their first step is made here, for the parameters that had it.
    """
    stored = contents(path)
    if optimizers:
        make_optimizer_state(networks, optimizers, set(stored))
    meta = checkpointer.load(path, training_state(networks, optimizers, ema))
    if optimizers:
        names = {parameter: name for name, parameter in named_trainables(networks).items()}
        restore_numbers(optimizers, names, meta.get("optimizer_numbers") or [])
    return meta


def optimizer_numbers(networks: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> Numbers:
    """What optimisers of libraries keep beside tensors, for ``optimizer_numbers`` of a checkpoint's meta."""
    return numbers_of(optimizers, {parameter: name for name, parameter in named_trainables(networks).items()})


def averages_in_use(networks: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> StateDict:
    """``{"ema": ...}`` as `training_state` has it, copied from a schedule-free optimiser's averages; {} without one.
    Nothing is resumed from it: whoever starts from the checkpoint takes it for the averaged weights."""
    averages = averages_now(optimizers)
    names = {parameter: name for name, parameter in named_trainables(networks).items()}
    tensors = {names[parameter]: average for parameter, average in averages.items()}
    return {"ema": for_checkpoint(networks, tensors)} if tensors else {}


def _network_tensors(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in named_trainables(networks).items()}
    for part, network in networks.items():
        parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        for name, value in network.state_dict().items():
            if name not in parameters and isinstance(value, Tensor):
                tensors[f"{part}.{name}"] = value
    return tensors


def _optimizer_tensors(networks: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in named_trainables(networks).items()}
    tensors: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in tensors_of(state).items():
                tensors[f"{names[parameter]}.{key}"] = value
    return tensors


def make_optimizer_state(networks: Mapping[str, nn.Module], optimizers: Sequence[Optimizer], stored: set[str]) -> None:
    """Let optimisers make the state that the checkpoint has: one step with zero gradients and learning rate 0."""
    prefix = "optimizer."
    names = {parameter: name for name, parameter in named_trainables(networks).items()}
    had = {name.removeprefix(prefix).rpartition(".")[0] for name in stored if name.startswith(prefix)}
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            fresh = names[parameter] in had and not optimizer.state.get(parameter)
            parameter.grad = torch.zeros_like(parameter) if fresh else None
            if names[parameter] not in had:
                optimizer.state.pop(parameter, None)
        settings = [(group, group["lr"], group.get("weight_decay")) for group in optimizer.param_groups]
        for group, _, weight_decay in settings:
            group["lr"] = 0.0
            if weight_decay is not None:
                group["weight_decay"] = 0.0
        optimizer.step()
        for group, lr, weight_decay in settings:
            group["lr"] = lr
            if weight_decay is not None:
                group["weight_decay"] = weight_decay
        optimizer.zero_grad(set_to_none=True)
