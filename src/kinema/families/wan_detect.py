"""Which of the published Wan models a network is, from its configuration or its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kinema.errors import UserError
from kinema.families.loading import Found, read_json
from kinema.families.tensors import looks_like, tensor_shapes

WIDTHS = (1536, 3072, 5120)
"""Of the published networks."""


@dataclass(frozen=True)
class Traits:
    """What tells the networks apart."""

    width: int
    channels: int
    """Of its input: 16, 36 with those of image-to-video, 48 over the autoencoder of Wan 2.2."""
    image: bool
    """Whether it reads CLIP's embedding of a frame."""
    both_ends: bool
    """Whether it reads those of two."""


def read_traits(described: Mapping[str, Any], found: Found) -> Traits:
    """From a diffusers configuration, the original's, or the shapes of the weights; UserError for other sizes."""
    if "attention_head_dim" in described:
        return Traits(
            width=described["num_attention_heads"] * described["attention_head_dim"],
            channels=described["in_channels"],
            image=described.get("image_dim") is not None,
            both_ends=described.get("pos_embed_seq_len") is not None,
        )
    weights = [file for file in found.files if file.suffix != ".json"]
    if not weights and "in_dim" in described:  # an expert's folder, of which only the configuration was fetched
        return Traits(described["dim"], described["in_dim"], image=False, both_ends=False)
    shapes = tensor_shapes(weights)
    width, channels = shapes.get("patch_embedding.weight", (0, 0))[:2]
    if width not in WIDTHS:
        raise UserError(
            f"{found.key}: {found.place} looks like {looks_like(shapes)}, not a Wan network of a published size. "
            "Name model.variant, or give model.path = a diffusers directory that describes it."
        )
    return Traits(width, channels, "img_emb.proj.1.weight" in shapes, "img_emb.emb_pos" in shapes)


def choose(
    traits: Traits, described: Mapping[str, Any], found: Found, scheduler: Found | None, experts: bool
) -> str | None:
    """The name of the variant. ``experts``: there is a second network, so that the model is of Wan 2.2."""
    named = f"{found.place.parent.name}/{found.place.name}".lower()
    if traits.channels == 48:
        index = found.place.parent / "model_index.json"
        pipeline = read_json(index).get("_class_name", "") if index.is_file() else ""
        return "ti2v-5b-i2v" if "ImageToVideo" in pipeline else "ti2v-5b"
    experts = experts or any(word in named for word in ("high_noise", "low_noise"))
    own = described.get("in_channels") == described.get("out_channels", 16)  # a network over another autoencoder
    if traits.channels == 16 or ("in_channels" in described and own):
        if experts:
            return "t2v-a14b"
        return "t2v-14b" if traits.width >= 5120 else "t2v-1.3b"
    if traits.channels != 36:
        return None
    if traits.both_ends:
        return "flf2v-14b-720p"
    if not traits.image:
        return "i2v-a14b"
    # The two have the same shapes: official names tell, and so does the time shift of a diffusers directory.
    shift = read_json(scheduler.config).get("flow_shift") if scheduler and scheduler.config else None
    return "i2v-14b-720p" if "720p" in named or (shift or 0) >= 5 else "i2v-14b-480p"
