"""Names of HunyuanImage-2.1's weights: diffusers' against those of the files that are passed around.

ComfyUI's names follow Flux (``double_blocks.0.img_attn.qkv``). Tencent's code has words of its own, once with fused
projections (``img_attn_qkv``; so in Comfy-Org's bf16 file), once with separate ones (``img_attn_q``; so in Tencent's
release). Two layouts and one renaming read all three.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kinema.families.layout import Fused, Layout, swapped_halves

if TYPE_CHECKING:
    from torch import Tensor

_EMBEDDERS = (
    ("time_guidance_embed.timestep_embedder", "time_in"),
    ("time_guidance_embed.timestep_embedder_r", "time_r_in"),
    ("time_guidance_embed.guidance_embedder", "guidance_in"),
    ("context_embedder.time_text_embed.timestep_embedder", "txt_in.t_embedder"),
)
_SAME_EVERYWHERE = (
    ("x_embedder.proj", "img_in.proj"),
    ("context_embedder.proj_in", "txt_in.input_embedder"),
    ("context_embedder_2.norm", "byt5_in.layernorm"),
    *((f"context_embedder_2.linear_{i}", f"byt5_in.fc{i}") for i in (1, 2, 3)),
    ("proj_out", "final_layer.linear"),
)
_REFINER = ("context_embedder.token_refiner.refiner_blocks.{}", "txt_in.individual_token_refiner.blocks.{}")
_DOUBLE = ("transformer_blocks.{}", "double_blocks.{}")
_SINGLE = ("single_transformer_blocks.{}", "single_blocks.{}")
_STREAMS = (
    ("norm_{}", "to_out.0", "ff", "norm1", "img"),
    ("norm_added_{}", "to_add_out", "ff_context", "norm1_context", "txt"),
)


def _within(blocks: tuple[str, str], pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f"{blocks[0]}.{ours}", f"{blocks[1]}.{theirs}") for ours, theirs in pairs]


def _qkv(blocks: tuple[str, str], theirs: str, projection: str) -> Fused:
    return Fused(f"{blocks[1]}.{theirs}", tuple(f"{blocks[0]}.attn.{projection.format(x)}" for x in "qkv"))


NETWORK = Layout(
    [
        *_SAME_EVERYWHERE,
        *((f"{ours}.linear_1", f"{theirs}.in_layer") for ours, theirs in _EMBEDDERS),
        *((f"{ours}.linear_2", f"{theirs}.out_layer") for ours, theirs in _EMBEDDERS),
        ("context_embedder.time_text_embed.text_embedder.linear_1", "txt_in.c_embedder.in_layer"),
        ("context_embedder.time_text_embed.text_embedder.linear_2", "txt_in.c_embedder.out_layer"),
        *_within(
            _REFINER,
            [
                ("norm1", "norm1"),
                ("norm2", "norm2"),
                ("attn.to_out.0", "self_attn.proj"),
                ("ff.net.0.proj", "mlp.0"),
                ("ff.net.2", "mlp.2"),
                ("norm_out.linear", "adaLN_modulation.1"),
            ],
        ),
        *(
            pair
            for norm, out, ff, modulation, stream in _STREAMS
            for pair in _within(
                _DOUBLE,
                [
                    (f"attn.{norm.format('q')}.weight", f"{stream}_attn.norm.query_norm.scale"),
                    (f"attn.{norm.format('k')}.weight", f"{stream}_attn.norm.key_norm.scale"),
                    (f"attn.{out}", f"{stream}_attn.proj"),
                    (f"{ff}.net.0.proj", f"{stream}_mlp.0"),
                    (f"{ff}.net.2", f"{stream}_mlp.2"),
                    (f"{modulation}.linear", f"{stream}_mod.lin"),
                ],
            )
        ),
        *_within(
            _SINGLE,
            [
                ("attn.norm_q.weight", "norm.query_norm.scale"),
                ("attn.norm_k.weight", "norm.key_norm.scale"),
                ("proj_out", "linear2"),
                ("norm.linear", "modulation.lin"),
            ],
        ),
    ],
    fused=[
        _qkv(_REFINER, "self_attn.qkv", "to_{}"),
        _qkv(_DOUBLE, "img_attn.qkv", "to_{}"),
        _qkv(_DOUBLE, "txt_attn.qkv", "add_{}_proj"),
        Fused(
            f"{_SINGLE[1]}.linear1",
            (*(f"{_SINGLE[0]}.attn.to_{x}" for x in "qkv"), f"{_SINGLE[0]}.proj_mlp"),
            (1, 1, 1, 4),
        ),
    ],
    changed=[swapped_halves("norm_out.linear", "final_layer.adaLN_modulation.1")],
)
"""diffusers' HunyuanImageTransformer2DModel against ComfyUI's names."""

_TO_COMFYUI = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"_attn_(qkv|proj)\.", r"_attn.\1."),
        (r"_attn_q_norm\.weight$", "_attn.norm.query_norm.scale"),
        (r"_attn_k_norm\.weight$", "_attn.norm.key_norm.scale"),
        (r"\.q_norm\.weight$", ".norm.query_norm.scale"),
        (r"\.k_norm\.weight$", ".norm.key_norm.scale"),
        (r"mlp\.fc1\.", "mlp.0."),
        (r"mlp\.fc2\.", "mlp.2."),
        (r"(_mod|modulation)\.linear\.", r"\1.lin."),
        (r"(_in|t_embedder)\.mlp\.0\.", r"\1.in_layer."),
        (r"(_in|t_embedder)\.mlp\.2\.", r"\1.out_layer."),
        (r"c_embedder\.linear_1\.", "c_embedder.in_layer."),
        (r"c_embedder\.linear_2\.", "c_embedder.out_layer."),
        (r"linear2\.fc\.", "linear2."),
    )
]
"""Tencent's words to ComfyUI's, whose own names they leave alone."""
_SEPARATE = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(double_blocks\.\d+)\.img_attn_([qkv])\.", r"\1.img_attn.qkv.\2."),
        (r"(double_blocks\.\d+)\.txt_attn_([qkv])\.", r"\1.txt_attn.qkv.\2."),
        (r"(single_blocks\.\d+)\.linear1_(q|k|v|mlp)\.", r"\1.linear1.\2."),
    )
]
"""Tencent's separate projections, as (fused layer).(which part)."""


def network_from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the network in any known layout to diffusers'."""
    if not any(name.startswith("double_blocks.") for name in state):
        return state
    return NETWORK.from_original(comfyui_names(state))


def comfyui_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network in any of the three under ComfyUI's names. HunyuanVideo-1.5's files are written in the same three."""
    return _fuse({_renamed(name, _TO_COMFYUI): value for name, value in state.items()})


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, new in rules:
        name = pattern.sub(new, name)
    return name


def _fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate projections put together as ComfyUI has them, in the order of their fused layer."""
    import torch

    parts: dict[str, dict[str, Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        fused = _renamed(name, _SEPARATE)
        if fused == name:
            result[name] = value
            continue
        layer, part, kind = fused.rsplit(".", 2)
        parts.setdefault(f"{layer}.{kind}", {})[part] = value
    for name, of_layer in parts.items():
        result[name] = torch.cat([of_layer[part] for part in ("q", "k", "v", "mlp") if part in of_layer])
    return result


_LEVELS, _RESNETS = 6, 2
"""Resolutions of the autoencoder, and residual blocks of each in the encoder; the decoder has one more."""


def _autoencoder_blocks() -> list[tuple[str, str]]:
    """diffusers has one list of residual blocks and resamplers; the original has a list for each resolution."""
    pairs = []
    for end, side, per_level in (("encoder", "down", _RESNETS), ("decoder", "up", _RESNETS + 1)):
        for level in range(_LEVELS):
            first = level * (per_level + 1)
            pairs += [(f"{end}.{side}_blocks.{first + i}", f"{end}.{side}.{level}.block.{i}") for i in range(per_level)]
            if level < _LEVELS - 1:
                pairs.append((f"{end}.{side}_blocks.{first + per_level}", f"{end}.{side}.{level}.{side}sample"))
        for i in (0, 1):
            pairs.append((f"{end}.mid_block.resnets.{i}", f"{end}.mid.block_{i + 1}"))
        for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("proj", "proj_out"), ("norm", "norm")):
            pairs.append((f"{end}.mid_block.attentions.0.{ours}", f"{end}.mid.attn_1.{theirs}"))
        pairs += [(f"{end}.{name}", f"{end}.{name}") for name in ("conv_in", "norm_out", "conv_out")]
    return pairs


AUTOENCODER = Layout(_autoencoder_blocks())
"""diffusers' AutoencoderKLHunyuanImage against ``vae_2_1/pytorch_model.ckpt``, which ComfyUI's file follows."""


def autoencoder_from_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the autoencoder in any known layout to diffusers'. Tencent's kernels have a time axis of length 1."""
    flat = {name: value.squeeze(2) if value.ndim == 5 else value for name, value in state.items()}
    return AUTOENCODER.from_original(flat)
