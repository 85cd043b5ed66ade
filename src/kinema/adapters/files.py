"""Adapter files in the layouts that other tools read.

- diffusers: ``transformer.<diffusers name>.lora_A.weight``, alpha in the header under
  ``lora_adapter_metadata``;
- ComfyUI: ``diffusion_model.<original name>.lora_A.weight``, and ``.alpha`` beside it where alpha is not the
  rank;
- Kohya (read only): ``lora_unet_<original name with underscores>.lora_down.weight``.

PEFT's own files (``base_model.model.<name>``, alpha in ``adapter_config.json``) are read as well.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kinema.errors import UserError
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for an adapter in a directory."""
HEADER = "lora_adapter_metadata"
"""Where diffusers keeps an adapter's configuration in the header of a safetensors file."""
_PEFT_PREFIX = re.compile(r"(?:base_model\.model\.)?(?:(?:transformer|unet)\.)?")
_IN_BLOCKS = re.compile(r"\w*blocks\.\d+\.")


class Names(Protocol):
    """What a family knows about names (``Family`` has both)."""

    def to_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under the original layout's names."""

    def from_original(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights under diffusers' names."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read: every layer's update is ``scale`` B A, with scale = alpha / rank.

    ``state`` has diffusers names; ``rank`` is that of most layers (``ranks`` has each layer's own).
    """

    state: dict[str, Tensor]
    rank: int
    alpha: float
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each layer."""
        end = ".lora_A.weight"
        return {name.removesuffix(end): value.shape[0] for name, value in self.state.items() if name.endswith(end)}


def save_diffusers(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    metadata: Mapping[str, str],
    prefix: str = "transformer",
    dtype: torch.dtype | None = None,
) -> None:
    """Write the layout that diffusers' ``load_lora_weights`` and ``load_lora_adapter`` read.

    ``prefix`` is the network's name in the pipeline; ``dtype``, if given, that of the tensors. The header
    holds only keys that every version of peft takes.
    """
    from safetensors.torch import save_file

    layers = sorted({name.rsplit(".lora_", 1)[0] for name in state})
    header = {"r": rank, "lora_alpha": alpha, "target_modules": layers, "bias": "none"}
    packed = json.dumps({f"{prefix}.{key}": value for key, value in header.items()}, sort_keys=True)
    tensors = {f"{prefix}.{name}": value.to(dtype).contiguous() for name, value in state.items()}
    save_file(tensors, path, {"format": "pt", **metadata, HEADER: packed})


def save_comfyui(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    rank: int,
    alpha: float,
    names: Names,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    """Write the layout that ComfyUI reads, and diffusers' importers of original names.

    Outside the blocks some importers refuse ``.alpha`` (diffusers' for Wan, 0.42): there B carries the scale.
    The header must not hold ``lora_adapter_metadata``: diffusers would apply alpha twice.
    """
    import torch
    from safetensors.torch import save_file

    scale = alpha / rank
    tensors: dict[str, Tensor] = {}
    for name, value in names.to_original(state).items():
        layer, _, which = name.rpartition(".lora_")
        alpha_is_read = _IN_BLOCKS.match(layer) is not None
        factor = scale if which.startswith("B") and not alpha_is_read else 1.0
        tensors[f"diffusion_model.{name}"] = (value * factor).to(dtype).contiguous()
        if scale != 1 and alpha_is_read:
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path, {"format": "pt", **metadata})


def read_adapter(path: Path, names: Names, modules: Collection[str]) -> AdapterFile:
    """Read an adapter of any layout above for a network with these ``modules`` (diffusers names of its
    layers).

    ``path`` is a file or a directory that holds one. UserError for a file that is no LoRA, has parts that
    cannot be honoured, or belongs to another network.
    """
    file = _locate(path)
    tensors, metadata = _read_tensors(file)
    alphas = {
        name.removesuffix(".alpha"): float(tensors.pop(name)) for name in list(tensors) if name.endswith(".alpha")
    }
    factors = {_plain_ending(name): value for name, value in tensors.items()}
    strange = sorted(name for name in factors if not name.endswith((".lora_A.weight", ".lora_B.weight")))
    if strange or not factors:
        what = f"{len(strange)} tensors are none, for instance {strange[0]}" if strange else "it has no tensor"
        raise UserError(f"{file}: expected a LoRA of pairs lora_A, lora_B (or lora_down, lora_up), but {what}.")
    if all(name.startswith("lora_unet_") for name in factors):
        rename = _kohya_names(names, modules)
    elif any(name.startswith("diffusion_model.") for name in factors):
        rename = {layer: _diffusers_name(names, layer) for layer in _layers(factors)}
    else:
        rename = {layer: _PEFT_PREFIX.sub("", layer, count=1) for layer in _layers(factors)}
    known = set(modules)
    for layer in _layers(factors):
        if rename.get(layer) not in known:
            raise UserError(
                f"{file}: the network has no layer for {layer}"
                f"{did_you_mean(rename.get(layer, layer), modules)} Is the adapter made for another model?"
            )
    state = {
        f"{rename[layer]}.lora_{which}": value
        for name, value in factors.items()
        for layer, _, which in [name.rpartition(".lora_")]
    }
    own = {rename[layer]: alpha for layer, alpha in alphas.items() if layer in rename}
    return _one_scale(file, state, own or _header_alphas(file, state, metadata), metadata)


def _locate(path: Path) -> Path:
    """The adapter file at ``path``; UserError if there is none, or several."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: there is no such file. Expected an adapter (.safetensors) or a directory with one.")
    for folder in (path, path / "diffusers"):
        if (folder / DIFFUSERS_FILE).is_file():
            return folder / DIFFUSERS_FILE
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("comfyui/*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path}: expected one adapter file (.safetensors), found {found}. Name the file itself.")
    return files[0]


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the header's metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file}: no readable safetensors file ({error}). Is it complete?") from error


def _plain_ending(name: str) -> str:
    """Kohya's ``lora_down`` and ``lora_up`` are A and B."""
    return name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")


def _layers(factors: Mapping[str, Any]) -> list[str]:
    """The layers of a state, in its order."""
    return list(dict.fromkeys(name.rpartition(".lora_")[0] for name in factors))


def _diffusers_name(names: Names, layer: str) -> str:
    """A layer's diffusers name from its ComfyUI name; the family renames tensors, so one is made for it."""
    import torch

    plain = layer.removeprefix("diffusion_model.")
    (name,) = names.from_original({f"{plain}.lora_A.weight": torch.empty(0)})
    return name.removesuffix(".lora_A.weight")


def _kohya_names(names: Names, modules: Collection[str]) -> dict[str, str]:
    """Kohya's name -> diffusers name for every layer that both layouts have one of."""
    import torch

    table: dict[str, str] = {}
    for module in modules:
        (original,) = names.to_original({f"{module}.lora_A.weight": torch.empty(0)})
        table["lora_unet_" + original.removesuffix(".lora_A.weight").replace(".", "_")] = module
    return table


def _header_alphas(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, float]:
    """Alpha of each layer from diffusers' header or PEFT's ``adapter_config.json``; empty if neither is
    there."""
    beside = file.with_name("adapter_config.json")
    if HEADER in metadata:
        packed = json.loads(metadata[HEADER])
        config = {_PEFT_PREFIX.sub("", key, count=1): value for key, value in packed.items()}
    elif beside.is_file():
        config = json.loads(beside.read_text())
    else:
        return {}
    patterns = config.get("alpha_pattern") or {}
    alphas: dict[str, float] = {}
    for layer in _layers(state):
        fitting = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)]
        alphas[layer] = float((fitting or [config["lora_alpha"]])[0])
    return alphas


def _one_scale(
    file: Path, state: dict[str, Tensor], alphas: Mapping[str, float], metadata: dict[str, str]
) -> AdapterFile:
    """Bring all layers to the most common scale; the B of the others carries the difference."""
    ranks: dict[str, int] = {}
    for layer in _layers(state):
        a, b = state.get(f"{layer}.lora_A.weight"), state.get(f"{layer}.lora_B.weight")
        if a is None or b is None or a.shape[0] != b.shape[1]:
            raise UserError(f"{file}: {layer} lacks lora_A or lora_B, or their ranks differ. Is the file complete?")
        ranks[layer] = a.shape[0]
    scales = {layer: alphas.get(layer, rank) / rank for layer, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    scale = Counter(scales.values()).most_common(1)[0][0]
    for layer, own in scales.items():
        if own != scale:
            state[f"{layer}.lora_B.weight"] = state[f"{layer}.lora_B.weight"].float() * (own / scale)
    return AdapterFile(state, rank, scale * rank, metadata)


def file_metadata(*, title: str, base_model: str, architecture: str, config_hash: str, step: int) -> dict[str, str]:
    """Header of a weight file: what tools show of it (https://github.com/Stability-AI/ModelSpec) and where it
    is from.

    A base model on this machine is named by its last component alone: paths say more than the reader should
    know.
    """
    from kinema import __version__

    base = Path(base_model).name if Path(base_model).expanduser().exists() else base_model
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.architecture": architecture,
        "modelspec.implementation": "kinema",
        "kinema.version": __version__,
        "kinema.base_model": base,
        "kinema.config_hash": config_hash,
        "kinema.step": str(step),
    }
