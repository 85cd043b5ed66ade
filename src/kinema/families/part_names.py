"""Tensor names of parts that many families share: every layout that they are passed around in, to ours."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kinema.families.layout import Changed, Fused, Layout
from kinema.families.names import NameMap

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]

_LEVELS = 4
"""Resolutions of the picture autoencoders; the original counts those of the decoder from the last one."""

AUTOENCODER_KL = Layout(
    [
        *((name, name) for name in ("quant_conv", "post_quant_conv", "encoder.conv_in", "encoder.conv_out")),
        *((name, name) for name in ("decoder.conv_in", "decoder.conv_out")),
        ("encoder.conv_norm_out", "encoder.norm_out"),
        ("decoder.conv_norm_out", "decoder.norm_out"),
        ("encoder.down_blocks.{}.resnets.{}", "encoder.down.{}.block.{}"),
        ("encoder.down_blocks.{}.resnets.{}.conv_shortcut", "encoder.down.{}.block.{}.nin_shortcut"),
        ("encoder.down_blocks.{}.downsamplers.0", "encoder.down.{}.downsample"),
        *(
            pair
            for ours, theirs in ((level, _LEVELS - 1 - level) for level in range(_LEVELS))
            for pair in (
                (f"decoder.up_blocks.{ours}.resnets.{{}}", f"decoder.up.{theirs}.block.{{}}"),
                (
                    f"decoder.up_blocks.{ours}.resnets.{{}}.conv_shortcut",
                    f"decoder.up.{theirs}.block.{{}}.nin_shortcut",
                ),
                (f"decoder.up_blocks.{ours}.upsamplers.0", f"decoder.up.{theirs}.upsample"),
            )
        ),
        *(
            pair
            for end in ("encoder", "decoder")
            for pair in (
                (f"{end}.mid_block.resnets.0", f"{end}.mid.block_1"),
                (f"{end}.mid_block.resnets.1", f"{end}.mid.block_2"),
                (f"{end}.mid_block.attentions.0.group_norm", f"{end}.mid.attn_1.norm"),
            )
        ),
    ],
    changed=[
        # Linear layers that the original writes as 1 x 1 convolutions; biases are [C] in both.
        Changed(
            f"{end}.mid_block.attentions.0.{ours}",
            f"{end}.mid.attn_1.{theirs}",
            lambda value: value[..., None, None] if value.ndim == 2 else value,
            lambda value: value.flatten(1) if value.ndim == 4 else value,
            rows=False,
        )
        for end in ("encoder", "decoder")
        for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
    ],
)
"""diffusers' AutoencoderKL against the latent-diffusion original (``ae.safetensors``, ``sdxl_vae.safetensors``)."""

_OLD_ATTENTION = NameMap(
    [
        (f"{end}.mid_block.attentions.0.{new}", f"{end}.mid_block.attentions.0.{old}")
        for end in ("encoder", "decoder")
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    ]
)
"""Names that diffusers itself wrote before 0.17."""

OPEN_CLIP = Layout(
    [
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        *(
            (f"text_model.encoder.layers.{{}}.{ours}", f"transformer.resblocks.{{}}.{theirs}")
            for ours, theirs in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("self_attn.out_proj", "attn.out_proj"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
            )
        ),
        ("text_model.final_layer_norm", "ln_final"),
    ],
    fused=[
        Fused(
            f"transformer.resblocks.{{}}.attn.in_proj_{kind}",
            tuple(f"text_model.encoder.layers.{{}}.self_attn.{x}_proj.{kind}" for x in "qkv"),
        )
        for kind in ("weight", "bias")
    ],
    changed=[
        Changed("text_projection.weight", "text_projection", lambda value: value.T, lambda value: value.T, rows=False),
    ],
    dropped=["attn_mask", "logit_scale"],
)
"""transformers' CLIPTextModelWithProjection against OpenCLIP, whose names single SDXL checkpoints have for CLIP-G."""


def autoencoder_kl(state: State) -> State:
    """Names of an AutoencoderKL to diffusers'."""
    return AUTOENCODER_KL.from_original(_OLD_ATTENTION.restore_all(state))


def wan_autoencoder(state: State) -> State:
    """Names of ``Wan2.1_VAE.pth`` (ComfyUI's files of Wan and Qwen-Image have the same), or diffusers' own, to
    diffusers'."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    return convert_wan_vae_to_diffusers(state) if "encoder.conv1.weight" in state else state


def clip_text(state: State) -> State:
    """Names of a CLIP text encoder to those of transformers' CLIPTextModel: transformers' own of any version, with or
    without the image encoder beside it, or OpenCLIP's."""
    return {name.removeprefix("text_model."): value for name, value in _clip(state).items() if "projection" not in name}


def clip_text_projected(state: State) -> State:
    """The same for CLIPTextModelWithProjection.

    Files without a projection (Stability's and ComfyUI's ``clip_l.safetensors``) mean the identity.
    """
    import torch

    result = _clip(state)
    norm = result.get("text_model.final_layer_norm.weight")
    if norm is not None and "text_projection.weight" not in result:
        result["text_projection.weight"] = torch.eye(len(norm), dtype=norm.dtype)
    return result


def _clip(state: State) -> State:
    result = {}
    for name, value in OPEN_CLIP.from_original(state).items():
        if name == "text_projection.weight":
            result[name] = value
        elif not name.startswith(("vision_model.", "visual")) and name != "logit_scale" and "position_ids" not in name:
            result[f"text_model.{name.removeprefix('text_model.')}"] = value
    return result


def t5(state: State) -> State:
    """Names of a T5, UMT5 or ByT5 encoder to transformers': its own with or without the alias of the embedding, with
    the tokenizer inside (ComfyUI), or Glyph's ``byt5_model.pt``."""
    state = {name.removeprefix("module.text_tower."): value for name, value in state.items()}
    if "block.0.layer.0.layer_norm.weight" in state:
        state = {f"encoder.{name}": value for name, value in state.items()}
    result = {name: value for name, value in state.items() if name.startswith(("shared.", "encoder."))}
    if "shared.weight" not in result and "encoder.embed_tokens.weight" in result:
        result["shared.weight"] = result["encoder.embed_tokens.weight"]
    return result or state


def decoder(state: State) -> State:
    """Names of a language model (Llama, Qwen, Gemma), however deep it lies in a larger one, to those of its bare
    transformers class (``LlamaModel``...): the output layer, image encoders and tokenizers are left out."""
    place = _language_model(state)
    if place is None:
        return state
    parts = ("embed_tokens.", "layers.", "norm.")
    return {
        name.removeprefix(place): value
        for name, value in state.items()
        if name.startswith(place) and name.removeprefix(place).startswith(parts)
    }


def causal_decoder(state: State) -> State:
    """The same for a class with an output layer (``LlamaForCausalLM``).

    Files for diffusion models may leave that layer out, as nothing reads it; the embedding then stands in its place.
    """
    if _language_model(state) is None:
        return state
    inner = decoder(state)
    heads = [value for name, value in state.items() if re.search(r"(^|\.)lm_head\.weight$", name)]
    head = heads[0] if heads else inner["embed_tokens.weight"]
    return {**{f"model.{name}": value for name, value in inner.items()}, "lm_head.weight": head}


def qwen_vl(state: State) -> State:
    """Names of Qwen2.5-VL: transformers' of any version (``model.layers`` and ``visual``, or ``model.language_model``
    and ``model.visual``), which ComfyUI's file has too, to those of transformers 5."""
    if _language_model(state) is None:
        return state
    language = causal_decoder(state)
    result = {
        name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1): value
        for name, value in language.items()
    }
    for name, value in state.items():
        if match := re.match(r"(?:.*\.)?visual\.(.*)", name):
            result[f"model.visual.{match[1]}"] = value
    return result


def _language_model(state: State) -> str | None:
    """What stands before the names of the language model; None if there is none."""
    return next((name[: match.start(1)] for name in state if (match := _EMBEDDING.search(name))), None)


_EMBEDDING = re.compile(r"(?:^|\.)(embed_tokens\.weight)$")
