"""What devices do to a step and the meta device does not: fused attention, and autocast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from kinema.config.memory import OfBlock
from kinema.memory.checkpointing import in_same_modes, parts_of, selective_contexts
from kinema.memory.dry_run import ATTENTION, DryRun

Rules = Literal["cuda", "cpu"]


class DryArithmetic(TorchFunctionMode):
    """Inside, attention is fused: it keeps its inputs, its output and one number a row for the backward pass. With
    ``compute`` other than float32, autocast to it by the ``rules`` of a device, without its cache of cast weights,
    whose bytes ``casts`` counts. ``attention`` counts the bytes of queries, keys, values and results where tokens
    attend to each other."""

    def __init__(self, run: DryRun, compute: torch.dtype = torch.float32, rules: Rules = "cuda") -> None:
        super().__init__()
        self.run = run
        self.compute = compute
        self.raised = _RAISED[rules]
        self.casts = 0
        self.attention = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What runs inside is computed so; networks that ask whether autocast is on are told."""
        asked, asked_type = torch.is_autocast_enabled, torch.get_autocast_dtype
        torch.is_autocast_enabled = lambda *_: self.compute != torch.float32  # torch answers for no meta device
        torch.get_autocast_dtype = lambda _: self.compute
        try:
            with self:
                yield
        finally:
            torch.is_autocast_enabled, torch.get_autocast_dtype = asked, asked_type

    @contextmanager
    def checkpointed(self, blocks: Iterable[nn.Module], kind: OfBlock = True) -> Iterator[None]:
        """Inside, activation checkpointing of these blocks. They run again in the backward pass, where torch would let
        go of this mode."""
        modules = [one for block in blocks for one in (*(parts_of(block) if kind == "nested" else ()), block)]
        given = [(module, vars(module).get("forward")) for module in modules]

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            first, again = selective_contexts() if kind == "selective" else (nullcontext(), nullcontext())
            return first, _both(again, in_same_modes()[1])

        for module, _ in given:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False, context_fn=contexts)
        try:
            yield
        finally:
            for module, own in given:
                if own is None:
                    del module.forward
                else:  # that of sequence parallel
                    module.forward = own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.compute != torch.float32:
            if name in _LOWER:
                args, kwargs = (tree_map(self._lowered, one) for one in (args, kwargs))
            elif name in self.raised:
                args, kwargs = (tree_map(_raised, one) for one in (args, kwargs))
        if name == "scaled_dot_product_attention":
            output = _attention(*args, **kwargs)
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            if given["query"].shape[-2] == given["key"].shape[-2]:
                self.attention += output.nbytes + sum(given[one].nbytes for one in ("query", "key", "value"))
            return output
        if name == "tolist":
            return self.run.value(args[0]).tolist()
        return func(*args, **kwargs)

    def _lowered(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in _FLOATS or value.dtype == self.compute:
            return value
        cast = value.to(self.compute)
        self.casts += cast.nbytes if value.requires_grad and value.is_leaf else 0
        return cast


@contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Iterator[None]:
    with one, other:
        yield


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _SHORT else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    shape = query.shape
    query, key, value = (one.reshape(-1, *one.shape[-3:]) for one in (query, key, value))
    if attn_mask is not None and attn_mask.ndim > 4:
        attn_mask = attn_mask.reshape(-1, *attn_mask.shape[-3:])
    output = ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return output.view(*shape[:-1], output.shape[-1])


_SHORT = (torch.bfloat16, torch.float16)
_FLOATS = (torch.float32, *_SHORT)
_IN_COMPUTE_TYPE = """
linear matmul __matmul__ __rmatmul__ mm bmm addmm addmv addbmm baddbmm mv chain_matmul einsum bilinear prelu
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention
"""
_IN_FLOAT32_ON_GPUS = """
acos asin cosh exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ softplus layer_norm
group_norm norm cosine_similarity mse_loss l1_loss smooth_l1_loss huber_loss softmax log_softmax cumsum cumprod prod
sum logsumexp cdist interpolate
"""
_IN_FLOAT32_ON_CPUS = "prod cdist mse_loss l1_loss smooth_l1_loss huber_loss"
"""The lists are those of torch's autocast (aten/src/ATen/autocast_mode.h and .cpp), as far as networks use them."""
_LOWER = frozenset(_IN_COMPUTE_TYPE.split())
_RAISED: Mapping[Rules, frozenset[str]] = {
    "cuda": frozenset(_IN_FLOAT32_ON_GPUS.split()),
    "cpu": frozenset(_IN_FLOAT32_ON_CPUS.split()),
}
