"""Adapters on a network that trains, made through peft; and adapters folded into a network's weights.

A fresh adapter changes nothing, and its weights depend on the seed and the layer's name alone. Names of its weights are
those of diffusers and PEFT: ``blocks.0.attn1.to_q.lora_A.weight``.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kinema.adapters.arithmetic import merged_weight
from kinema.adapters.state import IA3, LORA_A, LORA_B, MAGNITUDE, Adapter, split_name
from kinema.adapters.targets import LayerPlan, adaptable_modules, plan_layers
from kinema.config.layouts import AdapterType
from kinema.config.schema import AdapterConfig
from kinema.dtypes import torch_dtype
from kinema.errors import UserError
from kinema.randomness import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SLOT = "default"
"""peft's name of the adapter that trains."""
_ZERO = (LORA_B, "lokr_w2", "lokr_w2_b")
"""Factors that start at zero, so that a fresh adapter changes nothing; the others start from random values."""


def add_adapter(network: nn.Module, config: AdapterConfig, targets: Sequence[str], seed: int) -> list[str]:
    """Put a fresh adapter on the layers that the patterns choose; freeze everything else. Names of those layers.

    ``targets``: the family's patterns, for a configuration without its own. torch's global generator is left as it
    was. UserError if a pattern matches nothing.
    """
    plan = plan_layers({"network": adaptable_modules(network)}, config, {"network": targets})["network"]
    add_planned(network, config, plan, seed)
    return list(plan)


def add_planned(network: nn.Module, config: AdapterConfig, plan: Mapping[str, LayerPlan], seed: int) -> None:
    """`add_adapter` for layers chosen already."""
    import torch
    from peft import inject_adapter_in_model

    network.requires_grad_(False)
    # Constructing layers draws, and must not move the global generator.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(_peft_config(config, plan), network, adapter_name=SLOT)
    _initialise(network, seed, torch_dtype(config.dtype))
    for parameter in adapter_parameters(network).values():
        parameter.requires_grad_(True)


def leave_casts_to_autocast(network: nn.Module, config: AdapterConfig) -> None:
    """The inputs of an adapted layer go into its factors as they are, of a network that runs under autocast alone.

    peft casts them to the factors' type, and autocast casts them back: the same bits, but a copy in between, and one
    for every layer that the backward pass keeps beside the input itself. DoRA takes norms in the type of its input.
    """
    if config.type in ("lora", "lokr"):
        for module in network.modules():
            if hasattr(module, "cast_input_dtype_enabled") or hasattr(module, "lokr_w1"):
                module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def _peft_config(config: AdapterConfig, plan: Mapping[str, LayerPlan]) -> Any:
    import peft

    common: dict[str, Any] = {"target_modules": "|".join(re.escape(name) for name in plan)}
    if config.type == "ia3":
        on_input = "|".join(re.escape(name) for name, layer in plan.items() if layer.on_input)
        return peft.IA3Config(**common, feedforward_modules=on_input or [])
    common["r"], common["rank_pattern"] = by_value({name: layer.rank for name, layer in plan.items()})
    alpha, common["alpha_pattern"] = by_value({name: layer.alpha for name, layer in plan.items()})
    if config.type == "lokr":
        return peft.LoKrConfig(
            **common,
            alpha=alpha,
            rank_dropout=config.rank_dropout,
            decompose_factor=config.decompose_factor or -1,
            decompose_both=config.decompose_both,
            init_weights=False,
        )
    return peft.LoraConfig(
        **common,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        use_dora=config.type == "dora",
        init_lora_weights=False,
    )


def by_value(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and PEFT's table of patterns for the layers with another one, a pattern for each value."""
    usual = Counter(values.values()).most_common(1)[0][0]
    others: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != usual:
            others.setdefault(value, []).append(re.escape(name))
    return usual, {f"^(?:{'|'.join(names)})": value for value, names in others.items()}


def _initialise(network: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Random factors: Kaiming uniform with a = sqrt(5), as in the code of LoRA's and LoKr's authors, which for A is
    U(-1, 1) / sqrt(fan in). DoRA's magnitudes: the norms of the base weight, so that it changes nothing."""
    import torch

    for name, parameter in adapter_parameters(network).items():
        layer, ending = split_name(name)
        if ending == MAGNITUDE:
            value = _norms(network.get_submodule(layer), dtype)
        elif ending == IA3:
            value = torch.ones(parameter.shape)
        else:
            value = torch.zeros(parameter.shape)
            if ending not in _ZERO:
                key = (seed, layer, "adapter") if ending == LORA_A else (seed, layer, "adapter", ending)
                torch.nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator(*key))
        parameter.data = value.to(parameter.device, dtype)


def _norms(layer: Any, dtype: torch.dtype) -> Tensor:
    """As peft's forward computes them where the update is zero, in the adapter's type, so that their ratio is 1."""
    from kinema.networks.mapped import value

    weight = value(layer.get_base_layer(), "weight").to(dtype)
    return layer.lora_magnitude_vector[SLOT].get_weight_norm(weight, weight.new_zeros(()), 1.0)


_IN_PEFT = re.compile(
    rf"\.(?:(lora_[AB])\.{SLOT}(\.weight)|(lora_magnitude_vector)\.{SLOT}\.weight|(lokr_\w+|ia3_l)\.{SLOT})$"
)


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's weights by their diffusers names: ``x.lora_A.default.weight`` is ``x.lora_A.weight``."""
    found = {}
    for name, parameter in network.named_parameters():
        if ours := diffusers_name(name):
            found[ours] = parameter
    return found


def diffusers_name(name: str) -> str | None:
    """diffusers' name of an adapter's parameter by that of the network; None for other parameters."""
    match = _IN_PEFT.search(name)
    return f"{name[: match.start()]}.{''.join(group or '' for group in match.groups())}" if match else None


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights by their diffusers names, sharing memory with the network."""
    return {name: parameter.detach() for name, parameter in adapter_parameters(network).items()}


def adapter_of(network: nn.Module, part: str = "network") -> Adapter:
    """The adapter on a network, sharing memory with it."""
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.tuners_utils import BaseTunerLayer

    state = adapter_state(network)
    endings = {split_name(name)[1] for name in state}
    kind: AdapterType = "lokr" if any(ending.startswith("lokr") for ending in endings) else "lora"
    kind = "dora" if MAGNITUDE in endings else "ia3" if IA3 in endings else kind
    ranks, alphas, on_input = {}, {}, set()
    for name, module in network.named_modules():
        if isinstance(module, IA3Layer):
            if module.is_feedforward:
                on_input.add(name)
        elif isinstance(module, BaseTunerLayer):
            layer: Any = module
            ranks[name] = layer.r[SLOT]
            alphas[name] = float((layer.alpha if kind == "lokr" else layer.lora_alpha)[SLOT])
    return Adapter(kind, state, ranks, alphas, part, frozenset(on_input))


def load_adapter_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into the adapter on the network. UserError where names or shapes do not agree."""
    import torch

    parameters = adapter_parameters(network)
    missing, unknown = parameters.keys() - state.keys(), state.keys() - parameters.keys()
    if missing or unknown:
        raise UserError(
            f"The adapter's weights do not fit the network: {len(missing)} missing, {len(unknown)} unknown, "
            f"for instance {min(missing | unknown)}. Check the table [adapter] and the base model."
        )
    for name, parameter in parameters.items():
        if parameter.shape != state[name].shape:
            raise UserError(
                f"The adapter's {name} has shape {tuple(state[name].shape)}, expected {tuple(parameter.shape)}. "
                "Check the table [adapter] (rank, decompose_factor, input_targets) and the base model."
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def check_start(config: AdapterConfig, adapter: Adapter, plan: Mapping[str, LayerPlan]) -> None:
    """UserError if training with this configuration cannot start from a saved adapter (``adapter.init_from``): another
    type or rank, layers that are not adapted."""
    where = f"adapter.init_from: {config.init_from}"
    if adapter.kind != config.type:
        raise UserError(
            f'{where} is of type {adapter.kind}, adapter.type is "{config.type}". Set adapter.type = "{adapter.kind}".'
        )
    unknown = set(adapter.layers) - set(plan)
    if unknown:
        raise UserError(
            f"{where} changes layers that the configuration leaves out, for instance {min(unknown)}. "
            "Widen adapter.targets, or take a pattern out of adapter.exclude."
        )
    if adapter.shifts:
        raise UserError(
            f"{where} also changes {len(adapter.shifts)} whole parameters, for instance {min(adapter.shifts)}, which "
            "no adapter of kinema trains. Fold it into the base with `kinema merge`, and train on the result."
        )
    for layer in adapter.layers:
        if adapter.kind in ("lora", "dora") and adapter.ranks[layer] != plan[layer].rank:
            raise UserError(
                f"{where} has rank {adapter.ranks[layer]} (at {layer}), the configuration gives it {plan[layer].rank}. "
                f"{_rank_advice(adapter)}, or start from another file."
            )
        if (layer in adapter.on_input) != plan[layer].on_input:
            side = "output" if plan[layer].on_input else "input"
            raise UserError(f"{where} multiplies the {side} of {layer}. Make adapter.input_targets agree with it.")


def start_from(network: nn.Module, config: AdapterConfig, adapter: Adapter) -> None:
    """Copy a saved adapter into the fresh one (``adapter.init_from``), keeping the function that it computes.

    Layers that the file lacks keep their fresh weights. Layers with another alpha are rescaled through the factor that
    starts at zero. UserError if it does not fit (`check_start`).
    """
    fresh = adapter_of(network)
    plan = {
        layer: LayerPlan(fresh.ranks.get(layer, 0), fresh.alphas.get(layer, 0.0), layer in fresh.on_input)
        for layer in fresh.layers
    }
    check_start(config, adapter, plan)
    state = dict(fresh.state)
    for name, value in adapter.state.items():
        layer, ending = split_name(name)
        ratio = adapter.scale(layer) / fresh.scale(layer) if ending in _ZERO else 1.0
        state[name] = value if ratio == 1 else value.float() * ratio
    load_adapter_state(network, state)


def _rank_advice(adapter: Adapter) -> str:
    usual, others = by_value(adapter.ranks)
    advice = f"Set adapter.rank = {usual}"
    return f"{advice}, and adapter.rank_patterns for the layers of rank {set(others.values())}" if others else advice


def fold_adapter(network: nn.Module, adapter: Adapter, factor: float = 1.0) -> None:
    """Fold a saved adapter into the weights of a network, ``factor`` of the way; several add up."""
    import torch

    with torch.no_grad():
        for layer in adapter.layers:
            wrapped = hasattr(network.get_submodule(layer), "base_layer")
            module = _plain(network, f"{layer}.base_layer" if wrapped else layer)
            merged = merged_weight(module.weight, module.bias, adapter, layer, factor)
            for parameter, value in zip((module.weight, module.bias), merged, strict=False):
                parameter.data = value
        parameters = dict(network.named_parameters()) if adapter.shifts else {}
        for name, shift in adapter.shifts.items():
            parameter = parameters[shifted(name, shift, parameters)]
            parameter += factor * shift.to(parameter.device)


def shifted(name: str, shift: Tensor, parameters: Mapping[str, Tensor]) -> str:
    """The parameter that a shift is added to: files do not tell weights of layers from parameters of their own.
    UserError unless the network has it, of this shape."""
    found = name if name in parameters else name.removesuffix(".weight")
    if found not in parameters or parameters[found].shape != shift.shape:
        there = f"that of the network is {list(parameters[found].shape)}" if found in parameters else "there is none"
        raise UserError(
            f"The adapter changes {name} {list(shift.shape)}, and {there}. Is it made for another model, or for "
            "another size of it?"
        )
    return found


def _plain(network: nn.Module, name: str) -> Any:
    """A layer whose weight can be changed: one that is stored in fewer bits becomes an ordinary one, in place."""
    from kinema.networks.quantized import QuantizedLinear

    module = network.get_submodule(name)
    if isinstance(module, QuantizedLinear):
        module = module.plain()
        network.set_submodule(name, module)
    return module


def merge_adapter(network: nn.Module) -> None:
    """Fold the adapter that trains into the base weights and take its layers away; the network is then an ordinary
    one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    fold_adapter(network, adapter_of(network))
    wrapped = [(name, module) for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in wrapped:
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module.get_base_layer())
    if hasattr(network, "peft_config"):
        del network.peft_config
