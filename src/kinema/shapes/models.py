"""The world's own model: a tiny diffusers directory of the Wan type with trained ends and an untrained middle.

The autoencoder and the text encoder ship with kinema (scripts/make_shapes_codec.py makes them); the diffusion network
gets random weights from a seed, and training it is what the quickstart does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.shapes.world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import T5Tokenizer, UMT5EncoderModel

WEIGHTS = Path(__file__).parent / "weights"
LATENT_CHANNELS = 8
TEXT_DIM = 64
TEXT_LENGTH = 16
"""Tokens that a caption is padded to: ten words and an end, with room for more. Train and sample with the same."""

VAE_CONFIG: dict[str, Any] = {
    "base_dim": 8,
    "decoder_base_dim": 16,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
}
"""Four frames and 8 x 8 pixels a latent, causal in time, as Wan's."""

TEXT_ENCODER_CONFIG: dict[str, Any] = {
    "d_model": TEXT_DIM,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 1,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "tie_word_embeddings": False,
}

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 5,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}

SCHEDULER_SHIFT = 3.0

_COMMON_WORDS = (
    "a an the and or of in on at to from with over under is are it that this one two big small large little bright "
    "dark fast slow slowly quickly moving moves move going goes sliding slides video clip picture frame background "
    "screen shape orange pink brown grey star ball box dog cat man woman"
)
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-_()/&%+*=#@<>[]"


def vocabulary() -> list[tuple[str, float]]:
    """Pieces and their scores: the world's words, common ones, and single characters to spell any other with."""
    words = [*COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS, *_COMMON_WORDS.split()]
    pieces = [f"▁{word}" for word in dict.fromkeys(words)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return [*special, *((piece, -1.0) for piece in pieces), ("▁", -4.0), *((c, -8.0) for c in _CHARACTERS)]


def build_tokenizer() -> T5Tokenizer:
    """A fast tokenizer of the T5 kind over `vocabulary`; what it cannot spell becomes <unk>."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=vocabulary(), extra_ids=0)


def random_text_encoder(seed: int) -> UMT5EncoderModel:
    """The text encoder with seeded random weights, its words' embeddings orthogonal where there is room."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    generator = torch.Generator().manual_seed(seed)
    model = UMT5EncoderModel(UMT5Config(vocab_size=len(vocabulary()), **TEXT_ENCODER_CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif "shared" in name or "embed_tokens" in name:
                draw = torch.randn(len(parameter), TEXT_DIM, generator=generator)
                for start in range(0, len(draw), TEXT_DIM):
                    part = draw[start : start + TEXT_DIM]
                    part.copy_(torch.linalg.qr(part.T)[0].T * TEXT_DIM**0.5)
                parameter.copy_(draw)
            else:
                spread = 0.3 * parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        model.encoder.embed_tokens.weight.copy_(model.shared.weight)
    return model


def load_text_encoder() -> UMT5EncoderModel:
    """The shipped text encoder, fp32."""
    from safetensors.torch import load_file

    model = random_text_encoder(0)
    tensors = {name: value.float() for name, value in load_file(WEIGHTS / "text_encoder.safetensors").items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    model.load_state_dict(tensors)
    return model


def load_autoencoder() -> AutoencoderKLWan:
    """The shipped autoencoder, fp32, with the statistics of its latents in its configuration."""
    from diffusers import AutoencoderKLWan
    from safetensors.torch import load_file

    tensors = load_file(WEIGHTS / "vae.safetensors")
    statistics = {name: tensors.pop(name).tolist() for name in ("latents_mean", "latents_std")}
    vae = AutoencoderKLWan(**{**VAE_CONFIG, **statistics}).eval()
    vae.load_state_dict({name.removeprefix("vae."): value.float() for name, value in tensors.items()})
    return vae


def random_transformer(seed: int = 0, **overrides: Any) -> WanTransformer3DModel:
    """The diffusion network with random weights from `seed`; `overrides` change `TRANSFORMER_CONFIG`."""
    import torch
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WanTransformer3DModel(**{**TRANSFORMER_CONFIG, **overrides})


def write_model(folder: Path | str, seed: int = 0, **overrides: Any) -> Path:
    """Writes the diffusers directory that `WanPipeline.from_pretrained` loads; returns the folder.

    `seed` draws the diffusion network's weights, `overrides` change its configuration (num_layers=2, ...).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random_transformer(seed, **overrides).save_pretrained(folder / "transformer")
    load_autoencoder().save_pretrained(folder / "vae")
    load_text_encoder().save_pretrained(folder / "text_encoder")
    build_tokenizer().save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=SCHEDULER_SHIFT).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.42.1",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder
