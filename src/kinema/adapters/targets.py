"""Which layers an adapter changes, and with what rank and alpha."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kinema.config.layouts import AdapterType
from kinema.config.schema import AdapterConfig
from kinema.errors import UserError

if TYPE_CHECKING:
    from torch import nn

_TAKES: dict[AdapterType, tuple[str, ...]] = {
    "lora": ("Linear", "Conv1d", "Conv2d", "Conv3d"),
    "dora": ("Linear", "Conv1d", "Conv2d", "Conv3d"),
    "lokr": ("Linear", "Conv1d", "Conv2d"),
    "ia3": ("Linear", "Conv2d", "Conv3d"),
}
"""Kinds of layers that PEFT adapts in each way."""


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets. ``on_input``: IA3 multiplies its inputs."""

    rank: int
    alpha: float
    on_input: bool = False


Modules = Mapping[str, "nn.Module"]


def adaptable_modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that can take an adapter (linear maps and convolutions) by name, with or without one on them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    wrapped = {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = {f"{name}." for name in wrapped}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    plain = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, kinds) and name not in wrapped and not _is_inside(name, inside)
    }
    return plain | wrapped


def _is_inside(name: str, prefixes: set[str]) -> bool:
    words = name.split(".")
    return any(".".join(words[:count]) + "." in prefixes for count in range(1, len(words)))


def plan_layers(
    modules: Mapping[str, Modules], config: AdapterConfig, defaults: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, LayerPlan]]:
    """What each layer of each part gets, in the order of the network's layers.

    ``modules``: adaptable modules by part; ``defaults``: the family's patterns by part, for a configuration without
    ``targets``. UserError for a pattern that matches nothing in any part, and for layers that the type cannot adapt.
    """
    chosen = {
        part: match_patterns(layers, defaults[part], "adapter.targets")
        if config.targets is None
        else _matching(layers, config.targets)
        for part, layers in modules.items()
    }
    if config.targets is not None:
        _check_patterns(modules, config.targets, "adapter.targets")
    targeted = {part: dict.fromkeys(names) for part, names in chosen.items()}
    _check_patterns(targeted, config.exclude, "adapter.exclude", "that adapter.targets choose")
    chosen = {part: [name for name in names if not _first(config.exclude, name)] for part, names in chosen.items()}
    for part, names in chosen.items():
        if not names:
            left = "adapter.exclude leaves" if targeted[part] else "adapter.targets match"
            raise UserError(f"{left} no layer of the {part}, which is to train. Change the patterns, or model.train.")
    adapted = {part: dict.fromkeys(names) for part, names in chosen.items()}
    for key in ("rank_patterns", "alpha_patterns", "input_targets"):
        _check_patterns(adapted, tuple(getattr(config, key)), f"adapter.{key}", "that is adapted")
    _check_kinds(modules, chosen, config)
    return {part: {name: _plan(config, name) for name in names} for part, names in chosen.items()}


def _plan(config: AdapterConfig, name: str) -> LayerPlan:
    own_rank = _first(tuple(config.rank_patterns), name)
    own_alpha = _first(tuple(config.alpha_patterns), name)
    rank = config.rank if own_rank is None else config.rank_patterns[own_rank]
    alpha = (config.alpha or float(rank)) if own_alpha is None else config.alpha_patterns[own_alpha]
    return LayerPlan(rank, alpha, _first(config.input_targets, name) is not None)


def match_patterns(names: Collection[str], patterns: Sequence[str], key: str) -> list[str]:
    r"""The names that some pattern matches from its end, at a dot: ``to_q`` or ``attn1\.to_[qkv]`` match
    ``blocks.0.attn1.to_q``. UserError, naming the option ``key``, for a pattern that matches nothing."""
    _check_patterns({"": names}, patterns, key)
    return _matching(names, patterns)


def _matching(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    compiled = [_compiled(pattern) for pattern in patterns]
    return [name for name in names if any(pattern.fullmatch(name) for pattern in compiled)]


def _first(patterns: Sequence[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if _compiled(pattern).fullmatch(name)), None)


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*\.)?(?:{pattern})")


def _check_patterns(
    names: Mapping[str, Collection[str]], patterns: Sequence[str], key: str, which: str = "of the network"
) -> None:
    every = list(dict.fromkeys(name for part in names.values() for name in part))
    for pattern in patterns:
        compiled = _compiled(pattern)
        if not any(compiled.fullmatch(name) for name in every):
            near = ", ".join(_nearest(pattern, every))
            raise UserError(
                f"{key}: '{pattern}' matches no layer {which}. Patterns are regular expressions, matched from the end "
                f"of a layer's name. Nearest names: {near or 'none'}."
            )


def _check_kinds(modules: Mapping[str, Modules], chosen: Mapping[str, Sequence[str]], config: AdapterConfig) -> None:
    for part, names in chosen.items():
        for name in names:
            module = modules[part][name]
            kinds = {base.__name__ for base in type(getattr(module, "base_layer", module)).__mro__}
            if not kinds & set(_TAKES[config.type]):
                raise UserError(
                    f'adapter.type = "{config.type}" cannot adapt {name}, a {type(module).__name__}: it takes '
                    f"{', '.join(_TAKES[config.type])}. Name the layer in adapter.exclude, or choose another type."
                )


def _nearest(target: str, names: Collection[str], count: int = 5) -> list[str]:
    """The layer names nearest to ``target``, one of each kind (numbers of blocks do not make another kind)."""
    word = re.sub(r"[^\w.]", "", target)
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "0", name), name)

    def likeness(name: str) -> float:
        words = name.split(".")
        ends = [".".join(words[i:]) for i in range(len(words))]
        return max(difflib.SequenceMatcher(None, word, end).ratio() for end in ends)

    return sorted(kinds.values(), key=likeness, reverse=True)[:count]
