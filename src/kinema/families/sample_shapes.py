"""What one encoded sample of each family looks like: the shapes of the tensors that its encoders give.

`kinema plan` makes batches of them without encoders, weights or data. The suite of families holds every entry against
what the encoders of a tiny model really give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kinema.data.buckets import Bucket
from kinema.errors import UserError
from kinema.families.base import Family
from kinema.families.standard import StandardFamily

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

CLIP_TOKENS = 77
LONGEST_TEXT = 1000
"""Tokens of text where a family sets no limit of its own: what the pipelines of Qwen2.5-VL take."""
GLYPH_TOKENS = 256
"""Of ByT5, which reads what a caption has in quotation marks."""
PICTURE_TOKENS = 1024
"""About what Qwen2.5-VL makes of a picture of a million pixels."""


@dataclass(frozen=True)
class _Asked:
    """What the shapes follow from."""

    family: Any
    network: Mapping[str, Any]
    """The network's configuration."""
    latents: tuple[int, ...]
    """[C, T, H, W]"""
    text: int
    """Tokens."""
    controls: int
    """Control pictures."""

    def picture(self) -> tuple[int, ...]:
        """Latents [C, 1, H, W] of a single picture of the size of the sample: its first frame, or a control."""
        channels, _, height, width = self.latents
        return channels, 1, height, width


def sample_tensors(
    family: Family, bucket: Bucket, text_tokens: int | None = None, controls: int = 1
) -> dict[str, Tensor]:
    """One sample's tensors, by the names and with the shapes that the family's encodings give them: on the meta device,
    but for what holds sizes.

    ``text_tokens``: length of the caption in tokens of the main text encoder; default: the most that the network sees.
    ``controls``: control pictures, where the variant edits. UserError for a family that has no entry here.
    """
    import torch

    shapes = sample_shapes(family, bucket, text_tokens, controls)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if "control_sizes" in tensors:  # rows and columns of tokens of each control picture
        rows, columns = bucket.height // family.grid, bucket.width // family.grid
        tensors["control_sizes"] = torch.tensor([[rows, columns]] * shapes["control_sizes"][0])
    return tensors


def sample_shapes(family: Family, bucket: Bucket, text_tokens: int | None = None, controls: int = 1) -> Shapes:
    """The shapes of `sample_tensors`."""
    entry = _ENTRIES.get(family.name)
    if entry is None or not isinstance(family, StandardFamily):
        known = ", ".join(sorted(_ENTRIES))
        raise UserError(
            f"model.family: a plan needs the shapes of encoded samples. It knows those of {known}, not {family.name}'s."
        )
    variant = family.variant
    cell = variant.grid // variant.patch[1]
    autoencoder = family.known_config("autoencoder")
    channels = autoencoder.get("latent_channels") or autoencoder["z_dim"]
    latents = (channels, variant.lengths.latents(bucket.frames), bucket.height // cell, bucket.width // cell)
    text = text_tokens or family.text_length or LONGEST_TEXT
    asked = _Asked(family, family.known_config("network"), latents, text, controls)
    return {"latents": latents, **entry(asked)}


def _aura_flow(a: _Asked) -> Shapes:
    return {"text": (a.text, a.network["joint_attention_dim"])}


def _cosmos(a: _Asked) -> Shapes:
    return {"text": (a.text, a.network["text_embed_dim"])}


def _flux(a: _Asked) -> Shapes:
    shapes: Shapes = {
        "text": (a.text, a.network["joint_attention_dim"]),
        "pooled": (a.network["pooled_projection_dim"],),
    }
    return shapes | ({"control": a.picture()} if a.family.edits else {})


def _hidream(a: _Asked) -> Shapes:
    t5, llama = a.network["caption_channels"]
    clip_l = a.family.known_config("text_encoder")["projection_dim"]
    return {
        "t5": (a.text, t5),
        "llama": (max(a.network["llama_layers"]) + 1, a.text, llama),
        "pooled_l": (clip_l,),
        "pooled_g": (a.network["text_emb_dim"] - clip_l,),
    }


def _qwen_and_glyphs(a: _Asked) -> Shapes:
    return {"text": (a.text, a.network["text_embed_dim"]), "glyphs": (GLYPH_TOKENS, a.network["text_embed_2_dim"])}


def _hunyuan_video(a: _Asked) -> Shapes:
    told = a.family.from_image
    tokens = a.text
    if told:
        from kinema.families.hunyuan_video import ASSISTANT_TOKENS, PICTURE_TOKENS

        tokens += -(-PICTURE_TOKENS // a.family._every) - ASSISTANT_TOKENS
    shapes: Shapes = {
        "text": (tokens, a.network["text_embed_dim"]),
        "pooled": (a.network["pooled_projection_dim"],),
    }
    return shapes | ({"first_frame": a.picture()} if told else {})


def _hunyuan_video15(a: _Asked) -> Shapes:
    shapes = _qwen_and_glyphs(a)
    if a.family.from_image:
        seen = a.family.known_config("image_encoder")
        seen = seen.get("vision_config", seen)
        tokens = (seen["image_size"] // seen["patch_size"]) ** 2
        shapes |= {"first_frame": a.picture(), "image": (tokens, a.network["image_embed_dim"])}
    return shapes


def _ltx_video(a: _Asked) -> Shapes:
    return {"text": (a.text, a.network["caption_channels"])}


def _lumina2(a: _Asked) -> Shapes:
    return {"text": (a.text, a.network["cap_feat_dim"])}


def _omnigen2(a: _Asked) -> Shapes:
    channels, _, height, width = a.latents
    return {"text": (a.text, a.network["text_feat_dim"]), "controls": (a.controls, channels, height, width)}


def _open_sora(a: _Asked) -> Shapes:
    from kinema.families.open_sora_conditions import latents_of

    shapes: Shapes = {"text": (a.text, a.network["context_in_dim"]), "pooled": (a.network["vec_in_dim"],)}
    channels, frames, height, width = a.latents
    for end in a.family.references:
        length = latents_of(end.frames, a.family.causal)
        shapes[end.name] = (channels, length, height, width) if length < frames else (0,)
    return shapes


def _qwen_image(a: _Asked) -> Shapes:
    if not a.family.edits:
        return {"text": (a.text, a.network["joint_attention_dim"])}
    channels, _, height, width = a.latents
    tokens = a.controls * (height // 2) * (width // 2)
    text = a.text + a.controls * PICTURE_TOKENS
    return {
        "text": (text, a.network["joint_attention_dim"]),
        "controls": (tokens, 4 * channels),
        "control_sizes": (a.controls, 2),
    }


def _sd3(a: _Asked) -> Shapes:
    clip_l, clip_g = (a.family.known_config(part) for part in ("text_encoder", "text_encoder_2"))
    return {
        "clip_l": (CLIP_TOKENS, clip_l["hidden_size"]),
        "clip_g": (CLIP_TOKENS, clip_g["hidden_size"]),
        "pooled_l": (clip_l["projection_dim"],),
        "pooled_g": (clip_g["projection_dim"],),
        "t5": (a.text, a.network["joint_attention_dim"]),
    }


def _sdxl(a: _Asked) -> Shapes:
    clip_l, clip_g = (a.family.known_config(part) for part in ("text_encoder", "text_encoder_2"))
    return {
        "text_encoder": (CLIP_TOKENS, clip_l["hidden_size"]),
        "text_encoder_2": (CLIP_TOKENS, clip_g["hidden_size"]),
        "pooled": (clip_g["projection_dim"],),
        "sizes": (6,),
    }


def _wan(a: _Asked) -> Shapes:
    family = a.family
    shapes: Shapes = {"text": (a.text, a.network["text_dim"])}
    if family.first_frame_p > 0:
        shapes["first_frame"] = a.picture() if family.time_per_token else a.latents
    if family.reads_clip:
        seen = family.known_config("image_encoder")
        tokens = (seen["image_size"] // seen["patch_size"]) ** 2 + 1
        shapes["image"] = (*((2,) if family.to_last else ()), tokens, a.network["image_dim"])
    return shapes


def _z_image(a: _Asked) -> Shapes:
    return {"text": (a.text, a.network["cap_feat_dim"])}


_ENTRIES: dict[str, Callable[[_Asked], Shapes]] = {
    "aura_flow": _aura_flow,
    "chroma": _aura_flow,
    "cosmos1": _cosmos,
    "cosmos_predict2": _cosmos,
    "flux": _flux,
    "hidream": _hidream,
    "hunyuan_image": _qwen_and_glyphs,
    "hunyuan_video": _hunyuan_video,
    "hunyuan_video15": _hunyuan_video15,
    "ltx_video": _ltx_video,
    "lumina2": _lumina2,
    "omnigen2": _omnigen2,
    "open_sora": _open_sora,
    "qwen_image": _qwen_image,
    "sd3": _sd3,
    "sdxl": _sdxl,
    "wan": _wan,
    "z_image": _z_image,
}
