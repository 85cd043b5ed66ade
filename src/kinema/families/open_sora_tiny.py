"""Small Open-Sora models with random weights and every structural feature of the published ones, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kinema.families.tiny import clip_text, clip_tokenizer, spread, t5_encoder, t5_tokenizer, tiny_seed

TEXT_DIM = 32
POOLED_DIM = 24


def write_tiny(directory: Path, variant: str, seed: int) -> Path:
    """Write the diffusers directory of a tiny model; returns the directory."""
    import torch
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler

    from kinema.networks.dc_ae import VideoDCAE
    from kinema.networks.open_sora import OpenSoraTransformer

    dense = variant == "v2-dc"
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    modules: dict[str, Any] = {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer_2,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
    with tiny_seed(seed):
        modules["text_encoder"] = clip_text(tokenizer, POOLED_DIM)
        modules["text_encoder_2"] = t5_encoder(tokenizer_2, TEXT_DIM)
        if dense:
            widths = (8, 16, 16, 32, 32, 64)
            vae: Any = VideoDCAE(
                latent_channels=16,
                encoder_widths=widths,
                decoder_widths=widths,
                encoder_depths=(1,) * 6,
                decoder_depths=(1,) * 6,
            )
        else:
            vae = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 12, 12), norm_num_groups=4)
        modules["vae"] = spread(vae.eval())
        transformer = OpenSoraTransformer(
            in_channels=16 if dense else 64,
            patch_size=1 if dense else 2,
            vec_in_dim=POOLED_DIM,
            context_in_dim=TEXT_DIM,
            hidden_size=48,
            num_heads=2,
            axes_dim=(4, 8, 12),
            depth=2,
            depth_single_blocks=2,
        )
        modules["transformer"] = spread(transformer.eval())
        for parameter in transformer.parameters():  # its own initial weights close all gates and predict zero
            if parameter.ndim == 2:
                parameter.data = torch.randn_like(parameter) / parameter.shape[1] ** 0.5
    index: dict[str, Any] = {"_class_name": "OpenSoraPipeline"}
    for folder, module in modules.items():
        module.save_pretrained(directory / folder)
        library = type(module).__module__
        own = library.startswith("kinema.")  # as diffusers writes it for classes of other packages
        index[folder] = [library if own else library.split(".")[0], type(module).__name__]
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return directory
