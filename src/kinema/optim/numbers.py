"""What optimisers of libraries keep beside tensors: plain numbers, of parameters and of groups.

Checkpoints hold tensors; these numbers go into a checkpoint's description, as JSON, which writes floats exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

GIVEN = {"params", "param_names", "lr", "peak_lr", "initial_lr", "weight_decay", "seed", "built"}
"""Keys of a group that the configuration and the step determine."""
Numbers = list[dict[str, Any]]
"""Of each optimiser that has any, ``{"groups": [{"params": [name], "values": {key: value}}], "state": {name: {key:
value}}}``."""


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a parameter's state by key; those of a list have its key and their place: ``factors[0]``."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            found[key] = value
        elif isinstance(value, list | tuple) and any(isinstance(one, Tensor) for one in value):
            found |= {f"{key}[{place}]": one for place, one in enumerate(value) if isinstance(one, Tensor)}
    return found


def numbers_of(optimizers: Iterable[Optimizer], names: Mapping[nn.Parameter, str]) -> Numbers:
    """The numbers that the optimisers have come to; TypeError for what is neither number nor tensor."""
    found = [_numbers(optimizer, names) for optimizer in optimizers]
    return found if any(one["groups"] or one["state"] for one in found) else []


def restore_numbers(optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str], numbers: Numbers) -> None:
    """Write `numbers_of` back. Groups may be cut otherwise now: each takes those of its first parameter's."""
    for optimizer, stored in zip(optimizers, numbers, strict=False):
        parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
        for group in optimizer.param_groups:
            first = names[group["params"][0]]
            values: dict[str, Any] = next((one["values"] for one in stored["groups"] if first in one["params"]), {})
            group.update({key: _read(value, group) for key, value in values.items()})
        for name, values in stored["state"].items():
            optimizer.state[parameters[name]].update(values)


def _numbers(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    kind, defaults = type(optimizer).__name__, optimizer.defaults
    groups = []
    for group in optimizer.param_groups:
        before = group.get("built", defaults)
        values: dict[str, Any] = {
            key: _written(value, f"{kind} keeps '{key}' of its groups")
            for key, value in group.items()
            if key not in GIVEN and not (key in before and _same(value, before[key]))
        }
        if values:
            groups.append({"params": [names[p] for p in group["params"]], "values": values})
    state: dict[str, dict[str, Any]] = {}
    for parameter, its in optimizer.state.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{kind} keeps '{parameter}' for no parameter: checkpoints hold the state of parameters")
        with_tensors = {key.partition("[")[0] for key in tensors_of(its)}
        rest = {key: value for key, value in its.items() if key not in with_tensors}
        plain = {key: _written(value, f"{kind} keeps '{key}'") for key, value in rest.items()}
        if plain:
            state[names[parameter]] = plain
    return {"groups": groups, "state": state}


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and one == other)


def _written(value: Any, what: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(one is None or isinstance(one, bool | int | float) for one in value):
        return list(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return {"tensor": value.detach().cpu().flatten().tolist(), "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch.")}  # fmt: skip
    raise TypeError(f"{what} as {type(value).__name__}: checkpoints hold tensors and numbers")


def _read(value: Any, group: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        device = group["params"][0].device
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]), device=device).view(value["shape"])
    return value
