"""Weight files: which of a directory hold a model, reading them without copying, telling what they are."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kinema.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
NETWORK_INSIDE = ("model.diffusion_model.", "diffusion_model.")
"""What the network's names begin with in files that hold a whole model."""
_FP8_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
"""ComfyUI's, Kijai's and musubi-tuner's name; ComfyUI's newer one; DeepSeek's, which multiplies too."""
_FP8_EXTRAS = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")
_OTHER_FORMATS = (".weight_scale_2", ".bitsandbytes__nf4", ".bitsandbytes__fp4", ".absmax", ".qweight")
"""Endings of names beside weights that lie packed: nvfp4, bitsandbytes, GPTQ."""

_SIGNS = (
    ("a LoRA or another adapter", r"lora_|\.lora\.|\.hada_|\.lokr_|\.diff(_b)?$"),
    ("a whole checkpoint with several parts", r"^first_stage_model\.|^cond_stage_model\."),
    ("an autoencoder", r"(^|\.)decoder\.(conv1|conv_in|up_blocks|upsamples|up)\."),
    ("a CLIP image encoder", r"^visual\.|^(vision_model\.)?embeddings\.class_embedding$"),
    ("a T5 text encoder", r"^encoder\.block\.\d+\.layer\.|^token_embedding\."),
    ("a diffusion network", r"(^|\.)(transformer_|double_|single_)?blocks\.\d+\."),
    ("an optimiser state", r"exp_avg|^optimizer"),
)


def looks_like(names: Iterable[str]) -> str:
    """What a file with these tensor names most likely holds, in words that follow "it looks like"."""
    names = list(names)
    for what, pattern in _SIGNS:
        if any(re.search(pattern, name) for name in names):
            return what
    return "something that kinema does not know"


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of the model in this directory, shards or one; safetensors first.

    Plain names win over variants (``model.fp16.safetensors``), bf16 over other variants. [] if there are none.
    UserError names a shard that is missing.
    """
    for suffix in (".safetensors", ".bin"):
        for stem in _STEMS:
            for index in _plain_first(directory.glob(f"{stem}{suffix}.index*.json")):
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                missing = [shard for shard in shards if not (directory / shard).is_file()]
                if missing:
                    raise UserError(
                        f"{directory}: {len(missing)} of {len(shards)} shards are missing, the first is "
                        f"{missing[0]}. Download them again; {index.name} lists them all."
                    )
                return [directory / shard for shard in shards]
            for file in _plain_first(directory.glob(f"{stem}*{suffix}")):
                return [file]
    return []


def _plain_first(files: Iterable[Path]) -> list[Path]:
    return sorted(files, key=lambda file: (file.name.count("."), ".bf16." not in file.name, file.name))


def read_tensors(files: Sequence[Path], inside: Sequence[str] = NETWORK_INSIDE) -> dict[str, Tensor]:
    """All tensors of these files, memory-mapped: nothing is read before it is used.

    Files other than safetensors are read with ``weights_only``: code in them is never run. Wrappers
    (``{"state_dict": ...}``) are opened. Of a file that holds a whole model, only the tensors are taken whose names
    begin with one of ``inside``, and that beginning is taken off.
    """
    return _below(_all_tensors(files), inside or NETWORK_INSIDE)


def tensor_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, as `read_tensors` names them; of safetensors the header alone is read, without torch."""
    return _below(_all_shapes(files), NETWORK_INSIDE)


def is_inside(file: Path, inside: Sequence[str]) -> bool:
    """Whether this file holds tensors whose names begin with one of these."""
    return any(name.startswith(tuple(inside)) for name in _all_shapes([file])) if inside else False


def _all_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(_read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file))
    return state


def _all_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    if any(file.suffix != ".safetensors" for file in files):
        return {name: tuple(value.shape) for name, value in _all_tensors(files).items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with file.open("rb") as opened:
                header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
            raise UserError(f"{file} has no safetensors header ({type(error).__name__}). {_advice(file)}") from None
    return shapes


def _below(state: dict[str, T], prefixes: Sequence[str]) -> dict[str, T]:
    """What lies below the first of these prefixes that there is, without it; all where there is none."""
    for prefix in prefixes:
        if any(name.startswith(prefix) for name in state):
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return state


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}). {_advice(file)}") from None


def _read_pickle(file: Path) -> dict[str, Tensor]:
    import torch

    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{file} holds more than tensors. Loading it could run code of its author, so kinema refuses. "
            "Use a .safetensors file, or convert this one where you trust it."
        ) from None
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read ({error}). {_advice(file)}") from None
    for key in ("state_dict", "model_state", "module", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not named tensors.")
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _advice(file: Path) -> str:
    with file.open("rb") as opened:
        if opened.read(40).startswith(b"version https://git-lfs"):
            return "It is a Git LFS pointer: run `git lfs pull` to fetch the file itself."
    return f"It has {file.stat().st_size} bytes; if the download broke off, fetch it again."


def undo_fp8_scaling(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Scaled float8 files: each weight times its scale, in ``dtype``, not made yet (`networks.unmade`); other files
    unchanged.

    Scales are for the matrix, for each row, for blocks of a row ([out, blocks, 1], musubi-tuner) or for tiles ([rows of
    tiles, columns of tiles], DeepSeek). UserError for files in formats that pack weights.
    """
    scales: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(_OTHER_FORMATS):
            raise UserError(
                f"The file has {name}: its weights are packed in a format that kinema does not read. Give the file in "
                'bf16, fp16 or float8; model.network.dtype = "nf4" or "int8" rounds it while it is loaded.'
            )
        for ending in _FP8_SCALES:
            if name.endswith(ending):
                scales[name.removesuffix(ending) + ".weight"] = value
    if not scales:
        return dict(state)
    from kinema.networks.unmade import Unmade

    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith((*_FP8_SCALES, *_FP8_EXTRAS)):
            continue
        if name in scales:
            result[name] = Unmade.of(partial(_rescaled, value, scales[name], dtype), value.shape, dtype)
        else:
            result[name] = value
    return result


def _rescaled(value: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (value.float() * _for_each(scale.float(), value)).to(dtype)


def _for_each(scale: Tensor, value: Tensor) -> Tensor:
    """A scale as one that multiplies every weight of a value."""
    if scale.ndim == value.ndim + 1 and scale.shape[-1] == 1:  # blocks of a row
        scale = scale.squeeze(-1)
    scale = scale.view(*scale.shape, *[1] * (value.ndim - scale.ndim))
    for dim, (size, whole) in enumerate(zip(scale.shape, value.shape, strict=True)):
        if size not in (1, whole):
            scale = scale.repeat_interleave(-(-whole // size), dim).narrow(dim, 0, whole)
    return scale
