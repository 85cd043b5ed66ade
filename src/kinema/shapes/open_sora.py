"""The world's Open-Sora model: a tiny diffusers directory of its type, with trained ends and an untrained middle.

The autoencoder is the world's own, of Wan's type. T5 has the weights of the shipped text encoder, whose one layer is
the same in T5 and UMT5; CLIP is made to add up the words of a caption.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.shapes.models import LATENT_CHANNELS, SCHEDULER_SHIFT, TEXT_DIM, TEXT_ENCODER_CONFIG
from kinema.shapes.world import all_combos, caption

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

TRANSFORMER_CONFIG: dict[str, Any] = {
    "in_channels": 4 * LATENT_CHANNELS,
    "patch_size": 2,
    "vec_in_dim": TEXT_DIM,
    "context_in_dim": TEXT_DIM,
    "hidden_size": 192,
    "num_heads": 4,
    "mlp_ratio": 8 / 3,
    "depth": 2,
    "depth_single_blocks": 4,
    "axes_dim": [16, 16, 16],
    "cond_embed": False,
}
"""Told no frames: `model.cond_embed` adds that to what has learnt the rest."""


def load_t5() -> T5EncoderModel:
    """The shipped text encoder as T5: with one layer, UMT5 has the same weights in the same places."""
    from transformers import T5Config, T5EncoderModel

    from kinema.shapes.models import load_text_encoder

    known = load_text_encoder()
    config = T5Config(
        vocab_size=known.config.vocab_size, feed_forward_proj=known.config.feed_forward_proj, **TEXT_ENCODER_CONFIG
    )
    encoder = T5EncoderModel(config).eval()
    encoder.load_state_dict(known.state_dict())
    return encoder


def build_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's, with every word of the world's captions as one token."""
    from kinema.families.tiny_tokenizers import clip_tokenizer

    return clip_tokenizer(texts=[caption(combo) for combo in all_combos()])


def words_added_up(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """A CLIP text encoder whose pooled output is the normalised sum of the words' embeddings.

    Its one layer attends evenly to all words up to the end of the text, and has no second part. So two captions that
    share words have much in common, and a combination of known words is no stranger.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=TEXT_DIM,
        num_hidden_layers=1,
        num_attention_heads=1,
        eos_token_id=2,  # as is published: pooled at the largest id, which is the end of the text
    )
    generator = torch.Generator().manual_seed(seed)
    model = CLIPTextModel(config).eval()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if value.is_floating_point()}
    for name, value in state.items():
        if name.endswith("token_embedding.weight"):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.02)  # small beside what the layer adds
        elif name.endswith(("v_proj.weight", "out_proj.weight")):
            value.copy_(torch.eye(TEXT_DIM))
        elif "norm" in name and name.endswith("weight"):
            value.fill_(1.0)
    model.load_state_dict(state, strict=False)
    return model


def write_model(folder: Path | str, seed: int = 0, **overrides: Any) -> Path:
    """Writes the diffusers directory of the world's Open-Sora model; returns the folder.

    `seed` draws the diffusion network's weights, `overrides` change its configuration (depth=1, ...).
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    from kinema.networks.open_sora import OpenSoraTransformer
    from kinema.shapes.models import build_tokenizer, load_autoencoder

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = OpenSoraTransformer(**{**TRANSFORMER_CONFIG, **overrides})
    clip_tokenizer = build_clip_tokenizer()
    modules: dict[str, Any] = {
        "transformer": transformer,
        "vae": load_autoencoder(),
        "text_encoder": words_added_up(clip_tokenizer),
        "tokenizer": clip_tokenizer,
        "text_encoder_2": load_t5(),
        "tokenizer_2": build_tokenizer(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT),
    }
    index: dict[str, Any] = {"_class_name": "OpenSoraPipeline"}
    for name, module in modules.items():
        module.save_pretrained(folder / name)
        library = type(module).__module__
        index[name] = [library if library.startswith("kinema.") else library.split(".")[0], type(module).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder
