"""Which learning rate and weight decay each trained weight has: the parameter groups of every optimiser."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kinema.config.optimizer import OptimizerConfig, OptimizerGroupConfig
from kinema.errors import ConfigError

if TYPE_CHECKING:
    import torch

SECOND_FACTOR = ".lora_B."
"""What the names of LoRA's and DoRA's B factors have and no other's."""


def is_vector(parameter: torch.nn.Parameter) -> bool:
    """Whether all elements lie along one dimension: biases, scales of norms, factors of IA3 ([out, 1])."""
    return parameter.ndim < 2 or parameter.numel() == max(parameter.shape)


def group_of(name: str, config: OptimizerConfig) -> OptimizerGroupConfig | None:
    """The entry of `optimizer.groups` for a parameter ``{part}.{name}``: the first whose pattern is found in it. An
    adapter's weights go by the names of its exports: ``x.lora_A.weight`` for peft's ``x.lora_A.default.weight``."""
    name = name.replace(".default", "")
    return next((group for group in config.groups if re.search(group.pattern, name)), None)


def peak_lr(name: str, config: OptimizerConfig, default: float) -> float:
    """The peak learning rate of a parameter ``{part}.{name}``: its group's, else its part's or ``default``, times
    `lora_plus` for a B factor."""
    group = group_of(name, config)
    if group is not None and group.lr is not None:
        return group.lr
    lr = config.part_lr.get(name.partition(".")[0], default)
    return lr * config.lora_plus if config.lora_plus is not None and SECOND_FACTOR in name else lr


def weight_decay_of(name: str, parameter: torch.nn.Parameter, config: OptimizerConfig) -> float:
    """The weight decay of a parameter ``{part}.{name}``: its group's or `weight_decay`; none for a vector."""
    if is_vector(parameter):
        return 0.0
    group = group_of(name, config)
    return config.weight_decay if group is None or group.weight_decay is None else group.weight_decay


def grouped(
    parameters: Mapping[str, torch.nn.Parameter], config: OptimizerConfig, default_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups, one for each peak learning rate and weight decay; and for each mesh of devices, as torch's
    kernels take no tensors of several together.

    Each has ``params``, their names in ``param_names``, ``lr``, ``peak_lr`` and ``weight_decay``. ``default_lr``: in
    the place of `optimizer.lr`.
    """
    groups: dict[tuple[float, float, Any], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        peak = peak_lr(name, config, config.lr if default_lr is None else default_lr)
        decay = weight_decay_of(name, parameter, config)
        empty = {"params": [], "param_names": [], "lr": peak, "peak_lr": peak, "weight_decay": decay}
        group = groups.setdefault((peak, decay, getattr(parameter, "device_mesh", None)), empty)
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def check_groups(config: OptimizerConfig, names: Iterable[str]) -> None:
    """ConfigError for an entry of `optimizer.groups` that no trained weight falls to, with what is near, and for a part
    in `part_lr` that does not train. ``names``: all parameters that train, ``{part}.{name}``."""
    names = list(names)
    taken = {id(group_of(name, config)) for name in names}
    for number, group in enumerate(config.groups):
        if id(group) in taken:
            continue
        where = f"optimizer.groups.{number}.pattern = '{group.pattern}'"
        if any(re.search(group.pattern, name) for name in names):
            raise ConfigError(f"{where}: the groups before it take all that it finds. Put it in front of them.")
        raise ConfigError(f"{where} is found in none of the {len(names)} weights that train; {_near(group, names)}")
    parts = {name.partition(".")[0] for name in names}
    for part in config.part_lr:
        if part not in parts:
            raise ConfigError(
                f"optimizer.part_lr.{part}: no part of this name trains; {_listed(sorted(parts))}. See model.train."
            )


def _near(group: OptimizerGroupConfig, names: list[str]) -> str:
    word = re.sub(r"[\\^$()\[\]?*+|]", "", group.pattern).strip(".")
    paths = {re.sub(r"\.\d+(?=\.)", ".0", name) for name in names}
    ends = {".".join(path.split(".")[start:]) for path in paths for start in range(path.count(".") + 1)}
    pieces = {piece for path in paths for piece in path.split(".") if not piece.isdecimal()}
    near = difflib.get_close_matches(word, sorted(ends | pieces), n=3, cutoff=0.5)
    return f"near are {', '.join(near)}." if near else f"some are {', '.join(names[:: max(1, len(names) // 3)][:3])}."


def _listed(parts: list[str]) -> str:
    return f"{' and '.join(parts)} {'does' if len(parts) == 1 else 'do'}"
