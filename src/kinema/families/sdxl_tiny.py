"""Small Stable Diffusion XL models with random weights and every structural feature of the published ones, for
tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.families.tiny import autoencoder_kl, clip_text, clip_tokenizer, spread, tiny_seed, write_directory

CLIP_L_DIM, CLIP_G_DIM = 16, 20
TIME_DIM = 8
"""Channels of each of the six numbers of the sizes."""


def write_tiny(directory: Path, prediction: str, seed: int) -> Path:
    """Write the diffusers directory of a tiny model whose scheduler has this ``prediction_type``; returns it.

    With velocity prediction the schedule ends without signal.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    velocity = prediction == "v_prediction"
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction,
        rescale_betas_zero_snr=velocity,
    )
    tokenizers = [clip_tokenizer(), clip_tokenizer(pad_token="!")]
    modules: dict[str, Any] = {"scheduler": scheduler, "tokenizer": tokenizers[0], "tokenizer_2": tokenizers[1]}
    with tiny_seed(seed):
        modules["text_encoder"] = clip_text(tokenizers[0], CLIP_L_DIM)
        modules["text_encoder_2"] = clip_text(tokenizers[1], CLIP_G_DIM, with_projection=True, hidden_act="gelu")
        modules["vae"] = autoencoder_kl(4, 0.13025, None, quant_convs=True)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(8, 16, 24),
            norm_num_groups=4,
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4, 6),
            transformer_layers_per_block=(1, 2, 3),
            use_linear_projection=True,
            cross_attention_dim=CLIP_L_DIM + CLIP_G_DIM,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_DIM,
            projection_class_embeddings_input_dim=CLIP_G_DIM + 6 * TIME_DIM,
        )
        modules["unet"] = spread(unet.eval())
    return write_directory(directory, StableDiffusionXLPipeline(**modules, add_watermarker=False))
