"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) made through peft: W x + (alpha / rank) B A x.

A is drawn per module from the seed, B starts at zero, so a fresh adapter changes nothing. Names of adapter
weights are those of diffusers and PEFT: ``blocks.0.attn1.to_q.lora_A.weight``.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from kinema.adapters.files import AdapterFile
from kinema.config.schema import AdapterConfig
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.randomness import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SLOT = "default"
"""peft's name of the adapter that trains."""


def adaptable_modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that can take an adapter (linear maps and convolutions) by name, with or without one on
    them."""
    from peft.tuners.lora import LoraLayer
    from torch import nn

    wrapped = {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}
    inside = tuple(f"{name}." for name in wrapped)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    plain = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, kinds) and not isinstance(module, LoraLayer) and not name.startswith(inside)
    }
    return plain | wrapped


def match_targets(names: Collection[str], targets: Sequence[str]) -> list[str]:
    r"""The names that some regular expression matches from their end, at a dot: ``to_q`` or
    ``attn1\.to_[qkv]`` match ``blocks.0.attn1.to_q``. UserError for an expression that matches nothing."""
    chosen: set[str] = set()
    for target in targets:
        pattern = re.compile(rf"(?:.*\.)?(?:{target})")
        matched = [name for name in names if pattern.fullmatch(name)]
        if not matched:
            near = ", ".join(_nearest(target, names))
            raise UserError(
                f"adapter.targets: '{target}' matches no layer of the network. Targets are regular "
                f"expressions, matched from the end of a layer's name. Nearest names: {near}."
            )
        chosen.update(matched)
    return [name for name in names if name in chosen]


def _nearest(target: str, names: Collection[str], count: int = 5) -> list[str]:
    """The layer names nearest to ``target``, one of each kind (numbers of blocks do not make another
    kind)."""
    word = re.sub(r"[^\w.]", "", target)
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "0", name), name)

    def likeness(name: str) -> float:
        words = name.split(".")
        ends = [".".join(words[i:]) for i in range(len(words))]
        return max(difflib.SequenceMatcher(None, word, end).ratio() for end in ends)

    return sorted(kinds.values(), key=likeness, reverse=True)[:count]


def add_adapter(network: nn.Module, config: AdapterConfig, targets: Sequence[str], seed: int) -> list[str]:
    """Put a fresh adapter on the layers that ``targets`` match; freeze everything else. Names of those
    layers.

    ``config.targets`` has precedence over ``targets``, the family's own. Initial weights depend on the seed
    and the layer's name alone; torch's global generator is left as it was. UserError if a target matches
    nothing.
    """
    modules = adaptable_modules(network)
    names = match_targets(modules, config.targets or targets)
    alpha = config.alpha or config.rank
    _inject(network, dict.fromkeys(names, config.rank), alpha / config.rank, config.dropout)
    _initialise(network, seed, torch_dtype(config.dtype))
    return names


def attach_adapter(network: nn.Module, adapter: AdapterFile) -> list[str]:
    """Put a saved adapter on the network, frozen, as it was trained. Names of its layers.

    For sampling; may be called again: the updates of several adapters add up. To train on from a file, use
    ``add_adapter`` and then ``start_from``.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    taken = list(getattr(network, "peft_config", {}))
    slot = f"attached_{len(taken)}"
    _inject(network, adapter.ranks, adapter.scale, dropout=0.0, slot=slot)
    for parameter in adapter_parameters(network, slot).values():
        parameter.data = parameter.data.to(torch.float32)
    load_adapter_state(network, adapter.state, slot)
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([name for name in (*taken, slot) if name in module.lora_A])
    network.requires_grad_(False)
    return list(adapter.ranks)


def _inject(network: nn.Module, ranks: Mapping[str, int], scale: float, dropout: float, slot: str = SLOT) -> None:
    """Wrap the named layers by peft's, uninitialised; freeze the base; gradients for the adapter's
    weights."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    peft_config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        lora_dropout=dropout,
        target_modules="|".join(re.escape(name) for name in ranks),
        rank_pattern=others,
        alpha_pattern={name: scale * r for name, r in others.items()},
        init_lora_weights=False,
    )
    network.requires_grad_(False)
    # Constructing layers draws, and must not move the global generator; several adapters are what is wanted.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(peft_config, network, adapter_name=slot)
    for parameter in adapter_parameters(network, slot).values():
        parameter.requires_grad_(True)


def _initialise(network: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """A: Kaiming uniform with a = sqrt(5), which is U(-1, 1) / sqrt(fan in), as in the paper's code; B:
    zero."""
    import torch

    for name, parameter in adapter_parameters(network).items():
        value = torch.zeros(parameter.shape)
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            torch.nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator(seed, layer, "adapter"))
        parameter.data = value.to(parameter.device, dtype)


def adapter_parameters(network: nn.Module, slot: str = SLOT) -> dict[str, nn.Parameter]:
    """The adapter's weights by their diffusers names: ``x.lora_A.default.weight`` is ``x.lora_A.weight``."""
    end = re.compile(rf"(\.lora_[AB])\.{slot}\.weight$")
    return {
        end.sub(r"\1.weight", name): parameter for name, parameter in network.named_parameters() if end.search(name)
    }


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights by their diffusers names, sharing memory with the network."""
    return {name: parameter.detach() for name, parameter in adapter_parameters(network).items()}


def load_adapter_state(network: nn.Module, state: Mapping[str, Tensor], slot: str = SLOT) -> None:
    """Copy weights into the adapter on the network. UserError where names or shapes do not agree."""
    import torch

    parameters = adapter_parameters(network, slot)
    missing, unknown = parameters.keys() - state.keys(), state.keys() - parameters.keys()
    if missing or unknown:
        raise UserError(
            f"The adapter's weights do not fit the network: {len(missing)} missing, {len(unknown)} unknown, "
            f"for instance {min(missing | unknown)}. Check adapter.targets and the base model."
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise UserError(
                f"The adapter's {name} has shape {tuple(state[name].shape)}, "
                f"expected {tuple(parameter.shape)}. Check adapter.rank and the base model."
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def start_from(network: nn.Module, config: AdapterConfig, adapter: AdapterFile) -> None:
    """Copy a saved adapter into the fresh one (``adapter.init_from``), keeping the function that it computes.

    Layers that the file lacks keep their fresh weights. A file with another alpha is rescaled through B.
    UserError if the rank differs or the file has layers that ``adapter.targets`` leave out.
    """
    parameters = adapter_parameters(network)
    where = f"adapter.init_from: {config.init_from}"
    for layer, rank in adapter.ranks.items():
        if rank != config.rank:
            raise UserError(
                f"{where} has rank {rank} (at {layer}), adapter.rank is {config.rank}. "
                f"Set adapter.rank = {rank}, or start from another file."
            )
    unknown = adapter.state.keys() - parameters.keys()
    if unknown:
        raise UserError(
            f"{where} changes layers that adapter.targets leave out, for instance "
            f"{min(unknown).rsplit('.lora_', 1)[0]}. Widen adapter.targets."
        )
    ratio = adapter.scale / ((config.alpha or config.rank) / config.rank)
    state = {name: value * ratio if ".lora_B." in name else value for name, value in adapter.state.items()}
    load_adapter_state(network, adapter_state(network) | state)


def merge_adapter(network: nn.Module) -> None:
    """Fold every adapter into the base weights and take their layers away; the network is then an ordinary
    one."""
    from peft.tuners.lora import LoraLayer

    wrapped = [(name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)]
    for name, module in wrapped:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
