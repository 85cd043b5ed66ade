"""The published models of LTX-Video, and the names of their weights in the original layout.

Sources: the authors' single files, as diffusers' ``scripts/convert_ltx_to_diffusers.py`` reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kinema.data.lengths import ClipLengths
from kinema.families.base import SamplingDefaults, Variant
from kinema.families.layout import Layout
from kinema.families.loading import PartSpec
from kinema.families.parts import SCHEDULER, T5_TOKENIZER, T5_XXL

if TYPE_CHECKING:
    from torch import Tensor

NETWORK = Layout(
    [
        ("proj_in", "patchify_proj"),
        ("time_embed", "adaln_single"),
        *(
            (f"transformer_blocks.{{}}.{attention}.norm_{x}", f"transformer_blocks.{{}}.{attention}.{x}_norm")
            for attention in ("attn1", "attn2")
            for x in "qk"
        ),
    ],
    same=True,
)
"""diffusers' LTXVideoTransformer3DModel against the original."""


def _autoencoder(down: Sequence[str], up: Sequence[str]) -> Layout:
    """The original numbers all blocks of a side in one row; ``down`` and ``up`` are diffusers' names of them."""

    def pairs() -> Iterator[tuple[str, str]]:
        for side, kind, names in (("encoder", "down", down), ("decoder", "up", up)):
            for number, name in enumerate(names):
                ours, theirs = f"{side}.{name}", f"{side}.{kind}_blocks.{number}"
                yield ours, theirs
                yield f"{ours}.resnets.{{}}", f"{theirs}.res_blocks.{{}}"
                for inner, outer in ((ours, theirs), (f"{ours}.resnets.{{}}", f"{theirs}.res_blocks.{{}}")):
                    yield f"{inner}.norm3", f"{outer}.norm3.norm"
                    yield f"{inner}.conv_shortcut.conv", f"{outer}.conv_shortcut"

    return Layout(
        [
            *pairs(),
            ("decoder.time_embedder", "decoder.last_time_embedder"),
            ("decoder.scale_shift_table", "decoder.last_scale_shift_table"),
            ("latents_mean", "per_channel_statistics.mean-of-means"),
            ("latents_std", "per_channel_statistics.std-of-means"),
        ],
        dropped=[r"per_channel_statistics\.(?!mean-of-means$|std-of-means$).*"],
        same=True,
    )


_OLD_ENCODER = (
    *("down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.0.conv_out"),
    *("down_blocks.1", "down_blocks.1.downsamplers.0", "down_blocks.1.conv_out"),
    *("down_blocks.2", "down_blocks.2.downsamplers.0", "down_blocks.3", "mid_block"),
)
_OLD_DECODER = (
    *("mid_block", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1", "up_blocks.2.conv_in"),
    *("up_blocks.2.upsamplers.0", "up_blocks.2", "up_blocks.3.conv_in", "up_blocks.3.upsamplers.0", "up_blocks.3"),
)
_ENCODER = tuple(name for i in range(4) for name in (f"down_blocks.{i}", f"down_blocks.{i}.downsamplers.0"))
_DECODER = tuple(name for i in range(4) for name in (f"up_blocks.{i}.upsamplers.0", f"up_blocks.{i}"))

AUTOENCODERS = {
    "0.9": _autoencoder(_OLD_ENCODER, _OLD_DECODER),
    "0.9.1": _autoencoder(_OLD_ENCODER, ("mid_block", *_DECODER)),
    "0.9.5": _autoencoder((*_ENCODER, "mid_block"), ("mid_block", *_DECODER)),
}
"""diffusers' AutoencoderKLLTXVideo against the original, by the version that brought it."""

OF_095 = "encoder.down_blocks.1.conv.conv."
OF_091 = "decoder.last_time_embedder."
"""Beginnings of names that tell the versions of the original autoencoder."""


def autoencoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of any version of the original autoencoder, or diffusers' own, to diffusers'."""
    if not any(name.startswith("per_channel_statistics.") for name in state):
        return state
    of_095 = any(name.startswith(OF_095) for name in state)
    of_091 = any(name.startswith(OF_091) for name in state)
    return AUTOENCODERS["0.9.5" if of_095 else "0.9.1" if of_091 else "0.9"].from_original(state)


PARTS = {
    "network": PartSpec(
        "diffusion network",
        "transformer",
        "diffusers:LTXVideoTransformer3DModel",
        ("ltx-video-2b-v0.9*.safetensors", "ltxv-13b-0.9*.safetensors"),
        to_ours=NETWORK.from_original,
    ),
    "autoencoder": PartSpec(
        "autoencoder (LTX-Video)",
        "vae",
        "diffusers:AutoencoderKLLTXVideo",
        to_ours=autoencoder,
        inside=("vae.",),
    ),
    "text_encoder": T5_XXL,
    "tokenizer": T5_TOKENIZER,
    "scheduler": SCHEDULER,
}

SMALL = SamplingDefaults(height=512, width=704, frames=161, fps=25.0, steps=50, guidance=3.0)
LARGE = SamplingDefaults(height=512, width=768, frames=121, fps=25.0, steps=30, guidance=5.0)
"""The authors' settings, as diffusers' pipelines and documentation have them."""


def _variants(version: str, parameters: int, hub: str, sampling: SamplingDefaults) -> Iterator[Variant]:
    """The same weights twice: told the text alone, or the first frame too."""
    new = not version.endswith(("0.9", "0.9.1"))
    for kind in ("t2v", "i2v"):
        plain = "LTXPipeline" if kind == "t2v" else "LTXImageToVideoPipeline"
        yield Variant(
            f"{kind}-{version}",
            "video",
            parameters,
            tuple(PARTS),
            hub,
            sampling,
            pipeline="LTXConditionPipeline" if new else plain,
            conditions=("text",) if kind == "t2v" else ("text", "first_frame"),
            grid=32,
            lengths=ClipLengths(8),
            patch=(1, 1, 1),
            shift="resolution",
        )


VARIANTS = {
    variant.name: variant
    for version, parameters, hub, sampling in (
        ("2b-0.9", 1_923_385_472, "Lightricks/LTX-Video", SMALL),
        ("2b-0.9.1", 1_923_385_472, "Lightricks/LTX-Video-0.9.1", SMALL),
        ("2b-0.9.5", 1_923_385_472, "Lightricks/LTX-Video-0.9.5", SMALL),
        ("13b-0.9.7", 13_042_569_344, "Lightricks/LTX-Video-0.9.7-dev", LARGE),
    )
    for variant in _variants(version, parameters, hub, sampling)
}
