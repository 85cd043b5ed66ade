"""Names of Stable Diffusion XL's weights: diffusers' layout against the original one.

The original names are those of Stability AI's generative-models, which single checkpoint files have (ComfyUI reads
them, and Kohya's tools train on them): ``input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight``. A level of the
network is three of its blocks, the third of which changes the resolution.
"""

from __future__ import annotations

from collections.abc import Mapping

from kinema.families.layout import Layout

LEVELS = 3
DOWN, UP = 2, 3
"""Pairs of a residual block and attention on a level."""
TEXT_WIDTH = 2048
"""Channels of both CLIPs together: what tells the network from those of other Stable Diffusions."""
V_PREDICTION_MARKS = ("v_pred", "ztsnr")
"""Empty tensors by which single files say that the network predicts the velocity, and that the last step has no signal;
ComfyUI reads them."""

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_OUTSIDE = (
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)


def _resnet(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(f"{ours}.{one}", f"{theirs}.{other}") for one, other in _RESNET]


def _network() -> list[tuple[str, str]]:
    pairs = list(_OUTSIDE)
    for level in range(LEVELS):
        for i in range(DOWN):
            place = f"input_blocks.{3 * level + i + 1}"
            pairs += _resnet(f"down_blocks.{level}.resnets.{i}", f"{place}.0")
            pairs.append((f"down_blocks.{level}.attentions.{i}", f"{place}.1"))
        pairs.append((f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{3 * level + 3}.0.op"))
        for i in range(UP):
            place = f"output_blocks.{3 * level + i}"
            pairs += _resnet(f"up_blocks.{level}.resnets.{i}", f"{place}.0")
            pairs.append((f"up_blocks.{level}.attentions.{i}", f"{place}.1"))
        pairs.append((f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{3 * level + 2}.2.conv"))
    for i in range(2):
        pairs += _resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}")
    return [*pairs, ("mid_block.attentions.0", "middle_block.1")]


NETWORK = Layout(_network(), dropped=V_PREDICTION_MARKS)
TEXT_ENCODER = Layout(
    [(name, f"text_model.{name}") for name in ("embeddings", "encoder", "final_layer_norm")],
)
"""CLIP-L: transformers left out the first word of its names in version 5; files and adapters have it."""
TEXT_ENCODER_2 = Layout([], same=True)
"""CLIP-G with its projection, which kept that word."""


def is_sdxl(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors are those of a network of this family: others have other widths of text, or know no sizes."""
    text = next((shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), (0, 0))
    return text[-1] == TEXT_WIDTH and any(name.startswith(("label_emb.", "add_embedding.")) for name in shapes)
