"""Adapter files in the layouts that other tools read.

- diffusers: ``transformer.<diffusers name>.lora_A.weight``, ranks and alphas in the header under
  ``lora_adapter_metadata``;
- comfyui: ``diffusion_model.<original name>.lora_A.weight``, and ``.alpha`` beside it where alpha is not the rank;
- kohya: ``lora_unet_<original name with underscores>.lora_down.weight``, always with ``.alpha``;
- peft: a directory of ``adapter_model.safetensors`` and ``adapter_config.json``.

DoRA's magnitudes are ``.dora_scale`` in the two in the middle, LoKr's factors have LyCORIS' names there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.adapters.arithmetic import exact_type
from kinema.adapters.factors import lokr_sizes
from kinema.adapters.inject import by_value
from kinema.adapters.names import Names, to_original_layers
from kinema.adapters.state import LORA_A, LORA_B, MAGNITUDE, Adapter
from kinema.config.layouts import LayoutName, why_not
from kinema.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for an adapter in a directory."""
HEADER = "lora_adapter_metadata"
"""Where diffusers keeps an adapter's configuration in the header of a safetensors file."""
PART = "kinema.part"
"""Where the header says which part of the model a file is for."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
_IN_BLOCKS = re.compile(r"\w*blocks\.\d+\.")


def by_file(adapters: Sequence[Adapter], layout: LayoutName, names: Names) -> list[list[Adapter]]:
    """Which adapters share a file: those of experts lie apart from each other, PEFT keeps all apart."""
    files: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        files.setdefault(adapter.part if layout == "peft" else names.expert(adapter.part), []).append(adapter)
    return list(files.values())


def save_adapter(
    path: Path,
    layout: LayoutName,
    adapters: Sequence[Adapter],
    names: Names,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write adapters of different parts of a model that share a file (see `by_file`).

    ``path`` is the file; of layout peft a directory. ``dtype``, if given, is that of the tensors. UserError for what
    the layout cannot hold.
    """
    for adapter in adapters:
        if reason := why_not(adapter.kind, layout):
            raise UserError(f"The layout {layout} cannot hold an adapter of type {adapter.kind}: {reason}.")
        if adapter.shifts and not (layout == "comfyui" and adapter.part.startswith("network")):
            raise UserError(
                f"The adapter also changes {len(adapter.shifts)} whole parameters, for instance {min(adapter.shifts)}, "
                f"which the layout {layout} cannot hold. Take comfyui, or `kinema merge` to fold it into a checkpoint."
            )
    if layout == "peft":
        (alone,) = adapters
        _save_peft(path, alone, metadata, dtype)
    else:
        _save_file(path, layout, adapters, names, metadata, dtype)


def _prefix(layout: LayoutName, part: str, names: Names) -> str:
    """How the names of a part's layers begin. ComfyUI reads text encoders under Kohya's names; diffusers' pipelines
    are told when they load which of two experts a file is for."""
    if layout == "diffusers":
        return f"{names.folder('network' if part.startswith('network') else part)}."
    if layout == "comfyui" and part.startswith("network"):
        return "diffusion_model."
    return f"{names.kohya_prefix(part)}_"


def _save_file(
    file: Path,
    layout: LayoutName,
    adapters: Sequence[Adapter],
    names: Names,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
) -> None:
    from safetensors.torch import save_file

    header = {"format": "pt", **metadata} | ({PART: adapters[0].part} if len(adapters) == 1 else {})
    tensors: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    for adapter in adapters:
        prefix = _prefix(layout, adapter.part, names)
        if layout == "diffusers":
            tensors |= {f"{prefix}{name}": value for name, value in adapter.to(dtype).state.items()}
            packed |= {f"{prefix}{key}": value for key, value in _diffusers_header(adapter).items()}
        elif prefix == "diffusion_model.":
            tensors |= comfyui_tensors(to_original_layers(adapter, names), dtype)
        else:
            tensors |= kohya_tensors(to_original_layers(adapter, names), prefix, dtype)
    if packed:  # elsewhere it must not stand: diffusers would apply alpha twice
        header[HEADER] = json.dumps(packed, sort_keys=True)
    if layout == "kohya":
        header |= _kohya_header(adapters[0])
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, header)


def comfyui_tensors(adapter: Adapter, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors of an adapter of original layers, by ComfyUI's names.

    ``.alpha`` is written where alpha is not the rank. Outside the blocks some importers refuse it (one of diffusers',
    0.42): there a factor carries the scale.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    for layer in adapter.layers:
        factors, alpha = adapter.factors(layer), lycoris_alpha(adapter, layer)
        if adapter.scale(layer) != 1 and (alpha is None or not _IN_BLOCKS.match(layer)):
            factors, alpha = _scaled(factors, adapter.scale(layer)), None
        tensors |= {f"diffusion_model.{layer}.{_word(key)}": value.to(dtype) for key, value in _dora(factors).items()}
        if alpha is not None and adapter.scale(layer) != 1:
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(alpha)
    for name, value in adapter.shifts.items():
        layer, _, which = name.rpartition(".")
        tensors[f"diffusion_model.{layer}.{'diff_b' if which == 'bias' else 'diff'}"] = value.to(dtype)
    return tensors


def kohya_tensors(adapter: Adapter, prefix: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors of an adapter of original layers, by Kohya's and LyCORIS' names."""
    import torch

    down_up = {LORA_A: "lora_down.weight", LORA_B: "lora_up.weight"}
    tensors: dict[str, Tensor] = {}
    for layer in adapter.layers:
        flat, factors = prefix + layer.replace(".", "_"), adapter.factors(layer)
        alpha = lycoris_alpha(adapter, layer)
        if alpha is None:
            factors, alpha = _scaled(factors, adapter.scale(layer)), 1.0
        for key, value in _dora(factors).items():
            tensors[f"{flat}.{down_up.get(key) or _word(key)}"] = value.to(dtype)
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    return tensors


def lycoris_alpha(adapter: Adapter, layer: str) -> float | None:
    """alpha as LyCORIS and ComfyUI read it: they divide it by the rank of the factors, and leave it out where both of
    LoKr's matrices are whole (None: the scale has to be in the factors)."""
    factors = adapter.factors(layer)
    inner = factors.get("lokr_w2_b", factors.get("lokr_w1_b", factors.get(LORA_A)))
    return None if inner is None else adapter.scale(layer) * inner.shape[0]


def _scaled(factors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The factors with the scale in one of them."""
    key = next(key for key in (LORA_B, "lokr_w1", "lokr_w1_a") if key in factors)
    scaled = factors[key].to(exact_type(factors[key].dtype)) * scale
    return dict(factors) if scale == 1 else {**factors, key: scaled}


def _dora(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Magnitudes as LyCORIS stores them: [out, 1, ...]."""
    return {
        key: value.reshape(-1, *[1] * (factors[LORA_A].ndim - 1)) if key == MAGNITUDE else value
        for key, value in factors.items()
    }


def _word(ending: str) -> str:
    return "dora_scale" if ending == MAGNITUDE else ending


def _diffusers_header(adapter: Adapter) -> dict[str, Any]:
    """The arguments of PEFT's configuration; only those that every version of it takes."""
    if adapter.kind == "lokr":
        return {**_lokr_config(adapter), "target_modules": adapter.layers}
    rank, ranks = by_value(adapter.ranks)
    alpha, alphas = by_value(adapter.alphas)
    header = {"r": rank, "lora_alpha": alpha, "target_modules": adapter.layers, "bias": "none"}
    header |= {"rank_pattern": ranks} if ranks else {}
    header |= {"alpha_pattern": alphas} if alphas else {}
    return header | ({"use_dora": True} if adapter.kind == "dora" else {})


def _lokr_config(adapter: Adapter) -> dict[str, Any]:
    """The arguments from which PEFT makes factors of just these shapes; UserError if there are none."""
    both = any(name.endswith(".lokr_w1_a") for name in adapter.state)
    factors = _decompose_factors(adapter, both)
    if not factors:
        raise UserError(
            "The LoKr factors have shapes that PEFT does not make, so that neither it nor diffusers could load them. "
            "Use the layout comfyui or kohya, or `kinema merge` to fold the adapter into a checkpoint."
        )
    (rank, rank_pattern), (alpha, alpha_pattern) = by_value(adapter.ranks), by_value(adapter.alphas)
    found = {"r": rank, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    return {**found, "decompose_factor": factors[0], "decompose_both": both}


def _decompose_factors(adapter: Adapter, both: bool) -> list[int]:
    """PEFT's ``decompose_factor`` (-1: near the square root) that gives every layer its shapes; none, or several."""
    from peft.tuners.lokr.layer import factorization

    def fits(layer: str, factor: int) -> bool:
        names, rank = adapter.factors(layer), adapter.ranks[layer]
        (a, c), (b, d) = lokr_sizes(names)
        kernels = (1,) if "lokr_w2" in names else (1, 3, 5, 7, 9, 25, 49)  # a product's d counts the kernel too
        return "lokr_t2" not in names and any(
            d % size == 0
            and factorization(a * b, factor) == (a, b)
            and factorization(c * d // size, factor) == (c, d // size)
            and ("lokr_w1_a" in names) == (both and rank < max(a, c) / 2)
            and ("lokr_w2_a" in names) == (rank < max(b, d // size) / 2)
            for size in kernels
        )

    candidates = {lokr_sizes(adapter.factors(layer))[0][0] for layer in adapter.layers}
    return [one for one in (-1, *sorted(candidates)) if all(fits(layer, one) for layer in adapter.layers)]


def _kohya_header(adapter: Adapter) -> dict[str, str]:
    """What Kohya's tools show of a network."""
    rank, alpha = (by_value(values)[0] for values in (adapter.ranks, adapter.alphas))
    module = "networks.lora" if adapter.kind == "lora" else "lycoris.kohya"
    header = {"ss_network_module": module, "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    algorithm = {"dora": {"algo": "locon", "dora_wd": "True"}, "lokr": {"algo": "lokr"}}.get(adapter.kind)
    return header | ({"ss_network_args": json.dumps(algorithm)} if algorithm else {})


def _save_peft(folder: Path, adapter: Adapter, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": metadata.get("kinema.base_model")}
    if adapter.kind == "ia3":
        on_input = "|".join(re.escape(layer) for layer in sorted(adapter.on_input))
        config |= {"peft_type": "IA3", "feedforward_modules": on_input or []}
    else:
        config |= {key: value for key, value in _diffusers_header(adapter).items() if key != "target_modules"}
        config["peft_type"] = "LOKR" if adapter.kind == "lokr" else "LORA"
    # One expression, matched in full: names of a list would match the ends of other layers' names too.
    config["target_modules"] = "|".join(re.escape(layer) for layer in adapter.layers)
    config["inference_mode"] = True
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {f"{PEFT_PREFIX}{name}": value.contiguous() for name, value in adapter.to(dtype).state.items()}
    save_file(tensors, folder / PEFT_FILE, {"format": "pt", **metadata, PART: adapter.part})


def file_metadata(
    *, title: str, base_model: str, architecture: str, config_hash: str | None = None, step: int | None = None
) -> dict[str, str]:
    """Header of a weight file: what tools show of it (https://github.com/Stability-AI/ModelSpec) and where it is from;
    of a training also the configuration and the step.

    A base model on this machine is named by its last component alone: paths say more than the reader should know.
    """
    from kinema import __version__

    base = Path(base_model).name if Path(base_model).expanduser().exists() else base_model
    facts = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.architecture": architecture,
        "modelspec.implementation": "kinema",
        "kinema.version": __version__,
        "kinema.base_model": base,
    }
    facts |= {} if config_hash is None else {"kinema.config_hash": config_hash}
    return facts | ({} if step is None else {"kinema.step": str(step)})
