"""What a configuration wants of an adapter, checked before anything expensive: layers, layouts, the file to start from.

Networks lie on the meta device: nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kinema.adapters.files import read_adapter
from kinema.adapters.inject import check_start
from kinema.adapters.names import Names, to_original_layers
from kinema.adapters.state import LORA_A, LORA_B, MAGNITUDE, Adapter
from kinema.adapters.targets import LayerPlan, Modules, plan_layers
from kinema.config.layouts import LayoutName
from kinema.config.schema import AdapterConfig
from kinema.errors import UserError

Plans = dict[str, dict[str, LayerPlan]]


def check_adapter(
    config: AdapterConfig,
    layouts: Sequence[LayoutName],
    modules: Mapping[str, Modules],
    defaults: Mapping[str, Sequence[str]],
    names: Names,
) -> Plans:
    """What each layer of each part gets (see `plan_layers`). UserError for patterns that match nothing, layouts that
    cannot hold the adapter, a file to start from that does not fit."""
    plans = plan_layers(modules, config, defaults)
    for layout in layouts:
        if layout in ("comfyui", "kohya"):
            for part, plan in plans.items():
                try:
                    to_original_layers(planned(config, plan, modules[part], part), names)
                except UserError as error:
                    raise UserError(f"export.layouts: {layout}: {error}") from None
    if config.init_from is not None:
        for part, adapter in read_adapter(config.init_from, names, modules).adapters.items():
            check_start(config, adapter, plans[part])
    return plans


def planned(config: AdapterConfig, plan: Mapping[str, LayerPlan], modules: Modules, part: str) -> Adapter:
    """The adapter that training would begin with, on the meta device."""
    import torch
    from peft.tuners.lokr.layer import factorization

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    state: dict[str, Any] = {}
    for layer, one in plan.items():
        module: Any = modules[layer]
        out, inner, *kernel = getattr(module, "base_layer", module).weight.shape
        if config.type == "lokr":
            (a, b), (c, d) = (factorization(size, config.decompose_factor or -1) for size in (out, inner))
            state |= {f"{layer}.lokr_w1": empty(a, c), f"{layer}.lokr_w2": empty(b, d, *kernel)}
        elif config.type == "ia3":
            state[f"{layer}.ia3_l"] = empty(1, inner) if one.on_input else empty(out, 1)
        else:
            state |= {f"{layer}.{LORA_A}": empty(one.rank, inner, *kernel)}
            state |= {f"{layer}.{LORA_B}": empty(out, one.rank, *[1] * len(kernel))}
            state |= {f"{layer}.{MAGNITUDE}": empty(out)} if config.type == "dora" else {}
    ranks = {layer: one.rank for layer, one in plan.items()}
    alphas = {layer: one.alpha for layer, one in plan.items()}
    return Adapter(config.type, state, ranks, alphas, part)
