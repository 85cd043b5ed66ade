"""Attention by kernels of other packages, through the dispatcher of diffusers.

It is taken hold of where every network's ends, at ``torch.nn.functional.scaled_dot_product_attention``, while a block
runs. So it serves networks with attention of any kind, and under sequence parallel the tokens of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from kinema.config.schema import SamplingAttention, TrainingAttention
from kinema.errors import ConfigError, UserError
from kinema.suggest import did_you_mean

if TYPE_CHECKING:
    from diffusers.models.attention_dispatch import AttentionBackendName

KERNELS: dict[SamplingAttention, str] = {
    "cudnn": "_native_cudnn",
    "flash": "flash",
    "flash_hub": "flash_hub",
    "flash3": "_flash_3",
    "flash3_hub": "_flash_3_hub",
    "xformers": "xformers",
    "sage": "sage",
    "sage_hub": "sage_hub",
}
"""The dispatcher's names."""
_INSTALL: dict[SamplingAttention, str] = {
    "flash": "Install flash-attn (a wheel for this torch and CUDA saves building it), or take flash_hub, which needs "
    "no building",
    "flash3": "Install flash_attn_interface, which is built from source, or take flash3_hub, which needs no building",
    "xformers": "pip install xformers (the release for this torch)",
    "sage": "pip install sageattention, or take sage_hub, which needs no building",
}
_IN_32_BITS = ("xformers",)
"""Kernels that compute in fp32 too."""


def check_attention(
    name: str, key: str, device: torch.device, dtype: torch.dtype, *, trains: bool, deterministic: bool = False
) -> None:
    """ConfigError if attention of this name cannot be had here; ``key`` is what the user calls it. Loads the kernel's
    package, and fetches those of the hub."""
    known = tuple(get_args(TrainingAttention)) + tuple(_only_forward())
    if name not in known:
        raise UserError(f"{key} {name}: expected one of {', '.join(known)}{did_you_mean(name, known)}")
    if name == "sdpa":
        return
    without = f"Leave {key} out for torch's own kernels."
    if trains and name in _only_forward():
        raise ConfigError(f"{key}: {name} has no backward pass: it is for sampling. {without}")
    if device.type != "cuda":
        raise ConfigError(f"{key}: {name} runs on NVIDIA GPUs, and this is {device.type}. {without}")
    if dtype == torch.float32 and name not in _IN_32_BITS:
        raise ConfigError(f"{key}: {name} computes in bf16 or fp16, and this run computes in fp32. {without}")
    if deterministic:
        raise ConfigError(
            f"{key}: {name} adds up gradients in another order each time, and run.deterministic = true wants the same. "
            f"{without}"
        )
    from diffusers.models.attention_dispatch import (
        _check_attention_backend_requirements,
        _maybe_download_kernel_for_backend,
    )

    try:
        _check_attention_backend_requirements(_kernel(KERNELS[name]))  # type: ignore[index]
    except RuntimeError:
        how = _INSTALL.get(name, "pip install -U kernels")  # type: ignore[call-overload]
        raise ConfigError(f"{key}: {name} is not installed. {how}. {without}") from None
    try:
        _maybe_download_kernel_for_backend(_kernel(KERNELS[name]))  # type: ignore[index]
    except Exception as error:  # of the hub, of the loader, of a kernel that is not made for this torch
        raise ConfigError(
            f"{key}: the kernel of {name} cannot be fetched from the hub, or not be loaded here "
            f"({type(error).__name__}: {error}). {without}"
        ) from error


def attend_with(blocks: Mapping[str, nn.ModuleList], name: SamplingAttention) -> None:
    """Let the attention of a family's lists of blocks be that of this name, in place.

    Call it after sequence parallel and before activation checkpointing. Blocks get a ``forward`` of their own; names of
    modules and parameters stay as they are.
    """
    if name == "sdpa":
        return
    kernel = _kernel(KERNELS[name])
    for group in blocks.values():
        for block in group:
            block.forward = MethodType(_attending(block.forward.__func__, kernel), block)  # type: ignore[union-attr]


def _attending(forward: Callable[..., Any], kernel: AttentionBackendName) -> Callable[..., Any]:
    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Attention(kernel):
            return forward(block, *args, **kwargs)

    return run


class _Attention(TorchFunctionMode):
    """While it is in force, attention is a kernel's, but for what has a mask or fp32 that the kernel lacks."""

    def __init__(self, kernel: AttentionBackendName) -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attend(self.kernel, *args, **(kwargs or {}))


def _attend(
    kernel: AttentionBackendName,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch's function of this name, [B, H, L, D]. Kernels have it as [B, L, H, D]."""
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as torch's would
        query, key, value = (one.to(torch.get_autocast_dtype(device)) for one in (query, key, value))
    short = query.dtype != torch.float32 or kernel.value in _IN_32_BITS
    if attn_mask is not None or dropout_p > 0 or query.ndim != 4 or not short:
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    output: Tensor = dispatch_attention_fn(
        query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa, backend=kernel
    )
    return output.transpose(1, 2)


def _only_forward() -> list[str]:
    """Kernels that are for sampling alone."""
    return [name for name in KERNELS if name not in get_args(TrainingAttention)]


def _kernel(name: str) -> AttentionBackendName:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName(name)
