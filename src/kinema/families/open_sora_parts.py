"""The published models of Open-Sora 2.0, and where their parts lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kinema.data.lengths import ClipLengths
from kinema.families.base import SamplingDefaults, Variant
from kinema.families.hunyuan_video_parts import PARTS as HUNYUAN
from kinema.families.layout import Layout
from kinema.families.loading import Found, PartSpec, read_json
from kinema.families.parts import CLIP_L, CLIP_L_TOKENIZER, SCHEDULER, T5_XXL, tokenizer
from kinema.families.tensors import SUFFIXES, tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

HUB = "hpcai-tech/Open-Sora-v2"
_CLIP, _T5 = ("openai/clip-vit-large-patch14",), ("google/t5-v1_1-xxl",)
"""Folders of the text encoders in the authors' repository."""

NETWORK = Layout([], same=True)
"""The class has the names of the published file."""

PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "kinema.networks.open_sora:OpenSoraTransformer",
        ("Open_Sora_v2*.safetensors",),
        to_ours=NETWORK.from_original,
    ),
    "autoencoder": replace(HUNYUAN["autoencoder"], originals=("hunyuan_vae.safetensors",)),
    "text_encoder": replace(CLIP_L, originals=_CLIP),
    "tokenizer": replace(CLIP_L_TOKENIZER, originals=_CLIP),
    "text_encoder_2": replace(T5_XXL, folder="text_encoder_2", originals=_T5),
    "tokenizer_2": replace(tokenizer("T5", "google/t5-v1_1-xxl", 2), originals=_T5),
    "scheduler": SCHEDULER,
}
DC_AE = PartSpec(
    "autoencoder (video DC-AE)",
    "vae",
    "kinema.networks.dc_ae:VideoDCAE",
    ("F32T4C128_AE.safetensors",),
)

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "v2",
            "video",
            11_891_390_528,
            tuple(PARTS),
            HUB,
            SamplingDefaults(height=192, width=336, frames=129, fps=24.0, steps=50, guidance=7.5, image_guidance=3.0),
            pipeline="OpenSoraPipeline",
            conditions=("text", "references"),
            most_pictures=2,
            shift="resolution",
        ),
        Variant(
            "v2-dc",
            "video",
            11_891_971_200,
            tuple(PARTS),
            f"{HUB}-Video-DC-AE",
            SamplingDefaults(height=576, width=1024, frames=128, fps=24.0, steps=50, guidance=7.5, image_guidance=3.0),
            pipeline="OpenSoraPipeline",
            conditions=("text", "references"),
            most_pictures=2,
            grid=32,
            lengths=ClipLengths(4, first=8),
            patch=(1, 1, 1),
            shift="resolution",
        ),
    )
}


def autoencoder_class(found: Found | None) -> str:
    """The class of an autoencoder, by its configuration, or by the names in a single file without one; empty where
    neither tells."""
    if found is None:
        return ""
    described = read_json(found.config) if found.config is not None else found.described
    if described is not None:
        return str(described.get("_class_name", ""))
    files = [file for file in found.files if file.suffix in SUFFIXES]
    names = tensor_shapes(files)
    of_wan = "encoder.conv1.weight" in names or "encoder.conv_in.weight" in names  # its own names, or diffusers'
    return "AutoencoderKLWan" if of_wan else ""


def told_of_frames(network: PartSpec, told: bool, patch: Callable[[], int]) -> PartSpec:
    """The part whose weights have the layer for given frames, whether their file has it or not: zero where it has not,
    as training starts it. ``told`` False: without it. ``patch``: latent rows and columns of a token, asked for when
    weights are there, since the variant may be told by them."""

    def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
        ours = network.to_ours(state)
        if not told:
            return {name: value for name, value in ours.items() if not name.startswith("cond_in.")}
        weight = ours.get("img_in.weight")
        if weight is not None and weight.ndim == 2 and "cond_in.weight" not in ours:
            ours["cond_in.weight"] = weight.new_zeros(weight.shape[0], weight.shape[1] + patch() ** 2)
            ours["cond_in.bias"] = weight.new_zeros(weight.shape[0])
        return ours

    return replace(network, to_ours=to_ours)
